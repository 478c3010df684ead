"""What a claim repairs now and then: rows that other tools left in a state in which they would stay for ever."""

from __future__ import annotations

import time
from typing import Final

import sqlalchemy as sa

from swarm.model import TicketState
from swarm.store.runs.workflow_engine import DISOWNED
from swarm.store.sql.database import Row
from swarm.store.sql.rows import lenient
from swarm.store.sql.schema import UNFINISHED
from swarm.store.tickets import dependencies, validation
from swarm.store.tickets.changes import Changes

AT_ONCE: Final = 100  # rows in one transaction

# Manually set to a state that only Swarm sets: the ticket has no run, so nothing would ever change it.
STUCK: Final = sa.text(
    f"SELECT t.id, t.state FROM tickets t WHERE t.{UNFINISHED} AND t.state <> 'blocked' "
    "AND NOT EXISTS (SELECT 1 FROM workflow_runs r WHERE r.id = t.run_id AND r.ticket_id = t.id "
    "AND r.status IN ('running', 'waiting')) LIMIT :limit"
)
FAIL_BY_BYTES: Final = sa.text(
    "UPDATE tickets SET state = 'failed', error = :error, completed_at = :now, updated_at = :now "
    "WHERE id = :raw OR id = CAST(:raw AS TEXT)"
)


class Maintenance:
    """For one process. Its state only paces the work."""

    def __init__(self) -> None:
        self.has_more = True  # a ticket was blocked since the last run (it may close a cycle), or rows were left over
        self._seen = -1  # `written_by_others` at the last run
        self._ended = 0.0
        self._took = 0.0

    def due(self, written_by_others: int, *, idle: bool, required: bool) -> bool:
        """Is it time to look at every unfinished ticket? Only if something changed: at once when idle, else once a
        second.

        A run that takes longer than 10 ms may take a twentieth of the time at most.
        """
        if required:
            return True
        if written_by_others == self._seen and not self.has_more:
            return False
        since = time.monotonic() - self._ended  # paces work; decides nothing
        if not idle:
            return since >= 1.0
        return self._took <= 0.01 or since >= 20 * self._took

    def run(self, changes: Changes, written_by_others: int) -> bool:
        """True if a ticket became ready."""
        began = time.monotonic()
        stuck = changes.tx.all(STUCK, limit=AT_ONCE)
        for row in stuck:
            error = (
                f"only Swarm sets the state {validation.shown(row.state)}, and this ticket has no live run; "
                "set the state to 'ready' to run it"
            )
            fail_row(changes, row, error)
        if disowned := [row.id for row in changes.tx.all(DISOWNED, limit=AT_ONCE)]:
            changes.cancel_runs(disowned, error="the ticket was changed from outside")
        started = dependencies.recheck_blocked(changes)
        dependencies.release(changes)
        self._seen, self.has_more = written_by_others, len(stuck) == AT_ONCE
        self._ended = time.monotonic()
        self._took = self._ended - began
        return started


def has_clean_id(id: object) -> bool:
    return isinstance(id, str) and validation.storable(id)


def fail_row(changes: Changes, row: Row, error: str) -> None:
    """Fail a ticket that never ran. If its id isn't valid text, it is found by its bytes."""
    before = str(lenient(row.state))
    if has_clean_id(row.id):
        changes.set_ticket(row.id, before, TicketState.FAILED, error=error)
        return
    raw = row.id if isinstance(row.id, bytes) else row.id.encode("utf-8", "surrogateescape")
    changes.add(FAIL_BY_BYTES, raw=raw, error=error, now=changes.tx.now)
    changes.transition("ticket", before, TicketState.FAILED, ticket_id=str(lenient(row.id)), error=error)
