"""The machines that engines run on. Each has an id, which is kept on the machine, and a name that no other one has:
the text with which other rows (workers, sandboxes, snapshots) say where something is.

An engine registers its host when it starts, and renews the row with its own heartbeat. Two machines may have one id,
when a disk is cloned: they differ by their boots, and only one may live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from swarm.errors import Conflict, NotFound
from swarm.model import SandboxState
from swarm.store.registry import host_files, workers
from swarm.store.registry.workers import SILENT_AFTER_SECONDS
from swarm.store.sandboxes.changes import end, last_snapshot
from swarm.store.sql.conditions import ATTEMPT_LIVE, SANDBOX_HELD, SANDBOX_LIVE
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import HostRow, dump, flag, iso, lenient, parsed
from swarm.store.sql.transaction import Row, Tx
from swarm.store.tickets import events
from swarm.store.tickets.validation import shown

_COLUMNS: Final = (
    "id, name, labels, capacity, versions, machine_id, boot_id, generation, seen_at, draining, drain_until, "
    "drained_by, drained_at, created_at"
)
_ALL: Final = Sql(f"SELECT {_COLUMNS} FROM hosts ORDER BY name, id")
_BY_ID: Final = Sql(f"SELECT {_COLUMNS} FROM hosts WHERE id = :id")
_BY_NAME: Final = Sql(f"SELECT {_COLUMNS} FROM hosts WHERE name = :name")
_INSERT: Final = Sql(
    "INSERT INTO hosts (id, name, labels, capacity, versions, machine_id, boot_id, seen_at) "
    "VALUES (:id, :name, :labels, :capacity, :versions, :machine_id, :boot_id, :now_ms)"
)
_UPDATE: Final = Sql(
    "UPDATE hosts SET id = :id, labels = :labels, capacity = :capacity, versions = :versions, "
    "machine_id = :machine_id, boot_id = :boot_id, generation = :generation, seen_at = :now_ms WHERE id = :old_id"
)
_HEARD: Final = Sql("SELECT max(seen_at) AS at FROM workers WHERE host = :name AND seen_at > :since")
_SEEN: Final = Sql("UPDATE hosts SET seen_at = :now_ms WHERE id = :id AND boot_id = :boot_id")
_DRAIN: Final = Sql(
    "UPDATE hosts SET draining = :draining, drain_until = :until, drained_by = :by, drained_at = :at WHERE id = :id"
)
_DELETE: Final = Sql("DELETE FROM hosts WHERE id = :id")
_WORKERS: Final = Sql("SELECT id FROM workers WHERE host = :name")
_HOLDS: Final = Sql(
    f"SELECT (SELECT count(*) FROM attempts WHERE {ATTEMPT_LIVE} AND worker IN "
    "(SELECT id FROM workers WHERE host = :name)) AS attempts, "
    f"(SELECT count(*) FROM sandboxes WHERE {SANDBOX_HELD} AND host = :name) AS sandboxes, "
    f"(SELECT count(*) FROM sandboxes WHERE {SANDBOX_LIVE} AND state = 'paused' AND host = :name) AS paused, "
    "(SELECT count(*) FROM snapshots WHERE host = :name AND kind IN ('named', 'attempt')) AS snapshots"
)
_PAUSED: Final = Sql(
    f"SELECT id, state, hold_id FROM sandboxes WHERE {SANDBOX_LIVE} AND state = 'paused' AND host = :name"
)
_DELETE_SNAPSHOTS: Final = Sql("DELETE FROM snapshots WHERE host = :name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What an engine says of the machine that it starts on. ``name``: of its operating system."""

    id: str
    name: str
    machine_id: str
    boot_id: str
    labels: Mapping[str, Any]
    capacity: Mapping[str, Any]
    versions: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostState:
    """What an engine hears of its host. ``put_back_seconds``: until what still runs here is put back; None: never.
    ``other``: another machine has the host's id, and is the one that counts."""

    name: str
    draining: bool = False
    put_back_seconds: float | None = None
    other: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """What depends on a host: attempts and sandboxes that run there, sandboxes that are paused there, and snapshots
    that somebody keeps."""

    attempts: int
    sandboxes: int
    paused: int
    snapshots: int

    def __str__(self) -> str:
        named = {
            "running step": self.attempts,
            "running sandbox": self.sandboxes,
            "paused sandbox": self.paused,
            "snapshot": self.snapshots,
        }
        said = [f"{n} {one}{'' if n == 1 else 'es' if one.endswith('x') else 's'}" for one, n in named.items() if n]
        return " and ".join(filter(None, [", ".join(said[:-1]), *said[-1:]]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """Another machine with this id is said to live, heard last at this time."""

    name: str
    heard: str


def register(tx: Tx, machine: Machine) -> HostState | Alive:
    """The host's row, new or as it was. It is the next generation after another boot, unless the machine that booted
    then is alive still. A machine whose id got lost with its state directory is known by its name and machine id."""
    row = tx.first(_BY_ID, id=machine.id)
    if row is None:
        former = tx.first(_BY_NAME, name=machine.name)
        if former is None:
            return _insert(tx, machine, machine.name)
        if not machine.machine_id or former.machine_id != machine.machine_id or _heard(tx, former) is not None:
            return _insert(tx, machine, f"{machine.name}-{machine.id[:8]}")
        row = former
    booted = row.boot_id != machine.boot_id
    if booted and (heard := _heard(tx, row)) is not None:
        return Alive(name=row.name, heard=heard)
    generation = (row.generation if isinstance(row.generation, int) else 0) + booted
    tx.run(_UPDATE, old_id=row.id, generation=generation, **_values(tx, machine))
    return _state(tx, row)


def _insert(tx: Tx, machine: Machine, name: str) -> HostState:
    tx.run(_INSERT, name=name, **_values(tx, machine))
    return HostState(name=name)


def _values(tx: Tx, machine: Machine) -> dict[str, object]:
    return {
        "id": machine.id,
        "labels": dump(dict(machine.labels)),
        "capacity": dump(dict(machine.capacity)),
        "versions": dump(dict(machine.versions)),
        "machine_id": machine.machine_id,
        "boot_id": machine.boot_id,
        "now_ms": tx.now_ms,
    }


def _heard(tx: Tx, row: Row) -> str | None:
    """When an engine of the host was heard last, if that is not long ago."""
    found = tx.first(_HEARD, name=row.name, since=iso(tx.now_ms - round(SILENT_AFTER_SECONDS * 1000)))
    return str(found.at) if found is not None and found.at is not None else None


def heartbeat(
    tx: Tx, worker: str, *, host: str, pid: int, info: Mapping[str, Any], machine: Machine | None
) -> HostState | None:
    """An engine lives, and so does its host. None: the host has no row (any more)."""
    workers.heartbeat(tx, worker, host=host, pid=pid, info=info)
    if machine is None:
        return HostState(name=host)
    tx.run(_SEEN, id=machine.id, boot_id=machine.boot_id, now_ms=tx.now_ms)
    row = tx.first(_BY_ID, id=machine.id)
    if row is None:
        return None
    return _state(tx, row, other=row.boot_id != machine.boot_id)


def _state(tx: Tx, row: Row, *, other: bool = False) -> HostState:
    until, draining = row.drain_until, flag(row.draining)
    left = (until - tx.now_ms) / 1000 if draining and isinstance(until, int) else None
    return HostState(name=row.name, draining=draining, put_back_seconds=left, other=other)


def name_of(tx: Tx, id: str) -> str:
    row = tx.first(_BY_ID, id=id)
    return "" if row is None else str(row.name)


def hosts(tx: Tx) -> list[HostRow]:
    return [_host(tx, row) for row in tx.all(_ALL)]


def host(tx: Tx, ref: str) -> HostRow:
    """By name, id, or how the id begins. Raises NotFound, Conflict."""
    return _host(tx, _find(tx, ref))


def _host(tx: Tx, row: Row) -> HostRow:
    seen, until = row.seen_at, row.drain_until
    return HostRow(
        id=lenient(row.id) or "",
        name=lenient(row.name) or "",
        labels=_object(row.labels),
        capacity=_object(row.capacity),
        versions=_object(row.versions),
        generation=row.generation if isinstance(row.generation, int) else 0,
        seen_ms_ago=float(tx.now_ms - (seen if isinstance(seen, int) else 0)),
        draining=flag(row.draining),
        put_back_seconds=(until - tx.now_ms) / 1000 if flag(row.draining) and isinstance(until, int) else None,
        drained_by=lenient(row.drained_by),
        drained_at=lenient(row.drained_at),
        created_at=lenient(row.created_at),
    )


def _object(text: object) -> dict[str, Any]:
    return parsed(text, dict) or {}


def _find(tx: Tx, ref: str) -> Row:
    rows = tx.all(_ALL)  # a few
    found = [row for row in rows if ref in (row.name, row.id)] or [
        row for row in rows if str(row.id).startswith(ref) and ref
    ]
    if len(found) > 1:
        raise Conflict(f"the ids of {len(found)} hosts begin with {shown(ref)}: say more of it, or the host's name")
    if not found:
        names = ", ".join(shown(row.name) for row in rows[:20]) or "no engine has registered one yet"
        raise NotFound(f"there is no host {shown(ref)}: {names}")
    return found[0]


def drain(tx: Tx, ref: str, *, by: str, within_seconds: float | None) -> HostRow:
    """Let its engines start nothing more. What runs there is put back after so many seconds; None: it ends by itself.
    One that is being drained gets the new time."""
    row = _find(tx, ref)
    until = None if within_seconds is None else tx.now_ms + round(within_seconds * 1000)
    tx.run(_DRAIN, id=row.id, draining=True, until=until, by=by, at=tx.now)
    events.record(tx, "host.drain", by=by, name=row.name, within_seconds=within_seconds)
    return host(tx, row.id)


def undrain(tx: Tx, ref: str, *, by: str) -> HostRow:
    row = _find(tx, ref)
    if flag(row.draining):
        tx.run(_DRAIN, id=row.id, draining=False, until=None, by=None, at=None)
        events.record(tx, "host.undrain", by=by, name=row.name)
    return host(tx, row.id)


def holds(tx: Tx, name: str) -> Holds:
    row = tx.first(_HOLDS, name=name)
    assert row is not None
    return Holds(attempts=row.attempts, sandboxes=row.sandboxes, paused=row.paused, snapshots=row.snapshots)


def remove(tx: Tx, ref: str, *, by: str, force: bool) -> tuple[HostRow, Holds]:
    """Forget a host that is gone, and return what it still held: what ran there is taken over by others now, what was
    paused there is lost, and steps that waited for a VM there fail when they are claimed. Raises NotFound, and Conflict
    for one that lives, unless ``force``."""
    row = _find(tx, ref)
    if not force and _heard(tx, row) is not None:
        raise Conflict(
            f"an engine of the host {shown(row.name)} is alive: `swarm host drain {shown(row.name)} --wait`, and stop "
            "it there; or remove the host by force, if that engine is none of yours"
        )
    gone, held = _host(tx, row), holds(tx, row.name)
    workers.bury(tx, [one.id for one in tx.all(_WORKERS, name=row.name)])
    tx.run(_DELETE_SNAPSHOTS, name=row.name)
    for paused in tx.all(_PAUSED, name=row.name):
        error = f"it was paused on the host {shown(row.name)}, which was removed; {last_snapshot(tx, paused.id)}"
        end(tx, paused, SandboxState.LOST, error=error, why="its host was removed")
    host_files.withdraw(tx, row.name)
    tx.run(_DELETE, id=row.id)
    events.record(tx, "host.rm", by=by, name=row.name, forced=force or None)
    return gone, held
