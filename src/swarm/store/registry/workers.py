"""Workers and their last sign of life. For display; leases decide who owns an attempt. Only an engine that has surely
ended, on this host, need not be waited for until its leases do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from swarm.base import process
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import WorkerRow, dump, milliseconds, parsed, value
from swarm.store.sql.transaction import Tx

# A live engine updates its row every 2 s; one that has not for this long is frozen, dead, or on a host that is down.
SILENT_AFTER_SECONDS: Final = 15.0

_HEARTBEAT: Final = Sql(
    "INSERT INTO workers (id, host, pid, started_at, seen_at, info) VALUES (:id, :host, :pid, :now, :now, :info) "
    "ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at, info = excluded.info"
)
_ALL: Final = Sql("SELECT id, host, pid, started_at, seen_at, info FROM workers ORDER BY started_at, id")
_DELETE: Final = Sql("DELETE FROM workers WHERE id = :id")
_END_LEASES: Final = Sql(
    "UPDATE attempts SET lease_until = :now_ms WHERE outcome IS NULL AND worker = :id AND lease_until > :now_ms"
)
_END_HOLDS: Final = Sql(
    "UPDATE sandboxes SET lease_until = :now_ms WHERE hold_id IS NOT NULL AND worker = :id AND lease_until > :now_ms"
)


def heartbeat(tx: Tx, worker: str, *, host: str, pid: int, info: Mapping[str, Any]) -> None:
    tx.run(_HEARTBEAT, id=worker, host=host, pid=pid, info=dump(dict(info)), now=tx.now)


def workers(tx: Tx) -> list[WorkerRow]:
    return [
        value(
            WorkerRow,
            row,
            seen_ms_ago=float(tx.now_ms - (milliseconds(row.seen_at) or 0)),
            info=_info(row.info),
        )
        for row in tx.all(_ALL)
    ]


def is_alive(row: WorkerRow) -> bool:
    return row.seen_ms_ago < SILENT_AFTER_SECONDS * 1000 and not has_died(row)


def has_died(row: WorkerRow) -> bool:
    """Surely, and so before it has been silent for long: its process was counted where ours is (this boot, these
    namespaces), and has ended."""
    return row.id in _died([(row.id, row.pid, row.info)])


def _info(text: object) -> dict[str, Any]:
    return parsed(text, dict) or {}


def dead(tx: Tx) -> list[str]:
    """The workers that have died, as `has_died` says."""
    return [id_ for id_ in _died([(row.id, row.pid, _info(row.info)) for row in tx.all(_ALL)]) if id_.isascii()]


def _died(rows: Iterable[tuple[object, object, Mapping[str, Any]]]) -> list[str]:
    try:
        here = process.machine()
    except OSError:  # no descriptor left: it can't be told now
        return []
    return [
        str(id_)
        for id_, pid, info in rows
        if here and info.get("machine") == here and process.has_ended(pid, info.get("started"))
    ]


def bury(tx: Tx, ids: Sequence[str]) -> None:
    """End the leases of dead workers, so that the next claim takes their steps and sandboxes over, and forget them."""
    for statement in (_END_LEASES, _END_HOLDS):
        tx.many(statement, [{"id": id_, "now_ms": tx.now_ms} for id_ in ids])
    tx.many(_DELETE, [{"id": id_} for id_ in ids])


def forget_worker(tx: Tx, worker: str) -> None:
    tx.run(_DELETE, id=worker)
