"""What a claim repairs now and then: rows that other tools left in a state in which they would stay for ever."""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from swarm.model import TicketState
from swarm.store.runs.workflow_engine import DISOWNED
from swarm.store.sql.conditions import STEP_DELAYED, STEP_READY, STEP_WAITING, UNFINISHED
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient
from swarm.store.sql.transaction import Row
from swarm.store.tickets import dependencies, validation
from swarm.store.tickets.changes import HAS_OTHERS, MENDED, Changes, Culprit
from swarm.store.tickets.isolation import fail_ticket

AT_ONCE: Final = 100  # rows in one transaction

# Manually set to a state that only Swarm sets: the ticket has no run, so nothing would ever change it.
STUCK: Final = Sql(
    f"SELECT t.id, t.state FROM tickets t WHERE t.{UNFINISHED} AND t.state <> 'blocked' "
    "AND NOT EXISTS (SELECT 1 FROM workflow_runs r WHERE r.id = t.run_id AND r.ticket_id = t.id "
    "AND r.status IN ('running', 'waiting')) LIMIT :limit"
)
# Times that only Swarm writes, but which are no numbers. Text sorts after all numbers, so an index finds it; it would
# never come due.
MISTYPED: Final = Sql("""
    SELECT r.ticket_id, t.state, 'available_at' AS name, s.available_at AS value, s.step_id
      FROM step_executions s JOIN workflow_runs r ON r.id = s.run_id JOIN tickets t ON t.id = r.ticket_id
      WHERE s.status = 'ready' AND s.available_at IS NOT NULL AND s.available_at >= ''
    UNION ALL SELECT r.ticket_id, t.state, 'available_at', s.available_at, s.step_id
      FROM step_executions s JOIN workflow_runs r ON r.id = s.run_id JOIN tickets t ON t.id = r.ticket_id
      WHERE s.status = 'waiting' AND s.available_at IS NOT NULL AND s.available_at >= ''
    UNION ALL SELECT r.ticket_id, t.state, 'lease_until', a.lease_until, s.step_id
      FROM attempts a JOIN step_executions s ON s.id = a.step_execution_id JOIN workflow_runs r ON r.id = s.run_id
      JOIN tickets t ON t.id = r.ticket_id WHERE a.outcome IS NULL AND a.lease_until >= ''
    UNION ALL SELECT r.ticket_id, t.state, 'due_at', r.due_at, NULL
      FROM workflow_runs r JOIN tickets t ON t.id = r.ticket_id WHERE r.due_at IS NOT NULL AND r.due_at >= ''
    UNION ALL SELECT r.ticket_id, t.state, 'deadline_at', r.deadline_at, NULL
      FROM tickets t CROSS JOIN workflow_runs r ON r.ticket_id = t.id
      WHERE t.state IN ('in_progress', 'waiting', 'blocked') AND r.status IN ('running', 'waiting')
        AND r.deadline_at >= ''
    LIMIT :limit""")
# Runs that nothing would ever continue, since rows of theirs were deleted or changed: what `swarm prove` would report.
_UNDER_WAY: Final = (
    "FROM tickets t CROSS JOIN workflow_runs r ON r.ticket_id = t.id AND t.run_id IN (r.id, r.root_run_id) "
    f"{{joins}} WHERE t.{UNFINISHED} AND t.state <> 'blocked' AND r.status IN ('running', 'waiting') AND "
)
STALLED: Final = Sql(
    "SELECT t.id, t.state, NULL AS step_id, NULL AS step "
    + _UNDER_WAY.format(joins="")
    + "r.unprocessed IS NULL AND NOT EXISTS (SELECT 1 FROM step_executions s WHERE s.run_id = r.id "
    "AND (s.status IN ('ready', 'running') OR s.status = 'waiting' AND s.question IS NOT NULL)) LIMIT :limit"
)
UNATTENDED: Final = Sql(
    "SELECT t.id, t.state, s.step_id, NULL AS step "
    + _UNDER_WAY.format(
        joins="JOIN step_executions s ON s.run_id = r.id AND s.status = 'running' "
        "LEFT JOIN attempts a ON a.id = s.attempt_id"
    )
    + f"(a.id IS NULL OR a.outcome IS NOT NULL) AND NOT {HAS_OTHERS} LIMIT :limit"
)
UNDONE: Final = Sql(
    "SELECT t.id, t.state, s.step_id, s.id AS step "
    + _UNDER_WAY.format(
        joins="JOIN step_executions s ON s.run_id = r.id AND s.status <> 'completed' "
        "JOIN attempts a ON a.step_execution_id = s.id"
    )
    + "a.outcome = 'succeeded' LIMIT :limit"
)
_WHY: Final = (
    (UNDONE, "its step {step} succeeded, but another program changed its status"),
    (UNATTENDED, "its step {step} is running, but no attempt runs it: another program changed or deleted rows"),
    (STALLED, "nothing would continue its run: another program changed or deleted rows of its steps"),
)
# Steps without a run, which may look as if they were due for ever.
WITHOUT_RUN: Final = Sql(
    " UNION ALL ".join(
        f"SELECT s.run_id FROM step_executions s WHERE {condition} "
        "AND NOT EXISTS (SELECT 1 FROM workflow_runs r WHERE r.id = s.run_id)"
        for condition in (STEP_READY, STEP_DELAYED, STEP_WAITING)
    )
    + " LIMIT :limit"
)
_COMPLETED: Final = Sql(
    "UPDATE step_executions SET status = 'completed' WHERE id = :id AND EXISTS "
    "(SELECT 1 FROM attempts WHERE step_execution_id = :id AND outcome = 'succeeded')"
)
FAIL_BY_BYTES: Final = Sql(
    "UPDATE tickets SET state = 'failed', error = :error, completed_at = :now, updated_at = :now "
    "WHERE id = :raw OR id = CAST(:raw AS TEXT)"
)

# Each engine's upkeep reads what all others write: of two at once, PostgreSQL refuses one.
_ALONE: Final = Sql(
    "SELECT /*-*/1/*-*//*+ CAST(pg_try_advisory_xact_lock(hashtext('swarm upkeep'), hashtext(current_schema())) "
    "AS integer) */ AS alone"
)


class Maintenance:
    """For one process. Its state only paces the work."""

    def __init__(self) -> None:
        self.always_seconds = 20.0  # another program's trigger changes rows without a commit of its own
        self.has_more = True  # a ticket was blocked since the last run (it may close a cycle), or rows were left over
        self._seen = -1  # `written_by_others` at the last run
        self._ended = 0.0
        self._took = 0.0

    def due(self, written_by_others: int, *, idle: bool, required: bool) -> bool:
        """Is it time to look at every unfinished ticket? Only if something changed: at once when idle, else once a
        second. And now and then.

        A run that takes more than 10 ms of CPU may take a twentieth of the time at most.
        """
        if required:
            return True
        since = time.monotonic() - self._ended  # paces work; decides nothing
        if written_by_others == self._seen and not self.has_more and since < self.always_seconds:
            return False
        if not idle:
            return since >= 1.0
        return self._took <= 0.01 or since >= 20 * self._took

    def run(self, changes: Changes, written_by_others: int, *, required: bool = False) -> bool:
        """True if a ticket became ready. Unless ``required``, nothing while another engine does the same: whoever has
        not seen a commit looks again after it."""
        if not required and not changes.tx.all(_ALONE)[0].alone:
            self._ended = time.monotonic()
            return False
        changes.tx.exact()
        began = time.thread_time()  # a busy machine makes it no dearer
        changes.tx.if_undone(partial(self._restore, self._seen, self.has_more))
        reads = (STUCK, MISTYPED, *(one for one, _ in _WHY), WITHOUT_RUN, DISOWNED)
        changes.tx.ahead([(one, {"limit": AT_ONCE}) for one in reads])
        stuck = changes.tx.all(STUCK, limit=AT_ONCE)
        for row in changes.each(stuck, lambda row: row.id):
            error = (
                f"only Swarm sets the state {validation.shown(row.state)}, and this ticket has no live run; "
                "set the state to 'ready' to run it"
            )
            fail_row(changes, row, error, why=MENDED)
        mistyped = {row.ticket_id: row for row in changes.tx.all(MISTYPED, limit=AT_ONCE)}
        for row in changes.each(mistyped.values(), lambda row: row.ticket_id):
            step = f" of its step {validation.shown(row.step_id)}" if row.step_id is not None else " of its run"
            error = (
                f"{row.name}{step} is {validation.shown(row.value)}, which is no number of milliseconds: only "
                "Swarm sets it, and another program changed it; `swarm ticket retry` starts again"
            )
            fail_ticket(changes, row.ticket_id, row.state, error)
        _fail_what_nothing_continues(changes)
        gone = {row.run_id for row in changes.tx.all(WITHOUT_RUN, limit=AT_ONCE)}
        for run_id in changes.each(gone, lambda run_id: Culprit("run", run_id)):
            changes.delete_runs([run_id])
        disowned = [row.id for row in changes.tx.all(DISOWNED, limit=AT_ONCE)]
        for runs in [[one] for one in disowned] if changes.isolating else [disowned] if disowned else []:
            for _ in changes.each([runs], lambda runs: changes.owner(runs[0])):
                changes.cancel_runs(runs, error="the ticket was changed from outside")
        started = dependencies.recheck_blocked(changes)
        dependencies.release(changes)
        self._seen, self.has_more = written_by_others, len(stuck) == AT_ONCE
        self._ended = time.monotonic()
        self._took = time.thread_time() - began
        return started

    def _restore(self, seen: int, has_more: bool) -> None:
        self._seen, self.has_more = seen, has_more


def _fail_what_nothing_continues(changes: Changes) -> None:
    for statement, why in _WHY:
        found = {row.id: row for row in changes.tx.all(statement, limit=AT_ONCE)}
        for row in changes.each(found.values(), lambda row: row.id):
            if row.step is not None:
                changes.add(_COMPLETED, id=row.step)  # as it was; else it would look like work that was lost
                changes.flush()
            error = f"{why.format(step=validation.shown(row.step_id))}; `swarm ticket retry` starts again"
            fail_ticket(changes, row.id, row.state, error)


def fail_made_ready(changes: Changes, row: Row) -> None:
    """Another program set a step to 'ready' that runs, or has ended: a second try could do its work twice."""
    changes.add(_COMPLETED, id=row.step_execution_id)
    changes.flush()
    step = validation.shown(row.step_id)
    error = f"another program set its step {step} to 'ready' by itself; `swarm ticket retry` starts again"
    fail_ticket(changes, row.ticket_id, row.state, error)


def has_clean_id(id: object) -> bool:
    return isinstance(id, str) and validation.storable(id)


def fail_row(changes: Changes, row: Row, error: str, *, why: str | None = None) -> None:
    """Fail a ticket that never ran. If its id isn't valid text, it is found by its bytes."""
    before = str(lenient(row.state))
    if has_clean_id(row.id):
        if getattr(row, "completed_at", None) is not None:  # it has ended before
            changes.check_restarts(row.id)
        changes.set_ticket(row.id, before, TicketState.FAILED, error=error, why=why)
        return
    raw = row.id if isinstance(row.id, bytes) else row.id.encode("utf-8", "surrogateescape")
    changes.add(FAIL_BY_BYTES, raw=raw, error=error, now=changes.tx.now)
    id = str(lenient(row.id))
    changes.transition("ticket", before, TicketState.FAILED, ticket_id=id, why=why, error=error)
