"""Workflows in the database: the rows say what the planner decided, whatever happens between."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from swarm.errors import Conflict, LeaseLost
from swarm.model import Claim, Failed, FailureReason, Outcome, Ticket
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside, insert
from tests.store.flows import claims, finish, gives, names, register, rows, run, state, statuses, ticket, well
from tests.store.runs.workflows import BROKEN, CHAIN, DIAMOND, NESTED, both_ways


@dataclass(frozen=True, kw_only=True)
class Case:
    """A workflow, run until nothing is left to do, and what the rows say then."""

    text: str
    state: str
    outputs: Any = ...  # of the ticket; ...: any
    error: str = ""  # of the ticket and its run: a pattern
    error_step: str | None = ""  # of its run; "": any
    started: list[str] | None = None  # in this order
    broken: tuple[str, ...] = ()  # these fail
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the ticket
    statuses: Mapping[str, str] = field(default_factory=dict)  # of all steps
    errors: Mapping[str, str] = field(default_factory=dict)  # of some steps
    inputs: Mapping[str, Any] = field(default_factory=dict)  # of some steps
    runs: Mapping[str, str] = field(default_factory=dict)  # statuses by path


def joined(join: str, broken: str, state: str, after: str) -> Case:
    ended = {name: "failed" if name in broken else "completed" for name in "abc"}
    text = f"""
steps:
  - {{id: a, agent: echo}}
  - {{id: b, agent: echo}}
  - {{id: c, agent: echo}}
  - {{id: after, agent: echo, needs: [a, b, c], join: {join}}}
"""
    return Case(text=text, broken=tuple(broken), state=state, statuses={**ended, "after": after})


HANDLERS = """
steps: [{id: work, agent: echo}]
on_error: [{id: alarm, agent: echo, inputs: {what: "${error.step}: ${error.message}"}}]
on_success: [{id: cheer, agent: echo}]
"""
CASES = {
    "join all, one fails": joined("all", "a", "failed", "skipped"),
    "join any, one succeeds": joined("any", "ab", "done", "completed"),
    "join any, all fail": joined("any", "abc", "failed", "failed"),
    "join 2, one fails": joined("2", "a", "done", "completed"),
    "join 2, two fail": joined("2", "ab", "failed", "failed"),
    "skipped, with the reason": Case(
        text="""
inputs: {deploy: {type: boolean, default: false}}
steps:
  - {id: build, agent: echo}
  - {id: deploy, agent: echo, needs: build, when: "${inputs.deploy}"}
  - {id: tell, agent: echo, needs: deploy}
""",
        state="done",
        started=["build"],
        errors={"deploy": "its `when` is false: ${inputs.deploy}", "tell": "it needs 'deploy', which was skipped"},
    ),
    "on_error": Case(
        text=HANDLERS,
        broken=("work",),
        state="failed",
        started=["work", "alarm"],
        inputs={"alarm": {"what": "work: it broke"}},
        error="^it broke$",
        error_step="work",
    ),
    "on_success": Case(text=HANDLERS, state="done", started=["work", "cheer"]),
    "continue_on_error": Case(
        text="""
steps:
  - {id: optional, agent: echo, continue_on_error: true}
  - {id: after, agent: echo, needs: optional, inputs: {why: "${steps.optional.error}"}}
""",
        broken=("optional",),
        state="done",
        started=["optional", "after"],
        outputs={"why": "it broke"},
    ),
    "inputs that don't fit": Case(
        text=CHAIN,
        columns={"inputs": '{"word": 7}'},
        state="failed",
        started=[],
        error=r"^the inputs don't fit the workflow: \$\.word: ",
        error_step=None,
        runs={"": "failed"},
    ),
    "a nested run fails": Case(
        text=NESTED,
        broken=("both[1]/two",),
        state="failed",
        error="it broke",
        statuses={
            "both": "failed", "both[0]": "completed", "both[0]/one": "completed", "both[0]/two": "completed",
            "both[1]": "failed", "both[1]/one": "completed", "both[1]/two": "failed", "last": "skipped",
        },
    ),
    # One decision starts the run of `b`, and ends it: `b` may go, and so may `c`, which needs only one of `a` and `b`.
    "a nested run that loses its race as it begins": Case(
        text="""
steps:
  - {id: a, agent: echo}
  - id: b
    needs: a
    workflow: {steps: [{id: x, agent: echo}, {id: y, agent: echo, needs: x}]}
  - {id: c, agent: echo, needs: [a, b], join: first_success}
""",
        state="done",
        started=["a", "c"],
        statuses={"a": "completed", "b": "cancelled", "c": "completed"},
        runs={"": "completed", "b/": "cancelled"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@both_ways
async def test_a_run_to_its_end(store: Store, outside: Outside, case: Case) -> None:
    def behave(claim: Claim) -> Outcome:
        failed = Failed(reason=FailureReason.AGENT_FAILED, message=str(BROKEN))
        return failed if claim.step_id in case.broken else well(claim)

    await ticket(store, outside, case.text, **case.columns)
    started = await run(store, behave)
    assert case.started in (None, started)
    ended, result = await state(store)
    assert ended == case.state
    runs = {one.path: one for one in await store.runs("t")}
    if ended == "failed":
        assert re.search(case.error, result)
        assert runs[""].error == result
        assert case.error_step in ("", runs[""].error_step)
    else:
        assert case.outputs in (..., result)
    found = await rows(store)
    assert case.statuses in ({}, {name: step.status for name, step in found.items()})
    assert {name: found[name].error for name in case.errors} == case.errors
    assert {name: json.loads(found[name].inputs or "") for name in case.inputs} == case.inputs
    assert case.runs in ({}, {path: one.status for path, one in runs.items()})


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


@both_ways
async def test_no_end_of_a_batch_is_lost(store: Store, outside: Outside) -> None:
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


@both_ways
async def test_a_fan_out_of_fifty_runs_at_most_ten_at_once(store: Store, outside: Outside) -> None:
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


async def test_a_chain_of_500(store: Store, outside: Outside) -> None:
    steps = ["  - {id: s0, agent: echo, inputs: {n: 0}}"]
    steps += [
        f"  - {{id: s{n}, agent: echo, needs: s{n - 1}, inputs: {{n: '${{steps.s{n - 1}.outputs.n}}'}}}}"
        for n in range(1, 500)
    ]
    await ticket(store, outside, "steps:\n" + "\n".join(steps))
    assert await run(store) == [f"s{n}" for n in range(500)]
    assert await state(store) == ("done", {"n": 0})


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


async def test_an_unknown_or_disabled_workflow(store: Store, outside: Outside) -> None:
    id_ = await register(store, CHAIN)
    insert(outside, "unknown", agent_id=None, execution_mode="workflow", workflow_id="nowhere")
    insert(outside, "misspelt", agent_id=None, execution_mode="workflow", workflow_id="flwo")
    assert await claims(store) == []
    assert "no workflow has the id or name 'nowhere'" in (await state(store, "unknown"))[1]
    assert (await state(store, "misspelt"))[1] == "no workflow has the id or name 'flwo'; did you mean 'flow'?"
    await store.enable_workflow("flow", enabled=False, by="test")
    insert(outside, "t", agent_id=None, execution_mode="workflow", workflow_id=id_)
    assert await claims(store) == []
    assert await state(store) == (
        "failed",
        "the workflow flow@1.0.0 is disabled; `swarm workflow enable flow@1.0.0` enables it",
    )
    await store.enable_workflow("flow", enabled=True, by="test")
    await store.retry("t")
    assert await run(store) == ["first", "second", "third"]


async def test_a_trigger_is_passed_to_the_run(store: Store, outside: Outside) -> None:
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
