"""Registered agents: one row for each version."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from swarm.base import versions
from swarm.errors import Conflict, NotFound, StoreError
from swarm.model import BOUNDS, TERMINAL_TICKET_STATES, Agent, BudgetPolicy, FailureReason, RetryPolicy
from swarm.store.sql.database import Row, Tx
from swarm.store.sql.rows import dump

AGENT_FIELDS: Final = tuple(field.name for field in fields(Agent))
_COLUMNS: Final = ", ".join(AGENT_FIELDS)
_LISTS: Final = ("entry", "secrets", "preload", "requirements", "packages")
_JSON: Final = frozenset({*_LISTS, "env", "retry"})

_NUMBERS: Final = tuple(name for name in AGENT_FIELDS if name in BOUNDS)
_REQUIRED: Final = ("memory_mb", "vcpus", "disk_mb", "timeout_seconds")  # the other numbers may be NULL
_OF_RETRY: Final = ("max_attempts", "delay_seconds", "factor", "max_delay_seconds")

BY_IDS: Final = sa.text(f"SELECT {_COLUMNS} FROM agents WHERE id IN :ids")
_BY_VERSION: Final = sa.text(f"SELECT {_COLUMNS} FROM agents WHERE name = :name AND version = :version")
_BY_ID: Final = sa.text(f"SELECT {_COLUMNS} FROM agents WHERE id = :ref")
_BY_NAME: Final = sa.text(f"SELECT {_COLUMNS} FROM agents WHERE name = :ref")
_ALL: Final = sa.text(f"SELECT {_COLUMNS} FROM agents ORDER BY name, version")
IDS_OF_NAMES: Final = sa.text("SELECT name, id FROM agents WHERE name IN :ids ORDER BY version")
_INSERT: Final = sa.text(f"INSERT INTO agents ({_COLUMNS}) VALUES ({', '.join(':' + name for name in AGENT_FIELDS)})")
_UPDATE: Final = sa.text(
    f"UPDATE agents SET {', '.join(f'{name} = :{name}' for name in AGENT_FIELDS if name != 'id')}, updated_at = :now "
    "WHERE id = :id"
)
_DELETE: Final = sa.text("DELETE FROM agents WHERE id = :id")
# Live runs of workflows have pinned it: their steps name it only when they start.
_WANTED_BY_RUN: Final = sa.text(
    "SELECT DISTINCT r.ticket_id AS id FROM workflow_runs r JOIN definitions d ON d.digest = r.definition "
    "WHERE r.progress IS NOT NULL AND r.status IN ('running', 'waiting') AND instr(d.definition, :pinned) > 0 LIMIT 3"
)
_ENDED: Final = ", ".join(f"'{state}'" for state in sorted(TERMINAL_TICKET_STATES))
_WANTED_BY: Final = sa.text(
    "SELECT id FROM tickets WHERE (agent_id = :id OR (assignee_id = :id AND coalesce(agent_id, '') = '' AND "
    f"coalesce(nullif(assignee_type, ''), 'agent') = 'agent')) AND state NOT IN ({_ENDED}) ORDER BY created_at LIMIT 3"
)


class Agents:
    """Agents by id, parsed once for as long as their rows stay the same. One thread only."""

    def __init__(self) -> None:
        self._parsed: dict[str, tuple[Row, Agent | StoreError]] = {}

    def load(self, tx: Tx, ids: Iterable[str]) -> dict[str, Agent | StoreError]:
        """Those of the ids that exist; a StoreError in place of one whose row is broken."""
        return {row.id: self._parse(row) for row in tx.all_in(BY_IDS, ids)}

    def named(self, tx: Tx, pinned: str) -> Agent | StoreError | None:
        """By ``name@version``, both in full."""
        name, _, version = pinned.partition("@")
        row = tx.first(_BY_VERSION, name=name, version=version)
        return self._parse(row) if row is not None else None

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
    """Raises StoreError that names the column: people can write to this table as well."""
    values = {name: getattr(row, name) for name in AGENT_FIELDS}
    try:
        for name in _JSON:
            values[name] = json.loads(values[name])
        retry = dict(values["retry"])
        if "on" in retry:
            retry["on"] = frozenset(FailureReason(reason) for reason in retry["on"])
        for name in _LISTS:
            if not isinstance(values[name], list) or not all(isinstance(item, str) for item in values[name]):
                raise ValueError(f"{name} must be a JSON list of texts")
            values[name] = tuple(values[name])
        if not values["entry"]:
            raise ValueError("entry is empty")
        if not isinstance(values["env"], dict) or not all(isinstance(text, str) for text in values["env"].values()):
            raise ValueError("env must be a JSON object of texts")
        for name in _NUMBERS:
            if name in _REQUIRED or values[name] is not None:
                _check_number(name, name, values[name])
        for name in _OF_RETRY:
            if name in retry:
                _check_number(f"retry.{name}", name, retry[name])
        if values["over_budget"] not in (None, *BudgetPolicy):
            raise ValueError("over_budget must be 'fail' or 'wait', or NULL")
        values |= {
            "path": Path(values["path"]),
            "retry": RetryPolicy(**retry),
            "idempotent": bool(values["idempotent"]),
        }
        return Agent(**values)
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"the agent {row.name!r} ({row.id}) is registered with a broken row: {error}; register it again"
        ) from None


def _check_number(label: str, name: str, value: object) -> None:
    least, most = BOUNDS[name]
    integral = isinstance(least, int)
    if not isinstance(value, int if integral else (int, float)) or not least <= value <= most:
        raise ValueError(f"{label} must be a {'whole ' if integral else ''}number from {least:g} to {most:g}")


def _to_row(agent: Agent) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(agent, name) for name in AGENT_FIELDS}
    retry = asdict(agent.retry) | {"on": sorted(agent.retry.on)}
    values |= {"path": str(agent.path), "env": dict(agent.env), "retry": retry}
    return {name: dump(value) if name in _JSON else value for name, value in values.items()}


def put_agent(tx: Tx, agent: Agent) -> Agent:
    """Register. The same again is nothing; the same id in another version replaces it; a changed agent under an old
    name and version is a Conflict, since runs name what they ran by these. `path` may move: it is no content."""
    row = tx.first(_BY_ID, ref=agent.id)
    namesakes = [other for other in tx.all(_BY_NAME, ref=agent.name) if other.version == agent.version]
    if namesakes and namesakes[0].id != agent.id:
        raise Conflict(
            f"the agent {agent.name}@{agent.version} is registered under the id {namesakes[0].id}, not {agent.id}; "
            "keep that id, or give yours another version"
        )
    if row is None:
        tx.run(_INSERT, **_to_row(agent))
        return agent
    try:
        present: Agent | None = parse(row)
    except StoreError:
        present = None  # broken: mended by this
    if present == agent:
        return agent
    if present is not None and (present.name, present.version) == (agent.name, agent.version):
        changed = [n for n in AGENT_FIELDS if n != "path" and getattr(present, n) != getattr(agent, n)]
        if _digest(present) != _digest(agent) and _digest(present) and _digest(agent):
            changed.append("program (its files differ)")
        if changed:
            raise Conflict(
                f"the agent {agent.name}@{agent.version} is registered with another {', '.join(changed)}; "
                "give the changed agent a new version"
            )
    tx.run(_UPDATE, now=tx.now, **_to_row(agent))
    return agent


def _digest(agent: Agent) -> str:
    """Of its files, as `swarm.agents.install` writes it into the directory's name; '' of a directory by hand."""
    digest = agent.path.name.removeprefix(f"{agent.name}-{agent.version}-")
    return digest if re.fullmatch("[0-9a-f]{12}", digest) else ""


def remove_agent(tx: Tx, ref: str) -> Agent:
    """Forget one; it is returned. Raises NotFound, and Conflict while a ticket that has not ended names it."""
    gone = agent(tx, ref)
    pinned = f'"agent":"{gone.name}@{gone.version}"'
    wanting = [*tx.all(_WANTED_BY, id=gone.id), *tx.all(_WANTED_BY_RUN, pinned=pinned)]
    if tickets := [row.id for row in wanting]:
        raise Conflict(
            f"the agent {gone.name}@{gone.version} is wanted by tickets that have not ended ({', '.join(tickets)}): "
            "wait for them, or cancel them with `swarm ticket cancel`"
        )
    tx.run(_DELETE, id=gone.id)
    return gone


def agent(tx: Tx, ref: str) -> Agent:
    """By id, name (newest version), name@1 (newest 1.x) or name@1.0.0. Raises NotFound."""
    row = tx.first(_BY_ID, ref=ref)
    if row is not None:
        return parse(row)
    found = versions.pick(ref, tx.all(_BY_NAME, ref=ref.partition("@")[0]))
    if found is None:
        raise NotFound(f"no agent {ref!r}; `swarm agent list` shows those there are")
    return parse(found)


def agents(tx: Tx, *, broken: bool) -> list[Agent]:
    """With ``broken``, a row that is broken is an error; without, it is left out."""
    found = []
    for row in tx.all(_ALL):
        try:
            found.append(parse(row))
        except StoreError:
            if broken:
                raise
    return found
