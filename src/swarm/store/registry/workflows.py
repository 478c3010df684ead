"""Registered workflows: one row for each version. `steps` holds the whole definition, as canonical JSON."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Final

from swarm.base import versions
from swarm.errors import Conflict, NotFound, StoreError
from swarm.model import TERMINAL_TICKET_STATES
from swarm.store.registry import schedules
from swarm.store.sql.dialect import Sql
from swarm.store.sql.reads import Read
from swarm.store.sql.rows import dump, flag, lenient, value
from swarm.store.sql.transaction import Row, Tx
from swarm.store.sql.unique import unique
from swarm.store.tickets import events
from swarm.workflow import definition
from swarm.workflow.definition import Workflow

# A workflow without an id of its own gets one derived from its name and version.
_NAMESPACE: Final = uuid.UUID("0f0c0d57-5e9e-5c0b-8a55-4d6d2f4a1b3e")

_COLUMNS: Final = "id, name, version, description, steps, enabled, created_at, updated_at"
_BY_ID: Final = Sql(f"SELECT {_COLUMNS} FROM workflows WHERE id = :ref")
_BY_NAME: Final = Sql(f"SELECT {_COLUMNS} FROM workflows WHERE name = :ref")
_BY_BEGINNING: Final = Sql(
    f"SELECT {_COLUMNS} FROM workflows WHERE id >= :ref AND id < :end AND length(id) IN (32, 36) ORDER BY id LIMIT 100"
)
NAMES: Final = Sql("SELECT DISTINCT name FROM workflows LIMIT 500")
_ALL: Final = Sql(f"SELECT {_COLUMNS} FROM workflows ORDER BY name, version")
_INSERT: Final = Sql(
    "INSERT INTO workflows (id, name, version, description, steps, variables, budget_usd, budget_tokens) "
    "VALUES (:id, :name, :version, :description, :steps, :variables, :budget_usd, :budget_tokens)"
)
_UPDATE: Final = Sql(
    "UPDATE workflows SET name = :name, version = :version, description = :description, steps = :steps, "
    "variables = :variables, budget_usd = :budget_usd, budget_tokens = :budget_tokens, updated_at = :now WHERE id = :id"
)
_DELETE: Final = Sql("DELETE FROM workflows WHERE id = :id")
_ENDED: Final = ", ".join(f"'{state}'" for state in sorted(TERMINAL_TICKET_STATES))
_TICKETS_THAT_NEED: Final = Sql(
    "SELECT id, workflow_id AS ref FROM tickets "
    "WHERE (workflow_id = :id OR workflow_id = :name OR substr(workflow_id, 1, length(:name) + 1) = :name || '@') "
    f"AND state NOT IN ({_ENDED}) ORDER BY created_at"
)
_SCHEDULED: Final = Sql("SELECT number FROM schedules WHERE workflow_id = :id AND next_at IS NOT NULL LIMIT 1")
_ENABLE: Final = Sql("UPDATE workflows SET enabled = :enabled, updated_at = :now WHERE id = :id")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowRow:
    """``definition`` is the JSON text as stored; if another tool wrote the row, it may be anything."""

    id: str
    name: str
    version: str
    description: str
    enabled: bool
    definition: str
    created_at: str | None
    updated_at: str | None

    def parsed(self) -> Workflow:
        """Raises StoreError."""
        try:
            data = json.loads(self.definition)
            if not isinstance(data, dict):
                raise ValueError("steps must hold a JSON object, as `swarm workflow add` writes it")
            return definition.from_json(data)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise StoreError(
                f"the workflow {self.name!r} ({self.id}) has a broken row: {error}; add it again under a new version"
            ) from None


def put_workflow(tx: Tx, new: Workflow, *, by: str | None = None) -> WorkflowRow:
    """Register, enabled. An identical workflow changes nothing; another version under the same id replaces it. Another
    definition under a registered name and version is a Conflict."""
    id_ = new.id or str(uuid.uuid5(_NAMESPACE, f"{new.name}@{new.version}"))
    text = definition.canonical(new)
    for namesake in tx.all(_BY_NAME, ref=new.name):
        if namesake.version != new.version:
            continue
        if namesake.id != id_:
            raise Conflict(
                f"the workflow {new.name}@{new.version} is registered under the id {namesake.id}, not {id_}; "
                "use that id, or another version"
            )
        if namesake.steps == text:
            return _row(namesake)
        raise Conflict(
            f"the workflow {new.name}@{new.version} is already registered with another definition; "
            "give the changed workflow a new version"
        )
    values = {
        "id": id_,
        "name": new.name,
        "version": new.version,
        "description": new.description,
        "steps": text,
        "variables": dump(dict(new.variables)),
        "budget_usd": new.budget_usd,
        "budget_tokens": new.budget_tokens,
    }
    registered = tx.first(_BY_ID, ref=id_)
    if registered is None:
        tx.run(_INSERT, **values)
    else:
        tx.run(_UPDATE, now=tx.now, **values)
        schedules.sync(tx, registered.name)
    schedules.sync(tx, new.name)
    return _recorded(tx, "workflow.add", workflow(tx, id_), by)


def _recorded(tx: Tx, did: str, row: WorkflowRow, by: str | None) -> WorkflowRow:
    if by is not None:
        events.record(tx, did, by=by, name=f"{row.name}@{row.version}", id=row.id)
    return row


def remove(tx: Tx, ref: str, *, by: str | None = None) -> WorkflowRow:
    """Unregister and return one. Raises NotFound, and Conflict while a ticket that has not ended needs it, or it is
    started by time."""
    removed = workflow(tx, ref)
    name = f"{removed.name}@{removed.version}"
    rows = tx.all(_TICKETS_THAT_NEED, id=removed.id, name=removed.name)
    meant = {ref: find(tx, ref) for ref in {row.ref for row in rows}}  # `name`, `name@1` and `name@1.0` mean the newest
    rows = [row for row in rows if (one := meant[row.ref]) and one.id == removed.id]
    if needed := [str(lenient(row.id)) for row in rows[:3]]:
        raise Conflict(
            f"tickets that have not ended need the workflow {name} ({', '.join(needed)}); wait for them, or cancel "
            "them with `swarm ticket cancel`"
        )
    if tx.first(_SCHEDULED, id=removed.id) is not None:
        raise Conflict(f"a schedule starts the workflow {name}; `swarm workflow disable {name}` stops that")
    tx.run(_DELETE, id=removed.id)
    schedules.sync(tx, removed.name)
    return _recorded(tx, "workflow.remove", removed, by)


def workflow(tx: Tx, ref: str, *, once: bool = False) -> WorkflowRow:
    """By id, name (newest version), name@1 (newest 1.x), name@1.0.0 or a unique beginning of an id. Raises NotFound.
    ``once``: as `find`."""
    row = find(tx, ref, once=once) or unique(tx, _BY_BEGINNING, ref, "workflows")
    if row is None:
        hint = versions.did_you_mean(ref, [one.name for one in tx.all(NAMES)])
        raise NotFound(f"no workflow {ref!r}{hint or '; `swarm workflow list` shows all'}")
    return _row(row)


def by_id(ref: str) -> Read:
    """What `find` reads first."""
    return _BY_ID, {"ref": ref}


def find(tx: Tx, ref: str, *, once: bool = False) -> Row | None:
    """By id or name, with or without a version. ``once``: this transaction changes none."""
    found = tx.once(_BY_ID, ref=ref) if once else tx.first(_BY_ID, ref=ref)
    return found or versions.pick(ref, tx.all(_BY_NAME, ref=ref.partition("@")[0]))


def workflows(tx: Tx) -> list[WorkflowRow]:
    return [_row(row) for row in tx.all(_ALL)]


def enable(tx: Tx, ref: str, *, enabled: bool, by: str) -> WorkflowRow:
    found = workflow(tx, ref)
    tx.run(_ENABLE, id=found.id, enabled=enabled, now=tx.now)
    schedules.sync(tx, found.name)
    did = "workflow.enable" if enabled else "workflow.disable"
    return _recorded(tx, did, workflow(tx, found.id), by if enabled != found.enabled else None)


def _row(row: Row) -> WorkflowRow:
    return value(WorkflowRow, row, enabled=flag(row.enabled), definition=row.steps)
