"""Workers and their last sign of life. For display; leases decide who owns an attempt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa

from swarm.store.sql.database import Tx
from swarm.store.sql.rows import WorkerRow, dump, milliseconds, value

_HEARTBEAT: Final = sa.text(
    "INSERT INTO workers (id, host, pid, started_at, seen_at, info) VALUES (:id, :host, :pid, :now, :now, :info) "
    "ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at, info = excluded.info"
)
_ALL: Final = sa.text("SELECT id, host, pid, started_at, seen_at, info FROM workers ORDER BY started_at, id")
_DELETE: Final = sa.text("DELETE FROM workers WHERE id = :id")


def heartbeat(tx: Tx, worker: str, *, host: str, pid: int, info: Mapping[str, Any]) -> None:
    tx.run(_HEARTBEAT, id=worker, host=host, pid=pid, info=dump(dict(info)), now=tx.now)


def workers(tx: Tx) -> list[WorkerRow]:
    return [
        value(
            WorkerRow,
            row,
            seen_ms_ago=float(tx.now_ms - (milliseconds(row.seen_at) or 0)),
            info=json.loads(row.info),
        )
        for row in tx.all(_ALL)
    ]


def forget_worker(tx: Tx, worker: str) -> None:
    tx.run(_DELETE, id=worker)
