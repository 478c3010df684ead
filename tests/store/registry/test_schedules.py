"""Schedules in the database: they follow the workflows, run once however many engines look, and count missed times."""

from __future__ import annotations

import asyncio
import json
import signal
import struct
import zoneinfo
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swarm.base import crash_points
from swarm.model import Ticket
from swarm.store.registry.schedules import ScheduleRow
from swarm.store.sql.rows import milliseconds
from swarm.store.store import Store
from swarm.triggers.schedules import Scheduler
from swarm.workflow.definition import Schedule, Step, Workflow
from tests.cel.local import Local
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import Outside
from tests.store.sql.test_faults import program, result

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

HOURLY = Schedule(cron="0 * * * *")
FLOW = Workflow(name="flow", version="1.0.0", steps=(Step(id="a", agent="echo@1"),), schedule=(HOURLY,))
HOUR = 3_600_000
# Time-zone data (RFC 8536) of a zone that is always UTC.
ZONE = b"TZif2" + bytes(15) + struct.pack(">6I", 0, 0, 0, 0, 1, 4) + bytes(6) + b"UTC\0"
ZONE += b"TZif2" + bytes(15) + struct.pack(">6I", 0, 0, 0, 0, 1, 4) + bytes(6) + b"UTC\0" + b"\nUTC0\n"


async def at(store: Store, outside: Outside, time: str) -> None:
    """Set the database's clock."""
    await store.shift_clock((milliseconds(time) or 0) - outside.now_ms())


async def fire(store: Store) -> float | None:
    """Look until nothing is due."""
    scheduler = Scheduler(store=store, evaluator=Local())
    while (wait := await scheduler.fire()) == 0.0:
        pass
    return wait


async def times(store: Store) -> list[str]:
    """The times for which tickets were created, oldest first."""
    return sorted(json.loads(ticket.trigger_data or "{}")["time"][11:16] for ticket in await made(store))


async def made(store: Store) -> list[Ticket]:
    return await store.tickets(limit=10_000)


async def only(store: Store) -> ScheduleRow:
    (row,) = await store.schedules()
    return row


# --- following the workflows ------------------------------------------------------------------------------------------


async def test_rows_follow_what_is_registered(store: Store, outside: Outside) -> None:
    await at(store, outside, "2026-01-01T09:30:00Z")
    await store.put_workflow(FLOW)
    row = await only(store)
    assert (row.workflow, row.cron, row.missed, row.next_at) == (
        "flow",
        "0 * * * *",
        "once",
        "2026-01-01T10:00:00.000Z",
    )
    assert await fire(store) == pytest.approx(1800, abs=30) and await made(store) == []

    await store.enable_workflow("flow", enabled=False, by="test")
    assert (await only(store)).next_at is None and await fire(store) is None
    await store.shift_clock(3 * HOUR)  # while it is disabled, no time counts as missed
    await store.enable_workflow("flow", enabled=True, by="test")
    assert (await only(store)).next_at == "2026-01-01T13:00:00.000Z" and await fire(store) and await made(store) == []

    await store.shift_clock(HOUR)  # a new version does not swallow a due time
    daily = Schedule(cron="@daily", time_zone="Asia/Tokyo")
    newer = await store.put_workflow(replace(FLOW, version="1.1.0", schedule=(daily, HOURLY)))
    await store.put_workflow(replace(FLOW, version="1.0.9", schedule=(Schedule(cron="5 * * * *"),)))
    assert [(row.cron, row.next_at) for row in await store.schedules()] == [
        ("@daily", "2026-01-01T15:00:00.000Z"),
        ("0 * * * *", "2026-01-01T13:00:00.000Z"),
    ]
    await fire(store)
    (ticket,) = await made(store)
    assert ticket.workflow_id == newer.id
    await store.put_workflow(replace(FLOW, version="1.2.0", schedule=()))
    assert await store.schedules() == []


async def test_rows_follow_changes_by_other_tools(store: Store, outside: Outside) -> None:
    row = await store.put_workflow(FLOW)
    other = row.definition.replace('"flow"', '"other"')
    outside.execute(
        "INSERT INTO workflows (id, name, version, steps) VALUES ('o', 'other', '1.0.0', :steps)", {"steps": other}
    )
    await fire(store)
    assert [one.workflow for one in await store.schedules()] == ["flow", "other"]
    outside.execute("UPDATE workflows SET enabled = false WHERE name = 'flow'")
    await fire(store)
    assert [one.next_at is None for one in await store.schedules()] == [True, False]
    outside.execute("UPDATE workflows SET enabled = true")
    outside.execute("DELETE FROM workflows WHERE name = 'other'")
    await fire(store)
    row_ = await only(store)
    assert row_.workflow == "flow" and row_.next_at is not None
    await store.shift_clock(2 * HOUR)
    outside.execute("DELETE FROM workflows")  # due, but deleted
    assert await fire(store) is None and await made(store) == [] and await store.schedules() == []


HOSTILE: dict[str, tuple[Any, Any, Any, Any]] = {
    "no JSON": ("w", "w", "1.0.0", '{"schedule":'),
    "no workflow": ("w", "w", "1.0.0", '{"schedule": [{"cron": "* * * * *"}]}'),
    "no list": ("w", "w", "1.0.0", '{"format": 1, "schedule": 7}'),
    "no name": ("w", "", "1.0.0", "{}"),
    "bytes": (b"\xff", b"\xff\xfe", b"\0", b'{"schedule"'),
    "bad cron": ("w", "w", "1.0.0", '{"format":1,"name":"w","version":"1","schedule":[{"cron":"9 9 9"}]}'),
    "bad zone": (
        "w",
        "w",
        "1",
        '{"format":1,"name":"w","version":"1","schedule":[{"cron":"* * * * *","time_zone":"../../etc/passwd"}]}',
    ),
}


@pytest.mark.parametrize("row", HOSTILE.values(), ids=list(HOSTILE))
async def test_a_row_of_another_tool_may_be_anything(store: Store, outside: Outside, row: tuple[Any, ...]) -> None:
    await store.put_workflow(FLOW)
    outside.execute("INSERT INTO workflows (id, name, version, steps) VALUES (?, ?, ?, ?)", row)
    await fire(store)
    await store.shift_clock(HOUR)
    await fire(store)
    (ticket,) = await made(store)  # the other schedules still run
    assert ticket.title.startswith("flow, ")
    broken = [one for one in await store.schedules() if one.workflow != "flow"]
    assert all(one.next_at is None and one.error for one in broken)


@pytest.fixture
def zones(tmp_path: Path) -> Iterator[Path]:
    """A directory that is where this process looks for time-zone data."""
    (tmp_path / "Here").mkdir()
    (tmp_path / "Here/Now").write_bytes(ZONE)
    zoneinfo.reset_tzpath([str(tmp_path)])
    yield tmp_path
    zoneinfo.reset_tzpath()
    zoneinfo.ZoneInfo.clear_cache()


async def test_missing_time_zone_data_is_no_end(store: Store, outside: Outside, zones: Path) -> None:
    await at(store, outside, "2030-01-01T07:30:00Z")
    one = Schedule(cron="0 * * * *", time_zone="Here/Now")
    await store.put_workflow(replace(FLOW, schedule=(one,)))
    await fire(store)
    await store.shift_clock(HOUR)
    (zones / "Here/Now").unlink()
    zoneinfo.ZoneInfo.clear_cache()
    for _ in range(3):
        await fire(store)
    assert "isn't a time zone" in ((await only(store)).error or "")
    assert await made(store) == []
    outside.execute("UPDATE workflows SET enabled = true")  # the schedules are read again meanwhile
    await fire(store)
    (zones / "Here/Now").write_bytes(ZONE)
    zoneinfo.ZoneInfo.clear_cache()
    await fire(store)
    assert await times(store) == ["08:00"]
    row = await only(store)
    assert row.error is None and row.next_at == "2030-01-01T09:00:00.000Z"


# --- running ----------------------------------------------------------------------------------------------------------


async def test_a_ticket_of_a_schedule(store: Store, outside: Outside) -> None:
    one = Schedule(cron="30 7 * * *", time_zone="Asia/Kolkata", inputs={"at": "${trigger.time}", "n": 3})
    await at(store, outside, "2026-01-01T01:59:59Z")
    workflow = await store.put_workflow(replace(FLOW, schedule=(one,)))
    assert (wait := await fire(store)) is not None and wait < 2
    await store.shift_clock(1000)
    assert await fire(store) == pytest.approx(86_400, abs=30)
    (ticket,) = await made(store)
    assert (ticket.state, ticket.execution_mode, ticket.workflow_id) == ("ready", "workflow", workflow.id)
    assert json.loads(ticket.inputs or "") == {"at": "2026-01-01T02:00:00.000Z", "n": 3}
    assert ticket.title == "flow, 2026-01-01 07:30 IST"
    assert (ticket.trigger_type, json.loads(ticket.trigger_data or "")) == (
        "schedule",
        {"time": "2026-01-01T02:00:00.000Z", "cron": one.cron, "time_zone": one.time_zone, "missed": 0},
    )
    row = await only(store)
    assert (row.last_at, row.last_ticket_id) == ("2026-01-01T02:00:00.000Z", ticket.id)
    assert (row.next_at, row.missed_count) == ("2026-01-02T02:00:00.000Z", 0)


@pytest.mark.parametrize(
    ("missed", "then", "dropped"), [("skip", [], 3), ("once", ["12:00"], 2), ("all", ["10:00", "11:00", "12:00"], 0)]
)
async def test_times_while_no_engine_looked(
    store: Store, outside: Outside, missed: str, then: list[str], dropped: int
) -> None:
    await at(store, outside, "2026-01-01T09:30:00Z")
    await store.put_workflow(replace(FLOW, schedule=(replace(HOURLY, missed=missed),)))
    await store.shift_clock(3 * HOUR)
    await fire(store)
    assert await times(store) == then and (await only(store)).missed_count == dropped
    missed_counts = [json.loads(ticket.trigger_data or "")["missed"] for ticket in await made(store)]
    assert sum(missed_counts) == (dropped if then else 0)
    await store.shift_clock(HOUR - 30 * 60_000)
    await fire(store)
    assert await times(store) == [*then, "13:00"]


@pytest.mark.parametrize(
    ("overlap", "while_it_runs", "afterwards", "missed"),
    [("allow", ["10:00", "11:00", "12:00"], [], 0), ("skip", ["10:00"], [], 2), ("queue", ["10:00"], ["12:00"], 1)],
)
async def test_times_while_the_last_ticket_runs(
    store: Store, outside: Outside, overlap: str, while_it_runs: list[str], afterwards: list[str], missed: int
) -> None:
    await at(store, outside, "2026-01-01T09:59:59Z")
    await store.put_workflow(replace(FLOW, schedule=(replace(HOURLY, overlap=overlap),)))
    await store.shift_clock(2000)
    await fire(store)
    (first,) = await made(store)
    outside.execute("UPDATE tickets SET state = 'waiting'")  # it has not ended
    for _ in range(2):
        await store.shift_clock(HOUR)
        wait = await fire(store)
        assert wait is None or wait > 0, "nobody looks again and again"
    assert await times(store) == while_it_runs
    await store.cancel(first.id, "a test")
    await fire(store)
    assert await times(store) == while_it_runs + afterwards
    assert (await only(store)).missed_count == missed
    for ticket in await made(store):
        await store.cancel(ticket.id, "a test")
    await store.shift_clock(HOUR)
    await fire(store)
    assert await times(store) == [*while_it_runs, *afterwards, "13:00"]


async def test_a_year_is_bounded(store: Store) -> None:
    await store.put_workflow(replace(FLOW, schedule=(Schedule(cron="* * * * *", missed="all"),)))
    await store.shift_clock(365 * 24 * HOUR)
    await fire(store)
    assert len(await made(store)) == 100


async def test_a_clock_that_is_set_back(store: Store, outside: Outside) -> None:
    await at(store, outside, "2026-01-01T09:59:59Z")
    await store.put_workflow(FLOW)
    await store.shift_clock(2000)
    await fire(store)
    await store.shift_clock(-HOUR)  # an hour repeats, but its schedules do not run again
    for _ in range(2):
        await fire(store)
        await store.shift_clock(HOUR)
    assert await times(store) == ["10:00"]
    await fire(store)
    assert await times(store) == ["10:00", "11:00"]
    await store.shift_clock(-1000 * HOUR)  # so it was wrong before
    await fire(store)
    assert (await only(store)).next_at == "2025-11-20T20:00:00.000Z"
    await store.shift_clock(HOUR)
    await fire(store)
    assert len(await made(store)) == 3


async def test_a_clock_that_is_set_ahead(store: Store, outside: Outside) -> None:
    await at(store, outside, "2026-01-01T09:59:00Z")
    await store.put_workflow(FLOW)
    await store.shift_clock(HOUR + 60_000)
    await fire(store)
    assert await times(store) == ["11:00"]


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({"n": "${trigger.body.n}"}, "trigger has no 'body'"),
        ({"n": "seven"}, "$.n"),
        ({}, "'n' is missing"),
    ],
)
async def test_invalid_inputs(store: Store, inputs: dict[str, Any], error: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    one = replace(HOURLY, inputs=inputs)
    await store.put_workflow(replace(FLOW, inputs_schema=schema, schedule=(one,)))
    await store.shift_clock(HOUR)
    await fire(store)
    (ticket,) = await made(store)
    assert ticket.state == "failed" and ticket.completed_at and "'0 * * * *' of flow@1.0.0" in (ticket.error or "")
    assert error in (ticket.error or "")
    assert [event.data["to"] for event in await store.events(ticket.id)] == ["failed"]
    assert (await only(store)).last_ticket_id == ticket.id


# --- once -------------------------------------------------------------------------------------------------------------


async def test_several_engines_make_one_ticket(store: Store, url: str) -> None:
    flows = [replace(FLOW, name=f"flow{n}", schedule=(replace(HOURLY, missed="all"),) * 2) for n in range(5)]
    for flow in flows:
        await store.put_workflow(flow)
    async with Store.open(url) as other:
        for _ in range(4):
            await store.shift_clock(HOUR)
            await asyncio.gather(*(fire(one) for one in (store, other, store)))
    assert len(await made(store)) == 5 * 2 * 4
    assert sum(row.missed_count for row in await store.schedules()) == 0


async def test_two_processes_make_one_ticket(store: Store, url: str) -> None:
    await store.put_workflow(replace(FLOW, schedule=(replace(HOURLY, missed="all"),) * 20))
    await store.shift_clock(HOUR)
    async with program("fire", url, "3") as one, program("fire", url, "3") as two:
        await asyncio.gather(result(one), result(two))
    assert len(await made(store)) == 20


async def test_one_that_was_disabled_meanwhile_does_not_run(store: Store) -> None:
    await store.put_workflow(FLOW)
    await store.shift_clock(HOUR)
    (due,) = (found := await store.due_schedules()).due
    await store.enable_workflow("flow", enabled=False, by="test")
    request = Scheduler(store=store, evaluator=Local())._request(due, found.now_ms)
    assert request is not None and not await store.fire_schedule(request)
    assert await made(store) == []


@pytest.mark.parametrize(("point", "there"), [*zip(crash_points.OF_SCHEDULES, (0, 2), strict=True)])
async def test_an_engine_that_dies_while_firing(
    store: Store, url: str, outside: Outside, point: str, there: int
) -> None:
    """The update of the row and its tickets are one transaction: both exist or neither. The next engine continues."""
    await at(store, outside, "2026-01-01T09:30:00Z")
    await store.put_workflow(replace(FLOW, schedule=(replace(HOURLY, missed="all"),)))
    await store.shift_clock(2 * HOUR)
    async with program("fire", url, "3", point) as dying:
        await dying.communicate(b"\n")
        assert dying.returncode == -signal.SIGKILL
    assert len(await made(store)) == there
    await fire(store)
    assert await times(store) == ["10:00", "11:00"]


async def test_sleeping_until_it_is_due(store: Store, outside: Outside) -> None:
    """Real time, by the database's clock: due in 0.3 s, without a look in between."""
    await at(store, outside, "2026-01-01T09:59:59.700Z")
    await store.put_workflow(FLOW)
    task = asyncio.create_task(Scheduler(store=store, evaluator=Local()).run())
    async with store.watching() as wake, asyncio.timeout(PATIENCE_SECONDS):
        while not await made(store):
            await wake.changed(timeout_seconds=20)
    assert outside.now_ms() < milliseconds("2026-01-01T10:00:10Z")  # type: ignore[operator]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await times(store) == ["10:00"]
