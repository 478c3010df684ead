"""Reads a run's rows as the planner's values, and makes one decision from them. Changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from swarm.base.manifest import Invalid
from swarm.cel import artifact_refs
from swarm.cel.evaluate import Evaluator
from swarm.cel.expression import ExpressionError
from swarm.cel.jail import Jail
from swarm.errors import NotFound, StoreError
from swarm.model import RunStatus
from swarm.store.registry.agents import by_version
from swarm.store.runs import artifacts, packing
from swarm.store.runs.definitions import NAMED, Definition, Definitions, Known, names
from swarm.store.runs.limits import Limits, TooExpensive, evaluator
from swarm.store.sql.dialect import Sql
from swarm.store.sql.reads import Read, among
from swarm.store.sql.rows import dump, lenient, milliseconds, shallow
from swarm.store.sql.transaction import Row, Tx
from swarm.workflow import plan, structure
from swarm.workflow.fan_out import MAX_STARTS
from swarm.workflow.state import (
    MORE,
    Action,
    Complete,
    Decision,
    End,
    Expand,
    FanOutState,
    RunContext,
    RunProgress,
    Start,
    StartWorkflow,
    StepState,
    Verdict,
)
from swarm.workflow.structure import Graph

_EXPECTED: Final = 64  # steps, and agents, that are read before it is certain that they are needed

TIME_IS_UP: Final = "!deadline"  # in a run's `unprocessed`, beside keys of steps, none of which can have this name
ON_ERROR_MS: Final = 600_000  # for all on_error steps together, once the run's own time is over

_RUN_OF: Final = (
    "SELECT r.id, r.ticket_id, r.workflow_id, r.status, r.trigger_type, r.trigger_data, r.started_at, "
    "r.parent_step_id, COALESCE(r.root_run_id, r.id) AS root_run, r.path, r.definition, r.progress, r.unprocessed, "
    "r.revision, r.due_at, r.deadline_at, t.id AS ticket, t.state, t.run_id AS ticket_run, t.title, t.description, "
    "t.project_id, t.priority, t.max_attempts, t.created_at AS ticket_created_at "
    "FROM workflow_runs r LEFT JOIN tickets t ON t.id = r.ticket_id WHERE r.id = :id"
)
_RUN: Final = Sql(_RUN_OF)
# Every decision changes its run's row, so none comes between this one and its changes.
_LOCKED_RUN: Final = Sql(_RUN_OF + " /*+ FOR NO KEY UPDATE OF r */")
_CONTEXT: Final = Sql("SELECT context FROM workflow_runs WHERE id = :id")
_TICKET_INPUTS: Final = Sql("SELECT inputs FROM tickets WHERE id = :id")
_STEP_INPUTS: Final = Sql("SELECT inputs FROM step_executions WHERE id = :id")
_STEP_COLUMNS: Final = (
    "id, step_id, status, inputs, outputs, error, fan_out, verdict, attempt_id, started_at, queued_at, available_at"
)
_HAS_HANDLERS: Final = Sql(
    "SELECT definition LIKE '%\"on_error\"%' AS has_handlers FROM definitions WHERE digest = :digest"
)
STEPS: Final = Sql(f"SELECT {_STEP_COLUMNS} FROM step_executions WHERE run_id = :run_id AND step_id IN :ids")
ALL_STEPS: Final = Sql(f"SELECT {_STEP_COLUMNS} FROM step_executions WHERE run_id = :run_id")


@dataclass(slots=True, kw_only=True)
class Run:
    """A live run: its row in workflow_runs, with columns of its ticket. ``unprocessed`` None: no decision is noted."""

    row: Row
    progress: RunProgress | None
    unprocessed: list[str] | None

    @property
    def id(self) -> str:
        return str(self.row.id)

    def key(self, step_id: str) -> str:
        return step_id.removeprefix(self.row.path)

    def step_id(self, key: str) -> str:
        return f"{self.row.path}{key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A decision and what it is based on; or, with ``failure``, why the run can't go on. With neither, it was too
    expensive where it was tried."""

    run_id: str
    revision: int
    processed: Sequence[str]  # the entries of the run's `unprocessed` that it takes into account
    seen: Mapping[str, str] = field(default_factory=dict)  # the statuses of the steps that it looked at
    definition: Definition | None = None
    context: str | None = None  # JSON; only with the run's first decision
    decision: Decision | None = None
    rows: Mapping[str, Row | None] | None = None  # of all steps that it looked at, if this transaction has read them
    failure: str | None = None
    deadline_at: int | None = None  # a new deadline for the run
    ahead_ms: int | None = None  # the items of its fan-outs have been written; the other rows' ids begin with this time

    @property
    def too_expensive(self) -> bool:
        return self.decision is None and self.failure is None


def load_live(tx: Tx, id: str) -> Run | None:
    """The run, unless it or its ticket has ended, or the ticket has another run."""
    row = tx.first(_LOCKED_RUN if tx.connection.write else _RUN, id=id)
    if (
        row is None
        or row.status not in ("running", "waiting")
        or row.state not in ("in_progress", "waiting")
        or row.ticket_run != row.root_run
    ):
        return None
    return Run(
        row=row,
        progress=RunProgress(**json.loads(row.progress)) if row.progress is not None else None,
        unprocessed=json.loads(row.unprocessed) if row.unprocessed is not None else None,
    )


def expected(definitions: Definitions, run_id: str, keys: Sequence[str]) -> Iterator[Read]:
    """What a decision on a run after these steps will most likely read, and what will be read of the agents that it
    starts."""
    if (known := definitions.known.get(run_id)) is None:
        return
    graph = known.definition.graph
    yield _LOCKED_RUN, {"id": run_id}
    if known.ticket_id is not None:
        yield among(NAMED, names(known.agents))
        yield _TICKET_INPUTS, {"id": known.ticket_id}
        yield ALL_STEPS, {"run_id": run_id}
        starts = [one for one, step in graph.steps.items() if not step.needs]
    else:
        if definitions.contexts.get(run_id) is None and not definitions.large.get(run_id):
            yield _CONTEXT, {"id": run_id}
        touched = dict.fromkeys(_touched_by(graph, keys))
        if 0 < len(touched) <= _EXPECTED:
            yield among(STEPS, [f"{known.path}{key}" for key in touched], run_id=run_id)
        starts = [one for key in keys for one in graph.dependants.get(key, ())]
    for agent in dict.fromkeys(graph.steps[one].agent for one in starts[:_EXPECTED]):
        if agent is not None:
            yield by_version(agent)


class Steps(Mapping[str, StepState]):
    """The states of a run's steps, and the artifacts in them, read on demand. Raises TooExpensive for too many."""

    def __init__(self, tx: Tx, run: Run, limits: Limits) -> None:
        self._tx = tx
        self._run = run
        self._limits = limits
        self._bytes = 0
        self._all = False
        self.rows: dict[str, Row | None] = {}

    def read(self, keys: Iterable[str]) -> None:
        """Read several by one statement."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self.rows]
        found = self._tx.all_in(STEPS, map(self._run.step_id, wanted), run_id=self._run.id)
        self.rows |= dict.fromkeys(wanted)
        self._keep(found)

    def read_all(self) -> None:
        self._all = True
        found, more = self._tx.some(ALL_STEPS, self._limits.data_bytes, run_id=self._run.id)
        if more:
            raise TooExpensive
        self._keep(found)

    def _keep(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.rows[self._run.key(row.step_id)] = row
            self._bytes += len(row.inputs or "") + len(row.outputs or "")
        if self._bytes > self._limits.data_bytes or len(self.rows) > self._limits.steps:
            raise TooExpensive

    def __getitem__(self, key: str) -> StepState:
        if key not in self.rows and not self._all:
            self.read([key])
        row = self.rows.get(key)
        if row is None:
            raise KeyError(key)
        return StepState(
            status=row.status,
            inputs=packing.unpack(row.inputs, self.load),
            outputs=packing.unpack(row.outputs, self.load),
            error=row.error,
            fan_out=FanOutState(**json.loads(row.fan_out)) if row.fan_out is not None else None,
            verdict=Verdict(**json.loads(row.verdict)) if row.verdict is not None else None,
        )

    def load(self, digest: str) -> Any:
        """The value of an artifact, for an expression that looks into it."""
        if self._limits.locked:
            raise TooExpensive
        text = artifacts.text(self._tx, digest)
        self._bytes += len(text)
        if self._bytes > self._limits.data_bytes:
            raise TooExpensive
        return packing.unpack(text, self.load)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def decide(tx: Tx, run: Run, definitions: Definitions, jail: Jail | None, limits: Limits) -> Decided:
    """What follows from a run's unprocessed steps; if there are none, or the run has just begun, from all its steps.

    ``jail``: for expressions that aren't cheap; not used while the write lock is held.
    """
    processed = tuple(dict.fromkeys(run.unprocessed or ()))
    basis = Decided(run_id=run.id, revision=run.row.revision, processed=processed)
    try:
        return _decide(tx, run, definitions, evaluator(limits, jail), basis, limits)
    except TooExpensive:
        return basis
    except RecursionError:  # only in rows that another tool wrote: the inputs of people and agents are checked
        return replace(basis, failure="a value in the rows of this run is nested too deeply")


def _decide(
    tx: Tx, run: Run, definitions: Definitions, evaluator: Evaluator, basis: Decided, limits: Limits
) -> Decided:
    steps = Steps(tx, run, limits)
    try:
        definition, context = _prepare(tx, run, definitions, evaluator, steps, limits)
    except (ExpressionError, NotFound, StoreError, Invalid) as error:
        return replace(basis, failure=str(error))
    graph, deadline_at = definition.graph, None
    if TIME_IS_UP in basis.processed:
        why = time_is_up(tx, run)
        steps.read_all()
        decision = plan.expire(graph, context, run.progress, steps, evaluator, why) if run.progress else None
        if decision is None:
            return replace(basis, failure=why)
        deadline_at = tx.now_ms + ON_ERROR_MS
    elif run.progress is None:
        steps.read_all()
        decision = plan.resume(graph, context, steps, evaluator)
    else:
        steps.read(_touched_by(graph, basis.processed))
        steps.read(_next_items(steps, basis.processed))
        decision = plan.advance(graph, context, run.progress, steps, basis.processed, evaluator)
    if sum(len(one.children) for one in decision.actions if isinstance(one, Expand)) > limits.items:
        raise TooExpensive
    if run.row.parent_step_id is None:
        decision = _resolve_outputs(decision)
    if not limits.locked:
        decision = packed(decision, root=run.row.parent_step_id is None)
    definitions.known.put(run.id, Known(definition=definition, path=run.row.path))
    return replace(
        basis,
        seen={key: row.status for key, row in steps.rows.items() if row is not None},
        definition=definition,
        context=dump(shallow(context)) if run.progress is None else None,
        decision=decision,
        rows=steps.rows if limits.locked else None,
        deadline_at=deadline_at,
    )


def _prepare(
    tx: Tx, run: Run, definitions: Definitions, evaluator: Evaluator, steps: Steps, limits: Limits
) -> tuple[Definition, RunContext]:
    if run.row.definition is not None:
        definition = definitions.frozen(tx, run.row.definition, in_transaction=limits.locked)
    else:
        definition = definitions.pinned(tx, run.row.workflow_id, in_transaction=limits.locked)
    if (known := definitions.contexts.get(run.id)) is not None:
        return definition, known
    if run.progress is not None and (text := _stored_context(tx, run, definitions, limits)) is not None:
        stored = RunContext(**json.loads(text))
        return definition, definitions.contexts.put(run.id, stored, len(text))
    # Not kept: the first decision may yet be undone, and another be made, of other inputs.
    return definition, _new_context(tx, run, definition, evaluator, steps, limits)


def time_is_up(tx: Tx, run: Run) -> str:
    """The error of a run that took too long."""
    if run.progress is not None and run.progress.phase == "on_error":
        return f"{run.progress.error or 'it failed'}; its on_error steps took longer than they may"
    since, until = milliseconds(run.row.started_at) or tx.now_ms, run.row.deadline_at or tx.now_ms
    return f"it took longer than its timeout of {(until - since) / 1000:g} s"


def may_clean_up(tx: Tx, run: Run) -> bool:
    """False when a late run certainly has no on_error steps left to start."""
    if run.row.definition is None or run.progress is None or run.progress.phase != "steps":
        return False
    found = tx.first(_HAS_HANDLERS, digest=run.row.definition)
    return found is not None and bool(found.has_handlers)


def _touched_by(graph: Graph, keys: Iterable[str]) -> Iterator[str]:
    """The steps that the planner will look at when these have ended, so that one statement can read them all."""
    for key in keys:
        yield key.removeprefix(MORE)
        if key.endswith("]"):
            yield key[: key.rindex("[")]
        for one in graph.dependants.get(key, ()):
            yield one
            yield from graph.steps[one].needs


def _next_items(steps: Steps, keys: Iterable[str]) -> Iterator[str]:
    """The same of fan-outs that go on."""
    for key in keys:
        parent = steps.get(key.removeprefix(MORE)) if key.startswith(MORE) else None
        if parent is not None and (fan_out := parent.fan_out) is not None:
            upto = min(fan_out.next + MAX_STARTS, fan_out.count)
            yield from (f"{key.removeprefix(MORE)}[{number}]" for number in range(fan_out.next, upto))


def _stored_context(tx: Tx, run: Run, definitions: Definitions, limits: Limits) -> str | None:
    if (definitions.large.get(run.id) or 0) > limits.context_bytes:
        raise TooExpensive  # without reading it
    row = tx.first(_CONTEXT, id=run.id)
    if row is None or row.context is None:
        return None
    if len(row.context) > limits.context_bytes:
        definitions.large.put(run.id, len(row.context))
        raise TooExpensive
    return str(row.context)


def _new_context(
    tx: Tx, run: Run, definition: Definition, evaluator: Evaluator, steps: Steps, limits: Limits
) -> RunContext:
    row, inner = run.row, run.row.parent_step_id is not None
    given = tx.first(_STEP_INPUTS, id=row.parent_step_id) if inner else tx.first(_TICKET_INPUTS, id=row.ticket_id)
    text = (given.inputs if given is not None else None) or "{}"
    if len(text) > limits.context_bytes:
        raise TooExpensive
    try:
        # Those of a nested workflow are without references: its schema checks all of them.
        inputs = (
            artifact_refs.resolve_references(packing.unpack(text, steps.load), limit_bytes=packing.MAX_BYTES)
            if inner
            else json.loads(text)
        )
    except (ValueError, TypeError) as error:  # changed from outside since the claim
        raise ExpressionError(f"the inputs are not JSON: {error}") from None
    return structure.run_context(
        definition.graph.workflow,
        inputs=inputs,
        trigger={**json.loads(row.trigger_data or "{}"), "type": row.trigger_type},
        ticket={
            "id": row.ticket_id,
            **{name: lenient(getattr(row, name)) for name in ("title", "description", "project_id")},
        },
        evaluator=evaluator,
    )


def packed(decision: Decision, *, root: bool) -> Decision:
    """With all values as they are stored, so that nobody waits for the write lock meanwhile."""
    known: dict[int, packing.Packed] = {}  # an item's inputs are in two actions

    def pack(value: Any) -> packing.Packed:
        if id(value) not in known:
            known[id(value)] = packing.pack(value)
        return known[id(value)]

    actions: list[Action] = []
    for action in decision.actions:
        match action:
            case Start() | StartWorkflow():
                actions.append(replace(action, inputs=pack(action.inputs)))
            case Complete():
                actions.append(replace(action, outputs=pack(action.outputs)))
            case Expand():
                children = tuple(replace(child, inputs=pack(child.inputs)) for child in action.children)
                actions.append(replace(action, children=children))
            case _:
                actions.append(action)
    end = decision.end
    if end is not None and end.status is RunStatus.COMPLETED:
        end = replace(end, outputs=packing.Packed(dump(end.outputs)) if root else pack(end.outputs))
    return replace(decision, actions=tuple(actions), end=end)


def _resolve_outputs(decision: Decision) -> Decision:
    """Without references: a ticket's outputs are for people and other tools."""
    end = decision.end
    if end is None or not artifact_refs.has_any(end.outputs):
        return decision
    try:
        outputs = artifact_refs.resolve_references(end.outputs, limit_bytes=packing.MAX_BYTES)
    except ExpressionError as error:
        why = f"can't build the workflow's outputs: {error}"
        return replace(decision, end=End(status=RunStatus.FAILED, error=why))
    return replace(decision, end=replace(end, outputs=outputs))
