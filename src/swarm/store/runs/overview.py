"""A run as a graph: its workflow's steps, each with what became of it; bounded, however wide it fans out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from swarm.errors import NotFound, StoreError
from swarm.model import StepStatus
from swarm.store.sql import rows
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import RunRow, lenient, milliseconds, value
from swarm.store.sql.transaction import Tx
from swarm.store.tickets.validation import shown, storable
from swarm.workflow import definition
from swarm.workflow import graph as drawing
from swarm.workflow.graph import Edge, Graph, Node

MAX_EXECUTIONS: Final = 50_000  # of steps with several, that one answer counts
MAX_NESTED: Final = 100  # ids of nested runs, of one step
_MAX_STEPS: Final = 10_000
_MAX_RUNS: Final = 2_000
_ERROR_CHARS: Final = 500

_RUN: Final = Sql(f"SELECT {rows.columns(RunRow, 'r')}, r.definition FROM workflow_runs r WHERE r.id = :id")
_DEFINITION: Final = Sql("SELECT definition FROM definitions WHERE digest = :digest")
# `name` is a step's within the run, without the run's path; that of an execution of a step with several has a bracket.
_STEPS: Final = Sql(
    "SELECT s.id, substr(s.step_id, :from) AS name, s.agent_name, s.status, s.queued_at, s.started_at, s.completed_at, "
    f"s.duration_ms, substr(s.error, 1, {_ERROR_CHARS}) AS error, "
    "(SELECT count(*) FROM attempts a WHERE a.step_execution_id = s.id) AS attempts FROM step_executions s "
    f"WHERE s.run_id = :id AND instr(substr(s.step_id, :from), '[') = 0 ORDER BY s.id LIMIT {_MAX_STEPS}"
)
_EXECUTIONS: Final = Sql(
    "SELECT substr(e.name, 1, instr(e.name, '[') - 1) AS base, e.status, count(*) AS number, "
    "sum((SELECT count(*) FROM attempts a WHERE a.step_execution_id = e.id)) AS attempts "
    "FROM (SELECT s.id, s.status, substr(s.step_id, :from) AS name FROM step_executions s "
    f"WHERE s.run_id = :id AND instr(substr(s.step_id, :from), '[') > 0 LIMIT {MAX_EXECUTIONS + 1}) e "
    "GROUP BY base, e.status ORDER BY base, e.status"
)
_NESTED: Final = Sql(
    "SELECT r.id, substr(s.step_id, :from) AS name FROM workflow_runs r "
    "JOIN step_executions s ON s.id = r.parent_step_id "
    f"WHERE s.run_id = :id AND r.parent_step_id IS NOT NULL ORDER BY r.id LIMIT {_MAX_RUNS}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNode(Node):
    """A step of a run. ``execution``: its id in the ticket's steps; None and 'pending' if it has not begun.
    ``executions``: of a step with several, how many have each status. ``runs``: of nested workflows, the first
    `MAX_NESTED`."""

    execution: str | None = None
    status: str = StepStatus.PENDING
    queued_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    duration_ms: float | None = None
    attempts: int = 0
    error: str | None = None
    executions: Mapping[str, int]
    runs: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunGraph:
    """Not ``complete``: the run has more executions than were counted."""

    run: RunRow
    nodes: list[RunNode]
    edges: list[Edge]
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """``definition``: JSON text; None in a plain ticket's run, and before a workflow's first decision."""

    run: RunRow
    definition: str | None
    steps: Sequence[Any]
    executions: Sequence[Any]
    nested: Sequence[Any]
    now_ms: int


def read(tx: Tx, run_id: str) -> Read:
    """Raises NotFound, StoreError."""
    row = tx.first(_RUN, id=run_id) if storable(run_id) else None
    if row is None:
        raise NotFound(f"no run {shown(run_id)}; `swarm ticket show` lists a ticket's")
    text = None
    if row.definition is not None:
        found = tx.first(_DEFINITION, digest=row.definition)
        if found is None:
            raise StoreError(f"the frozen workflow {shown(row.definition)} is gone from the table definitions")
        text = found.definition
    run, which = value(RunRow, row), {"id": run_id, "from": len(row.path) + 1}
    return Read(
        run=run,
        definition=text,
        steps=tx.all(_STEPS, **which),
        executions=tx.all(_EXECUTIONS, **which),
        nested=tx.all(_NESTED, **which),
        now_ms=tx.now_ms,
    )


def graph(found: Read) -> RunGraph:
    """Raises StoreError for a definition that this version can't read."""
    plan = _plan(found)
    own = {row.name: row for row in found.steps}
    attempts = Counter({row.name: row.attempts for row in found.steps})
    executions: dict[str, dict[str, int]] = {}
    for row in found.executions:
        executions.setdefault(row.base, {})[lenient(row.status) or ""] = row.number
        attempts[row.base] += row.attempts
    nested: dict[str, list[str]] = {}
    for row in found.nested:
        ids = nested.setdefault(row.name.partition("[")[0], [])
        if len(ids) < MAX_NESTED:
            ids.append(row.id)
    nodes = [
        _node(node, own.get(node.id), executions.get(node.id, {}), attempts[node.id], nested.get(node.id, []), found)
        for node in plan.nodes
    ]
    complete = sum(row.number for row in found.executions) <= MAX_EXECUTIONS
    return RunGraph(run=found.run, nodes=nodes, edges=plan.edges, complete=complete)


def _plan(found: Read) -> Graph:
    if found.definition is not None:
        try:
            return drawing.data(definition.from_json(json.loads(found.definition)))
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise StoreError(f"can't read the frozen workflow of the run {found.run.id}: {error}") from None
    nodes = [
        Node(id=row.name, part="steps", layer=1, kind="agent", what=row.agent_name or "", notes=[], many=False)
        for row in found.steps[:1]  # a plain ticket's only step
    ]
    return Graph(name="", version="", nodes=nodes, edges=[])


def _node(
    node: Node, row: Any, executions: Mapping[str, int], attempts: int, nested: list[str], found: Read
) -> RunNode:
    known = {name: getattr(node, name) for name in ("id", "part", "layer", "kind", "what", "notes", "many")}
    empty = RunNode(**known, attempts=attempts, executions=executions, runs=nested)
    if row is None:
        return empty
    began = milliseconds(row.started_at)
    runs = row.status == StepStatus.RUNNING and began is not None
    return replace(
        empty,
        execution=row.id,
        status=lenient(row.status) or "",
        queued_at=lenient(row.queued_at),
        started_at=lenient(row.started_at),
        completed_at=lenient(row.completed_at),
        duration_ms=float(max(0, found.now_ms - (began or 0))) if runs else row.duration_ms,
        error=lenient(row.error),
    )
