"""A run of a workflow as the planner is told of it: rows to values; and one decision, made of them. Changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import sqlalchemy as sa

from swarm.base.manifest import Invalid
from swarm.cel import evaluate, stored
from swarm.cel.evaluate import Evaluator
from swarm.cel.expression import Expression, ExpressionError
from swarm.errors import NotFound, StoreError
from swarm.model import RunStatus
from swarm.store.runs import artifacts
from swarm.store.runs.definitions import Definition, Definitions, TooDear
from swarm.store.sql.database import Row, Tx
from swarm.store.sql.rows import lenient, milliseconds
from swarm.workflow import plan, structure
from swarm.workflow.state import Decision, End, Facts, Fan, Progress, StepState, Verdict

# What may be read, and evaluated, for one decision while the write lock is held.
_LANE_BYTES: Final = 64 << 10
_LANE_STEPS: Final = 1000
_LANE_EXPRESSIONS: Final = 500

TIME_IS_UP: Final = "!deadline"  # in a run's `untold`, beside the keys of steps: no step can be called so
ON_ERROR_MS: Final = 600_000  # what its on_error steps may take together, once a run's time is over

_RUN: Final = sa.text(
    "SELECT r.id, r.ticket_id, r.workflow_id, r.status, r.trigger_type, r.trigger_data, r.started_at, "
    "r.parent_step_id, COALESCE(r.root_run_id, r.id) AS root_run, r.path, r.definition, r.progress, r.untold, "
    "r.revision, r.due_at, r.deadline_at, t.id AS ticket, t.state, t.run_id AS ticket_run, t.title, t.description, "
    "t.project_id, t.priority, t.max_attempts, t.created_at AS ticket_created_at "
    "FROM workflow_runs r LEFT JOIN tickets t ON t.id = r.ticket_id WHERE r.id = :id"
)
_FACTS: Final = sa.text("SELECT facts FROM workflow_runs WHERE id = :id")
_TICKET_INPUTS: Final = sa.text("SELECT inputs FROM tickets WHERE id = :id")
_STEP_INPUTS: Final = sa.text("SELECT inputs FROM step_executions WHERE id = :id")
_STEP_COLUMNS: Final = (
    "id, step_id, status, inputs, outputs, error, fan, verdict, attempt_id, started_at, queued_at, available_at"
)
_HAS_HANDLERS: Final = sa.text(
    "SELECT definition LIKE '%\"on_error\"%' AS has_handlers FROM definitions WHERE digest = :digest"
)
STEPS: Final = sa.text(f"SELECT {_STEP_COLUMNS} FROM step_executions WHERE run_id = :run_id AND step_id IN :ids")
ALL_STEPS: Final = sa.text(f"SELECT {_STEP_COLUMNS} FROM step_executions WHERE run_id = :run_id")


@dataclass(slots=True, kw_only=True)
class Run:
    """A row of workflow_runs, with what is needed of its ticket. ``untold`` None: no decision is pending."""

    row: Row
    progress: Progress | None
    untold: list[str] | None

    @property
    def id(self) -> str:
        return str(self.row.id)

    @property
    def alive(self) -> bool:
        """Under way, and its ticket's?"""
        row = self.row
        return (
            row.status in ("running", "waiting")
            and row.state in ("in_progress", "waiting")
            and row.ticket_run == row.root_run
        )

    def key(self, step_id: str) -> str:
        return step_id.removeprefix(self.row.path)

    def step_id(self, key: str) -> str:
        return f"{self.row.path}{key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A decision, and what it was made of. ``failure``: the run can't go on, and why; then there is no decision.

    ``told``: the news that it takes account of. ``seen``: the statuses of the steps that it looked at.
    """

    run_id: str
    revision: int
    told: Sequence[str]
    seen: Mapping[str, str]
    definition: Definition | None = None
    facts: Facts | None = None  # of a first decision
    decision: Decision | None = None
    failure: str | None = None
    deadline_at: int | None = None  # a new one


def load(tx: Tx, id: str) -> Run | None:  # noqa: A002
    row = tx.first(_RUN, id=id)
    if row is None:
        return None
    return Run(
        row=row,
        progress=Progress(**json.loads(row.progress)) if row.progress is not None else None,
        untold=json.loads(row.untold) if row.untold is not None else None,
    )


class Steps(Mapping[str, StepState]):
    """The states of a run's steps, each read when it is asked for. ``lane``: only so many."""

    def __init__(self, tx: Tx, run: Run, *, lane: bool) -> None:
        self._tx = tx
        self._run = run
        self._lane = lane
        self._bytes = 0
        self.rows: dict[str, Row | None] = {}

    def read(self, keys: Iterable[str]) -> None:
        """Several at once."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self.rows]
        found = self._tx.all_in(STEPS, map(self._run.step_id, wanted), run_id=self._run.id)
        self.rows |= dict.fromkeys(wanted)
        self._keep(found)

    def read_all(self) -> None:
        self._keep(self._tx.all(ALL_STEPS, run_id=self._run.id))

    def _keep(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.rows[self._run.key(row.step_id)] = row
            self._bytes += len(row.inputs or "") + len(row.outputs or "")
        if self._lane and (self._bytes > _LANE_BYTES or len(self.rows) > _LANE_STEPS):
            raise TooDear

    def __getitem__(self, key: str) -> StepState:
        if key not in self.rows:
            self.read([key])
        row = self.rows[key]
        if row is None:
            raise KeyError(key)
        return StepState(
            status=row.status,
            inputs=artifacts.unpack(row.inputs, self._load),
            outputs=artifacts.unpack(row.outputs, self._load),
            error=row.error,
            fan=Fan(**json.loads(row.fan)) if row.fan is not None else None,
            verdict=Verdict(**json.loads(row.verdict)) if row.verdict is not None else None,
        )

    def _load(self, digest: str) -> Any:
        """What an artifact is, for an expression that looks into it."""
        if self._lane:
            raise TooDear
        return artifacts.loader(self._tx)(digest)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(slots=True)
class Thrifty:
    """The `Evaluator` of the writing thread: cheap expressions, and not many. Raises TooDear for others."""

    left: int = field(default=_LANE_EXPRESSIONS)

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        self.left -= 1
        if self.left < 0 or not (expression.plain or expression.cheap):
            raise TooDear
        done, value, _ = evaluate.attempt(expression, names)
        if not done:
            raise TooDear
        return value


def decide(tx: Tx, run: Run, definitions: Definitions, evaluator: Evaluator, *, lane: bool) -> Decided:
    """What follows from the news of a run; without any, and in a run that has just begun, from all of its steps.

    Raises TooDear with ``lane``, which means that the caller holds the write lock.
    """
    told = tuple(dict.fromkeys(run.untold or ()))
    try:
        return _decide(tx, run, told, definitions, evaluator, lane=lane)
    except RecursionError:  # in rows that somebody wrote by hand: agents and people can't bring in what is so deep
        why = "a value in the rows of this run is nested too deeply"
        return Decided(run_id=run.id, revision=run.row.revision, told=told, seen={}, failure=why)


def _decide(
    tx: Tx, run: Run, told: Sequence[str], definitions: Definitions, evaluator: Evaluator, *, lane: bool
) -> Decided:
    try:
        if run.row.definition is not None:
            definition = definitions.frozen(tx, run.row.definition, lane=lane)
        else:
            definition = definitions.pinned(tx, run.row.workflow_id, lane=lane)
        known = definitions.facts.get(run.id) or _facts(tx, run, lane=lane)
        if known is None:
            known = _new_facts(tx, run, definition, evaluator, lane=lane)
    except (ExpressionError, NotFound, StoreError, Invalid) as error:
        return Decided(run_id=run.id, revision=run.row.revision, told=told, seen={}, failure=str(error))
    definitions.facts.put(run.id, known)
    steps, deadline_at = Steps(tx, run, lane=lane), None
    if TIME_IS_UP in told:
        why = time_is_up(tx, run)
        steps.read_all()
        late = run.progress and plan.expire(definition.graph, known, run.progress, steps, evaluator, why)
        if not late:
            return Decided(run_id=run.id, revision=run.row.revision, told=told, seen={}, failure=why)
        decision, deadline_at = late, tx.now_ms + ON_ERROR_MS
    elif run.progress is None:
        steps.read_all()
        decision = plan.resume(definition.graph, known, steps, evaluator)
    else:
        steps.read(_near(definition, told))
        # An end by our own decision was told with it.
        decision = plan.advance(definition.graph, known, run.progress, steps, told, evaluator)
    if run.row.parent_step_id is None:
        decision = _with_whole_outputs(decision, lane=lane)
    seen = {key: row.status for key, row in steps.rows.items() if row is not None}
    return Decided(
        run_id=run.id,
        revision=run.row.revision,
        told=told,
        seen=seen,
        definition=definition,
        facts=known if run.progress is None else None,
        decision=decision,
        deadline_at=deadline_at,
    )


def time_is_up(tx: Tx, run: Run) -> str:
    """Why a run that is late fails."""
    if run.progress is not None and run.progress.phase == "on_error":
        return f"{run.progress.error or 'it failed'}; its on_error steps took longer than they may"
    since, until = milliseconds(run.row.started_at) or tx.now_ms, run.row.deadline_at or tx.now_ms
    return f"it took longer than its timeout of {(until - since) / 1000:g} s"


def may_clean_up(tx: Tx, run: Run) -> bool:
    """False when a run that is late has certainly no on_error steps that are still to come."""
    if run.row.definition is None or run.progress is None or run.progress.phase != "steps":
        return False
    found = tx.first(_HAS_HANDLERS, digest=run.row.definition)
    return found is not None and bool(found.has_handlers)


def _near(definition: Definition, keys: Iterable[str]) -> Iterator[str]:
    """What will be asked for when these have ended: read by one statement."""
    graph = definition.graph
    for key in keys:
        yield key
        if key.endswith("]"):
            yield key[: key.rindex("[")]
        for one in graph.dependants.get(key, ()):
            yield one
            yield from graph.steps[one].needs


def _facts(tx: Tx, run: Run, *, lane: bool) -> Facts | None:
    row = tx.first(_FACTS, id=run.id)
    if row is None or row.facts is None:
        return None
    if lane and len(row.facts) > _LANE_BYTES:
        raise TooDear
    return Facts(**json.loads(row.facts))


def _new_facts(tx: Tx, run: Run, definition: Definition, evaluator: Evaluator, *, lane: bool) -> Facts:
    row, inner = run.row, run.row.parent_step_id is not None
    given = tx.first(_STEP_INPUTS, id=row.parent_step_id) if inner else tx.first(_TICKET_INPUTS, id=row.ticket_id)
    text = (given.inputs if given is not None else None) or "{}"
    if lane and len(text) > _LANE_BYTES:
        raise TooDear
    try:
        inputs = _whole(tx, text, lane=lane) if inner else json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:  # changed from outside since the claim
        raise ExpressionError(f"the inputs are no JSON: {error}") from None
    return structure.facts(
        definition.graph.workflow,
        inputs=inputs,
        trigger={**_parsed(row.trigger_data or "{}"), "type": row.trigger_type},
        ticket={
            "id": row.ticket_id,
            **{name: lenient(getattr(row, name)) for name in ("title", "description", "project_id")},
        },
        evaluator=evaluator,
    )


def _whole(tx: Tx, text: str, *, lane: bool) -> Any:
    """What a workflow within another one is given: its schema wants to see all of it."""

    def refuse(digest: str) -> Any:
        raise TooDear

    given = artifacts.unpack(text, refuse if lane else artifacts.loader(tx))
    return stored.whole(given, limit_bytes=artifacts.MAX_BYTES) if stored.has_any(given) else given


def _with_whole_outputs(decision: Decision, *, lane: bool) -> Decision:
    """A ticket's outputs are for people and other tools: no references in them."""
    end = decision.end
    if end is None or not stored.has_any(end.outputs):
        return decision
    if lane:
        raise TooDear
    try:
        outputs = stored.whole(end.outputs, limit_bytes=artifacts.MAX_BYTES)
    except ExpressionError as error:
        why = f"the outputs of the workflow can't be made: {error}"
        return replace(decision, end=End(status=RunStatus.FAILED, error=why))
    return replace(decision, end=replace(end, outputs=outputs))


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)
