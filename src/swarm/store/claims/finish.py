"""What an attempt may write, and what happens when it doesn't: finish, renew, running, and the sweep of dead leases.

Every write names its attempt and passes the fence (`changes.owns`) in the transaction that changes anything.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from swarm.errors import LeaseLost, StoreError, SwarmError
from swarm.model import (
    Agent,
    AttemptOutcome,
    BudgetPolicy,
    Cancelled,
    Event,
    Failed,
    FailureReason,
    Interrupted,
    Outcome,
    RetryPolicy,
    StepStatus,
    Succeeded,
)
from swarm.store.registry.agents import Agents
from swarm.store.runs import artifacts
from swarm.store.runs.artifacts import Packed
from swarm.store.runs.workflow_engine import WorkflowEngine, refresh_waiting
from swarm.store.sql.database import Row, Tx
from swarm.store.sql.rows import Renewal, storable_json
from swarm.store.tickets import dependencies
from swarm.store.tickets.changes import FENCE_BY_ID, FENCE_EXPIRED, Changes, owns

# A lost lease says nothing about the agent, only that its worker died or lost touch. So even a step that may be tried
# once is given out again, but not for ever: it may be what kills the workers.
LOST_TRIES: Final = 3
_SWEPT_AT_ONCE: Final = 500

_EXTEND: Final = sa.text("UPDATE attempts SET lease_until = :lease_until WHERE id = :id")
_SET_VM: Final = sa.text("UPDATE attempts SET vm_id = :vm_id WHERE id = :id")
_SET_STEP_VM: Final = sa.text("UPDATE step_executions SET vm_id = :vm_id WHERE id = :id")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRequest:
    attempt_id: str
    outcome: Outcome
    timings: Mapping[str, float]
    vm_time_ms: float
    vm_id: int | None = None
    events: Sequence[Event] = ()
    packed: Packed | None = None  # the outputs, as the row of a workflow's step has them


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewRequest:
    attempt_ids: Sequence[str]
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    attempt_id: str
    vm_id: int


def _lost(attempt_id: str, row: Row | None) -> LeaseLost:
    if row is None or row.ticket is None:
        why = "its ticket was deleted"
    elif row.outcome is not None:
        why = f"it has ended as {row.outcome}"
    elif row.state not in ("in_progress", "waiting"):
        why = f"its ticket {row.ticket} is {row.state}"
    else:
        why = "another attempt has its step"
    return LeaseLost(f"the attempt {attempt_id} may not write any more: {why}; nothing was changed")


class Finisher:
    """The writing thread's finish. Holds the parsed agents, whose retry policies it follows.

    ``over_budget``: where neither the ticket nor its agent says.
    """

    def __init__(self, workflows: WorkflowEngine, over_budget: BudgetPolicy) -> None:
        self._agents = Agents()
        self._workflows = workflows
        self._over_budget = over_budget

    def finish(self, tx: Tx, requests: Sequence[FinishRequest]) -> Sequence[SwarmError | None]:
        rows = {row.id: row for row in tx.all_in(FENCE_BY_ID, {r.attempt_id for r in requests})}
        failed = {
            rows[r.attempt_id].agent_id for r in requests if isinstance(r.outcome, Failed) and r.attempt_id in rows
        }
        agents = self._agents.load(tx, filter(None, failed))
        changes = Changes(tx)
        results: list[SwarmError | None] = []
        for request in requests:
            row = rows.get(request.attempt_id)
            if row is None or not owns(row):
                results.append(_lost(request.attempt_id, row))
                continue
            for event in request.events:
                changes.add_event(event)
            del rows[request.attempt_id]  # a second finish in the same batch finds the attempt ended
            agent = agents.get(row.agent_id)
            if (error := self._wants_more(row, request.outcome, agent)) is not None:
                _ask_for_more(changes, row, request, error)
            else:
                _finish(changes, row, request, agent)
            results.append(None)
        changes.flush()
        if changes.pending_runs:
            self._workflows.advance_workflows(changes)
        dependencies.release(changes)
        return results

    def _wants_more(self, row: Row, outcome: Outcome, agent: Agent | StoreError | None) -> str | None:
        """Of an attempt that was over budget, by the policy that a person is asked: what it says."""
        if not isinstance(outcome, Failed) or outcome.reason is not FailureReason.OVER_BUDGET:
            return None
        own = agent.over_budget if isinstance(agent, Agent) else None
        known = row.over_budget if row.over_budget in tuple(BudgetPolicy) else own  # another tool may have written it
        return outcome.message if (known or self._over_budget) == BudgetPolicy.WAIT else None


def _ask_for_more(changes: Changes, row: Row, request: FinishRequest, error: str) -> None:
    """The step waits for a person, and the try is not counted: it did no wrong."""
    why = str(FailureReason.OVER_BUDGET)
    changes.end_attempt(
        row, AttemptOutcome.FAILED, reason=why, error=error, timings=request.timings, vm_id=request.vm_id
    )
    question = f"{error.partition(chr(10))[0]}. Raise that budget and approve, or reject"
    changes.ask(row, why=why, question=question, error=error, vm_time_ms=request.vm_time_ms)
    refresh_waiting(changes, row, error=error)


def _finish(changes: Changes, row: Row, request: FinishRequest, agent: Agent | StoreError | None) -> None:
    outcome, timings, vm_time_ms = request.outcome, request.timings, request.vm_time_ms
    spent: Any = {"vm_time_ms": vm_time_ms, "vm_id": request.vm_id}
    match outcome:
        case Succeeded():
            changes.end_attempt(
                row, AttemptOutcome.SUCCEEDED, exit_code=outcome.exit_code, timings=timings, vm_id=request.vm_id
            )
            outputs = storable_json(outcome.outputs)
            if row.definition is not None:
                packed = request.packed or artifacts.pack_text(outcome.outputs)
                artifacts.keep(changes.tx, row.ticket_id, packed.parts)
                outputs = packed.text
            changes.end_step(row, StepStatus.COMPLETED, why="succeeded", outputs=outputs, **spent)
        case Failed():
            changes.end_attempt(
                row,
                AttemptOutcome.FAILED,
                reason=str(outcome.reason),
                error=outcome.message,
                exit_code=outcome.exit_code,
                timings=timings,
                vm_id=request.vm_id,
            )
            delay_ms = retry_delay_ms(row, outcome, agent if isinstance(agent, Agent) else None)
            why, error = str(outcome.reason), outcome.message
            if delay_ms is None:
                changes.end_step(row, StepStatus.FAILED, why=why, error=error, **spent)
            else:
                changes.step_back(row, why=why, counted=True, error=error, delay_ms=delay_ms, vm_time_ms=vm_time_ms)
        case Cancelled():
            changes.end_attempt(
                row, AttemptOutcome.CANCELLED, error=outcome.message, timings=timings, vm_id=request.vm_id
            )
            error = outcome.message
            changes.end_step(row, StepStatus.CANCELLED, why="cancelled", error=error, **spent)
        case Interrupted():
            changes.end_attempt(
                row, AttemptOutcome.INTERRUPTED, error=outcome.message, timings=timings, vm_id=request.vm_id
            )
            changes.step_back(row, why="interrupted", counted=False, error=outcome.message, vm_time_ms=vm_time_ms)


def retry_delay_ms(row: Row, outcome: Failed, agent: Agent | None) -> int | None:
    """Back-off before the next try, or None for no next try.

    The policy of the step in its workflow, else the agent's, decides by reason. When the VM died, nobody knows how far
    the agent got: only an agent that says it is idempotent is tried again, whatever its policy lists.
    """
    if row.step_retry is not None:
        known = json.loads(row.step_retry)
        retry = RetryPolicy(**{**known, "on": frozenset(map(FailureReason, known["on"]))})
    else:
        retry = agent.retry if agent else RetryPolicy()
    idempotent = agent.idempotent if agent else False
    tries = row.retry_count + 1
    if outcome.reason is FailureReason.OVER_BUDGET:
        return None  # the next try has the same budget
    wanted = idempotent if outcome.reason is FailureReason.VM_DIED else outcome.reason in retry.on
    # A fault of this host's says as little about the agent as a lost lease does.
    least = LOST_TRIES if outcome.reason is FailureReason.HOST_ERROR and outcome.retryable else 1
    if not wanted or tries >= max(row.max_attempts, least):
        return None
    seconds: float = min(retry.max_delay_seconds, retry.delay_seconds * retry.factor ** min(tries - 1, 64))
    return max(1, round(seconds * 1000 * random.uniform(0.5, 1.0)))


def sweep(changes: Changes, held: Collection[str] = (), *, until_ms: int = 0) -> None:
    """Attempts whose lease has run out: their steps go back, or end when they were lost too often.

    Except those ``held`` by the worker that asks: it knows that it lives. A clock that jumps ahead ends every lease at
    once, and would else have the worker start again what it is running.
    """
    rows = changes.tx.all(FENCE_EXPIRED, now_ms=changes.tx.now_ms, limit=_SWEPT_AT_ONCE)
    for row in rows:
        if not owns(row):
            continue
        if row.id in held:
            changes.add(_EXTEND, id=row.id, lease_until=until_ms)
            continue
        error = f"the lease of worker {row.worker} ran out: it died, or lost touch with the database"
        changes.end_attempt(row, AttemptOutcome.LOST, error=error)
        tries = row.retry_count + 1
        if tries < max(row.max_attempts, LOST_TRIES):
            changes.step_back(row, why="lost", counted=True, error=error)
        else:
            error = f"{error}; that was try {tries}, and the last"
            changes.end_step(row, StepStatus.FAILED, why="lost", error=error)
    changes.flush()
    changes.cancel_orphans([row for row in rows if not owns(row)])


def renew(tx: Tx, requests: Sequence[RenewRequest]) -> Sequence[Renewal | SwarmError]:
    """Extend the leases of attempts that still own their steps; say which don't, and why."""
    rows = {row.id: row for row in tx.all_in(FENCE_BY_ID, {one for r in requests for one in r.attempt_ids})}
    changes = Changes(tx)
    results = []
    for request in requests:
        lost, cancelled = set[str](), set[str]()
        until = tx.now_ms + round(request.lease_seconds * 1000)
        for one in request.attempt_ids:
            row = rows.get(one)
            if row is not None and owns(row):
                changes.add(_EXTEND, id=one, lease_until=until)
            elif row is None or row.outcome == AttemptOutcome.CANCELLED or (row.outcome is None and _ticket_ended(row)):
                cancelled.add(one)
            else:
                lost.add(one)
        results.append(Renewal(lost=frozenset(lost), cancelled=frozenset(cancelled)))
    changes.flush()
    changes.cancel_orphans([row for row in rows.values() if row.outcome is None and not owns(row)])
    dependencies.release(changes)
    return results


def _ticket_ended(row: Row) -> bool:
    return row.state not in ("in_progress", "waiting")


def running(tx: Tx, requests: Sequence[RunningRequest]) -> Sequence[SwarmError | None]:
    rows = {row.id: row for row in tx.all_in(FENCE_BY_ID, {r.attempt_id for r in requests})}
    changes = Changes(tx)
    results: list[SwarmError | None] = []
    for request in requests:
        row = rows.get(request.attempt_id)
        if row is None or not owns(row):
            results.append(_lost(request.attempt_id, row))
            continue
        changes.add(_SET_VM, id=row.id, vm_id=request.vm_id)
        changes.add(_SET_STEP_VM, id=row.step_execution_id, vm_id=request.vm_id)
        results.append(None)
    changes.flush()
    return results
