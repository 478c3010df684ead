"""Where a decision is made: the states as told, what has been decided so far, and expressions over both."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from swarm import schema
from swarm.cel import template
from swarm.cel.evaluate import Evaluator
from swarm.cel.expression import ExpressionError
from swarm.model import StepStatus
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
    """The needs of a step, or the children of one, counted."""

    total: int
    succeeded: int
    failed: int
    live: int

    def verdict(self, join: Join) -> str:
        """'met', 'wait' or 'lost': it can't be met any more."""
        wanted = self.total if join == "all" else join if isinstance(join, int) else 1
        if self.succeeded >= wanted:
            return "met"
        return "wait" if self.succeeded + self.live >= wanted else "lost"


class PlannerBase:
    """One decision in the making. `children` and `plan` build upon it."""

    def __init__(
        self,
        graph: Graph,
        known: RunContext,
        progress: RunProgress,
        steps: Mapping[str, StepState],
        evaluator: Evaluator,
    ) -> None:
        self._graph = graph
        self._known = known
        self._progress = progress
        self._told = steps
        self._evaluator = evaluator
        self._now: dict[str, StepState] = {}
        self._actions: list[Action] = []
        self._ended: deque[str] = deque()  # steps whose end has not been followed up
        self._end: End | None = None

    # --- states ---

    def _state(self, key: str) -> StepState:
        found = self._now.get(key)
        return found if found is not None else self._told.get(key, PENDING)

    def _set(self, key: str, **changes: Any) -> None:
        self._now[key] = replace(self._state(key), **changes)

    def _act(self, action: Action, **changes: Any) -> None:
        self._actions.append(action)
        self._set(action.key, **changes)

    def _finish(self, action: Complete | Fail | Skip | Cancel) -> None:
        """A top-level step ends by our decision."""
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
        known = self._known
        error = {"step": self._progress.failed_step, "message": self._progress.error}
        return {
            "inputs": known.inputs,
            "variables": known.variables,
            "trigger": known.trigger,
            "ticket": known.ticket,
            "steps": _Steps(self, own),
            **({"error": error} if self._progress.phase == "on_error" else {}),
            **more,
        }

    def _when(self, step: Step, names: Mapping[str, Any]) -> bool:
        if isinstance(step.when, bool):
            return step.when
        value = template.fill({"when": step.when}, names, self._evaluator)["when"]
        if not isinstance(value, bool):
            raise ExpressionError(f"when wants true or false, and came to {kind(value)}")
        return value

    def _inputs(self, step: Step, names: Mapping[str, Any], budget: template.Budget | None = None) -> Any:
        return template.fill({"inputs": dict(step.inputs)}, names, self._evaluator, budget)["inputs"]


class _Steps(Mapping[str, Any]):
    """`steps` in expressions: looked up only when named."""

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
    return f"{schema.type_name(value)} {template.shorten(template.written(value))}"
