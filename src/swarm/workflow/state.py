"""What the planner is told of a run, and what it answers: values only. The store keeps one and does the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.model import RunStatus, StepStatus
from swarm.workflow.definition import Step, Workflow

WAITING: Final = StepStatus.WAITING
ENDED: Final[frozenset[str]] = frozenset(
    {StepStatus.COMPLETED, StepStatus.FAILED, StepStatus.CANCELLED, StepStatus.SKIPPED}
)

# --- what is told -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What expressions may speak of besides steps; the same for the whole run, so it is kept with it. JSON values."""

    inputs: Any = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    trigger: Mapping[str, Any] = field(default_factory=dict)
    ticket: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A person's answer to an approval."""

    approved: bool
    by: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FanOutState:
    """How far a step with children is (for_each, or repeat). Kept in its row; the planner alone changes it."""

    count: int  # children that there are, skipped ones included
    next: int = 0  # the first that has not been started
    running: int = 0
    completed: int = 0
    failed: int = 0
    skipped: int = 0
    error: str | None = None  # of the first that failed


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """One row of ``step_executions``, as far as the planner looks. ``status`` is a StepStatus."""

    status: str = StepStatus.PENDING
    inputs: Any = None
    outputs: Any = None
    error: str | None = None
    fan_out: FanOutState | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """Where a run is. Kept in its row (a small JSON object); the planner alone changes it.

    ``phase`` is 'steps', then 'on_error' or 'on_success' where the workflow has such steps, then 'ended'. ``open``
    counts the steps of the phase that have not ended.
    """

    phase: str = "steps"
    open: int = 0
    failed_step: str | None = None
    error: str | None = None


# --- what is answered -------------------------------------------------------------------------------------------------
# A key names a step execution: the step's id, and for a child its number: `build`, `build[0]`. An action on a key that
# has no row makes one.


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The step is ready: an agent may be given it. ``step`` has its retry policy and timeout."""

    key: str
    step: Step
    agent: str  # name@version
    inputs: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorkflow:
    """A run of ``workflow`` begins as this step; when it ends, so does the step, the same way."""

    key: str
    step: Step
    workflow: Workflow
    inputs: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The step waits (status `WAITING`) for a person's Verdict; none within ``timeout_seconds`` is a rejection."""

    key: str
    message: str
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    key: str
    inputs: Any
    skip: str | None = None  # why it is skipped from the start


@dataclass(frozen=True, slots=True, kw_only=True)
class Expand:
    """The step is running, as these children, all pending (or skipped). Starts of the first ones follow."""

    key: str
    children: tuple[Child, ...]
    fan_out: FanOutState


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Keep the new Fan in the step's row; its status is running."""

    key: str
    fan_out: FanOutState


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """The step has ended well without an agent: a fan-out, a repetition, an approval."""

    key: str
    outputs: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    key: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    key: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """End the step now, whatever it does: its VM, its run within, and all of its children that have not ended."""

    key: str
    why: str


Action = Start | StartWorkflow | Ask | Expand | Update | Complete | Fail | Skip | Cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The run has ended: completed with ``outputs``, or failed with ``error``, which ``error_step`` was the first to
    have (None: the outputs of the whole could not be made)."""

    status: RunStatus
    outputs: Any = None
    error: str | None = None
    error_step: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Do the actions in this order, keep the progress, and end the run if it says so; all in one transaction."""

    actions: tuple[Action, ...]
    progress: RunProgress
    end: End | None = None
