"""The base of the planner: the steps' states, the actions decided so far, and expressions over both."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from swarm import schema
from swarm.cel import template
from swarm.cel.evaluate import Evaluator
from swarm.cel.expression import ExpressionError
from swarm.model import FILES, StepStatus
from swarm.workflow.definition import Join, Step
from swarm.workflow.state import (
    WAITING,
    Action,
    Cancel,
    Complete,
    End,
    Fail,
    RunContext,
    RunProgress,
    Skip,
    StepState,
)
from swarm.workflow.structure import Graph

PENDING: Final = StepState()
LIVE: Final[frozenset[str]] = frozenset({StepStatus.PENDING, StepStatus.READY, StepStatus.RUNNING, WAITING})


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of a step's needs, or of its children."""

    total: int
    succeeded: int
    failed: int
    live: int

    def verdict(self, join: Join) -> str:
        """Whether the join is 'met', must 'wait', or is 'lost': it can no longer be met."""
        wanted = self.total if join == "all" else join if isinstance(join, int) else 1
        if self.succeeded >= wanted:
            return "met"
        return "wait" if self.succeeded + self.live >= wanted else "lost"


class PlannerBase:
    """One decision in progress. `FanOut` adds steps with children, `plan` the rules for all steps."""

    def __init__(
        self,
        graph: Graph,
        context: RunContext,
        progress: RunProgress,
        steps: Mapping[str, StepState],
        evaluator: Evaluator,
    ) -> None:
        self._graph = graph
        self._context = context
        self._progress = progress
        self._steps = steps
        self._evaluator = evaluator
        self._changed: dict[str, StepState] = {}  # by this decision
        self._actions: list[Action] = []
        self._ended: deque[str] = deque()  # steps that have ended and are not processed yet
        self._end: End | None = None
        self._items_started = 0
        self._more: dict[str, None] = {}  # see `Decision.more`; in order, each once

    # --- states ---

    def _state(self, key: str) -> StepState:
        found = self._changed.get(key)
        return found if found is not None else self._steps.get(key, PENDING)

    def _source(self, step_id: str) -> str | None:
        """The execution whose VM stands for this step; None unless it has completed."""
        state, step = self._state(step_id), self._graph.steps[step_id]
        if state.status != StepStatus.COMPLETED or (step.for_each is None and step.repeat is None):
            return step_id if state.status == StepStatus.COMPLETED else None
        number = None
        if state.fan_out is not None:
            number = state.fan_out.winner if step.for_each is not None else state.fan_out.count - 1
        return f"{step_id}[{number}]" if number is not None else None

    def _act(self, action: Action, **changes: Any) -> None:
        self._actions.append(action)
        self._changed[action.key] = replace(self._state(action.key), **changes)

    def _finish(self, action: Complete | Fail | Skip | Cancel) -> None:
        """End a step that isn't a child."""
        match action:
            case Complete():
                self._act(action, status=StepStatus.COMPLETED, outputs=action.outputs)
            case Fail():
                self._act(action, status=StepStatus.FAILED, error=action.error)
            case Skip():
                self._act(action, status=StepStatus.SKIPPED, error=action.why)
            case Cancel():
                self._act(action, status=StepStatus.CANCELLED, error=action.why)
        self._ended.append(action.key)

    # --- expressions ---

    def _names(self, *, own: tuple[str, StepState] | None = None, **more: Any) -> dict[str, Any]:
        context = self._context
        error = {"step": self._progress.failed_step, "message": self._progress.error}
        return {
            "inputs": context.inputs,
            "variables": context.variables,
            "trigger": context.trigger,
            "ticket": context.ticket,
            "steps": _Steps(self, own),
            **({"error": error} if self._progress.phase == "on_error" else {}),
            **more,
        }

    def _when(self, step: Step, names: Mapping[str, Any]) -> bool:
        return step.when if isinstance(step.when, bool) else self._boolean("when", step.when, names)

    def _boolean(self, field: str, source: str, names: Mapping[str, Any]) -> bool:
        value = self._fill(field, source, names)
        if not isinstance(value, bool):
            raise ExpressionError(f"{field} must be true or false, but is {kind(value)}")
        return value

    def _number(self, field: str, source: str, names: Mapping[str, Any]) -> float:
        """Raises ExpressionError. True counts as 1."""
        value = self._fill(field, source, names)
        try:
            if isinstance(value, int | float) and math.isfinite(value):
                return value
        except OverflowError:  # an int beyond every float
            pass
        raise ExpressionError(f"{field} must be a number, but is {kind(value)}")

    def _inputs(self, step: Step, names: Mapping[str, Any], budget: template.Budget | None = None) -> Any:
        filled = self._fill("inputs", dict(step.inputs), names, budget)
        given = self._context.inputs
        if FILES in step.inputs or not isinstance(given, Mapping) or FILES not in given:
            return filled
        return {**filled, FILES: given[FILES]}  # a step that names none has the files of its run

    def _fill(self, field: str, value: Any, names: Mapping[str, Any], budget: template.Budget | None = None) -> Any:
        """A field of a step or workflow, with its expressions evaluated. Errors name the field."""
        return template.fill({field: value}, names, self._evaluator, budget)[field]


class _Steps(Mapping[str, Any]):
    """`steps` in expressions: each is read only when an expression uses it."""

    def __init__(self, planner: PlannerBase, own: tuple[str, StepState] | None) -> None:
        self._planner = planner
        self._own = own

    def __getitem__(self, step_id: str) -> Any:
        if step_id not in self._planner._graph.steps:
            raise KeyError(step_id)
        own = self._own
        state = own[1] if own is not None and own[0] == step_id else self._planner._state(step_id)
        return {"outputs": state.outputs, "status": str(state.status), "error": state.error}

    def __iter__(self) -> Iterator[str]:
        return iter(self._planner._graph.steps)

    def __len__(self) -> int:
        return len(self._planner._graph.steps)


def was(status: str) -> str:
    return {"failed": "failed", "skipped": "was skipped", "cancelled": "was cancelled"}.get(status, status)


def kind(value: Any) -> str:
    return f"{schema.type_name(value)} {template.shorten(template.as_text(value))}"
