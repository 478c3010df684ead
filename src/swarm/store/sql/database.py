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
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import cache
from typing import Final

from swarm.base.priority import ahead_of_others
from swarm.errors import StoreError, UsageError
from swarm.store.sql import files
from swarm.store.sql.connection import Connection, is_complete
from swarm.store.sql.dialect import NOT_MIGRATED, Dialect, Sql, explain, without_password
from swarm.store.sql.dialects import dialect_of
from swarm.store.sql.newcomers import Newcomers
from swarm.store.sql.transaction import Outdated, Tx
from swarm.store.sql.wake import Wake

# The revision that this version of Swarm needs: the newest of migrations/versions.
HEAD: Final = "v0_3_0"
OLDER: Final = ("v0_1_0", "v0_2_0", "v0_2_1")
REVISION: Final = "(SELECT max(version_num) FROM alembic_version)"  # SQL expression: that of the database

_URL: Final = re.compile(r"(?P<name>\w+)(?:\+\w+)?://.*", re.S)

_REVISION: Final = Sql("SELECT version_num FROM alembic_version")
_WRITE_NOTHING: Final = Sql("DELETE FROM alembic_version WHERE 1 = 0")


@cache
def _has_revision(dialect: Dialect) -> Sql:
    return Sql(dialect.has_revision)


def other_revision(found: object) -> StoreError:
    """For what claims: another version of Swarm has migrated the database since it was opened."""
    return StoreError(
        f"the database was brought to {found} while this Swarm runs, which needs {HEAD}: nothing more is started here, "
        "and what runs may end; start the version that did it in this one's place"
    )


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

    @property
    def address(self) -> tuple[str, float]:
        """What another process opens it with. The password is in it."""
        return self._url, self.busy_timeout_seconds

    def watching(self, *, events: bool) -> AbstractAsyncContextManager[Wake]:
        return self.dialect.watching(self._url, events)

    def check_directory(self) -> None:
        if self.file is not None and not self._test(self.file.parent.is_dir):
            raise StoreError(
                f"the directory {self.file.parent} of the database {self.file.name} does not exist; "
                "run `swarm init`, or set SWARM_HOME or SWARM_DATABASE_URL to where the database is"
            )

    def exists(self) -> bool:
        return self.file is None or self._test(self.file.exists)

    def is_own(self) -> bool:
        """May nobody write to it but root, this user, and the roles that an administrator gave the right?"""
        return self.file is None or files.is_own(self.file)

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
    def transaction(
        self, connection: Connection, *, optimistic: bool = False, shared: bool = False, alone: bool = False
    ) -> Iterator[Tx]:
        """Commits at the end, rolls back on any exception. Raises StoreError when the database itself fails.

        ``optimistic``: begin without the write lock, and take it when something is written. What was read before must
        still be true then: else nothing is written, and Outdated is raised. ``shared``: see `Dialect.begin_shared`, and
        `Tx.exact`. ``alone``: see `Dialect.alone`.
        """
        with self.errors(connection):
            self._let_in(connection)
        self._check_files(connection)
        begin = self.dialect.begin_optimistic if optimistic and connection.write else self._begin(connection)
        if shared and self.dialect.begin_shared is not None:
            begin = self.dialect.begin_shared
        with self.errors(connection):
            shared, timed = begin == self.dialect.begin_shared, optimistic and connection.write
            tx = Tx(connection, self.dialect, self.wakes, shared=shared, timed=timed)
        try:
            with self.errors(connection):
                tx.begin(begin)
                if alone:
                    tx.keep_others_out()
                yield tx
                tx.let_in()
                if tx.visited:
                    self._check_files(connection)
                tx.commit()
        except BaseException as error:
            with self.errors():  # that needs memory too
                tx.roll_back()
            if optimistic and isinstance(error, StoreError) and self.dialect.is_locked(error.__cause__):
                raise Outdated from error
            raise
        finally:
            tx.end()
        if connection.opened is not None:
            connection.opened.note()

    def wait_for_others(self, connection: Connection) -> None:
        """Until no other program holds the write lock: what is read then is likely to stay true for a while."""
        if self.dialect.lock is None:
            time.sleep(random.uniform(0.0, 0.01))  # so that two that met don't meet again
            return
        with self.errors(connection), ahead_of_others():
            connection.driver.execute(self.dialect.begin_write)
            connection.driver.rollback()

    def _let_in(self, connection: Connection) -> None:
        """What a transaction has read would be outdated, if newcomers wrote only before its end."""
        if connection.newcomers is None and self.wakes and connection.write and self.file is not None:
            connection.newcomers = Newcomers(self.file)  # this process stays: others make one transaction or two
        if connection.newcomers is not None:
            connection.newcomers.let_in()

    def _check_files(self, connection: Connection) -> None:
        opened = connection.opened
        if opened is not None:
            try:
                (self._changed or opened).check()
            except StoreError:
                self._changed = opened  # a new connection would write into whatever is there now
                raise

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
                    complete=lambda: connection is not None and is_complete(connection, self.dialect),
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
        if found == HEAD:
            return
        if found in (*OLDER, None):
            why = f"it is at {found}, this Swarm needs {HEAD}" if found else "it is empty"
            raise StoreError(NOT_MIGRATED.format(place=self.place, error=why))
        raise StoreError(
            f"the database {self.place} is at {found}, which this Swarm does not know (it needs {HEAD}): a newer "
            "version made it; upgrade Swarm here, or use another database"
        )

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
