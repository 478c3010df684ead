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
from swarm.store.runs.definitions import Definition, Definitions, TooExpensive
from swarm.store.sql.database import Row, Tx
from swarm.store.sql.rows import lenient, milliseconds
from swarm.workflow import plan, structure
from swarm.workflow.state import Decision, End, FanOutState, RunContext, RunProgress, StepState, Verdict

# What may be read, and evaluated, for one decision while the write lock is held.
_TRANSACTION_BYTES: Final = 64 << 10
_LANE_STEPS: Final = 1000
_LANE_EXPRESSIONS: Final = 500

TIME_IS_UP: Final = "!deadline"  # in a run's `unprocessed`, beside the keys of steps: no step can be called so
ON_ERROR_MS: Final = 600_000  # what its on_error steps may take together, once a run's time is over

_RUN: Final = sa.text(
    "SELECT r.id, r.ticket_id, r.workflow_id, r.status, r.trigger_type, r.trigger_data, r.started_at, "
    "r.parent_step_id, COALESCE(r.root_run_id, r.id) AS root_run, r.path, r.definition, r.progress, r.unprocessed, "
    "r.revision, r.due_at, r.deadline_at, t.id AS ticket, t.state, t.run_id AS ticket_run, t.title, t.description, "
    "t.project_id, t.priority, t.max_attempts, t.created_at AS ticket_created_at "
    "FROM workflow_runs r LEFT JOIN tickets t ON t.id = r.ticket_id WHERE r.id = :id"
)
_CONTEXT: Final = sa.text("SELECT context FROM workflow_runs WHERE id = :id")
_TICKET_INPUTS: Final = sa.text("SELECT inputs FROM tickets WHERE id = :id")
_STEP_INPUTS: Final = sa.text("SELECT inputs FROM step_executions WHERE id = :id")
_STEP_COLUMNS: Final = (
    "id, step_id, status, inputs, outputs, error, fan_out, verdict, attempt_id, started_at, queued_at, available_at"
)
_HAS_HANDLERS: Final = sa.text(
    "SELECT definition LIKE '%\"on_error\"%' AS has_handlers FROM definitions WHERE digest = :digest"
)
STEPS: Final = sa.text(f"SELECT {_STEP_COLUMNS} FROM step_executions WHERE run_id = :run_id AND step_id IN :ids")
ALL_STEPS: Final = sa.text(f"SELECT {_STEP_COLUMNS} FROM step_executions WHERE run_id = :run_id")


@dataclass(slots=True, kw_only=True)
class Run:
    """A row of workflow_runs, with what is needed of its ticket. ``unprocessed`` None: no decision is pending."""

    row: Row
    progress: RunProgress | None
    unprocessed: list[str] | None

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
    processed: Sequence[str]
    seen: Mapping[str, str]
    definition: Definition | None = None
    context: RunContext | None = None  # of a first decision
    decision: Decision | None = None
    failure: str | None = None
    deadline_at: int | None = None  # a new one


def load(tx: Tx, id: str) -> Run | None:  # noqa: A002
    row = tx.first(_RUN, id=id)
    if row is None:
        return None
    return Run(
        row=row,
        progress=RunProgress(**json.loads(row.progress)) if row.progress is not None else None,
        unprocessed=json.loads(row.unprocessed) if row.unprocessed is not None else None,
    )


class Steps(Mapping[str, StepState]):
    """The states of a run's steps, each read when it is asked for. ``in_transaction``: only so many."""

    def __init__(self, tx: Tx, run: Run, *, in_transaction: bool) -> None:
        self._tx = tx
        self._run = run
        self._in_transaction = in_transaction
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
        if self._in_transaction and (self._bytes > _TRANSACTION_BYTES or len(self.rows) > _LANE_STEPS):
            raise TooExpensive

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
            fan_out=FanOutState(**json.loads(row.fan_out)) if row.fan_out is not None else None,
            verdict=Verdict(**json.loads(row.verdict)) if row.verdict is not None else None,
        )

    def _load(self, digest: str) -> Any:
        """What an artifact is, for an expression that looks into it."""
        if self._in_transaction:
            raise TooExpensive
        return artifacts.loader(self._tx)(digest)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(slots=True)
class TransactionEvaluator:
    """The `Evaluator` of the writing thread: cheap expressions, and not many. Raises TooExpensive for others."""

    left: int = field(default=_LANE_EXPRESSIONS)

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any:
        self.left -= 1
        if self.left < 0 or not (expression.plain or expression.cheap):
            raise TooExpensive
        done, value, _ = evaluate.attempt(expression, names)
        if not done:
            raise TooExpensive
        return value


def decide(tx: Tx, run: Run, definitions: Definitions, evaluator: Evaluator, *, in_transaction: bool) -> Decided:
    """What follows from the news of a run; without any, and in a run that has just begun, from all of its steps.

    Raises TooExpensive with ``in_transaction``, which means that the caller holds the write lock.
    """
    processed = tuple(dict.fromkeys(run.unprocessed or ()))
    try:
        return _decide(tx, run, processed, definitions, evaluator, in_transaction=in_transaction)
    except RecursionError:  # in rows that somebody wrote by hand: agents and people can't bring in what is so deep
        why = "a value in the rows of this run is nested too deeply"
        return Decided(run_id=run.id, revision=run.row.revision, processed=processed, seen={}, failure=why)


def _decide(
    tx: Tx, run: Run, processed: Sequence[str], definitions: Definitions, evaluator: Evaluator, *, in_transaction: bool
) -> Decided:
    try:
        if run.row.definition is not None:
            definition = definitions.frozen(tx, run.row.definition, in_transaction=in_transaction)
        else:
            definition = definitions.pinned(tx, run.row.workflow_id, in_transaction=in_transaction)
        known = definitions.context.get(run.id) or _context(tx, run, in_transaction=in_transaction)
        if known is None:
            known = _new_context(tx, run, definition, evaluator, in_transaction=in_transaction)
    except (ExpressionError, NotFound, StoreError, Invalid) as error:
        return Decided(run_id=run.id, revision=run.row.revision, processed=processed, seen={}, failure=str(error))
    definitions.context.put(run.id, known)
    steps, deadline_at = Steps(tx, run, in_transaction=in_transaction), None
    if TIME_IS_UP in processed:
        why = time_is_up(tx, run)
        steps.read_all()
        late = run.progress and plan.expire(definition.graph, known, run.progress, steps, evaluator, why)
        if not late:
            return Decided(run_id=run.id, revision=run.row.revision, processed=processed, seen={}, failure=why)
        decision, deadline_at = late, tx.now_ms + ON_ERROR_MS
    elif run.progress is None:
        steps.read_all()
        decision = plan.resume(definition.graph, known, steps, evaluator)
    else:
        steps.read(_near(definition, processed))
        # An end by our own decision was told with it.
        decision = plan.advance(definition.graph, known, run.progress, steps, processed, evaluator)
    if run.row.parent_step_id is None:
        decision = _resolve_outputs(decision, in_transaction=in_transaction)
    seen = {key: row.status for key, row in steps.rows.items() if row is not None}
    return Decided(
        run_id=run.id,
        revision=run.row.revision,
        processed=processed,
        seen=seen,
        definition=definition,
        context=known if run.progress is None else None,
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


def _context(tx: Tx, run: Run, *, in_transaction: bool) -> RunContext | None:
    row = tx.first(_CONTEXT, id=run.id)
    if row is None or row.context is None:
        return None
    if in_transaction and len(row.context) > _TRANSACTION_BYTES:
        raise TooExpensive
    return RunContext(**json.loads(row.context))


def _new_context(tx: Tx, run: Run, definition: Definition, evaluator: Evaluator, *, in_transaction: bool) -> RunContext:
    row, inner = run.row, run.row.parent_step_id is not None
    given = tx.first(_STEP_INPUTS, id=row.parent_step_id) if inner else tx.first(_TICKET_INPUTS, id=row.ticket_id)
    text = (given.inputs if given is not None else None) or "{}"
    if in_transaction and len(text) > _TRANSACTION_BYTES:
        raise TooExpensive
    try:
        inputs = _resolve(tx, text, in_transaction=in_transaction) if inner else json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:  # changed from outside since the claim
        raise ExpressionError(f"the inputs are no JSON: {error}") from None
    return structure.run_context(
        definition.graph.workflow,
        inputs=inputs,
        trigger={**_parsed(row.trigger_data or "{}"), "type": row.trigger_type},
        ticket={
            "id": row.ticket_id,
            **{name: lenient(getattr(row, name)) for name in ("title", "description", "project_id")},
        },
        evaluator=evaluator,
    )


def _resolve(tx: Tx, text: str, *, in_transaction: bool) -> Any:
    """What a workflow within another one is given: its schema wants to see all of it."""

    def refuse(digest: str) -> Any:
        raise TooExpensive

    given = artifacts.unpack(text, refuse if in_transaction else artifacts.loader(tx))
    return stored.resolve_references(given, limit_bytes=artifacts.MAX_BYTES) if stored.has_any(given) else given


def _resolve_outputs(decision: Decision, *, in_transaction: bool) -> Decision:
    """A ticket's outputs are for people and other tools: no references in them."""
    end = decision.end
    if end is None or not stored.has_any(end.outputs):
        return decision
    if in_transaction:
        raise TooExpensive
    try:
        outputs = stored.resolve_references(end.outputs, limit_bytes=artifacts.MAX_BYTES)
    except ExpressionError as error:
        why = f"the outputs of the workflow can't be made: {error}"
        return replace(decision, end=End(status=RunStatus.FAILED, error=why))
    return replace(decision, end=replace(end, outputs=outputs))


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)
