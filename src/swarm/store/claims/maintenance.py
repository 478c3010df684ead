"""What a claim looks after now and then: rows that other tools left in a state where nothing would move them."""

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

# Set by hand to a state that only Swarm sets: no run stands behind it, so nothing would ever move it.
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
    """For one process. Remembers only what saves work."""

    def __init__(self) -> None:
        self.again = True  # we blocked a ticket since: it may close a circle
        self._at = -1  # `written_by_others` at the last time
        self._ended = 0.0
        self._took = 0.0

    def due(self, others: int, *, idle: bool, asked: bool) -> bool:
        """Duties that look at every unfinished ticket: when there is news and nothing better to do, or now and then.

        They may take a twentieth of the time at most; below 10 ms nobody minds.
        """
        if asked:
            return True
        if others == self._at and not self.again:
            return False
        since = time.monotonic() - self._ended  # paces work; decides nothing
        return since >= 20 * self._took if idle and self._took > 0.01 else idle or since >= 1.0

    def run(self, changes: Changes, others: int) -> bool:
        """True if a ticket became ready."""
        began = time.monotonic()
        stuck = changes.tx.all(STUCK, limit=AT_ONCE)
        for row in stuck:
            error = (
                f"state {validation.shown(row.state)} is set by Swarm only, and no run of this ticket is under way; "
                "set state to 'ready' to run it"
            )
            fail_row(changes, row, error)
        if disowned := [row.id for row in changes.tx.all(DISOWNED, limit=AT_ONCE)]:
            changes.cancel_runs(disowned, error="the ticket was changed from outside")
        started = dependencies.recheck_blocked(changes)
        dependencies.release(changes)
        self._at, self.again = others, len(stuck) == AT_ONCE
        self._ended = time.monotonic()
        self._took = self._ended - began
        return started


def has_clean_id(id: object) -> bool:  # noqa: A002
    return isinstance(id, str) and validation.storable(id)


def fail_row(changes: Changes, row: Row, error: str) -> None:
    """A ticket that never ran. Its id may be no text at all, so that only its bytes find it."""
    before = str(lenient(row.state))
    if has_clean_id(row.id):
        changes.set_ticket(row.id, before, TicketState.FAILED, error=error)
        return
    raw = row.id if isinstance(row.id, bytes) else row.id.encode("utf-8", "surrogateescape")
    changes.add(FAIL_BY_BYTES, raw=raw, error=error, now=changes.tx.now)
    changes.transition("ticket", before, TicketState.FAILED, ticket_id=str(lenient(row.id)), error=error)
