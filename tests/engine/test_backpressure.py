"""An agent that prints faster than the database takes it waits, but not for ever."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

from swarm.base.clock import Timeline
from swarm.engine.dispatch import Dispatcher
from swarm.engine.engine import Watcher
from swarm.engine.worker import UNWRITTEN_BYTES, Worker
from swarm.model import Claim, Outcome, Succeeded
from swarm.store.store import Store
from tests.conftest import PATIENCE_SECONDS
from tests.store.bench_queue import ECHO, insert


class Printer:
    """Prints more than may wait to be written, while another program holds the database's lock."""

    def __init__(self, other: sqlite3.Connection) -> None:
        self.other = other

    async def execute(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> Outcome:
        self.other.execute("BEGIN IMMEDIATE")
        watcher.output("stdout", b"x" * (2 * UNWRITTEN_BYTES))
        waiting = asyncio.ensure_future(watcher.ready())
        await asyncio.wait({waiting}, timeout=1)  # longer than the store waits for a lock: a write fails meanwhile
        assert not waiting.done()
        self.other.execute("ROLLBACK")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await waiting
        return Succeeded(outputs="{}")


async def test_a_write_that_fails_once_stops_no_agent_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "swarm.db"
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        await store.put_agent(ECHO)
    insert(file, "t", 1)
    async with Store.open(f"sqlite:///{file}", busy_timeout_seconds=0.1) as store, store.watching() as wake:
        other = sqlite3.connect(file, isolation_level=None, timeout=60)
        worker = Worker(store=store, engine=Printer(other), name="test", lease_seconds=30.0)
        dispatcher = Dispatcher(store=store, worker=worker, wake=wake, max_vms=1, memory=None, grace_seconds=1.0)
        running = asyncio.create_task(dispatcher.run())
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while (states := [ticket.state for ticket in await store.tickets()]) != ["done"]:
                    assert states in (["ready"], ["in_progress"])
                    await asyncio.sleep(0.05)
        finally:
            dispatcher.stop()
            await running
            other.close()
    ((printed,),) = sqlite3.connect(file, timeout=60).execute(
        "SELECT sum(length(data)) FROM events WHERE kind = 'output'"
    )
    assert 2 * UNWRITTEN_BYTES < printed < 3 * UNWRITTEN_BYTES, "nothing lost, nothing twice"
