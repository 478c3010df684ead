"""What `swarm prove` reads: the event log in order, and the rows that must agree with it, from one snapshot.

Only the statements; swarm.admin.prove interprets the results. ``:since`` is ISO-8601 text, '' for everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from swarm.model import TERMINAL_TICKET_STATES
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient, milliseconds, parsed
from swarm.store.sql.transaction import Tx
from swarm.store.tickets.changes import HAS_OTHERS, MENDED

LOG: Final = Sql(
    "SELECT seq, ticket_id, step_id, attempt_id, sandbox_id, at, kind, data FROM events "
    "WHERE kind IN ('transition', 'refused', 'deleted', 'held', 'released', 'hold_lost') AND at >= :since ORDER BY seq"
)
TICKETS: Final = Sql(
    "SELECT t.id, t.state, t.run_id, r.status AS run_status, r.completed_at IS NOT NULL AS run_ended, "
    "(SELECT count(*) FROM step_executions s WHERE s.run_id = t.run_id "
    "AND s.status IN ('pending', 'waiting', 'ready', 'running')) + CASE WHEN r.unprocessed IS NULL THEN 0 ELSE 1 END "
    "AS live_steps "
    "FROM tickets t LEFT JOIN workflow_runs r ON r.id = t.run_id AND r.ticket_id = t.id "
    "WHERE t.updated_at >= :since OR t.state IN ('in_progress', 'waiting')"
)
ATTEMPTS: Final = Sql(
    "SELECT a.id, a.step_execution_id, a.outcome, a.lease_until, a.ended_at, s.status AS step_status, "
    "s.attempt_id AS owner, r.ticket_id FROM attempts a LEFT JOIN step_executions s ON s.id = a.step_execution_id "
    "LEFT JOIN workflow_runs r ON r.id = s.run_id "
    "WHERE a.outcome IS NULL OR a.ended_at >= :since ORDER BY a.step_execution_id, a.id"
)
RUNNING_STEPS: Final = Sql(
    f"SELECT s.id, s.step_id, s.attempt_id, r.ticket_id, t.state, a.outcome, a.id AS attempt, {HAS_OTHERS} "
    "AS has_others FROM step_executions s LEFT JOIN workflow_runs r ON r.id = s.run_id "
    "LEFT JOIN tickets t ON t.id = r.ticket_id LEFT JOIN attempts a ON a.id = s.attempt_id "
    "WHERE s.status = 'running'"
)
# Nothing would ever continue these: no decision is due, no step runs, and none waits for a worker or a person.
STALLED: Final = Sql(
    "SELECT r.ticket_id, r.path FROM workflow_runs r JOIN tickets t ON t.id = r.ticket_id "
    "AND t.run_id = COALESCE(r.root_run_id, r.id) AND t.state IN ('in_progress', 'waiting') "
    "WHERE r.progress IS NOT NULL AND r.status IN ('running', 'waiting') AND r.unprocessed IS NULL AND NOT EXISTS "
    "(SELECT 1 FROM step_executions s WHERE s.run_id = r.id AND s.status IN ('waiting', 'ready', 'running'))"
)


SANDBOXES: Final = Sql(
    "SELECT id, state, hold_id, lease_until, ended_at FROM sandboxes WHERE created_at >= :since OR ended_at >= :since "
    "OR state NOT IN ('ended', 'lost')"
)


# Files and large values: Swarm deletes none that a ticket uses.
WITHOUT_ARTIFACTS: Final = Sql(
    "SELECT t.id, count(*) AS gone FROM artifact_uses u JOIN tickets t ON t.id = u.ticket_id "
    "WHERE NOT EXISTS (SELECT 1 FROM artifacts a WHERE a.digest = u.digest) GROUP BY t.id"
)
RENAMED: Final = Sql(
    "SELECT r.ticket_id FROM tickets t JOIN workflow_runs r ON r.id = t.run_id WHERE r.ticket_id <> t.id"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """``of``, ``before``, ``after``: of a transition ('ticket', 'step' or 'sandbox', and its states). ``hold``: of a
    sandbox, whose it is; ``age_ms``: time since then."""

    seq: int
    ticket_id: str
    kind: str
    of: str = ""
    before: str | None = None
    after: str = ""
    mended: bool = False  # by Swarm's upkeep, since another program had changed rows
    step_id: str | None = None
    attempt_id: str | None = None
    sandbox_id: str | None = None
    hold: str | None = None
    age_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxFact:
    """``expired_ms``: time since its lease ended, if it is held."""

    id: str
    state: str
    hold_id: str | None = None
    has_end: bool = False  # the time of its end
    expired_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketFact:
    id: str
    state: str
    run_id: str | None = None
    run_status: str | None = None
    live_steps: int = 0
    run_ended: bool = False  # it has the time of its end


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFact:
    """``expired_ms``: time since its lease ended, if it has no outcome. ``ended_ms``: time since it has one."""

    id: str
    step_execution_id: str
    ticket_id: str | None
    outcome: str | None
    step_status: str | None
    owns_step: bool
    expired_ms: float = 0.0
    ended_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFact:
    """A running step. ``attempt_alive``: its attempt has no outcome, or other steps do its work. ``ticket_ended``: so
    nothing is lost with it."""

    step_id: str
    ticket_id: str | None
    attempt_alive: bool
    ticket_ended: bool = False


TRIGGERS: Final = (
    *("tickets_deleted", "tickets_touched", "tickets_inserted", "tickets_created_changed", "tickets_snapshots"),
    *("sandboxes_deleted", "sandboxes_inserted", "sandboxes_renamed"),
    *("workflows_added", "workflows_changed", "workflows_removed"),
)


class Audit:
    """A snapshot of the database. Its iterators work only during the call that received it."""

    def __init__(self, tx: Tx, since: str) -> None:
        self._tx = tx
        self.since = since

    def missing(self) -> list[str]:
        """Swarm's tables, indexes and triggers that are gone: a program that rebuilds a table drops its triggers."""
        from swarm.store.sql.schema import metadata  # and with it SQLAlchemy

        indexes = [index.name for table in metadata.tables.values() for index in table.indexes]
        present = {row.name for row in self._tx.all(Sql(self._tx.dialect.names))}
        return [str(name) for name in (*metadata.tables, *indexes, *TRIGGERS) if name not in present]

    def loses_deletions(self, table: str) -> bool:
        """Can a row of `tickets` or `sandboxes` be gone without a trace?"""
        return bool(self._tx.first(Sql(self._tx.dialect.untraced), table=table).untraced)  # type: ignore[union-attr]

    def renamed(self) -> Iterator[str]:
        """The former ids of tickets that got another one."""
        for row in self._tx.stream(RENAMED):
            yield lenient(row.ticket_id) or ""

    def without_artifacts(self) -> Iterator[tuple[str, int]]:
        """Tickets that use artifacts which are gone, and how many."""
        for row in self._tx.stream(WITHOUT_ARTIFACTS):
            yield lenient(row.id) or "", row.gone

    def log(self) -> Iterator[LogEntry]:
        now = self._tx.now_ms
        for row in self._tx.stream(LOG, since=self.since):
            data = parsed(row.data, dict) or {}  # another tool wrote it: not a transition
            yield LogEntry(
                seq=row.seq,
                ticket_id=lenient(row.ticket_id) or "",
                kind=str(row.kind),
                of=str(data.get("of", "")),
                before=data.get("from"),
                after=str(data.get("to", "")),
                mended=data.get("why") == MENDED,
                step_id=row.step_id,
                attempt_id=row.attempt_id,
                sandbox_id=lenient(row.sandbox_id),
                hold=str(data["hold"]) if "hold" in data else None,
                age_ms=max(0.0, now - (milliseconds(row.at) or now)) if row.sandbox_id is not None else 0.0,
            )

    def tickets(self) -> Iterator[TicketFact]:
        for row in self._tx.stream(TICKETS, since=self.since):
            yield TicketFact(
                id=lenient(row.id) or "",
                state=lenient(row.state) or "",
                run_id=row.run_id,
                run_status=row.run_status,
                live_steps=row.live_steps,
                run_ended=bool(row.run_ended),
            )

    def attempts(self) -> Iterator[AttemptFact]:
        now = self._tx.now_ms
        for row in self._tx.stream(ATTEMPTS, since=self.since):
            yield AttemptFact(
                id=row.id,
                step_execution_id=row.step_execution_id,
                ticket_id=lenient(row.ticket_id),
                outcome=row.outcome,
                step_status=row.step_status,
                owns_step=row.owner == row.id,
                expired_ms=max(0.0, now - row.lease_until) if row.outcome is None else 0.0,
                ended_ms=max(0.0, now - (milliseconds(row.ended_at) or now)),
            )

    def sandboxes(self) -> Iterator[SandboxFact]:
        now = self._tx.now_ms
        for row in self._tx.stream(SANDBOXES, since=self.since):
            until = row.lease_until if isinstance(row.lease_until, int | float) else now
            yield SandboxFact(
                id=lenient(row.id) or "",
                state=lenient(row.state) or "",
                hold_id=lenient(row.hold_id),
                has_end=row.ended_at is not None,
                expired_ms=max(0.0, now - until) if row.hold_id is not None else 0.0,
            )

    def running_steps(self) -> Iterator[StepFact]:
        for row in self._tx.stream(RUNNING_STEPS):
            yield StepFact(
                step_id=row.step_id,
                ticket_id=lenient(row.ticket_id),
                ticket_ended=row.state in TERMINAL_TICKET_STATES,
                attempt_alive=bool(row.has_others) or (row.attempt is not None and row.outcome is None),
            )

    def stalled(self) -> Iterator[str]:
        """Tickets with a live workflow run that nothing would ever continue."""
        for row in self._tx.stream(STALLED):
            yield lenient(row.ticket_id) or ""
