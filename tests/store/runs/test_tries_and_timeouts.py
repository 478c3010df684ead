"""Steps of workflows: retry policies, timeouts, lost leases, and the order in which they are claimed."""

from __future__ import annotations

import json

import pytest

from swarm.errors import LeaseLost
from swarm.model import Claim, Failed, FailureReason, Interrupted
from swarm.store.claims import suspects
from swarm.store.store import Store
from tests.store.databases import Outside, insert
from tests.store.flows import claims, finish, gives, rows, run, state, statuses, ticket
from tests.store.runs.workflows import BROKEN, CHAIN, DIAMOND, both_ways


async def test_the_steps_policy_overrides_the_agents(store: Store, outside: Outside) -> None:
    """Agent 'retry' allows 3 tries, 10 s apart; its step 2, an hour apart and after timeouts only."""
    await ticket(
        store,
        outside,
        """
steps:
  - {id: own, agent: retry, retry: {max_attempts: 2, delay_seconds: 3600, on: [timeout]}, timeout_seconds: 7}
  - {id: agents, agent: retry}
""",
    )
    own, agents = sorted(await claims(store), key=lambda claim: claim.step_id, reverse=True)
    assert (own.timeout_seconds, agents.timeout_seconds) == (7.0, 600.0)
    timeout = Failed(reason=FailureReason.TIMEOUT, message="too slow")
    await store.finish(own.attempt_id, timeout, timings={}, vm_time_ms=1.0)
    await finish(store, agents, gives(agents=BROKEN))
    found = await rows(store)
    assert (found["own"].status, found["agents"].status) == ("ready", "ready")
    later = (found["own"].available_at or 0) - (found["agents"].available_at or 0)
    assert later > 100_000  # half of max_delay_seconds, 300, at least
    assert (found["own"].max_attempts, found["agents"].max_attempts) == (2, 3)
    await store.shift_clock(16_000)
    (second,) = await claims(store)
    assert (second.step_id, second.attempt_number) == ("agents", 2)
    await finish(store, second)
    await store.shift_clock(3_600_000)
    (last,) = await claims(store)
    await store.finish(last.attempt_id, timeout, timings={}, vm_time_ms=1.0)
    assert await state(store) == ("failed", "too slow")


@both_ways
async def test_the_tickets_timeout_ends_its_run(store: Store, outside: Outside) -> None:
    await ticket(store, outside, DIAMOND, timeout_seconds=60)
    (top,) = await claims(store)
    assert (await store.due()).next_ms is not None
    await store.shift_clock(61_000)
    assert await claims(store) == []
    found, why = await state(store)
    assert found == "failed" and "it took longer than its timeout of 60 s" in why
    assert set((await statuses(store)).values()) == {"cancelled"}
    with pytest.raises(LeaseLost):
        await finish(store, top)


CLEANED = """
steps:
  - {id: fast, agent: echo}
  - {id: each, agent: echo, for_each: [1, 2, 3], max_parallel: 2}
  - {id: ask, approval: Go on}
  - {id: after, agent: echo, needs: each}
on_error:
  - {id: tidy, agent: echo, inputs: {text: "${error.step}: ${error.message}"}}
on_success:
  - {id: cheer, agent: echo}
"""


async def tidying(store: Store) -> Claim:
    """The claim of `tidy`. Steps that a decision outside has not stopped yet may be claimed first."""
    while True:
        for claim in await claims(store):
            if claim.step_id == "tidy":
                return claim


@both_ways
async def test_on_error_steps_run_when_the_time_is_over(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CLEANED, timeout_seconds=60)
    found = {claim.step_id: claim for claim in await claims(store)}
    assert set(found) == {"fast", "each[0]", "each[1]"}
    await finish(store, found["fast"])
    assert (await state(store))[0] == "waiting"
    await store.renew([found["each[0]"].attempt_id], lease_seconds=100)
    await store.shift_clock(61_000)
    tidy = await tidying(store)
    assert json.loads(tidy.inputs) == {"text": "each: it took longer than its timeout of 60 s"}
    assert (await store.ticket("t")).state == "in_progress"
    with pytest.raises(LeaseLost):
        await finish(store, found["each[0]"])
    await finish(store, tidy)
    await run(store)
    assert await state(store) == ("failed", "it took longer than its timeout of 60 s")
    assert await statuses(store) == {
        "fast": "completed", "each": "cancelled", "each[0]": "cancelled", "each[1]": "cancelled",
        "each[2]": "cancelled", "ask": "cancelled", "after": "skipped", "tidy": "completed", "cheer": "skipped",
    }  # fmt: skip


@both_ways
async def test_on_error_steps_have_a_time_limit_too(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CLEANED, timeout_seconds=60)
    await claims(store)
    await store.shift_clock(61_000)
    tidy = await tidying(store)
    await store.renew([tidy.attempt_id], lease_seconds=10_000)
    await store.shift_clock(599_000)
    assert await claims(store) == [] and (await state(store))[0] == "in_progress"
    await store.shift_clock(2_000)
    assert await claims(store) == []
    assert (await store.ticket("t")).error == (
        "it took longer than its timeout of 60 s; its on_error steps took longer than they may"
    )
    assert (await rows(store))["tidy"].status == "cancelled"


@both_ways
async def test_the_time_is_over_just_after_the_last_step(store: Store, outside: Outside) -> None:
    """The time is over after the step's end, before the decision that follows."""
    steps = "steps: [{id: a, agent: echo}]\non_error: [{id: tidy, agent: echo}]\n"
    await ticket(store, outside, steps, timeout_seconds=60)
    (a,) = await claims(store)
    await finish(store, a)
    await store.shift_clock(61_000)
    await run(store)
    assert (await state(store))[0] == "done"


@both_ways
async def test_the_timeout_of_a_nested_workflow(store: Store, outside: Outside) -> None:
    await ticket(
        store,
        outside,
        "steps: [{id: w, timeout_seconds: 30, workflow: {steps: [{id: a, agent: echo}]}}, {id: b, agent: echo}]",
    )
    found = {claim.step_id: claim for claim in await claims(store)}
    await store.renew([claim.attempt_id for claim in found.values()], lease_seconds=100)
    await store.shift_clock(31_000)
    assert await claims(store) == []
    assert (await rows(store))["w"].error == "it took longer than its timeout of 30 s"
    await finish(store, found["b"])
    await run(store)
    assert (await state(store))[0] == "failed"


async def test_priority_and_age_decide_between_steps_and_tickets(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN, priority=5, created_at="2026-01-01T00:00:01.000Z")
    insert(outside, "plain", priority=0, created_at="2026-01-01T00:00:00.000Z")
    insert(outside, "urgent", priority=9, created_at="2026-01-01T00:00:02.000Z")
    assert await run(store, limit=1) == ["main", "first", "second", "third", "main"]


@both_ways
async def test_a_lost_lease_gives_the_step_out_again(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    (first,) = await claims(store)
    await store.shift_clock(60_000)
    (again,) = await claims(store)
    assert (again.step_id, again.attempt_number) == ("first", 2)
    with pytest.raises(LeaseLost):
        await finish(store, first)
    await store.finish(again.attempt_id, Interrupted(), timings={}, vm_time_ms=0.0)
    assert await run(store) == ["first", "second", "third"]


@both_ways
async def test_what_engines_die_of_fails_the_step(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    for _ in range(suspects.SUSPECT_AFTER + suspects.ENOUGH):
        (claim,) = await claims(store)
        assert claim.step_id == "first"
        await store.shift_clock(60_000)
        assert await store.claim("sweeper", lease_seconds=1.0, ticket_id="nobody") == []
        await store.shift_clock(60_000)  # the back-off
    assert await claims(store) == []
    found, why = await state(store)
    assert found == "failed" and "while they ran nothing else" in why
    assert await statuses(store) == {"first": "failed", "second": "skipped", "third": "skipped"}
