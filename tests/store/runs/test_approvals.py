"""Approvals: steps that wait for a person's answer."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.errors import Conflict, NotFound
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside
from tests.store.flows import claims, finish, rows, run, state, statuses, ticket
from tests.store.runs.workflows import APPROVAL, both_ways, proved


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


@both_ways
async def test_two_steps_that_wait(store: Store, outside: Outside) -> None:
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


async def test_a_run_that_only_waits_ends_with_its_ticket(store: Store, outside: Outside) -> None:
    """No attempt renews a lease there, so maintenance finds the change."""
    await ticket(store, outside, APPROVAL)
    await run(store)
    outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id = 't'")
    assert await claims(store) == []
    assert (await statuses(store))["check"] == "cancelled"
    with pytest.raises(Conflict, match="is cancelled; no step"):
        await store.answer("t", approved=True, by="ann")
