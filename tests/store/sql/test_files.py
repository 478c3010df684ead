"""The database's files change underneath an open store: it writes nothing more, and destroys nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm.errors import StoreError
from swarm.store.store import Store
from tests.store.databases import Backend

pytestmark = pytest.mark.sqlite


@pytest.mark.parametrize("removed", [("-wal", "-shm"), ("-wal",), ("-shm",)], ids=" ".join)
async def test_log_removed(backend: Backend, removed: tuple[str, ...]) -> None:
    url = backend.new()
    file = Path(url.removeprefix("sqlite:///"))
    async with Store.open(url) as store, store.watching() as wake:
        await store.heartbeat("w", host="h", pid=1, info={})
        await wake.changed(timeout_seconds=0)
        for suffix in removed:
            Path(f"{file}{suffix}").unlink()
        with pytest.raises(StoreError, match="was changed from outside"):
            await store.heartbeat("w", host="h", pid=2, info={})
        with pytest.raises(StoreError, match="was changed from outside"):
            await wake.changed(timeout_seconds=60)


async def test_the_database_is_being_overwritten_while_the_wake_looks(backend: Backend) -> None:
    """What it reads then is nonsense."""
    url = backend.new()
    file = Path(url.removeprefix("sqlite:///"))
    async with Store.open(url) as store, store.watching() as wake:
        await wake.changed(timeout_seconds=0)
        wake.mute()  # so it looks at the end of its time, and at nothing before
        looking = asyncio.create_task(wake.changed(timeout_seconds=0.3))
        await asyncio.sleep(0)
        outside = sqlite3.connect(file, isolation_level=None, timeout=60)
        outside.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # so it reads the file again
        file.write_bytes(b"half of another database" * 5)
        with pytest.raises(StoreError, match="was changed from outside"):
            await looking
    outside.close()


async def test_database_replaced(backend: Backend, tmp_path: Path) -> None:
    url = backend.new()
    file = Path(url.removeprefix("sqlite:///"))
    shutil.copy(file, tmp_path / "older.db")
    async with Store.open(url) as store:
        await store.heartbeat("w", host="h", pid=1, info={})
        (tmp_path / "older.db").replace(file)
        with pytest.raises(StoreError, match="was changed from outside"):
            await store.heartbeat("w", host="h", pid=2, info={})
    outside = backend.outside(url)
    assert (2,) not in outside.execute("SELECT pid FROM workers")
    outside.close()


def _copied(file: Path, older: Path) -> None:
    """`cp older.db swarm.db`: the same inode."""
    file.write_bytes(older.read_bytes())


def _copied_with_times(file: Path, older: Path) -> None:
    _copied(file, older)
    info = older.stat()
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


OVERWRITTEN: dict[str, Callable[[Path, Path], object]] = {
    "cp": _copied,
    "cp -p": _copied_with_times,
    "truncate": lambda file, older: os.truncate(file, 0),
    "truncate -wal": lambda file, older: os.truncate(f"{file}-wal", 0),
    "mv": lambda file, older: older.replace(file),
}


@pytest.mark.parametrize("after", ["start", "checkpoint", "a crash's log"])
@pytest.mark.parametrize("overwrite", OVERWRITTEN.values(), ids=OVERWRITTEN)
async def test_database_overwritten(
    backend: Backend, tmp_path: Path, overwrite: Callable[[Path, Path], object], after: str
) -> None:
    url = backend.new()
    file, older = Path(url.removeprefix("sqlite:///")), tmp_path / "older.db"
    shutil.copy(file, older)
    if after == "a crash's log":
        with sqlite3.connect(file, timeout=60) as db:
            db.execute("UPDATE agents SET description = 'x'")
            db.commit()
            for suffix in ("", "-wal"):
                shutil.copy(f"{file}{suffix}", tmp_path / f"crashed{suffix}")
        db.close()
        file = tmp_path / "crashed"
    async with Store.open(f"sqlite:///{file}") as store, store.watching() as wake:
        await store.heartbeat("w", host="h", pid=1, info={})
        if after == "checkpoint":
            with sqlite3.connect(file, timeout=60) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.close()
            await store.heartbeat("w", host="h", pid=1, info={})
        await wake.changed(timeout_seconds=0)
        before = Path(f"{file}-wal").read_bytes()
        overwrite(file, older)
        for _ in range(2):
            with pytest.raises(StoreError, match="was changed from outside"):
                await store.heartbeat("w", host="h", pid=2, info={})
        with pytest.raises(StoreError, match="was changed from outside"):
            await wake.changed(timeout_seconds=60)
        found = file.read_bytes()
    assert file.read_bytes() == found  # the end of the store wrote nothing either
    wal = Path(f"{file}-wal")
    assert not wal.exists() or wal.read_bytes() in (before, b"")  # SQLite removes the log of an empty database


LEGAL = {
    "checkpoint": "PRAGMA wal_checkpoint(PASSIVE)",
    "checkpoint and restart": "PRAGMA wal_checkpoint(RESTART)",
    "checkpoint and truncate": "PRAGMA wal_checkpoint(TRUNCATE)",
    "vacuum": "VACUUM",
    "rows": "UPDATE agents SET description = hex(zeroblob(100000))",
}


@pytest.mark.parametrize("sql", LEGAL.values(), ids=LEGAL)
async def test_what_sqlite_does_is_no_change_from_outside(backend: Backend, sql: str) -> None:
    url = backend.new()
    async with Store.open(url) as store, store.watching() as wake:
        for number in range(30):
            await store.heartbeat("w", host="h", pid=number, info={"long": "x" * 10_000 * (number % 3)})
            with sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=60) as db:
                db.execute(sql)
            db.close()
            await wake.changed(timeout_seconds=0)
        assert len(await store.workers()) == 1


async def test_a_backup_restored_by_sqlite_is_legal(backend: Backend, tmp_path: Path) -> None:
    """`sqlite3 swarm.db '.restore older.db'` writes a transaction, as any program does."""
    url = backend.new()
    file = Path(url.removeprefix("sqlite:///"))
    shutil.copy(file, tmp_path / "older.db")
    async with Store.open(url) as store, store.watching() as wake:
        await store.heartbeat("w", host="h", pid=1, info={})
        older, now = sqlite3.connect(tmp_path / "older.db", timeout=60), sqlite3.connect(file, timeout=60)
        older.backup(now)
        now.close()
        older.close()
        assert await wake.changed(timeout_seconds=30)
        assert await store.workers() == []
        await store.heartbeat("w", host="h", pid=2, info={})
        assert [row.pid for row in await store.workers()] == [2]


async def test_checkpoints_of_many_writers_are_no_change_from_outside(backend: Backend) -> None:
    """Two stores and another program write and checkpoint at once."""
    url = backend.new()

    def others() -> None:
        for number in range(200):
            with sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=60) as db:
                db.execute("UPDATE agents SET description = ?", ("x" * 50_000 * (number % 4),))
                db.execute(f"PRAGMA wal_checkpoint({('PASSIVE', 'FULL', 'RESTART', 'TRUNCATE')[number % 4]})")
            db.close()

    async def writes(store: Store) -> None:
        for number in range(200):
            await store.heartbeat("w", host="h", pid=number, info={"long": "x" * 20_000})

    async with Store.open(url) as one, Store.open(url) as two, one.watching() as wake:
        other = asyncio.create_task(asyncio.to_thread(others))
        await asyncio.gather(writes(one), writes(two), other)
        await wake.changed(timeout_seconds=0)
