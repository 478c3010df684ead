"""The event log: appended to in batches, read by ticket or sandbox, pruned by age."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarm.base import jsontext
from swarm.model import Event, ExecutionMode
from swarm.store.sql import rows
from swarm.store.sql.conditions import SANDBOX_LIVE
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import iso
from swarm.store.sql.transaction import Tx

_COLUMNS: Final = "e.seq, e.ticket_id, e.step_id, e.attempt_id, e.sandbox_id, e.at, e.kind, e.data"
# Output that arrives after its ticket was deleted is dropped.
APPEND: Final = Sql(
    "INSERT INTO events (ticket_id, step_id, attempt_id, at, kind, data) "
    "SELECT id, :step_id, :attempt_id, :at, :kind, :data FROM tickets WHERE id = :ticket_id"
)
APPEND_OF_SANDBOX: Final = Sql(
    "INSERT INTO events (ticket_id, sandbox_id, at, kind, data) "
    "SELECT '', id, :at, :kind, :data FROM sandboxes WHERE id = :sandbox_id"
)
RECORD: Final = Sql(
    "INSERT INTO events (ticket_id, sandbox_id, at, kind, data) VALUES (:ticket_id, :sandbox_id, :at, 'change', :data)"
)
# An id may be used again after its ticket was deleted: events of the old ticket are left out.
OF_TICKET: Final = Sql(
    f"SELECT {_COLUMNS} FROM events e WHERE e.ticket_id = :id AND e.seq > :after AND e.seq <= :up_to "
    "AND e.seq > COALESCE((SELECT max(d.seq) FROM events d WHERE d.ticket_id = :id AND d.kind = 'deleted'), 0) "
    "ORDER BY e.seq LIMIT :limit"
)
OF_SANDBOX: Final = Sql(
    f"SELECT {_COLUMNS} FROM events e WHERE e.sandbox_id = :id AND e.seq > :after AND e.seq <= :up_to "
    "AND e.seq > COALESCE((SELECT max(d.seq) FROM events d WHERE d.sandbox_id = :id AND d.kind = 'deleted'), 0) "
    "ORDER BY e.seq LIMIT :limit"
)
LAST_OF_SANDBOX: Final = Sql(
    f"SELECT {_COLUMNS} FROM events e WHERE e.sandbox_id = :id AND e.seq > COALESCE("
    "(SELECT max(d.seq) FROM events d WHERE d.sandbox_id = :id AND d.kind = 'deleted'), 0) "
    "ORDER BY e.seq DESC LIMIT :limit"
)
_LAST: Final = Sql("SELECT COALESCE(max(seq), 0) AS seq FROM events WHERE ticket_id = :id AND seq <= :up_to")
_LOOKED_AT: Final = (
    "SELECT seq, ticket_id, sandbox_id, kind FROM events WHERE seq > :after AND seq <= :up_to ORDER BY seq "
    "LIMIT :scanned"
)
_LAST_LOOKED_AT: Final = Sql(f"SELECT COALESCE(max(seq), :after) AS seq FROM ({_LOOKED_AT}) e")
_SCANNED: Final = 2000
_NEWEST: Final = Sql("SELECT COALESCE(max(seq), 0) AS seq FROM events WHERE seq <= :up_to")
_TICKETS: Final = Sql(
    "SELECT seq, ticket_id, sandbox_id FROM events WHERE seq > :after AND seq <= :up_to ORDER BY seq LIMIT :limit"
)
OF_ALL: Final = Sql(
    f"SELECT {_COLUMNS} FROM events e WHERE e.seq > :after AND e.seq <= :up_to ORDER BY e.seq LIMIT :limit"
)
# What an attempt left, once it has ended. That of a lost one is another's by now.
_FILES: Final = Sql(
    "SELECT e.step_id, e.data, t.execution_mode FROM events e JOIN attempts a ON a.id = e.attempt_id "
    "JOIN tickets t ON t.id = e.ticket_id WHERE e.ticket_id = :id AND e.kind = 'files' "
    "AND a.outcome IS NOT NULL AND a.outcome <> 'lost' ORDER BY e.seq"
)
_OLDEST: Final = Sql(
    "SELECT seq, at, ticket_id, sandbox_id, kind FROM events WHERE seq > :after ORDER BY seq LIMIT :limit"
)
_UNFINISHED: Final = Sql("SELECT id FROM tickets WHERE id IN :ids AND state NOT IN ('done', 'failed', 'cancelled')")
_LIVE_SANDBOXES: Final = Sql(f"SELECT id FROM sandboxes WHERE id IN :ids AND {SANDBOX_LIVE}")
_EXISTING: Final = Sql("SELECT id FROM tickets WHERE id IN :ids")
_DELETE: Final = Sql("DELETE FROM events WHERE seq = :seq")
PRUNE_DEFINITIONS: Final = Sql(
    "DELETE FROM definitions WHERE NOT EXISTS (SELECT 1 FROM workflow_runs r WHERE r.definition = definitions.digest)"
)
_PRUNED_AT_ONCE: Final = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    removed: int
    after: int | None  # where the next batch starts; None at the end


def events(tx: Tx, ticket_id: str | None, *, after: int, up_to: int, limit: int) -> list[Event]:
    """``up_to``, here and below: `Settled.newest`."""
    if ticket_id is None:
        found = tx.all(OF_ALL, after=after, up_to=up_to, limit=limit)
    else:
        found = tx.all(OF_TICKET, id=ticket_id, after=after, up_to=up_to, limit=limit)
    return [rows.event(row) for row in found]


def of_sandbox(tx: Tx, id: str, *, after: int, up_to: int, limit: int) -> list[Event]:
    return [rows.event(row) for row in tx.all(OF_SANDBOX, id=id, after=after, up_to=up_to, limit=limit)]


def last_of_sandbox(tx: Tx, id: str, *, limit: int) -> list[Event]:
    return [rows.event(row) for row in tx.all(LAST_OF_SANDBOX, id=id, limit=limit)]


def record(
    tx: Tx, /, did: str, *, by: str, ticket_id: str = "", sandbox_id: str | None = None, **details: object
) -> None:
    """Who changed what, such as 'agent.add': of a ticket, or of something else, whose events have no ticket."""
    data = {"did": did, "by": by, **{name: each for name, each in details.items() if each is not None}}
    tx.run(RECORD, ticket_id=ticket_id, sandbox_id=sandbox_id, at=tx.now, data=rows.dump(data))


def last_event(tx: Tx, ticket_id: str, *, up_to: int) -> int:
    (row,) = tx.all(_LAST, id=ticket_id, up_to=up_to)
    return int(row.seq)


def all_events(
    tx: Tx, *, after: int, up_to: int, limit: int, project_id: str | None, kinds: Sequence[str]
) -> tuple[list[Event], int]:
    """Some of those after ``after``, and where the next ones begin."""
    named = {f"kind_{number}": kind for number, kind in enumerate(kinds)}
    terms = [f"s.kind IN ({', '.join(':' + name for name in named)})"] if kinds else []
    if project_id is not None:
        terms.append(
            "(EXISTS (SELECT 1 FROM tickets t WHERE t.id = s.ticket_id AND t.project_id = :project_id) OR "
            "EXISTS (SELECT 1 FROM sandboxes b WHERE b.id = s.sandbox_id AND b.project_id = :project_id))"
        )
        named["project_id"] = project_id
    found = tx.all(
        Sql(
            f"SELECT {_COLUMNS} FROM ({_LOOKED_AT}) s JOIN events e ON e.seq = s.seq "
            f"WHERE {' AND '.join(terms) or '1 = 1'} ORDER BY s.seq LIMIT :limit"
        ),
        after=after,
        up_to=up_to,
        scanned=_SCANNED,
        limit=limit,
        **named,
    )
    if len(found) == limit:
        return [rows.event(row) for row in found], found[-1].seq
    (last,) = tx.all(_LAST_LOOKED_AT, after=after, up_to=up_to, scanned=_SCANNED)
    return [rows.event(row) for row in found], int(last.seq)


def newest(tx: Tx, *, up_to: int) -> int:
    (row,) = tx.all(_NEWEST, up_to=up_to)
    return int(row.seq)


def tickets_with_events(tx: Tx, *, after: int | None, up_to: int, limit: int) -> tuple[int, set[str] | None]:
    """The newest event, and the tickets and sandboxes of those after ``after``; None if not known, or too many."""
    if after is not None:
        found = tx.all(_TICKETS, after=after, up_to=up_to, limit=limit)
        if len(found) < limit:
            of = {id for row in found for id in (row.ticket_id, row.sandbox_id) if id}
            return found[-1].seq if found else after, of
    return newest(tx, up_to=up_to), None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftFiles:
    """What the last attempt of a step left in /work/out. ``prefix``: of its names in the ticket. ``left_out``: names
    and sizes of some that were not kept; not ``complete``: there were more."""

    digest: str
    prefix: str
    left_out: tuple[tuple[str, int], ...]
    complete: bool


def files(tx: Tx, ticket_id: str) -> list[LeftFiles]:
    found: dict[str, LeftFiles] = {}
    for row in tx.all(_FILES, id=ticket_id):
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):  # another program wrote it
            data = jsontext.loads(row.data)
            left_out = tuple((str(one["name"]), int(one["bytes"])) for one in data["left_out"])
            (digest,) = data["trees"].values()
            found[row.step_id] = LeftFiles(
                digest=str(digest),
                prefix=f"{row.step_id}/" if row.execution_mode == ExecutionMode.WORKFLOW else "",
                left_out=left_out,
                complete=data["complete"] is True and data["left_out_files"] == len(left_out),
            )
    return list(found.values())


def prune(tx: Tx, *, older_than_seconds: float, after: int) -> Pruned:
    """One batch, so that other writers get a turn in between. Tickets and sandboxes that have not ended keep their
    history, and all tickets keep the lists of their files."""
    before = iso(tx.now_ms - round(older_than_seconds * 1000))
    oldest = tx.all(_OLDEST, after=after, limit=_PRUNED_AT_ONCE)
    old = [row for row in oldest if row.at < before]
    kept = {row.id for row in tx.all_in(_UNFINISHED, {row.ticket_id for row in old if isinstance(row.ticket_id, str)})}
    live = {row.sandbox_id for row in old if isinstance(row.sandbox_id, str)}
    live = {row.id for row in tx.all_in(_LIVE_SANDBOXES, live)} if live else live
    lists = {row.ticket_id for row in old if row.kind == "files" and isinstance(row.ticket_id, str)}
    named = {row.id for row in tx.all_in(_EXISTING, lists)} if lists else set()
    gone = [
        {"seq": row.seq}
        for row in old
        if row.ticket_id not in kept
        and row.sandbox_id not in live
        and not (row.kind == "files" and row.ticket_id in named)
    ]
    tx.many(_DELETE, gone)
    more = len(oldest) == _PRUNED_AT_ONCE and len(old) == len(oldest)
    if not more:
        tx.run(PRUNE_DEFINITIONS)  # frozen workflows without any run left
    return Pruned(removed=len(gone), after=oldest[-1].seq if more else None)
