"""Carries out a planner's decision: rows, events, nested runs, and the end of the run.

The actions are applied in memory, in order; then each changed step's row is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.model import Agent, RunStatus, StepStatus, TicketState
from swarm.store.registry.agents import Agents
from swarm.store.runs import artifacts, fan_outs, items, packing
from swarm.store.runs.decision import STEPS, Decided, Run
from swarm.store.runs.definitions import Definition
from swarm.store.runs.packing import Packed
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import dump, ids_in_order, lenient, message, milliseconds, new_id, shallow
from swarm.store.sql.transaction import Row, one_row
from swarm.store.tickets.changes import Changes
from swarm.workflow.definition import Step
from swarm.workflow.state import (
    ENDED,
    Action,
    Ask,
    Cancel,
    Complete,
    Expand,
    Fail,
    Skip,
    Start,
    StartWorkflow,
    Update,
)

_INSERT_DEFINITION: Final = Sql(
    "INSERT INTO definitions (digest, definition) VALUES (:digest, :definition) ON CONFLICT DO NOTHING"
)
_INSERT_RUN: Final = one_row(
    "INSERT INTO workflow_runs (id, workflow_id, workflow_version, ticket_id, status, trigger_type, started_at, "
    "parent_step_id, root_run_id, path, definition, due_at, deadline_at) VALUES (:id, :workflow_id, :version, "
    ":ticket_id, 'running', 'workflow', :now, :parent_step_id, :root_run_id, :path, :definition, :deadline_at, "
    ":deadline_at)"
)
_SET_RUN: Final = one_row(
    "UPDATE workflow_runs SET definition = :definition, context = COALESCE(:context, context), progress = :progress, "
    "unprocessed = :unprocessed, due_at = :due_at, deadline_at = :deadline_at, revision = :revision WHERE id = :id"
)
_END_RUN: Final = one_row(
    "UPDATE workflow_runs SET status = :status, error = :error, error_step = :error_step, completed_at = :now, "
    "unprocessed = NULL, due_at = NULL WHERE id = :id"
)
_ADD_TOTALS: Final = Sql(
    "UPDATE workflow_runs SET total_vm_time_ms = total_vm_time_ms + nested.vm, "
    "total_api_tokens = total_api_tokens + nested.tokens, total_cost_usd = total_cost_usd + nested.cost "
    "FROM (SELECT total_vm_time_ms AS vm, total_api_tokens AS tokens, total_cost_usd AS cost FROM workflow_runs "
    "WHERE id = :run_id) AS nested WHERE workflow_runs.id = :id"
)
_PARENT: Final = Sql("SELECT run_id, step_id, status, started_at FROM step_executions WHERE id = :id")
_END_PARENT: Final = one_row(
    "UPDATE step_executions SET status = :status, outputs = :outputs, error = :error, completed_at = :now, "
    "duration_ms = :duration_ms WHERE id = :id"
)
_RUNS_OF_STEPS: Final = Sql(
    "SELECT id FROM workflow_runs WHERE parent_step_id IN :ids AND status IN ('running', 'waiting')"
)
_CANCEL_ATTEMPT: Final = Sql(
    "UPDATE attempts SET outcome = 'cancelled', error = :error, ended_at = :now WHERE id = :id AND outcome IS NULL"
)
_CHILDREN: Final = Sql(
    "SELECT step_id FROM step_executions WHERE run_id = :run_id AND substr(step_id, 1, length(:prefix)) = :prefix "
    "AND status IN ('pending', 'waiting', 'ready', 'running')"
)
# The columns that an action may set; NULL leaves a column as it is.
_WRITTEN: Final = (
    "agent_id", "agent_name", "agent_version", "inputs", "outputs", "queued_at", "started_at", "completed_at",
    "duration_ms", "max_attempts", "timeout_seconds", "retry", "question", "fan_out", "keep_vm", "from_step",
    "snapshot_id", "requires",
)  # fmt: skip
_UPDATE_STEP: Final = one_row(
    "UPDATE step_executions SET status = :status, error = :error, available_at = :available_at, "
    + ", ".join(f"{name} = COALESCE(:{name}, {name})" for name in _WRITTEN)
    + " WHERE id = :id"
)
_NEW: Final = ("id", "run_id", "step_id", "status", "error", "available_at", "priority", "ticket_created_at")
_INSERT_STEP: Final = one_row(
    f"INSERT INTO step_executions ({', '.join((*_NEW, *_WRITTEN))}) "
    f"VALUES ({', '.join(f':{name}' for name in _NEW)}, "
    + ", ".join(f"COALESCE(:{name}, 1)" if name == "max_attempts" else f":{name}" for name in _WRITTEN)
    + ")"
)


@dataclass(slots=True)
class _Step:
    """A row of step_executions, as it is to be written."""

    id: str
    status: str
    new: bool
    error: str | None = None
    available_at: int | None = None
    attempt_id: str | None = None
    started_at: str | None = None
    has_fan: bool = False
    touched: bool = False
    values: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_WRITTEN))


def carry_out(changes: Changes, run: Run, decided: Decided, agents: Agents) -> bool:
    """Write a decision. False, with nothing changed, when steps that it is based on have ended since.

    Steps that failed to start, and nested runs that ended, are queued in `changes.pending_runs`.
    """
    assert decided.decision is not None and decided.definition is not None
    return _Work(changes, run, decided, decided.definition, agents).run(decided.decision.actions)


class _Work:
    def __init__(self, changes: Changes, run: Run, decided: Decided, definition: Definition, agents: Agents) -> None:
        self._changes = changes
        self._tx = changes.tx
        self._run = run
        self._decided = decided
        self._definition = definition
        self._agents = agents
        self._steps: dict[str, _Step] = {}
        self._ids = ids_in_order(changes.tx.now_ms if decided.ahead_ms is None else decided.ahead_ms)
        self._unstartable: list[str] = []

    def run(self, actions: Sequence[Action]) -> bool:
        for row in filter(None, (self._decided.rows or {}).values()):
            self._load(row)
        begins = self._definition.graph.steps if self._run.progress is None else ()
        if not begins or self._decided.rows is None:  # else all of them were read
            sources = [one.source for one in actions if isinstance(one, Start) and one.source]
            self._read([*begins, *(action.key for action in actions), *sources])
        for key in begins:
            if key not in self._steps:
                self._add(key, StepStatus.PENDING)
        for key, step in self._steps.items():
            if step.status in ENDED and self._decided.seen.get(key, step.status) not in ENDED:
                return False
        for action in actions:
            self._apply(action)
        self._write()
        return True

    # --- steps ---

    def _read(self, keys: Sequence[str]) -> None:
        known = self._decided.rows or self._steps
        new = [key for key in dict.fromkeys(keys) if key not in self._steps and key not in known]
        wanted = [self._run.step_id(key) for key in new]
        for row in self._tx.all_in(STEPS, wanted, run_id=self._run.id):
            self._load(row)

    def _load(self, row: Row) -> None:
        self._steps[self._run.key(row.step_id)] = _Step(
            id=row.id,
            status=row.status,
            new=False,
            error=row.error,
            available_at=row.available_at,
            attempt_id=row.attempt_id,
            started_at=row.started_at,
            has_fan=row.fan_out is not None,
        )

    def _add(self, key: str, status: StepStatus, **values: Any) -> _Step:
        step = self._steps[key] = _Step(id=next(self._ids), status=status, new=True)
        step.values |= values
        return step

    def _step(self, key: str) -> _Step:
        return self._steps.get(key) or self._add(key, StepStatus.PENDING)

    def _move(self, key: str, after: StepStatus, *, error: str | None = None, **values: Any) -> _Step:
        step, now = self._step(key), self._tx.now
        before, step.status, step.error, step.touched = step.status, after, message(error), True
        step.available_at = values.pop("available_at", None)
        step.values |= {name: value for name, value in values.items() if value is not None}
        if after == StepStatus.RUNNING:
            step.started_at = step.values["started_at"] = now
        if after in ENDED:
            if key in self._definition.graph.fan_outs and not step.has_fan:
                items.drop(self._changes, self._run, key)
            since = milliseconds(step.started_at)
            step.values["completed_at"] = now
            step.values["duration_ms"] = max(0, self._tx.now_ms - since) if since is not None else None
        self._changes.transition(
            "step",
            before,
            after,
            ticket_id=self._run.row.ticket_id,
            step_id=self._run.step_id(key),
            attempt_id=step.attempt_id,
            error=step.error,
        )
        return step

    # --- actions ---

    def _apply(self, action: Action) -> None:
        graph = self._definition.graph
        match action:
            case Start():
                self._start(action)
            case StartWorkflow():
                self._start_workflow(action)
            case Ask():
                self._ask(action)
            case Expand():
                fan_out, at = dump(shallow(action.fan_out)), fan_outs.chooses_at(self._tx, graph.steps[action.key])
                self._move(action.key, StepStatus.RUNNING, fan_out=fan_out, available_at=at).has_fan = True
                if self._decided.ahead_ms is None:
                    items.drop(self._changes, self._run, action.key)
                for child in action.children:
                    added = self._add(child.key, StepStatus.PENDING, inputs=self._packed(child.inputs))
                    if child.skip:
                        added.status, added.error = StepStatus.SKIPPED, message(child.skip)
                        added.values["completed_at"] = self._tx.now
            case Update():
                step = self._step(action.key)
                step.values["fan_out"], step.touched = dump(shallow(action.fan_out)), True
                fan_outs.let_go(self._changes, self._run, graph, action.key, action.fan_out)
            case Complete():
                self._move(action.key, StepStatus.COMPLETED, outputs=self._packed(action.outputs))
            case Fail():
                self._move(action.key, StepStatus.FAILED, error=action.error)
            case Skip():
                self._move(action.key, StepStatus.SKIPPED, error=action.why)
            case Cancel():
                self._cancel(action)

    def _packed(self, value: Any) -> str:
        """JSON for a row; large values in it become artifacts."""
        packed = value if isinstance(value, Packed) else packing.pack(value)  # large ones were packed before
        artifacts.keep(self._tx, self._run.row.ticket_id, packed.parts)
        return packed.text

    def _inputs(self, action: Start | StartWorkflow) -> str | None:
        """None if the row has them: an item's."""
        step = self._step(action.key)
        has_them = action.key.endswith("]") and (not step.new or step.values["inputs"] is not None)
        return None if has_them else self._packed(action.inputs)

    def _start(self, action: Start) -> None:
        agent = self._agents.named(self._tx, action.agent)
        if not isinstance(agent, Agent):
            why = f": {agent}" if agent is not None else " was removed after the run began"
            self._move(action.key, StepStatus.FAILED, error=f"the agent {action.agent}{why}")
            self._unstartable.append(action.key)
            return
        step, ticket_tries = action.step, self._run.row.max_attempts
        self._move(
            action.key,
            StepStatus.READY,
            agent_id=agent.id,
            agent_name=agent.name,
            agent_version=agent.version,
            inputs=self._inputs(action),
            queued_at=self._tx.now,
            max_attempts=step.retry.max_attempts if step.retry else ticket_tries or agent.retry.max_attempts,
            timeout_seconds=step.timeout_seconds or agent.timeout_seconds,
            retry=_retry(step),
            keep_vm=step.keep_vm,
            requires=dump(dict(step.requires)) if step.requires else None,
            from_step=self._step(action.source).id if action.source is not None else None,
            snapshot_id="" if action.is_source else None,
        )

    def _start_workflow(self, action: StartWorkflow) -> None:
        step = self._move(action.key, StepStatus.RUNNING, inputs=self._inputs(action))
        inner, seconds = self._definition.within[action.step.id], action.step.timeout_seconds
        id_ = new_id(self._tx.now_ms)
        self._changes.add(_INSERT_DEFINITION, digest=inner.digest, definition=inner.text)
        self._changes.add(
            _INSERT_RUN,
            id=id_,
            workflow_id=inner.graph.workflow.id,
            version=inner.graph.workflow.version,
            ticket_id=self._run.row.ticket_id,
            now=self._tx.now,
            parent_step_id=step.id,
            root_run_id=self._run.row.root_run,
            path=f"{self._run.step_id(action.key)}/",
            definition=inner.digest,
            deadline_at=self._tx.now_ms + round(seconds * 1000) if seconds else None,
        )
        self._changes.pending_runs[id_] = []

    def _ask(self, action: Ask) -> None:
        seconds = action.timeout_seconds
        self._move(
            action.key,
            StepStatus.WAITING,
            question=message(action.message),
            queued_at=self._tx.now,
            available_at=self._tx.now_ms + round(seconds * 1000) if seconds else None,
        )

    def _cancel(self, action: Cancel) -> None:
        keys = [action.key]
        if self._step(action.key).has_fan:
            prefix = self._run.step_id(f"{action.key}[")
            children = [row.step_id for row in self._tx.all(_CHILDREN, run_id=self._run.id, prefix=prefix)]
            self._read([self._run.key(one) for one in children])
            keys += [key for key in self._steps if key.startswith(f"{action.key}[")]
        running = []
        for key in keys:
            step = self._step(key)
            if step.status in ENDED:
                continue
            if step.status == StepStatus.RUNNING and step.attempt_id is None:
                running.append(step.id)
            elif step.status == StepStatus.RUNNING:
                self._changes.add(_CANCEL_ATTEMPT, id=step.attempt_id, error=message(action.why), now=self._tx.now)
            self._move(key, StepStatus.CANCELLED, error=action.why)
        if running:
            self._changes.flush()  # the same decision may have started them
        if inner := [row.id for row in self._tx.all_in(_RUNS_OF_STEPS, running)]:
            self._changes.cancel_runs(inner, error=action.why)

    # --- rows ---

    def _write(self) -> None:
        run, decision, definition = self._run, self._decided.decision, self._definition
        assert decision is not None
        self._write_steps()
        # Steps that this decision ended need no further processing, even if someone else ended them too.
        processed = {*self._decided.processed, *(key for key, step in self._steps.items() if step.status in ENDED)}
        unprocessed = [*(key for key in run.unprocessed or () if key not in processed), *decision.more]
        if run.row.definition is None:
            self._changes.add(_INSERT_DEFINITION, digest=definition.digest, definition=definition.text)
        deadline_at = self._decided.deadline_at or run.row.deadline_at
        self._changes.add(
            _SET_RUN,
            id=run.id,
            definition=definition.digest,
            context=self._decided.context,
            progress=dump(shallow(decision.progress)),
            unprocessed=dump(unprocessed) if unprocessed else None,
            due_at=run.row.due_at
            if unprocessed
            else fan_outs.due_at(self._changes, definition.graph, run.id, deadline_at),
            deadline_at=deadline_at,
            revision=run.row.revision + 1,
        )
        if self._unstartable and decision.end is None:
            self._changes.pending_runs.setdefault(run.id, []).extend(self._unstartable)
        if decision.end is not None:
            end = decision.end
            outputs = None
            if end.status is RunStatus.COMPLETED:
                inner = run.row.parent_step_id is not None
                outputs = self._packed(end.outputs) if inner else _text(end.outputs)
            step = run.step_id(end.error_step) if end.error_step else None
            end_run(self._changes, run, end.status, outputs=outputs, error=end.error, error_step=step)

    def _write_steps(self) -> None:
        row = self._run.row
        for key, step in self._steps.items():
            if step.new:
                self._changes.add(
                    _INSERT_STEP,
                    id=step.id,
                    run_id=self._run.id,
                    step_id=self._run.step_id(key),
                    status=str(step.status),
                    error=step.error,
                    available_at=step.available_at,
                    priority=row.priority or 0,
                    ticket_created_at=row.ticket_created_at,
                    **step.values,
                )
            elif step.touched:
                self._changes.add(
                    _UPDATE_STEP,
                    id=step.id,
                    status=str(step.status),
                    error=step.error,
                    available_at=step.available_at,
                    **step.values,
                )


def end_run(
    changes: Changes,
    run: Run,
    status: RunStatus,
    *,
    outputs: str | None = None,
    error: str | None = None,
    error_step: str | None = None,
) -> None:
    """End a run and with it its ticket or, for a nested run, its step in the outer run, which is queued."""
    changes.add(
        _END_RUN, id=run.id, status=str(status), error=message(error), error_step=error_step, now=changes.tx.now
    )
    if run.row.parent_step_id is None:
        before = lenient(run.row.state)
        if status is RunStatus.COMPLETED and before == TicketState.WAITING:  # this decision cancelled the waiting step
            changes.set_ticket(run.row.ticket_id, before, TicketState.IN_PROGRESS)
            before = TicketState.IN_PROGRESS
        state = TicketState.DONE if status is RunStatus.COMPLETED else TicketState.FAILED
        changes.set_ticket(run.row.ticket_id, before, state, error=error, outputs=outputs)
        return
    parent = changes.tx.first(_PARENT, id=run.row.parent_step_id)
    if parent is None or parent.status != StepStatus.RUNNING:
        return
    after = StepStatus.COMPLETED if status is RunStatus.COMPLETED else StepStatus.FAILED
    since = milliseconds(parent.started_at)
    changes.add(
        _END_PARENT,
        id=run.row.parent_step_id,
        status=str(after),
        outputs=outputs,
        error=message(error),
        now=changes.tx.now,
        duration_ms=max(0, changes.tx.now_ms - since) if since is not None else None,
    )
    changes.add(_ADD_TOTALS, run_id=run.id, id=parent.run_id)
    changes.transition(
        "step",
        StepStatus.RUNNING,
        after,
        ticket_id=run.row.ticket_id,
        step_id=parent.step_id,
        error=message(error),
    )
    outer = parent.step_id.rpartition("/")[2]
    changes.pending_runs.setdefault(parent.run_id, []).append(outer)


def give_up(changes: Changes, run: Run, error: str) -> None:
    """Fail the run now, and cancel all live steps in it."""
    changes.cancel_runs([run.id], error=error)
    end_run(changes, run, RunStatus.FAILED, error=error)


def _text(value: Any) -> str:
    return value.text if isinstance(value, Packed) else dump(value)


def _retry(step: Step) -> str | None:
    if step.retry is None:
        return None
    return dump({**shallow(step.retry), "on": sorted(step.retry.on)})
