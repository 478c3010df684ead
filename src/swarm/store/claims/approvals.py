"""A person's answer to a step that waits for one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from swarm.errors import Conflict, UsageError
from swarm.ledger import Limit
from swarm.model import Event, FailureReason, StepStatus, Ticket
from swarm.store.runs.workflow_engine import WAITING_COLUMNS, WorkflowEngine, answer, refresh_waiting
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient, message, shallow
from swarm.store.sql.transaction import Row, Tx
from swarm.store.tickets import dependencies, tickets
from swarm.store.tickets.changes import FENCE_BY_ID, Changes
from swarm.store.tickets.validation import BadRow, check_budget, shown
from swarm.workflow.state import Verdict

WAITING_STEPS: Final = Sql(
    f"SELECT {WAITING_COLUMNS} FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id "
    "JOIN tickets t ON t.id = r.ticket_id WHERE r.ticket_id = :id AND r.status IN ('running', 'waiting') "
    "AND t.run_id = COALESCE(r.root_run_id, r.id) AND t.state IN ('in_progress', 'waiting') "
    "AND s.status = 'waiting' AND s.verdict IS NULL ORDER BY s.id"
)
_RAISE_BUDGET: Final = Sql(
    "UPDATE tickets SET budget_usd = COALESCE(:usd, budget_usd), budget_tokens = COALESCE(:tokens, budget_tokens), "
    "updated_at = :now WHERE id = :id"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRequest:
    """``step`` None: the only one that waits."""

    ticket_id: str
    step: str | None
    approved: bool
    by: str
    why: str = ""
    budget: Limit = field(default_factory=Limit)  # the ticket's new, higher budget


class Approvals:
    def __init__(self, workflows: WorkflowEngine) -> None:
        self._workflows = workflows

    def answer(self, tx: Tx, request: AnswerRequest) -> tuple[str, list[str]]:
        """The step that was answered, and runs for the caller to decide on.

        Raises NotFound; Conflict when no step waits, or several do and none is named.
        """
        ticket = tickets.ticket(tx, request.ticket_id)
        waiting = {row.step_id: row for row in tx.all(WAITING_STEPS, id=ticket.id)}
        named = ", ".join(waiting)
        if not waiting:
            raise Conflict(f"the ticket {shown(ticket.id)} is {ticket.state}; no step of it waits for an answer")
        if request.step is None and len(waiting) > 1:
            raise Conflict(f"several steps of the ticket {shown(ticket.id)} wait: {named}; name one with --step")
        step = request.step or next(iter(waiting))
        if step not in waiting:
            raise Conflict(f"the step {shown(step)} of the ticket {shown(ticket.id)} does not wait; these do: {named}")
        by, why = message(request.by) or "", message(request.why) or ""
        changes, row = Changes(tx), waiting[step]
        verdict = Verdict(approved=request.approved, by=by, why=why)
        if row.attempt_id is not None:  # an attempt went over budget; approvals come before the first attempt
            _raise_budget(changes, ticket, request.budget)
            _resume(changes, row, verdict, request.budget)
        elif request.budget != Limit():
            raise Conflict(
                f"the step {shown(step)} of the ticket {shown(ticket.id)} waits for an answer, not for a budget: "
                f"{shown(row.question)}; answer it without a budget"
            )
        else:
            answer(changes, row, verdict)
        undecided = self._workflows.advance_workflows(changes, take_up=True)
        dependencies.release(changes)
        return str(lenient(step)), undecided


def _raise_budget(changes: Changes, ticket: Ticket, budget: Limit) -> None:
    """Raises UsageError, before anything is changed, for a budget that isn't higher than the ticket's."""
    for name, given, present in (
        ("budget_usd", budget.usd, ticket.budget_usd),
        ("budget_tokens", budget.tokens, ticket.budget_tokens),
    ):
        try:
            check_budget(name, given)
        except BadRow as error:
            raise UsageError(str(error)) from None
        if given is not None and (present is None or given <= present):
            now = "has no such budget" if present is None else f"already has {present:,}"
            raise UsageError(f"a {name} of {given:,} would allow no more: the ticket {shown(ticket.id)} {now}")
    if budget != Limit():
        changes.add(_RAISE_BUDGET, id=ticket.id, usd=budget.usd, tokens=budget.tokens, now=changes.tx.now)


def _resume(changes: Changes, waiting: Row, verdict: Verdict, budget: Limit) -> None:
    """A step that went over budget: run it again, or fail it."""
    [row] = changes.tx.all_in(FENCE_BY_ID, [waiting.attempt_id])
    raised = {"budget_usd": budget.usd, "budget_tokens": budget.tokens}
    data = {**shallow(verdict), **{name: value for name, value in raised.items() if value is not None}}
    changes.add_event(Event(ticket_id=row.ticket_id, step_id=row.step_id, kind="approval", data=data))
    if verdict.approved:
        changes.step_back(row, why="approved", counted=False, error=None, before=StepStatus.WAITING)
    else:
        why = f": {verdict.why}" if verdict.why else ""
        changes.end_step(
            row,
            StepStatus.FAILED,
            why=str(FailureReason.OVER_BUDGET),
            before=StepStatus.WAITING,
            error=f"rejected by {verdict.by}{why}\n{waiting.error or ''}".rstrip(),
        )
    refresh_waiting(changes, row)
