"""Triggers of other programs on every table that an engine writes: they stop no engine, and no other ticket."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from swarm.base.clock import Timeline
from swarm.engine.dispatch import Dispatcher
from swarm.engine.engine import Watcher
from swarm.engine.worker import Worker
from swarm.model import Claim, Outcome, Succeeded
from swarm.store.store import Store
from swarm.triggers.schedules import Scheduler
from tests.cel.local import Local
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import ECHO, SqliteOutside, insert
from tests.store.flows import register

pytestmark = pytest.mark.slow  # tries very many cases

BAD = "('bad', 'bad flow')"
_RUN = f"SELECT id FROM workflow_runs WHERE ticket_id IN {BAD}"
# Tables with the condition for rows of a ticket whose id begins with 'bad'; '' where a row belongs to no ticket.
TABLES = {
    "tickets": f"NEW.id IN {BAD}",
    "events": f"NEW.ticket_id IN {BAD}",
    "workflow_runs": f"NEW.ticket_id IN {BAD}",
    "step_executions": f"NEW.run_id IN ({_RUN})",
    "attempts": f"NEW.step_execution_id IN (SELECT id FROM step_executions WHERE run_id IN ({_RUN}))",
    "workers": "",
    "schedules": "",
    "definitions": "",
}
BODIES = {
    "refused": "SELECT RAISE(ABORT, 'not before noon')",
    "ignored": "SELECT RAISE(IGNORE)",
    "without its table": "INSERT INTO nowhere SELECT 1",
    "without its column": "UPDATE projects SET status = NEW.status",  # no table of Swarm's has both
}


class Agent:
    """Prints, and succeeds."""

    async def execute(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> Outcome:
        await watcher.placed(1000)
        watcher.output("stdout", b"hello\n")
        timeline.mark("slot")
        timeline.mark("stopped")
        return Succeeded(outputs="{}")


async def until(store: Store, holds: Callable[[], Awaitable[bool]]) -> None:
    async with store.watching() as wake, asyncio.timeout(PATIENCE_SECONDS):
        while not await holds():
            await wake.changed(timeout_seconds=0.1)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("event", ["INSERT", "UPDATE", "DELETE"])
@pytest.mark.parametrize("table", TABLES)
async def test_a_trigger(tmp_path: Path, table: str, event: str, body: str) -> None:
    url = f"sqlite:///{tmp_path / 'swarm.db'}"
    async with Store.open(url) as store:
        await store.migrate()
    async with Store.open(url, planning_seconds=60.0) as store, store.watching() as wake:
        await store.put_agent(ECHO)
        flow = await register(store, "steps: [{id: one, agent: echo}, {id: two, agent: echo, needs: one}]")
        await register(store, "schedule: [{cron: '@yearly'}]\nsteps: [{id: one, agent: echo}]", name="yearly")
        outside = SqliteOutside(url)
        outside.execute("UPDATE schedules SET next_at = computed_at")
        outside.execute("CREATE TABLE projects (id TEXT)")
        for id in ("bad", "good", "bad flow", "good flow"):
            workflow = {"agent_id": None, "execution_mode": "workflow", "workflow_id": flow} if "flow" in id else {}
            insert(outside, id, **workflow)
        of_bad = TABLES[table] if event != "DELETE" and "NEW.status" not in body and "nowhere" not in body else ""
        when = f"WHEN {of_bad}" if of_bad else ""
        body = body.replace("NEW.", "OLD.") if event == "DELETE" else body
        outside.execute(f"CREATE TRIGGER theirs BEFORE {event} ON {table} {when} BEGIN {body}; END")
        worker = Worker(store=store, engine=Agent(), name="w", lease_seconds=30.0)
        scheduler = Scheduler(store=store, evaluator=Local())
        dispatcher = Dispatcher(
            store=store, worker=worker, wake=wake, max_vms=4, memory=None, grace_seconds=0.0, scheduler=scheduler
        )
        engine = asyncio.create_task(dispatcher.run())

        async def states(*ids: str) -> list[str]:
            return [(await store.ticket(id)).state for id in ids]

        async def got_there() -> bool:
            assert not engine.done(), engine.exception()
            done = await states("good", "good flow") == ["done", "done"]
            return done if of_bad else done or store.isolation.active

        await until(store, got_there)
        if of_bad:
            for id in ("bad", "bad flow"):  # either its error says why, or `skipped` does, or it met no trigger
                ticket = await store.ticket(id)
                said = f"{ticket.error} {store.isolation.skipped}"
                assert ticket.state == "done" or "noon" in said or "ignored" in said, ticket
        outside.execute("DROP TRIGGER theirs")
        insert(outside, "later")

        async def later() -> bool:
            assert not engine.done(), engine.exception()
            return await states("later") == ["done"]

        await until(store, later)
        outside.close()
        dispatcher.stop()
        await engine
        with sqlite3.connect(tmp_path / "swarm.db", timeout=60) as db:
            twice = db.execute(
                "SELECT r.ticket_id, count(*) FROM attempts a JOIN step_executions s ON s.id = a.step_execution_id "
                "JOIN workflow_runs r ON r.id = s.run_id WHERE a.outcome = 'succeeded' "
                "GROUP BY r.ticket_id, s.step_id HAVING count(*) > 1"
            ).fetchall()
        db.close()
        assert twice == []
