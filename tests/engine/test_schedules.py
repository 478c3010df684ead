"""Engines keep time: two on one file make one ticket, and run it; one without a free VM makes it as well."""

from __future__ import annotations

import asyncio
import json

from swarm.model import TERMINAL_TICKET_STATES, Ticket
from swarm.triggers.schedules import Scheduler
from swarm.workflow.definition import Schedule, Step, Workflow
from tests.cel.local import Local
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import Bench, engine_process, log_until, serving

YEARLY = Workflow(
    name="yearly",
    version="1.0.0",
    steps=(
        Step(id="a", agent="echo@1", inputs={"by": "${trigger.type}", "at": "${trigger.time}", "n": "${inputs.n}"}),
    ),
    schedule=(Schedule(cron="@yearly", inputs={"n": 7}),),
)


async def nearly(bench: Bench) -> str:
    """Set the database's clock to shortly before the schedule is due; when that is."""
    await bench.store.put_workflow(YEARLY)
    (row,) = await bench.store.schedules()
    assert row.next_at is not None
    bench.sql(
        "UPDATE clock SET offset_ms = CAST(ROUND((julianday(?) - julianday('now')) * 86400000.0) AS INTEGER) - 700",
        row.next_at,
    )
    return row.next_at


async def made(bench: Bench) -> list[Ticket]:
    return await bench.store.tickets(limit=100)


async def test_two_engines_keep_one_time(plain: Bench) -> None:
    async with engine_process(plain) as one, engine_process(plain) as two:
        await log_until(one, "engine serves")
        await log_until(two, "engine serves")
        due = await nearly(plain)

        async def done() -> bool:
            return any(ticket.state in TERMINAL_TICKET_STATES for ticket in await made(plain))

        await plain.until(done)
        for engine in (one, two):
            engine.terminate()
            await log_until(engine, "engine stopped")
    (ticket,) = await made(plain)
    assert (ticket.state, ticket.title) == ("done", f"yearly, {due[:10]} 00:00 UTC"), ticket.error
    told = json.loads(ticket.outputs or "")["echo"]
    assert told == {"by": "schedule", "at": due, "n": 7}
    (run,) = await plain.store.runs(ticket.id)
    assert run.trigger_type == "schedule" and json.loads(run.trigger_data or "")["cron"] == "@yearly"
    (row,) = await plain.store.schedules()
    assert (row.next_at, row.last_at, row.last_ticket_id) == (f"{int(due[:4]) + 1}{due[4:]}", due, ticket.id)


async def test_an_engine_that_is_full_keeps_time(plain: Bench) -> None:
    agent = await plain.agent("import time\nprint('up', flush=True)\ntime.sleep(600)")
    plain.insert("t", agent.id)
    scheduler = Scheduler(store=plain.store, evaluator=Local())
    async with serving(plain, max_vms=1, scheduler=scheduler), asyncio.timeout(PATIENCE_SECONDS):
        await plain.until_it_prints()
        await nearly(plain)

        async def there() -> bool:
            return len(await made(plain)) == 2

        await plain.until(there)
        assert {ticket.state for ticket in await made(plain)} == {"in_progress", "ready"}
