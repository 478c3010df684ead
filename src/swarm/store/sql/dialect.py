"""All that differs between databases, in one place: the clock, who else wrote, how a transaction starts, what an error
means. Every other statement of Swarm's is the same SQL for each of them.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Text

from swarm.errors import StoreError


class utc_now(FunctionElement[str]):
    """ISO-8601 UTC text with milliseconds, by the database's clock: the default of every column that people read."""

    type = Text()
    inherit_cache = True


@compiles(utc_now, "sqlite")
def _(element: utc_now, compiler: Any, **options: Any) -> str:
    return "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"


@compiles(utc_now, "postgresql")
def _(element: utc_now, compiler: Any, **options: Any) -> str:
    return "to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    name: str
    # SQL expression: milliseconds since 1970 by the clock that decides leases; tests move it (table `clock`).
    now_ms: str
    # SQL expression: a number that changes whenever another connection has changed the database.
    written_by_others: str
    begin_write: str  # starts a transaction that no other writer can get between
    begin_read: str
    on_connect: Callable[[Any, bool, float], None]  # (driver's connection, will write, busy timeout in seconds)


# Bytes that are not UTF-8 come back as lone surrogates instead of an exception: another tool may have written anything.
_decode: Final = partial(str, encoding="utf-8", errors="surrogateescape")


def _connect_sqlite(connection: sqlite3.Connection, write: bool, busy_timeout_seconds: float) -> None:
    connection.isolation_level = None  # transactions begin when we say so, not when the driver thinks so
    connection.text_factory = _decode
    pragmas = [f"busy_timeout = {int(busy_timeout_seconds * 1000)}", "foreign_keys = ON", "cache_size = -16000"]
    if write:
        # NORMAL in WAL mode: a commit survives the death of any process; power failure may take the last ones, whole.
        pragmas += ["synchronous = NORMAL", "journal_size_limit = 67108864"]
    else:
        pragmas += ["query_only = ON"]
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}").fetchall()
    if write:
        _to_wal(connection, busy_timeout_seconds)


def _to_wal(connection: sqlite3.Connection, timeout_seconds: float) -> None:
    """WAL mode, which a new database is not in yet.

    Of several connections that turn it on at once, each holds the lock that the others need: SQLite then answers BUSY
    at once, whatever its timeout is (sqlite3_busy_handler: "might provoke a deadlock"). So we wait for it ourselves.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() >= deadline:
                raise
            time.sleep(0.002)


SQLITE: Final = Dialect(
    name="sqlite",
    now_ms="CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) + (SELECT offset_ms FROM clock)",
    written_by_others="(SELECT data_version FROM pragma_data_version)",
    begin_write="BEGIN IMMEDIATE",
    begin_read="BEGIN",
    on_connect=_connect_sqlite,
)

DIALECTS: Final = {SQLITE.name: SQLITE}

# First match of the error's name (sqlite3.h's result codes, extended ones included). {place} is the file.
_SQLITE_ERRORS: Final = (
    (
        ("SQLITE_BUSY", "SQLITE_LOCKED"),
        "the database {place} is locked: another program has held its write lock for more than {busy:g} s "
        "(`fuser -v {place}` names it); end that program or its open transaction",
    ),
    (
        ("SQLITE_READONLY", "SQLITE_PERM"),
        "the database {place} is read-only for this user; check the owner and mode of the file and of its directory "
        "(SQLite also writes {place}-wal and {place}-shm), and that the disk is not mounted read-only",
    ),
    (
        ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"),
        "no space for the database {place}: the disk (or a quota) is full; nothing of this transaction was written",
    ),
    (
        ("SQLITE_NOTADB",),
        "{place} is not an SQLite database; move it away (`swarm init` makes a new one) or set SWARM_DATABASE_URL",
    ),
    (
        ("SQLITE_CORRUPT",),
        "the database {place} is damaged ({error}); stop all engines and restore a backup, or try "
        "`sqlite3 {place} .recover`",
    ),
    (
        ("SQLITE_CANTOPEN",),
        "can't open the database {place}; check that its directory exists and that this user may write there",
    ),
    (("SQLITE_IOERR_NOMEM",), "out of memory in the database {place}"),
    (("SQLITE_IOERR",), "the disk failed under the database {place} ({error}); see the kernel's log (`dmesg`)"),
)
NOT_MIGRATED: Final = "the database {place} has not the tables that this Swarm needs ({why}); run `swarm init`"


def explain(error: BaseException, *, place: str, busy_timeout_seconds: float) -> StoreError | None:
    """The sentence for an error that has to do with the database and not with the statement; None for all others."""
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, MemoryError):  # Python's, or SQLite's own
        return StoreError(f"out of memory in the database {place}")
    name = getattr(cause, "sqlite_errorname", "")
    for prefixes, sentence in _SQLITE_ERRORS:
        if name.startswith(prefixes):
            return StoreError(sentence.format(place=place, error=cause, busy=busy_timeout_seconds))
    if isinstance(cause, sqlite3.OperationalError) and str(cause).startswith(("no such table", "no such column")):
        return StoreError(NOT_MIGRATED.format(place=place, why=cause))
    return None
