"""What the pages of the dashboard show of tickets. Each statement reads a bounded number of rows, by an index."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from swarm.model import Event
from swarm.store.sql import rows
from swarm.store.sql.conditions import SOURCE_HOST
from swarm.store.sql.dialect import Sql
from swarm.store.sql.transaction import Tx
from swarm.store.tickets.pages import SCANNED

_RUNNING: Final = (
    "SELECT a.id, a.number, a.worker, a.vm_id, a.started_at, s.step_id, s.agent_name, s.agent_version, t.id "
    f"AS ticket_id, substr(t.title, 1, {rows.SUMMARY_CHARS}) AS title FROM attempts a JOIN step_executions s "
    "ON s.id = a.step_execution_id JOIN workflow_runs r ON r.id = s.run_id JOIN tickets t ON t.id = r.ticket_id "
    "WHERE a.outcome IS NULL{} ORDER BY a.id LIMIT :limit"
)
# Ids of attempts begin with the time when they were made (RFC 9562): the primary key is an index by time.
_ENDED_SINCE: Final = Sql(
    "SELECT outcome, count(*) AS number FROM (SELECT outcome FROM attempts WHERE id >= :first ORDER BY id DESC "
    "LIMIT :scanned) a WHERE outcome IS NOT NULL GROUP BY outcome"
)
# Which rows is decided before their long column is read.
_EVENTS: Final = (
    "SELECT e.seq, e.ticket_id, e.step_id, e.attempt_id, e.sandbox_id, e.at, e.kind, e.data FROM events e "
    "WHERE e.seq IN "
    "(SELECT w.seq FROM (SELECT o.seq, o.kind FROM events o WHERE o.ticket_id = :id AND {window} "
    "ORDER BY o.seq {order} LIMIT :scanned) w WHERE w.kind {is_output} 'output' "
    "ORDER BY w.seq {order} LIMIT :limit) ORDER BY e.seq {order}"
)
_QUESTIONS: Final = Sql(
    "SELECT s.step_id, s.question, s.error, s.attempt_id FROM workflow_runs r "
    "JOIN step_executions s ON s.run_id = r.id WHERE r.ticket_id = :id AND r.status IN ('running', 'waiting') "
    "AND s.status = 'waiting' AND s.verdict IS NULL ORDER BY s.id LIMIT :limit"
)
_NEXT: Final = Sql(
    f"SELECT s.step_id, s.available_at, {SOURCE_HOST} AS source_host, EXISTS (SELECT 1 FROM workers "
    f"WHERE workers.seen_at > :since AND workers.host = {SOURCE_HOST}) AS serves "
    "FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id "
    "WHERE r.ticket_id = :id AND r.status IN ('running', 'waiting') AND s.status = 'ready' ORDER BY s.id LIMIT :limit"
)
_STEPS: Final = Sql("SELECT s.step_id FROM step_executions s WHERE s.run_id = :run_id ORDER BY s.id LIMIT :limit")
_FROM: Final = Sql("SELECT COALESCE(max(d.seq), 0) AS seq FROM events d WHERE d.ticket_id = :id AND d.kind = 'deleted'")
_CALL: Final = (
    "SELECT c.at, c.step_execution_id, c.attempt_id, c.upstream, c.model, c.status, c.input_tokens, c.output_tokens, "
    "c.cache_read_tokens, c.cache_write_tokens, c.cost_usd, c.latency_ms, c.note FROM model_calls c"
)
_CALLS: Final = Sql(
    f"{_CALL} WHERE c.run_id IN (SELECT id FROM workflow_runs WHERE ticket_id = :id) ORDER BY c.at DESC LIMIT :limit"
)
_CALLS_OF_SANDBOX: Final = Sql(f"{_CALL} WHERE c.sandbox_id = :id ORDER BY c.at DESC LIMIT :limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningAttempt:
    id: str
    number: int
    worker: str
    vm_id: int | None  # None until its VM runs
    started_at: str | None
    step_id: str
    agent_name: str | None
    agent_version: str | None
    ticket_id: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """``status``: of HTTP; None while it runs. ``cost_usd`` None: its model has no price."""

    at: str
    step_execution_id: str | None
    attempt_id: str | None
    upstream: str | None
    model: str | None
    status: int | None
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cost_usd: float | None
    latency_ms: float | None
    note: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Of a step that waits for a person. ``over_budget``: it used up a budget, which an answer may raise."""

    step_id: str
    text: str
    over_budget: bool


def running(tx: Tx, *, project_id: str | None, limit: int) -> list[RunningAttempt]:
    """Oldest first."""
    values = {} if project_id is None else {"project_id": project_id}
    sql = _RUNNING.format("" if project_id is None else " AND t.project_id = :project_id")
    found = tx.all(Sql(sql), limit=limit, **values)
    return [rows.value(RunningAttempt, row, title=rows.lenient(row.title) or "") for row in found]


def attempts_since(tx: Tx, seconds: float) -> dict[str, int]:
    """Outcomes of the attempts that began in the last seconds; of the last `SCANNED` if there are more."""
    first = str(uuid.UUID(int=(tx.now_ms - round(seconds * 1000)) << 80))
    return {str(row.outcome): row.number for row in tx.all(_ENDED_SINCE, first=first, scanned=SCANNED)}


def questions(tx: Tx, ticket_id: str, *, limit: int) -> list[Question]:
    return [
        Question(
            step_id=rows.lenient(row.step_id) or "",
            text=rows.lenient(row.question or row.error) or "",
            over_budget=row.attempt_id is not None,
        )
        for row in tx.all(_QUESTIONS, id=ticket_id, limit=limit)
    ]


class NextStep(NamedTuple):
    """``in_ms``: when it may run; None: now. ``host``: that with the VM that it starts from, if no engine is there."""

    step_id: str
    in_ms: float | None
    host: str | None

    @property
    def waits_for_host(self) -> str:
        host = self.host and f"{self.step_id} waits for the host {self.host}, which has the VM that it starts from"
        return f"{host}: no engine runs there." if host else ""


def next_steps(tx: Tx, ticket_id: str, *, limit: int, silent_seconds: float) -> list[NextStep]:
    """The steps that are ready. An engine that has said nothing for ``silent_seconds`` doesn't run."""
    since = rows.iso(tx.now_ms - round(silent_seconds * 1000))
    return [
        NextStep(
            rows.lenient(row.step_id) or "",
            max(0.0, at - tx.now_ms) if isinstance(at := row.available_at, int) else None,
            None if row.serves else rows.lenient(row.source_host),
        )
        for row in tx.all(_NEXT, id=ticket_id, limit=limit, since=since)
    ]


def step_names(tx: Tx, run_id: str, *, limit: int) -> list[str]:
    return [rows.lenient(row.step_id) or "" for row in tx.all(_STEPS, run_id=run_id, limit=limit)]


def output(
    tx: Tx, ticket_id: str, *, after: int | None = None, before: int | None = None, limit: int
) -> tuple[list[Event], bool]:
    """Events of what its agents printed, in order: the first ones after a `seq`, or the last ones before one, or the
    last ones. And whether there are more in that direction."""
    found = _some(tx, ticket_id, "=", after=after, before=before, limit=limit + 1)
    more, found = len(found) > limit, found[:limit]
    return found if after is not None else found[::-1], more


def history(tx: Tx, ticket_id: str, *, limit: int) -> list[Event]:
    """The newest events that are no output, newest first."""
    return _some(tx, ticket_id, "<>", limit=limit)


def _some(
    tx: Tx, ticket_id: str, is_output: str, *, limit: int, after: int | None = None, before: int | None = None
) -> list[Event]:
    (start,) = tx.all(_FROM, id=ticket_id)  # an id may be used again after its ticket was deleted
    values: dict[str, Any] = {"first": max(start.seq, after or 0)}
    if before is not None:
        values["before"] = before
    window = "o.seq > :first" + (" AND o.seq < :before" if before is not None else "")
    order = "ASC" if after is not None else "DESC"
    sql = Sql(_EVENTS.format(window=window, order=order, is_output=is_output))
    return [rows.event(row) for row in tx.all(sql, id=ticket_id, limit=limit, scanned=SCANNED, **values)]


def calls(tx: Tx, ticket_id: str, *, limit: int) -> list[ModelCall]:
    """Newest first."""
    return [rows.value(ModelCall, row) for row in tx.all(_CALLS, id=ticket_id, limit=limit)]


def sandbox_calls(tx: Tx, sandbox_id: str, *, limit: int) -> list[ModelCall]:
    return [rows.value(ModelCall, row) for row in tx.all(_CALLS_OF_SANDBOX, id=sandbox_id, limit=limit)]
