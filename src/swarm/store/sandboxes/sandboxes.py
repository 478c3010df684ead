"""Adds, finds, lists and removes sandboxes, and says what is wanted of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from swarm.base import versions
from swarm.errors import ChangeRefused, Conflict, NotFound, UsageError
from swarm.model import TERMINAL_SANDBOX_STATES, Agent, Sandbox, SandboxState
from swarm.store.registry.agents import Agents
from swarm.store.sandboxes import rows
from swarm.store.sandboxes.changes import end
from swarm.store.sandboxes.newest import newest
from swarm.store.sandboxes.rows import SANDBOX_COLUMNS, SNAPSHOT_COLUMNS
from swarm.store.sql.conditions import SANDBOX_LIVE
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import iso, lenient, new_id
from swarm.store.sql.transaction import Row, Tx, one_row
from swarm.store.sql.unique import unique
from swarm.store.tickets import events
from swarm.store.tickets.validation import BadRow, shown, storable

SCANNED: Final = 10_000  # sandboxes that one page may look at
# Columns of a new sandbox; Swarm writes the others.
_GIVEN: Final = (
    "id", "name", "project_id", "state", "agent_id", "image", "snapshot_id", "parent_id", "memory_mb", "vcpus",
    "disk_mb", "network", "secrets", "secret", "env", "labels", "ttl_seconds", "idle_timeout_seconds", "budget_usd",
    "budget_tokens", "requires", "created_by",
)  # fmt: skip
_INSERT: Final = Sql(
    f"INSERT INTO sandboxes ({', '.join(_GIVEN)}, created_at) VALUES ({', '.join(':' + name for name in _GIVEN)}, :now)"
    " ON CONFLICT (id) DO NOTHING RETURNING id"
)
# None: any. PostgreSQL learns the parameter's type from its first use.
OF_PROJECT: Final = "(project_id = :project_id OR :project_id IS NULL)"
BY_ID: Final = Sql(f"SELECT {SANDBOX_COLUMNS} FROM sandboxes b WHERE b.id = :id")
_BY_NAME: Final = Sql(
    f"SELECT {SANDBOX_COLUMNS} FROM sandboxes b WHERE b.name = :name AND {OF_PROJECT} "
    "ORDER BY b.state IN ('ended', 'lost'), b.created_at DESC, b.id DESC LIMIT 6"
)
_LIVE_NAME: Final = Sql(
    f"SELECT id FROM sandboxes WHERE name = :name AND project_id IS :project_id AND {SANDBOX_LIVE} LIMIT 1"
)
_BY_BEGINNING: Final = Sql(
    f"SELECT {SANDBOX_COLUMNS} FROM sandboxes b WHERE b.id >= :ref AND b.id < :end AND length(b.id) IN (32, 36) "
    f"AND {OF_PROJECT} ORDER BY b.id LIMIT 100"
)
_NAMES: Final = Sql("SELECT name FROM sandboxes ORDER BY created_at DESC, id DESC LIMIT 500")
_SNAPSHOT: Final = Sql(f"SELECT {SNAPSHOT_COLUMNS} FROM snapshots n WHERE n.id = :id")
_WANT: Final = one_row("UPDATE sandboxes SET wanted = :wanted WHERE id = :id")
_DELETE: Final = one_row("DELETE FROM sandboxes WHERE id = :id")
_COUNTS: Final = Sql(f"SELECT state, count(*) AS number FROM sandboxes WHERE {SANDBOX_LIVE} GROUP BY state")
_OLD: Final = Sql(
    "SELECT id FROM sandboxes WHERE created_at < :before AND state IN ('ended', 'lost') AND ended_at < :before "
    "AND hold_id IS NULL ORDER BY created_at LIMIT :limit"
)
_PRUNED_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxFilter:
    """Which sandboxes. ``labels``: with all of these; ``text``: in the name, or at the beginning of the id."""

    states: tuple[str, ...] = ()
    project_id: str | None = None
    agent_ids: tuple[str, ...] = ()
    parent_id: str | None = None
    labels: Mapping[str, str] | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxPage:
    """``after``: where the next page starts; None at the end. A page may have fewer sandboxes than asked for, or none,
    and still not be the last."""

    sandboxes: list[Sandbox]
    after: str | None


def check(one: Sandbox) -> Sandbox:
    """Raises UsageError for what a claim would refuse in a row that another tool wrote."""
    if one.state != SandboxState.STARTING:
        raise UsageError(f"a new sandbox is 'starting', not {shown(one.state)}")
    try:
        return replace(rows.check(replace(one, id=one.id or "new")), id=one.id)
    except BadRow as error:
        raise UsageError(f"bad sandbox: {error}") from None


def add(tx: Tx, some: Sequence[Sandbox], *, by: str) -> list[Sandbox]:
    """All or none. Those without an id get one. Raises Conflict when an id, or the name of a live one, is taken, and
    NotFound for an unknown snapshot."""
    return [_add_one(tx, one, by=by) for one in some]


def _add_one(tx: Tx, one: Sandbox, *, by: str) -> Sandbox:
    one = replace(one, id=one.id or new_id(tx.now_ms), created_by=one.created_by or by)
    if one.name is not None and (other := _live_named(tx, one.name, one.project_id)):
        raise Conflict(f"the sandbox {shown(other)} has the name {shown(one.name)}; choose another one, or end that")
    start = tx.first(_SNAPSHOT, id=one.snapshot_id) if one.snapshot_id is not None else None
    if one.snapshot_id is not None and start is None:
        raise NotFound(f"no snapshot {shown(one.snapshot_id)}; `swarm snapshot list` shows all")
    if start is not None and (slept_in := rows.slept_in(start)):
        raise Conflict(slept_in)
    agent = Agents().load(tx, [one.agent_id]).get(one.agent_id) if one.agent_id is not None else None
    if one.agent_id is None or isinstance(agent, Agent):  # else the claim decides
        of = None if start is None else rows.snapshot(start)
        one = replace(one, secret=rows.holds_secrets(one, agent if isinstance(agent, Agent) else None, of))
    values = {name: value for name, value in asdict(one).items() if name in _GIVEN}
    if tx.first(_INSERT, now=tx.now, **values) is None:
        if tx.first(BY_ID, id=one.id) is None:
            raise ChangeRefused("a trigger ignored it")
        raise Conflict(f"the sandbox id {shown(one.id)} is taken; choose another one")
    events.record(tx, "sandbox.add", by=by, sandbox_id=one.id, parent=one.parent_id, snapshot=one.snapshot_id)
    return _by_id(tx, one.id)


def _live_named(tx: Tx, name: str, project_id: str | None) -> str | None:
    row = tx.first(_LIVE_NAME, name=name, project_id=project_id)
    return None if row is None else str(lenient(row.id))


def _by_id(tx: Tx, id: str) -> Sandbox:
    row = tx.first(BY_ID, id=id)
    assert row is not None
    return rows.sandbox(row)


def sandbox(tx: Tx, ref: str, *, project_id: str | None = None) -> Sandbox:
    """By id, by name, or by the beginning of a generated id. Of several with one name, the live one, else the newest.
    With a ``project_id``, there are no others. Raises NotFound, and Conflict if several are meant."""
    return rows.sandbox(_find(tx, ref, project_id))


def _find(tx: Tx, ref: str, project_id: str | None) -> Row:
    def visible(row: Row | None) -> bool:
        return row is not None and project_id in (None, row.project_id)

    row = None
    if storable(ref):
        row = tx.first(BY_ID, id=ref)
        if not visible(row):
            named = tx.all(_BY_NAME, name=ref, project_id=project_id)
            live = [one for one in named if one.state not in TERMINAL_SANDBOX_STATES]
            if len(live) > 1:
                ids = ", ".join(shown(one.id) for one in live[:5])
                raise Conflict(f"several sandboxes have the name {shown(ref)}: {ids}; give an id")
            row = next(iter([*live, *named]), None)
        if not visible(row):
            row = unique(tx, _BY_BEGINNING, ref, "sandboxes", project_id=project_id)
    if row is None or not visible(row):
        hint = ""
        if project_id is None:
            hint = versions.did_you_mean(ref, list({str(lenient(one.name)) for one in tx.all(_NAMES) if one.name}))
        raise NotFound(f"no sandbox {shown(ref)}{hint or '; `swarm sandbox list` shows the newest'}")
    return row


def page(tx: Tx, which: SandboxFilter, *, after: str | None, limit: int, scanned: int = SCANNED) -> SandboxPage:
    """Newest first; looks at ``scanned`` sandboxes at most. Raises UsageError for an ``after`` that no page gave."""
    inside, terms, values = list[str](), list[str](), dict[str, Any]()
    if which.states and not TERMINAL_SANDBOX_STATES & set(which.states):
        inside.append(f"b.{SANDBOX_LIVE}")
    for name, some in (("state", which.states), ("agent_id", which.agent_ids)):
        if some:
            named = {f"{name}_{number}": str(one) for number, one in enumerate(some)}
            terms.append(f"b.{name} IN ({', '.join(':' + one for one in named)})")
            values |= named
    for name in ("project_id", "parent_id"):
        if getattr(which, name) is not None:
            terms.append(f"b.{name} = :{name}")
            values[name] = getattr(which, name)
    if which.text:
        escaped = "".join(f"!{c}" if c in "!%_" else c for c in which.text.replace("\0", ""))
        terms.append("(lower(b.name) LIKE :in_name ESCAPE '!' OR b.id LIKE :begins ESCAPE '!')")
        values |= {"in_name": f"%{escaped.lower()}%", "begins": f"{escaped}%"}
    found, after = newest(
        tx, "sandboxes", SANDBOX_COLUMNS,
        inside=inside, terms=terms, named=values, after=after, limit=limit, scanned=scanned,
    )  # fmt: skip
    some_of = [rows.sandbox(row) for row in found if isinstance(row.id, str) and storable(row.id)]
    if which.labels:
        some_of = [one for one in some_of if dict(which.labels).items() <= rows.labels(one).items()]
    return SandboxPage(sandboxes=some_of, after=after)


def counts(tx: Tx) -> dict[str, int]:
    """Of those that have not ended, by state."""
    return {str(lenient(row.state)): row.number for row in tx.all(_COUNTS)}


def want(tx: Tx, ref: str, wanted: str, *, by: str, project_id: str | None = None) -> Sandbox:
    """What is to become of it: 'running', 'paused' or 'ended'. The engine that holds it learns it when it renews its
    lease; one that nobody holds, and that is to end, ends now. Does nothing when it is so already. Raises NotFound,
    and Conflict when it has ended, or is being ended."""
    if wanted not in rows.WANTED:
        raise UsageError(f"a sandbox can be wanted 'running', 'paused' or 'ended', not {shown(wanted)}")
    row = _find(tx, ref, project_id)
    if row.state in TERMINAL_SANDBOX_STATES:
        if wanted == SandboxState.ENDED:
            return rows.sandbox(row)
        raise Conflict(f"the sandbox {shown(row.id)} {_is_over(row)}")
    if row.wanted == SandboxState.ENDED and wanted != SandboxState.ENDED:
        raise Conflict(f"the sandbox {shown(row.id)} is being ended")
    if row.wanted == wanted:
        return rows.sandbox(row)
    if row.hold_id is None and wanted == SandboxState.ENDED:
        events.record(tx, "sandbox.end", by=by, sandbox_id=row.id)
        end(tx, row, SandboxState.ENDED, why=f"by {by}")
    elif row.hold_id is None and row.state == SandboxState.PAUSED == wanted:
        if row.wanted is not None:
            events.record(tx, "sandbox.pause", by=by, sandbox_id=row.id)
            tx.run(_WANT, id=row.id, wanted=None)
    else:
        did = {SandboxState.RUNNING: "resume", SandboxState.PAUSED: "pause", SandboxState.ENDED: "end"}
        if wanted != SandboxState.RUNNING or row.state == SandboxState.PAUSED:  # else it is only used
            events.record(tx, f"sandbox.{did[SandboxState(wanted)]}", by=by, sandbox_id=row.id)
        tx.run(_WANT, id=row.id, wanted=wanted)
    return _by_id(tx, row.id)


def _is_over(row: Row) -> str:
    why = f": {lenient(row.error)}" if row.error else ""
    if row.state == SandboxState.LOST:
        return f"is lost{why}"
    return f"has ended{why}"


def remove(tx: Tx, ref: str, *, by: str, project_id: str | None = None) -> Sandbox:
    """Delete the row of one that has ended; its events are told of no more. Raises NotFound, and Conflict while it has
    not ended."""
    row = _find(tx, ref, project_id)
    if row.state not in TERMINAL_SANDBOX_STATES or row.hold_id is not None:
        raise Conflict(f"the sandbox {shown(row.id)} has not ended: end it first")
    events.record(tx, "sandbox.remove", by=by, sandbox_id=row.id)
    tx.run(_DELETE, id=row.id)
    return rows.sandbox(row)


def prune(tx: Tx, *, older_than_seconds: float) -> int:
    """Delete rows of those that ended before then, some at once. Returns how many."""
    before = iso(tx.now_ms - round(older_than_seconds * 1000))
    old = [row for row in tx.all(_OLD, before=before, limit=_PRUNED_AT_ONCE) if storable(str(row.id))]
    tx.many(_DELETE, [{"id": row.id} for row in old])
    return len(old)
