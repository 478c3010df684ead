"""`retry --from`: a new run of the same frozen workflow that keeps the results of the last run's other steps."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from swarm.errors import Conflict, UsageError
from swarm.model import StepStatus, TicketState
from swarm.store.claims.claim import START_TICKET
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import dump, ids_in_order, new_id
from swarm.store.sql.transaction import Row, Tx
from swarm.store.tickets import tickets
from swarm.store.tickets.changes import Changes
from swarm.store.tickets.validation import shown
from swarm.workflow import definition
from swarm.workflow.structure import Graph

_LAST_RUN: Final = Sql(
    "SELECT r.id, d.definition FROM workflow_runs r JOIN definitions d ON d.digest = r.definition "
    "WHERE r.id = :id AND r.context IS NOT NULL"
)
_STEPS: Final = Sql(
    "SELECT id, step_id, status, inputs, fan_out FROM step_executions WHERE run_id = :run_id ORDER BY id"
)
_COPY_RUN: Final = Sql(
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
_COPY_STEP: Final = Sql(
    f"INSERT INTO step_executions (id, run_id, {_COLUMNS}) SELECT :id, :run_id, {_COLUMNS} FROM step_executions "
    "WHERE id = :former"
)
# Copies a fan-out step of which only some items run again; _COPY_PENDING copies those items.
_COPY_FAN_OUT: Final = Sql(
    "INSERT INTO step_executions (id, run_id, step_id, status, inputs, queued_at, started_at, max_attempts, priority, "
    "ticket_created_at, question, verdict, fan_out) "
    "SELECT :id, :run_id, step_id, 'running', inputs, queued_at, :now, max_attempts, priority, "
    "ticket_created_at, question, verdict, :fan_out FROM step_executions WHERE id = :former"
)
_COPY_PENDING: Final = Sql(
    "INSERT INTO step_executions (id, run_id, step_id, status, inputs, priority, ticket_created_at) "
    "SELECT :id, :run_id, step_id, 'pending', inputs, priority, ticket_created_at FROM step_executions "
    "WHERE id = :former"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRequest:
    ticket_id: str
    step: str
    by: str


def retry_from(tx: Tx, request: RetryRequest) -> None:
    """See `Store.retry`."""
    ticket, changes = tickets.take_back(tx, request.ticket_id, by=request.by, done=True)
    last = tx.first(_LAST_RUN, id=ticket.run_id) if ticket.run_id is not None else None
    if last is None:
        raise Conflict(f"the ticket {shown(ticket.id)} has no workflow run to continue; retry it without --from")
    graph = Graph(definition.from_json(json.loads(last.definition)))
    rows = _begun(tx.all(_STEPS, run_id=last.id))
    step, number = _find(graph, request.step, {row.step_id for row in rows})
    rerun = _to_rerun(graph, step, {row.step_id: row.status for row in rows}, kept=step if number is not None else None)
    if step in rerun:  # the VM that its items start from is gone, so all of them run again
        number = None
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
    _copy(changes, run_id, [row for row in rows if row.step_id.partition("[")[0] not in rerun], graph, step, number)
    changes.add(START_TICKET, id=ticket.id, run_id=run_id, now=tx.now)
    changes.transition(
        "ticket", TicketState.READY, TicketState.IN_PROGRESS, ticket_id=ticket.id, why=f"from {request.step}"
    )
    changes.flush()


def _begun(rows: Sequence[Row]) -> list[Row]:
    """Without items that were written ahead of a decision that never came."""
    fan_outs = {row.step_id for row in rows if row.fan_out is not None}
    return [row for row in rows if not row.step_id.endswith("]") or row.step_id.rpartition("[")[0] in fan_outs]


def _find(graph: Graph, wanted: str, ran: Collection[str]) -> tuple[str, int | None]:
    """The step, and the number in `step[number]`. ``ran``: the last run's executions. Raises UsageError."""
    name, bracket, number = wanted.removesuffix("]").partition("[")
    if wanted in graph.steps:
        return wanted, None
    if not bracket or name not in graph.steps or "/" in wanted:
        nested = "; a nested workflow only runs again as a whole" if "/" in wanted else ""
        raise UsageError(
            f"the workflow has no step {shown(wanted)} of its own; use one of {', '.join(graph.steps)}{nested}"
        )
    if not wanted.endswith("]") or wanted not in ran:
        last = sum(one.startswith(f"{name}[") for one in ran) - 1
        known = f"only {name}[0] to {name}[{last}]" if last >= 0 else "none of this step"
        raise UsageError(f"the last run had no execution {shown(wanted)}, {known}")
    return name, None if number == "0" and graph.steps[name].repeat else int(number)


def _to_rerun(graph: Graph, step: str, statuses: Mapping[str, str], *, kept: str | None) -> set[str]:
    """The steps that run again as a whole: ``step``; those that were cancelled, never ran, or failed the run; all that
    depend on these; and skipped ones, which are considered again.

    ``kept``, of which only some items run again, is one of them only if it depends on another.
    """
    rerun = set(graph.after(step)) - {kept}
    for key, one in graph.steps.items():
        if key == kept:
            continue
        status = statuses.get(key)
        failed_run = status == StepStatus.FAILED and not one.continue_on_error and not graph.can_do_without(key)
        if failed_run or status in (None, StepStatus.CANCELLED):
            rerun |= set(graph.after(key))
        elif status != StepStatus.COMPLETED and status != StepStatus.FAILED:
            rerun.add(key)
    # The VMs that steps left are gone with the run: the steps of which others start run again too.
    again = [*rerun, *([kept] if kept is not None else [])]
    for key in again:  # grows while it is walked
        source = graph.steps[key].from_step
        if source is not None and source not in rerun:
            more = [one for one in graph.after(source) if one not in rerun]
            rerun.update(more)
            again += more
    return rerun


def _copy(changes: Changes, run_id: str, rows: Iterable[Row], graph: Graph, step: str, number: int | None) -> None:
    """Copy the rows that the new run keeps. ``number``: only this execution of ``step`` runs again; then the step's own
    row is running, and the planner counts its executions anew."""
    is_repeat = graph.steps[step].repeat is not None
    for row, id_ in zip(rows, ids_in_order(changes.tx.now_ms), strict=False):
        name, _, which = row.step_id.removesuffix("]").partition("[")
        statement, more = _COPY_STEP, dict[str, str]()
        if name == step and number is not None:
            if not which:
                fan_out = json.loads(row.fan_out or "{}")
                count = number if is_repeat else fan_out.get("count", 0)
                statement, more = _COPY_FAN_OUT, {"fan_out": dump({**fan_out, "count": count}), "now": changes.tx.now}
            elif is_repeat:
                if int(which) >= number:
                    continue
            elif _runs_again(row, int(which) == number):
                statement = _COPY_PENDING
        changes.add(statement, id=id_, run_id=run_id, former=row.id, **more)


def _runs_again(item: Row, is_named: bool) -> bool:
    """An item of a for_each runs again if it was named or did not succeed; not if its `when` was false (then it has no
    inputs)."""
    if item.inputs in (None, "null"):
        return False
    return is_named or item.status != StepStatus.COMPLETED
