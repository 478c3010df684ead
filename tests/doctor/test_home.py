"""What doctor says about a home's database."""

from __future__ import annotations

from pathlib import Path

from swarm.doctor import home
from swarm.store.store import Store


async def test_what_an_engine_skips_is_shown(tmp_path: Path) -> None:
    async with Store.open(f"sqlite:///{tmp_path}/swarm.db") as store:
        await store.migrate()
        await store.heartbeat("w", host="h", pid=1, info={"skipped": {"ticket 'a'": "frozen"}})
        await store.heartbeat("old", host="h", pid=2, info={})
        found = [check for check in await home.database("here", store, store.head()) if check.name == "skipped"]
    assert [check.detail for check in found] == ["ticket 'a' is skipped by an engine: frozen"]
