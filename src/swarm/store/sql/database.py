"""One database: its connections, transactions, migrations, and what its errors mean.

Synchronous on purpose, and used by the threads of threads.py only: see docs/adr/0002-store-threads.md.
"""

from __future__ import annotations

import re
import sqlite3
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL, Connection, Engine, make_url

from swarm.errors import StoreError, UsageError
from swarm.store.sql.dialect import DIALECTS, NOT_MIGRATED, Dialect, explain
from swarm.store.sql.rows import iso

MIGRATIONS: Final = Path(__file__).parents[1] / "migrations"
_IN_CHUNK: Final = 512  # values in one IN (…): far below every database's limit

_PASSWORD: Final = re.compile(r"(?<=:)[^:@/]+(?=@)")  # in what is no URL, but was meant to be one

Row: TypeAlias = Any  # a named tuple: attributes are the statement's columns, whatever another tool put into them


def _alembic(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@cache
def head() -> str:
    """The revision that this Swarm needs. Read once: a process out of descriptors can still open a connection."""
    revision = ScriptDirectory.from_config(_alembic()).get_current_head()
    assert revision is not None
    return revision


@cache
def _driver_sql(statement: sa.TextClause, dialect: sa.Dialect) -> str:
    """A statement as the driver takes it, with named parameters."""
    return str(statement.compile(dialect=dialect))


@cache
def _driver_sql_in(statement: sa.TextClause, dialect: sa.Dialect, count: int) -> str:
    """The same for ``IN :ids``, with room for so many values."""
    slots = ", ".join(f":id_{number}" for number in range(count))
    if dialect.paramstyle == "pyformat":
        slots = re.sub(r":(\w+)", r"%(\1)s", slots)
    ids = ":ids" if dialect.paramstyle == "named" else "%(ids)s"
    return _driver_sql(statement, dialect).replace(ids, f"({slots})")


@cache
def _moment(dialect: Dialect) -> sa.TextClause:
    return sa.text(f"SELECT {dialect.now_ms} AS now_ms")


@cache
def _row_type(columns: tuple[str, ...]) -> Callable[[Iterable[Any]], Any]:
    row: Any = namedtuple("Row", columns)  # type: ignore[misc]  # the names come from our own statements
    make: Callable[[Iterable[Any]], Any] = row._make
    return make


class Tx:
    """A transaction that has begun. A row is a named tuple of its statement's columns.

    SQLAlchemy compiles each statement once; from then on the driver's cursor runs it, which takes a fifth of the time.
    """

    def __init__(self, connection: Connection, dialect: Dialect) -> None:
        self.connection = connection
        self.dialect = dialect
        self._cursor = connection.connection.cursor()

    @cached_property
    def now_ms(self) -> int:
        """Milliseconds since 1970 by the database's clock, read once: one transaction happens at one moment."""
        (row,) = self.all(_moment(self.dialect))
        return int(row.now_ms)

    @cached_property
    def now(self) -> str:
        return iso(self.now_ms)

    def all(self, statement: sa.TextClause, **values: Any) -> list[Row]:
        return self._rows(_driver_sql(statement, self.connection.dialect), values)

    def first(self, statement: sa.TextClause, **values: Any) -> Row | None:
        rows = self.all(statement, **values)
        return rows[0] if rows else None

    def run(self, statement: sa.TextClause, **values: Any) -> None:
        self._cursor.execute(_driver_sql(statement, self.connection.dialect), values)

    def many(self, statement: sa.TextClause, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same statement for each row."""
        if rows:
            self._cursor.executemany(_driver_sql(statement, self.connection.dialect), rows)

    def all_in(self, statement: sa.TextClause, ids: Iterable[str], **others: Any) -> list[Row]:
        """Rows of a statement with ``IN :ids``, however many there are.

        The places in a statement are a power of two, the last id repeated: a handful of statements, prepared once.
        """
        wanted, found = list(ids), []
        for start in range(0, len(wanted), _IN_CHUNK):
            chunk = wanted[start : start + _IN_CHUNK]
            places = 1 << (len(chunk) - 1).bit_length()
            chunk += chunk[-1:] * (places - len(chunk))
            values = {f"id_{number}": value for number, value in enumerate(chunk)}
            sql = _driver_sql_in(statement, self.connection.dialect, places)
            found += self._rows(sql, values | others)
        return found

    def stream(self, statement: sa.TextClause, **values: Any) -> Iterator[Row]:
        """Rows one by one, on a cursor of its own: for what may not fit into memory."""
        cursor = self.connection.connection.cursor()
        cursor.execute(_driver_sql(statement, self.connection.dialect), values)
        make = _row_type(tuple(column[0] for column in cursor.description))
        while rows := cursor.fetchmany(1000):
            yield from map(make, rows)

    def _rows(self, sql: str, values: Mapping[str, Any]) -> list[Row]:
        self._cursor.execute(sql, values)
        rows = self._cursor.fetchall()
        if not rows:
            return []
        make = _row_type(tuple(column[0] for column in self._cursor.description))
        return [make(row) for row in rows]

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """What is done inside is undone alone when it raises."""
        with self.connection.begin_nested():
            yield


class Database:
    """``url`` in SQLAlchemy's form. Raises UsageError for one that nobody can use."""

    def __init__(self, url: str, *, busy_timeout_seconds: float) -> None:
        try:
            parsed = make_url(url)
        except sa.exc.ArgumentError:
            raise UsageError(
                f"bad database URL {_PASSWORD.sub('***', url)!r}; it looks like sqlite:////opt/swarm-platform/data/swarm.db"
            ) from None
        name = parsed.get_backend_name()
        if name not in DIALECTS:
            shown = parsed.render_as_string(hide_password=True)
            raise UsageError(f"no database {name!r}: Swarm works with {', '.join(DIALECTS)} (got {shown!r})")
        if name == "sqlite" and _file(parsed) is None:
            raise UsageError(f"a database in memory can't be shared ({url!r}); name a file: sqlite:////path/swarm.db")
        self.dialect = DIALECTS[name]
        self.url: URL = parsed
        self.busy_timeout_seconds = busy_timeout_seconds
        self.file = _file(parsed)
        self.place = str(self.file) if self.file else parsed.render_as_string(hide_password=True)

    def check_directory(self) -> None:
        if self.file is not None and not self._looked(self.file.parent.is_dir):
            raise StoreError(
                f"there is no directory {self.file.parent} for the database {self.file.name}; "
                "run `swarm init`, or set SWARM_HOME or SWARM_DATABASE_URL to where it is"
            )

    def exists(self) -> bool:
        return self.file is None or self._looked(self.file.exists)

    def _looked(self, look: Callable[[], bool]) -> bool:
        try:
            return look()
        except OSError as error:
            raise StoreError(f"can't look for the database {self.place}: {error.strerror}; are you root?") from None

    def connect(self, *, write: bool) -> Connection:
        """A connection for the calling thread, which reads only, or writes only. Raises StoreError."""
        self.check_directory()
        engine = self._engine(write)
        with self.errors():
            return engine.connect()

    def _engine(self, write: bool) -> Engine:
        engine = sa.create_engine(self.url, poolclass=sa.NullPool, paramstyle="named")
        begin = self.dialect.begin_write if write else self.dialect.begin_read

        def prepare(connection: Any, record: object) -> None:
            self.dialect.on_connect(connection, write, self.busy_timeout_seconds)

        def begun(connection: Connection) -> None:
            connection.exec_driver_sql(begin)

        sa.event.listen(engine, "connect", prepare)
        sa.event.listen(engine, "begin", begun)
        return engine

    @contextmanager
    def transaction(self, connection: Connection) -> Iterator[Tx]:
        """Commits at the end, rolls back on any exception; the database's own faults come out as StoreError."""
        with self.errors(), connection.begin():
            yield Tx(connection, self.dialect)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The database's own faults come out as StoreError.

        After some of them SQLite has undone the whole transaction by itself, and the next error is that a savepoint is
        gone. So the errors behind an error count as well, back to where the block began.
        """
        before = sys.exception()
        try:
            yield
        except (sa.exc.SQLAlchemyError, sqlite3.Error, MemoryError) as error:
            one: BaseException | None = error
            while one is not None and one is not before:
                if known := explain(one, place=self.place, busy_timeout_seconds=self.busy_timeout_seconds):
                    raise known from error
                one = one.__context__
            raise

    def revision(self, connection: Connection) -> str | None:
        """The revision that the database is at; None for an empty one."""
        with self.transaction(connection) as tx:
            return MigrationContext.configure(tx.connection).get_current_revision()

    def check_revision(self, connection: Connection) -> None:
        """StoreError unless the tables are those that this Swarm works with."""
        found, needed = self.revision(connection), head()
        if found != needed:
            why = f"it is at {found}, this Swarm needs {needed}" if found else "it is empty"
            raise StoreError(NOT_MIGRATED.format(place=self.place, why=why))

    def check_writable(self, connection: Connection) -> None:
        """Say at once what a queue with nothing to do would not notice for hours: SQLite lets a transaction that wants
        to write begin on a read-only file, without a word."""
        with self.transaction(connection) as tx:
            tx.run(sa.text("DELETE FROM alembic_version WHERE 1 = 0"))

    def migrate(self, connection: Connection) -> None:
        """To the newest revision, in one transaction; others who want the same wait, then find it done."""
        with self.transaction(connection) as tx:
            found = MigrationContext.configure(tx.connection).get_current_revision()
            known = {script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()}
            if found is not None and found not in known:
                raise StoreError(
                    f"the database {self.place} is at revision {found}, which this Swarm does not know: "
                    "a newer Swarm made it; use that one"
                )
            command.upgrade(_alembic(tx.connection), "head")


def _file(url: URL) -> Path | None:
    """The file behind an SQLite URL, without the `file:` of its URI form."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return Path(url.database.removeprefix("file:")).absolute()
