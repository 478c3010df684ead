"""What pages show of runs, of steps that wait for a person, and of how things fare. All of it is bounded, however large
a run is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarm.errors import NotFound
from swarm.store.sql.conditions import UNFINISHED
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import SUMMARY_CHARS, lenient, value
from swarm.store.sql.transaction import Tx

MOST_STEPS: Final = 20_000  # of one run, copies included
MOST_RUNS: Final = 50
RECENT: Final = 2_000  # tickets that say how agents and workflows fare
MOST_WAITING: Final = 200
_MOST_LOOKED_AT: Final = 5_000  # waiting tickets
_MOST_ATTEMPTS: Final = 2_000

_RUN_COLUMNS: Final = (
    "r.id, r.ticket_id, r.path, r.root_run_id, r.workflow_id, r.workflow_version, r.status, r.started_at, "
    f"r.completed_at, substr(r.error, 1, {SUMMARY_CHARS}) AS error, r.error_step, r.total_vm_time_ms, "
    "r.total_api_tokens, r.total_cost_usd, r.definition"
)
_ROOTS: Final = Sql(
    f"SELECT {_RUN_COLUMNS} FROM workflow_runs r WHERE r.ticket_id = :ticket_id AND r.root_run_id IS NULL "
    "ORDER BY r.id DESC LIMIT :most"
)
_NESTED: Final = Sql(
    f"SELECT {_RUN_COLUMNS} FROM workflow_runs r WHERE r.ticket_id = :ticket_id AND r.root_run_id = :root "
    "AND r.path = :path ORDER BY r.id DESC LIMIT 1"
)
# Without long columns; those before `inputs` cost nothing to read.
_STATES: Final = Sql(
    "SELECT s.id, s.step_id, s.status, s.started_at, s.completed_at FROM step_executions s WHERE s.run_id = :run_id "
    "LIMIT :most"
)
_DETAILS: Final = Sql(
    "SELECT s.id, s.step_id, s.agent_name, s.agent_version, s.status, s.queued_at, s.started_at, s.completed_at, "
    f"substr(s.error, 1, {SUMMARY_CHARS}) AS error, s.retry_count, s.max_attempts, s.available_at, "
    f"substr(s.question, 1, {SUMMARY_CHARS}) AS question, s.verdict, s.inputs IS NOT NULL AS has_inputs, "
    "s.outputs IS NOT NULL AS has_outputs FROM step_executions s WHERE s.id IN :ids"
)
_ATTEMPTS: Final = Sql(
    "SELECT a.id, a.step_execution_id, a.number, a.worker, a.vm_id, a.outcome, a.reason, "
    f"substr(a.error, 1, {SUMMARY_CHARS}) AS error, a.cost_usd, a.api_tokens_used, a.started_at, a.ended_at "
    "FROM attempts a WHERE a.step_execution_id IN :ids"
)
_DEFINITION: Final = Sql("SELECT definition FROM definitions WHERE digest = :digest")
_STEP: Final = Sql(
    "SELECT s.id, s.inputs, s.outputs FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id "
    "WHERE r.ticket_id = :ticket_id AND s.run_id = :run_id AND s.step_id = :step_id"
)
_WAITING_TICKETS: Final = Sql(
    "SELECT w.id, w.title FROM (SELECT t.id, t.title, t.project_id FROM tickets t "
    f"WHERE t.state = 'waiting' AND t.{UNFINISHED} LIMIT {_MOST_LOOKED_AT}) w "
    "WHERE CAST(:project_id AS TEXT) IS NULL OR w.project_id = :project_id LIMIT :most"
)
_WAITING_STEPS: Final = Sql(
    "SELECT s.id, s.step_id, r.ticket_id, r.id AS run_id, r.workflow_id, s.attempt_id, s.queued_at, s.started_at, "
    f"s.available_at, substr(s.question, 1, {SUMMARY_CHARS}) AS question, substr(s.error, 1, {SUMMARY_CHARS}) AS error "
    "FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id JOIN tickets t ON t.id = r.ticket_id "
    "WHERE r.ticket_id IN :ids AND r.status IN ('running', 'waiting') AND t.run_id = COALESCE(r.root_run_id, r.id) "
    "AND s.status = 'waiting' AND s.verdict IS NULL"
)
# Of the newest tickets, whatever their state: what runs them, and how it went.
_RECENT: Final = Sql(
    "SELECT t.agent_id, t.workflow_id, t.state, count(*) AS number FROM "
    f"(SELECT agent_id, workflow_id, state, project_id FROM tickets ORDER BY created_at DESC LIMIT {RECENT}) t "
    "WHERE CAST(:project_id AS TEXT) IS NULL OR t.project_id = :project_id GROUP BY t.agent_id, t.workflow_id, t.state"
)
_COUNT_WAITING: Final = Sql(
    "SELECT count(*) AS number FROM (SELECT t.project_id FROM tickets t "
    f"WHERE t.state = 'waiting' AND t.{UNFINISHED} LIMIT {_MOST_LOOKED_AT}) w "
    "WHERE CAST(:project_id AS TEXT) IS NULL OR w.project_id = :project_id"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run without its long columns. ``definition``: the digest of its frozen workflow; None for a plain ticket's."""

    id: str
    ticket_id: str
    path: str
    root_run_id: str | None
    workflow_id: str | None
    workflow_version: str | None
    status: str
    started_at: str | None
    completed_at: str | None
    error: str | None
    error_step: str | None
    total_vm_time_ms: float
    total_api_tokens: int
    total_cost_usd: float
    definition: str | None


@dataclass(slots=True)  # there are thousands of them: made by position, and not frozen, for speed
class StepState:
    id: str
    step_id: str  # with its run's path
    status: str
    started_at: str | None
    completed_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStates:
    """A run with the state of its steps. ``runs``: all of its ticket that are not nested, newest first. ``more``: it
    has more steps than `MOST_STEPS`."""

    run: RunView
    runs: list[RunView]
    steps: list[StepState]
    more: bool
    now: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDetails:
    """A step in a table: its texts are shortened."""

    id: str
    step_id: str
    agent_name: str | None
    agent_version: str | None
    status: str
    queued_at: str | None
    started_at: str | None
    completed_at: str | None
    error: str | None
    retry_count: int
    max_attempts: int
    available_at: int | None
    question: str | None
    verdict: str | None
    has_inputs: bool
    has_outputs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TryView:
    id: str
    step_execution_id: str
    number: int
    worker: str
    vm_id: int | None
    outcome: str | None
    reason: str | None
    error: str | None
    cost_usd: float
    api_tokens_used: int
    started_at: str | None
    ended_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingStep:
    """``answer_at``: ms, when it is rejected by itself; None: never. ``over_budget``: it waits for a larger budget."""

    id: str
    step_id: str
    ticket_id: str
    title: str
    run_id: str
    workflow_id: str | None
    since: str | None
    answer_at: int | None
    question: str | None
    over_budget: bool


def states(tx: Tx, ticket_id: str, *, run_id: str | None, path: str, steps: bool = True) -> RunStates:
    """The newest run of a ticket, or the one named; with ``path``, the run nested in it there. ``steps`` False: without
    its steps. Raises NotFound."""
    roots = [value(RunView, row) for row in tx.all(_ROOTS, ticket_id=ticket_id, most=MOST_RUNS)]
    found = next((one for one in roots if run_id in (None, one.id)), None)
    if found is not None and path:
        row = tx.first(_NESTED, ticket_id=ticket_id, root=found.id, path=path)
        found = value(RunView, row) if row is not None else None
    if found is None:
        raise NotFound("this ticket has no such run" if run_id or path else "this ticket has not run yet")
    rows = tx.all(_STATES, run_id=found.id, most=MOST_STEPS + 1) if steps else []
    return RunStates(
        run=found,
        runs=roots,
        steps=[StepState(*row) for row in rows[:MOST_STEPS]],
        more=len(rows) > MOST_STEPS,
        now=tx.now,
    )


def details(tx: Tx, ids: Sequence[str]) -> tuple[list[StepDetails], list[TryView]]:
    """Of some steps, in that order, and their attempts, oldest first."""
    rows = {row.id: row for row in tx.all_in(_DETAILS, ids)}
    found = [
        value(
            StepDetails,
            row,
            error=lenient(row.error),
            question=lenient(row.question),
            has_inputs=bool(row.has_inputs),
            has_outputs=bool(row.has_outputs),
        )
        for id in ids
        if (row := rows.get(id)) is not None
    ]
    tries = [value(TryView, row) for row in tx.all_in(_ATTEMPTS, ids)[:_MOST_ATTEMPTS]]
    return found, sorted(tries, key=lambda one: one.id)


def frozen(tx: Tx, digest: str) -> str:
    """The text of a frozen workflow. Raises NotFound."""
    row = tx.first(_DEFINITION, digest=digest)
    if row is None:
        raise NotFound(f"the frozen workflow {digest[:12]} is gone from the table definitions")
    return str(row.definition)


def step(tx: Tx, ticket_id: str, *, run_id: str, step_id: str) -> tuple[str, str | None, str | None]:
    """The id of a step's row, its inputs and its outputs. Raises NotFound."""
    row = tx.first(_STEP, ticket_id=ticket_id, run_id=run_id, step_id=step_id)
    if row is None:
        raise NotFound("this run has no such step")
    return row.id, lenient(row.inputs), lenient(row.outputs)


def waiting(tx: Tx, *, project_id: str | None) -> tuple[list[WaitingStep], bool]:
    """The steps that wait for a person, longest first; and whether there are more than `MOST_WAITING`."""
    rows = tx.all(_WAITING_TICKETS, project_id=project_id, most=MOST_WAITING + 1)
    titles = {row.id: lenient(row.title) or "" for row in rows}
    found = [
        WaitingStep(
            id=row.id,
            step_id=row.step_id,
            ticket_id=row.ticket_id,
            title=titles[row.ticket_id],
            run_id=row.run_id,
            workflow_id=row.workflow_id,
            since=row.queued_at or row.started_at,
            answer_at=row.available_at if isinstance(row.available_at, int) else None,
            question=lenient(row.question) or lenient(row.error),
            over_budget=row.attempt_id is not None,
        )
        for row in tx.all_in(_WAITING_STEPS, list(titles)[:MOST_WAITING])
    ]
    found.sort(key=lambda one: (one.since or "", one.id))
    return found[:MOST_WAITING], len(rows) > MOST_WAITING or len(found) > MOST_WAITING


def recent_states(tx: Tx, *, project_id: str | None) -> dict[str, Counter[str]]:
    """Of the newest `RECENT` tickets: how many there are in each state, by their agent's or workflow's id."""
    found: dict[str, Counter[str]] = {}
    for row in tx.all(_RECENT, project_id=project_id):
        for ref in (row.agent_id, row.workflow_id):
            if isinstance(ref, str):
                found.setdefault(ref, Counter())[str(row.state)] += row.number
    return found


def count_waiting(tx: Tx, *, project_id: str | None) -> int:
    """Tickets that wait for a person, at most some thousand."""
    [row] = tx.all(_COUNT_WAITING, project_id=project_id)
    return int(row.number)
