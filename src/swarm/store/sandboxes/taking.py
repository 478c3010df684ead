"""What an engine takes: sandboxes that are to be started or resumed, each in a transaction of its own. One that can't
ever run ends here, with a sentence in its `error`; so does one that nobody holds, and that is to end.

What an engine looks for is read first, without the write lock (`candidates`); each is looked at again where it is
taken. So one row that can't be changed, because of what another program added, stops no other.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from swarm.errors import StoreError
from swarm.model import TERMINAL_SANDBOX_STATES, Agent, Sandbox, SandboxClaim, SandboxState, Snapshot
from swarm.store.registry.agents import NAMES, Agents
from swarm.store.sandboxes import rows
from swarm.store.sandboxes.changes import end, event, last_snapshot, own_snapshot
from swarm.store.sandboxes.holding import BY_ID, BY_RAW_ID, SET_WANTED, raw_id, time_is_over
from swarm.store.sandboxes.rows import SNAPSHOT_COLUMNS
from swarm.store.sql.bounded import text
from swarm.store.sql.conditions import SANDBOX_DUE, SANDBOX_ENDING, SANDBOX_HELD
from swarm.store.sql.database import HEAD, REVISION, other_revision
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import Due, message, new_id
from swarm.store.sql.transaction import Row, Tx, one_row
from swarm.store.tickets import validation
from swarm.store.tickets.changes import MENDED
from swarm.store.tickets.room import Room
from swarm.store.tickets.validation import MAX_OTHER_BYTES, BadRow, shown, storable

DEFAULT_MEMORY_MB: Final = 256
DEFAULT_DISK_MB: Final = 2048
_AT_ONCE: Final = 100

# A fork starts where its snapshot is, and a paused one resumes there; anything else may be done by any engine.
_ENDS: Final = "(state NOT IN ('starting', 'paused') OR wanted = 'ended')"
_MINE: Final = (
    f"({_ENDS} OR state = 'starting' AND NOT EXISTS "
    "(SELECT 1 FROM snapshots n WHERE n.id = sandboxes.snapshot_id AND n.host <> :host) "
    "OR state = 'paused' AND (wanted <> 'running' OR host = :host OR host IS NULL))"
)
_CANDIDATES: Final = (
    f"SELECT id, {text('project_id', MAX_OTHER_BYTES)} AS project_id, {_ENDS} AS ends FROM sandboxes "
    f"WHERE {SANDBOX_DUE} AND {_MINE}{{but}} "
    "ORDER BY CASE state WHEN 'starting' THEN 1 ELSE 0 END, created_at LIMIT :limit"
)
CANDIDATES: Final = Sql(_CANDIDATES.format(but=""))
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
    f"EXISTS (SELECT 1 FROM sandboxes WHERE {SANDBOX_DUE} AND {_MINE}) AS due"
)
# However long ago it expired: it is in use, so its files are there.
_SNAPSHOT: Final = Sql(f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.id = :id")
# The agent's id in place of its name: when it is resumed, it is still of the version that it was started with.
_HOLD: Final = one_row(
    "UPDATE sandboxes SET hold_id = :hold_id, worker = :worker, host = :host, lease_until = :lease_until, "
    "ends_at = :ends_at, ended_at = NULL, error = NULL, wanted = :wanted, agent_id = :agent_id, "
    "secret = :secret "
    "WHERE id = :id AND hold_id IS NULL"
)
AT: Final = Sql(f"SELECT {REVISION} AS revision")
_LAST_HOLD: Final = Sql(
    "SELECT kind, data FROM events WHERE sandbox_id = :id "
    "AND kind IN ('held', 'released', 'hold_lost', 'transition', 'deleted') ORDER BY seq DESC LIMIT 1"
)


@dataclass(slots=True, kw_only=True)
class Share:
    """The most that the sandboxes of one project may take of a worker: ``places``, ``memory_mb`` and ``disk_mb`` (None:
    any), which are a ``part`` of what it has, no less than one usual VM takes. What is of no project is not bounded.

    ``taken``: of each project that has some, (places, memory, disk). A claim adds what it takes; it says who is
    ``over``, in a sentence for each project, and whether others wait too."""

    places: int
    memory_mb: int | None
    disk_mb: int | None
    part: float
    taken: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    over: dict[str, str] = field(default_factory=dict)
    others_wait: bool = False

    @classmethod
    def of(cls, claims: Iterable[SandboxClaim], *, most: int, room: Room, part: float) -> Share:
        """``most`` places; ``claims``: what is held."""

        def share_of(most_mb: int | None, usual_mb: int) -> int | None:
            return max(int(most_mb * part), usual_mb) if most_mb is not None and part < 1 else None

        share = cls(
            places=max(1, int(most * part)),
            memory_mb=share_of(room.most_memory_mb, DEFAULT_MEMORY_MB),
            disk_mb=share_of(room.most_disk_mb, DEFAULT_DISK_MB),
            part=part,
        )
        for claim in claims:
            share.add(claim)
        return share

    def never(self, project: str | None, memory_mb: int, disk_mb: int) -> str:
        """Why it gets none of this size, whatever else it has; '' if it may."""
        for needs, most, what in ((memory_mb, self.memory_mb, "memory"), (disk_mb, self.disk_mb, "disk")):
            if project and most is not None and needs > most:
                return (
                    f"it needs {needs} MB of {what}, and the sandboxes of one project may take {most} MB together "
                    f"(SWARM_PROJECT_SHARE); lower its {what}_mb"
                )
        return ""

    def refuses(self, project: str | None, memory_mb: int = 0, disk_mb: int = 0) -> str:
        """Why it gets no more; '' if it does."""
        places, used_mb, written_mb = self.taken.get(project or "", (0, 0, 0))
        what = ""  # a sentence that stays the same, since rows tell it
        if project and places >= self.places:
            what = f"{self.places} places"
        elif project and self.memory_mb is not None and used_mb + memory_mb > self.memory_mb:
            what = f"{self.memory_mb} MB of memory"
        elif project and self.disk_mb is not None and written_mb + disk_mb > self.disk_mb:
            what = f"{self.part:.0%} of the disk for VMs"
        said = f"it waits: the sandboxes of one project take {what} at most (SWARM_PROJECT_SHARE)"
        return what and f"{said}; it starts when one of them ends or sleeps"

    def add(self, claim: SandboxClaim) -> None:
        if (project := claim.sandbox.project_id) is not None:
            places, used_mb, written_mb = self.taken.get(project, (0, 0, 0))
            self.taken[project] = places + 1, used_mb + claim.memory_mb, written_mb + claim.disk_mb


@dataclass(frozen=True, slots=True, kw_only=True)
class Taking:
    """``worker`` wants to hold one, whose VM must fit into ``room``. None: any does."""

    worker: str
    host: str
    lease_seconds: float
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


def candidates(tx: Tx, *, host: str, limit: int, but: Collection[str] = ()) -> list[Candidate]:
    """Those that an engine of this host may take, and those that it must end. Those to be resumed come first: somebody
    waits. ``but``: projects of which it may take none."""
    found = {row.id: Candidate(row.id, True, None) for row in tx.all(ENDING, now_ms=tx.now_ms, limit=_AT_ONCE)}
    others = tx.all(_without(len(but)), host=host, limit=limit + _AT_ONCE, **{f"but_{n}": p for n, p in enumerate(but)})
    return list(({row.id: Candidate(row.id, bool(row.ends), row.project_id) for row in others} | found).values())


@functools.lru_cache(maxsize=64)
def _without(projects: int) -> Sql:
    names = ", ".join(f":but_{number}" for number in range(projects))
    but = f" AND ({_ENDS} OR COALESCE(project_id, '') NOT IN ({names}))"
    return Sql(_CANDIDATES.format(but=but)) if projects else CANDIDATES


def waiting(tx: Tx, *, host: str, project_id: str) -> list[tuple[object, object]]:
    """Of a project: ids of the first that wait, and what their rows say."""
    return [(row.id, row.error) for row in tx.all(_WAITING, host=host, project_id=project_id, limit=_AT_ONCE)]


def tell(tx: Tx, ids: Collection[object], *, error: str) -> None:
    tx.many(_TELL, [{"id": id, "error": error} for id in ids if isinstance(id, str) and storable(id)])


def due(tx: Tx, *, host: str) -> Due:
    """Is there anything for an engine of this host to do, or when?"""
    row = tx.first(NEXT, host=host)
    assert row is not None
    times = [ms for ms in (row.lease, row.ending) if isinstance(ms, int | float)]
    return Due(ready=bool(row.due), next_ms=float(max(0, min(times) - tx.now_ms)) if times else None)


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
