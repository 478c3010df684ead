"""Registered agents: one row for each version."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from swarm.base import jsontext, versions
from swarm.errors import Conflict, NotFound, StoreError
from swarm.fields import (
    DEBIAN_PACKAGE,
    IN_WORDS,
    MODULE,
    NAME,
    NO_NUL,
    NPM_PACKAGE,
    REQUIREMENT,
    VARIABLE,
    VERSION,
)
from swarm.model import (
    BOUNDS,
    TERMINAL_TICKET_STATES,
    Agent,
    BudgetPolicy,
    FailureReason,
    KeepVm,
    RetryPolicy,
    names_imported,
)
from swarm.store.sql.conditions import SANDBOX_LIVE
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import dump, lenient
from swarm.store.sql.transaction import Row, Tx
from swarm.store.sql.unique import unique
from swarm.store.tickets import events, places
from swarm.store.tickets.validation import shown

AGENT_FIELDS: Final = tuple(field.name for field in fields(Agent))
_COLUMNS: Final = ", ".join(AGENT_FIELDS)
_LISTS: Final = ("entry", "secrets", "preload", "requirements", "packages", "npm")
_JSON: Final = frozenset({*_LISTS, "env", "requires", "retry"})

_NUMBERS: Final = tuple(name for name in AGENT_FIELDS if name in BOUNDS)
# A row is checked as a manifest is: the pattern of each text, and of each item of a list or key of an object.
_PATTERNS: Final = {
    "name": NAME,
    "version": VERSION,
    "path": NO_NUL,
    "entry": NO_NUL,
    "env": VARIABLE,
    "secrets": VARIABLE,
    "preload": MODULE,
    "requirements": REQUIREMENT,
    "packages": DEBIAN_PACKAGE,
    "npm": NPM_PACKAGE,
}
_MOST_ITEMS: Final = {"entry": 256, "requirements": 200, "packages": 200, "npm": 200}
_MOST_CHARS: Final = 4096
_REQUIRED: Final = ("memory_mb", "vcpus", "disk_mb", "timeout_seconds")  # the other numbers may be NULL
_RETRY_NUMBERS: Final = ("max_attempts", "delay_seconds", "factor", "max_delay_seconds")

BY_IDS: Final = Sql(f"SELECT {_COLUMNS} FROM agents WHERE id IN :ids")
_BY_VERSION: Final = Sql(f"SELECT {_COLUMNS} FROM agents WHERE name = :name AND version = :version")
_BY_ID: Final = Sql(f"SELECT {_COLUMNS} FROM agents WHERE id = :ref")
_BY_NAME: Final = Sql(f"SELECT {_COLUMNS} FROM agents WHERE name = :ref")
_BY_BEGINNING: Final = Sql(
    f"SELECT {_COLUMNS} FROM agents WHERE id >= :ref AND id < :end AND length(id) IN (32, 36) ORDER BY id LIMIT 100"
)
_ALL: Final = Sql(f"SELECT {_COLUMNS} FROM agents ORDER BY name, version")
NAMES: Final = Sql("SELECT DISTINCT name FROM agents LIMIT 500")
_INSERT: Final = Sql(f"INSERT INTO agents ({_COLUMNS}) VALUES ({', '.join(':' + name for name in AGENT_FIELDS)})")
_UPDATE: Final = Sql(
    f"UPDATE agents SET {', '.join(f'{name} = :{name}' for name in AGENT_FIELDS if name != 'id')}, updated_at = :now "
    "WHERE id = :id"
)
_DELETE: Final = Sql("DELETE FROM agents WHERE id = :id")
_MOVE: Final = Sql(
    "UPDATE agents SET path = :new || substr(path, length(:old) + 1) WHERE substr(path, 1, length(:old)) = :old"
)
# Live workflow runs pin agents in their definition; their steps name the agent only when they start.
_RUNS_THAT_NEED: Final = Sql(
    "SELECT DISTINCT r.ticket_id AS id FROM workflow_runs r JOIN definitions d ON d.digest = r.definition "
    "WHERE r.progress IS NOT NULL AND r.status IN ('running', 'waiting') AND instr(d.definition, :pinned) > 0 LIMIT 3"
)
# A ticket that names no version keeps the one that its step has begun with, though a newer one may be there by now.
_STEPS_THAT_NEED: Final = Sql(
    "SELECT DISTINCT r.ticket_id AS id FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id "
    "WHERE r.status IN ('running', 'waiting') AND s.agent_id = :id "
    "AND s.status NOT IN ('completed', 'failed', 'skipped', 'cancelled') LIMIT 3"
)
_ENDED: Final = ", ".join(f"'{state}'" for state in sorted(TERMINAL_TICKET_STATES))
_SANDBOXES_THAT_NEED: Final = Sql(
    f"SELECT id, agent_id AS ref FROM sandboxes WHERE {SANDBOX_LIVE} AND (agent_id = :id OR agent_id = :name "
    "OR substr(agent_id, 1, length(:name) + 1) = :name || '@')"
)
_TICKETS_THAT_NEED: Final = Sql(  # or may need it: those that name another version, too
    "SELECT id, ref FROM (SELECT id, created_at, coalesce(nullif(agent_id, ''), assignee_id) AS ref FROM tickets "
    "WHERE (agent_id <> '' OR coalesce(nullif(assignee_type, ''), 'agent') = 'agent') "
    f"AND state NOT IN ({_ENDED})) AS t "
    "WHERE ref = :id OR ref = :name OR substr(ref, 1, length(:name) + 1) = :name || '@' ORDER BY created_at"
)


def by_version(pinned: str) -> tuple[Sql, dict[str, Any]]:
    """What reads a ``name@version``."""
    name, _, version = pinned.partition("@")
    return _BY_VERSION, {"name": name, "version": version}


class Agents:
    """Agents by id; each is parsed again only when its row changes. For one thread only, and for transactions that
    change no agents."""

    def __init__(self) -> None:
        self._parsed: dict[str, tuple[Row, Agent | StoreError]] = {}
        self._tx: Tx | None = None
        self._rows = dict[str, Row]()  # that this transaction has read

    def load(self, tx: Tx, ids: Iterable[str]) -> dict[str, Agent | StoreError]:
        """The agents that exist; a StoreError in place of one with a broken row. What is no id is a name, with or
        without a version."""
        wanted, rows = set(ids), self._read_in(tx)
        rows |= {row.id: row for row in tx.all_in(BY_IDS, wanted - rows.keys())}
        found = {id: self._parse(rows[id]) for id in wanted if id in rows}
        for ref in wanted - found.keys():
            if (row := _named(tx, ref)) is not None:
                found[ref] = self._parse(row)
        return found

    def named(self, tx: Tx, pinned: str) -> Agent | StoreError | None:
        """By ``name@version``, with the full version."""
        statement, values = by_version(pinned)
        if (row := tx.first(statement, **values)) is None:
            return None
        self._read_in(tx)[row.id] = row
        return self._parse(row)

    def _read_in(self, tx: Tx) -> dict[str, Row]:
        if tx is not self._tx:
            self._tx, self._rows = tx, {}
        return self._rows

    def _parse(self, row: Row) -> Agent | StoreError:
        known = self._parsed.get(row.id)
        if known is None or known[0] != row:
            try:
                known = (row, parse(row))
            except StoreError as error:
                known = (row, error)
            self._parsed[row.id] = known
        return known[1]


def parse(row: Row) -> Agent:
    """Raises StoreError that names the wrong column: other tools may write to this table."""
    values = {name: getattr(row, name) for name in AGENT_FIELDS}
    try:
        for name in _JSON:
            try:
                values[name] = jsontext.loads(values[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        retry = dict(values["retry"])
        if "on" in retry:
            retry["on"] = frozenset(FailureReason(reason) for reason in retry["on"])
        for name in _LISTS:
            if not isinstance(values[name], list) or not all(isinstance(item, str) for item in values[name]):
                raise ValueError(f"{name} must be a JSON list of strings")
            values[name] = tuple(values[name])
        if not isinstance(values["image"], str | None) or len(values["image"] or "") > _MOST_CHARS:
            raise ValueError("image must be text")
        if not values["entry"] and not names_imported(values["image"]):
            raise ValueError("entry is empty")
        if not isinstance(values["env"], dict) or not all(isinstance(text, str) for text in values["env"].values()):
            raise ValueError("env must be a JSON object of strings")
        values["requires"] = places.labels(values["requires"])
        for name in _NUMBERS:
            if name in _REQUIRED or values[name] is not None:
                _check_number(name, name, values[name])
        for name in _RETRY_NUMBERS:
            if name in retry:
                _check_number(f"retry.{name}", name, retry[name])
        _check_texts(values)
        if values["idempotent"] not in (0, 1):  # SQLite stores any value in any column, and 'false' would be true
            raise ValueError(f"idempotent must be 0 or 1, not {str(values['idempotent'])[:40]!r}")
        if values["over_budget"] not in (None, *BudgetPolicy):
            raise ValueError("over_budget must be 'fail' or 'wait', or NULL")
        if values["keep_vm"] not in (None, *KeepVm):
            raise ValueError("keep_vm must be 'never', 'failure' or 'always', or NULL")
        values |= {
            "path": Path(values["path"]),
            "retry": RetryPolicy(**retry),
            "idempotent": bool(values["idempotent"]),
        }
        return Agent(**values)
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"the agent {shown(row.name)} ({str(row.id)[:80]}) has a broken row: {error}; register it again"
        ) from None


def _check_texts(values: dict[str, Any]) -> None:
    if values["runtime"] not in ("python", "exec"):
        raise ValueError("runtime must be 'python' or 'exec'")
    for name, pattern in _PATTERNS.items():
        items = [values[name]] if isinstance(values[name], str) else list(values[name])
        if len(items) > _MOST_ITEMS.get(name, _MOST_CHARS):
            raise ValueError(f"{name} must have at most {_MOST_ITEMS.get(name, _MOST_CHARS)} items")
        for item in items:
            if len(item) > _MOST_CHARS or not re.fullmatch(pattern.removesuffix("$"), item):
                raise ValueError(f"{name} must be {IN_WORDS[pattern]}, but is {item[:80]!r}")
    for name, text in values["env"].items():
        if len(text) > _MOST_CHARS or "\0" in text:
            raise ValueError(f"env.{name} must be text without NUL characters, at most {_MOST_CHARS}")


def _check_number(label: str, name: str, value: object) -> None:
    least, most = BOUNDS[name]
    integral = isinstance(least, int)
    if (
        isinstance(value, bool)
        or not isinstance(value, int if integral else (int, float))
        or not least <= value <= most
    ):
        raise ValueError(f"{label} must be a {'whole ' if integral else ''}number from {least:g} to {most:g}")


def _to_row(agent: Agent) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(agent, name) for name in AGENT_FIELDS}
    retry = asdict(agent.retry) | {"on": sorted(agent.retry.on)}
    values |= {"path": str(agent.path), "env": dict(agent.env), "retry": retry, "requires": dict(agent.requires)}
    return {name: dump(value) if name in _JSON else value for name, value in values.items()}


def put_agent(tx: Tx, agent: Agent, *, replace: bool = False, by: str | None = None) -> Agent:
    """Register. An identical agent changes nothing; another version under the same id replaces it. A changed agent
    under a registered name and version is a Conflict, since runs refer to agents by these. Only `path` may change,
    unless it is to ``replace`` that one."""
    row = tx.first(_BY_ID, ref=agent.id)
    namesakes = [other for other in tx.all(_BY_NAME, ref=agent.name) if other.version == agent.version]
    if namesakes and namesakes[0].id != agent.id:
        raise Conflict(
            f"the agent {agent.name}@{agent.version} is registered under the id {namesakes[0].id}, not {agent.id}; "
            "use that id, or another version"
        )
    if row is None:
        tx.run(_INSERT, **_to_row(agent))
        _record(tx, "agent.add", agent, by)
        return agent
    try:
        registered: Agent | None = parse(row)
    except StoreError:
        registered = None  # a broken row is replaced
    if registered == agent:
        return agent
    if not replace and registered is not None and (registered.name, registered.version) == (agent.name, agent.version):
        changed = [n for n in AGENT_FIELDS if n != "path" and getattr(registered, n) != getattr(agent, n)]
        if _digest(registered) != _digest(agent) and _digest(registered) and _digest(agent):
            changed.append("program (its files differ)")
        if changed:
            raise Conflict(
                f"the agent {agent.name}@{agent.version} is already registered with another {', '.join(changed)}; "
                "give the changed agent a new version (while you write it, `swarm agent add --dev` replaces it)"
            )
    tx.run(_UPDATE, now=tx.now, **_to_row(agent))
    if registered is None or registered.requires != agent.requires:
        places.clear(tx)
    _record(tx, "agent.add", agent, by)
    return agent


def _record(tx: Tx, did: str, agent: Agent, by: str | None) -> None:
    if by is not None:
        events.record(tx, did, by=by, name=f"{agent.name}@{agent.version}", id=agent.id)


def _digest(agent: Agent) -> str:
    """The digest of its files, from the directory name that `swarm.agents.install` chose; '' for other directories."""
    digest = agent.path.name.removeprefix(f"{agent.name}-{agent.version}-")
    return digest if re.fullmatch("[0-9a-f]{12}", digest) else ""


def remove_agent(tx: Tx, ref: str, *, by: str | None = None) -> Agent:
    """Unregister and return one. Raises NotFound, and Conflict while a ticket or sandbox that has not ended needs
    it."""
    removed = agent(tx, ref)
    pinned = f'"agent":"{removed.name}@{removed.version}"'
    rows = tx.all(_TICKETS_THAT_NEED, id=removed.id, name=removed.name)
    held = tx.all(_SANDBOXES_THAT_NEED, id=removed.id, name=removed.name)
    refs = {row.ref for row in (*rows, *held)}
    meant = {ref: _find(tx, ref) for ref in refs}  # `name` and `name@1` mean the newest
    rows = [row for row in rows if (one := meant[row.ref]) and one.id == removed.id]
    rows = [*rows[:3], *tx.all(_RUNS_THAT_NEED, pinned=pinned), *tx.all(_STEPS_THAT_NEED, id=removed.id)]
    if tickets := list(dict.fromkeys(str(lenient(row.id)) for row in rows)):
        raise Conflict(
            f"tickets that have not ended need the agent {removed.name}@{removed.version} ({', '.join(tickets)}); "
            "wait for them, or cancel them with `swarm ticket cancel`"
        )
    held = [row for row in held if (one := meant[row.ref]) and one.id == removed.id]
    if sandboxes := list(dict.fromkeys(str(lenient(row.id)) for row in held[:3])):
        raise Conflict(
            f"sandboxes that have not ended need the agent {removed.name}@{removed.version} ({', '.join(sandboxes)}); "
            "end them with `swarm sandbox rm`"
        )
    tx.run(_DELETE, id=removed.id)
    _record(tx, "agent.remove", removed, by)
    return removed


def move(tx: Tx, old: Path, new: Path) -> None:
    """The files of all agents are in another directory now."""
    tx.run(_MOVE, old=f"{old}/", new=f"{new}/")


def agent(tx: Tx, ref: str) -> Agent:
    """By id, name (newest version), name@1 (newest 1.x), name@1.0.0 or a unique beginning of an id. Raises NotFound."""
    row = _find(tx, ref) or unique(tx, _BY_BEGINNING, ref, "agents")
    if row is None:
        hint = versions.did_you_mean(ref, [one.name for one in tx.all(NAMES)])
        raise NotFound(f"no agent {ref!r}{hint or '; `swarm agent list` shows all'}")
    return parse(row)


def _find(tx: Tx, ref: str) -> Row | None:
    return tx.first(_BY_ID, ref=ref) or _named(tx, ref)


def _named(tx: Tx, ref: str) -> Row | None:
    return versions.pick(ref, tx.all(_BY_NAME, ref=ref.partition("@")[0]))


def agents(tx: Tx, *, broken: bool) -> list[Agent]:
    """Raises StoreError for a broken row; with ``broken`` False, it is left out."""
    found = []
    for row in tx.all(_ALL):
        try:
            found.append(parse(row))
        except StoreError:
            if broken:
                raise
    return found
