"""Copies of a database, made while others write to it, and put back."""

from __future__ import annotations

import itertools
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from swarm.base import process
from swarm.errors import CommandFailed, Conflict, HostError, UsageError
from swarm.store.sql.database import Database

_PAGES: Final = 2048  # copied between two looks at whether to go on
_HOURS_SECONDS: Final = 24 * 3600.0
_ALONE_SECONDS: Final = 3.0  # in which another program's transaction may end
_NO_ROLE: Final = re.compile(r'role "(.+)" does not exist\nCommand was: (?:GRANT|REVOKE) ')
_PARTS: Final = ("-wal", "-shm", "-journal")


def copy_file(source: Path, target: Path, check: Callable[[], None]) -> None:
    """What an SQLite database holds at one moment, whoever writes meanwhile. ``check`` raises when it is to stop.
    Raises HostError."""
    try:
        found = _copy(source, target, check)
    except sqlite3.Error as error:
        raise HostError(f"can't copy the database {source}: {error}") from error
    if found != "ok":
        raise HostError(f"the database {source} is damaged ({found}); try `sqlite3 {source} .recover`")
    flush(target)


def _copy(source: Path, target: Path, check: Callable[[], None]) -> str:
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as opened,
        closing(sqlite3.connect(target, isolation_level=None)) as copy,
    ):
        opened.execute("PRAGMA busy_timeout = 30000")
        opened.execute("BEGIN")  # one moment: without it, each write of another program begins the copy again
        opened.execute("SELECT count(*) FROM sqlite_master").fetchone()
        opened.backup(copy, pages=_PAGES, progress=lambda *_: check())
        opened.execute("ROLLBACK")
        return str(copy.execute("PRAGMA quick_check(1)").fetchone()[0])


def copy_to_put_back(copy: Path, target: Path, check: Callable[[], None]) -> Path:
    """Beside the database: what `put_file_back` puts in its place. Raises HostError."""
    new = target.with_name(f"{target.name}.new")
    remove(new)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    copy_file(copy, new, check)
    return new


def put_file_back(new: Path, target: Path) -> Path | None:
    """In one step: whenever this ends, the database's name has the one or the other. Returns where the one that was
    there is kept. Raises Conflict when a program has it open, HostError."""
    with alone(new):  # its log is in it
        flush(new)
    with alone(target):
        kept = _unused(f"{target}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        was_there = target.exists()
        if was_there:
            kept.hardlink_to(target)
        # A log that is still there, of a damaged database or of one that is gone, would be taken for the new one's.
        for part in _PARTS:
            if (one := Path(f"{target}{part}")).exists():
                one.rename(f"{kept}{part}")
        new.replace(target)
    flush(target.parent)
    return kept if was_there else None


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Keep other programs from an SQLite database, and leave it no log. Raises Conflict when one has it open. One that
    is damaged, or not there, is left as it is."""
    if not file.exists():
        yield
        return
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None)) as connection:
        connection.execute("PRAGMA busy_timeout = 1000")
        deadline = time.monotonic() + _ALONE_SECONDS
        while not _is_alone(connection, file):
            if time.monotonic() > deadline:
                raise Conflict(
                    f"another program has the database open (`fuser -v {file}` names it): end it first, also "
                    "`swarm serve` and sqlite3"
                )
            time.sleep(0.01)
        yield


def _is_alone(connection: sqlite3.Connection, file: Path) -> bool:
    try:
        # SQLite gives up the log only for the one program that has the database open, but not its lock with it.
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.execute("BEGIN EXCLUSIVE")
        if connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete":
            return True
        connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        name = error.sqlite_errorname
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return True
        if not name.startswith("SQLITE_BUSY"):
            raise HostError(f"can't use the database {file}: {error}") from error
    return False


def _unused(path: str) -> Path:
    names = itertools.chain([path], (f"{path}.{number}" for number in itertools.count(2)))
    return next(Path(name) for name in names if not any(Path(name + part).exists() for part in ("", *_PARTS)))


def remove(file: Path) -> None:
    """An SQLite database, with all that belongs to it."""
    for part in (*_PARTS, ""):
        Path(f"{file}{part}").unlink(missing_ok=True)


def flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def dump(url: str, target: Path) -> None:
    """The whole PostgreSQL database, by its own `pg_dump`. Raises HostError."""
    with _service(url) as env:
        await _run("pg_dump", "--format=custom", f"--file={target}", "--no-password", env=env)
    flush(target)


async def put_dump_back(url: str, dumped: Path) -> None:
    """In one transaction: what the dump holds replaces what is there. Raises HostError."""
    with _service(url) as env:
        try:
            await _run(
                "pg_restore",
                *("--clean", "--if-exists", "--no-owner", "--exit-on-error", "--single-transaction", "--no-password"),
                *("--dbname=service=swarm", str(dumped)),
                env=env,
            )
        except CommandFailed as error:
            if (found := _NO_ROLE.search(error.stderr)) is None:
                raise
            raise HostError(
                f"the backup has rights for the role {found[1]}, which this server does not have; nothing was changed: "
                f"`createuser {found[1]}` makes it, then again"
            ) from None


async def _run(program: str, *arguments: str, env: dict[str, str]) -> None:
    if process.which(program) is None:
        raise HostError(f"{program} is not installed: apt-get install postgresql-client")
    await process.run([program, *arguments], env=env, timeout_seconds=_HOURS_SECONDS)


@contextmanager
def _service(url: str) -> Iterator[dict[str, str]]:
    """An environment in which PostgreSQL's programs find the database, its password included, which everybody could
    read among a program's arguments."""
    from psycopg.conninfo import conninfo_to_dict

    scheme, _, rest = url.partition("://")
    parameters = conninfo_to_dict(f"{scheme.partition('+')[0]}://{rest}")
    if any("\n" in str(value) for value in parameters.values()):
        raise UsageError("a database URL with a line break in it")
    with tempfile.NamedTemporaryFile("w", prefix="swarm-", suffix=".conf") as file:  # 0600
        file.write("[swarm]\n" + "".join(f"{name}={value}\n" for name, value in parameters.items()))
        file.flush()
        yield {"PGSERVICEFILE": file.name, "PGSERVICE": "swarm"}


def kind_and_file(url: str) -> tuple[str, Path | None]:
    """Its name, 'sqlite' or 'postgresql', and its file if it is one. Raises UsageError."""
    database = Database(url, busy_timeout_seconds=30.0)
    return database.dialect.name, database.file
