"""`retry --from`: a new run of the same frozen workflow that starts with what the last one has to keep."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from swarm.errors import Conflict, UsageError
from swarm.model import StepStatus, TicketState
from swarm.store.claims.claim import START_TICKET
from swarm.store.sql.database import Row, Tx
from swarm.store.sql.rows import dump, ids_in_order, new_id
from swarm.store.tickets import tickets
from swarm.store.tickets.changes import Changes
from swarm.store.tickets.validation import shown
from swarm.workflow import definition
from swarm.workflow.structure import Graph

_LAST_RUN: Final = sa.text(
    "SELECT r.id, d.definition FROM workflow_runs r JOIN definitions d ON d.digest = r.definition "
    "WHERE r.id = :id AND r.context IS NOT NULL"
)
_STEPS: Final = sa.text(
    "SELECT id, step_id, status, inputs, fan_out FROM step_executions WHERE run_id = :run_id ORDER BY id"
)
_COPY_RUN: Final = sa.text(
    "INSERT INTO workflow_runs (id, workflow_id, workflow_version, ticket_id, status, trigger_type, trigger_data, "
    "started_at, definition, context, unprocessed, due_at, deadline_at) "
    "SELECT :id, workflow_id, workflow_version, ticket_id, 'running', trigger_type, trigger_data, :now, definition, "
    "context, '[]', :due_at, :deadline_at FROM workflow_runs WHERE id = :former"
)
_COLUMNS: Final = (
    "step_id, agent_id, agent_name, agent_version, status, vm_id, inputs, outputs, queued_at, started_at, "
    "completed_at, duration_ms, error, retry_count, max_attempts, timeout_seconds, priority, ticket_created_at, "
    "retry, question, verdict, fan_out"
)
_COPY_STEP: Final = sa.text(
    f"INSERT INTO step_executions (id, run_id, {_COLUMNS}) SELECT :id, :run_id, {_COLUMNS} FROM step_executions "
    "WHERE id = :former"
)
# The step that some of the executions of which run again, and those.
_COPY_FAN: Final = sa.text(
    "INSERT INTO step_executions (id, run_id, step_id, status, inputs, queued_at, started_at, max_attempts, priority, "
    "ticket_created_at, question, verdict, fan_out) "
    "SELECT :id, :run_id, step_id, 'running', inputs, queued_at, :now, max_attempts, priority, "
    "ticket_created_at, question, verdict, :fan_out FROM step_executions WHERE id = :former"
)
_COPY_PENDING: Final = sa.text(
    "INSERT INTO step_executions (id, run_id, step_id, status, inputs, priority, ticket_created_at) "
    "SELECT :id, :run_id, step_id, 'pending', inputs, priority, ticket_created_at FROM step_executions "
    "WHERE id = :former"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRequest:
    ticket_id: str
    step: str


def retry_from(tx: Tx, request: RetryRequest) -> None:
    """See `Store.retry`."""
    ticket, changes = tickets.take_back(tx, request.ticket_id, done=True)
    last = tx.first(_LAST_RUN, id=ticket.run_id) if ticket.run_id is not None else None
    if last is None:
        raise Conflict(f"the ticket {shown(ticket.id)} has no run of a workflow to go on from; retry it without --from")
    graph = Graph(definition.from_json(json.loads(last.definition)))
    rows = tx.all(_STEPS, run_id=last.id)
    step, number = _place(graph, request.step, {row.step_id for row in rows})
    again = _again(graph, step, {row.step_id: row.status for row in rows}, kept=step if number is not None else None)
    run_id = new_id(tx.now_ms)
    seconds = ticket.timeout_seconds
    changes.add(
        _COPY_RUN,
        id=run_id,
        former=last.id,
        now=tx.now,
        due_at=tx.now_ms,
        deadline_at=tx.now_ms + round(seconds * 1000) if seconds else None,
    )
    _copy(changes, run_id, [row for row in rows if row.step_id.partition("[")[0] not in again], graph, step, number)
    changes.add(START_TICKET, id=ticket.id, run_id=run_id, now=tx.now)
    changes.transition(
        "ticket", TicketState.READY, TicketState.IN_PROGRESS, ticket_id=ticket.id, why=f"from {request.step}"
    )
    changes.flush()


def _place(graph: Graph, wanted: str, there: Collection[str]) -> tuple[str, int | None]:
    """A step, and of one that is several executions which of them. Raises UsageError."""
    name, bracket, number = wanted.removesuffix("]").partition("[")
    if wanted in graph.steps:
        return wanted, None
    if not bracket or name not in graph.steps or "/" in wanted:
        within = "; of one that is a workflow, the whole runs again" if "/" in wanted else ""
        raise UsageError(
            f"the workflow has no step {shown(wanted)} of its own; there are {', '.join(graph.steps)}{within}"
        )
    if not wanted.endswith("]") or wanted not in there:
        last = sum(one.startswith(f"{name}[") for one in there) - 1
        ran = f"from {name}[0] to {name}[{last}]" if last >= 0 else "none"
        raise UsageError(f"the last run had no execution {shown(wanted)}; there are {ran}")
    return name, None if number == "0" and graph.steps[name].repeat else int(number)


def _again(graph: Graph, step: str, statuses: Mapping[str, str], *, kept: str | None) -> set[str]:
    """The step and what depends on it; what was cut off or is what the run failed by, and what depends on that; and
    what was skipped, which is asked again. Not ``kept``, of which only a part runs again, unless it has to."""
    again = set(graph.after(step)) - {kept}
    for key, one in graph.steps.items():
        if key == kept:
            continue
        status = statuses.get(key)
        counted = status == StepStatus.FAILED and not one.continue_on_error and not graph.can_do_without(key)
        if counted or status in (None, StepStatus.CANCELLED):
            again |= set(graph.after(key))
        elif status != StepStatus.COMPLETED and status != StepStatus.FAILED:
            again.add(key)
    return again


def _copy(changes: Changes, run_id: str, rows: Iterable[Row], graph: Graph, step: str, number: int | None) -> None:
    """``number``: of the step's executions, the one that runs again. The step itself is running then; the planner
    counts its executions anew."""
    is_repeat = graph.steps[step].repeat is not None
    for row, id_ in zip(rows, ids_in_order(changes.tx.now_ms), strict=False):
        name, _, which = row.step_id.removesuffix("]").partition("[")
        statement, fan_out = _COPY_STEP, None
        if name == step and number is not None and not which:
            fan_out = json.loads(row.fan_out or "{}")
            statement, fan_out = _COPY_FAN, dump({**fan_out, "count": number if is_repeat else fan_out.get("count", 0)})
        elif name == step and number is not None and is_repeat and int(which) >= number:
            continue
        elif name == step and number is not None and not is_repeat and _runs_again(row, int(which) == number):
            statement = _COPY_PENDING
        changes.add(
            statement,
            id=id_,
            run_id=run_id,
            former=row.id,
            **({"fan_out": fan_out, "now": changes.tx.now} if fan_out else {}),
        )


def _runs_again(item: Row, is_named: bool) -> bool:
    """Of a for_each's items: the one that is meant, and all that did not succeed, but for those whose `when` said no
    (which were given no inputs)."""
    if item.inputs in (None, "null"):
        return False
    return is_named or item.status != StepStatus.COMPLETED
