"""Collects the changes of one transaction and writes them with few statements; and the fence, which every write by an
attempt must pass. Every transition is written together with its event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from swarm.model import TERMINAL_TICKET_STATES, AttemptOutcome, Event, RunStatus, StepStatus, TicketState
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import READ_BYTES, dump, event_values, lenient, message, milliseconds
from swarm.store.sql.transaction import Row, Tx, one_row

T = TypeVar("T")

# Left joins: with SQLite, other tools may have deleted any of these rows.
_FENCE = """
SELECT a.id, a.step_execution_id, a.number, a.worker, a.outcome, a.reason, a.started_at,
       s.run_id, s.step_id, s.agent_id, s.status, s.attempt_id, s.retry_count, s.max_attempts, s.retry AS step_retry,
       r.ticket_id, r.path, r.definition, COALESCE(r.root_run_id, r.id) AS root_run,
       t.id AS ticket, t.state, t.run_id AS ticket_run, t.over_budget
FROM attempts a
/*-*/LEFT/*-*/ JOIN step_executions s ON s.id = a.step_execution_id
/*-*/LEFT/*-*/ JOIN workflow_runs r ON r.id = s.run_id
/*-*/LEFT/*-*/ JOIN tickets t ON t.id = r.ticket_id
"""
# Who locks both, locks the ticket first, as a DELETE of another program does: else two wait for each other.
FENCE_BY_ID: Final = Sql(_FENCE + "WHERE a.id IN :ids /*+ ORDER BY t.id, a.id FOR NO KEY UPDATE OF t, a */")
FENCE_EXPIRED: Final = Sql(
    _FENCE + "WHERE a.outcome IS NULL AND a.lease_until <= :now_ms LIMIT :limit "
    "/*+ FOR NO KEY UPDATE OF t, a SKIP LOCKED */"
)

INSERT_ATTEMPT: Final = one_row(
    "INSERT INTO attempts (id, step_execution_id, number, worker, lease_until, reason, started_at) "
    "VALUES (:id, :step_execution_id, :number, :worker, :lease_until, :reason, :now)"
)
_INTO_EVENTS: Final = (
    "INSERT INTO events (ticket_id, step_id, attempt_id, at, kind, data) "
    "VALUES (:ticket_id, :step_id, :attempt_id, :at, :kind, :data)"
)
INSERT_EVENT: Final = Sql(_INTO_EVENTS)
_INSERT_TRANSITION: Final = one_row(_INTO_EVENTS)
_END_ATTEMPT: Final = one_row(
    "UPDATE attempts SET outcome = :outcome, reason = :reason, error = :error, exit_code = :exit_code, "
    "timings = :timings, vm_id = COALESCE(:vm_id, vm_id), ended_at = :now WHERE id = :id"
)
_STEP_BACK: Final = one_row(
    "UPDATE step_executions SET status = 'ready', attempt_id = NULL, vm_id = NULL, retry_count = :retry_count, "
    "available_at = :available_at, queued_at = :now, error = :error WHERE id = :id"
)
_ASK: Final = one_row(
    "UPDATE step_executions SET status = 'waiting', vm_id = NULL, verdict = NULL, question = :question, error = :error "
    "WHERE id = :id"
)
_END_STEP: Final = one_row(
    "UPDATE step_executions SET status = :status, outputs = :outputs, error = :error, completed_at = :now, "
    "duration_ms = :duration_ms, vm_id = COALESCE(:vm_id, vm_id), snapshot_id = COALESCE(:snapshot_id, snapshot_id), "
    "available_at = NULL WHERE id = :id"
)
_ADD_VM_TIME: Final = Sql("UPDATE workflow_runs SET total_vm_time_ms = total_vm_time_ms + :vm_time_ms WHERE id = :id")
_END_RUN: Final = one_row(
    "UPDATE workflow_runs SET status = :status, completed_at = :now, error = :error, error_step = :error_step, "
    "total_vm_time_ms = total_vm_time_ms + :vm_time_ms WHERE id = :id"
)
_SET_TICKET: Final = one_row(
    "UPDATE tickets SET state = :state, outputs = COALESCE(:outputs, outputs), error = :error, "
    "completed_at = :completed_at, updated_at = :now WHERE id = :id"
)
_TICKET_OF_RUN: Final = Sql("SELECT ticket_id FROM workflow_runs WHERE id = :id")
_TICKETS_OF_RUNS: Final = Sql("SELECT id, ticket_id FROM workflow_runs WHERE id IN :ids")
_MOST_RESTARTS: Final = 20  # in so many events
_RESTARTS: Final = Sql(
    "SELECT count(*) AS number FROM events WHERE ticket_id = :id AND seq > (SELECT max(seq) FROM events) - 10000 "
    """AND kind = 'transition' AND data LIKE '{"of":"ticket","from":"ready"%'"""
)
_LIVE_STEPS: Final = Sql(
    "SELECT s.id, s.run_id, s.step_id, s.status, s.attempt_id, s.started_at, r.ticket_id "
    "FROM step_executions s JOIN workflow_runs r ON r.id = s.run_id /*+ JOIN tickets t ON t.id = r.ticket_id */ "
    "WHERE s.run_id IN :ids AND s.status IN ('pending', 'waiting', 'ready', 'running')"
    " /*+ ORDER BY t.id FOR NO KEY UPDATE OF t */"
)
_CANCEL_ATTEMPTS: Final = Sql(
    "UPDATE attempts SET outcome = 'cancelled', error = :error, ended_at = :now "
    "WHERE outcome IS NULL AND step_execution_id IN (SELECT id FROM step_executions WHERE run_id = :run_id)"
)
_CANCEL_STEPS: Final = Sql(
    "UPDATE step_executions SET status = 'cancelled', error = :error, completed_at = :now, available_at = NULL "
    "WHERE run_id = :run_id AND status IN ('pending', 'waiting', 'ready', 'running')"
)
_CANCEL_RUN: Final = Sql(
    "UPDATE workflow_runs SET status = 'cancelled', error = :error, completed_at = :now, unprocessed = NULL, "
    "due_at = NULL "
    "WHERE id = :run_id AND status IN ('running', 'waiting')"
)
_NESTED_RUNS: Final = Sql(
    "SELECT r.id FROM step_executions s JOIN workflow_runs r ON r.parent_step_id = s.id WHERE s.run_id IN :ids"
)
_DELETE_ATTEMPTS: Final = Sql(
    "DELETE FROM attempts WHERE step_execution_id IN (SELECT id FROM step_executions WHERE run_id = :run_id)"
)
_DELETE_STEPS: Final = Sql("DELETE FROM step_executions WHERE run_id = :run_id")
_DELETE_RUN: Final = Sql("DELETE FROM workflow_runs WHERE id = :run_id")
_CLOSE_TICKET: Final = Sql(
    "UPDATE tickets SET completed_at = COALESCE(completed_at, :now), updated_at = :now "
    "WHERE id = :id AND state = 'cancelled' AND completed_at IS NULL"
)

_LAST: Final = (INSERT_ATTEMPT, INSERT_EVENT, _INSERT_TRANSITION)
# What the log says of a ticket that was failed since another program had changed its rows.
MENDED: Final = "changed from outside"
# SQL, of a running step `s` of a run `r`: no attempt of its own, but steps or a nested run that do its work.
HAS_OTHERS: Final = (
    "(s.attempt_id IS NULL AND (EXISTS (SELECT 1 FROM workflow_runs w WHERE w.parent_step_id = s.id "
    "AND w.status IN ('running', 'waiting')) OR s.fan_out IS NOT NULL AND (r.unprocessed IS NOT NULL OR EXISTS "
    "(SELECT 1 FROM step_executions c WHERE c.run_id = s.run_id AND c.step_id > s.step_id || '[' "
    "AND c.step_id < s.step_id || '\\' AND (c.status IN ('ready', 'running') "
    "OR c.status = 'waiting' AND c.question IS NOT NULL)))))"
)
_RUNNING: Final = (TicketState.IN_PROGRESS, TicketState.WAITING)


def owns(row: Row) -> bool:
    """The fence: True if this attempt still owns its step, and its run its ticket."""
    return (
        row.outcome is None
        and row.status == StepStatus.RUNNING
        and row.attempt_id == row.id
        and row.state in _RUNNING
        and row.ticket_run == row.root_run
    )


@dataclass(frozen=True, slots=True)
class Culprit:
    """Whose changes are being written: a ticket's, run's or sandbox's (by its id), or a duty's that serves many (by its
    name)."""

    kind: Literal["ticket", "run", "sandbox", "duty"]
    id: object


class Changes:
    """Collect, then `flush`. `cancel_runs`, `delete_runs` and `cancel_orphans` flush by themselves.

    ``skips``: given after a fault, to find out whose it is (isolation.py); None while all is well.
    """

    def __init__(self, tx: Tx, skips: Callable[[Culprit], bool] | None = None) -> None:
        self.tx = tx
        self.culprit: Culprit | None = None
        self._skips = skips
        self.ended: dict[str, TicketState] = {}  # by this transaction; other tickets may depend on them
        # Runs that need a decision, each with the steps that ended or were answered; see `advance_workflows`.
        self.pending_runs: dict[str, list[str]] = {}
        self._rows: dict[Sql, list[Mapping[str, Any]]] = {}

    @property
    def isolating(self) -> bool:
        return self._skips is not None

    def each(self, rows: Iterable[T], ticket: Callable[[T], object]) -> Iterator[T]:
        """``rows``, one after the other. In isolation, each one's changes are written before the next one's turn, and
        those of skipped tickets are left out. ``ticket``: a row's ticket, or its Culprit."""
        if self._skips is None:
            yield from rows
            return
        self.flush()
        before = self.culprit
        for row in rows:
            found = ticket(row)
            culprit = found if isinstance(found, Culprit) else Culprit("ticket", found)
            if self._skips(culprit):
                continue
            self.culprit = culprit
            yield row
            self.flush()
            self.culprit = before

    def kept(self, rows: list[T], ticket: Callable[[T], object]) -> list[T]:
        """Without those of skipped tickets."""
        skips = self._skips
        return rows if skips is None else [row for row in rows if not skips(Culprit("ticket", ticket(row)))]

    def owner(self, run_id: str) -> Culprit:
        """The ticket of a run. (The run's own id is a new one at each try if the transaction that makes it fails.)"""
        found = self.tx.first(_TICKET_OF_RUN, id=run_id)
        return Culprit("ticket", found.ticket_id) if found is not None else Culprit("run", run_id)

    def add(self, statement: Sql, **values: Any) -> None:
        self._rows.setdefault(statement, []).append(values)

    def flush(self) -> None:
        """Write the statements in the order of their first row, but new attempts, events and transitions at the end."""
        rows, self._rows = self._rows, {}
        last = [(statement, rows.pop(statement, [])) for statement in _LAST]
        for statement, values in (*rows.items(), *last):
            self.tx.many(statement, values)
        if self.isolating:
            self.tx.write()  # an error is known by whose turn it is

    def transition(
        self,
        what: str,
        before: str | None,
        after: str,
        *,
        ticket_id: str,
        step_id: str | None = None,
        attempt_id: str | None = None,
        **details: object,
    ) -> None:
        data = {"of": what, "from": before, "to": after, **{k: v for k, v in details.items() if v is not None}}
        self.add(
            _INSERT_TRANSITION,
            ticket_id=ticket_id,
            step_id=step_id,
            attempt_id=attempt_id,
            at=self.tx.now,
            kind="transition",
            data=dump(data),
        )

    def add_event(self, event: Event) -> None:
        self.add(INSERT_EVENT, **event_values(event, self.tx.now))

    def set_ticket(
        self,
        ticket_id: str,
        before: str | None,
        after: TicketState,
        *,
        error: str | None = None,
        outputs: str | None = None,
        why: str | None = None,
    ) -> None:
        if after in TERMINAL_TICKET_STATES:
            self.ended[ticket_id] = after
        done_at = self.tx.now if after in TERMINAL_TICKET_STATES else None
        error = message(error)
        values = {"id": ticket_id, "state": str(after), "outputs": outputs, "error": error, "completed_at": done_at}
        self.add(_SET_TICKET, **values, now=self.tx.now)
        self.transition("ticket", before, after, ticket_id=ticket_id, why=why, error=error)

    def end_attempt(
        self,
        row: Row,
        outcome: AttemptOutcome,
        *,
        reason: str | None = None,
        error: str | None = None,
        exit_code: int | None = None,
        timings: Mapping[str, float] | None = None,
        vm_id: int | None = None,
    ) -> None:
        self.add(
            _END_ATTEMPT,
            id=row.id,
            outcome=str(outcome),
            reason=reason,
            error=message(error),
            exit_code=exit_code,
            timings=dump(dict(timings)) if timings else None,
            vm_id=vm_id,
            now=self.tx.now,
        )

    def step_back(
        self,
        row: Row,
        *,
        why: str,
        counted: bool,
        error: str | None,
        before: StepStatus = StepStatus.RUNNING,
        delay_ms: int = 0,
        vm_time_ms: float = 0.0,
    ) -> None:
        """running → ready: by retry, lost lease or soft stop; waiting → ready: its budget was raised."""
        self.add(
            _STEP_BACK,
            id=row.step_execution_id,
            retry_count=row.retry_count + counted,
            available_at=self.tx.now_ms + delay_ms if delay_ms else None,
            error=message(error),
            now=self.tx.now,
        )
        if vm_time_ms:
            self.add(_ADD_VM_TIME, id=row.run_id, vm_time_ms=vm_time_ms)
        self.transition(
            "step",
            before,
            StepStatus.READY,
            ticket_id=row.ticket_id,
            step_id=row.step_id,
            attempt_id=row.id,
            why=why,
            delay_ms=delay_ms or None,
            error=message(error),
        )

    def ask(self, row: Row, *, why: str, question: str, error: str, vm_time_ms: float = 0.0) -> None:
        """running → waiting, for a person's answer. The step's row keeps the id of this attempt."""
        self.add(_ASK, id=row.step_execution_id, question=message(question), error=message(error))
        if vm_time_ms:
            self.add(_ADD_VM_TIME, id=row.run_id, vm_time_ms=vm_time_ms)
        self.transition(
            "step",
            StepStatus.RUNNING,
            StepStatus.WAITING,
            ticket_id=row.ticket_id,
            step_id=row.step_id,
            attempt_id=row.id,
            why=why,
            error=message(error),
        )

    def end_step(
        self,
        row: Row,
        status: StepStatus,
        *,
        why: str,
        before: StepStatus = StepStatus.RUNNING,
        error: str | None = None,
        outputs: str | None = None,
        vm_time_ms: float = 0.0,
        vm_id: int | None = None,
        snapshot_id: str | None = None,
    ) -> None:
        """The step ends, and in a plain ticket also the run and the ticket. In a workflow, the run needs a decision."""
        error, now = message(error), self.tx.now
        started, ended = milliseconds(row.started_at), self.tx.now_ms
        once = outputs is None or row.definition is not None or len(outputs) <= READ_BYTES  # else the ticket has them
        self.add(
            _END_STEP,
            id=row.step_execution_id,
            status=str(status),
            outputs=outputs if once else None,
            error=error,
            now=now,
            duration_ms=max(0, ended - started) if started is not None else None,
            vm_id=vm_id,
            snapshot_id=snapshot_id,
        )
        self.transition(
            "step",
            before,
            status,
            ticket_id=row.ticket_id,
            step_id=row.step_id,
            attempt_id=row.id,
            why=why,
            error=error,
        )
        if row.definition is not None:
            self.pending_runs.setdefault(row.run_id, []).append(row.step_id.removeprefix(row.path))
            if vm_time_ms:
                self.add(_ADD_VM_TIME, id=row.run_id, vm_time_ms=vm_time_ms)
            return
        run_status, state = {
            StepStatus.COMPLETED: (RunStatus.COMPLETED, TicketState.DONE),
            StepStatus.FAILED: (RunStatus.FAILED, TicketState.FAILED),
            StepStatus.CANCELLED: (RunStatus.CANCELLED, TicketState.CANCELLED),
        }[status]
        self.add(
            _END_RUN,
            id=row.run_id,
            status=str(run_status),
            error=error,
            error_step=row.step_id if status is StepStatus.FAILED else None,
            now=now,
            vm_time_ms=vm_time_ms,
        )
        self.set_ticket(row.ticket_id, lenient(row.state), state, error=error, outputs=outputs)

    def cancel_runs(self, run_ids: Iterable[str], *, error: str) -> None:
        """Cancel these runs, nested ones, and their live steps and attempts. Tickets are not changed."""
        self.tx.exact()
        self.flush()
        ids = self._with_nested(run_ids)
        for run in ids:
            self.pending_runs.pop(run, None)
        for step in self.tx.all_in(_LIVE_STEPS, ids):
            self.transition(
                "step",
                step.status,
                StepStatus.CANCELLED,
                ticket_id=step.ticket_id,
                step_id=step.step_id,
                attempt_id=step.attempt_id,
                why=error,
            )
        for statement in (_CANCEL_ATTEMPTS, _CANCEL_STEPS, _CANCEL_RUN):
            self.tx.many(statement, [{"run_id": run, "error": message(error), "now": self.tx.now} for run in ids])
        self.flush()

    def check_restarts(self, ticket_id: str) -> None:
        """Of one that is ready again. Raises the driver's error if it is so often that a trigger must do it."""
        if self.tx.all(_RESTARTS, id=ticket_id)[0].number >= _MOST_RESTARTS:
            raise self.tx.dialect.driver_error(f"the ticket was made ready {_MOST_RESTARTS} times in a short time")

    def end_former(self, ticket_id: str, run_id: str) -> None:
        """The run of a ticket that another program made ready again while it ran."""
        self.check_restarts(ticket_id)
        self.cancel_runs([run_id], error="the ticket was made ready again")

    def whole_runs(self, rows: Sequence[Row]) -> list[str]:
        """The runs of these rows, and the tickets' own runs that they are nested in, if they are: another program may
        have named those of another ticket."""
        roots = {row.root_run: row.ticket_id for row in rows if row.root_run != row.run_id}
        found = self.tx.all_in(_TICKETS_OF_RUNS, roots)
        return [row.run_id for row in rows] + [run.id for run in found if run.ticket_id == roots[run.id]]

    def delete_runs(self, run_ids: Iterable[str]) -> None:
        """Delete runs whose ticket was deleted."""
        self.tx.exact()
        self.flush()
        ids = self._with_nested(run_ids)
        for statement in (_DELETE_ATTEMPTS, _DELETE_STEPS, _DELETE_RUN):
            self.tx.many(statement, [{"run_id": run} for run in ids])

    def _with_nested(self, run_ids: Iterable[str]) -> list[str]:
        found = dict.fromkeys(run_ids)
        level = list(found)
        while level:
            level = [row.id for row in self.tx.all_in(_NESTED_RUNS, level) if row.id not in found]
            found |= dict.fromkeys(level)
        return list(found)

    def cancel_orphans(self, rows: Sequence[Row]) -> None:
        """Live attempts (rows of the fence) or ready steps whose ticket another tool ended, changed or deleted."""
        known = [row for row in rows if row.run_id is not None and row.ticket is not None]
        taken_back = [row for row in known if not (row.state in _RUNNING and row.ticket_run == row.root_run)]
        if taken_back:
            self.cancel_runs(self.whole_runs(taken_back), error="the ticket was changed from outside")
            for row in taken_back:
                self.add(_CLOSE_TICKET, id=row.ticket, now=self.tx.now)
            self.flush()
        if deleted := [row.run_id for row in rows if row.run_id is not None and row.ticket is None]:
            self.delete_runs(deleted)
        for row in known:
            if row not in taken_back:  # the step belongs to another attempt
                self.end_attempt(row, AttemptOutcome.LOST, error="another attempt has the step")
        self.flush()
