"""What the planner knows about a run, and what it decides: values only. The store reads and writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.model import RunStatus, StepStatus
from swarm.workflow.definition import Step, Workflow

WAITING: Final = StepStatus.WAITING
OVER: Final = "!over "  # before a step's key: the time of its fan-out is over
MORE: Final = "!more "  # before a step's key: its fan-out may start more items
ENDED: Final[frozenset[str]] = frozenset(
    {StepStatus.COMPLETED, StepStatus.FAILED, StepStatus.CANCELLED, StepStatus.SKIPPED}
)

# --- what the planner knows -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What expressions may use besides steps: JSON values that stay the same for the whole run."""

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
    """The progress of a step with children (for_each or repeat). Stored in its row; only the planner changes it."""

    count: int  # children, skipped ones included
    next: int = 0  # the first one not started
    running: int = 0
    completed: int = 0
    failed: int = 0
    skipped: int = 0
    error: str | None = None  # of the first that failed
    winner: int | None = None  # the child that stands for the step in what follows: see `ForEach.has_winner`


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """What the planner needs of a row of ``step_executions``. ``status`` is a StepStatus."""

    status: str = StepStatus.PENDING
    inputs: Any = None
    outputs: Any = None
    error: str | None = None
    fan_out: FanOutState | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """The progress of a run. Stored in its row (a small JSON object); only the planner changes it.

    ``phase`` is 'steps', then 'on_error' or 'on_success' if the workflow has such steps, then 'ended'. ``open`` counts
    the steps of the phase that have not ended.
    """

    phase: str = "steps"
    open: int = 0
    failed_step: str | None = None
    error: str | None = None


# --- what it decides --------------------------------------------------------------------------------------------------
# A key names a step execution: the step's id, with a number for a child: `build`, `build[0]`. If a key has no row, its
# action adds one.


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The step is ready for its agent. ``step`` has its retry policy and timeout.

    ``source``: it starts in a fork of this execution's VM. ``is_source``: other steps may start in a fork of its own.
    """

    key: str
    step: Step
    agent: str  # name@version
    inputs: Any
    source: str | None = None
    is_source: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorkflow:
    """A nested run of ``workflow`` begins for this step; the step ends with it, in the same way."""

    key: str
    step: Step
    workflow: Workflow
    inputs: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The step waits (status `WAITING`) for a person's Verdict; without one in ``timeout_seconds`` it is rejected."""

    key: str
    message: str
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    key: str
    inputs: Any
    skip: str | None = None  # the reason, if it is skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Expand:
    """The step is running, with these children, all pending or skipped. Actions that start the first ones follow."""

    key: str
    children: tuple[Child, ...]
    fan_out: FanOutState


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Store ``fan_out`` in the step's row."""

    key: str
    fan_out: FanOutState


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """A step that needs no agent to end has succeeded: a for_each, a repeat, an approval."""

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
    """End the step now, with its VM, its nested run, and all its children that have not ended."""

    key: str
    why: str


Action = Start | StartWorkflow | Ask | Expand | Update | Complete | Fail | Skip | Cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The run has ended: completed with ``outputs``, or failed with the ``error`` of ``error_step``, the first step to
    fail (None: the run's outputs could not be built)."""

    status: RunStatus
    outputs: Any = None
    error: str | None = None
    error_step: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Carry out the actions in order, store the progress, and end the run if ``end`` is set, in one transaction.
    ``more``: tell the planner of these next, in a decision of its own."""

    actions: tuple[Action, ...]
    progress: RunProgress
    end: End | None = None
    more: tuple[str, ...] = ()
