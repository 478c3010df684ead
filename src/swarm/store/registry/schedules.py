"""Schedules of workflows: one row each, with the time (ms of the database's clock) at which it is due next.

The rows are derived from the table `workflows`. Swarm's own changes to a workflow update its rows in the same
transaction. For changes by other tools, triggers insert a mark (a row with an empty name that is always due); the
engine that looks for due schedules then updates all rows. Only the newest version of a workflow is started by time.

Several engines may find the same schedule due. The update of its row is the claim: it requires the `next_at` that the
engine saw, and the tickets are created in the same transaction.
"""

from __future__ import annotations

import datetime
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarm.base import versions
from swarm.base.clock import MAX_AGE_SECONDS
from swarm.model import Ticket, TicketState
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import flag, iso, milliseconds, value
from swarm.store.sql.transaction import Row, Tx
from swarm.store.tickets import tickets
from swarm.store.tickets.changes import Changes
from swarm.store.tickets.validation import storable
from swarm.workflow import definition, parse, schedule
from swarm.workflow.definition import Schedule
from swarm.workflow.schedule import Before

# If the clock was set back by more than this, it was wrong before: times computed with it are computed again. After a
# smaller step back, schedules wait until the clock has caught up, so that nothing runs twice.
CLOCK_CORRECTED_MS: Final = 3 * 3600 * 1000
_FAR_MS: Final = MAX_AGE_SECONDS * 1000  # no next time is so far away
_MARK: Final = ""  # a workflow name that no workflow has

_COLUMNS: Final = (
    "workflow, number, workflow_id, cron, time_zone, missed, next_at, computed_at, last_at, last_ticket_id, "
    "missed_count, error"
)
_OF: Final = Sql(f"SELECT {_COLUMNS} FROM schedules WHERE workflow = :workflow ORDER BY number")
_ALL: Final = Sql(f"SELECT {_COLUMNS} FROM schedules WHERE workflow <> '' ORDER BY workflow, number")
_DELETE: Final = Sql("DELETE FROM schedules WHERE workflow = :workflow")
_INSERT: Final = Sql(
    f"INSERT INTO schedules ({_COLUMNS}) VALUES (:workflow, :number, :workflow_id, :cron, :time_zone, :missed, "
    ":next_at, :computed_at, :last_at, :last_ticket_id, :missed_count, :error)"
)
# Most workflows have no schedule, and definitions may be long: read only those with one.
_VERSION: Final = (
    "SELECT id, name, version, enabled, CASE WHEN steps LIKE '%\"schedule\"%' THEN steps END AS steps FROM workflows"
)
_VERSIONS: Final = Sql(f"{_VERSION} WHERE name = :workflow")
_ALL_VERSIONS: Final = Sql(_VERSION)
_NAMES: Final = Sql("SELECT DISTINCT workflow FROM schedules WHERE workflow <> ''")
# The table is small (one row per schedule), so it is read as a whole.
_DUE: Final = Sql(
    "SELECT s.workflow, s.number, s.workflow_id, s.next_at, s.computed_at, w.name, w.version, w.enabled, w.steps, "
    "t.state AS last_state, t.completed_at AS last_completed_at FROM schedules s "
    "LEFT JOIN workflows w ON w.id = s.workflow_id LEFT JOIN tickets t ON t.id = s.last_ticket_id "
    "WHERE s.next_at <= :now_ms OR s.next_at > :far_ms OR s.next_at IS NULL AND s.error IS NULL "
    "OR s.computed_at > :latest_ms "
    "ORDER BY s.next_at, s.workflow, s.number"
)
_NEXT: Final = Sql("SELECT min(next_at) AS next_at FROM schedules WHERE next_at > :now_ms AND next_at < ''")
_FIRE: Final = Sql(
    "UPDATE schedules SET next_at = :next_at, computed_at = :now_ms, last_at = COALESCE(:last_at, last_at), "
    "last_ticket_id = COALESCE(:last_ticket_id, last_ticket_id), missed_count = missed_count + :dropped, "
    "error = :error WHERE workflow = :workflow AND number = :number AND workflow_id = :workflow_id "
    "AND next_at = :seen RETURNING workflow"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRow:
    """``next_at``: ISO-8601 UTC, or None when it will not run (its workflow is disabled, or ``error`` says why).
    ``last_at``: the last due time that was run, and ``last_ticket_id`` its ticket. ``missed_count``: due times that
    were not run."""

    workflow: str
    number: int
    workflow_id: str
    cron: str
    time_zone: str
    missed: str
    next_at: str | None
    last_at: str | None
    last_ticket_id: str | None
    missed_count: int
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DueSchedule:
    """``definition``: JSON text of its workflow, as in the row; ``before``: the ticket that it created last."""

    workflow: str
    version: str
    number: int
    workflow_id: str
    definition: str
    next_at: int
    before: Before


@dataclass(frozen=True, slots=True, kw_only=True)
class DueSchedules:
    """``stale``: call `sync_schedules` first. ``next_ms``: time until another one is due."""

    now_ms: int
    due: Sequence[DueSchedule]
    stale: bool
    next_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FireRequest:
    """``next_at`` None: never again (``error`` says why). ``new``: ready tickets to create; one with an `error` is
    created and fails with that."""

    due: DueSchedule
    next_at: int | None
    last_at: str | None
    dropped: int
    new: Sequence[Ticket]
    error: str | None = None


def sync(tx: Tx, workflow: str) -> None:
    """Update the rows of one workflow from its newest version. A schedule that already exists keeps its next time, so
    that a new version does not swallow one that is due."""
    _sync_rows(tx, workflow, [row for row in tx.all(_VERSIONS, workflow=workflow) if _is_sound(row)])


def sync_schedules(tx: Tx) -> None:
    """Update the rows of all workflows, and remove the mark."""
    by_name: dict[str, list[Row]] = {row.workflow: [] for row in tx.all(_NAMES)}
    for row in tx.all(_ALL_VERSIONS):
        if _is_sound(row):
            by_name.setdefault(row.name, []).append(row)
    for name, rows in by_name.items():
        _sync_rows(tx, name, rows)
    tx.run(_DELETE, workflow=_MARK)


def _sync_rows(tx: Tx, workflow: str, rows: Sequence[Row]) -> None:
    now_ms, present = tx.now_ms, tx.all(_OF, workflow=workflow)
    newest: Row = versions.pick(workflow, rows)
    wanted = _schedules_of(newest.steps) if newest is not None and newest.steps is not None else ()
    if not present and not wanted:
        return
    tx.run(_DELETE, workflow=workflow)
    known: dict[tuple[str, str], deque[Row]] = {}  # several may have the same times, with different inputs
    for row in present:
        known.setdefault((row.cron, row.time_zone), deque()).append(row)
    for number, one in enumerate(wanted):
        alike = known.get((one.cron, one.time_zone))
        former = alike.popleft() if alike else None
        next_at, computed_at, error = None, now_ms, None
        try:
            cron = schedule.parse(one.cron, one.time_zone)
            if not flag(newest.enabled):
                pass
            elif former is not None and former.next_at is not None and _is_plausible(former, now_ms):
                next_at, computed_at = former.next_at, former.computed_at
            else:
                next_at = ms(cron.after(moment(now_ms)))
        except schedule.ZoneMissing as wrong:
            error = str(wrong)
            if former is not None and isinstance(former.next_at, int) and newest.enabled:
                next_at = former.next_at  # when it is due, it is tried again
        except ValueError as wrong:
            error = str(wrong)
        tx.run(
            _INSERT,
            workflow=workflow,
            number=number,
            workflow_id=newest.id,
            cron=one.cron,
            time_zone=one.time_zone,
            missed=one.missed,
            next_at=next_at,
            computed_at=computed_at,
            last_at=former.last_at if former else None,
            last_ticket_id=former.last_ticket_id if former else None,
            missed_count=former.missed_count if former else 0,
            error=error,
        )


def _is_plausible(row: Row, now_ms: int) -> bool:
    """False if its time must be computed again: the clock was corrected, or another program wrote what is no time."""
    numbers = isinstance(row.next_at, int) and isinstance(row.computed_at, int)
    return numbers and 0 <= row.next_at <= now_ms + _FAR_MS and row.computed_at <= now_ms + CLOCK_CORRECTED_MS


def _is_sound(row: Row) -> bool:
    """Other tools may write to `workflows`: rows whose id or name can't be a parameter of a statement are ignored."""
    return bool(row.name) and all(isinstance(v, str) and storable(v) for v in (row.id, row.name, row.version))


def _schedules_of(steps: str) -> Sequence[Schedule]:
    try:
        return definition.from_json(json.loads(steps)).schedule[: parse.MAX_SCHEDULES]
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return ()  # another tool wrote this row; running it reports the error


def due(tx: Tx) -> DueSchedules:
    now_ms = tx.now_ms
    found, stale = [], False
    for row in tx.all(_DUE, now_ms=now_ms, latest_ms=now_ms + CLOCK_CORRECTED_MS, far_ms=now_ms + _FAR_MS):
        if row.next_at is None and row.name == row.workflow and not flag(row.enabled):
            continue
        if row.name != row.workflow or not flag(row.enabled) or not _is_plausible(row, now_ms):
            stale = True
        else:
            found.append(
                DueSchedule(
                    workflow=row.workflow,
                    version=row.version,
                    number=row.number,
                    workflow_id=row.workflow_id,
                    definition=row.steps,
                    next_at=row.next_at,
                    before=_before(row),
                )
            )
    after = tx.first(_NEXT, now_ms=now_ms)
    next_at = after.next_at if after is not None else None
    return DueSchedules(
        now_ms=now_ms, due=found, stale=stale, next_ms=None if next_at is None else float(next_at - now_ms)
    )


def _before(row: Row) -> Before:
    ended = milliseconds(row.last_completed_at)
    # Not 'draft': a person has put that ticket aside.
    running = row.last_state in ("ready", "blocked", "in_progress", "waiting")
    return Before(running=running, ended=moment(ended) if ended is not None and not running else None)


def fire(tx: Tx, request: FireRequest) -> bool:
    """False if another engine was first, or the workflow has changed."""
    due = request.due
    claimed = tx.first(
        _FIRE,
        workflow=due.workflow,
        number=due.number,
        workflow_id=due.workflow_id,
        seen=due.next_at,
        now_ms=tx.now_ms,
        next_at=request.next_at,
        last_at=request.last_at,
        last_ticket_id=request.new[-1].id if request.new else None,
        dropped=request.dropped,
        error=request.error,
    )
    if claimed is None:
        return False
    add(tx, request.new)
    return True


def add(tx: Tx, new: Sequence[Ticket]) -> None:
    """Create tickets of a trigger. One with an `error` becomes a failed ticket, so that people see it."""
    changes = Changes(tx)
    for ticket in new:
        tickets.add(tx, ticket)
        if ticket.error is not None:
            changes.set_ticket(ticket.id, TicketState.READY, TicketState.FAILED, error=ticket.error)
    changes.flush()


def schedules(tx: Tx) -> list[ScheduleRow]:
    def shown(ms: object) -> str | None:
        return iso(ms) if isinstance(ms, int | float) and ms else None

    return [value(ScheduleRow, row, next_at=shown(row.next_at)) for row in tx.all(_ALL)]


def moment(ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC)


def ms(when: datetime.datetime) -> int:
    return round(when.timestamp() * 1000)
