"""What has happened, for those who follow all tickets: metrics, traces, notices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from swarm.model import TERMINAL_TICKET_STATES, Event
from swarm.store.sql import rows
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import milliseconds
from swarm.store.sql.transaction import Row, Tx

# First where a bounded range ends: that reads no data, of which output has a lot.
_UP_TO: Final = Sql(
    "SELECT max(seq) AS seq FROM (SELECT seq FROM events WHERE seq > :after AND seq <= :up_to "
    "ORDER BY seq LIMIT :limit) e"
)
_FACTS: Final = Sql(
    "SELECT seq, ticket_id, step_id, attempt_id, sandbox_id, at, kind, data FROM events "
    "WHERE seq > :after AND seq <= :up_to AND kind IN ('transition', 'model_call', 'approval', 'refused') ORDER BY seq"
)
_ATTEMPTS: Final = Sql(
    "SELECT a.id, a.outcome, a.reason, a.timings, s.agent_name FROM attempts a "
    "LEFT JOIN step_executions s ON s.id = a.step_execution_id WHERE a.id IN :ids"
)
# Of live rows only: they have partial indexes.
_LIVE: Final = Sql(
    "SELECT state, count(*) AS number, min(created_at || '') AS oldest FROM tickets "
    "WHERE state IN ('in_progress', 'waiting', 'blocked') GROUP BY state "
    "UNION ALL SELECT 'ready', count(*), min(created_at || '') FROM tickets WHERE state = 'ready'"
)
_STEPS: Final = Sql(
    "SELECT (SELECT count(*) FROM step_executions WHERE status = 'ready' AND available_at IS NULL) AS ready, "
    "(SELECT count(*) FROM step_executions WHERE status = 'ready' AND available_at IS NOT NULL) AS delayed, "
    "(SELECT count(*) FROM attempts WHERE outcome IS NULL) AS running"
)

_POSITION: Final = Sql("SELECT seq FROM positions WHERE name = :name")
_BEGIN: Final = Sql(
    "INSERT INTO positions (name, seq) SELECT :name, COALESCE(max(seq), 0) FROM events WHERE true "
    "ON CONFLICT (name) DO NOTHING"
)
_FORGET: Final = Sql("DELETE FROM positions WHERE name = :name")
_MOVE: Final = Sql("UPDATE positions SET seq = :seq WHERE name = :name AND seq < :seq")


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedAttempt:
    agent: str | None
    outcome: str | None
    reason: str | None
    timings: Mapping[str, float]  # ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """``after``: for the next call; ``more``: there may be some at once. ``attempts``: those that ended, by id."""

    events: list[Event]
    attempts: Mapping[str, EndedAttempt]
    after: int
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """Of tickets that have not ended: how many by state, and the age of the oldest of each in seconds."""

    tickets: Mapping[str, int]
    oldest_seconds: Mapping[str, float]
    steps_ready: int
    steps_delayed: int
    attempts_running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    id: str
    step_id: str
    status: str
    agent_name: str | None
    queued_at: str | None
    started_at: str | None
    completed_at: str | None
    retry_count: int
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedAttempt:
    id: str
    step_execution_id: str
    number: int
    worker: str
    vm_id: int | None
    outcome: str | None
    reason: str | None
    started_at: str | None
    ended_at: str | None
    cost_usd: float
    error: str | None
    timings: Mapping[str, float]  # ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """The first steps and attempts of a run and those nested in it, without inputs and outputs."""

    steps: Sequence[TracedStep]
    attempts: Sequence[TracedAttempt]


_OF_RUN: Final = (
    "FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id {} WHERE r.ticket_id = :id "
    "AND (r.id = :run_id OR r.root_run_id = :run_id) ORDER BY {}.id LIMIT :limit"
)
_TRACED_STEPS: Final = Sql(
    f"SELECT {rows.columns(TracedStep, 's', 'error')}, substr(s.error, 1, 1000) AS error {_OF_RUN.format('', 's')}"
)
_TRACED_ATTEMPTS: Final = Sql(
    f"SELECT {rows.columns(TracedAttempt, 'a', 'error', 'timings')}, substr(a.error, 1, 1000) AS error, a.timings "
    + _OF_RUN.format("JOIN attempts a ON a.step_execution_id = s.id", "a")
)


def traced(tx: Tx, ticket_id: str, *, run_id: str | None, limit: int) -> Traced:
    which = {"id": ticket_id, "run_id": run_id, "limit": limit}
    return Traced(
        steps=[rows.value(TracedStep, row) for row in tx.all(_TRACED_STEPS, **which)],
        attempts=[
            rows.value(TracedAttempt, row, timings=rows.timings(row.timings))
            for row in tx.all(_TRACED_ATTEMPTS, **which)
        ],
    )


def facts(tx: Tx, *, after: int, up_to: int, limit: int) -> Facts:
    """Of the ``limit`` events after that one, those that say what came of a ticket, a step or a model call."""
    (end,) = tx.all(_UP_TO, after=after, up_to=up_to, limit=limit)
    if end.seq is None:
        return Facts(events=[], attempts={}, after=after, more=False)
    found = [rows.event(row) for row in tx.all(_FACTS, after=after, up_to=end.seq)]
    ids = {e.attempt_id for e in found if e.attempt_id and ends_attempt(e)}
    attempts = {row.id: _attempt(row) for row in tx.all_in(_ATTEMPTS, ids)} if ids else {}
    return Facts(events=found, attempts=attempts, after=end.seq, more=end.seq - after >= limit)


def ends_attempt(event: Event) -> bool:
    data = event.data
    return event.kind == "transition" and data.get("of") == "step" and data.get("from") == "running"


def position(tx: Tx, name: str) -> int | None:
    row = tx.first(_POSITION, name=name)
    return None if row is None else rows.whole(row.seq)


def begin(tx: Tx, name: str) -> None:
    """At the newest event, unless there is a position of this name."""
    if position(tx, name) is None:
        tx.run(_FORGET, name=name)  # another program wrote what is no number
        tx.run(_BEGIN, name=name)


def move(tx: Tx, name: str, seq: int) -> None:
    tx.run(_MOVE, name=name, seq=seq)


def ended_as(event: Event) -> str:
    """The state in which a ticket ended; '' if the event doesn't say that. Another program may have written it."""
    data = event.data
    to = data.get("to") if event.kind == "transition" and data.get("of") == "ticket" else None
    return to if isinstance(to, str) and to in TERMINAL_TICKET_STATES else ""


def backlog(tx: Tx) -> Backlog:
    live = tx.all(_LIVE)
    (steps,) = tx.all(_STEPS)
    known = {row.state: milliseconds(row.oldest) for row in live}
    return Backlog(
        tickets={row.state: row.number for row in live},
        oldest_seconds={state: max(0, tx.now_ms - ms) / 1000 for state, ms in known.items() if ms is not None},
        steps_ready=steps.ready,
        steps_delayed=steps.delayed,
        attempts_running=steps.running,
    )


def _attempt(row: Row) -> EndedAttempt:
    timings = rows.timings(row.timings)
    return EndedAttempt(agent=row.agent_name, outcome=row.outcome, reason=row.reason, timings=timings)
