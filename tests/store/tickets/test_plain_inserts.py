"""What another tool may leave out or write its own way, and the ticket runs: names, ids, times, empty fields."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from swarm.errors import Conflict
from swarm.store.store import Store
from tests.store import flows
from tests.store.databases import ECHO, LEASE, Outside, claim_one, insert, inserted, shell

NEWER = replace(ECHO, id="echo-1.2", version="1.2.0")
NEWEST = replace(ECHO, id="echo-2", version="2.0.0")
FLOW = "steps: [{id: only, agent: echo@1}]"

BY_NAME: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"agent_id": ECHO.id}, "1.0.0"),
    "name": ({"agent_id": "echo"}, "2.0.0"),
    "beginning of a version": ({"agent_id": "echo@1"}, "1.2.0"),
    "version": ({"agent_id": "echo@1.0.0"}, "1.0.0"),
    "assignee": ({"agent_id": None, "assignee_id": "echo@1.2", "assignee_type": "agent"}, "1.2.0"),
    "assignee, no type": ({"agent_id": "", "assignee_id": "echo"}, "2.0.0"),
    "agent, and a workflow that is not asked for": ({"agent_id": "echo", "workflow_id": "flow"}, "2.0.0"),
}


@pytest.mark.parametrize("case", BY_NAME)
async def test_an_agent_by_name(store: Store, outside: Outside, case: str) -> None:
    for agent in (NEWEST, NEWER):
        await store.put_agent(agent)
    columns, version = BY_NAME[case]
    insert(outside, "t", **columns)
    claim = await claim_one(store)
    assert (claim.agent.name, claim.agent.version) == ("echo", version)
    await flows.finish(store, claim)
    assert (await store.ticket("t")).agent_id == columns["agent_id"]  # what the other tool wrote, stays


@pytest.mark.parametrize("mode", ["workflow", "agent", None, ""])
@pytest.mark.parametrize("ref", ["flow", "flow@1", "flow@1.0.0", "its id"])
async def test_a_workflow_by_name(store: Store, outside: Outside, ref: str, mode: str | None) -> None:
    id_ = await flows.register(store, FLOW)
    ref = id_ if ref == "its id" else ref
    insert(outside, "t", agent_id=None, workflow_id=ref, execution_mode=mode)
    assert await flows.run(store) == ["only"]
    ticket, (workflow_run,) = await store.ticket("t"), await store.runs("t")
    assert (ticket.state, ticket.execution_mode, ticket.workflow_id) == ("done", "workflow", ref)
    assert (workflow_run.workflow_id, workflow_run.workflow_version) == (id_, "1.0.0")


async def test_a_person_may_be_the_assignee_of_a_workflow(store: Store, outside: Outside) -> None:
    await flows.register(store, FLOW)
    insert(outside, "t", agent_id=None, workflow_id="flow", assignee_id="ann", assignee_type="user")
    assert await flows.run(store) == ["only"]


async def test_an_agent_that_a_ticket_names_is_not_removed(store: Store, outside: Outside) -> None:
    await store.put_agent(NEWEST)
    insert(outside, "old", agent_id="echo@1", state="draft")
    await store.remove_agent("echo@2")
    with pytest.raises(Conflict, match="old"):
        await store.remove_agent("echo@1.0.0")


async def test_an_agent_that_a_step_has_begun_with_is_not_removed(store: Store, outside: Outside) -> None:
    insert(outside, "runs", agent_id="echo")
    await claim_one(store)
    await store.put_agent(NEWEST)  # now `echo` means this one
    with pytest.raises(Conflict, match="runs"):
        await store.remove_agent("echo@1.0.0")
    await store.cancel("runs", by="test")
    await store.remove_agent("echo@1.0.0")


@pytest.mark.parametrize("ref", ["flow", "flow@1", "flow@1.0", "flow@1.0.0"])
async def test_a_workflow_that_a_ticket_names_is_not_removed(store: Store, outside: Outside, ref: str) -> None:
    await flows.register(store, FLOW)
    insert(outside, "other", agent_id=None, workflow_id="flow-2@1", state="draft")
    insert(outside, "old", agent_id=None, workflow_id=ref, state="draft")
    with pytest.raises(Conflict, match=r"\(old\)"):
        await store.remove_workflow("flow")
    outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id = 'old'")
    await store.remove_workflow("flow")


async def test_a_ticket_without_an_id_gets_one(store: Store, outside: Outside) -> None:
    outside.execute("INSERT INTO tickets (title, state, agent_id) VALUES ('a', 'ready', 'echo')")
    outside.execute("INSERT INTO tickets (id, title, state, agent_id) VALUES (NULL, 'b', 'ready', 'echo')")
    claims = await store.claim("w", limit=9, lease_seconds=LEASE)
    assert sorted(claim.ticket.title for claim in claims) == ["a", "b"]
    for claim in claims:
        await flows.finish(store, claim)
        assert len(claim.ticket.id) == 32 and (await store.ticket(claim.ticket.id)).state == "done"


TIMES = {
    "2026-01-31 12:00:00": "2026-01-31T12:00:00.000Z",  # CURRENT_TIMESTAMP, datetime('now')
    "2026-01-31 12:00:00.25": "2026-01-31T12:00:00.250Z",
    "2026-01-31T12:00:00Z": "2026-01-31T12:00:00.000Z",
    "2026-01-31T12:00:00.123456+00:00": "2026-01-31T12:00:00.123Z",  # Python
    "2026-01-31T12:00:00+02:00": "2026-01-31T10:00:00.000Z",
    "2026-01-31": "2026-01-31T00:00:00.000Z",
    "2026-01-31T12:00:00.000Z": "2026-01-31T12:00:00.000Z",
    "yesterday": "yesterday",
    "12:00": "12:00",
    "2026-13-99": "2026-13-99",
}


@pytest.mark.parametrize("written", TIMES)
async def test_a_time_becomes_one_that_sorts(store: Store, outside: Outside, written: str) -> None:
    insert(outside, "inserted", created_at=written)
    insert(outside, "changed")
    outside.execute("UPDATE tickets SET created_at = ? WHERE id = 'changed'", (written,))
    assert {ticket.created_at for ticket in await store.tickets()} == {TIMES[written]}


async def test_formats_of_one_day_are_claimed_and_listed_in_order(store: Store, outside: Outside) -> None:
    for hour, written in ((9, "2026-01-31T09:00:00.000Z"), (10, "2026-01-31 10:00:00"), (8, "2026-01-31T10:00+02:00")):
        insert(outside, f"at-{hour}", created_at=written)
    assert [ticket.id for ticket in await store.tickets()] == ["at-10", "at-9", "at-8"]
    claims = [(await claim_one(store)).ticket.id for _ in range(3)]
    assert claims == ["at-8", "at-9", "at-10"]


@pytest.mark.parametrize("missing", [None, ""])
async def test_no_time_is_now(store: Store, outside: Outside, missing: str | None) -> None:
    insert(outside, "before")
    insert(outside, "t", created_at=missing)
    before, created = (await store.ticket("before")).created_at, (await store.ticket("t")).created_at
    assert before and created and created >= before


async def test_a_ticket_set_to_ready_with_current_timestamp_has_not_waited_since_it_was_added(
    store: Store, outside: Outside
) -> None:
    insert(outside, "t", state="draft")
    now = outside.now_ms() / 1000
    created, updated = datetime.fromtimestamp(now - 1, UTC), datetime.fromtimestamp(now + 3600, UTC)
    outside.execute(
        "UPDATE tickets SET created_at = ?, state = 'ready', updated_at = ?",
        (created.isoformat(timespec="milliseconds").replace("+00:00", "Z"), f"{updated:%Y-%m-%d %H:%M:%S}"),
    )
    await store.shift_clock(30_000)
    assert await store.claim("w", lease_seconds=LEASE, queue_timeout_seconds=20)


NUMBERS = ("priority", "timeout_seconds", "max_attempts", "budget_usd", "budget_tokens")


@pytest.mark.parametrize("how", ["inserted", "changed"])
async def test_an_empty_number_is_none(store: Store, outside: Outside, how: str) -> None:
    empty = dict.fromkeys((*NUMBERS, "over_budget", "execution_mode", "inputs", "trigger_type"), "")
    if how == "inserted":
        if outside.refuses(*inserted("t", **empty)):
            insert(outside, "t", **{name: "" for name in empty if name not in NUMBERS})
    else:
        insert(outside, "t")
        if outside.refuses("UPDATE tickets SET " + ", ".join(f"{name} = ''" for name in empty)):
            outside.execute("UPDATE tickets SET over_budget = '', execution_mode = '', inputs = '', trigger_type = ''")
    insert(outside, "first", priority=1, created_at="2026-01-01T00:00:00.000Z")
    claims = await store.claim("w", limit=9, lease_seconds=LEASE)
    assert how == "changed" or [claim.ticket.id for claim in claims] == ["first", "t"]
    claim = next(claim for claim in claims if claim.ticket.id == "t")
    assert (claim.ticket.priority, claim.ticket.timeout_seconds, claim.ticket.budget_usd) == (0, None, None)
    assert claim.timeout_seconds == ECHO.timeout_seconds


@pytest.mark.sqlite
async def test_a_csv_file(store: Store, url: str, tmp_path: Path) -> None:
    """`.import` gives every column of the table, in its order: empty fields are '', columns at the end NULL."""
    names = [row[1] for row in sqlite3.connect(url.removeprefix("sqlite:///")).execute("PRAGMA table_info(tickets)")]
    row = dict.fromkeys(names, "") | {"id": "csv", "title": "from a file", "state": "ready", "agent_id": "echo"}
    (tmp_path / "rows.csv").write_text(",".join(row.values()) + "\n")
    await shell(url, f'.import --csv "{tmp_path}/rows.csv" tickets')
    claim = await claim_one(store)
    await flows.finish(store, claim)
    ticket = await store.ticket("csv")
    assert (ticket.state, ticket.agent_id) == ("done", "echo") and ticket.created_at


USER_COLUMNS = ("Due Date", "select", "BUDGET", "ID ", "1st", "_hidden", "a-b", "ünïcode", "class")
TABLES = ("tickets", "workflow_runs", "step_executions", "attempts", "agents", "workflows", "secrets", "events")


@pytest.mark.parametrize("table", TABLES)
async def test_columns_that_a_user_adds_disturb_nothing(store: Store, outside: Outside, table: str) -> None:
    for name in USER_COLUMNS:
        outside.execute(f"ALTER TABLE {table} ADD COLUMN \"{name}\" TEXT DEFAULT 'x'")
    await flows.register(store, FLOW)
    insert(outside, "t", agent_id="echo")
    insert(outside, "w", agent_id=None, workflow_id="flow")
    assert sorted(await flows.run(store)) == ["main", "only"]
    for id in ("t", "w"):
        assert (await store.ticket(id)).state == "done"
        assert (len(await store.runs(id)), len(await store.steps(id)), len(await store.attempts(id))) == (1, 1, 1)
        assert await store.events(id)
    assert {ticket.id for ticket in await store.ticket_summaries()} == {"t", "w"}
    assert await store.agents() and await store.workflows() and await store.queue() and await store.secrets() == []
    assert await store.prune(0.0) > 0
