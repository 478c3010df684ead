"""A step that goes over budget waits for a person, if its ticket, agent or settings say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import Conflict, UsageError
from swarm.ledger import Limit
from swarm.model import BudgetPolicy, Claim, Failed, FailureReason, Outcome
from swarm.store.store import Store
from tests.store.databases import RETRY, Outside, insert
from tests.store.flows import claims, finish, rows, run, state, statuses, ticket, well
from tests.store.runs.workflows import proved

SUMS = "over budget: the ticket's budget is $1, $0.99 of it is spent"


def broke(claim: Claim) -> Outcome:
    return Failed(reason=FailureReason.OVER_BUDGET, message=f"{SUMS}\nThe last that it printed:\n  hm")


async def broken_once(store: Store) -> Claim:
    [claim] = await claims(store)
    await finish(store, claim, broke)
    return claim


async def transitions(store: Store, of: str) -> list[Any]:
    return [e.data["to"] for e in await store.events("t") if e.data.get("of") == of]


async def test_a_plain_ticket_waits_over_a_restart_and_goes_on(url: str, outside: Outside) -> None:
    insert(outside, "t", over_budget="wait", budget_usd=1.0, budget_tokens=10)
    async with Store.open(url) as store:
        await broken_once(store)
        found = await store.ticket("t")
        assert (found.state, (found.error or "").startswith(SUMS)) == ("waiting", True)
        [step] = await store.steps("t")
        assert (step.status, step.question) == ("waiting", f"{SUMS}. Raise that budget and approve, or reject")
        [attempt] = await store.attempts("t")
        assert (attempt.outcome, attempt.reason) == ("failed", "over_budget")
        assert [r.status for r in await store.runs("t")] == ["waiting"]
        assert (await store.queue()).waiting == 1
        await proved(store, outside)
    async with Store.open(url) as store:
        assert await claims(store) == []
        for budget, why in (
            (Limit(usd=1.0), r"budget_usd of 1.0 would allow no more: .* already has 1.0"),
            (Limit(usd=2.0, tokens=9), r"budget_tokens of 9 would"),
            (Limit(usd=float("nan")), "must be a number from 0"),
        ):
            with pytest.raises(UsageError, match=why):
                await store.answer("t", approved=True, by="ann", budget=budget)
        with pytest.raises(Conflict, match="it has not ended"):
            await store.retry("t")
        assert (await store.ticket("t")).budget_usd == 1.0
        assert await store.answer("t", approved=True, by="ann", why="go", budget=Limit(usd=3.0)) == "main"
        found = await store.ticket("t")
        assert (found.state, found.error, found.budget_usd, found.budget_tokens) == ("in_progress", None, 3.0, 10)
        with pytest.raises(Conflict, match="is in_progress; no step of it waits"):
            await store.answer("t", approved=True, by="ann")
        [claim] = await claims(store)
        assert (claim.attempt_number, claim.ticket.budget_usd) == (2, 3.0)
        assert [s.retry_count for s in await store.steps("t")] == [0]
        await finish(store, claim)
        assert (await state(store))[0] == "done"
        assert await transitions(store, "ticket") == ["in_progress", "waiting", "in_progress", "done"]
        assert await transitions(store, "step") == ["running", "waiting", "ready", "running", "completed"]
        (said,) = [e.data for e in await store.events("t") if e.kind == "approval"]
        assert said == {"approved": True, "by": "ann", "why": "go", "budget_usd": 3.0}
        await proved(store, outside)


async def test_approved_with_too_little_it_waits_again_and_rejected_it_fails(store: Store, outside: Outside) -> None:
    insert(outside, "t", over_budget="wait")
    await broken_once(store)
    with pytest.raises(UsageError, match="has no such budget"):
        await store.answer("t", approved=True, by="ann", budget=Limit(tokens=5))
    await store.answer("t", approved=True, by="ann")
    await broken_once(store)
    assert (await state(store))[0] == "waiting"
    await store.answer("t", approved=False, by="bob", why="too dear")
    ended, error = await state(store)
    assert (ended, error.split("\n")[:2]) == ("failed", ["rejected by bob: too dear", SUMS])
    assert [r.status for r in await store.runs("t")] == ["failed"]
    assert await claims(store) == []
    await proved(store, outside)
    await store.retry("t")
    assert await run(store) == ["main"]
    assert (await state(store))[0] == "done"


@pytest.mark.parametrize("how", ["cancel", "update", "delete", "again"])
async def test_a_waiting_ticket_that_is_taken_away(store: Store, outside: Outside, how: str) -> None:
    insert(outside, "t", over_budget="wait")
    await broken_once(store)
    match how:
        case "cancel":
            await store.cancel("t", by="ann")
        case "update":
            outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id = 't'")
            with pytest.raises(Conflict, match="is cancelled; no step of it waits"):
                await store.answer("t", approved=True, by="ann")
        case "delete":
            outside.execute("DELETE FROM tickets WHERE id = 't'")
        case "again":
            outside.execute("UPDATE tickets SET state = 'ready' WHERE id = 't'")
    assert await run(store) == (["main"] if how == "again" else [])
    live = "SELECT count(*) FROM step_executions WHERE status IN ('waiting', 'ready', 'running')"
    assert outside.execute(live) == [(0,)]
    live = "SELECT count(*) FROM workflow_runs WHERE status IN ('waiting', 'running')"
    assert outside.execute(live) == [(0,)]
    await proved(store, outside)


@pytest.mark.parametrize(
    ("of_ticket", "of_agent", "of_settings", "ends"),
    [
        (None, None, "fail", "failed"),
        (None, None, "wait", "waiting"),
        (None, "fail", "wait", "failed"),
        ("wait", "fail", "fail", "waiting"),
        ("fail", "wait", "wait", "failed"),
        ("perhaps", "wait", "fail", "waiting"),  # written while it ran
    ],
)
async def test_whose_policy_counts(
    url: str, outside: Outside, of_ticket: str | None, of_agent: str | None, of_settings: str, ends: str
) -> None:
    async with Store.open(url, over_budget=BudgetPolicy(of_settings)) as store:
        agent = await store.put_agent(replace(RETRY, id="x", name="x", over_budget=of_agent))
        insert(outside, "t", agent_id=agent.id)
        [claim] = await claims(store)
        outside.execute("UPDATE tickets SET over_budget = ? WHERE id = 't'", (of_ticket,))
        await finish(store, claim, broke)
        assert (await state(store))[0] == ends


async def test_an_unknown_policy(store: Store, outside: Outside) -> None:
    insert(outside, "t", over_budget="perhaps")
    assert await claims(store) == []
    assert await state(store) == ("failed", "over_budget 'perhaps' is unknown; use 'fail' or 'wait', or NULL")


FLOW = """
steps:
  - {id: dear, agent: echo, for_each: "${[1, 2]}", inputs: {n: "${item}"}, approval: "Spend?"}
  - {id: other, agent: echo}
  - {id: last, agent: echo, needs: dear}
"""


@pytest.mark.parametrize("approved", [True, False])
async def test_a_step_of_a_workflow(store: Store, outside: Outside, approved: bool) -> None:
    """Other steps run meanwhile; an approval before the step is another question; one batch may make two wait."""
    await ticket(store, outside, FLOW, over_budget="wait", budget_usd=1.0)
    assert await run(store) == ["other"]
    with pytest.raises(Conflict, match="waits for an answer, not for a budget: 'Spend\\?'"):
        await store.answer("t", approved=True, by="ann", budget=Limit(usd=3.0))
    await store.answer("t", approved=True, by="ann")
    first, second = await claims(store)
    for claim in (first, second):
        await finish(store, claim, broke)
    assert await statuses(store) == {
        "dear": "running", "dear[0]": "waiting", "dear[1]": "waiting", "other": "completed", "last": "pending",
    }  # fmt: skip
    await proved(store, outside)
    await store.answer("t", approved=True, by="ann", step="dear[0]", budget=Limit(usd=2.0))
    assert (await state(store))[0] == "waiting"
    assert await run(store, well) == ["dear[0]"]
    await store.answer("t", approved=approved, by="ann", why="so be it", step="dear[1]")
    assert await run(store, well) == (["dear[1]", "last"] if approved else [])
    assert (await state(store))[0] == ("done" if approved else "failed")
    if not approved:
        assert "rejected by ann: so be it" in ((await rows(store))["dear[1]"].error or "")
    await proved(store, outside)


async def test_a_step_that_was_approved_before_waits_for_another_answer(store: Store, outside: Outside) -> None:
    text = "steps: [{id: a, agent: echo, approval: 'A?'}, {id: b, agent: echo, approval: 'B?'}]"
    await ticket(store, outside, text, over_budget="wait")
    assert await run(store) == []
    await store.answer("t", approved=True, by="ann", step="a")
    await broken_once(store)
    with pytest.raises(Conflict, match=r"several steps .* wait: a, b"):
        await store.answer("t", approved=True, by="ann")
    await store.answer("t", approved=True, by="ann", step="a")
    await store.answer("t", approved=True, by="ann", step="b")
    assert sorted(await run(store)) == ["a", "b"]
    assert await transitions(store, "ticket") == ["in_progress", "waiting", "in_progress", "done"]
    await proved(store, outside)
