"""Claim, lease, fence, finish: nothing lost, nothing done twice."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from swarm.errors import LeaseLost, TicketWithdrawn
from swarm.model import Cancelled, Event, FailureReason, Interrupted, Outcome, Succeeded
from swarm.store.claims.claim import ASIDE
from swarm.store.sql.rows import Renewal
from swarm.store.store import Store
from swarm.store.tickets.room import Room
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import ECHO, LEASE, RETRY, Outside, claim_one, failed, insert, left_overs


async def finish(store: Store, attempt_id: str, outcome: Outcome) -> None:
    await store.finish(attempt_id, outcome, timings={"agent": 1.5}, vm_time_ms=2.5)


async def transitions(store: Store, ticket_id: str) -> list[tuple[object, object, object]]:
    return [(e.data["of"], e.data["from"], e.data["to"]) for e in await store.events(ticket_id)]


async def test_way_of_a_ticket(store: Store, outside: Outside) -> None:
    insert(outside, "t", inputs='{"x": 1}', timeout_seconds=7)
    claim = await claim_one(store)
    assert (claim.ticket.id, claim.ticket.state, claim.agent) == ("t", "in_progress", ECHO)
    assert (claim.inputs, claim.timeout_seconds, claim.attempt_number) == ('{"x": 1}', 7.0, 1)
    assert 0 <= claim.queued_ms < 60_000
    await store.running(claim.attempt_id, 1000)
    await finish(store, claim.attempt_id, Succeeded(outputs='{"y": 2}'))

    ticket, (run,) = await store.ticket("t"), await store.runs("t")
    (step,), (attempt,) = await store.steps("t"), await store.attempts("t")
    assert (ticket.state, ticket.outputs, ticket.error, ticket.run_id) == ("done", '{"y": 2}', None, run.id)
    assert ticket.started_at and ticket.completed_at
    assert (run.status, run.workflow_id, run.total_vm_time_ms) == ("completed", None, 2.5)
    assert (step.step_id, step.status, step.outputs, step.vm_id) == ("main", "completed", '{"y": 2}', 1000)
    assert (step.agent_id, step.agent_name, step.agent_version) == (ECHO.id, "echo", "1.0.0")
    assert (attempt.outcome, attempt.vm_id, attempt.timings, attempt.exit_code) == (
        "succeeded",
        1000,
        {"agent": 1.5},
        0,
    )
    assert await transitions(store, "t") == [
        ("ticket", "ready", "in_progress"),
        ("step", "ready", "running"),
        ("step", "running", "completed"),
        ("ticket", "in_progress", "done"),
    ]
    assert await store.claim("worker", lease_seconds=LEASE) == []


async def test_a_run_knows_what_made_its_ticket(store: Store, outside: Outside) -> None:
    insert(outside, "a")
    insert(outside, "b", trigger_type="webhook", trigger_data='{"body": 1}')
    insert(outside, "c", trigger_type=None)
    await store.claim("w", limit=9, lease_seconds=LEASE)
    runs = [(await store.runs(ticket))[0] for ticket in ("a", "b", "c")]
    assert [run.trigger_type for run in runs] == ["ticket", "webhook", "ticket"]
    assert [run.trigger_data for run in runs] == [None, '{"body": 1}', None]


async def test_assignee_is_agent_enough(store: Store, outside: Outside) -> None:
    insert(outside, "a", agent_id=None, assignee_id=ECHO.id, assignee_type="agent")
    insert(outside, "b", agent_id="", assignee_id=ECHO.id)
    assert {c.ticket.id for c in await store.claim("w", limit=9, lease_seconds=LEASE)} == {"a", "b"}


async def test_order_is_priority_then_age(store: Store, outside: Outside) -> None:
    insert(outside, "young", created_at="2026-01-02T00:00:00.000Z")
    insert(outside, "old", created_at="2026-01-01T00:00:00.000Z")
    insert(outside, "urgent", priority=5, created_at="2026-01-03T00:00:00.000Z")
    insert(outside, "retried", agent_id=RETRY.id, created_at="2026-01-01T12:00:00.000Z")
    first = await claim_one(store, ticket_id="retried")
    await finish(store, first.attempt_id, Interrupted())  # a step that is ready already takes its turn among tickets
    claims = await store.claim("w", limit=3, lease_seconds=LEASE)
    assert [c.ticket.id for c in claims] == ["urgent", "old", "retried"]
    assert (await claim_one(store)).ticket.id == "young"


async def test_claims_of_many_tasks_are_disjoint(store: Store, outside: Outside) -> None:
    for number in range(60):
        insert(outside, f"t{number}")
    batches = await asyncio.gather(*(store.claim(f"w{n}", limit=7, lease_seconds=LEASE) for n in range(10)))
    ids = [claim.ticket.id for batch in batches for claim in batch]
    assert len(ids) == len(set(ids)) == 60


async def test_only_the_ticket_asked_for(store: Store, outside: Outside) -> None:
    insert(outside, "other", priority=9)
    insert(outside, "draft", state="draft")
    insert(outside, "mine")
    assert await store.claim("w", lease_seconds=LEASE, ticket_id="draft") == []
    assert await store.claim("w", lease_seconds=LEASE, ticket_id="nobody") == []
    assert [c.ticket.id for c in await store.claim("w", limit=5, lease_seconds=LEASE, ticket_id="mine")] == ["mine"]


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_renewed_lease_holds_and_lost_one_moves_on(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    first = await claim_one(store)
    await store.shift_clock(29_000)
    assert not (await store.renew([first.attempt_id], lease_seconds=LEASE)).lost
    await store.shift_clock(29_000)
    assert await store.claim("other", lease_seconds=LEASE) == []
    await store.shift_clock(2_000)

    second = await claim_one(store, "other")  # even though this agent's policy has one try: it was not its fault
    assert (second.attempt_number, second.step_execution_id) == (2, first.step_execution_id)
    renewal = await store.renew([first.attempt_id, second.attempt_id], lease_seconds=LEASE)
    assert renewal == Renewal(lost=frozenset({first.attempt_id}), cancelled=frozenset())
    before = await store.events("t")
    for write in (
        store.running(first.attempt_id, 1),
        finish(store, first.attempt_id, Succeeded(outputs="{}")),
        finish(store, first.attempt_id, Interrupted()),
    ):
        with pytest.raises(LeaseLost, match="nothing was changed"):
            await write
    assert await store.events("t") == before

    await finish(store, second.attempt_id, Succeeded(outputs="2"))
    (step,), attempts = await store.steps("t"), await store.attempts("t")
    assert [(a.outcome, a.worker) for a in attempts] == [("lost", "worker"), ("succeeded", "other")]
    assert (step.retry_count, (await store.ticket("t")).outputs) == (0, "2")  # a lost attempt is no try of the agent


async def test_expired_lease_that_nobody_took_still_counts(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    claim = await claim_one(store)
    await store.shift_clock(99_000)
    await finish(store, claim.attempt_id, Succeeded(outputs="{}"))
    assert (await store.ticket("t")).state == "done"


async def test_one_lost_lease_does_not_undo_the_others(store: Store, outside: Outside) -> None:
    for name in ("a", "b", "c"):
        insert(outside, name)
    a, b, c = await store.claim("w", limit=3, lease_seconds=LEASE)
    outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id = 'b'")
    results = await asyncio.gather(
        *(finish(store, claim.attempt_id, Succeeded(outputs="{}")) for claim in (a, b, c, a)),
        store.append([Event(ticket_id="a", kind="output", data={"text": "hello"})]),
        store.running("nobody", 1),
        return_exceptions=True,
    )
    none = type(None)
    assert [type(r) for r in results] == [none, TicketWithdrawn, none, LeaseLost, none, TicketWithdrawn]
    assert [(await store.ticket(name)).state for name in "abc"] == ["done", "cancelled", "done"]
    assert any(e.kind == "output" for e in await store.events("a"))


async def test_cancelled_caller_hands_its_claim_back(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await store.claim("w", lease_seconds=LEASE)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (claims := await store.claim("v", lease_seconds=LEASE)):
            pass
    assert claims[0].ticket.id == "t"
    assert (await store.steps("t"))[0].retry_count == 0


# --- outcomes and retries ---------------------------------------------------------------------------------------------


async def test_retry_with_back_off_until_used_up(store: Store, outside: Outside) -> None:
    insert(outside, "t", agent_id=RETRY.id)
    for number, (least_ms, most_ms) in {1: (5_000, 10_000), 2: (7_500, 15_000)}.items():
        claim = await claim_one(store)
        assert claim.attempt_number == number
        await finish(store, claim.attempt_id, failed(message=f"no {number}"))
        (step,), queue = await store.steps("t"), await store.queue()
        assert (step.status, step.retry_count, (await store.ticket("t")).state) == ("ready", number, "in_progress")
        assert (queue.delayed, queue.ready, queue.running) == (1, 0, 0)
        assert queue.next_due_ms is not None and least_ms - 1000 <= queue.next_due_ms <= most_ms
        assert await store.claim("w", lease_seconds=LEASE) == []
        await store.shift_clock(most_ms)
    last = await claim_one(store)
    await finish(store, last.attempt_id, failed(message="no 3"))
    ticket, (step,) = await store.ticket("t"), await store.steps("t")
    assert (ticket.state, ticket.error, step.status, step.retry_count) == ("failed", "no 3", "failed", 2)
    assert [a.error for a in await store.attempts("t")] == ["no 1", "no 2", "no 3"]
    assert (await store.runs("t"))[0].total_vm_time_ms == 7.5


@pytest.mark.parametrize(
    ("reason", "idempotent", "again"),
    [
        (FailureReason.AGENT_FAILED, False, True),
        (FailureReason.TIMEOUT, False, True),
        (FailureReason.OUTPUT_INVALID, True, False),
        (FailureReason.VM_DIED, False, False),
        (FailureReason.VM_DIED, True, True),
    ],
)
async def test_which_failures_are_tried_again(
    store: Store, outside: Outside, reason: FailureReason, idempotent: bool, again: bool
) -> None:
    agent = replace(RETRY, id="i", name="i", idempotent=idempotent)
    await store.put_agent(agent)
    insert(outside, "t", agent_id="i")
    await finish(store, (await claim_one(store)).attempt_id, failed(reason))
    assert (await store.ticket("t")).state == ("in_progress" if again else "failed")
    assert (await store.attempts("t"))[0].reason == reason


@pytest.mark.parametrize(("given", "tries"), [(1, 1), (5, 5)])
async def test_tickets_max_attempts_overrides_the_agents(
    store: Store, outside: Outside, given: int, tries: int
) -> None:
    insert(outside, "t", agent_id=RETRY.id, max_attempts=given)
    for _ in range(tries):
        await finish(store, (await claim_one(store)).attempt_id, failed())
        await store.shift_clock(20_000)
    assert (await store.ticket("t")).state == "failed"
    assert len(await store.attempts("t")) == tries


async def test_soft_stop_is_not_counted(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    for number in range(1, 5):
        claim = await claim_one(store)
        assert claim.attempt_number == number
        await finish(store, claim.attempt_id, Interrupted())
    (step,) = await store.steps("t")
    assert (step.retry_count, step.status, step.vm_id) == (0, "ready", None)
    assert {a.outcome for a in await store.attempts("t")} == {"interrupted"}


async def test_cancelled_outcome(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    await finish(store, (await claim_one(store)).attempt_id, Cancelled(message="stopped by hand"))
    ticket = await store.ticket("t")
    assert (ticket.state, ticket.error) == ("cancelled", "stopped by hand")


async def test_hostile_output_and_error_are_stored(store: Store, outside: Outside) -> None:
    insert(outside, "a")
    insert(outside, "b")
    a, b = await store.claim("w", limit=2, lease_seconds=LEASE)
    await finish(store, a.attempt_id, Succeeded(outputs='"\udc80 \\u0000 \'; DROP TABLE tickets; --"'))
    await finish(store, b.attempt_id, failed(message="\udcff\0" + "x" * 10_000_000))
    assert (await store.ticket("a")).state == "done"
    error = (await store.ticket("b")).error or ""
    assert len(error) < 20_000 and "\0" not in error


# --- ended or taken away from outside ---------------------------------------------------------------------------------


@pytest.mark.parametrize("noticed_by", ["renew", "finish", "sweep"])
@pytest.mark.parametrize(
    "change",
    ["UPDATE tickets SET state = 'cancelled' WHERE id = 't'", "DELETE FROM tickets WHERE id = 't'"],
    ids=["cancelled", "deleted"],
)
async def test_taken_away_while_it_runs(store: Store, outside: Outside, change: str, noticed_by: str) -> None:
    insert(outside, "t")
    claim = await claim_one(store)
    outside.execute(change)
    if noticed_by == "renew":
        renewal = await store.renew([claim.attempt_id], lease_seconds=LEASE)
        assert renewal == Renewal(lost=frozenset(), cancelled=frozenset({claim.attempt_id}))
    elif noticed_by == "finish":
        with pytest.raises(LeaseLost):
            await finish(store, claim.attempt_id, Succeeded(outputs="{}"))
    await store.shift_clock(31_000)
    assert await store.claim("w", lease_seconds=LEASE) == []
    assert left_overs(outside) == 0
    assert outside.execute("SELECT count(*) FROM attempts WHERE outcome IS NULL") == [(0,)]
    assert outside.execute("SELECT count(*) FROM step_executions WHERE status = 'running'") == [(0,)]
    if "DELETE" not in change:
        ticket = await store.ticket("t")
        assert (ticket.state, ticket.outputs) == ("cancelled", None) and ticket.completed_at
    again = await store.renew([claim.attempt_id], lease_seconds=LEASE)
    assert again.cancelled == {claim.attempt_id}


async def test_deleted_and_inserted_again(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    old = await claim_one(store)
    outside.execute("DELETE FROM tickets WHERE id = 't'")
    insert(outside, "t")
    new = await claim_one(store)
    with pytest.raises(LeaseLost):
        await finish(store, old.attempt_id, Succeeded(outputs='"old"'))
    await finish(store, new.attempt_id, Succeeded(outputs='"new"'))
    assert (await store.ticket("t")).outputs == '"new"'
    assert len(await transitions(store, "t")) == 4  # its own history only
    assert "deleted" in {event.kind for event in await store.events(None)}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE tickets SET state = 'ready' WHERE id = 't'",
        "INSERT OR REPLACE INTO tickets (id, title, state, agent_id) SELECT id, title, 'ready', agent_id FROM tickets",
    ],
    ids=["update", "replace"],
)
async def test_made_ready_again_while_it_runs(store: Store, outside: Outside, change: str) -> None:
    insert(outside, "t")
    old = await claim_one(store)
    outside.execute(change)
    new = await claim_one(store)
    assert new.run_id != old.run_id
    renewal = await store.renew([old.attempt_id, new.attempt_id], lease_seconds=LEASE)
    assert renewal.cancelled == {old.attempt_id} and not renewal.lost
    with pytest.raises(LeaseLost):
        await finish(store, old.attempt_id, Succeeded(outputs="{}"))
    await finish(store, new.attempt_id, Succeeded(outputs="{}"))
    assert {run.status for run in await store.runs("t")} == {"cancelled", "completed"}


async def test_id_changed_while_it_runs(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    claim = await claim_one(store)
    if outside.refuses("UPDATE tickets SET id = 'u' WHERE id = 't'"):
        return
    assert (await store.renew([claim.attempt_id], lease_seconds=LEASE)).cancelled == {claim.attempt_id}
    assert left_overs(outside) == 0


async def test_cancelled_from_outside_while_it_waits_for_its_retry(store: Store, outside: Outside) -> None:
    insert(outside, "t", agent_id=RETRY.id)
    await finish(store, (await claim_one(store)).attempt_id, failed())
    outside.execute("UPDATE tickets SET state = 'cancelled'")
    await store.shift_clock(60_000)
    assert await store.claim("w", lease_seconds=LEASE) == []
    assert [s.status for s in await store.steps("t")] == ["cancelled"]


async def test_one_transaction_claims_no_more_than_one_long_row(store: Store, outside: Outside) -> None:
    """It writes each row as a whole, and all others wait; the order is kept."""
    long = json.dumps({"x": "y" * 3_000_000})
    insert(outside, "retried", agent_id=RETRY.id, priority=6, inputs=long)  # were it small, the others would wait
    first = await claim_one(store, ticket_id="retried")
    await finish(store, first.attempt_id, Interrupted())
    for number in range(3):
        insert(outside, f"long{number}", inputs=long, priority=9 - 2 * number)
    insert(outside, "small")
    claims = [[c.ticket.id for c in await store.claim("w", limit=9, lease_seconds=LEASE)] for _ in range(5)]
    assert claims == [["long0"], ["long1"], ["retried"], ["long2"], ["small"]]


async def test_each_long_row_that_is_refused_has_a_transaction_of_its_own(store: Store, outside: Outside) -> None:
    for number in range(8):
        insert(outside, f"bad{number}", description="y" * 3_000_000, priority=1)
    insert(outside, "good")
    before = store.use()["write"]["transactions"]
    assert (await claim_one(store)).ticket.id == "good"
    assert store.use()["write"]["transactions"] - before > 8


async def test_a_long_row_that_does_not_fit_keeps_its_turn(store: Store, outside: Outside) -> None:
    insert(outside, "long", inputs=json.dumps({"x": "y" * 3_000_000}), priority=1)
    insert(outside, "small")
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await store.claim("w", lease_seconds=LEASE, room=Room(memory_mb=1)) == []


async def test_what_other_files_leave_no_disk_for_waits_in_nobodys_way(store: Store, outside: Outside) -> None:
    """However many there are, and however they name their agent; those behind them keep their order."""
    large = [replace(ECHO, id=f"large-{number}", version=f"2.0.{number}", disk_mb=30_000) for number in range(3)]
    for agent in large:
        await store.put_agent(agent)
    refs = [large[0].id, f"echo@{large[1].version}"]
    for number in range(150):
        insert(outside, f"large{number}", agent_id=refs[number % 2], priority=9)
    insert(outside, "assigned", agent_id=None, assignee_id=large[2].id, priority=9)
    insert(outside, "tried", agent_id=large[2].id, priority=99)
    tried = await claim_one(store)
    await finish(store, tried.attempt_id, Interrupted())  # its step is ready now, no more the ticket
    for name in ("first", "second", "third"):
        insert(outside, name)

    def room(free_mb: int, whole_mb: int = 100_000) -> Room:
        return Room(disk_mb=free_mb, most_disk_mb=free_mb, whole_disk_mb=whole_mb)

    async def claimed(found: Room, limit: int = 1) -> list[str]:
        return [claim.ticket.id for claim in await store.claim("w", limit=limit, lease_seconds=LEASE, room=found)]

    assert await claimed(room(10_000)) == ["first"]
    assert await claimed(room(10_000), 9) == ["second", "third"]
    left = room(10_000)
    assert await claimed(left) == [] and left.waits_for == "", "no sleep of a sandbox would help"
    assert "needs 30000 MB of disk, and all VMs of this host together may take 10000 MB while" in left.full_disk
    assert await claimed(room(29_999), 9) == []
    assert outside.execute("SELECT DISTINCT state FROM tickets WHERE id LIKE 'large%'") == [("ready",)]
    assert await claimed(room(30_000)) == ["tried"], "in its turn, as soon as there is room"
    assert await claimed(room(30_000)) == ["large0"]
    assert await claimed(room(29_999, 29_999)) == []
    assert (await store.ticket("large1")).state == "failed", "nothing that ends here would make room"


async def test_it_waits_also_if_it_is_asked_for_alone_or_too_long_to_read(store: Store, outside: Outside) -> None:
    await store.put_agent(replace(ECHO, id="large", version="2.0.0", disk_mb=30_000))
    for number in range(3):
        insert(outside, f"long{number}", agent_id="large", inputs=json.dumps({"x": "y" * 3_000_000}), priority=1)
    insert(outside, "small")
    room = Room(disk_mb=10_000, most_disk_mb=10_000, whole_disk_mb=100_000)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await store.claim("w", ticket_id="long0", lease_seconds=LEASE, room=room) == []
        assert [one.ticket.id for one in await store.claim("w", limit=9, lease_seconds=LEASE, room=room)] == ["small"]
        assert await store.claim("w", limit=9, lease_seconds=LEASE, room=room) == []
    assert (await store.ticket("long0")).state == "ready"


@pytest.mark.sqlite
async def test_one_that_no_statement_can_leave_out_fails(store: Store, outside: Outside) -> None:
    await store.put_agent(replace(ECHO, id="large", version="2.0.0", disk_mb=30_000))
    insert(outside, "blob", agent_id=b"large", priority=1)
    insert(outside, "small")
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert (await claim_one(store, room=Room(most_disk_mb=10_000))).ticket.id == "small"
    assert "while other files fill the rest" in str((await store.ticket("blob")).error)


async def test_only_so_many_kinds_of_vms_are_left_waiting(store: Store, outside: Outside) -> None:
    """Else each claim would look at all of them, under the lock: the next one fails, as what can never fit does."""
    for number in range(ASIDE + 1):
        await store.put_agent(replace(ECHO, id=f"large-{number}", version=f"2.0.{number}", disk_mb=30_000))
        insert(outside, f"t{number:02}", agent_id=f"large-{number}", created_at=f"2026-01-01T00:00:{number % 60:02}Z")
    insert(outside, "small", priority=-1)
    assert (await claim_one(store, room=Room(most_disk_mb=10_000))).ticket.id == "small"
    [(error,)] = outside.execute("SELECT error FROM tickets WHERE state = 'failed'")
    assert "while other files fill the rest" in error
