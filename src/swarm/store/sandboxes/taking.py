"""What an engine takes: sandboxes that are to be started or resumed, each in a transaction of its own. One that can't
ever run ends here, with a sentence in its `error`; so does one that nobody holds, and that is to end.

What an engine looks for is read first, without the write lock (`candidates`); each is looked at again where it is
taken. So one row that can't be changed, because of what another program added, stops no other.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from swarm.errors import StoreError
from swarm.model import TERMINAL_SANDBOX_STATES, Agent, Sandbox, SandboxClaim, SandboxState, Snapshot
from swarm.store.registry.agents import NAMES, Agents
from swarm.store.sandboxes import rows
from swarm.store.sandboxes.changes import end, event, last_snapshot, own_snapshot
from swarm.store.sandboxes.holding import BY_ID, BY_RAW_ID, SET_WANTED, raw_id, time_is_over
from swarm.store.sandboxes.rows import SNAPSHOT_COLUMNS
from swarm.store.sandboxes.share import DEFAULT_DISK_MB, DEFAULT_MEMORY_MB, Share
from swarm.store.sql.bounded import text
from swarm.store.sql.conditions import SANDBOX_DUE, SANDBOX_ENDING, SANDBOX_HELD, SANDBOX_MARKED
from swarm.store.sql.database import HEAD, REVISION, other_revision
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import Due, message, new_id, parsed
from swarm.store.sql.transaction import Row, Tx, one_row
from swarm.store.tickets import elsewhere, places, validation
from swarm.store.tickets.changes import MENDED
from swarm.store.tickets.places import Places
from swarm.store.tickets.room import Room
from swarm.store.tickets.validation import MAX_OTHER_BYTES, BadRow, shown, storable

_AT_ONCE: Final = 100

# A fork starts where its snapshot is, and a paused one resumes there; anything else may be done by any engine.
_ENDS: Final = "(state NOT IN ('starting', 'paused') OR wanted = 'ended')"
_MINE: Final = (
    f"({_ENDS} OR state = 'starting' AND NOT EXISTS "
    "(SELECT 1 FROM snapshots n WHERE n.id = sandboxes.snapshot_id AND n.host <> :host) "
    "OR state = 'paused' AND (wanted <> 'running' OR host = :host OR host IS NULL))"
)
_PROJECT: Final = f"{text('project_id', MAX_OTHER_BYTES)} AS project_id"
_SOME: Final = f"SELECT id, {_PROJECT}, {_ENDS} AS ends, state, created_at FROM sandboxes WHERE"
_DUE: Final = f"{_SOME} {SANDBOX_DUE} AND {_MINE}"
_MARKED: Final = f"{_SOME} {SANDBOX_MARKED} AND waits_for IN ({{marks}})"
_IN_TURN: Final = " ORDER BY CASE state WHEN 'starting' THEN 1 ELSE 0 END, created_at LIMIT :limit"
CANDIDATES: Final = Sql(_DUE + _IN_TURN)
ANY_MARKED: Final = Sql(f"SELECT {places.MARKED_SANDBOXES} OR EXISTS (SELECT 1 FROM unmet) AS marked")
_WAITING: Final = Sql(
    f"SELECT id, {text('error', MAX_OTHER_BYTES)} AS error FROM sandboxes WHERE {SANDBOX_DUE} AND {_MINE} "
    "AND project_id = :project_id AND "
    "(wanted = 'running' OR state = 'starting' AND COALESCE(wanted, '') <> 'ended') ORDER BY created_at LIMIT :limit"
)
_TELL: Final = one_row("UPDATE sandboxes SET error = :error WHERE id = :id AND hold_id IS NULL")
ENDING: Final = Sql(f"SELECT id FROM sandboxes WHERE {SANDBOX_ENDING} AND ends_at <= :now_ms LIMIT :limit")
NEXT: Final = Sql(
    f"SELECT (SELECT min(lease_until) FROM sandboxes WHERE {SANDBOX_HELD}) AS lease, "
    f"(SELECT min(ends_at) FROM sandboxes WHERE {SANDBOX_ENDING}) AS ending, "
    f"EXISTS (SELECT 1 FROM sandboxes WHERE {SANDBOX_DUE} AND {_MINE}) AS due, {places.MARKED_SANDBOXES} AS marked"
)
# However long ago it expired: it is in use, so its files are there.
_SNAPSHOT: Final = Sql(f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.id = :id")
# The agent's id in place of its name: when it is resumed, it is still of the version that it was started with.
_HOLD: Final = one_row(
    "UPDATE sandboxes SET hold_id = :hold_id, worker = :worker, host = :host, lease_until = :lease_until, "
    "ends_at = :ends_at, ended_at = NULL, error = NULL, wanted = :wanted, agent_id = :agent_id, "
    "secret = :secret, waits_for = '' "
    "WHERE id = :id AND hold_id IS NULL"
)
AT: Final = Sql(f"SELECT {REVISION} AS revision")
_LAST_HOLD: Final = Sql(
    "SELECT kind, data FROM events WHERE sandbox_id = :id "
    "AND kind IN ('held', 'released', 'hold_lost', 'transition', 'deleted') ORDER BY seq DESC LIMIT 1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taking:
    """``worker`` wants to hold one, whose VM must fit into ``room``. None: any does."""

    worker: str
    host: str
    lease_seconds: float
    place: Places
    room: Room | None = None
    share: Share | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Without a ``claim``: there is nothing to hold (any more), or it does not fit (``full``), or its project has its
    share (``over``: a sentence)."""

    claim: SandboxClaim | None = None
    full: bool = field(default=False)
    over: str = ""


class Candidate(NamedTuple):
    id: object
    ends: bool
    project_id: object


def any_marked(tx: Tx) -> bool:
    """Does one wait for another host; or is it known since when something did?"""
    row = tx.first(ANY_MARKED)
    return row is not None and bool(row.marked)


def candidates(
    tx: Tx, *, host: str, limit: int, but: Collection[str] = (), marks: Collection[str] = ()
) -> list[Candidate]:
    """Those that an engine of this host may take, and those that it must end. Those to be resumed come first: somebody
    waits. ``but``: projects of which it may take none; ``marks``: those with which it may take some."""
    found = {row.id: Candidate(row.id, True, None) for row in tx.all(ENDING, now_ms=tx.now_ms, limit=_AT_ONCE)}
    values = {f"but_{n}": one for n, one in enumerate(but)} | {f"mark_{n}": one for n, one in enumerate(marks)}
    others = tx.all(_statement(len(but), len(marks)), host=host, limit=limit + _AT_ONCE, **values)
    return list(({row.id: Candidate(row.id, bool(row.ends), row.project_id) for row in others} | found).values())


@functools.lru_cache(maxsize=64)
def _statement(projects: int, marks: int) -> Sql:
    but, marked = (
        ", ".join(f":{name}_{n}" for n in range(count)) for name, count in (("but", projects), ("mark", marks))
    )
    without = f" AND ({_ENDS} OR COALESCE(project_id, '') NOT IN ({but}))" if projects else ""
    if not marks:
        return Sql(_DUE + without + _IN_TURN) if projects else CANDIDATES
    both = f"{_DUE}{without} UNION ALL {_MARKED.format(marks=marked)}{without}"
    return Sql(f"SELECT * FROM ({both}) AS found{_IN_TURN}")


def waiting(tx: Tx, *, host: str, project_id: str) -> list[tuple[object, object]]:
    """Of a project: ids of the first that wait, and what their rows say."""
    return [(row.id, row.error) for row in tx.all(_WAITING, host=host, project_id=project_id, limit=_AT_ONCE)]


def tell(tx: Tx, ids: Collection[object], *, error: str) -> None:
    tx.many(_TELL, [{"id": id, "error": error} for id in ids if isinstance(id, str) and storable(id)])


def due(tx: Tx, *, host: str, place: Places) -> Due:
    """Is there anything for an engine of this host to do, or when?"""
    row = tx.first(NEXT, host=host)
    assert row is not None
    times: list[float] = [ms for ms in (row.lease, row.ending) if isinstance(ms, int | float)]
    ready = bool(row.due)
    if row.marked:
        here, given_up = places.due(tx, place, of=places.SANDBOXES)
        ready, times = ready or here, [*times, *given_up]
    return Due(ready=ready, next_ms=float(max(0, min(times) - tx.now_ms)) if times else None)


def take(tx: Tx, id: object, request: Taking) -> Taken:
    """Hold it, if it is to be started or resumed and nobody does. A bad row ends here, with a sentence in its `error`;
    one that sleeps stays, and says why it can't be resumed."""
    found = tx.first(AT)
    if found is None or found.revision != HEAD:
        raise other_revision(found and found.revision)
    row = tx.first(BY_ID, id=id) if isinstance(id, str) and storable(id) else None
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
            tx.run(SET_WANTED, id=row.id, wanted=None, error=row.error)
        return Taken()
    resumes = row.state == SandboxState.PAUSED
    try:
        one = rows.check(row)
        agent = _agent(tx, one)
        snapshot = own_snapshot(tx, one.id) if resumes else _snapshot(tx, one)
        memory_mb, disk_mb = _memory_mb(one, agent, snapshot), _disk_mb(one, agent, snapshot)
        room = request.room or Room()
        if not resumes and snapshot is None and (mark := _mark(tx, one, agent, request, memory_mb)):
            words = f"it waits for a host with {places.words(mark)}; `swarm host list` shows what each has"
            tx.run(elsewhere.MARK_SANDBOX, id=row.id, mark=mark, error=message(words))
            request.place.marked = True
            return Taken()
        if never := room.never(memory_mb, disk_mb) or room.not_now(disk_mb):  # who waits for it is to hear of it
            raise BadRow(f"it {never}, or run it on a host with more")
        if request.share is not None and (never := request.share.never(one.project_id, memory_mb, disk_mb)):
            raise BadRow(never)
    except BadRow as bad:
        if resumes:
            refused = message(f"it can't be resumed: {bad}")
            tx.run(SET_WANTED, id=row.id, wanted=None, error=refused)
            event(tx, row.id, "note", text=refused)
        else:
            end(tx, row, SandboxState.ENDED, error=str(bad))
        return Taken()
    if resumes and snapshot is None:
        error = f"the snapshot that it was paused to is gone; {last_snapshot(tx, one.id)}"
        end(tx, row, SandboxState.LOST if row.started_at else SandboxState.ENDED, error=error)
        return Taken()
    if request.share is not None and (refused := request.share.refuses(one.project_id, memory_mb, disk_mb)):
        return Taken(over=refused)
    if lacks := room.lacks(memory_mb, disk_mb):
        room.waits_for = lacks
        return Taken(full=True)
    claim = _hold(tx, one, request, agent=agent, snapshot=snapshot, resumes=resumes)
    return Taken(claim=replace(claim, memory_mb=memory_mb, disk_mb=disk_mb))


def _mark(tx: Tx, one: Sandbox, agent: Agent | None, request: Taking, memory_mb: int) -> str | None:
    """What it lacks here. Raises BadRow if no known host has had that for too long."""
    requires = elsewhere.required(agent.requires if agent is not None else {}, one.requires)
    return elsewhere.mark(tx, requires, memory_mb, request.place)


def _hold(
    tx: Tx,
    one: Sandbox,
    request: Taking,
    *,
    agent: Agent | None,
    snapshot: Snapshot | None,
    resumes: bool,
) -> SandboxClaim:
    hold_id, until = new_id(tx.now_ms), tx.now_ms + round(request.lease_seconds * 1000)
    ends_at = one.ends_at
    if ends_at is None and one.ttl_seconds is not None:
        ends_at = tx.now_ms + round(one.ttl_seconds * 1000)
    worker, host = request.worker, request.host
    secret = rows.holds_secrets(one, agent, snapshot) or (resumes and one.secret is not False)
    _close_former(tx, one.id)
    tx.run(
        _HOLD, id=one.id, hold_id=hold_id, worker=worker, host=host, lease_until=until, ends_at=ends_at,
        wanted=one.wanted, agent_id=agent.id if agent is not None else None, secret=secret,
    )  # fmt: skip
    event(tx, one.id, "held", hold=hold_id, worker=worker, host=host, state=one.state)
    return SandboxClaim(
        sandbox=replace(
            one,
            ends_at=ends_at,
            error=None,
            hold_id=hold_id,
            worker=worker,
            host=host,
            agent_id=agent.id if agent is not None else None,
            secret=secret,
        ),
        hold_id=hold_id,
        agent=agent,
        snapshot=snapshot,
        resumes=resumes,
        memory_mb=0,
    )


def _close_former(tx: Tx, id: str) -> None:
    """Another program took it from a holder, who will learn that: the log tells that nobody held it twice."""
    last = tx.first(_LAST_HOLD, id=id)
    if last is None or last.kind not in ("held", "transition"):
        return
    data = parsed(last.data, dict)
    if data is not None and (last.kind == "held" or data.get("to") == SandboxState.RUNNING):
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
    found = tx.first(BY_RAW_ID, raw=raw_id(id))
    if found is not None and found.state not in TERMINAL_SANDBOX_STATES:
        end(tx, found, SandboxState.ENDED, error=error)


def _over(tx: Tx, row: Row) -> tuple[SandboxState, str | None, str | None] | None:
    """State, error and reason with which a row that nobody holds ends at once; None if it does not."""
    if row.state not in tuple(SandboxState):
        return SandboxState.ENDED, rows.unknown_state(row.state), None
    if row.state == SandboxState.RUNNING:
        error = "only Swarm sets the state 'running', and no engine holds this sandbox"
        if row.started_at:
            return SandboxState.LOST, f"{error}; {last_snapshot(tx, row.id)}", MENDED
        return SandboxState.ENDED, f"{error}; a new one is 'starting'", MENDED
    if row.wanted == SandboxState.ENDED:
        return SandboxState.ENDED, None, "wanted"
    if time_is_over(tx, row):
        return SandboxState.ENDED, None, "its time to live is over"
    return None


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
    if slept_in := rows.slept_in(row):
        raise BadRow(slept_in)
    return rows.snapshot(row)


def _memory_mb(one: Sandbox, agent: Agent | None, snapshot: Snapshot | None) -> int:
    of_snapshot = rows.memory_mb(snapshot.spec) if snapshot is not None else None
    return of_snapshot or one.memory_mb or (agent.memory_mb if agent is not None else DEFAULT_MEMORY_MB)


def _disk_mb(one: Sandbox, agent: Agent | None, snapshot: Snapshot | None) -> int:
    of_snapshot = rows.disk_mb(snapshot.spec) if snapshot is not None else None
    return of_snapshot or one.disk_mb or (agent.disk_mb if agent is not None else DEFAULT_DISK_MB)
