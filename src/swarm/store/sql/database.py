"""One database: its connections, transactions, migrations and errors.

Synchronous on purpose; only the threads of threads.py use it (docs/adr/0002-store-threads.md).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, Final, TypeAlias

from swarm.base.realtime import ahead_of_others
from swarm.errors import StoreError, UsageError
from swarm.store.sql import files
from swarm.store.sql.dialect import NOT_MIGRATED, Dialect, Sql, explain, without_password
from swarm.store.sql.dialects import dialect_of
from swarm.store.sql.rows import iso
from swarm.store.sql.wake import Wake

# The revision that this version of Swarm needs: the newest of migrations/versions.
HEAD: Final = "v0_2_1"
_IN_CHUNK: Final = 512  # values in one IN (…): far below the limit of every database

_URL: Final = re.compile(r"(?P<name>\w+)(?:\+\w+)?://.*", re.S)

Row: TypeAlias = Any  # a named tuple: attributes are the statement's columns, whatever another tool put into them


_ONE_ROW: Final = set[Sql]()


def one_row(sql: str) -> Sql:
    """A statement that changes exactly one row, or else nothing of its transaction may count: see `Tx.many`."""
    statement = Sql(sql)
    _ONE_ROW.add(statement)
    return statement


@cache
def _in(statement: Sql, count: int) -> str:
    """A statement with ``IN :ids``, for ``count`` values."""
    return statement.replace(":ids", f"({', '.join(f':id_{n}' for n in range(count))})")


_REVISION: Final = Sql("SELECT version_num FROM alembic_version")
_WRITE_NOTHING: Final = Sql("DELETE FROM alembic_version WHERE 1 = 0")


@cache
def _has_revision(dialect: Dialect) -> Sql:
    return Sql(dialect.has_revision)


@cache
def _now_ms(dialect: Dialect) -> Sql:
    return Sql(f"SELECT {dialect.now_ms} AS now_ms")


@cache
def _written_by_others(dialect: Dialect) -> Sql:
    return Sql(f"SELECT {dialect.written_by_others} AS number")


@cache
def _row_type(columns: tuple[str, ...]) -> Callable[[Iterable[Any]], Any]:
    row: Any = namedtuple("Row", columns)  # type: ignore[misc]  # the names come from our own statements
    make: Callable[[Iterable[Any]], Any] = row._make
    return make


@dataclass(slots=True)
class Connection:
    """The driver's connection, of one thread. ``opened``: the files as they were then, to which it may write.
    ``lock_seconds``: waited for the write lock, in this transaction."""

    driver: Any
    write: bool
    opened: files.OpenFiles | None = None
    lock_seconds: float = 0.0

    def close(self) -> None:
        self.driver.close()


class Outdated(Exception):
    """Another program wrote, or is writing, since an optimistic transaction began: nothing of it was written."""


class NotExact(Exception):
    """A shared transaction needs to be an exact one: nothing of it was written."""


class Tx:
    """An open transaction. A row is a named tuple of its statement's columns.

    Changes are written before the next read, or else together with the commit: while a transaction reads and computes,
    it holds no lock that another program's INSERT could meet.
    """

    def __init__(
        self, connection: Connection, dialect: Dialect, wakes: Iterable[Wake] = (), *, shared: bool = False
    ) -> None:
        self.connection = connection
        self.dialect = dialect
        self._shared = shared
        self._wakes, self._muted = wakes, list[Wake]()
        self._cursor = connection.driver.cursor()
        self._unwritten: list[tuple[Sql, Sequence[Mapping[str, Any]]]] = []
        self._if_undone: list[Callable[[], None]] = []
        self._locked = False

    @cached_property
    def now_ms(self) -> int:
        """Milliseconds since 1970 by the database's clock, read once: a transaction has one point in time."""
        (row,) = self.all(_now_ms(self.dialect))
        return int(row.now_ms)

    @cached_property
    def now(self) -> str:
        return iso(self.now_ms)

    @property
    def written_by_others(self) -> int:
        """Another number than before whenever another connection has changed the database."""
        sql = _written_by_others(self.dialect)  # own changes don't matter to it
        return int(self._cursor.execute(self._text(sql)).fetchone()[0])

    def all(self, statement: Sql, **values: Any) -> list[Row]:
        return self._rows(statement, values)

    def first(self, statement: Sql, **values: Any) -> Row | None:
        rows = self.all(statement, **values)
        return rows[0] if rows else None

    def run(self, statement: Sql, **values: Any) -> None:
        self.many(statement, [values])

    def many(self, statement: Sql, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same statement for each row. Raises the driver's error if one that is marked by `one_row` changed none:
        a trigger with RAISE(IGNORE) drops a change without an error."""
        if rows:
            self._unwritten.append((statement, rows))

    def write(self) -> None:
        """Write the changes made so far. Takes the write lock, if there are any."""
        unwritten, self._unwritten = self._unwritten, []
        if unwritten and not self._muted:
            self._muted = list(self._wakes)
            for wake in self._muted:
                wake.mute()
        if unwritten and not self._locked and self.dialect.lock is not None:
            # By a statement of its own: the driver parses one that was refused once at every use, under the lock.
            self._take_lock(self.dialect.lock)
        for statement, rows in unwritten:
            if len(rows) == 1:
                self._cursor.execute(self._text(statement), rows[0])
            else:
                self._cursor.executemany(self._text(statement), rows)
            if statement in _ONE_ROW and self._cursor.rowcount != len(rows):
                raise self.dialect.driver_error("a trigger ignored it, or removed the row")

    def _text(self, statement: str) -> str:
        return statement if self.dialect.translate is None else self.dialect.translate(str(statement))

    def begin(self, statement: str) -> None:
        if statement == self.dialect.begin_write:
            self._take_lock(statement)
        else:
            self._cursor.execute(statement)

    def _take_lock(self, statement: str) -> None:
        began = time.monotonic()
        try:
            self._cursor.execute(statement)
            self._locked = True
        finally:
            self.connection.lock_seconds += time.monotonic() - began

    def commit(self) -> None:
        if not self._unwritten and not self._locked:
            self.connection.driver.commit()
            return
        self._warm_up()
        with ahead_of_others():
            self.write()
            self.connection.driver.commit()

    def _warm_up(self) -> None:
        """Read what will be written, before the lock is taken."""
        ids = [rows[0]["ticket_id"] for _, rows in self._unwritten if "ticket_id" in rows[0]]
        if ids and not self._locked and self.dialect.warm_up is not None:
            with contextlib.suppress(self.dialect.driver_error):  # another program removed a table
                self._cursor.execute(self.dialect.warm_up, {"ticket_id": ids[0]}).fetchall()

    def exact(self) -> None:
        """What follows depends on rows that the transaction has read, but not locked. Raises NotExact in a shared one:
        then it runs again, as one that is refused if another transaction comes between."""
        if self._shared:
            raise NotExact

    def if_undone(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` unless this transaction is committed: it may run again."""
        self._if_undone.append(undo)

    def roll_back(self) -> None:
        for undo in self._if_undone:
            undo()
        self.connection.driver.rollback()

    def end(self) -> None:
        """The transaction is over. Its cursor is closed here: later, the garbage collector would do that on any thread,
        and while the connection waits for another program's lock, wait for it with the GIL, so that all threads stand.
        """
        self._cursor.close()
        muted, self._muted = self._muted, []
        for wake in muted:
            wake.unmute()

    def all_in(self, statement: Sql, ids: Iterable[str], **others: Any) -> list[Row]:
        """Rows of a statement with ``IN :ids``, for any number of ids.

        The number of parameters is rounded up to a power of two, by repeating the last id: so there are only a few
        different statements to prepare.
        """
        wanted, found = list(ids), []
        for start in range(0, len(wanted), _IN_CHUNK):
            chunk = wanted[start : start + _IN_CHUNK]
            count = 1 << (len(chunk) - 1).bit_length()
            chunk += chunk[-1:] * (count - len(chunk))
            values = {f"id_{number}": value for number, value in enumerate(chunk)}
            found += self._rows(_in(statement, count), values | others)
        return found

    def stream(self, statement: Sql, **values: Any) -> Iterator[Row]:
        """Rows one by one, on a separate cursor, for results that may not fit into memory."""
        self.write()
        with contextlib.closing(self.dialect.streaming(self.connection.driver)) as cursor:
            cursor.execute(self._text(statement), values)
            make = _row_type(tuple(column[0] for column in cursor.description))
            while rows := cursor.fetchmany(1000):
                yield from map(make, rows)

    def _rows(self, sql: str, values: Mapping[str, Any]) -> list[Row]:
        if self._unwritten:
            self.write()
        self._cursor.execute(self._text(sql), values)
        rows = self._cursor.fetchall()
        if not rows:
            return []
        make = _row_type(tuple(column[0] for column in self._cursor.description))
        return [make(row) for row in rows]

    def is_of_database(self, error: BaseException) -> bool:
        """Is the database at fault, and not one statement?"""
        complete = partial(_is_complete, self.connection, self.dialect)
        return explain(self.dialect, error, place="", busy_timeout_seconds=0.0, complete=complete) is not None


def _is_complete(connection: Connection, dialect: Dialect) -> bool:
    """Are all tables and columns that Swarm needs there?"""
    from swarm.store.sql.schema import metadata

    try:
        present = set(connection.driver.cursor().execute(dialect.columns).fetchall())
    except dialect.driver_error:
        return False
    return all((table.name, column.name) in present for table in metadata.tables.values() for column in table.columns)


class Database:
    """``url`` as SQLAlchemy has it: `sqlite:////path/swarm.db`. Raises UsageError for an invalid or unsupported one."""

    def __init__(self, url: str, *, busy_timeout_seconds: float) -> None:
        self.url = without_password(url)
        if (found := _URL.fullmatch(url)) is None:
            raise UsageError(
                f"bad database URL {self.url!r}; it looks like sqlite:////opt/swarm-platform/data/swarm.db"
            )
        if (dialect := dialect_of(found["name"])) is None:
            raise UsageError(
                f"the database {found['name']!r} is not supported; use sqlite or postgresql (got {self.url!r})"
            )
        self._url, self.dialect = url, dialect
        self.busy_timeout_seconds = busy_timeout_seconds
        self.wakes = list[Wake]()  # of this process: they are muted while a transaction writes
        self.file = self.dialect.file(url)
        self._changed: files.OpenFiles | None = None  # what was opened before it was changed from outside
        self.place = str(self.file) if self.file else self.url

    def check_directory(self) -> None:
        if self.file is not None and not self._test(self.file.parent.is_dir):
            raise StoreError(
                f"the directory {self.file.parent} of the database {self.file.name} does not exist; "
                "run `swarm init`, or set SWARM_HOME or SWARM_DATABASE_URL to where the database is"
            )

    def exists(self) -> bool:
        return self.file is None or self._test(self.file.exists)

    def _test(self, test: Callable[[], bool]) -> bool:
        try:
            return test()
        except OSError as error:
            raise StoreError(f"can't look for the database {self.place}: {error.strerror}; are you root?") from None

    def connect(self, *, write: bool) -> Connection:
        """A connection for the calling thread. ``write`` False: a read-only one. Raises StoreError."""
        self.check_directory()
        if write and self.file is not None:
            # Only its owner may read what tickets and agents say, whatever the directory and the umask allow. SQLite
            # gives its -wal and -shm files the same permissions. A file that is there keeps those that it has.
            with contextlib.suppress(OSError):  # SQLite will say what is wrong
                os.close(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if write and self._changed is not None:
            self._changed.check()
        with self.errors():
            connection = Connection(self.dialect.connect(self._url, write, self.busy_timeout_seconds), write)
        if write and self.file is not None and self.dialect.tidy is not None:
            # What a crash left in the log is copied now, since only then `OpenFiles` sees every later change.
            with self.errors():
                connection.driver.cursor().execute(self.dialect.tidy)
            connection.opened = files.OpenFiles(self.file)
        return connection

    @contextmanager
    def transaction(self, connection: Connection, *, optimistic: bool = False, shared: bool = False) -> Iterator[Tx]:
        """Commits at the end, rolls back on any exception. Raises StoreError when the database itself fails.

        ``optimistic``: begin without the write lock, and take it when something is written. What was read before must
        still be true then: else nothing is written, and Outdated is raised. ``shared``: see `Dialect.begin_shared`, and
        `Tx.exact`.
        """
        opened = connection.opened
        if opened is not None:
            try:
                (self._changed or opened).check()
            except StoreError:
                self._changed = opened  # a new connection would write into whatever is there now
                raise
        begin = self.dialect.begin_optimistic if optimistic else self._begin(connection)
        if shared and self.dialect.begin_shared is not None:
            begin = self.dialect.begin_shared
        tx = Tx(connection, self.dialect, self.wakes, shared=begin == self.dialect.begin_shared)
        try:
            with self.errors(connection):
                tx.begin(begin)
                yield tx
                tx.commit()
        except BaseException as error:
            tx.roll_back()
            if optimistic and isinstance(error, StoreError) and self.dialect.is_locked(error.__cause__):
                raise Outdated from error
            raise
        finally:
            tx.end()
        if opened is not None:
            opened.note()

    def wait_for_others(self, connection: Connection) -> None:
        """Until no other program holds the write lock: what is read then is likely to stay true for a while."""
        if self.dialect.lock is None:
            time.sleep(random.uniform(0.0, 0.01))  # so that two that met don't meet again
            return
        with self.errors(connection), ahead_of_others():
            connection.driver.execute(self.dialect.begin_write)
            connection.driver.rollback()

    def _begin(self, connection: Connection) -> str:
        return self.dialect.begin_write if connection.write else self.dialect.begin_read

    @contextmanager
    def errors(self, connection: Connection | None = None) -> Iterator[None]:
        """Turns errors of the database itself into StoreError.

        After some of them SQLite undoes the whole transaction, and the next error only says that a savepoint is gone.
        So this also looks at the errors behind an error, up to those from before the block.
        """
        before = sys.exception()
        try:
            yield
        except (self.dialect.driver_error, MemoryError) as error:
            one: BaseException | None = error
            while one is not None and one is not before:
                known = explain(
                    self.dialect,
                    one,
                    place=self.place,
                    busy_timeout_seconds=self.busy_timeout_seconds,
                    complete=lambda: connection is not None and _is_complete(connection, self.dialect),
                )
                if known is not None:
                    raise known from error
                one = one.__context__
            raise

    def revision(self, connection: Connection) -> str | None:
        """The revision of the database; None if it is empty."""
        with self.transaction(connection) as tx:
            if not tx.all(_has_revision(self.dialect)):
                return None
            found = tx.first(_REVISION)
            return found.version_num if found else None

    def check_revision(self, connection: Connection) -> None:
        """Raises StoreError unless the database is at `HEAD`."""
        found = self.revision(connection)
        if found != HEAD:
            why = f"it is at {found}, this Swarm needs {HEAD}" if found else "it is empty"
            raise StoreError(NOT_MIGRATED.format(place=self.place, error=why))

    def check_writable(self, connection: Connection) -> None:
        """Raises StoreError for a read-only file. SQLite lets a write transaction begin on one without an error, so an
        idle queue would not notice for hours."""
        with self.transaction(connection) as tx:
            tx.run(_WRITE_NOTHING)

    def migrate(self, connection: Connection) -> None:
        """Upgrade to `HEAD`, in one transaction. Others that call it meanwhile wait, and then find nothing to do."""
        from swarm.store.sql.migrate import RevisionLost, UnknownRevision, upgrade

        with self.errors():
            try:
                upgrade(connection.driver, self.dialect)
            except UnknownRevision as error:
                raise StoreError(
                    f"the database {self.place} is at revision {error}, which this version of Swarm does not know: "
                    "a newer version made it, or one from before 0.1.0; use that one, or another database"
                ) from None
            except RevisionLost:
                raise StoreError(
                    f"the database {self.place} has tables, but no row in alembic_version, which says what made them: "
                    "put back a backup, or move the database away and run `swarm init` again; if this version of Swarm "
                    f"made them: INSERT INTO alembic_version VALUES ('{HEAD}')"
                ) from None
