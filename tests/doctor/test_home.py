"""What doctor says about a home's database."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from swarm.doctor import home
from swarm.store.audit import TRIGGERS
from swarm.store.store import Store


async def test_what_an_engine_skips_is_shown(tmp_path: Path) -> None:
    async with Store.open(f"sqlite:///{tmp_path}/swarm.db") as store:
        await store.migrate()
        await store.heartbeat("w", host="h", pid=1, info={"skipped": {"ticket 'a'": "frozen"}})
        await store.heartbeat("old", host="h", pid=2, info={})
        checks = await home.database("here", store, store.head(), tmp_path)
    found = [check for check in checks if check.name == "skipped"]
    assert [check.detail for check in found] == ["ticket 'a' is skipped by an engine: frozen"]


async def test_what_a_rebuilt_table_lost_is_named(tmp_path: Path) -> None:
    file = tmp_path / "swarm.db"
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        assert all("lost" not in check.detail for check in await home.database("here", store, store.head(), tmp_path))
        with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as gui:
            made = {name for (name,) in gui.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")}
            assert made == set(TRIGGERS)
            gui.execute("CREATE TABLE rebuilt AS SELECT * FROM tickets")
            gui.execute("DROP TABLE tickets")
            gui.execute("ALTER TABLE rebuilt RENAME TO tickets")
        (check,) = await home.database("here", store, store.head(), tmp_path)
    assert check.status == "fail"
    assert (
        "tickets_ready" in check.detail
        and "tickets_deleted, tickets_touched, tickets_inserted, tickets_created_changed, tickets_snapshots:"
        in check.detail
    )
