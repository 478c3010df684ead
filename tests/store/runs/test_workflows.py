"""Workflows in the database: what the planner decides is what the rows say, whatever happens between."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from swarm.admin.prove import judge
from swarm.errors import Conflict, LeaseLost, NotFound, UsageError
from swarm.model import Claim, Failed, FailureReason, Interrupted, Succeeded, Ticket
from swarm.store.runs.workflow_engine import PLANNING_SECONDS
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside, insert, left_overs
from tests.store.flows import claims, finish, gives, names, register, rows, run, state, statuses, ticket

CHAIN = """
inputs: {word: {type: string, default: hello}}
steps:
  - {id: first, agent: echo, inputs: {word: "${inputs.word}"}}
  - {id: second, agent: echo, needs: first, inputs: {heard: "${steps.first.outputs.word}"}}
  - {id: third, agent: echo, needs: second, inputs: {heard: "${steps.second.outputs.heard}!"}}
"""
DIAMOND = """
steps:
  - {id: top, agent: echo}
  - {id: left, agent: echo, needs: top}
  - {id: right, agent: echo, needs: top}
  - {id: bottom, agent: echo, needs: [left, right], inputs: {n: 1}}
"""
BROKEN = Exception("it broke")


# Both ways of deciding: with a limit below 0 s, nothing is decided while the write lock is held.
OUTSIDE = -1.0
both_ways = pytest.mark.parametrize("planning_seconds", [PLANNING_SECONDS, OUTSIDE], ids=["in the lane", "outside"])


async def proved(store: Store, outside: Outside) -> None:
    report = await store.audit(judge)
    assert report.kept, report.violations
    assert left_overs(outside) == 0


@both_ways
async def test_a_chain(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN, inputs='{"word": "hi"}', priority=3)
    assert await run(store) == ["first", "second", "third"]
    assert await state(store) == ("done", {"heard": "hi!"})
    (found,) = await store.runs("t")
    assert (found.status, found.error, found.trigger_type, found.workflow_version) == (
        "completed",
        None,
        "ticket",
        "1.0.0",
    )
    assert found.total_vm_time_ms == 3.0
    steps = await store.steps("t")
    assert [s.step_id for s in steps] == ["first", "second", "third"]  # as the file has them
    for step in steps:
        assert step.agent_name == "echo" and step.started_at and step.completed_at and step.duration_ms is not None
    await proved(store, outside)


@both_ways
async def test_each_step_costs_one_attempt_and_nothing_runs_twice(store: Store, outside: Outside) -> None:
    await ticket(store, outside, DIAMOND)
    (top,) = await claims(store)
    assert top.step_id == "top"
    await finish(store, top)
    both = await claims(store)
    assert names(both) == ["left", "right"]  # at once
    await finish(store, both[0])
    assert await claims(store) == []  # bottom needs both
    await finish(store, both[1])
    assert await run(store) == ["bottom"]
    assert await state(store) == ("done", {"n": 1})
    assert len(await store.attempts("t")) == 4
    await proved(store, outside)


async def test_two_engines_share_one_workflow(url: str, store: Store, outside: Outside) -> None:
    await ticket(store, outside, DIAMOND)
    async with Store.open(url) as other:
        (top,) = await claims(store)
        await finish(store, top)
        (one,) = await store.claim("a", lease_seconds=LEASE)
        (two,) = await other.claim("b", lease_seconds=LEASE)
        await finish(other, two)
        await finish(store, one)
        await other.claim("b", limit=0, lease_seconds=LEASE)
        assert await run(other) == ["bottom"]
    assert (await state(store))[0] == "done"
    await proved(store, outside)


@both_ways
async def test_of_a_batch_of_ends_none_is_lost(store: Store, outside: Outside) -> None:
    """They share one transaction, and so one decision."""
    await ticket(
        store,
        outside,
        "steps: [{id: s, agent: echo, for_each: [1, 2, 3, 4, 5], inputs: {n: '${item}'}}]",
    )
    found = await claims(store, 9)
    assert names(found) == [f"s[{i}]" for i in range(5)]
    await asyncio.gather(*(finish(store, claim) for claim in found))
    assert await run(store) == []
    assert await state(store) == ("done", [{"n": n} for n in (1, 2, 3, 4, 5)])
    await proved(store, outside)


@both_ways
async def test_a_fan_out_of_fifty_never_more_than_ten_at_once(store: Store, outside: Outside) -> None:
    items = json.dumps(list(range(50)))
    await ticket(
        store,
        outside,
        f"steps: [{{id: s, agent: echo, for_each: {items}, max_parallel: 10, inputs: {{n: '${{item}}'}}}}]",
    )
    most = 0
    running = await claims(store, 100)
    while running:
        most = max(most, len(running))
        await finish(store, running.pop(0))
        running += await claims(store, 100)
    assert most == 10
    assert await state(store) == ("done", [{"n": n} for n in range(50)])
    assert len(await store.attempts("t")) == 50
    await proved(store, outside)


async def test_a_chain_of_500(store: Store, outside: Outside) -> None:
    steps = ["  - {id: s0, agent: echo, inputs: {n: 0}}"]
    steps += [
        f"  - {{id: s{n}, agent: echo, needs: s{n - 1}, inputs: {{n: '${{steps.s{n - 1}.outputs.n}}'}}}}"
        for n in range(1, 500)
    ]
    await ticket(store, outside, "steps:\n" + "\n".join(steps))
    assert await run(store) == [f"s{n}" for n in range(500)]
    assert await state(store) == ("done", {"n": 0})


@pytest.mark.parametrize(
    ("join", "broken", "ended", "after"),
    [
        ("all", ["a"], "failed", {"b": "completed", "c": "completed", "after": "skipped"}),
        ("any", ["a", "b"], "done", {"c": "completed", "after": "completed"}),
        ("any", ["a", "b", "c"], "failed", {"after": "failed"}),
        ("2", ["a"], "done", {"after": "completed"}),
        ("2", ["a", "b"], "failed", {"after": "failed"}),
    ],
)
@both_ways
async def test_joins(
    store: Store, outside: Outside, join: str, broken: list[str], ended: str, after: dict[str, str]
) -> None:
    await ticket(
        store,
        outside,
        f"""
steps:
  - {{id: a, agent: echo}}
  - {{id: b, agent: echo}}
  - {{id: c, agent: echo}}
  - {{id: after, agent: echo, needs: [a, b, c], join: {join}}}
""",
    )
    await run(store, gives(**dict.fromkeys(broken, BROKEN)))
    assert (await state(store))[0] == ended
    found = await statuses(store)
    assert {name: found[name] for name in after} == after
    await proved(store, outside)


@both_ways
async def test_the_first_success_ends_the_others(store: Store, outside: Outside) -> None:
    await ticket(
        store,
        outside,
        """
steps:
  - {id: slow, agent: echo}
  - {id: quick, agent: echo}
  - {id: after, agent: echo, needs: [slow, quick], join: first_success}
""",
    )
    slow, quick = sorted(await claims(store), key=lambda claim: claim.step_id, reverse=True)
    await finish(store, quick)
    assert names(await claims(store)) == ["after"]
    renewal = await store.renew([slow.attempt_id], lease_seconds=LEASE)
    assert renewal.cancelled == {slow.attempt_id}  # its worker kills the VM
    with pytest.raises(LeaseLost, match="cancelled"):
        await finish(store, slow)
    assert (await rows(store))["slow"].error == "'quick' was first, and 'after' needs only one"
    assert (await statuses(store))["slow"] == "cancelled"


@both_ways
async def test_why_a_step_was_skipped_is_in_its_row(store: Store, outside: Outside) -> None:
    await ticket(
        store,
        outside,
        """
inputs: {deploy: {type: boolean, default: false}}
steps:
  - {id: build, agent: echo}
  - {id: deploy, agent: echo, needs: build, when: "${inputs.deploy}"}
  - {id: tell, agent: echo, needs: deploy}
""",
    )
    assert await run(store) == ["build"]
    found = await rows(store)
    assert found["deploy"].error == "its `when` is false: ${inputs.deploy}"
    assert found["tell"].error == "it needs 'deploy', which was skipped"
    assert (await state(store))[0] == "done"
    await proved(store, outside)


@pytest.mark.parametrize("broken", [False, True])
@both_ways
async def test_handlers_run_at_the_end(store: Store, outside: Outside, broken: bool) -> None:
    await ticket(
        store,
        outside,
        """
steps: [{id: work, agent: echo}]
on_error: [{id: alarm, agent: echo, inputs: {what: "${error.step}: ${error.message}"}}]
on_success: [{id: cheer, agent: echo}]
""",
    )
    started = await run(store, gives(work=BROKEN) if broken else gives())
    assert started == ["work", "alarm" if broken else "cheer"]
    assert (await state(store))[0] == ("failed" if broken else "done")
    if broken:
        assert json.loads((await rows(store))["alarm"].inputs or "")["what"] == "work: it broke"
        (found,) = await store.runs("t")
        assert (found.error_step, found.error) == ("work", "it broke")
    await proved(store, outside)


@both_ways
async def test_fail_fast_stops_what_runs(store: Store, outside: Outside) -> None:
    await ticket(
        store,
        outside,
        "fail_fast: true\nsteps: [{id: a, agent: echo}, {id: b, agent: echo}, {id: c, agent: echo, needs: b}]",
    )
    a, b = sorted(await claims(store), key=lambda claim: claim.step_id)
    await finish(store, a, gives(a=BROKEN))
    await claims(store)
    assert (await state(store))[0] == "failed"
    assert await statuses(store) == {"a": "failed", "b": "cancelled", "c": "skipped"}
    assert (await store.renew([b.attempt_id], lease_seconds=LEASE)).cancelled == {b.attempt_id}
    await proved(store, outside)


@both_ways
async def test_continue_on_error(store: Store, outside: Outside) -> None:
    await ticket(
        store,
        outside,
        """
steps:
  - {id: optional, agent: echo, continue_on_error: true}
  - {id: after, agent: echo, needs: optional, inputs: {why: "${steps.optional.error}"}}
""",
    )
    assert await run(store, gives(optional=BROKEN)) == ["optional", "after"]
    assert await state(store) == ("done", {"why": "it broke"})


# --- policies -----------------------------------------------------------------------------------------------------


async def test_the_steps_policy_goes_before_the_agents(store: Store, outside: Outside) -> None:
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
    await proved(store, outside)


@both_ways
async def test_the_tickets_timeout_ends_the_whole(store: Store, outside: Outside) -> None:
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
    await proved(store, outside)


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
    """What a decision outside has not yet stopped may be given out once more."""
    while True:
        for claim in await claims(store):
            if claim.step_id == "tidy":
                return claim


@both_ways
async def test_what_cleans_up_runs_when_the_time_is_over(store: Store, outside: Outside) -> None:
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
    await proved(store, outside)


@both_ways
async def test_what_cleans_up_has_not_all_the_time_there_is(store: Store, outside: Outside) -> None:
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
    await proved(store, outside)


@both_ways
async def test_the_last_step_ends_as_the_time_does(store: Store, outside: Outside) -> None:
    """Between its end and what follows from that."""
    steps = "steps: [{id: a, agent: echo}]\non_error: [{id: tidy, agent: echo}]\n"
    await ticket(store, outside, steps, timeout_seconds=60)
    (a,) = await claims(store)
    await finish(store, a)
    await store.shift_clock(61_000)
    await run(store)
    assert (await state(store))[0] == "done"


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
    await proved(store, outside)


@both_ways
async def test_leases_lost_too_often_fail_the_step(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    for _ in range(3):
        (claim,) = await claims(store)
        assert claim.step_id == "first"
        await store.shift_clock(60_000)
    assert await claims(store) == []
    found, why = await state(store)
    assert found == "failed" and "that was try 3, and the last" in why
    assert await statuses(store) == {"first": "failed", "second": "skipped", "third": "skipped"}
    await proved(store, outside)


# --- what is asked for --------------------------------------------------------------------------------------------


@both_ways
async def test_what_is_frozen_stays(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    (first,) = await claims(store)
    outside.execute("UPDATE workflows SET steps = '{}', enabled = 0")
    outside.execute("UPDATE tickets SET workflow_id = 'another', inputs = '{}' WHERE id = 't'")
    await finish(store, first)
    assert await run(store) == ["second", "third"]
    assert await state(store) == ("done", {"heard": "hello!"})


async def test_unknown_or_disabled(store: Store, outside: Outside) -> None:
    id_ = await register(store, CHAIN)
    insert(outside, "unknown", agent_id=None, execution_mode="workflow", workflow_id="nowhere")
    insert(outside, "named", agent_id=None, execution_mode="workflow", workflow_id="flow")
    assert await claims(store) == []
    assert "no workflow has the id 'nowhere'" in (await state(store, "unknown"))[1]
    assert f"did you mean '{id_}'" in (await state(store, "named"))[1]
    await store.enable_workflow("flow", enabled=False)
    insert(outside, "t", agent_id=None, execution_mode="workflow", workflow_id=id_)
    assert await claims(store) == []
    assert await state(store) == (
        "failed",
        "the workflow flow@1.0.0 is disabled; `swarm workflow enable flow@1.0.0` enables it",
    )
    await store.enable_workflow("flow", enabled=True)
    await store.retry("t")
    assert await run(store) == ["first", "second", "third"]


@both_ways
async def test_inputs_that_do_not_fit_start_nothing(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN, inputs='{"word": 7}')
    assert await run(store) == []
    found, why = await state(store)
    assert found == "failed" and "the inputs don't fit the workflow" in why and "$.word" in why
    assert (await store.runs("t"))[0].status == "failed"
    await proved(store, outside)


async def test_a_trigger_is_told(store: Store, outside: Outside) -> None:
    id_ = await register(store, "steps: [{id: a, agent: echo, inputs: {by: '${trigger.type} ${trigger.x}'}}]")
    await store.add_ticket(
        Ticket(
            id="t", title="T", state="ready", execution_mode="workflow", workflow_id=id_,
            trigger_type="manual", trigger_data='{"x": 1}',
        )
    )  # fmt: skip
    await run(store)
    assert await state(store) == ("done", {"by": "manual 1"})
    (found,) = await store.runs("t")
    assert (found.trigger_type, found.trigger_data) == ("manual", '{"x": 1}')


@both_ways
async def test_an_agent_that_is_gone_fails_its_step(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    (first,) = await claims(store)
    with pytest.raises(Conflict, match=r"tickets that have not ended need the agent echo@1\.0\.0"):
        await store.remove_agent("echo")
    outside.execute("DELETE FROM agents WHERE name = 'echo'")
    await finish(store, first)
    assert await run(store) == []
    found, why = await state(store)
    assert found == "failed" and why == "the agent echo@1.0.0 was removed after the run began"
    await proved(store, outside)


async def test_dear_expressions_are_evaluated_outside(store: Store, outside: Outside) -> None:
    """A loop over what a step left: not while the write lock is held, but in the jail."""
    await ticket(
        store,
        outside,
        """
steps:
  - {id: a, agent: echo}
  - {id: b, agent: echo, needs: a, inputs: {squares: "${steps.a.outputs.map(n, n * n)}"}}
""",
    )
    (a,) = await claims(store)
    await finish(store, a, gives(a=[1, 2, 3]))
    assert outside.execute("SELECT unprocessed FROM workflow_runs") == [('["a"]',)]
    assert (await store.due()).next_ms == 0  # any engine sees it
    assert await run(store) == ["b"]
    assert await state(store) == ("done", {"squares": [1, 4, 9]})
    assert store.jail.pid is not None


async def test_a_decision_whose_engine_died_is_taken_up_by_another(url: str, outside: Outside) -> None:
    text = "steps: [{id: a, agent: echo}, {id: b, agent: echo, needs: a, inputs: {n: '${[1].map(x, x)}'}}]"
    async with Store.open(url) as store:
        await ticket(store, outside, text)
        (a,) = await claims(store)
        await finish(store, a)
        await store.claim("dies", limit=1, lease_seconds=LEASE)  # takes the decision up
    async with Store.open(url) as store:
        if (await statuses(store))["b"] == "pending":  # it died before it had decided
            assert await claims(store) == []
            await store.shift_clock(31_000)
        assert await run(store) == ["b"]
        assert (await state(store))[0] == "done"
        await proved(store, outside)


# --- approvals ----------------------------------------------------------------------------------------------------

APPROVAL = """
steps:
  - {id: draft, agent: echo, inputs: {title: News}}
  - {id: check, needs: draft, approval: 'Publish ${steps.draft.outputs.title}?'}
  - {id: publish, agent: echo, needs: check, inputs: {by: "${steps.check.outputs.by}"}}
"""


@both_ways
async def test_an_approval_over_a_restart(url: str, outside: Outside, planning_seconds: float) -> None:
    async with Store.open(url, planning_seconds=planning_seconds) as store:
        await ticket(store, outside, APPROVAL)
        assert await run(store) == ["draft"]
        assert (await state(store))[0] == "waiting"
        assert (await rows(store))["check"].question == "Publish News?"
        assert [r.status for r in await store.runs("t")] == ["waiting"]
        assert (await store.queue()).waiting == 1
        await proved(store, outside)
    async with Store.open(url, planning_seconds=planning_seconds) as store:
        assert await claims(store) == []
        assert await store.answer("t", approved=True, by="ann", why="fine") == "check"
        assert (await state(store))[0] == "in_progress"
        assert await run(store) == ["publish"]
        assert await state(store) == ("done", {"by": "ann"})
        with pytest.raises(Conflict, match="is done; no step of it waits"):
            await store.answer("t", approved=True, by="ann")
        await proved(store, outside)
    states = [e.data["to"] for e in await _events(url) if e.data.get("of") == "ticket"]
    assert states == ["in_progress", "waiting", "in_progress", "done"]


async def _events(url: str) -> list[Any]:
    async with Store.open(url) as store:
        return list(await store.events("t"))


@both_ways
async def test_a_rejection_fails_the_step_and_says_who_and_why(store: Store, outside: Outside) -> None:
    await ticket(store, outside, APPROVAL)
    await run(store)
    await store.answer("t", approved=False, by="bob", why="not today", step="check")
    assert await run(store) == []
    assert await state(store) == ("failed", "rejected by bob: not today")
    assert (await statuses(store))["publish"] == "skipped"
    (said,) = [e for e in await store.events("t") if e.kind == "approval"]
    assert said.data == {"approved": False, "by": "bob", "why": "not today"}
    await proved(store, outside)


@both_ways
async def test_two_that_wait(store: Store, outside: Outside) -> None:
    await ticket(
        store,
        outside,
        """
steps:
  - {id: a, agent: echo, approval: "A?"}
  - {id: b, agent: echo, approval: {message: "B?", timeout_seconds: 60}}
  - {id: c, agent: echo}
""",
    )
    assert await run(store) == ["c"]
    assert (await state(store))[0] == "waiting"
    with pytest.raises(Conflict, match=r"several steps .* wait: a, b"):
        await store.answer("t", approved=True, by="ann")
    with pytest.raises(Conflict, match="'c' of the ticket 't' does not wait; these do: a, b"):
        await store.answer("t", approved=True, by="ann", step="c")
    with pytest.raises(NotFound):
        await store.answer("nowhere", approved=True, by="ann")
    await store.answer("t", approved=True, by="ann", step="a")
    with pytest.raises(Conflict, match="these do: b"):  # answered is answered, though nothing followed from it yet
        await store.answer("t", approved=False, by="bob", step="a")
    assert await run(store) == ["a"]
    assert (await state(store))[0] == "waiting"  # for b
    assert (await store.due()).next_ms is not None
    await store.shift_clock(61_000)
    assert await run(store) == []
    assert await state(store) == ("failed", "rejected by swarm: nobody answered in time")
    await proved(store, outside)


@both_ways
async def test_others_run_while_one_waits(store: Store, outside: Outside) -> None:
    await ticket(store, outside, "steps: [{id: a, agent: echo, approval: 'A?'}, {id: b, agent: echo}]")
    (b,) = await claims(store)
    assert (await state(store))[0] == "waiting"
    assert not (await store.renew([b.attempt_id], lease_seconds=LEASE)).lost
    await finish(store, b)
    await store.answer("t", approved=True, by="ann")
    assert await run(store) == ["a"]
    assert (await state(store))[0] == "done"


# --- runs within runs ---------------------------------------------------------------------------------------------

OUTER = """
steps:
  - id: both
    for_each: [1, 2]
    workflow:
      inputs: {n: integer}
      steps:
        - {id: one, agent: echo, inputs: {n: "${inputs.n}"}}
        - {id: two, agent: echo, needs: one, inputs: {n: "${steps.one.outputs.n * 10}"}}
      outputs: {n: "${steps.two.outputs.n}"}
    inputs: {n: "${item}"}
  - {id: last, agent: echo, needs: both, inputs: {all: "${steps.both.outputs}"}}
"""


@both_ways
async def test_runs_within_a_run(store: Store, outside: Outside) -> None:
    await ticket(store, outside, OUTER)
    started = await run(store)
    assert sorted(started[:2]) == ["both[0]/one", "both[1]/one"]
    assert await state(store) == ("done", {"all": [{"n": 10}, {"n": 20}]})
    runs = await store.runs("t")
    assert sorted(r.path for r in runs) == ["", "both[0]/", "both[1]/"]
    assert {r.status for r in runs} == {"completed"}
    assert next(r for r in runs if not r.path).total_vm_time_ms == 5.0
    await proved(store, outside)


@both_ways
async def test_a_failure_within(store: Store, outside: Outside) -> None:
    await ticket(store, outside, OUTER)
    await run(store, lambda claim: gives(two=BROKEN)(claim) if claim.step_id == "both[1]/two" else gives()(claim))
    found, why = await state(store)
    assert found == "failed" and "it broke" in why
    wanted = {"both": "failed", "both[0]": "completed", "both[1]": "failed", "both[1]/two": "failed", "last": "skipped"}
    assert wanted.items() <= (await statuses(store)).items()
    await proved(store, outside)


@pytest.mark.parametrize("how", ["command", "update", "delete", "ready"])
@both_ways
async def test_a_cancelled_ticket_takes_all_of_it_down(store: Store, outside: Outside, how: str) -> None:
    await ticket(store, outside, OUTER)
    one, other = await claims(store)
    await finish(store, one)
    (third,) = await claims(store, 1)
    if how == "command":
        await store.cancel("t", "ann")
    elif how == "delete":
        outside.execute("DELETE FROM tickets WHERE id = 't'")
    else:
        outside.execute("UPDATE tickets SET state = ? WHERE id = 't'", ("cancelled" if how == "update" else how,))
    told = await store.renew([other.attempt_id, third.attempt_id], lease_seconds=LEASE)
    assert told.cancelled | told.lost == {other.attempt_id, third.attempt_id}
    for claim in (other, third):
        with pytest.raises(LeaseLost):
            await finish(store, claim)
    started = await run(store)
    if how == "ready":  # once more, from the start
        assert len(started) == 5 and (await state(store))[0] == "done"
    else:
        assert started == []
    live = outside.execute("SELECT count(*) FROM step_executions WHERE status IN ('pending', 'ready', 'running')")
    assert live == [(0,)]
    assert outside.execute("SELECT count(*) FROM workflow_runs WHERE status IN ('running', 'waiting')") == [(0,)]
    await proved(store, outside)


async def test_a_run_that_only_waits_ends_with_its_ticket(store: Store, outside: Outside) -> None:
    """Nobody renews anything there: the next look at what others changed finds it."""
    await ticket(store, outside, APPROVAL)
    await run(store)
    outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id = 't'")
    assert await claims(store) == []
    assert (await statuses(store))["check"] == "cancelled"
    with pytest.raises(Conflict, match="is cancelled; no step"):
        await store.answer("t", approved=True, by="ann")


@both_ways
async def test_half_of_a_fan_out_is_cancelled(store: Store, outside: Outside) -> None:
    await ticket(
        store,
        outside,
        "steps: [{id: s, agent: echo, for_each: {items: [0, 1, 2, 3, 4, 5], max_parallel: 4, join: 3}}]",
    )
    found = sorted(await claims(store), key=lambda claim: claim.step_id)
    assert len(found) == 4
    for claim in found[:3]:
        await finish(store, claim)
        await claims(store, 0)
    await run(store)
    assert (await state(store))[0] == "done"
    counts = list((await statuses(store)).values())
    assert counts.count("completed") >= 4 and counts.count("cancelled") >= 1
    with pytest.raises(LeaseLost):
        await finish(store, found[3])
    await proved(store, outside)


@both_ways
async def test_a_timeout_of_a_workflow_within(store: Store, outside: Outside) -> None:
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
    await proved(store, outside)


# --- once more ----------------------------------------------------------------------------------------------------


@both_ways
async def test_retry_from_a_step_keeps_what_was_done(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN, inputs='{"word": "hi"}')
    assert await run(store, gives(second=BROKEN)) == ["first", "second"]
    outside.execute("UPDATE workflows SET steps = '{}'")  # it is the frozen one that goes on
    await store.retry("t", step="second")
    assert (await state(store))[0] == "in_progress"
    assert await run(store) == ["second", "third"]
    assert await state(store) == ("done", {"heard": "hi!"})
    assert [r.status for r in await store.runs("t")] == ["failed", "completed"]
    assert [s.status for s in await store.steps("t")] == [
        "completed", "failed", "skipped", "completed", "completed", "completed",
    ]  # fmt: skip
    await proved(store, outside)


@both_ways
async def test_retry_from_runs_again_what_was_cut_off(store: Store, outside: Outside) -> None:
    text = "steps: [{id: a, agent: echo}, {id: b, agent: echo}, {id: c, agent: echo, needs: [a, b]}]"
    await ticket(store, outside, text)
    a, b = sorted(await claims(store), key=lambda claim: claim.step_id)
    await finish(store, a)
    await store.cancel("t", "ann")
    await store.retry("t", step="c")
    assert await run(store) == ["b", "c"]
    assert (await state(store))[0] == "done"
    with pytest.raises(LeaseLost):
        await finish(store, b)
    await proved(store, outside)


async def test_retry_from_what_can_not_be(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    with pytest.raises(Conflict, match="is ready: it has not ended"):
        await store.retry("t", step="first")
    await run(store, gives(second=BROKEN))
    with pytest.raises(UsageError, match="no step 'fourth' of its own; use one of first, second, third"):
        await store.retry("t", step="fourth")
    assert (await state(store))[0] == "failed"  # nothing was changed
    insert(outside, "plain")
    await run(store, gives(main=BROKEN))
    with pytest.raises(Conflict, match="has no workflow run to continue; retry it without --from"):
        await store.retry("plain", step="main")
    await store.retry("t")
    assert await run(store) == ["first", "second", "third"]


@both_ways
async def test_retry_from_a_step_of_what_is_done(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN, inputs='{"word": "hi"}')
    await run(store)
    with pytest.raises(Conflict, match=r"is done; only failed or cancelled ones can be retried .*--from STEP"):
        await store.retry("t")
    await store.retry("t", step="third")
    assert await run(store) == ["third"]
    assert await state(store) == ("done", {"heard": "hi!"})
    await proved(store, outside)


ITEMS = """
steps:
  - {id: each, agent: echo, for_each: [0, 1, 2, 3, 4], max_parallel: 2, when: "${item != 1}", inputs: {n: "${item}"}}
  - {id: sum, agent: echo, needs: each, inputs: {all: "${steps.each.outputs}"}}
outputs: {all: "${steps.sum.outputs.all}"}
"""


@both_ways
@pytest.mark.parametrize("named", ["each[2]", "each[0]"])
async def test_retry_from_an_item_keeps_the_others(store: Store, outside: Outside, named: str) -> None:
    def third_fails(claim: Claim) -> Any:
        return gives(each=BROKEN)(claim) if claim.step_id == "each[2]" else gives()(claim)

    await ticket(store, outside, ITEMS)
    assert await run(store, third_fails, limit=2) == ["each[0]", "each[2]", "each[3]"]
    with pytest.raises(UsageError, match=r"no execution 'each\[7\]', only each\[0\] to each\[4\]"):
        await store.retry("t", step="each[7]")
    await store.retry("t", step=named)
    also = ["each[0]"] if named == "each[0]" else []
    assert sorted(await run(store)) == [*also, "each[2]", "each[4]", "sum"]
    assert await state(store) == ("done", {"all": [{"n": 0}, None, {"n": 2}, {"n": 3}, {"n": 4}]})
    await store.retry("t", step="each[3]")  # now that all have succeeded
    assert await run(store) == ["each[3]", "sum"]
    assert (await state(store))[0] == "done"
    await proved(store, outside)


@both_ways
async def test_retry_from_a_repetition(store: Store, outside: Outside) -> None:
    steps = """
steps:
  - id: again
    agent: echo
    repeat: {until: "${steps.again.outputs.n == 3}", max_times: 5}
    inputs: {n: "${previous == null ? 0 : previous.n + 1}"}
"""
    await ticket(store, outside, steps)
    assert await run(store) == [f"again[{i}]" for i in range(4)]
    await store.retry("t", step="again[2]")
    assert await run(store) == ["again[2]", "again[3]"]
    assert await state(store) == ("done", {"n": 3})
    await store.retry("t", step="again[0]")
    assert len(await run(store)) == 4
    with pytest.raises(UsageError, match="a nested workflow only runs again as a whole"):
        await store.retry("t", step="again[0]/x")
    await proved(store, outside)


async def test_frozen_workflows_go_with_their_last_run(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN, id="a")
    await ticket(store, outside, DIAMOND, id="b")
    await run(store)
    assert outside.execute("SELECT count(*) FROM definitions") == [(2,)]
    outside.execute("DELETE FROM tickets WHERE id = 'a'")
    await store.prune(3600)
    assert outside.execute("SELECT count(*) FROM definitions") == [(1,)]
    await ticket(store, outside, CHAIN, id="a2")  # prepared already, but no longer in the table
    assert len(await run(store)) == 3


RACE = """
steps:
  - {id: slow, agent: echo}
  - {id: quick, agent: echo}
  - {id: after, agent: echo, needs: [slow, quick], join: first_success}
"""


@pytest.mark.parametrize("planning_seconds", [OUTSIDE])
async def test_a_decision_that_came_too_late_is_made_again(store: Store, outside: Outside) -> None:
    """It wants to cancel what has ended meanwhile."""
    await ticket(store, outside, RACE)
    found = {claim.step_id: claim for claim in await claims(store)}
    await finish(store, found["quick"])
    run_id = (await store.ticket("t")).run_id or ""
    late = await store._read.call(store._workflows.decide, run_id)
    assert late is not None and late.decision is not None
    assert [type(one).__name__ for one in late.decision.actions] == ["Cancel", "Start"]
    await finish(store, found["slow"])
    assert await store._write.call_batch(store._workflows.apply, late) is True
    assert (await statuses(store))["after"] == "pending"  # nothing of it was done
    assert await run(store) == ["after"]
    assert await statuses(store) == {"slow": "completed", "quick": "completed", "after": "completed"}
    assert await store._write.call_batch(store._workflows.apply, late) is False  # and now it is of the past
    await proved(store, outside)


@both_ways
async def test_a_run_within_is_cancelled_when_nobody_needs_it(store: Store, outside: Outside) -> None:
    inner = "{steps: [{id: x, agent: echo}, {id: y, agent: echo, needs: x}]}"
    await ticket(store, outside, RACE.replace("id: slow, agent: echo", f"id: slow, workflow: {inner}"))
    found: dict[str, Claim] = {}
    while len(found) < 2:  # outside, the run within begins a moment later
        found |= {claim.step_id: claim for claim in await claims(store)}
    await finish(store, found["quick"])
    assert names(await claims(store)) == ["after"]
    assert (await store.renew([found["slow/x"].attempt_id], lease_seconds=LEASE)).cancelled
    wanted = {"slow": "cancelled", "slow/x": "cancelled", "slow/y": "cancelled"}
    assert wanted.items() <= (await statuses(store)).items()
    assert sorted((r.path, r.status) for r in await store.runs("t")) == [("", "running"), ("slow/", "cancelled")]
    await proved(store, outside)


async def test_what_is_nested_without_end_ends_its_own_run_only(store: Store, outside: Outside) -> None:
    """Python reads JSON as deep as it has frames left. What the worker could read, the writing thread could not: then
    the end of the step, and of all others in that transaction, was never written."""
    deep = '{"v":' + "[" * 945 + "]" * 945 + "}"
    steps = """
steps:
  - {id: a, agent: echo}
  - {id: b, agent: echo, needs: a, inputs: {v: "${steps.a.outputs.v}"}}
"""
    await ticket(store, outside, steps)
    insert(outside, "other")
    found: list[Claim] = []
    while len(found) < 2:  # the workflow is read outside the first time
        found += await claims(store)
    assert {one.step_id for one in found} == {"a", "main"}
    outputs = {"a": deep, "main": "{}"}
    ends = [(one.attempt_id, Succeeded(outputs=outputs[one.step_id])) for one in found]
    await asyncio.gather(*(store.finish(id_, end, timings={}, vm_time_ms=1.0) for id_, end in ends))
    assert (await store.ticket("other")).state == "done"
    ended = await store.ticket("t")
    assert ended.state == "failed" and "nested too deeply" in str(ended.error)


async def test_a_repetition_that_wraps_its_outputs_is_bounded(store: Store, outside: Outside) -> None:
    inner = "{x: " * 20 + '"${previous}"' + "}" * 20
    steps = f"""
steps:
  - id: a
    agent: echo
    repeat: {{until: "${{false}}", max_times: 100}}
    inputs: {{v: {inner}}}
"""
    await ticket(store, outside, steps)
    started = await run(store)
    assert 10 < len(started) < 15
    assert "nested too deeply: more than 256 levels" in str((await store.ticket("t")).error)


@both_ways
async def test_a_run_within_that_loses_its_race_as_it_begins(store: Store, outside: Outside) -> None:
    """One decision starts it, and ends it: `b` may go, and so may what needs only one of `a` and `b`."""
    await ticket(
        store,
        outside,
        """
steps:
  - {id: a, agent: echo}
  - id: b
    needs: a
    workflow: {steps: [{id: x, agent: echo}, {id: y, agent: echo, needs: x}]}
  - {id: c, agent: echo, needs: [a, b], join: first_success}
""",
    )
    assert await run(store) == ["a", "c"]
    assert await statuses(store) == {"a": "completed", "b": "cancelled", "c": "completed"}
    assert sorted(one.status for one in await store.runs("t")) == ["cancelled", "completed"]
    assert left_overs(outside) == 0
    await proved(store, outside)
