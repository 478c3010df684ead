"""`retry --from`: what runs again, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.errors import Conflict, LeaseLost, UsageError
from swarm.model import Claim
from swarm.store.store import Store
from tests.store.databases import Outside, insert
from tests.store.flows import claims, finish, gives, run, state, ticket
from tests.store.runs.workflows import BROKEN, CHAIN, both_ways


@both_ways
async def test_retry_from_a_step_keeps_what_was_done(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN, inputs='{"word": "hi"}')
    assert await run(store, gives(second=BROKEN)) == ["first", "second"]
    outside.execute("UPDATE workflows SET steps = '{}'")  # the frozen one is run
    await store.retry("t", step="second")
    assert (await state(store))[0] == "in_progress"
    assert await run(store) == ["second", "third"]
    assert await state(store) == ("done", {"heard": "hi!"})
    assert [r.status for r in await store.runs("t")] == ["failed", "completed"]
    assert [s.status for s in await store.steps("t")] == [
        "completed", "failed", "skipped", "completed", "completed", "completed",
    ]  # fmt: skip


@both_ways
async def test_retry_from_runs_cancelled_steps_again(store: Store, outside: Outside) -> None:
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


async def test_retry_from_an_impossible_step(store: Store, outside: Outside) -> None:
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
async def test_retry_from_a_step_of_a_done_ticket(store: Store, outside: Outside) -> None:
    await ticket(store, outside, CHAIN, inputs='{"word": "hi"}')
    await run(store)
    with pytest.raises(Conflict, match=r"is done; only failed or cancelled ones can be retried .*--from STEP"):
        await store.retry("t")
    await store.retry("t", step="third")
    assert await run(store) == ["third"]
    assert await state(store) == ("done", {"heard": "hi!"})


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
