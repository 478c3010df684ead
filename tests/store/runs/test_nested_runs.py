"""Nested runs, and how they end with the outer one."""

from __future__ import annotations

import pytest

from swarm.errors import LeaseLost
from swarm.model import Claim
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside
from tests.store.flows import claims, finish, names, run, state, statuses, ticket
from tests.store.runs.workflows import NESTED, RACE, both_ways


@both_ways
async def test_nested_runs(store: Store, outside: Outside) -> None:
    await ticket(store, outside, NESTED)
    started = await run(store)
    assert sorted(started[:2]) == ["both[0]/one", "both[1]/one"]
    assert await state(store) == ("done", {"all": [{"n": 10}, {"n": 20}]})
    runs = await store.runs("t")
    assert sorted(r.path for r in runs) == ["", "both[0]/", "both[1]/"]
    assert {r.status for r in runs} == {"completed"}
    assert next(r for r in runs if not r.path).total_vm_time_ms == 5.0


@pytest.mark.parametrize("how", ["command", "update", "delete", "ready"])
@both_ways
async def test_a_cancelled_ticket_ends_all_its_runs(store: Store, outside: Outside, how: str) -> None:
    await ticket(store, outside, NESTED)
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


@both_ways
async def test_a_nested_run_is_cancelled_when_nobody_needs_it(store: Store, outside: Outside) -> None:
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
