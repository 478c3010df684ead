"""Adds, shows, lists, cancels and retries tickets; counts the queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

from swarm.base import versions
from swarm.errors import ChangeRefused, Conflict, NotFound, UsageError
from swarm.model import TERMINAL_TICKET_STATES, StepStatus, Ticket, TicketState
from swarm.store.sql import rows
from swarm.store.sql.bounded import text
from swarm.store.sql.conditions import IS_HERE, STEP_READY, UNFINISHED
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import (
    SUMMARY_COLUMNS,
    TICKET_COLUMNS,
    TICKET_FIELDS,
    AttemptRow,
    Due,
    QueueStatus,
    RunRow,
    StepRow,
    TicketSummary,
    iso,
    milliseconds,
)
from swarm.store.sql.transaction import Tx, one_row
from swarm.store.sql.unique import unique
from swarm.store.tickets import dependencies, events, places, validation
from swarm.store.tickets.changes import Changes
from swarm.store.tickets.places import Places

# Columns of a new ticket; Swarm writes the others, or they have defaults.
_GIVEN: Final = (
    "id", "project_id", "title", "description", "state", "agent_id", "assignee_id", "assignee_type", "execution_mode",
    "workflow_id", "inputs", "priority", "timeout_seconds", "max_attempts", "budget_usd", "budget_tokens",
    "over_budget", "keep_vm", "keep_vm_seconds", "requires", "trigger_type", "trigger_data",
)  # fmt: skip
_INSERT: Final = Sql(
    f"INSERT INTO tickets ({', '.join(_GIVEN)}, created_at, updated_at) "
    f"VALUES ({', '.join(':' + name for name in _GIVEN)}, :now, :now) "
    f"ON CONFLICT (id) DO NOTHING RETURNING {', '.join(TICKET_FIELDS)}"
)
_BY_ID: Final = Sql(f"SELECT {TICKET_COLUMNS} FROM tickets t WHERE t.id = :id")
_USES: Final = Sql("SELECT count(*) AS uses FROM artifact_uses WHERE ticket_id = :id")
_TAKE_USES: Final = Sql(
    "INSERT INTO artifact_uses (ticket_id, digest) SELECT :id, u.digest FROM artifact_uses u WHERE u.ticket_id = :sent "
    "ON CONFLICT DO NOTHING"
)
_DROP_USES: Final = Sql("DELETE FROM artifact_uses WHERE ticket_id = :sent")
_PROJECT: Final = f"{text('project_id', validation.MAX_OTHER_BYTES)} AS project_id"
_ID: Final = Sql(f"SELECT id, {_PROJECT} FROM tickets WHERE id = :id")
_SUMMARY: Final = Sql(f"SELECT {SUMMARY_COLUMNS} FROM tickets t WHERE t.id = :id")
_IDS_FROM: Final = Sql(
    "SELECT id FROM tickets WHERE id >= :ref AND id < :end AND length(id) IN (32, 36) ORDER BY id LIMIT 100"
)
_OWN_IDS_FROM: Final = Sql(  # however many others begin like that
    "SELECT id FROM (SELECT id, project_id FROM tickets WHERE id >= :ref AND id < :end AND length(id) IN (32, 36) "
    "ORDER BY id LIMIT 10000) AS t WHERE t.project_id = :project_id ORDER BY id LIMIT 100"
)
_NEWEST_IDS: Final = Sql("SELECT id FROM tickets ORDER BY created_at DESC LIMIT 500")
_NAMES: Final = Sql(
    "SELECT id, name, version FROM agents WHERE id IN :ids "
    "UNION ALL SELECT id, name, version FROM workflows WHERE id IN :ids"
)
_LIST: Final = "SELECT {} FROM tickets t WHERE 1 = 1"
_LIVE_RUNS: Final = Sql("SELECT id FROM workflow_runs WHERE ticket_id = :id AND status IN ('running', 'waiting')")
_RETRY: Final = one_row(
    "UPDATE tickets SET state = 'ready', error = NULL, outputs = NULL, run_id = NULL, started_at = NULL, "
    "completed_at = NULL, updated_at = :now WHERE id = :id"
)
_STATES: Final = Sql(f"SELECT id, state, {_PROJECT} FROM tickets WHERE id IN :ids")
_DELETE: Final = Sql("DELETE FROM tickets WHERE id = :id")
_RUNS: Final = Sql(f"SELECT {rows.columns(RunRow, 'r')} FROM workflow_runs r WHERE r.ticket_id = :id ORDER BY r.id")
_STEPS: Final = Sql(
    f"SELECT {rows.columns(StepRow, 's')} FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id "
    "WHERE r.ticket_id = :id ORDER BY s.id"
)
# The newest few of a ticket's; of steps, first those that wait for an answer; of runs, first the outermost.
_SOME_RUNS: Final = Sql(
    f"SELECT {rows.columns(RunRow, 'r')} FROM workflow_runs r WHERE r.ticket_id = :id "
    "ORDER BY CASE WHEN r.parent_step_id IS NULL THEN 0 ELSE 1 END, r.id DESC LIMIT :limit"
)
_SOME_STEPS: Final = Sql(
    "SELECT s.id FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id WHERE r.ticket_id = :id "
    "ORDER BY CASE WHEN s.status = 'waiting' THEN 0 ELSE 1 END, s.id DESC LIMIT :limit"
)
_STEPS_BY_ID: Final = Sql(f"SELECT {rows.columns(StepRow, 's')} FROM step_executions s WHERE s.id IN :ids")
_TOGETHER: Final = 100  # steps of one read
_OF_TICKET: Final = (
    f"SELECT {rows.columns(AttemptRow, 'a', 'step_id')}, s.step_id FROM workflow_runs r "
    "JOIN step_executions s ON s.run_id = r.id JOIN attempts a ON a.step_execution_id = s.id "
    "WHERE r.ticket_id = :id ORDER BY a.id"
)
_ATTEMPTS: Final = Sql(_OF_TICKET)
_LAST_ATTEMPTS: Final = Sql(f"{_OF_TICKET} DESC LIMIT :limit")
# `|| ''`: without it, SQLite would search the index of all tickets by age, past every finished one.
QUEUE: Final = Sql(f"""
    SELECT (SELECT count(*) FROM tickets WHERE state = 'ready') AS ready_tickets,
      (SELECT min(created_at || '') FROM tickets WHERE state = 'ready') AS oldest_ticket,
      (SELECT count(*) FROM step_executions WHERE status = 'ready' AND available_at IS NULL) AS ready_steps,
      (SELECT min(queued_at) FROM step_executions WHERE status = 'ready' AND available_at IS NULL) AS oldest_step,
      (SELECT count(*) FROM step_executions WHERE status = 'ready' AND available_at IS NOT NULL) AS delayed,
      (SELECT min(available_at) FROM step_executions WHERE status = 'ready' AND available_at IS NOT NULL) AS next_step,
      (SELECT count(*) FROM attempts WHERE outcome IS NULL) AS running,
      (SELECT min(lease_until) FROM attempts WHERE outcome IS NULL) AS next_lease,
      (SELECT min(due_at) FROM workflow_runs WHERE due_at IS NOT NULL) AS next_run,
      (SELECT min(available_at) FROM step_executions WHERE status = 'waiting' AND available_at IS NOT NULL)
      AS next_answer,
      (SELECT count(*) FROM tickets WHERE state = 'blocked' AND {UNFINISHED}) AS blocked,
      (SELECT count(*) FROM tickets WHERE state = 'waiting' AND {UNFINISHED}) AS waiting
""")

NEXT_DUE: Final = Sql(f"""
    SELECT (SELECT min(available_at) FROM step_executions WHERE status = 'ready' AND available_at IS NOT NULL) AS step,
      (SELECT min(lease_until) FROM attempts WHERE outcome IS NULL) AS lease,
      (SELECT min(due_at) FROM workflow_runs WHERE due_at IS NOT NULL) AS run,
      (SELECT min(available_at) FROM step_executions WHERE status = 'waiting' AND available_at IS NOT NULL) AS answer,
      EXISTS (SELECT 1 FROM tickets WHERE state = 'ready' AND waits_for = '')
      OR EXISTS (SELECT 1 FROM step_executions s WHERE {STEP_READY} AND waits_for = '' AND {IS_HERE}) AS ready,
      {places.MARKED} AS marked
""")


def add(
    tx: Tx,
    ticket: Ticket,
    *,
    depends_on: Sequence[str] = (),
    uses: int = 0,
    sent_as: str | None = None,
    by: str | None = None,
) -> Ticket:
    values = {name: getattr(ticket, name) for name in _GIVEN}
    values["trigger_type"] = ticket.trigger_type or "ticket"
    row = tx.first(_INSERT, now=tx.now, **values)
    if row is None:
        if tx.first(_BY_ID, id=ticket.id) is None:
            raise ChangeRefused("a trigger ignored it")
        raise Conflict(f"the ticket id {validation.shown(ticket.id)} is taken; choose another one")
    if sent_as is not None:
        tx.run(_DROP_USES, sent=ticket.id)  # what a command of this host is sending for a ticket of its own
        tx.run(_TAKE_USES, id=ticket.id, sent=sent_as)
        tx.run(_DROP_USES, sent=sent_as)
    if uses and tx.all(_USES, id=ticket.id)[0].uses < uses:
        raise Conflict(f"files of the ticket {validation.shown(ticket.id)} were removed meanwhile; add it again")
    dependencies.add(tx, ticket.id, depends_on)
    if by is not None:
        events.record(tx, "ticket.add", by=by, ticket_id=ticket.id)
    return rows.ticket(row)


def check(ticket: Ticket) -> Ticket:
    """Raises UsageError for what a claim would refuse in a row that another tool wrote."""
    if ticket.state not in (TicketState.DRAFT, TicketState.READY):
        raise UsageError(f"a new ticket is 'draft' or 'ready', not {validation.shown(ticket.state)}")
    values = asdict(ticket) | {"execution_mode": ticket.execution_mode or "agent"}
    try:
        checked = validation.strict_ticket(Ticket(**values))
        if validation.read_inputs(checked.inputs) != "{}":
            validation.parsed_inputs(checked.inputs or "")  # here, before the write lock, large ones too
    except validation.BadRow as error:
        raise UsageError(f"bad ticket: {error}") from None
    return checked


def ticket(tx: Tx, id: str) -> Ticket:
    row = tx.first(_BY_ID, id=id) if validation.storable(id) else None
    if row is None:
        raise NotFound(f"no ticket {validation.shown(id)}; `swarm ticket list` shows the newest")
    return rows.ticket(row)


def ticket_id(tx: Tx, ref: str) -> str:
    """An id, or the beginning of a generated one. Raises NotFound, and Conflict if several begin with it."""
    row = None
    if validation.storable(ref):
        row = tx.first(_ID, id=ref) or unique(tx, _IDS_FROM, ref, "tickets")
    if row is None:
        hint = versions.did_you_mean(ref, [str(one.id) for one in tx.all(_NEWEST_IDS)])
        raise NotFound(f"no ticket {validation.shown(ref)}{hint or '; `swarm ticket list` shows the newest'}")
    return str(row.id)


def visible_id(tx: Tx, ref: str, *, project_id: str | None) -> str:
    """`ticket_id` for another user: there are no tickets but the project's, if one is given. Raises as that, but tells
    nothing that it is not asked for, and costs little."""
    row = None
    if validation.storable(ref):
        row = tx.first(_ID, id=ref)
        if row is None or project_id not in (None, row.project_id):
            given, statement = ({}, _IDS_FROM) if project_id is None else ({"project_id": project_id}, _OWN_IDS_FROM)
            row = unique(tx, statement, ref, "tickets", **given)
    if row is None:
        raise NotFound(f"no ticket {validation.shown(ref)}")
    return str(row.id)


def visible(tx: Tx, ref: str, *, project_id: str | None) -> TicketSummary:
    """The ticket of `visible_id`."""
    (row,) = tx.all(_SUMMARY, id=visible_id(tx, ref, project_id=project_id))
    return rows.ticket_summary(row)


def names(tx: Tx, ids: Sequence[str]) -> dict[str, str]:
    """name@version of those of these ids that are of registered agents and workflows."""
    return {row.id: f"{row.name}@{row.version}" for row in tx.all_in(_NAMES, ids)}


def tickets(tx: Tx, /, **which: Any) -> list[Ticket]:
    return [rows.ticket(row) for row in _listed(tx, TICKET_COLUMNS, **which)]


def summaries(tx: Tx, /, **which: Any) -> list[TicketSummary]:
    return [rows.ticket_summary(row) for row in _listed(tx, SUMMARY_COLUMNS, **which)]


def _listed(
    tx: Tx, columns: str, *, states: Sequence[str] = (), project_id: str | None = None, limit: int = 50
) -> Sequence[Any]:
    sql, values = _LIST.format(columns), dict[str, Any](limit=limit)
    if states:
        names = {f"state_{number}": str(state) for number, state in enumerate(states)}
        sql += f" AND t.state IN ({', '.join(':' + name for name in names)})"
        values |= names
    if project_id is not None:
        sql += " AND t.project_id = :project_id"
        values["project_id"] = project_id
    return tx.all(Sql(sql + " ORDER BY t.created_at DESC LIMIT :limit"), **values)


def runs(tx: Tx, id: str) -> list[RunRow]:
    return [rows.value(RunRow, row) for row in tx.all(_RUNS, id=id)]


def steps(tx: Tx, id: str) -> list[StepRow]:
    """``duration_ms`` of a step that runs is what it has taken so far."""
    return [_step(tx, row) for row in tx.all(_STEPS, id=id)]


def _step(tx: Tx, row: Any) -> StepRow:
    one = rows.value(StepRow, row)
    return replace(one, duration_ms=_so_far(tx, one.started_at)) if one.status == StepStatus.RUNNING else one


def some(tx: Tx, id: str, *, limit: int, most_chars: int) -> tuple[list[RunRow], list[StepRow], list[AttemptRow], bool]:
    """At most ``limit`` of a ticket's runs, steps and attempts each, in order, and whether these are all. Once there
    are ``most_chars`` in inputs, outputs and errors, no more steps are read."""
    of_ticket = tx.all(_SOME_RUNS, id=id, limit=limit + 1)
    ids = [row.id for row in tx.all(_SOME_STEPS, id=id, limit=limit + 1)]
    tries = last_attempts(tx, id, limit=limit + 1)
    complete = max(len(of_ticket), len(ids), len(tries)) <= limit
    ids, found, left = ids[:limit], list[StepRow](), most_chars
    for start in range(0, len(ids), _TOGETHER):
        if left < 0:
            complete = False
            break
        for row in tx.all_in(_STEPS_BY_ID, ids[start : start + _TOGETHER]):
            found.append(_step(tx, row))
            left -= sum(len(text) for text in (row.inputs, row.outputs, row.error) if isinstance(text, str))
    return (
        sorted((rows.value(RunRow, row) for row in of_ticket[:limit]), key=lambda one: one.id),
        sorted(found, key=lambda one: one.id),
        tries[-limit:],
        complete,
    )


def attempts(tx: Tx, id: str) -> list[AttemptRow]:
    """``timings`` of one that runs: its total so far, as its phases are written when it ends."""
    return [_attempt(tx, row) for row in tx.all(_ATTEMPTS, id=id)]


def last_attempts(tx: Tx, id: str, *, limit: int) -> list[AttemptRow]:
    """`attempts`, without the oldest of more than ``limit``."""
    return [_attempt(tx, row) for row in reversed(tx.all(_LAST_ATTEMPTS, id=id, limit=limit))]


def _attempt(tx: Tx, row: Any) -> AttemptRow:
    timings = rows.timings(row.timings)
    if row.outcome is None and (spent := _so_far(tx, row.started_at)) is not None:
        timings = {"total": spent}
    return rows.value(AttemptRow, row, timings=timings)


def _so_far(tx: Tx, started_at: str | None) -> float | None:
    since = milliseconds(started_at)
    return None if since is None else float(max(0, tx.now_ms - since))


def cancel(tx: Tx, id: str, *, by: str) -> None:
    """End a ticket that has not ended. A running attempt loses its step; its worker learns that by `renew`."""
    found = ticket(tx, id)
    if found.state == TicketState.CANCELLED:
        return
    if found.state in TERMINAL_TICKET_STATES:
        raise Conflict(f"the ticket {validation.shown(found.id)} is already {found.state}; there is nothing to cancel")
    changes, error = Changes(tx), f"cancelled by {by}"
    if live := [row.id for row in tx.all(_LIVE_RUNS, id=found.id)]:
        changes.cancel_runs(live, error=error)
    changes.set_ticket(found.id, found.state, TicketState.CANCELLED, error=error)
    dependencies.release(changes)


def for_each(tx: Tx, ids: Sequence[str], act: Callable[[Tx, str], None]) -> dict[str, str]:
    """Why ``act`` was refused, by id. It must find that before it changes anything."""
    refused = {}
    for id in ids:
        try:
            act(tx, id)
        except (NotFound, Conflict) as error:
            refused[id] = str(error)
    return refused


def states(tx: Tx, ids: Sequence[str], *, project_id: str | None = None) -> dict[str, str]:
    """Of those that exist, in the project if one is given."""
    found = [row for row in tx.all_in(_STATES, ids) if project_id in (None, row.project_id)]
    return {row.id: rows.lenient(row.state) or "" for row in found}


def make_ready(tx: Tx, id: str, *, by: str) -> None:
    """draft → ready. Does nothing if it is ready."""
    found = ticket(tx, id)
    if found.state == TicketState.READY:
        return
    if found.state != TicketState.DRAFT:
        raise Conflict(f"the ticket {validation.shown(found.id)} is {found.state}: only a draft can be made ready")
    changes = Changes(tx)
    changes.set_ticket(found.id, found.state, TicketState.READY, why=f"by {by}")
    changes.flush()


def remove(tx: Tx, ids: Sequence[str], *, force: bool, by: str, project_id: str | None = None) -> None:
    """Delete tickets as a DELETE does, all or none. ``force`` cancels those that run, and fails those that depend on
    them. For whoever is bound to a project, what depends on them and is not of it is not named, and does not fail."""
    found = [ticket(tx, id) for id in ids]
    ours = {one.id for one in found}
    for one in found:
        needed = tx.all_in(dependencies.OPEN_DEPENDANTS, [one.id]) if not force or project_id is not None else []
        if project_id is not None and any(row.project_id != project_id for row in needed):
            raise Conflict(f"something that this token can't see depends on the ticket {validation.shown(one.id)}")
        if force:
            if ticket(tx, one.id).state not in TERMINAL_TICKET_STATES:  # it failed if one of them that it needs ended
                cancel(tx, one.id, by=by)
            continue
        if one.state in (TicketState.IN_PROGRESS, TicketState.WAITING):
            raise Conflict(f"the ticket {validation.shown(one.id)} is {one.state}: --force cancels it first")
        if others := sorted({str(rows.lenient(row.ticket_id)) for row in needed} - ours):
            raise Conflict(
                f"{validation.shown(others[0])} depends on the ticket {validation.shown(one.id)} and would fail: "
                "remove both, or give --force"
            )
    for one in found:
        events.record(tx, "ticket.delete", by=by, ticket_id=one.id)
        tx.run(_DELETE, id=one.id)


def retry(tx: Tx, id: str, *, by: str) -> None:
    """Make it ready for a new run; old runs stay as history. Raises Conflict unless it failed or was cancelled."""
    take_back(tx, id, by=by)[1].flush()


def take_back(tx: Tx, id: str, *, by: str, done: bool = False) -> tuple[Ticket, Changes]:
    """Make a failed or cancelled ticket ready; with ``done``, any that has ended. Returns the ticket as it was, and the
    changes, which the caller must flush."""
    found = ticket(tx, id)
    if found.state == TicketState.DONE and not done:
        raise Conflict(
            f"the ticket {validation.shown(id)} is done; only failed or cancelled ones can be retried "
            "(in a workflow that is done, use --from STEP to run a step and those after it again)"
        )
    if found.state not in TERMINAL_TICKET_STATES:
        raise Conflict(f"the ticket {validation.shown(id)} is {found.state}: it has not ended, so it can't be retried")
    changes = Changes(tx)
    if live := [row.id for row in tx.all(_LIVE_RUNS, id=id)]:  # another tool ended the ticket a moment ago
        changes.cancel_runs(live, error="the ticket was changed from outside")
    changes.add(_RETRY, id=id, now=tx.now)
    changes.transition("ticket", found.state, TicketState.READY, ticket_id=id, why=f"by {by}")
    return found, changes


def queue(tx: Tx) -> QueueStatus:
    row = tx.first(QUEUE)
    assert row is not None
    oldest = [ms for ms in (milliseconds(row.oldest_ticket), milliseconds(row.oldest_step)) if ms is not None]
    due = [
        ms
        for ms in (row.next_step, row.next_lease, row.next_run, row.next_answer)
        if isinstance(ms, int | float)  # another program may have written text; the upkeep fails its ticket
    ]
    return QueueStatus(
        ready=row.ready_tickets + row.ready_steps,
        running=row.running,
        delayed=row.delayed,
        blocked=row.blocked,
        waiting=row.waiting,
        oldest_ready_ms=float(max(0, tx.now_ms - min(oldest))) if oldest else None,
        next_due_ms=float(max(0, min(due) - tx.now_ms)) if due else None,
    )


def due(tx: Tx, *, host: str, place: Places) -> Due:
    """For an engine of this host."""
    row = tx.first(NEXT_DUE, host=host, silent_since=iso(tx.now_ms - round(place.patience_seconds * 1000)))
    assert row is not None
    times = [ms for ms in (row.step, row.lease, row.run, row.answer) if isinstance(ms, int | float)]
    ready = bool(row.ready)
    if row.marked:
        here, given_up = places.due(tx, place)
        ready, times = ready or here, times + given_up
    return Due(ready=ready, next_ms=float(max(0, min(times) - tx.now_ms)) if times else None)
