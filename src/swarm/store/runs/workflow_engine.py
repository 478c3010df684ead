"""The workflow engine: decides what follows a step's end, in the same transaction if that is cheap, else soon after.

Most decisions cost about 100 µs. They are made while the write lock is held (`advance_workflows`), so nothing can get
lost between a step's end and what follows from it. A decision that could take long (expressions with loops, large
values, many items, a workflow seen for the first time) is noted in the run's row (`unprocessed`, `due_at`). The next
claim of any engine picks it up (`process_due`), decides from a snapshot, on another thread or in a process (`decide`),
writes the rows of many items ahead (`write_items`), and then the decision if the run has not changed since (`apply`).
A crash at any point leaves either the end with its consequences, or the end with its note.
See docs/adr/0013-durable-runs.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from swarm.cel.jail import Jail
from swarm.model import Event, ExecutionMode, RunStatus, TicketState
from swarm.store.registry.agents import Agents
from swarm.store.runs import decision, fan_outs, items
from swarm.store.runs.actions import carry_out, give_up
from swarm.store.runs.decision import TIME_IS_UP, Decided, Run
from swarm.store.runs.definitions import Definitions
from swarm.store.runs.items import Batch
from swarm.store.runs.limits import IN_TRANSACTION, Limits
from swarm.store.sql.conditions import LIVE_RUN, RUN_DUE, STEP_WAITING
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import dump, lenient, new_id, shallow
from swarm.store.sql.transaction import Row, Tx, one_row
from swarm.store.tickets import dependencies
from swarm.store.tickets.changes import Changes
from swarm.store.tickets.isolation import Isolation
from swarm.workflow.state import Ask, Complete, Fail, Skip, Start, StartWorkflow, Verdict

# All decisions of one transaction may take this long together; the rest are made outside.
PLANNING_SECONDS: Final = 0.05
# An engine that has taken up a decision has this long to make it; then others may take it up.
_DECIDING_MS: Final = 30_000
_DUE_LIMIT: Final = 100

# Actions on steps that only decisions change, and no claim meanwhile: ended, not begun, or without an attempt.
_ALONE: Final = (Start, StartWorkflow, Complete, Fail, Skip)

_SET_MODE: Final = one_row("UPDATE tickets SET execution_mode = 'workflow' WHERE id = :id")
INSERT_RUN: Final = one_row(
    "INSERT INTO workflow_runs (id, workflow_id, workflow_version, ticket_id, status, trigger_type, trigger_data, "
    "started_at, due_at, deadline_at) VALUES (:id, :workflow_id, :version, :ticket_id, 'running', :trigger_type, "
    ":trigger_data, :now, :deadline_at, :deadline_at)"
)
_DEFER: Final = one_row("UPDATE workflow_runs SET unprocessed = :unprocessed, due_at = :due_at WHERE id = :id")
_DUE: Final = Sql(
    f"SELECT id, unprocessed, deadline_at FROM workflow_runs WHERE {RUN_DUE} AND due_at <= :now_ms "
    "ORDER BY due_at LIMIT :limit"
)
_UNPROCESSED: Final = Sql("SELECT unprocessed FROM workflow_runs WHERE id = :id")
_SET_DUE: Final = Sql("UPDATE workflow_runs SET due_at = :due_at WHERE id = :id")
WAITING_COLUMNS: Final = (
    "s.id, s.run_id, s.step_id, s.attempt_id, s.error, s.question, s.verdict, r.ticket_id, r.path, r.definition, "
    "COALESCE(r.root_run_id, r.id) AS root_run"
)
_UNANSWERED: Final = Sql(
    f"SELECT {WAITING_COLUMNS} FROM step_executions s JOIN workflow_runs r ON r.id = s.run_id "
    "JOIN tickets t ON t.id = r.ticket_id "
    f"WHERE s.{STEP_WAITING} AND s.available_at <= :now_ms LIMIT :limit"
)
SET_VERDICT: Final = Sql("UPDATE step_executions SET verdict = :verdict, available_at = NULL WHERE id = :id")
_WAITING: Final = Sql(
    "SELECT t.state, EXISTS (SELECT 1 FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id WHERE "
    "r.ticket_id = t.id AND r.status IN ('running', 'waiting') AND s.status = 'waiting' AND s.verdict IS NULL) "
    "AS waiting FROM tickets t WHERE t.id = :ticket_id"
)
_SET_ROOT: Final = Sql("UPDATE workflow_runs SET status = :status WHERE id = :id AND ticket_id = :ticket_id")
DISOWNED: Final = Sql(
    "SELECT r.id FROM workflow_runs r LEFT JOIN tickets t ON t.id = r.ticket_id "
    f"WHERE {LIVE_RUN.replace('status', 'r.status')} AND r.root_run_id IS NULL AND (t.id IS NULL "
    "OR t.state NOT IN ('in_progress', 'waiting') OR t.run_id <> r.id OR t.run_id IS NULL) LIMIT :limit"
)


class WorkflowEngine:
    """One for each process. `decide` is for a reading thread or a `DecisionProcess`, the other methods are for the
    writing thread.

    ``planning_seconds``: see `PLANNING_SECONDS`; with less than 0 every decision is made outside.
    """

    def __init__(self, *, planning_seconds: float, isolation: Isolation) -> None:
        self.isolation = isolation
        self._planning_seconds = planning_seconds
        self.definitions = Definitions()
        self.agents = Agents()
        self.jail = Jail()

    def close(self) -> None:
        self.jail.close()

    # --- on the writing thread ----------------------------------------------------------------------------------------

    def begin(self, changes: Changes, row: Row, workflow: Row) -> str:
        """Add a run for a ready ticket, and queue its first decision. Returns the run's id."""
        id_, seconds = new_id(changes.tx.now_ms), row.timeout_seconds
        changes.add(
            INSERT_RUN,
            id=id_,
            workflow_id=workflow.id,
            version=workflow.version,
            ticket_id=row.id,
            trigger_type=row.trigger_type or "ticket",
            trigger_data=row.trigger_data,
            now=changes.tx.now,
            deadline_at=changes.tx.now_ms + round(seconds * 1000) if seconds else None,
        )
        if row.execution_mode != ExecutionMode.WORKFLOW:
            changes.add(_SET_MODE, id=row.id)
        changes.pending_runs[id_] = []
        self.definitions.begun(id_, workflow.id, row.id)
        return id_

    def advance_workflows(self, changes: Changes, *, take_up: bool = False) -> list[str]:
        """Decide on `changes.pending_runs`, whose tickets a shared transaction has locked. Returns the runs to be
        decided outside: by the caller, with ``take_up``."""
        deferred, began = list[str](), time.monotonic()
        while changes.pending_runs:
            changes.flush()
            run_id = next(iter(changes.pending_runs))
            keys = changes.pending_runs.pop(run_id)
            changes.tx.ahead(decision.expected(self.definitions, run_id, keys))
            for _ in changes.each([run_id], changes.owner):
                self._advance(changes, run_id, keys, deferred, began, take_up=take_up)
        changes.flush()
        dependencies.release(changes)
        return deferred

    def _advance(
        self, changes: Changes, run_id: str, keys: list[str], deferred: list[str], began: float, *, take_up: bool
    ) -> None:
        run = decision.load_live(changes.tx, run_id)
        if run is None:
            return
        pending, run.unprocessed = run.unprocessed is not None, [*(run.unprocessed or ()), *keys]
        decided = None
        if not pending and time.monotonic() - began <= self._planning_seconds:
            decided = decision.decide(changes.tx, run, self.definitions, None, IN_TRANSACTION)
        if decided is not None and not decided.too_expensive:
            self._write(changes, run, decided, deciding=take_up)
            if decided.decision is not None and decided.decision.more:
                deferred.append(run.id)
            return
        due_at = run.row.due_at
        if not pending:
            deferred.append(run.id)
            due_at = changes.tx.now_ms + (_DECIDING_MS if take_up else 0)
        changes.add(_DEFER, id=run.id, unprocessed=dump(run.unprocessed), due_at=due_at)

    def process_due(self, changes: Changes) -> list[str]:
        """Reject approvals that nobody answered in time, end late runs, and take up noted decisions.

        Returns the runs that the caller must decide on.
        """
        tx, undecided = changes.tx, []
        tx.exact()
        unanswered = tx.all(_UNANSWERED, now_ms=tx.now_ms, limit=_DUE_LIMIT)
        for row in changes.each(unanswered, lambda row: row.ticket_id):
            answer(changes, row, Verdict(approved=False, by="swarm", why="nobody answered in time"))
        due = tx.all(_DUE, now_ms=tx.now_ms, limit=_DUE_LIMIT)
        for row in changes.each(due, lambda row: changes.owner(row.id)):
            late = row.deadline_at is not None and row.deadline_at <= tx.now_ms
            if late and TIME_IS_UP not in (row.unprocessed or ""):
                run = decision.load_live(tx, row.id)
                if run is not None and not decision.may_clean_up(tx, run):
                    give_up(changes, run, decision.time_is_up(tx, run))
                    continue
                changes.pending_runs.setdefault(row.id, []).append(TIME_IS_UP)
            pending = row.unprocessed is not None
            if pending:
                undecided.append(row.id)
            if over := fan_outs.take_up(changes, row.id):
                changes.pending_runs.setdefault(row.id, []).extend(over)
            changes.add(_SET_DUE, id=row.id, due_at=_due_at(changes, row, deciding=pending))
        return undecided + self.advance_workflows(changes, take_up=True)

    def apply(self, tx: Tx, decisions: Sequence[Decided]) -> Sequence[bool]:
        """Write decisions that were made outside. True for a run that needs another decision at once."""
        return [self._apply_one(tx, decided) for decided in decisions]

    def _apply_one(self, tx: Tx, decided: Decided) -> bool:
        with self.isolation.of(tx) as changes:
            for _ in changes.each([decided], lambda decided: changes.owner(decided.run_id)):
                return self._apply(changes, decided)
        return False

    def _apply(self, changes: Changes, decided: Decided) -> bool:
        run = _undecided(changes.tx, decided.run_id, decided.revision)
        if run is None:
            return False
        if not self._write(changes, run, decided, deciding=True):
            return True
        self.advance_workflows(changes)
        changes.flush()
        after = changes.tx.first(_UNPROCESSED, id=decided.run_id)
        return after is not None and after.unprocessed is not None

    def write_items(self, tx: Tx, batches: Sequence[Batch]) -> Sequence[bool]:
        """Write some rows of fan-outs ahead of their decisions. False, with nothing written, for a run that has changed
        since."""
        return [self._write_items(tx, batch) for batch in batches]

    def _write_items(self, tx: Tx, batch: Batch) -> bool:
        with self.isolation.of(tx) as changes:
            for _ in changes.each([batch], lambda batch: changes.owner(batch.run_id)):
                run = _undecided(tx, batch.run_id, batch.revision)
                if run is None:
                    return False
                items.write(changes, run, batch)
                changes.add(_SET_DUE, id=run.id, due_at=_due_at(changes, run.row, deciding=True, timed=batch.timed))
                changes.flush()
                return True
        return False

    def _write(self, changes: Changes, run: Run, decided: Decided, *, deciding: bool) -> bool:
        """False if the decision came too late. ``deciding``: this process makes the run's next one at once."""
        if decided.failure is not None:
            give_up(changes, run, decided.failure)
            return True
        if decided.decision is not None and not all(isinstance(one, _ALONE) for one in decided.decision.actions):
            changes.tx.exact()
        if not carry_out(changes, run, decided, self.agents):
            return False
        if decided.decision is not None and decided.decision.more:
            now_ms = changes.tx.now_ms
            timed = decided.definition is None or decided.definition.graph.timed
            due_at = _due_at(changes, run.row, deciding=True, timed=timed) if deciding else now_ms
            changes.add(_SET_DUE, id=run.id, due_at=due_at)
        asked = decided.decision is not None and any(isinstance(one, Ask) for one in decided.decision.actions)
        if asked or run.row.state == TicketState.WAITING:
            changes.tx.exact()
            refresh_waiting(changes, run.row)
        return True

    # --- from a snapshot, on a reading thread or in a process of its own ----------------------------------------------

    def decide(self, tx: Tx, run_id: str, limits: Limits) -> tuple[Decided | None, Sequence[Batch]]:
        """The decision, and what is to be written ahead of it; None if there is nothing to decide any more."""
        run = _undecided(tx, run_id)
        if run is None:
            return None, ()
        return items.split(tx, decision.decide(tx, run, self.definitions, self.jail, limits))


def _undecided(tx: Tx, run_id: str, revision: int | None = None) -> Run | None:
    """A run with a noted decision; None if it has changed since this ``revision``."""
    run = decision.load_live(tx, run_id)
    if run is None or run.unprocessed is None or revision not in (None, run.row.revision):
        return None
    return run


def _due_at(changes: Changes, run: Row, *, deciding: bool, timed: bool = True) -> int | None:
    """ms: when a run is due next, whose deadline was looked at. ``deciding``: this process has taken up its decision.
    ``timed``: it may have fan-outs that choose by a time."""
    now_ms, choosing_at = changes.tx.now_ms, fan_outs.next_at(changes, run.id) if timed else None
    deadline_at = run.deadline_at if run.deadline_at is not None and run.deadline_at > now_ms else None
    times = (now_ms + _DECIDING_MS if deciding else None, deadline_at, choosing_at)
    return min((time_ms for time_ms in times if time_ms is not None), default=None)


def answer(changes: Changes, row: Row, verdict: Verdict) -> None:
    """Store the verdict on a waiting step (a row of `WAITING_COLUMNS`), and queue its run for a decision."""
    data = shallow(verdict)
    changes.add(SET_VERDICT, id=row.id, verdict=dump(data))
    changes.add_event(Event(ticket_id=row.ticket_id, step_id=row.step_id, kind="approval", data=data))
    changes.pending_runs.setdefault(row.run_id, []).append(row.step_id.removeprefix(row.path))
    refresh_waiting(changes, row)


def refresh_waiting(changes: Changes, row: Row, *, error: str | None = None, outputs: str | None = None) -> None:
    """Set a live ticket and its run to `waiting` while a step of it waits for a person, else back to running.

    ``error``: why the ticket waits, if it begins to wait now; ``outputs``: what there is for that person to see.
    """
    if row.ticket_id in changes.ended:
        return
    changes.flush()
    found = changes.tx.first(_WAITING, ticket_id=row.ticket_id)
    if found is None or found.state not in (TicketState.IN_PROGRESS, TicketState.WAITING):
        return  # another tool changed it
    waiting = bool(found.waiting)
    if waiting == (found.state == TicketState.WAITING):
        return
    after = TicketState.WAITING if waiting else TicketState.IN_PROGRESS
    changes.set_ticket(row.ticket_id, lenient(found.state), after, error=error if waiting else None, outputs=outputs)
    status = RunStatus.WAITING if waiting else RunStatus.RUNNING
    changes.add(_SET_ROOT, id=row.root_run, ticket_id=row.ticket_id, status=str(status))
