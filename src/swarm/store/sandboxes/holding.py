"""Who holds a sandbox: taken under a lease, renewed, given up. One short transaction each; every write by a holder
names its `hold_id`, and passes the fence in the same transaction.

What an engine looks for is read first, without the write lock (`candidates`, `expired`); each is then looked at again
where it is taken. So one row that can't be changed, because of what another program added, stops no other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from swarm.errors import LeaseLost, StoreError
from swarm.model import (
    TERMINAL_SANDBOX_STATES,
    Agent,
    Sandbox,
    SandboxClaim,
    SandboxState,
    Snapshot,
)
from swarm.store.registry.agents import NAMES, Agents
from swarm.store.sandboxes import rows
from swarm.store.sandboxes.changes import end, event, last_snapshot, own_snapshot, transition
from swarm.store.sandboxes.rows import SANDBOX_COLUMNS, SNAPSHOT_COLUMNS
from swarm.store.sandboxes.snapshots import INSERT as INSERT_SNAPSHOT
from swarm.store.sandboxes.snapshots import values as snapshot_values
from swarm.store.sql.conditions import SANDBOX_DUE, SANDBOX_ENDING, SANDBOX_HELD
from swarm.store.sql.database import Row, Tx, one_row
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import Due, lenient, message, new_id
from swarm.store.tickets import validation
from swarm.store.tickets.changes import MENDED
from swarm.store.tickets.validation import BadRow, shown, storable

DEFAULT_MEMORY_MB: Final = 256
TRIES: Final = 5  # engines in a row that may die while they start it, or resume it
_AT_ONCE: Final = 100

_ROW: Final = f"SELECT {SANDBOX_COLUMNS}, b.lease_until FROM sandboxes b WHERE "
_BY_ID: Final = Sql(_ROW + "b.id = :id")
_HELD: Final = Sql(_ROW + f"b.hold_id IN :ids AND b.{SANDBOX_HELD}")
# A fork starts where its snapshot is, and a paused one resumes there; anything else may be done by any engine.
_ENDS: Final = "(state NOT IN ('starting', 'paused') OR wanted = 'ended')"
_MINE: Final = (
    f"({_ENDS} OR state = 'starting' AND NOT EXISTS "
    "(SELECT 1 FROM snapshots n WHERE n.id = sandboxes.snapshot_id AND n.host <> :host) "
    "OR state = 'paused' AND (wanted <> 'running' OR host = :host OR host IS NULL))"
)
CANDIDATES: Final = Sql(
    f"SELECT id, {_ENDS} AS ends FROM sandboxes WHERE {SANDBOX_DUE} AND {_MINE} "
    "ORDER BY CASE state WHEN 'starting' THEN 1 ELSE 0 END, created_at LIMIT :limit"
)
ENDING: Final = Sql(f"SELECT id FROM sandboxes WHERE {SANDBOX_ENDING} AND ends_at <= :now_ms LIMIT :limit")
# Whatever another program wrote there, one that is no number of ms never comes due.
EXPIRED: Final = Sql(
    f"SELECT id, hold_id FROM sandboxes WHERE {SANDBOX_HELD} "
    "AND (lease_until IS NULL OR lease_until <= :now_ms OR lease_until >= '') LIMIT :limit"
)
NEXT: Final = Sql(
    f"SELECT (SELECT min(lease_until) FROM sandboxes WHERE {SANDBOX_HELD}) AS lease, "
    f"(SELECT min(ends_at) FROM sandboxes WHERE {SANDBOX_ENDING}) AS ending, "
    f"EXISTS (SELECT 1 FROM sandboxes WHERE {SANDBOX_DUE} AND {_MINE}) AS due"
)
# However long ago it expired: it is in use, so its files are there.
_SNAPSHOT: Final = Sql(f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.id = :id")
_HOLD: Final = one_row(
    "UPDATE sandboxes SET hold_id = :hold_id, worker = :worker, host = :host, lease_until = :lease_until, "
    "ends_at = :ends_at, ended_at = NULL, error = NULL, wanted = :wanted WHERE id = :id AND hold_id IS NULL"
)
_LET_GO: Final = one_row("UPDATE sandboxes SET hold_id = NULL, lease_until = NULL, vm_id = NULL WHERE id = :id")
_RENEW: Final = one_row("UPDATE sandboxes SET lease_until = :lease_until WHERE id = :id")
_SET_WANTED: Final = one_row("UPDATE sandboxes SET wanted = :wanted, error = :error WHERE id = :id")
_USED: Final = one_row("UPDATE sandboxes SET used_at = :now WHERE id = :id")
_RUNNING: Final = one_row(
    "UPDATE sandboxes SET state = 'running', vm_id = :vm_id, started_at = COALESCE(started_at, :now), used_at = :now, "
    "error = NULL, wanted = CASE wanted WHEN 'running' THEN NULL ELSE wanted END WHERE id = :id"
)
_PAUSED: Final = one_row(
    "UPDATE sandboxes SET state = 'paused', host = :host, hold_id = NULL, lease_until = NULL, vm_id = NULL, "
    "wanted = CASE wanted WHEN 'paused' THEN NULL ELSE wanted END WHERE id = :id"
)
_DROP_PAUSE: Final = Sql("DELETE FROM snapshots WHERE sandbox_id = :id AND kind = 'pause' AND id <> :but")
_LAST_HOLD: Final = Sql(
    "SELECT kind, data FROM events WHERE sandbox_id = :id "
    "AND kind IN ('held', 'released', 'hold_lost', 'transition', 'deleted') ORDER BY seq DESC LIMIT 1"
)
_LOST_HOLDS: Final = Sql(
    "SELECT count(*) AS number FROM events e WHERE e.sandbox_id = :id AND e.kind = 'hold_lost' AND e.seq > COALESCE("
    "(SELECT max(d.seq) FROM events d WHERE d.sandbox_id = :id AND d.kind IN ('transition', 'deleted')), 0)"
)


class SandboxRenewal(NamedTuple):
    """``lost``: holds that are no more; their VMs must go at once. ``wanted``: by hold, what somebody wants of it,
    'paused' or 'ended' (also when its time to live is over), or 'running': somebody is about to use it."""

    lost: frozenset[str]
    wanted: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taking:
    """``worker`` wants to hold one. Its VM must fit into ``memory_mb``; one that needs more than ``most_memory_mb`` can
    never run here. None: any."""

    worker: str
    host: str
    lease_seconds: float
    memory_mb: int | None = None
    most_memory_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Without a ``claim``: there is nothing to hold (any more), or it does not fit (``full``)."""

    claim: SandboxClaim | None = None
    full: bool = field(default=False)


def candidates(tx: Tx, *, host: str, limit: int) -> list[tuple[object, bool]]:
    """Ids of those that an engine of this host may take, and of those that it must end (True). Those to be resumed
    come first: somebody waits."""
    found = {row.id: True for row in tx.all(ENDING, now_ms=tx.now_ms, limit=_AT_ONCE)}
    others = tx.all(CANDIDATES, host=host, limit=limit + _AT_ONCE)
    return list(({row.id: bool(row.ends) for row in others} | found).items())


def expired(tx: Tx) -> list[tuple[object, object]]:
    """Ids and holds of those whose lease has ended."""
    return [(row.id, row.hold_id) for row in tx.all(EXPIRED, now_ms=tx.now_ms, limit=_AT_ONCE)]


def due(tx: Tx, *, host: str) -> Due:
    """Is there anything for an engine of this host to do, or when?"""
    row = tx.first(NEXT, host=host)
    assert row is not None
    times = [ms for ms in (row.lease, row.ending) if isinstance(ms, int | float)]
    return Due(ready=bool(row.due), next_ms=float(max(0, min(times) - tx.now_ms)) if times else None)


def take(tx: Tx, id: object, request: Taking) -> Taken:
    """Hold it, if it is to be started or resumed and nobody does. A bad row ends here, with a sentence in its `error`;
    one that sleeps stays, and says why it can't be resumed."""
    row = tx.first(_BY_ID, id=id) if isinstance(id, str) and storable(id) else None
    if row is None:
        _end_unclean(tx, id)
        return Taken()
    if row.hold_id is not None or row.state in TERMINAL_SANDBOX_STATES:
        return Taken()
    if (over := _over(tx, row)) is not None:
        state, error, why = over
        end(tx, row, state, error=error, why=why)
        return Taken()
    if row.state == SandboxState.PAUSED and row.wanted in (None, "", SandboxState.PAUSED):
        if row.wanted is not None:
            tx.run(_SET_WANTED, id=row.id, wanted=None, error=row.error)
        return Taken()
    resumes = row.state == SandboxState.PAUSED
    try:
        one = rows.check(row)
        agent = _agent(tx, one)
        snapshot = own_snapshot(tx, one.id) if resumes else _snapshot(tx, one)
        memory_mb = _memory_mb(one, agent, snapshot)
        if request.most_memory_mb is not None and memory_mb > request.most_memory_mb:
            raise BadRow(
                f"it needs {memory_mb} MB, and all VMs of this host together may take {max(0, request.most_memory_mb)} "
                "MB; lower its memory_mb, or run it on a host with more"
            )
    except BadRow as bad:
        if resumes:
            refused = message(f"it can't be resumed: {bad}")
            tx.run(_SET_WANTED, id=row.id, wanted=None, error=refused)
            event(tx, row.id, "note", text=refused)
        else:
            end(tx, row, SandboxState.ENDED, error=str(bad))
        return Taken()
    if resumes and snapshot is None:
        error = f"the snapshot that it was paused to is gone; {last_snapshot(tx, one.id)}"
        end(tx, row, SandboxState.LOST if row.started_at else SandboxState.ENDED, error=error)
        return Taken()
    if request.memory_mb is not None and memory_mb > request.memory_mb:
        return Taken(full=True)
    return Taken(claim=_hold(tx, one, request, agent=agent, snapshot=snapshot, resumes=resumes, memory_mb=memory_mb))


def _hold(
    tx: Tx,
    one: Sandbox,
    request: Taking,
    *,
    agent: Agent | None,
    snapshot: Snapshot | None,
    resumes: bool,
    memory_mb: int,
) -> SandboxClaim:
    hold_id, until = new_id(tx.now_ms), tx.now_ms + round(request.lease_seconds * 1000)
    ends_at = one.ends_at
    if ends_at is None and one.ttl_seconds is not None:
        ends_at = tx.now_ms + round(one.ttl_seconds * 1000)
    worker, host = request.worker, request.host
    _close_former(tx, one.id)
    tx.run(
        _HOLD, id=one.id, hold_id=hold_id, worker=worker, host=host, lease_until=until, ends_at=ends_at,
        wanted=one.wanted,
    )  # fmt: skip
    event(tx, one.id, "held", hold=hold_id, worker=worker, host=host, state=one.state)
    return SandboxClaim(
        sandbox=replace(one, ends_at=ends_at, error=None, hold_id=hold_id, worker=worker, host=host),
        hold_id=hold_id,
        agent=agent,
        snapshot=snapshot,
        resumes=resumes,
        memory_mb=memory_mb,
    )


def _close_former(tx: Tx, id: str) -> None:
    """Another program took it from a holder, who will learn that: the log tells that nobody held it twice."""
    last = tx.first(_LAST_HOLD, id=id)
    if last is None or last.kind not in ("held", "transition"):
        return
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # another program wrote it
        data = json.loads(last.data)
        if last.kind == "held" or data.get("to") == SandboxState.RUNNING:
            event(tx, id, "released", hold=data.get("hold"), why=MENDED)


def _end_unclean(tx: Tx, id: object) -> None:
    """One whose id is no text that a statement could compare with."""
    if isinstance(id, str) and storable(id):
        return  # it was deleted meanwhile
    try:
        validation.strict_text("id", id)
        error = "id is not text; give the sandbox an id that is text"
    except BadRow as bad:
        error = str(bad)
    found = tx.first(_BY_RAW_ID, raw=id if isinstance(id, bytes) else str(id).encode("utf-8", "surrogateescape"))
    if found is not None and found.state not in TERMINAL_SANDBOX_STATES:
        end(tx, found, SandboxState.ENDED, error=error)


_BY_RAW_ID: Final = Sql(_ROW + "(b.id = :raw OR b.id = CAST(:raw AS TEXT))")


def _over(tx: Tx, row: Row) -> tuple[SandboxState, str | None, str | None] | None:
    """State, error and reason with which a row that nobody holds ends at once; None if it does not."""
    if row.state not in tuple(SandboxState):
        return SandboxState.ENDED, rows.unknown_state(row.state), None
    if row.state == SandboxState.RUNNING:
        error = "only Swarm sets the state 'running', and no engine holds this sandbox; a new one is 'starting'"
        return (SandboxState.LOST if row.started_at else SandboxState.ENDED), error, MENDED
    if row.wanted == SandboxState.ENDED:
        return SandboxState.ENDED, None, "wanted"
    if _time_is_over(tx, row):
        return SandboxState.ENDED, None, "its time to live is over"
    return None


def _time_is_over(tx: Tx, row: Row) -> bool:
    return isinstance(row.ends_at, int | float) and row.ends_at <= tx.now_ms


def _agent(tx: Tx, one: Sandbox) -> Agent | None:
    if one.agent_id is None:
        return None
    found = Agents().load(tx, [one.agent_id]).get(one.agent_id)
    if found is None:
        raise validation.unknown("agent", one.agent_id, [row.name for row in tx.all(NAMES)])
    if isinstance(found, StoreError):
        raise BadRow(str(found))
    return found


def _snapshot(tx: Tx, one: Sandbox) -> Snapshot | None:
    if one.snapshot_id is None:
        return None
    row = tx.first(_SNAPSHOT, id=one.snapshot_id)
    if row is None:
        raise BadRow(f"there is no snapshot {shown(one.snapshot_id)} (any more); `swarm snapshot list` shows all")
    return rows.snapshot(row)


def _memory_mb(one: Sandbox, agent: Agent | None, snapshot: Snapshot | None) -> int:
    of_snapshot = rows.memory_mb(snapshot.spec) if snapshot is not None else None
    return of_snapshot or one.memory_mb or (agent.memory_mb if agent is not None else DEFAULT_MEMORY_MB)


# --- what its holder may write ----------------------------------------------------------------------------------------


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
    if _time_is_over(tx, row):
        return str(SandboxState.ENDED)
    try:
        asked = rows.wanted(row.wanted)
    except BadRow as error:
        tx.run(_SET_WANTED, id=row.id, wanted=None, error=str(error))
        event(tx, row.id, "note", text=str(error))
        return None
    if row.state == SandboxState.RUNNING and (asked == SandboxState.RUNNING or row.wanted == ""):
        tx.run(_SET_WANTED, id=row.id, wanted=None, error=row.error)
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
    """Its VM is a snapshot now, and nobody holds it."""
    row = owned(tx, hold_id)
    tx.run(INSERT_SNAPSHOT, **snapshot_values(replace(snapshot, kind="pause", sandbox_id=row.id)), now=tx.now)
    tx.run(_DROP_PAUSE, id=row.id, but=snapshot.id)
    tx.run(_PAUSED, id=row.id, host=snapshot.host)
    transition(
        tx, row.id, row.state, SandboxState.PAUSED, hold=hold_id, why=why, snapshot=snapshot.id,
        size_bytes=snapshot.size_bytes,
    )  # fmt: skip


def ended(tx: Tx, hold_id: str, *, state: SandboxState, error: str | None, why: str | None = None) -> None:
    row = owned(tx, hold_id)
    if why is None and error is None and _time_is_over(tx, row):
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
        tx.run(_SET_WANTED, id=row.id, wanted=None, error=message(error))
    event(tx, row.id, "released", hold=hold_id, why=why, error=message(error))


def give_up(tx: Tx, id: object, hold_id: object, *, held: Collection[str] = (), until_seconds: float = 0.0) -> None:
    """Its lease has ended: what ran is lost; what was being started or resumed can be tried again, a few times. One of
    those that the asking worker holds is renewed instead: it is alive, and the clock has jumped."""
    row = tx.first(_BY_ID, id=id) if isinstance(id, str) and storable(id) else tx.first(_BY_RAW_ID, raw=_raw(id))
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
        tx.run(_SET_WANTED, id=row.id, wanted=None, error=error)
        _lose_hold(tx, row, worker=worker, error=error)
    else:
        end(tx, row, SandboxState.LOST, error=f"{TRIES} engines in a row died or froze while they started it")


def _lose_hold(tx: Tx, row: Row, *, worker: str, error: str) -> None:
    tx.run(_LET_GO, id=row.id)
    event(tx, row.id, "hold_lost", hold=lenient(row.hold_id), worker=worker, error=error)


def _raw(id: object) -> bytes:
    return id if isinstance(id, bytes) else str(id).encode("utf-8", "surrogateescape")


def _lease_is_over(tx: Tx, row: Row) -> bool:
    return not isinstance(row.lease_until, int | float) or row.lease_until <= tx.now_ms
