"""Rows that another program deleted or changed: nothing is stuck for ever, known to `swarm prove` alone."""

from __future__ import annotations

import pytest

from swarm.admin.prove import judge
from swarm.model import StepStatus, TicketState
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside, claimed, insert
from tests.store.flows import register

pytestmark = pytest.mark.slow  # tries very many cases

PLAIN = ""
CHAIN = "steps: [{id: one, agent: echo}, {id: two, agent: echo, needs: one}]"
NESTED = "steps: [{id: outer, workflow: {steps: [{id: one, agent: echo}]}}]"
SUCCEEDED = "UPDATE attempts SET outcome = 'succeeded', ended_at = '2026-01-01T00:00:00.000Z'"
CHANGES = {
    "attempts": "DELETE FROM attempts",
    "steps": "DELETE FROM step_executions",
    "steps and attempts": "DELETE FROM attempts; DELETE FROM step_executions",
    "outcome": "UPDATE attempts SET outcome = 'failed'",
    "succeeded": SUCCEEDED,
    "succeeded, ready": f"{SUCCEEDED};"
    "UPDATE step_executions SET status = 'ready', attempt_id = NULL WHERE attempt_id > ''",
    "owner": "UPDATE step_executions SET attempt_id = 'nobody' WHERE attempt_id IS NOT NULL",
    **{
        f"{s} in {where or 'all'}": f"UPDATE step_executions SET status = '{s}' {where}"
        for s in (*StepStatus, "bogus")
        for where in ("", "WHERE attempt_id IS NOT NULL")
    },
}
ENDED = (TicketState.DONE, TicketState.FAILED, TicketState.CANCELLED)


@pytest.mark.parametrize("sql", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("text", [PLAIN, CHAIN, NESTED], ids=["plain", "chain", "nested"])
async def test_nothing_is_stuck(store: Store, outside: Outside, text: str, sql: str) -> None:
    columns = {}
    if text:
        columns = {"agent_id": None, "execution_mode": "workflow", "workflow_id": await register(store, text)}
    insert(outside, "t", **columns)
    while not (claims := await claimed(store)):
        await store.decided()
    (claim,) = claims
    for one in sql.split(";"):
        outside.execute(one)
    for _ in range(6):  # its worker renews what it has; others claim
        await store.renew([claim.attempt_id], lease_seconds=LEASE)
        await store.claim("worker", lease_seconds=LEASE, ticket_id="t")  # does the upkeep, however busy the machine is
        await store.shift_clock(round(LEASE * 1000) + 1)
    await store.claim("worker", lease_seconds=LEASE, ticket_id="t")
    ticket = await store.ticket("t")
    report = await store.audit(lambda facts: judge(facts, engine_alive=True))
    assert report.kept, report.violations
    if "'running'" in sql and not (text == CHAIN and sql.endswith("'running' ")):
        assert ticket.state == TicketState.IN_PROGRESS  # that is what it was: its worker goes on
    else:
        assert ticket.state in ENDED and ticket.error
