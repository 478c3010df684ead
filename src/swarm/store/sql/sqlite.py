"""SQLite: its clock, connections and errors."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from swarm.errors import UsageError
from swarm.store.sql.conditions import ATTEMPT_LIVE, ENDED, UNFINISHED
from swarm.store.sql.dialect import NOT_MIGRATED, OUT_OF_MEMORY, Dialect, without_password
from swarm.store.sql.wake import FileWake

# Bytes that are not UTF-8 come back as lone surrogates instead of an exception: another tool may have written anything.
_decode: Final = partial(str, encoding="utf-8", errors="surrogateescape")

_FEW_DESCRIPTORS: Final = (
    "out of file descriptors, so the database {place} can't be opened: allow this process more (`ulimit -n`, systemd's "
    "LimitNOFILE)"
)
# The first match of the error's name counts (sqlite3.h's result codes, extended ones included). {place} is the file.
_ERRORS: Final = (
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
        "no space for the database {place}: the disk (or a quota) is full, or this "
        "process may not write so large a file (`ulimit -f`); nothing of this transaction was written",
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
        "can't open the database {place}; check that its directory exists, is not on a read-only file system, and that "
        "this user may write there",
    ),
    (("SQLITE_IOERR_NOMEM",), OUT_OF_MEMORY),
    (("SQLITE_IOERR",), "the disk failed under the database {place} ({error}); see the kernel's log (`dmesg`)"),
)


def _parts(url: str) -> tuple[str, str]:
    """Path and query of `sqlite:///path?query`. SQLite's own form `file:…` keeps its prefix. Raises UsageError."""
    path, _, query = url.partition("://")[2].partition("?")
    if path and not path.startswith("/"):
        raise UsageError(
            f"bad database URL {without_password(url)!r}: a file's has three slashes, sqlite:////path/swarm.db"
        )
    path = unquote(path[1:])
    if not path or path == ":memory:":
        raise UsageError(
            f"a database in memory can't be shared ({without_password(url)!r}); name a file: sqlite:////path/swarm.db"
        )
    return path, query


def _file(url: str) -> Path:
    path, _ = _parts(url)
    return Path(unquote(path.removeprefix("file:")) if path.startswith("file:") else path).absolute()


def _connect(url: str, write: bool, busy_timeout_seconds: float) -> sqlite3.Connection:
    path, query = _parts(url)
    if uri := path.startswith("file:"):
        path = f"{path}?{query}"
    # Transactions begin when we say so, not when the driver thinks so.
    connection = sqlite3.connect(path, uri=uri, isolation_level=None, check_same_thread=False)
    try:
        _prepare(connection, write, busy_timeout_seconds)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, write: bool, busy_timeout_seconds: float) -> None:
    connection.text_factory = _decode
    pragmas = [f"busy_timeout = {int(busy_timeout_seconds * 1000)}", "foreign_keys = ON", "cache_size = -16000"]
    if write:
        # NORMAL in WAL mode: a commit survives the death of any process. What a power failure may not undo is flushed
        # by us, outside the write lock (flush.py).
        pragmas += ["synchronous = NORMAL", "journal_size_limit = 67108864"]
        # Debian builds SQLite with secure_delete, which writes zeros over all that a changed row had: for one of 15 MB,
        # 30 MB into the log at each transition, and the former 15 into a temporary file.
        pragmas += ["secure_delete = FAST"]
    else:
        pragmas += ["query_only = ON"]
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}").fetchall()
    if write:
        _to_wal(connection, busy_timeout_seconds)


def _to_wal(connection: sqlite3.Connection, timeout_seconds: float) -> None:
    """Switch to WAL mode, which a new database does not use yet.

    When several connections switch at once, each holds the lock that the others need, and SQLite answers BUSY
    immediately, whatever its timeout is (sqlite3_busy_handler: "might provoke a deadlock"). So we wait ourselves.
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


def _few_descriptors() -> bool:
    """Are there fewer than SQLite opens for a database, its log, the log's index and their directory?"""
    opened = list[int]()
    try:
        for _ in range(4):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    finally:
        for fd in opened:
            os.close(fd)
    return False


def _explain(error: BaseException) -> str | None:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_CANTOPEN") and _few_descriptors():  # SQLite doesn't tell
        return _FEW_DESCRIPTORS
    for prefixes, text in _ERRORS:
        if name.startswith(prefixes):
            return text
    if isinstance(error, sqlite3.OperationalError) and str(error).startswith(("no such table", "no such column")):
        return NOT_MIGRATED
    return None


def _is_locked(error: BaseException | None) -> bool:
    return getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY")


# The pages that a claim, or the end of an attempt, writes: another program's INSERT has emptied SQLite's cache of them.
# Ids and times grow, so most are the last of a table or index.
_WARM_UP: Final = f"""SELECT
  (SELECT max(rowid) FROM workflow_runs), (SELECT max(id) FROM workflow_runs),
  (SELECT max(rowid) FROM step_executions), (SELECT max(id) FROM step_executions),
  (SELECT max(run_id) FROM step_executions),
  (SELECT max(rowid) FROM attempts), (SELECT max(id) FROM attempts), (SELECT max(step_execution_id) FROM attempts),
  (SELECT max(lease_until) FROM attempts WHERE {ATTEMPT_LIVE}),
  (SELECT max(seq) FROM events), (SELECT max(seq) FROM events WHERE ticket_id = :ticket_id),
  (SELECT max(rowid) FROM sqlite_sequence), (SELECT state FROM tickets WHERE id = :ticket_id),
  (SELECT max(rowid) FROM tickets WHERE {UNFINISHED} AND state = 'in_progress'),
  (SELECT max(created_at) FROM tickets WHERE {ENDED} AND state = 'done')"""

SQLITE: Final = Dialect(
    name="sqlite",
    driver="sqlite",
    # An offset that another program removed counts as 0, one beyond all dates as the last one possible.
    now_ms="CAST(round((julianday('now') - 2440587.5) * 86400000.0) + COALESCE((SELECT "
    "max(min(CAST(offset_ms AS REAL), 1e13), -1e12) FROM clock LIMIT 1), 0) AS INTEGER)",
    written_by_others="(SELECT data_version FROM pragma_data_version)",
    columns="SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table'",
    has_revision="SELECT 1 AS found FROM sqlite_master WHERE name = 'alembic_version'",
    names="SELECT name FROM sqlite_master WHERE type IN ('table', 'index', 'trigger')",
    untraced="SELECT NOT EXISTS (SELECT 1 FROM sqlite_master WHERE name = :table || '_deleted') "
    "OR EXISTS (SELECT 1 FROM pragma_index_list(:table) WHERE \"unique\" AND origin <> 'pk') AS untraced",
    tidy="PRAGMA wal_checkpoint(PASSIVE)",
    begin_write="BEGIN IMMEDIATE",
    begin_optimistic="BEGIN",
    begin_shared=None,
    begin_read="BEGIN",
    roll_back=sqlite3.Connection.rollback,
    begin_migration="BEGIN IMMEDIATE",
    newest_event=None,
    has_ended="",
    tell=None,
    number=None,
    became="",
    lock="UPDATE clock SET offset_ms = 0 WHERE 0",
    warm_up=_WARM_UP,
    alone=(),
    tries=3,
    translate=None,
    exchange=None,
    changes=None,
    streaming=sqlite3.Connection.cursor,
    connect=_connect,
    watching=lambda url, events: FileWake.watching(_file(url)),
    file=_file,
    driver_error=sqlite3.Error,
    explain=_explain,
    is_locked=_is_locked,
    is_stale=lambda connection: False,
)
