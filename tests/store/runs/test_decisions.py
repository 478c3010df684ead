"""Where decisions are made, when they are repeated, and the frozen workflows and values behind them."""

from __future__ import annotations

import asyncio
import json

import pytest

from swarm.model import Claim, Succeeded
from swarm.store.runs.limits import ON_THREAD
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside, insert
from tests.store.flows import claims, finish, gives, run, state, statuses, ticket
from tests.store.runs.workflows import CHAIN, DIAMOND, OUTSIDE, RACE, both_ways, proved


@both_ways
async def test_a_run_keeps_its_frozen_workflow(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN)
    (first,) = await claims(store)
    outside.execute("UPDATE workflows SET steps = '{}', enabled = false")
    outside.execute("UPDATE tickets SET workflow_id = 'another', inputs = '{}' WHERE id = 't'")
    await finish(store, first)
    assert await run(store) == ["second", "third"]
    assert await state(store) == ("done", {"heard": "hello!"})


async def test_expensive_expressions_are_evaluated_outside(store: Store, outside: Outside) -> None:
    """A loop over a step's outputs runs in the jail, not while the write lock is held."""
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


async def test_a_first_decision_that_is_undone_leaves_nothing(store: Store, outside: Outside) -> None:
    """The next one is made of the inputs that are there then."""
    await ticket(store, outside, CHAIN)
    run_id = (await claims(store))[0].ticket.run_id or ""
    outside.execute("UPDATE workflow_runs SET progress = NULL, context = NULL, definition = NULL, unprocessed = '[]'")
    outside.execute("""UPDATE tickets SET inputs = '{"word": "other"}' WHERE id = 't'""")
    decided, _ = await store._read.call(store._workflows.decide, run_id, ON_THREAD)
    assert decided is not None and decided.context is not None
    assert json.loads(decided.context)["inputs"] == {"word": "other"}


@pytest.mark.parametrize("planning_seconds", [OUTSIDE])
async def test_a_decision_that_came_too_late_is_made_again(store: Store, outside: Outside) -> None:
    """It would cancel a step that has ended meanwhile."""
    await ticket(store, outside, RACE)
    found = {claim.step_id: claim for claim in await claims(store)}
    await finish(store, found["quick"])
    run_id = (await store.ticket("t")).run_id or ""
    late, _ = await store._read.call(store._workflows.decide, run_id, ON_THREAD)
    assert late is not None and late.decision is not None
    assert [type(one).__name__ for one in late.decision.actions] == ["Cancel", "Start"]
    await finish(store, found["slow"])
    assert await store._write.call_batch(store._workflows.apply, late) is True
    assert (await statuses(store))["after"] == "pending"  # nothing of it was done
    assert await run(store) == ["after"]
    assert await statuses(store) == {"slow": "completed", "quick": "completed", "after": "completed"}
    assert await store._write.call_batch(store._workflows.apply, late) is False  # and now it is of the past


async def test_deeply_nested_outputs_end_only_their_own_run(store: Store, outside: Outside) -> None:
    """How deep Python reads JSON depends on the frames left. What the worker could read, the writing thread could not:
    then the end of the step, and of all others in that transaction, was never written."""
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
