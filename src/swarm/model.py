"""Swarm's nouns as values: tickets, agents, attempts, sandboxes, their states and outcomes. No I/O, no imports from
Swarm. So many lines because every noun is here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

# The built-in agent `echo` has the same id on every host.
ECHO_AGENT_ID: Final = "0d72b1b5-a98e-4356-bf52-f654d0509dc4"

# In a step's inputs and in what an agent left: the trees of files that belong to it, by place (docs/agents.md).
FILES: Final = "$files"


class TicketState(StrEnum):
    """Where a ticket is, from draft to its end; `TICKET_TRANSITIONS` lists the moves. docs/states.md draws them."""

    DRAFT = "draft"
    READY = "ready"
    BLOCKED = "blocked"
    IN_PROGRESS = "in_progress"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StepStatus(StrEnum):
    """Where one execution of a step is; `STEP_TRANSITIONS` lists the moves."""

    PENDING = "pending"  # the steps that it needs have not ended
    WAITING = "waiting"  # for a person's approval
    READY = "ready"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


class RunStatus(StrEnum):
    """Where a run is: one execution of a ticket, with its steps."""

    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptOutcome(StrEnum):
    """How an attempt, one try of a step in one VM, ended. NULL in the database while it runs."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # the engine stopped; doesn't count as a try
    LOST = "lost"  # its lease expired, so another worker may take the step


class FailureReason(StrEnum):
    """Why an attempt failed. Retry policies refer to these."""

    INPUT_INVALID = "input_invalid"
    BOOT_FAILED = "boot_failed"
    CHANNEL_BROKEN = "channel_broken"
    AGENT_FAILED = "agent_failed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    NO_OUTPUT = "no_output"
    OUTPUT_INVALID = "output_invalid"
    OUTPUT_TOO_LARGE = "output_too_large"
    VM_DIED = "vm_died"
    GUEST_PANIC = "guest_panic"
    LAYER_MISSING = "layer_missing"
    HOST_ERROR = "host_error"
    NOT_CONFIGURED = "not_configured"  # a key or secret that the agent needs is not on this host
    OVER_BUDGET = "over_budget"  # never retried: the next attempt would have the same budget


class BudgetPolicy(StrEnum):
    """What happens to a step whose model calls use up a budget."""

    FAIL = "fail"
    WAIT = "wait"  # until a person approves, usually with a higher budget


class ExecutionMode(StrEnum):
    """What runs a ticket: one agent, or the steps of a workflow."""

    AGENT = "agent"
    WORKFLOW = "workflow"


class Role(StrEnum):
    """What the holder of a token may do; each may also do what those before it may."""

    VIEWER = "viewer"  # read
    OPERATOR = "operator"  # add, cancel, retry, answer and delete tickets
    ADMIN = "admin"  # agents, workflows, schedules, secrets, tokens


class SandboxState(StrEnum):
    """Where a sandbox, a VM that somebody holds, is."""

    STARTING = "starting"  # no engine holds it yet, or its VM is not up
    RUNNING = "running"
    PAUSED = "paused"  # its VM is a snapshot on its host's disk, and no engine holds it
    ENDED = "ended"
    LOST = "lost"  # its VM, or its engine, died


class KeepVm(StrEnum):
    """When the VM of an attempt is kept, as a snapshot, after its agent has ended."""

    NEVER = "never"
    FAILURE = "failure"
    ALWAYS = "always"


TICKET_TRANSITIONS: Final[Mapping[TicketState, frozenset[TicketState]]] = {
    TicketState.DRAFT: frozenset({TicketState.READY, TicketState.CANCELLED}),
    TicketState.READY: frozenset(
        {TicketState.IN_PROGRESS, TicketState.BLOCKED, TicketState.FAILED, TicketState.CANCELLED}
    ),
    TicketState.BLOCKED: frozenset({TicketState.READY, TicketState.FAILED, TicketState.CANCELLED}),
    TicketState.IN_PROGRESS: frozenset(
        {TicketState.DONE, TicketState.FAILED, TicketState.CANCELLED, TicketState.WAITING}
    ),
    TicketState.WAITING: frozenset({TicketState.IN_PROGRESS, TicketState.FAILED, TicketState.CANCELLED}),
    # Only by `swarm ticket retry`.
    TicketState.DONE: frozenset({TicketState.READY}),
    TicketState.FAILED: frozenset({TicketState.READY}),
    TicketState.CANCELLED: frozenset({TicketState.READY}),
}

STEP_TRANSITIONS: Final[Mapping[StepStatus, frozenset[StepStatus]]] = {
    StepStatus.PENDING: frozenset(
        {
            StepStatus.READY,
            StepStatus.WAITING,
            StepStatus.RUNNING,
            StepStatus.FAILED,
            StepStatus.SKIPPED,
            StepStatus.CANCELLED,
        }
    ),
    StepStatus.WAITING: frozenset(
        {StepStatus.READY, StepStatus.RUNNING, StepStatus.COMPLETED, StepStatus.FAILED, StepStatus.CANCELLED}
    ),
    StepStatus.READY: frozenset({StepStatus.RUNNING, StepStatus.FAILED, StepStatus.CANCELLED}),
    StepStatus.RUNNING: frozenset(
        {StepStatus.COMPLETED, StepStatus.FAILED, StepStatus.CANCELLED, StepStatus.READY, StepStatus.WAITING}
    ),
    StepStatus.COMPLETED: frozenset(),
    StepStatus.FAILED: frozenset(),
    StepStatus.CANCELLED: frozenset(),
    StepStatus.SKIPPED: frozenset(),
}

SANDBOX_TRANSITIONS: Final[Mapping[SandboxState, frozenset[SandboxState]]] = {
    SandboxState.STARTING: frozenset({SandboxState.RUNNING, SandboxState.ENDED, SandboxState.LOST}),
    SandboxState.RUNNING: frozenset({SandboxState.PAUSED, SandboxState.ENDED, SandboxState.LOST}),
    SandboxState.PAUSED: frozenset({SandboxState.RUNNING, SandboxState.ENDED, SandboxState.LOST}),
    SandboxState.ENDED: frozenset(),
    SandboxState.LOST: frozenset(),
}

TERMINAL_TICKET_STATES: Final = frozenset({TicketState.DONE, TicketState.FAILED, TicketState.CANCELLED})
TERMINAL_STEP_STATUSES: Final = frozenset(s for s, after in STEP_TRANSITIONS.items() if not after)
TERMINAL_SANDBOX_STATES: Final = frozenset(s for s, after in SANDBOX_TRANSITIONS.items() if not after)


# Smallest and largest value of each number that an agent, workflow or ticket may set, the same in manifests, workflow
# files and rows. Whole numbers where both bounds are. Products of them, as in a retry policy, must not overflow.
MAX_TIMEOUT_SECONDS: Final = 30 * 86_400.0
BOUNDS: Final[Mapping[str, tuple[float, float]]] = {
    "memory_mb": (128, 1 << 20),
    "vcpus": (1, 64),
    "disk_mb": (16, 1 << 20),
    "disk_mb_per_second": (0.001, 1e6),
    "network_mb_per_second": (0.001, 1e6),
    "timeout_seconds": (0.001, MAX_TIMEOUT_SECONDS),
    "idle_timeout_seconds": (0.001, MAX_TIMEOUT_SECONDS),
    "budget_usd": (0.0, 1e9),
    "budget_tokens": (0, 10**15),
    "max_attempts": (1, 1000),
    "delay_seconds": (0.0, 86_400.0),
    "factor": (1.0, 100.0),
    "max_delay_seconds": (0.0, 86_400.0),
    "priority": (-(2**31) + 1, 2**31 - 1),
    "ttl_seconds": (1.0, 365 * 86_400.0),
    "keep_vm_seconds": (1.0, 365 * 86_400.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a failed attempt is retried, and after how long.

    The delay before attempt ``n + 1`` is a random value between half of, and all of,
    ``min(max_delay_seconds, delay_seconds * factor ** (n - 1))``.
    """

    max_attempts: int = 1
    delay_seconds: float = 1.0
    factor: float = 2.0
    max_delay_seconds: float = 300.0
    # Failures that are retried. VM_DIED (outcome unknown) is retried only if the agent is idempotent.
    on: frozenset[FailureReason] = frozenset(
        {
            FailureReason.BOOT_FAILED,
            FailureReason.CHANNEL_BROKEN,
            FailureReason.AGENT_FAILED,
            FailureReason.OUT_OF_MEMORY,
            FailureReason.TIMEOUT,
            FailureReason.HOST_ERROR,
        }
    )


BUILT: Final = "agents/"  # what the names of images begin with that agents' own Dockerfiles made


def names_imported(image: str | None) -> bool:
    """Swarm's own images are named by their digests."""
    return bool(image) and not re.fullmatch("[0-9a-f]{1,64}", image or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A packaged program. ``path`` is the directory with its files, ``entry`` the argv that starts it.

    With ``runtime`` 'python', ``entry[0]`` is a .py file, run in a fork of the guest's warm interpreter. With 'exec',
    ``entry`` is executed; a relative ``entry[0]`` is a file in the agent's directory. Without an ``entry``, the program
    of its imported ``image`` runs.
    """

    id: str
    name: str
    version: str
    path: Path
    entry: tuple[str, ...]
    runtime: str = "python"
    description: str = ""
    image: str | None = None
    inputs_schema: str | None = None  # JSON Schema, as text
    outputs_schema: str | None = None
    memory_mb: int = 256
    vcpus: int = 1
    disk_mb: int = 2048
    disk_mb_per_second: float | None = None  # 10^6 bytes; None: no limit
    network_mb_per_second: float | None = None  # each way
    timeout_seconds: float = 600.0
    idle_timeout_seconds: float | None = None
    network: str = "none"
    secrets: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()  # from PyPI; built into a layer before the agent can run
    packages: tuple[str, ...] = ()  # from Debian, likewise
    npm: tuple[str, ...] = ()  # from npm, likewise
    retry: RetryPolicy = RetryPolicy()
    idempotent: bool = False
    budget_usd: float | None = None  # for one step of a ticket, including retries
    budget_tokens: int | None = None
    over_budget: str | None = None  # a `BudgetPolicy`; None: as the settings say
    keep_vm: str | None = None  # a `KeepVm`; None: never
    keep_vm_seconds: float | None = None  # for how long; None: a day
    requires: Mapping[str, str | bool | int] = field(default_factory=dict)  # labels that its host must have

    @property
    def installs(self) -> bool:
        return bool(self.requirements or self.packages or self.npm)

    @property
    def needs_layer(self) -> bool:
        """Upon Swarm's own root. What is installed upon an imported image is in that one's own."""
        return self.installs and not self.imported

    @property
    def imported(self) -> bool:
        """Does its ``image`` name an imported one, which it sees as its root, rather than one of Swarm's own?"""
        return names_imported(self.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A row of ``tickets``: one piece of work. ``inputs`` and ``outputs`` are JSON text; times are ISO-8601 UTC text.

    ``trigger_type`` says what created it: 'ticket' (an INSERT, `swarm ticket add`; also None), 'manual', 'schedule' or
    'webhook'. ``trigger_data``, JSON text of an object, holds the details. Runs copy both.
    """

    id: str
    title: str
    state: str
    project_id: str | None = None
    description: str | None = None
    agent_id: str | None = None
    assignee_id: str | None = None
    assignee_type: str | None = None
    execution_mode: str | None = None
    workflow_id: str | None = None
    inputs: str | None = None
    outputs: str | None = None
    error: str | None = None
    priority: int = 0
    timeout_seconds: float | None = None
    max_attempts: int | None = None
    budget_usd: float | None = None
    budget_tokens: int | None = None
    over_budget: str | None = None  # a `BudgetPolicy`; None: as the agent says
    keep_vm: str | None = None  # a `KeepVm`; None: as the agent says
    keep_vm_seconds: float | None = None
    requires: str | None = None  # JSON text of an object: labels that its host must have, beside its agent's
    trigger_type: str | None = None
    trigger_data: str | None = None
    run_id: str | None = None
    created_at: str | None = None
    updated_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One attempt, assigned to a worker: all it needs to run the step, read in the claiming transaction."""

    attempt_id: str
    attempt_number: int  # 1 for the first try of this step
    step_execution_id: str
    step_id: str
    run_id: str
    ticket: Ticket
    agent: Agent
    inputs: str  # JSON text of the step's inputs, an object
    timeout_seconds: float
    queued_ms: float  # from the row's commit (or when it was first seen) to this claim, by the database's clock
    in_workflow: bool = False  # if so, `inputs` may refer to artifacts: `Store.resolve_references`
    alone: bool = False  # engines died with this step: its worker takes nothing else while it runs
    keep_vm: KeepVm = KeepVm.NEVER
    keep_vm_seconds: float = 86_400.0
    source: str | None = None  # the snapshot in a fork of which it starts; '': that is gone
    is_source: bool = False  # other steps may start in a fork of its VM, so that is to be kept when it completes


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded:
    """``snapshot_id``: of its VM, if other steps may start from that."""

    outputs: str  # JSON text
    exit_code: int = 0
    snapshot_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """``retryable``: whether the cause says that another attempt could succeed. The retry policy decides by ``reason``,
    except that a retryable HOST_ERROR gets a few attempts under any policy (`store.claims.finish`).

    ``outputs``: JSON text that the agent left although it failed (over budget); it was paid for."""

    reason: FailureReason
    message: str
    retryable: bool = False
    exit_code: int | None = None
    outputs: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    message: str = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """Stopped by the engine: the step becomes ready again, and the attempt doesn't count as a try."""

    message: str = "the engine stopped"


Outcome = Succeeded | Failed | Cancelled | Interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A row of ``sandboxes``: a VM that somebody holds. ``secrets``, ``env`` and ``labels`` are JSON text; times for
    people are ISO-8601 UTC text.

    ``agent_id`` gives it an agent's layer, files, network policy, secrets and limits; columns that are set here win.
    ``snapshot_id`` is what it starts from: another sandbox's (a fork) or an attempt's snapshot. ``wanted`` is what
    somebody asks for: 'running', 'paused' or 'ended'; None: nothing that is not done. ``hold_id`` is the fence, as an
    attempt's id is. ``host`` is where its VM, or its snapshot while it is paused, is.
    """

    id: str
    state: str
    name: str | None = None
    project_id: str | None = None
    agent_id: str | None = None
    image: str | None = None
    snapshot_id: str | None = None
    parent_id: str | None = None  # the sandbox that it was forked from
    memory_mb: int | None = None
    vcpus: int | None = None
    disk_mb: int | None = None
    network: str | None = None
    secrets: str | None = None
    secret: bool | None = None  # may its memory hold any? None: not known yet
    env: str | None = None
    labels: str | None = None
    ttl_seconds: float | None = None
    idle_timeout_seconds: float | None = None
    budget_usd: float | None = None
    budget_tokens: int | None = None
    requires: str | None = None  # JSON text of an object: labels that its host must have, beside its agent's
    wanted: str | None = None
    error: str | None = None
    created_by: str | None = None
    created_at: str | None = None
    started_at: str | None = None
    used_at: str | None = None
    ended_at: str | None = None
    host: str | None = None
    worker: str | None = None
    hold_id: str | None = None
    vm_id: int | None = None
    ends_at: int | None = None  # ms: when its time to live is over


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A row of ``snapshots``: RAM, devices and disk of a VM at one moment, on one host's disk.

    ``kind``: 'pause' (of the sandbox that it is), 'fork' (of which forks start, and which then goes), 'named' (kept by
    somebody), 'attempt' (of a ticket whose VM was kept), 'step' (for steps with ``from:``). ``spec`` is JSON text: what
    a VM must be like to run it. ``digest`` is over all its files. ``secrets``: may its memory hold secrets?
    """

    id: str
    kind: str
    host: str
    name: str | None = None
    project_id: str | None = None
    sandbox_id: str | None = None
    ticket_id: str | None = None
    step_id: str | None = None
    attempt_id: str | None = None
    spec: str = "{}"
    digest: str = ""
    size_bytes: int = 0  # on disk
    secrets: bool = True
    created_by: str | None = None
    created_at: str | None = None
    expires_at: int | None = None  # ms; None: never


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxClaim:
    """A sandbox, held by a worker: all it needs to start it, read in the claiming transaction.

    ``snapshot``: what it starts from. With ``resumes`` it is its own, of its pause; else it is to be a fork of it.
    ``memory_mb``, ``disk_mb``: what its VM takes. Columns of the sandbox win over its agent's.
    """

    sandbox: Sandbox
    hold_id: str
    agent: Agent | None
    snapshot: Snapshot | None
    resumes: bool
    memory_mb: int
    disk_mb: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One entry of the history of a ticket, or of a sandbox (``ticket_id`` is then ''). ``kind`` is transition, output,
    model_call, egress or another."""

    ticket_id: str
    kind: str
    data: Mapping[str, object]
    step_id: str | None = None
    attempt_id: str | None = None
    sandbox_id: str | None = None
    seq: int = 0  # set by the database
    at: str = ""  # set by the database
