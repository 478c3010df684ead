"""Tickets that depend on tickets (`ticket_dependencies`, written by any tool): blocked until all those are done.

A missing id, a cycle, or a dependency that failed or was cancelled fails the dependent ticket, with a reason. While
nobody uses this, it costs one look into an empty table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from swarm.model import TicketState
from swarm.store.sql.conditions import UNFINISHED
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient
from swarm.store.sql.transaction import Row, Tx
from swarm.store.tickets.changes import Changes
from swarm.store.tickets.validation import shown

_NEEDS: Final = "d.ticket_id, d.depends_on, x.id AS found, x.state"
NEEDS_OF: Final = Sql(
    f"SELECT {_NEEDS} FROM ticket_dependencies d LEFT JOIN tickets x ON x.id = d.depends_on WHERE d.ticket_id IN :ids"
)
NEEDS_OF_BLOCKED: Final = Sql(
    f"SELECT t.id, {_NEEDS} FROM tickets t LEFT JOIN ticket_dependencies d ON d.ticket_id = t.id "
    "LEFT JOIN tickets x ON x.id = d.depends_on "
    f"WHERE t.state = 'blocked' AND t.{UNFINISHED}"
)
_DEPENDANTS: Final = Sql("SELECT depends_on FROM ticket_dependencies WHERE depends_on IN :ids LIMIT 1")
BLOCKED_DEPENDANTS: Final = Sql(
    "SELECT DISTINCT d.ticket_id FROM ticket_dependencies d JOIN tickets t ON t.id = d.ticket_id "
    "WHERE d.depends_on IN :ids AND t.state = 'blocked'"
)
OPEN_DEPENDANTS: Final = Sql(  # a claim looks at what a ready one needs, too
    "SELECT DISTINCT d.ticket_id, t.project_id FROM ticket_dependencies d JOIN tickets t ON t.id = d.ticket_id "
    "WHERE d.depends_on IN :ids AND t.state IN ('draft', 'ready', 'blocked')"
)

# Another tool may have written some of them before the ticket itself.
INSERT: Final = Sql(
    "INSERT INTO ticket_dependencies (ticket_id, depends_on) VALUES (:ticket_id, :depends_on) ON CONFLICT DO NOTHING"
)
OF_TICKET: Final = Sql("SELECT depends_on FROM ticket_dependencies WHERE ticket_id = :id ORDER BY depends_on")


def check(tx: Tx, ids: Iterable[str]) -> dict[str, str | None]:
    """The tickets that can't start: None for one that must wait, the reason for one that never can."""
    return _judge(tx.all_in(NEEDS_OF, ids))


def _judge(rows: Sequence[Row]) -> dict[str, str | None]:
    blockers: dict[str, str | None] = {}
    for row in rows:
        if blockers.get(row.ticket_id) is not None or row.depends_on is None:
            continue
        if row.found is None:
            blockers[row.ticket_id] = f"it depends on the ticket {shown(row.depends_on)}, which does not exist"
        elif row.state == TicketState.FAILED:
            blockers[row.ticket_id] = f"it depends on the ticket {shown(row.depends_on)}, which failed"
        elif row.state == TicketState.CANCELLED:
            blockers[row.ticket_id] = f"it depends on the ticket {shown(row.depends_on)}, which was cancelled"
        elif row.state != TicketState.DONE:
            blockers[row.ticket_id] = None
    return blockers


def release(changes: Changes) -> None:
    """After tickets ended: start or fail those that depend on them, and in turn those that depend on these."""
    while changes.ended:
        ended, changes.ended = changes.ended, {}
        if not changes.tx.all_in(_DEPENDANTS, ended):  # asked before anything is written: this needs no lock
            break
        changes.tx.exact()
        changes.flush()
        waiting = [row.ticket_id for row in changes.tx.all_in(BLOCKED_DEPENDANTS, ended)]
        _apply(changes, waiting, check(changes.tx, waiting))
    changes.flush()


def _apply(changes: Changes, blocked: Iterable[str], blockers: Mapping[str, str | None]) -> bool:
    started = False
    for one in changes.each(blocked, str):
        if one not in blockers:
            changes.set_ticket(one, TicketState.BLOCKED, TicketState.READY)
            started = True
        elif (error := blockers[one]) is not None:
            changes.set_ticket(one, TicketState.BLOCKED, TicketState.FAILED, error=error)
    return started


def recheck_blocked(changes: Changes) -> bool:
    """Check every blocked ticket again, since other tools may have changed rows, and fail cycles. True if one became
    ready."""
    rows = [row for row in changes.tx.all(NEEDS_OF_BLOCKED) if isinstance(row.id, str)]
    if not rows:
        return False
    blocked = dict.fromkeys(row.id for row in rows)
    blockers = _judge(rows)
    for cycle in _cycles({one: [] for one in blocked}, rows):
        path = " → ".join(shown(one) for one in (*cycle, cycle[0]))
        for one in cycle:
            blockers[one] = f"its dependencies form a cycle: {path}; delete one of them from ticket_dependencies"
    started = _apply(changes, blocked, blockers)
    release(changes)
    return started


def _cycles(needs: dict[str, list[str]], rows: Sequence[Row]) -> list[list[str]]:
    """At least one cycle of each group of entangled tickets, in the order of its dependencies."""
    for row in rows:
        if row.depends_on in needs:
            needs[row.id].append(row.depends_on)
    needed_by: dict[str, list[str]] = {one: [] for one in needs}
    open_needs = {one: len(others) for one, others in needs.items()}
    for one, others in needs.items():
        for other in others:
            needed_by[other].append(one)
    free = [one for one, count in open_needs.items() if count == 0]
    while free:  # Kahn's algorithm: what is left is in a cycle, or depends on one
        one = free.pop()
        del open_needs[one]
        for other in needed_by[one]:
            open_needs[other] -= 1
            if open_needs[other] == 0:
                free.append(other)
    cycles, seen = [], set[str]()
    for start in open_needs:
        path: list[str] = []
        one = start
        while one not in seen:
            seen.add(one)
            path.append(one)
            one = next(other for other in needs[one] if other in open_needs)
        if one in path:
            cycles.append(path[path.index(one) :])
    return cycles


def add(tx: Tx, ticket_id: str, depends_on: Iterable[str]) -> None:
    tx.many(INSERT, [{"ticket_id": ticket_id, "depends_on": other} for other in dict.fromkeys(depends_on)])


def depends_on(tx: Tx, ticket_id: str) -> list[str]:
    return [lenient(row.depends_on) or "" for row in tx.all(OF_TICKET, id=ticket_id)]
