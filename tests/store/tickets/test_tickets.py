"""Tickets: cancel, retry, queue, prune; agents and workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from swarm.errors import Conflict, LeaseLost, NotFound
from swarm.model import Event, FailureReason, Interrupted, RetryPolicy, Succeeded, Ticket
from swarm.store.sql.rows import Renewal
from swarm.store.store import Store
from tests.store.databases import ECHO, LEASE, RETRY, Outside, claim_one, failed, insert


async def finish(store: Store, attempt_id: str, *, well: bool) -> None:
    await store.finish(attempt_id, Succeeded(outputs="{}") if well else failed(), timings={}, vm_time_ms=0)


async def test_cancel_one_that_waits(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    await store.cancel("t", by="ann")
    await store.cancel("t", by="bob")
    assert await store.claim("w", lease_seconds=LEASE) == []
    assert (await store.ticket("t")).error == "cancelled by ann"


async def test_cancel_one_that_runs(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    claim = await claim_one(store)
    await store.cancel("t", by="ann")
    renewal = await store.renew([claim.attempt_id], lease_seconds=LEASE)
    assert renewal == Renewal(lost=frozenset(), cancelled=frozenset({claim.attempt_id}))
    with pytest.raises(LeaseLost, match="ended as cancelled"):
        await finish(store, claim.attempt_id, well=True)
    (run,), (step,), (attempt,) = await store.runs("t"), await store.steps("t"), await store.attempts("t")
    assert (run.status, step.status, attempt.outcome) == ("cancelled", "cancelled", "cancelled")
    assert (await store.queue()).running == 0


async def test_cancel_and_retry_refuse(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    with pytest.raises(Conflict, match="is ready"):
        await store.retry("t")
    await finish(store, (await claim_one(store)).attempt_id, well=True)
    with pytest.raises(Conflict, match="is already done"):
        await store.cancel("t", by="ann")
    with pytest.raises(Conflict, match="is done"):
        await store.retry("t")
    for ask in (store.cancel("nobody", by="ann"), store.retry("nobody"), store.ticket("nobody")):
        with pytest.raises(NotFound):
            await ask


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_retry_is_a_new_run(store: Store, outside: Outside, end: str) -> None:
    insert(outside, "t")
    old = await claim_one(store)
    if end == "failed":
        await finish(store, old.attempt_id, well=False)
    else:
        outside.execute("UPDATE tickets SET state = 'cancelled'")
    await store.retry("t")
    ticket = await store.ticket("t")
    assert (ticket.state, ticket.error, ticket.completed_at, ticket.run_id) == ("ready", None, None, None)
    new = await claim_one(store)
    assert (new.run_id != old.run_id, new.attempt_number) == (True, 1)
    with pytest.raises(LeaseLost):
        await finish(store, old.attempt_id, well=True)
    await finish(store, new.attempt_id, well=True)
    assert [run.status for run in await store.runs("t")] == [end, "completed"]


async def test_queue_and_lists(store: Store, outside: Outside) -> None:
    assert (await store.queue()).oldest_ready_ms is None
    for number in range(4):
        insert(outside, f"t{number}", project_id="p" if number else None)
    insert(outside, "d", state="draft")
    await claim_one(store)
    await store.shift_clock(5_000)
    queue = await store.queue()
    assert (queue.ready, queue.running, queue.blocked, queue.delayed, queue.waiting) == (3, 1, 0, 0, 0)
    assert queue.oldest_ready_ms is not None and queue.oldest_ready_ms >= 5_000
    assert queue.next_due_ms is not None and 20_000 <= queue.next_due_ms <= 25_000
    assert {t.id for t in await store.tickets(states=["ready"], project_id="p")} <= {"t1", "t2", "t3"}
    assert len(await store.tickets(limit=2)) == 2
    assert len(await store.tickets(states=["draft", "in_progress"])) == 2


async def test_a_list_reads_no_long_columns(store: Store, outside: Outside) -> None:
    large = "x" * 100_000
    columns = ("title", "project_id", "description", "inputs", "outputs", "error", "assignee_id", "trigger_data")
    insert(outside, "t", state="draft", priority=3, **dict.fromkeys(columns, large))
    (found,) = await store.ticket_summaries(states=["draft"], project_id=large, limit=5)
    assert (found.id, found.state, found.priority) == ("t", "draft", 3)
    assert found.title == "x" * 500 and len(repr(found)) < 5_000
    assert [t.id for t in await store.tickets()] == [t.id for t in await store.ticket_summaries()]


async def test_queued_ms_counts_from_when_it_became_ready(store: Store, outside: Outside) -> None:
    insert(outside, "t", state="draft", created_at="2020-01-01T00:00:00.000Z", updated_at="2020-01-01T00:00:00.000Z")
    outside.execute("UPDATE tickets SET state = 'ready'")
    claim = await claim_one(store)
    assert claim.queued_ms < 60_000
    await store.finish(claim.attempt_id, Interrupted(), timings={}, vm_time_ms=0)
    await store.shift_clock(4_000)
    assert 4_000 <= (await claim_one(store)).queued_ms < 60_000


async def test_duplicate_id(store: Store) -> None:
    ticket = Ticket(id="t", title="t", state="ready", agent_id=ECHO.id)
    await store.add_ticket(ticket)
    with pytest.raises(Conflict, match="the ticket id 't' is taken"):
        await store.add_ticket(ticket)


# --- agents and workers -----------------------------------------------------------------------------------------------


async def test_agents_come_back_unchanged(store: Store) -> None:
    full = replace(
        RETRY,
        id="full",
        name="full",
        description="it's\n🦊",
        image="sha256:1",
        inputs_schema="{}",
        idle_timeout_seconds=1.5,
        network="open",
        secrets=("A", "B"),
        env={"K": "v w"},
        preload=("json",),
        retry=RetryPolicy(max_attempts=9, on=frozenset({FailureReason.VM_DIED})),
        idempotent=True,
    )
    await store.put_agent(full)
    await store.put_agent(full)
    assert await store.agent("full") == full
    assert full in await store.agents()


async def test_agent_versions(store: Store) -> None:
    for version in ("1.2.0", "1.10.0", "2.0.0"):
        await store.put_agent(replace(ECHO, id=version, name="many", version=version))
    found = {ref: (await store.agent(ref)).version for ref in ("many", "many@1", "many@1.2", "many@1.2.0", "2.0.0")}
    assert list(found.values()) == ["2.0.0", "1.10.0", "1.2.0", "1.2.0", "2.0.0"]
    for ref in ("many@3", "many@1.1", "no", "@", ""):
        with pytest.raises(NotFound):
            await store.agent(ref)


async def test_agent_conflicts_and_upgrades(store: Store) -> None:
    with pytest.raises(Conflict, match="another timeout_seconds"):
        await store.put_agent(replace(ECHO, timeout_seconds=1))
    with pytest.raises(Conflict, match="registered under the id"):
        await store.put_agent(replace(ECHO, id="another"))
    await store.put_agent(replace(ECHO, path=Path("/moved")))
    assert (await store.agent("echo")).path == Path("/moved")
    await store.put_agent(replace(ECHO, version="1.1.0", timeout_seconds=1))
    assert [a.version for a in await store.agents() if a.name == "echo"] == ["1.1.0"]


async def test_workers(store: Store) -> None:
    await store.heartbeat("w", host="h", pid=1, info={"running": 0})
    await store.shift_clock(3_000)
    assert (await store.workers())[0].seen_ms_ago >= 3_000
    await store.heartbeat("w", host="h", pid=1, info={"running": 2})
    (worker,) = await store.workers()
    assert (worker.info, worker.started_at < worker.seen_at, worker.seen_ms_ago < 3_000) == ({"running": 2}, True, True)
    await store.forget_worker("w")
    assert await store.workers() == []


# --- events -----------------------------------------------------------------------------------------------------------


async def test_events_in_order_and_by_page(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    chunks = [Event(ticket_id="t", kind="output", data={"text": f"{n} \udc80\0🦊"}, attempt_id="a") for n in range(25)]
    await store.append(chunks)
    await store.append([Event(ticket_id="deleted long ago", kind="output", data={})])
    seen: list[Event] = []
    while page := await store.events("t", after=seen[-1].seq if seen else 0, limit=10):
        seen += page
    assert [event.data for event in seen] == [event.data for event in chunks]
    assert [event.seq for event in seen] == sorted({event.seq for event in seen})
    assert all(event.at.endswith("Z") and event.attempt_id == "a" for event in seen)
    assert len(await store.events(None)) == 25


async def test_prune_keeps_what_is_young_or_unfinished(store: Store, outside: Outside) -> None:
    for name in ("done", "running"):
        insert(outside, name)
    claims = await store.claim("w", limit=2, lease_seconds=LEASE)
    await finish(store, next(c for c in claims if c.ticket.id == "done").attempt_id, well=True)
    await store.append([Event(ticket_id="done", kind="output", data={"text": "x"})] * 3000)
    await store.shift_clock(60_000)
    await store.append([Event(ticket_id="done", kind="output", data={"text": "young"})])
    assert await store.prune(older_than_seconds=30) == 3004
    assert [event.data for event in await store.events("done")] == [{"text": "young"}]
    assert len(await store.events("running")) == 2
