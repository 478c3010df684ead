"""What happens to a sandbox's row, each together with its event; and the fence, which every write by its holder must
pass: the row has the holder's ``hold_id``."""

from __future__ import annotations

from typing import Final

from swarm.model import SandboxState, Snapshot
from swarm.store.sandboxes import rows
from swarm.store.sandboxes.rows import SNAPSHOT_COLUMNS
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import dump, lenient, message
from swarm.store.sql.transaction import Row, Tx, one_row
from swarm.store.tickets.validation import storable

EVENT: Final = one_row(
    "INSERT INTO events (ticket_id, sandbox_id, at, kind, data) VALUES ('', :sandbox_id, :at, :kind, :data)"
)
_END: Final = one_row(
    "UPDATE sandboxes SET state = :state, error = :error, ended_at = :now, wanted = NULL, hold_id = NULL, "
    "lease_until = NULL, vm_id = NULL WHERE id = :id"
)
_END_BY_BYTES: Final = Sql(
    "UPDATE sandboxes SET state = 'ended', error = :error, ended_at = :now, wanted = NULL, hold_id = NULL, "
    "lease_until = NULL, vm_id = NULL WHERE id = :raw OR id = CAST(:raw AS TEXT)"
)
# Its pause is over with it. What forks begin with stays until they have begun.
_EXPIRE: Final = Sql("UPDATE snapshots SET expires_at = :now_ms WHERE sandbox_id = :id AND kind = 'pause'")
_OWN: Final = Sql(
    f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.sandbox_id = :id AND n.kind = 'pause' "
    "AND (n.expires_at IS NULL OR n.expires_at > :now_ms) ORDER BY n.created_at DESC, n.id DESC LIMIT 1"
)
_LAST: Final = Sql(
    "SELECT n.id, n.name, n.created_at FROM snapshots n WHERE n.sandbox_id = :id AND n.kind = 'named' "
    "AND (n.expires_at IS NULL OR n.expires_at > :now_ms) ORDER BY n.created_at DESC, n.id DESC LIMIT 1"
)


def event(tx: Tx, id: str, kind: str, **data: object) -> None:
    found = {name: value for name, value in data.items() if value is not None}
    tx.run(EVENT, sandbox_id=id, at=tx.now, kind=kind, data=dump(found))


def transition(tx: Tx, id: str, before: object, after: str, **details: object) -> None:
    data = {"of": "sandbox", "from": lenient(before), "to": str(after)}
    found = {name: value for name, value in details.items() if value is not None}
    tx.run(EVENT, sandbox_id=id, at=tx.now, kind="transition", data=dump(data | found))


def end(tx: Tx, row: Row, state: SandboxState, *, error: str | None = None, why: str | None = None) -> None:
    """A row of `sandboxes` ends. If its id is not valid text, it is found by its bytes."""
    error, id = message(error), row.id
    if isinstance(id, str) and storable(id):
        tx.run(_END, id=id, state=str(state), error=error, now=tx.now)
        tx.run(_EXPIRE, id=id, now_ms=tx.now_ms)
    else:
        raw = id if isinstance(id, bytes) else str(id).encode("utf-8", "surrogateescape")
        tx.run(_END_BY_BYTES, raw=raw, error=error, now=tx.now)
    hold = lenient(row.hold_id)
    transition(tx, str(lenient(id)), row.state, state, hold=hold, why=why, error=error)


def own_snapshot(tx: Tx, id: str) -> Snapshot | None:
    """Of its pause."""
    row = tx.first(_OWN, id=id, now_ms=tx.now_ms)
    return None if row is None else rows.snapshot(row)


def last_snapshot(tx: Tx, id: str) -> str:
    """A sentence on what a lost one can be started from again."""
    row = tx.first(_LAST, id=id, now_ms=tx.now_ms)
    if row is None:
        return "it has no snapshot to go on from"
    name, at = lenient(row.name) or lenient(row.id), lenient(row.created_at)
    return f"its last snapshot is {name}, of {at}: `swarm sandbox create --from {name}` goes on from it"
