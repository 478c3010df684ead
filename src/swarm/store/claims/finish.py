"""What an attempt may write (finish, renew, running), and the sweep of attempts whose lease expired.

Every write names its attempt and passes the fence (`changes.owns`) in the same transaction.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from swarm.errors import LeaseLost, StoreError, SwarmError, TicketWithdrawn
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
from swarm.store.claims import suspects
from swarm.store.claims.maintenance import Maintenance
from swarm.store.runs import artifacts, packing
from swarm.store.runs.packing import Packed
from swarm.store.runs.workflow_engine import WorkflowEngine, refresh_waiting
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import Renewal, event_values, storable_json
from swarm.store.sql.transaction import Row, Tx, one_row, untold
from swarm.store.tickets import dependencies
from swarm.store.tickets.changes import FENCE_BY_ID, FENCE_EXPIRED, Changes, Culprit, owns
from swarm.store.tickets.events import APPEND, APPEND_OF_SANDBOX
from swarm.store.tickets.isolation import Isolation

# A fault of the host says nothing about the agent: even a step with one try gets this many.
HOST_TRIES: Final = 3
_SWEEP_LIMIT: Final = 500

_EXTEND: Final = untold(one_row("UPDATE attempts SET lease_until = :lease_until WHERE id = :id"))
_DELETE: Final = Sql("DELETE FROM attempts WHERE id = :id")
_SET_VM: Final = untold(Sql("UPDATE attempts SET vm_id = :vm_id WHERE id = :id"))
_SET_STEP_VM: Final = untold(Sql("UPDATE step_executions SET vm_id = :vm_id WHERE id = :id"))


# What nobody else writes of an attempt.
_ENDS: Final = {
    Succeeded: AttemptOutcome.SUCCEEDED,
    Failed: AttemptOutcome.FAILED,
    Interrupted: AttemptOutcome.INTERRUPTED,
}

_SKIPPED: Final = LeaseLost("the database refuses all changes of its ticket (the log and `swarm doctor` say why)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRequest:
    attempt_id: str
    outcome: Outcome
    timings: Mapping[str, float]
    vm_time_ms: float
    vm_id: int | None = None
    events: Sequence[Event] = ()
    packed: Packed | None = None  # the outputs as a workflow's step stores them; None: `finish` packs them
    again: bool = False  # it was tried before: if it was written, all is well


@dataclass(slots=True, kw_only=True)
class AppendRequest:
    """Made once for all tries. ``transaction``: of the last one, whose answer may have been lost."""

    events: Sequence[Event]
    transaction: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewRequest:
    attempt_ids: Sequence[str]
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningRequest:
    attempt_id: str
    vm_id: int


def _lost(attempt_id: str, row: Row | None, *, just_ended: bool = False) -> LeaseLost:
    if just_ended:
        return LeaseLost(f"the attempt {attempt_id} may no longer write: it has just ended; nothing was changed")
    if row is None or row.ticket is None:
        why = "its ticket was deleted"
    elif row.outcome is not None:
        why = f"it has ended as {row.outcome}"
    elif _ticket_ended(row):
        why = f"its ticket {row.ticket} is {row.state}"
    else:
        why = "another attempt has its step"
    withdrawn = row is None or row.ticket is None or "cancelled" in (row.outcome, row.state)
    kind = TicketWithdrawn if withdrawn else LeaseLost
    return kind(f"the attempt {attempt_id} may no longer write: {why}; nothing was changed")


class Finisher:
    """Ends attempts, renews their leases and records their VMs, on the writing thread.

    ``over_budget``: the policy for when neither the ticket nor its agent names one.
    """

    def __init__(
        self, workflows: WorkflowEngine, over_budget: BudgetPolicy, isolation: Isolation, upkeep: Maintenance
    ) -> None:
        self._isolation, self._upkeep = isolation, upkeep
        self._workflows = workflows
        self._over_budget = over_budget

    def finish(self, tx: Tx, requests: Sequence[FinishRequest]) -> Sequence[SwarmError | None]:
        rows = {row.id: row for row in tx.all_in(FENCE_BY_ID, {r.attempt_id for r in requests})}
        failed = {
            rows[r.attempt_id].agent_id for r in requests if isinstance(r.outcome, Failed) and r.attempt_id in rows
        }
        agents = self._workflows.agents.load(tx, filter(None, failed))
        with self._isolation.of(tx) as changes:
            return self._finish_all(changes, requests, rows, agents)

    def _finish_all(
        self,
        changes: Changes,
        requests: Sequence[FinishRequest],
        rows: dict[str, Row],
        agents: Mapping[str, Agent | StoreError],
    ) -> Sequence[SwarmError | None]:
        def ticket(request: FinishRequest) -> object:
            row = rows.get(request.attempt_id)
            return row.ticket_id if row is not None else None

        results: dict[int, SwarmError | None] = dict.fromkeys(range(len(requests)), _SKIPPED)
        ended: set[str] = set()  # by an earlier request of this batch
        for number, request in changes.each(enumerate(requests), lambda one: ticket(one[1])):
            row = rows.get(request.attempt_id)
            if request.again and row is not None and row.outcome == _ENDS.get(type(request.outcome)):
                results[number] = None
                continue
            if row is None or request.attempt_id in ended or not owns(row):
                results[number] = _lost(request.attempt_id, row, just_ended=request.attempt_id in ended)
                continue
            for event in request.events:
                changes.add_event(event)
            ended.add(request.attempt_id)
            agent = agents.get(row.agent_id)
            if (error := self._budget_error(row, request.outcome, agent)) is not None:
                _ask_for_budget(changes, row, request, error)
            else:
                _finish(changes, row, request, agent)
            results[number] = None
        if changes.pending_runs:
            self._workflows.advance_workflows(changes)
        dependencies.release(changes)
        return list(results.values())

    def _budget_error(self, row: Row, outcome: Outcome, agent: Agent | StoreError | None) -> str | None:
        """The error of an attempt that went over budget, if the policy says to ask a person then."""
        if not isinstance(outcome, Failed) or outcome.reason is not FailureReason.OVER_BUDGET:
            return None
        own = agent.over_budget if isinstance(agent, Agent) else None
        known = row.over_budget if row.over_budget in tuple(BudgetPolicy) else own  # another tool may have written it
        return outcome.message if (known or self._over_budget) == BudgetPolicy.WAIT else None

    def renew(self, tx: Tx, requests: Sequence[RenewRequest]) -> Sequence[Renewal | SwarmError]:
        """Extend the leases of attempts that still own their steps; report which don't, and why."""
        rows = {row.id: row for row in tx.all_in(FENCE_BY_ID, {one for r in requests for one in r.attempt_ids})}
        with self._isolation.of(tx) as changes:
            results = [self._renew(changes, request, rows) for request in requests]
            changes.flush()
            orphans = [row for row in rows.values() if row.outcome is None and not owns(row)]
            _cancel_orphans(changes, self._upkeep, orphans)
            dependencies.release(changes)
        return results

    def _renew(self, changes: Changes, request: RenewRequest, rows: Mapping[str, Row]) -> Renewal:
        lost, cancelled = set[str](), set[str]()
        until = changes.tx.now_ms + round(request.lease_seconds * 1000)
        for one in changes.each(request.attempt_ids, lambda one: rows[one].ticket_id if one in rows else None):
            row = rows.get(one)
            if row is not None and owns(row):
                changes.add(_EXTEND, id=one, lease_until=until)
            elif row is None or row.outcome == AttemptOutcome.CANCELLED or (row.outcome is None and _ticket_ended(row)):
                cancelled.add(one)
            else:
                lost.add(one)
        return Renewal(lost=frozenset(lost), cancelled=frozenset(cancelled))

    def running(self, tx: Tx, requests: Sequence[RunningRequest]) -> Sequence[SwarmError | None]:
        rows = {row.id: row for row in tx.all_in(FENCE_BY_ID, {r.attempt_id for r in requests})}
        with self._isolation.of(tx) as changes:
            results: dict[int, SwarmError | None] = dict.fromkeys(range(len(requests)), _SKIPPED)
            for number, request in changes.each(
                enumerate(requests),
                lambda one: rows[one[1].attempt_id].ticket_id if one[1].attempt_id in rows else None,
            ):
                row = rows.get(request.attempt_id)
                if row is None or not owns(row):
                    results[number] = _lost(request.attempt_id, row)
                    continue
                changes.add(_SET_VM, id=row.id, vm_id=request.vm_id)
                changes.add(_SET_STEP_VM, id=row.step_execution_id, vm_id=request.vm_id)
                results[number] = None
            changes.flush()
        return list(results.values())

    def append(self, tx: Tx, requests: Sequence[AppendRequest]) -> Sequence[None]:
        """Add what attempts print and do, and what is done in sandboxes. Events whose ticket or sandbox was deleted are
        dropped."""
        number = tx.number
        missing = [one for one in requests if not (one.transaction and tx.was_committed(one.transaction))]
        for request in missing:
            request.transaction = number
        with self._isolation.of(tx) as changes:
            new = [event for one in missing for event in one.events]
            for event in changes.each(
                new, lambda one: Culprit("sandbox", one.sandbox_id) if one.sandbox_id else one.ticket_id
            ):
                changes.add(APPEND_OF_SANDBOX if event.sandbox_id else APPEND, **event_values(event, tx.now))
            changes.flush()
        return [None] * len(requests)


def _ask_for_budget(changes: Changes, row: Row, request: FinishRequest, error: str) -> None:
    """The step waits for a person. The try isn't counted: the agent did nothing wrong."""
    why = str(FailureReason.OVER_BUDGET)
    changes.end_attempt(
        row, AttemptOutcome.FAILED, reason=why, error=error, timings=request.timings, vm_id=request.vm_id
    )
    question = f"{error.partition(chr(10))[0]}. Raise that budget and approve, or reject"
    changes.ask(row, why=why, question=question, error=error, vm_time_ms=request.vm_time_ms)
    left = request.outcome.outputs if isinstance(request.outcome, Failed) and row.definition is None else None
    refresh_waiting(changes, row, error=error, outputs=storable_json(left) if left is not None else None)


def _finish(changes: Changes, row: Row, request: FinishRequest, agent: Agent | StoreError | None) -> None:
    end_attempt = partial(changes.end_attempt, row, timings=request.timings, vm_id=request.vm_id)
    end_step = partial(changes.end_step, row, vm_time_ms=request.vm_time_ms, vm_id=request.vm_id)
    step_back = partial(changes.step_back, row, vm_time_ms=request.vm_time_ms)
    match request.outcome:
        case Succeeded(outputs=outputs, exit_code=exit_code, snapshot_id=snapshot):
            end_attempt(AttemptOutcome.SUCCEEDED, exit_code=exit_code)
            stored = _stored(changes, row, request, outputs)
            end_step(StepStatus.COMPLETED, why="succeeded", outputs=stored, snapshot_id=snapshot)
        case Failed(reason=reason, message=error, exit_code=exit_code) as failed:
            end_attempt(AttemptOutcome.FAILED, reason=str(reason), error=error, exit_code=exit_code)
            delay_ms = retry_delay_ms(row, failed, agent if isinstance(agent, Agent) else None)
            if delay_ms is None:
                left = _stored(changes, row, request, failed.outputs) if failed.outputs is not None else None
                end_step(StepStatus.FAILED, why=str(reason), error=error, outputs=left)
            else:
                step_back(why=str(reason), counted=True, error=error, delay_ms=delay_ms)
        case Cancelled(message=error):
            end_attempt(AttemptOutcome.CANCELLED, error=error)
            end_step(StepStatus.CANCELLED, why="cancelled", error=error)
        case Interrupted(message=error):
            end_attempt(AttemptOutcome.INTERRUPTED, error=error)
            step_back(why="interrupted", counted=False, error=error)


def _stored(changes: Changes, row: Row, request: FinishRequest, outputs: str) -> str:
    """What the step's row holds of an agent's outputs."""
    if row.definition is None:
        return storable_json(outputs)
    packed = request.packed or packing.pack_text(outputs)
    artifacts.keep(changes.tx, row.ticket_id, packed.parts)
    return packed.text


def retry_delay_ms(row: Row, outcome: Failed, agent: Agent | None) -> int | None:
    """Back-off before the next try; None: no next try.

    The step's policy in its workflow, else the agent's, decides by reason. When the VM died, nobody knows how far the
    agent got: then only an agent declared idempotent is tried again, whatever the policy lists.
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
    least = HOST_TRIES if outcome.reason is FailureReason.HOST_ERROR and outcome.retryable else 1
    if not wanted or tries >= max(row.max_attempts, least):
        return None
    seconds: float = min(retry.max_delay_seconds, retry.delay_seconds * retry.factor ** min(tries - 1, 64))
    return max(1, round(seconds * 1000 * random.uniform(0.5, 1.0)))


def sweep(changes: Changes, upkeep: Maintenance, held: Collection[str], lease_seconds: float) -> None:
    """End attempts whose lease expired: their steps become ready again, or fail if they are what engines die of.

    Attempts ``held`` by the asking worker are extended instead: it is alive. Else a clock that jumps ahead, which ends
    every lease at once, would make the worker start again what it is running.
    """
    rows = changes.tx.all(FENCE_EXPIRED, now_ms=changes.tx.now_ms, limit=_SWEEP_LIMIT)
    before = suspects.losses(changes.tx, rows) if rows else {}
    lost: list[tuple[Row, str]] = []
    for row in changes.each(rows, lambda row: row.ticket_id):
        if not owns(row):
            continue
        if row.id in held:
            changes.add(_EXTEND, id=row.id, lease_until=changes.tx.now_ms + round(lease_seconds * 1000))
            continue
        error = f"the lease of worker {row.worker} ran out: it died, or lost touch with the database"
        changes.end_attempt(row, AttemptOutcome.LOST, reason=row.reason, error=error)
        lost.append((row, error))
    changes.flush()  # a verdict counts the other engines that died, also those whose leases are seen to end now
    for row, error in changes.each(lost, lambda one: one[0].ticket_id):
        earlier = before[row.step_execution_id]
        if (convicted := suspects.verdict(changes.tx, row, earlier)) is not None:
            changes.end_step(row, StepStatus.FAILED, why="lost", error=f"{error}; {convicted}")
        else:
            delay_ms = suspects.delay_ms(len(earlier) + 1)
            changes.step_back(row, why="lost", counted=False, error=error, delay_ms=delay_ms)
    changes.flush()
    if changes.pending_runs:
        changes.tx.exact()
    _cancel_orphans(changes, upkeep, [row for row in rows if not owns(row)])
    for row in changes.each([row for row in rows if row.run_id is None], lambda row: Culprit("duty", row.id)):
        changes.add(_DELETE, id=row.id)  # even its step was deleted
    changes.flush()


def _cancel_orphans(changes: Changes, upkeep: Maintenance, rows: Sequence[Row]) -> None:
    upkeep.has_more |= bool(rows)  # their tickets may have nothing left that runs
    if not changes.isolating:
        changes.cancel_orphans(rows)
        return
    for row in changes.each(rows, lambda row: row.ticket_id):
        changes.cancel_orphans([row])


def _ticket_ended(row: Row) -> bool:
    return row.state not in ("in_progress", "waiting")
