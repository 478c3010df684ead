"""Snapshots of VMs as rows: which there are, on whose disk, and for how long. The files are the host's own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from swarm.base import versions
from swarm.errors import Conflict, NotFound
from swarm.model import Snapshot
from swarm.store.sandboxes import rows
from swarm.store.sandboxes.newest import newest
from swarm.store.sandboxes.rows import SNAPSHOT_COLUMNS, SNAPSHOT_FIELDS
from swarm.store.sandboxes.sandboxes import OF_PROJECT
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient, new_id, whole
from swarm.store.sql.transaction import Row, Tx
from swarm.store.sql.unique import unique
from swarm.store.tickets import events
from swarm.store.tickets.validation import shown, storable

SCANNED: Final = 10_000

INSERT: Final = Sql(
    f"INSERT INTO snapshots ({', '.join(SNAPSHOT_FIELDS)}) "
    f"VALUES ({', '.join(':now' if name == 'created_at' else ':' + name for name in SNAPSHOT_FIELDS)})"
)
_THERE: Final = "(n.expires_at IS NULL OR n.expires_at > :now_ms)"
_BY_ID: Final = Sql(f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.id = :id AND {_THERE}")
_BY_NAME: Final = Sql(
    f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.name = :name AND {_THERE} "
    f"AND {OF_PROJECT} ORDER BY n.created_at DESC, n.id DESC LIMIT 1"
)
_NAMED: Final = Sql(
    f"SELECT n.id FROM snapshots n WHERE n.name = :name AND n.project_id IS :project_id AND {_THERE} LIMIT 1"
)
_BY_BEGINNING: Final = Sql(
    f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.id >= :ref AND n.id < :end AND length(n.id) IN (32, 36) "
    f"AND {OF_PROJECT} ORDER BY n.id LIMIT 100"
)
_NAMES: Final = Sql("SELECT name FROM snapshots ORDER BY created_at DESC, id DESC LIMIT 500")
_OF_SANDBOX: Final = Sql(
    f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.sandbox_id = :id AND {_THERE} ORDER BY n.id DESC LIMIT :limit"
)
_OF_TICKET: Final = Sql(
    f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.ticket_id = :id AND {_THERE} ORDER BY n.id DESC LIMIT :limit"
)
_STARTING: Final = Sql(
    "SELECT id FROM sandboxes WHERE state NOT IN ('ended', 'lost') AND state = 'starting' AND snapshot_id = :id LIMIT 1"
)
_PAUSED: Final = Sql(
    "SELECT id FROM sandboxes WHERE id = :id AND state = 'paused' AND NOT EXISTS (SELECT 1 FROM snapshots o "
    "WHERE o.sandbox_id = sandboxes.id AND o.kind = 'pause' AND o.id > :than)"
)
_LIVE_RUN: Final = Sql(
    "SELECT id FROM workflow_runs WHERE ticket_id = :id AND status IN ('running', 'waiting') LIMIT 1"
)
_EXPIRE: Final = Sql("UPDATE snapshots SET expires_at = :now_ms WHERE id = :id")
_KEEP: Final = Sql("UPDATE snapshots SET name = :name, kind = :kind, expires_at = :expires_at WHERE id = :id")
# `step` snapshots have no time of their own: they live as long as their run. Those of attempts go with their ticket.
_OVER: Final = (
    Sql(
        f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.expires_at IS NOT NULL AND n.expires_at <= :now_ms "
        "AND n.host = :host ORDER BY n.expires_at LIMIT :limit"
    ),
    Sql(
        f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.kind = 'step' AND n.host = :host AND NOT EXISTS "
        "(SELECT 1 FROM workflow_runs r WHERE r.ticket_id = n.ticket_id AND r.status IN ('running', 'waiting')) "
        "LIMIT :limit"
    ),
    Sql(
        f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.kind = 'attempt' AND n.host = :host AND NOT EXISTS "
        "(SELECT 1 FROM tickets t WHERE t.id = n.ticket_id) LIMIT :limit"
    ),
)
_FORGET: Final = Sql("DELETE FROM snapshots WHERE id = :id")
_OF_HOST: Final = Sql("SELECT id FROM snapshots WHERE host = :host OR :host IS NULL")


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFilter:
    kinds: tuple[str, ...] = ()
    project_id: str | None = None
    host: str | None = None
    sandbox_id: str | None = None
    ticket_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPage:
    """``after``: where the next page starts; None at the end."""

    snapshots: list[Snapshot]
    after: str | None


def values(one: Snapshot) -> dict[str, Any]:
    return asdict(one)


def add(tx: Tx, one: Snapshot, *, keep_seconds: float | None = None, by: str | None = None) -> Snapshot:
    """``keep_seconds``: for how long; None: as its ``expires_at`` says. Raises Conflict when a snapshot that is there
    has its name."""
    one = replace(one, id=one.id or new_id(tx.now_ms), created_by=one.created_by or by)
    if keep_seconds is not None:
        one = replace(one, expires_at=tx.now_ms + round(keep_seconds * 1000))
    named = {"name": one.name, "project_id": one.project_id, "now_ms": tx.now_ms}
    if one.name is not None and (other := tx.first(_NAMED, **named)):
        raise Conflict(f"the snapshot {shown(other.id)} has the name {shown(one.name)}; choose another one")
    tx.run(INSERT, **values(one), now=tx.now)
    if by is not None:
        events.record(
            tx, "snapshot.add", by=by, ticket_id=one.ticket_id or "", sandbox_id=one.sandbox_id, id=one.id,
            name=one.name, kind=one.kind, size_bytes=one.size_bytes,
        )  # fmt: skip
    return replace(one, created_at=tx.now)


def snapshot(tx: Tx, ref: str, *, project_id: str | None = None) -> Snapshot:
    """By id, by name (the newest), or by the beginning of a generated id. With a ``project_id``, there are no others.
    Raises NotFound."""
    return rows.snapshot(_find(tx, ref, project_id))


def _find(tx: Tx, ref: str, project_id: str | None) -> Row:
    def visible(row: Row | None) -> bool:
        return row is not None and project_id in (None, row.project_id)

    row = None
    if storable(ref):
        row = tx.first(_BY_ID, id=ref, now_ms=tx.now_ms)
        if not visible(row):
            row = tx.first(_BY_NAME, name=ref, project_id=project_id, now_ms=tx.now_ms)
        if row is None:
            row = unique(tx, _BY_BEGINNING, ref, "snapshots", project_id=project_id)
            until = whole(row.expires_at) if row is not None else None
            row = None if until is not None and until <= tx.now_ms else row
    if row is None or not visible(row):
        hint = ""
        if project_id is None:
            hint = versions.did_you_mean(ref, list({str(lenient(one.name)) for one in tx.all(_NAMES) if one.name}))
        raise NotFound(f"no snapshot {shown(ref)}{hint or '; `swarm snapshot list` shows all'}")
    return row


def page(tx: Tx, which: SnapshotFilter, *, after: str | None, limit: int) -> SnapshotPage:
    """Of those that have not expired, newest first; looks at `SCANNED` at most."""
    inside, terms, named = list[str](), [_THERE], dict[str, Any](now_ms=tx.now_ms)
    for name in ("sandbox_id", "ticket_id", "project_id", "host"):
        if getattr(which, name) is not None:
            (inside if name in ("sandbox_id", "ticket_id") else terms).append(f"n.{name} = :{name}")
            named[name] = getattr(which, name)
    if which.kinds:
        kinds = {f"kind_{number}": kind for number, kind in enumerate(which.kinds)}
        terms.append(f"n.kind IN ({', '.join(':' + one for one in kinds)})")
        named |= kinds
    found, after = newest(
        tx, "snapshots", SNAPSHOT_COLUMNS,
        inside=inside, terms=terms, named=named, after=after, limit=limit, scanned=SCANNED,
    )  # fmt: skip
    return SnapshotPage(snapshots=[rows.snapshot(row) for row in found], after=after)


def used_by(tx: Tx, one: Snapshot) -> str:
    """Who needs it, in a few words; '' if nobody does."""
    if (row := tx.first(_STARTING, id=one.id)) is not None:
        return f"the sandbox {shown(row.id)} starts from it"
    paused = tx.first(_PAUSED, id=one.sandbox_id, than=one.id) if one.kind == "pause" else None
    if paused is not None:
        return f"the sandbox {shown(paused.id)} is paused to it"
    waits = one.kind == "step" and one.expires_at is None
    if waits and one.ticket_id is not None and tx.first(_LIVE_RUN, id=one.ticket_id) is not None:
        return f"the ticket {shown(one.ticket_id)} may start steps from it"
    return ""


def remove(tx: Tx, ref: str, *, by: str, project_id: str | None = None) -> Snapshot:
    """It expires now; its host removes the files. Raises NotFound, and Conflict while it is in use."""
    one = rows.snapshot(_find(tx, ref, project_id))
    if used := used_by(tx, one):
        raise Conflict(f"the snapshot {shown(one.id)} is in use: {used}")
    tx.run(_EXPIRE, id=one.id, now_ms=tx.now_ms)
    events.record(
        tx, "snapshot.remove", by=by, ticket_id=one.ticket_id or "", sandbox_id=one.sandbox_id, id=one.id, name=one.name
    )
    return one


def expired(tx: Tx, *, host: str, limit: int) -> list[Snapshot]:
    """Of this host, those that nobody needs: their files are to be removed, and then they are to be forgotten."""
    found = {row.id: row for statement in _OVER for row in tx.all(statement, host=host, now_ms=tx.now_ms, limit=limit)}
    some = [rows.snapshot(row) for row in found.values()]
    return [one for one in some if not used_by(tx, one)][:limit]


def forget(tx: Tx, ids: Collection[str]) -> None:
    """Their files are gone."""
    tx.many(_FORGET, [{"id": id} for id in ids])


def of_host(tx: Tx, host: str | None) -> set[str]:
    """Ids of all whose files are to be on this host's disk; None: on any host's."""
    return {str(lenient(row.id)) for row in tx.all(_OF_HOST, host=host)}
