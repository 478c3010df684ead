"""The event log: appended to in batches, read by ticket, pruned by age."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from swarm.model import Event
from swarm.store.sql import rows
from swarm.store.sql.database import Tx
from swarm.store.sql.rows import iso

_COLUMNS: Final = "e.seq, e.ticket_id, e.step_id, e.attempt_id, e.at, e.kind, e.data"
# Output that arrives after its ticket was deleted is dropped.
APPEND: Final = sa.text(
    "INSERT INTO events (ticket_id, step_id, attempt_id, at, kind, data) "
    "SELECT id, :step_id, :attempt_id, :at, :kind, :data FROM tickets WHERE id = :ticket_id"
)
# An id may be used again after its ticket was deleted: events of the old ticket are left out.
OF_TICKET: Final = sa.text(
    f"SELECT {_COLUMNS} FROM events e WHERE e.ticket_id = :id AND e.seq > :after AND e.seq > COALESCE("
    "(SELECT max(d.seq) FROM events d WHERE d.ticket_id = :id AND d.kind = 'deleted'), 0) ORDER BY e.seq LIMIT :limit"
)
OF_ALL: Final = sa.text(f"SELECT {_COLUMNS} FROM events e WHERE e.seq > :after ORDER BY e.seq LIMIT :limit")
_OLDEST: Final = sa.text("SELECT seq, at, ticket_id FROM events WHERE seq > :after ORDER BY seq LIMIT :limit")
_UNFINISHED: Final = sa.text("SELECT id FROM tickets WHERE id IN :ids AND state NOT IN ('done', 'failed', 'cancelled')")
_DELETE: Final = sa.text("DELETE FROM events WHERE seq = :seq")
PRUNE_DEFINITIONS: Final = sa.text(
    "DELETE FROM definitions WHERE NOT EXISTS (SELECT 1 FROM workflow_runs r WHERE r.definition = definitions.digest)"
)
_PRUNED_AT_ONCE: Final = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    removed: int
    after: int | None  # where the next batch starts; None at the end


def events(tx: Tx, ticket_id: str | None, *, after: int, limit: int) -> list[Event]:
    if ticket_id is None:
        found = tx.all(OF_ALL, after=after, limit=limit)
    else:
        found = tx.all(OF_TICKET, id=ticket_id, after=after, limit=limit)
    return [rows.event(row) for row in found]


def prune(tx: Tx, *, older_than_seconds: float, after: int) -> Pruned:
    """One batch, so that other writers get a turn in between. Tickets that have not ended keep their history."""
    before = iso(tx.now_ms - round(older_than_seconds * 1000))
    oldest = tx.all(_OLDEST, after=after, limit=_PRUNED_AT_ONCE)
    old = [row for row in oldest if row.at < before]
    kept = {row.id for row in tx.all_in(_UNFINISHED, {row.ticket_id for row in old if isinstance(row.ticket_id, str)})}
    gone = [{"seq": row.seq} for row in old if row.ticket_id not in kept]
    tx.many(_DELETE, gone)
    more = len(oldest) == _PRUNED_AT_ONCE and len(old) == len(oldest)
    if not more:
        tx.run(PRUNE_DEFINITIONS)  # frozen workflows without any run left
    return Pruned(removed=len(gone), after=oldest[-1].seq if more else None)
