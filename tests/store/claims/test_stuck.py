"""Rows that another program deleted or changed: nothing is stuck for ever, known to `swarm prove` alone."""

from __future__ import annotations

import contextlib

import pytest

from swarm.admin.prove import judge
from swarm.errors import LeaseLost
from swarm.model import StepStatus, Succeeded, TicketState
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside, claimed, insert
from tests.store.flows import register

pytestmark = pytest.mark.slow  # tries very many cases

PLAIN = ""
CHAIN = "steps: [{id: one, agent: echo}, {id: two, agent: echo, needs: one}]"
NESTED = "steps: [{id: outer, workflow: {steps: [{id: one, agent: echo}]}}]"
EACH = """
steps: [{id: all, agent: echo, for_each: "${[1, 2, 3]}", max_parallel: 2}, {id: after, agent: echo, needs: all}]
"""
EACH_NESTED = (
    """steps: [{id: all, for_each: "${[1, 2]}", max_parallel: 1, workflow: {steps: [{id: one, agent: echo}]}}]"""
)
SUCCEEDED = "UPDATE attempts SET outcome = 'succeeded', ended_at = '2026-01-01T00:00:00.000Z'"
CHANGES = {
    "attempts": "DELETE FROM attempts",
    "steps": "DELETE FROM step_executions",
    "steps and attempts": "DELETE FROM attempts; DELETE FROM step_executions",
    "children": "DELETE FROM step_executions WHERE step_id LIKE '%[%'",
    "children and attempts": "DELETE FROM attempts; DELETE FROM step_executions WHERE step_id LIKE '%[%'",
    "one child": "DELETE FROM step_executions WHERE step_id = 'all[0]'",
    "children's status": "UPDATE step_executions SET status = 'completed' WHERE step_id LIKE '%[%'",
    "nested runs": "DELETE FROM workflow_runs WHERE parent_step_id IS NOT NULL",
    "nested runs' status": "UPDATE workflow_runs SET status = 'completed' WHERE parent_step_id IS NOT NULL",
    "runs": "DELETE FROM workflow_runs",
    "runs' ids": "UPDATE workflow_runs SET id = 'x' WHERE id = (SELECT max(id) FROM workflow_runs)",
    "root": "UPDATE workflow_runs SET root_run_id = 'x'",
    "parents": "UPDATE workflow_runs SET parent_step_id = 'x'",
    "own parent": "UPDATE workflow_runs SET parent_step_id = (SELECT max(id) FROM step_executions)",
    "progress": "UPDATE workflow_runs SET progress = NULL",
    "fan_out": "UPDATE step_executions SET fan_out = NULL",
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
@pytest.mark.parametrize(
    "text", [PLAIN, CHAIN, NESTED, EACH, EACH_NESTED], ids=["plain", "chain", "nested", "each", "each nested"]
)
async def test_nothing_is_stuck(store: Store, outside: Outside, text: str, sql: str) -> None:
    columns = {}
    if text:
        columns = {"agent_id": None, "execution_mode": "workflow", "workflow_id": await register(store, text)}
    insert(outside, "t", **columns)
    while not (claims := await claimed(store)):
        await store.decided()
    (claim,) = claims
    if sql == CHANGES["runs' ids"] and outside.refuses(sql):
        return
    for statement in sql.split(";") if sql != CHANGES["runs' ids"] else ():
        outside.execute(statement)
    for _ in range(6):  # its worker renews what it has, and others claim, but nothing of it ends
        await store.renew([claim.attempt_id], lease_seconds=LEASE)
        await store.claim("worker", lease_seconds=LEASE, ticket_id="t")  # does the upkeep, however busy the machine is
        await store.shift_clock(round(LEASE * 1000) + 1)
    left = [claim]
    for _ in range(12):  # now all work ends as it is claimed
        for one in left:
            with contextlib.suppress(LeaseLost):
                await store.finish(one.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
        left = await store.claim("worker", limit=4, lease_seconds=LEASE, ticket_id="t")
        await store.decided()
        await store.shift_clock(round(LEASE * 1000) + 1)
        if not left and (await store.ticket("t")).state in ENDED:
            break
    await store.claim("worker", lease_seconds=LEASE, ticket_id="t")
    ticket = await store.ticket("t")
    report = await store.audit(lambda facts: judge(facts, engine_alive=True))
    assert report.kept, report.violations
    assert not (await store.due()).ready and (await store.due()).next_ms is None
    assert ticket.state in ENDED and (ticket.error or ticket.state == TicketState.DONE)
