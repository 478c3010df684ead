"""The database's files change underneath an open store: it writes nothing more, and destroys nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swarm.errors import StoreError
from swarm.store.store import Store
from tests.store.databases import Backend


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
            await wake.changed(timeout_seconds=5)


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
