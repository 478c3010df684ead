"""A person's word on a step that waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from swarm.errors import Conflict
from swarm.store import dependencies, tickets
from swarm.store.changes import Changes
from swarm.store.database import Tx
from swarm.store.executor import WAITING_COLUMNS, WorkflowExecutor, answer
from swarm.store.intake import shown
from swarm.store.rows import lenient, message
from swarm.workflow.state import Verdict

WAITING_STEPS: Final = sa.text(
    f"SELECT {WAITING_COLUMNS} FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id "
    "JOIN tickets t ON t.id = r.ticket_id WHERE r.ticket_id = :id AND r.status IN ('running', 'waiting') "
    "AND t.run_id = COALESCE(r.root_run_id, r.id) AND s.status = 'waiting' AND s.verdict IS NULL ORDER BY s.id"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRequest:
    """``step`` None: the one that waits."""

    ticket_id: str
    step: str | None
    approved: bool
    by: str
    why: str = ""


class Approvals:
    def __init__(self, executor: WorkflowExecutor) -> None:
        self._executor = executor

    def answer(self, tx: Tx, request: AnswerRequest) -> tuple[str, list[str]]:
        """The step that was answered, and runs for the caller to decide on.

        Raises NotFound, and Conflict when none waits, or when it is not clear which is meant.
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
        changes = Changes(tx)
        answer(changes, waiting[step], Verdict(approved=request.approved, by=by, why=why))
        undecided = self._executor.settle(changes, take_up=True)
        dependencies.release(changes)
        return str(lenient(step)), undecided
