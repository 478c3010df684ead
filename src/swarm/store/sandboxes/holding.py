"""Who holds a sandbox: taken under a lease, renewed, given up. One short transaction each; every write by a holder
names its `hold_id`, and passes the fence in the same transaction.

Whose lease has ended is read first, without the write lock (`expired`); each is looked at again where it is given up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from swarm.errors import LeaseLost
from swarm.model import TERMINAL_SANDBOX_STATES, SandboxState, Snapshot
from swarm.store.sandboxes import rows
from swarm.store.sandboxes.changes import end, event, last_snapshot, transition
from swarm.store.sandboxes.rows import SANDBOX_COLUMNS
from swarm.store.sandboxes.snapshots import INSERT as INSERT_SNAPSHOT
from swarm.store.sandboxes.snapshots import values as snapshot_values
from swarm.store.sql.conditions import SANDBOX_HELD
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient, message
from swarm.store.sql.transaction import Row, Tx, one_row, untold
from swarm.store.tickets.changes import MENDED
from swarm.store.tickets.validation import BadRow, shown, storable

TRIES: Final = 5  # engines in a row that may die while they start it, or resume it
_AT_ONCE: Final = 100

ROW: Final = f"SELECT {SANDBOX_COLUMNS}, b.lease_until FROM sandboxes b WHERE "
BY_ID: Final = Sql(ROW + "b.id = :id")
BY_RAW_ID: Final = Sql(ROW + "(b.id = :raw OR b.id = CAST(:raw AS TEXT))")
_HELD: Final = Sql(ROW + f"b.hold_id IN :ids AND b.{SANDBOX_HELD}")
# Whatever another program wrote there, one that is no number of ms never comes due.
EXPIRED: Final = Sql(
    f"SELECT id, hold_id FROM sandboxes WHERE {SANDBOX_HELD} "
    "AND (lease_until IS NULL OR lease_until <= :now_ms OR lease_until >= '') LIMIT :limit"
)
_LET_GO: Final = one_row("UPDATE sandboxes SET hold_id = NULL, lease_until = NULL, vm_id = NULL WHERE id = :id")
_RENEW: Final = untold(one_row("UPDATE sandboxes SET lease_until = :lease_until WHERE id = :id"))
SET_WANTED: Final = one_row("UPDATE sandboxes SET wanted = :wanted, error = :error WHERE id = :id")
_USED: Final = one_row("UPDATE sandboxes SET used_at = :now WHERE id = :id")
_RUNNING: Final = one_row(
    "UPDATE sandboxes SET state = 'running', vm_id = :vm_id, started_at = COALESCE(started_at, :now), used_at = :now, "
    "error = NULL, wanted = CASE wanted WHEN 'running' THEN NULL ELSE wanted END WHERE id = :id"
)
_PAUSED: Final = one_row(
    "UPDATE sandboxes SET state = 'paused', host = :host, hold_id = NULL, lease_until = NULL, vm_id = NULL, "
    "wanted = CASE wanted WHEN 'paused' THEN NULL ELSE wanted END WHERE id = :id"
)
_SAVED: Final = Sql("SELECT id FROM snapshots WHERE id = :id AND kind = 'pause'")
_DROP_PAUSE: Final = Sql("DELETE FROM snapshots WHERE sandbox_id = :id AND kind = 'pause' AND id <> :but")
_LOST_HOLDS: Final = Sql(
    "SELECT count(*) AS number FROM events e WHERE e.sandbox_id = :id AND e.kind = 'hold_lost' AND e.seq > COALESCE("
    "(SELECT d.seq FROM events d WHERE d.sandbox_id = :id AND d.kind IN ('transition', 'deleted') "
    "ORDER BY d.seq DESC LIMIT 1), 0)"
)


class SandboxRenewal(NamedTuple):
    """``lost``: holds that are no more; their VMs must go at once. ``wanted``: by hold, what somebody wants of it,
    'paused' or 'ended' (also when its time to live is over), or 'running': somebody is about to use it."""

    lost: frozenset[str]
    wanted: Mapping[str, str]


def expired(tx: Tx) -> list[tuple[object, object]]:
    """Ids and holds of those whose lease has ended."""
    return [(row.id, row.hold_id) for row in tx.all(EXPIRED, now_ms=tx.now_ms, limit=_AT_ONCE)]


def time_is_over(tx: Tx, row: Row) -> bool:
    """Of its life."""
    return isinstance(row.ends_at, int | float) and row.ends_at <= tx.now_ms


def owned(tx: Tx, hold_id: str) -> Row:
    """The fence. Raises LeaseLost."""
    found = tx.all_in(_HELD, [hold_id])
    if len(found) != 1 or found[0].state not in (SandboxState.STARTING, SandboxState.RUNNING, SandboxState.PAUSED):
        why = "it was deleted, has ended, or another engine has it" if not found else "another program changed its row"
        raise LeaseLost(f"this engine no longer holds the sandbox of the hold {hold_id}: {why}; nothing was changed")
    return found[0]


def renew(tx: Tx, hold_ids: Sequence[str], *, lease_seconds: float, used: Collection[str] = ()) -> SandboxRenewal:
    """Extend leases to ``lease_seconds`` from now. ``used``: holds of those that were used since the last time."""
    found: dict[str, list[Row]] = {}
    for row in tx.all_in(_HELD, set(hold_ids)):
        found.setdefault(row.hold_id, []).append(row)
    lost, wanted = set[str](), dict[str, str]()
    until = tx.now_ms + round(lease_seconds * 1000)
    renewed, touched = list[dict[str, object]](), list[dict[str, object]]()
    for hold in dict.fromkeys(hold_ids):
        of_hold = found.get(hold, [])
        if len(of_hold) != 1:
            lost.add(hold)
            continue
        (row,) = of_hold
        if row.state not in (SandboxState.STARTING, SandboxState.RUNNING, SandboxState.PAUSED):
            lost.add(hold)
            _taken_back(tx, row)
            continue
        renewed.append({"id": row.id, "lease_until": until})
        asked = _asked(tx, row)
        if asked is not None:
            wanted[hold] = asked
        if hold in used or asked == SandboxState.RUNNING == row.state:
            touched.append({"id": row.id, "now": tx.now})
    tx.many(_RENEW, renewed)
    tx.many(_USED, touched)
    return SandboxRenewal(lost=frozenset(lost), wanted=wanted)


def _asked(tx: Tx, row: Row) -> str | None:
    """What is wanted of a held one. What is told, or makes no sense, is wanted no more."""
    if time_is_over(tx, row):
        return str(SandboxState.ENDED)
    try:
        asked = rows.wanted(row.wanted)
    except BadRow as error:
        tx.run(SET_WANTED, id=row.id, wanted=None, error=str(error))
        event(tx, row.id, "note", text=str(error))
        return None
    if row.state == SandboxState.RUNNING and (asked == SandboxState.RUNNING or row.wanted == ""):
        tx.run(SET_WANTED, id=row.id, wanted=None, error=row.error)
    return asked


def _taken_back(tx: Tx, row: Row) -> None:
    """Another program ended one that is held, or gave it a state that there is not."""
    if row.state in TERMINAL_SANDBOX_STATES:
        end(tx, row, SandboxState(row.state), error=lenient(row.error), why=MENDED)
    else:
        end(tx, row, SandboxState.ENDED, error=rows.unknown_state(row.state), why=MENDED)


def used(tx: Tx, hold_ids: Collection[str]) -> None:
    """They were used just now. Holds that are lost are left out."""
    tx.many(_USED, [{"id": row.id, "now": tx.now} for row in tx.all_in(_HELD, set(hold_ids))])


def running(tx: Tx, hold_id: str, *, vm_id: int | None) -> None:
    """Its VM runs. The snapshot of its pause is used up."""
    row = owned(tx, hold_id)
    tx.run(_RUNNING, id=row.id, vm_id=vm_id, now=tx.now)
    if row.state != SandboxState.RUNNING:
        tx.run(_DROP_PAUSE, id=row.id, but="")
        transition(tx, row.id, row.state, SandboxState.RUNNING, hold=hold_id, worker=lenient(row.worker), vm=vm_id)


def paused(tx: Tx, hold_id: str, snapshot: Snapshot, *, why: str | None = None) -> None:
    """Its VM is a snapshot now, and nobody holds it. Once more is no fault: the answer may have been lost."""
    if not tx.all_in(_HELD, [hold_id]) and tx.first(_SAVED, id=snapshot.id):
        return
    row = owned(tx, hold_id)
    if row.state != SandboxState.RUNNING:  # its VM ran, but that could not be written
        transition(tx, row.id, row.state, SandboxState.RUNNING, hold=hold_id, worker=lenient(row.worker))
    tx.run(INSERT_SNAPSHOT, **snapshot_values(replace(snapshot, kind="pause", sandbox_id=row.id)), now=tx.now)
    tx.run(_DROP_PAUSE, id=row.id, but=snapshot.id)
    tx.run(_PAUSED, id=row.id, host=snapshot.host)
    transition(
        tx, row.id, SandboxState.RUNNING, SandboxState.PAUSED, hold=hold_id, why=why, snapshot=snapshot.id,
        size_bytes=snapshot.size_bytes,
    )  # fmt: skip


def ended(tx: Tx, hold_id: str, *, state: SandboxState, error: str | None, why: str | None = None) -> None:
    row = owned(tx, hold_id)
    if why is None and error is None and time_is_over(tx, row):
        why = "its time to live is over"
    if state == SandboxState.LOST:
        error = f"{error or 'its VM died'}; {last_snapshot(tx, row.id)}"
    end(tx, row, state, error=error, why=why)


def released(tx: Tx, hold_id: str, *, why: str, error: str | None = None) -> None:
    """It goes back as it was taken: it was not started, or not resumed. With an ``error``, it is not wanted any more:
    the next one who wants it tries again."""
    row = owned(tx, hold_id)
    if row.state == SandboxState.RUNNING:
        raise LeaseLost(f"the sandbox {shown(row.id)} runs: it can't be given back, only paused or ended")
    tx.run(_LET_GO, id=row.id)
    if error is not None:
        tx.run(SET_WANTED, id=row.id, wanted=None, error=message(error))
    event(tx, row.id, "released", hold=hold_id, why=why, error=message(error))


def give_up(tx: Tx, id: object, hold_id: object, *, held: Collection[str] = (), until_seconds: float = 0.0) -> None:
    """Its lease has ended: what ran is lost; what was being started or resumed can be tried again, a few times. One of
    those that the asking worker holds is renewed instead: it is alive, and the clock has jumped."""
    row = tx.first(BY_ID, id=id) if isinstance(id, str) and storable(id) else tx.first(BY_RAW_ID, raw=raw_id(id))
    if row is None or row.hold_id != hold_id or hold_id is None or not _lease_is_over(tx, row):
        return
    if hold_id in held:
        tx.run(_RENEW, id=row.id, lease_until=tx.now_ms + round(until_seconds * 1000))
        return
    worker = lenient(row.worker) or "?"
    error = f"the lease of worker {worker} ran out: it died, or lost touch with the database"
    if row.state not in (SandboxState.STARTING, SandboxState.RUNNING, SandboxState.PAUSED):
        _taken_back(tx, row)
    elif row.state == SandboxState.RUNNING:
        end(tx, row, SandboxState.LOST, error=f"{error}; {last_snapshot(tx, str(lenient(row.id)))}")
    elif row.wanted == SandboxState.ENDED or tx.all(_LOST_HOLDS, id=row.id)[0].number + 1 < TRIES:
        _lose_hold(tx, row, worker=worker, error=error)
    elif row.state == SandboxState.PAUSED:  # what it is worth is in its snapshot, and the engines may have died of else
        error = (
            f"{TRIES} engines in a row died or froze while they resumed it: it is tried again when it is wanted again"
        )
        tx.run(SET_WANTED, id=row.id, wanted=None, error=error)
        _lose_hold(tx, row, worker=worker, error=error)
    else:
        end(tx, row, SandboxState.LOST, error=f"{TRIES} engines in a row died or froze while they started it")


def _lose_hold(tx: Tx, row: Row, *, worker: str, error: str) -> None:
    tx.run(_LET_GO, id=row.id)
    event(tx, row.id, "hold_lost", hold=lenient(row.hold_id), worker=worker, error=error)


def raw_id(id: object) -> bytes:
    """The bytes of an id that is no valid text."""
    return id if isinstance(id, bytes) else str(id).encode("utf-8", "surrogateescape")


def _lease_is_over(tx: Tx, row: Row) -> bool:
    return not isinstance(row.lease_until, int | float) or row.lease_until <= tx.now_ms
