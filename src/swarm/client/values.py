"""What the server answers, as values. A field that this version doesn't know is ignored; one that the server doesn't
send has its default. Times are ISO-8601 in UTC."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, TypedDict, TypeVar

ENDED: Final = frozenset({"done", "failed", "cancelled"})


class _Value(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


V = TypeVar("V", bound=_Value)


def read(kind: type[V], data: Mapping[str, Any], **more: Any) -> V:
    known = {one.name for one in dataclasses.fields(kind)} - more.keys()
    return kind(**{name: each for name, each in data.items() if name in known and each is not None}, **more)


def read_all(kind: type[V], many: Iterable[Mapping[str, Any]], **more: Any) -> list[V]:
    return [read(kind, one, **more) for one in many]


class Submission(TypedDict, total=False):
    """What a new ticket may say besides its agent. ``prompt``: the input of that name; ``title``: by default the
    prompt's first line, or the name of the agent or workflow. ``requires``: labels that its host must have. ``after``:
    tickets that must be done first. ``files``: by their places below /work, such as {"repo/": "./repo"}: files, or
    directories as they are, but without .git. ``key``: the same key submits one ticket, however often it is used
    (without files); by default each call has its own."""

    workflow: str
    prompt: str
    title: str
    description: str
    inputs: Mapping[str, Any]
    files: Mapping[str, str | os.PathLike[str]]
    id: str
    project: str
    priority: int
    timeout_seconds: float
    max_attempts: int
    budget_usd: float
    budget_tokens: int
    over_budget: str
    keep_vm: str
    keep_vm_seconds: float
    requires: Mapping[str, str | bool | int]
    draft: bool
    after: Sequence[str]
    key: str


class Filters(TypedDict, total=False):
    """Which tickets; of several ones of a kind, any. ``text``: in the title or the error, or how the id begins.
    ``since``, ``before``: when they were made, ISO-8601."""

    state: str | Sequence[str]
    agent: str | Sequence[str]
    workflow: str | Sequence[str]
    project: str
    text: str
    since: str
    before: str


@dataclass(frozen=True, kw_only=True)
class TicketFields:
    id: str
    state: str = ""
    title: str = ""
    description: str | None = None
    project_id: str | None = None
    agent_id: str | None = None
    workflow_id: str | None = None
    inputs: Any = None
    outputs: Any = None
    error: str | None = None
    priority: int = 0
    timeout_seconds: float | None = None
    max_attempts: int | None = None
    budget_usd: float | None = None
    budget_tokens: int | None = None
    over_budget: str | None = None
    keep_vm: str | None = None
    keep_vm_seconds: float | None = None
    requires: Any = None
    run_id: str | None = None
    created_at: str | None = None
    updated_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class NewSandbox(TypedDict, total=False):
    """What a new sandbox may say. ``agent``: whose files, packages, limits and network it has. ``snapshot``: what it
    starts from. ``requires``: labels that its host must have. ``idle_timeout_seconds``: then it is paused;
    ``ttl_seconds``: then it ends."""

    name: str
    agent: str
    image: str
    snapshot: str
    memory_mb: int
    vcpus: int
    disk_mb: int
    network: str
    secrets: Sequence[str]
    env: Mapping[str, str]
    labels: Mapping[str, str]
    ttl_seconds: float
    idle_timeout_seconds: float
    budget_usd: float
    budget_tokens: int
    requires: Mapping[str, str | bool | int]
    project: str


class Command(TypedDict, total=False):
    """How a command runs. ``cwd``: by default /work; ``user``: 'agent' (the default) or 'root'; ``timeout_seconds``:
    then it is killed, with all that it started; ``background``: it runs on, as this ``process``; ``max_output_bytes``:
    of stdout and of stderr, what is more is dropped; ``check``: raise CommandFailed unless it ends with 0."""

    stdin: str | bytes
    env: Mapping[str, str]
    cwd: str
    user: str
    timeout_seconds: float
    background: bool
    process: str
    max_output_bytes: int
    check: bool


@dataclass(frozen=True, kw_only=True)
class SandboxFields:
    id: str
    state: str = ""
    name: str | None = None
    project_id: str | None = None
    agent_id: str | None = None
    snapshot_id: str | None = None
    parent_id: str | None = None
    memory_mb: int | None = None
    vcpus: int | None = None
    disk_mb: int | None = None
    network: str | None = None
    labels: Any = None
    ttl_seconds: float | None = None
    idle_timeout_seconds: float | None = None
    budget_usd: float | None = None
    budget_tokens: int | None = None
    requires: Any = None
    error: str | None = None
    host: str | None = None
    created_by: str | None = None
    created_at: str | None = None
    started_at: str | None = None
    used_at: str | None = None
    ended_at: str | None = None

    @property
    def ended(self) -> bool:
        return self.state in ("ended", "lost")


@dataclass(frozen=True, kw_only=True)
class Executed:
    """How a command ended: ``code`` is its exit status, or it was ended by ``signal``. One in the background has
    neither. ``output`` and ``errors`` are what it wrote, as bytes; `stdout` and `stderr` as text."""

    process: str
    code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    oom: bool = False
    ms: float = 0.0
    cpu_ms: int = 0
    dropped_bytes: int = 0
    output: bytes = field(default=b"", repr=False)
    errors: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def stdout(self) -> str:
        return self.output.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.errors.decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Output:
    """A piece of what a command wrote: ``stream`` is stdout or stderr."""

    stream: str
    data: bytes = b""

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of a sandbox. ``ended``: how, as `Executed` has it; None while it runs."""

    process: str
    argv: tuple[str, ...] = ()
    user: str = ""
    pid: int = 0
    background: bool = False
    output_bytes: int = 0
    running_seconds: float = 0.0
    ended: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class GuestFile:
    """A file of a sandbox. ``kind``: file, directory, link (to ``target``), pipe, socket or device."""

    name: str
    kind: str = "file"
    size: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """``kind``: 'named' by somebody, or 'pause', 'fork', 'attempt', 'step'. ``expires_at``: ms of Unix time."""

    id: str
    kind: str = ""
    name: str | None = None
    host: str = ""
    sandbox_id: str | None = None
    ticket_id: str | None = None
    size_bytes: int = 0
    secrets: bool = True
    created_at: str | None = None
    expires_at: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    id: str
    path: str = ""
    workflow_id: str | None = None
    status: str = ""
    error: str | None = None
    error_step: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    total_api_tokens: int = 0
    total_cost_usd: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Step:
    id: str
    step_id: str = ""
    run_id: str = ""
    status: str = ""
    agent_name: str | None = None
    inputs: Any = None
    outputs: Any = None
    error: str | None = None
    question: str | None = None  # of one that waits for approval
    started_at: str | None = None
    completed_at: str | None = None
    duration_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """``timings``: how long each phase took, in ms."""

    id: str
    step_id: str = ""
    number: int = 1
    outcome: str | None = None  # None: it runs
    reason: str | None = None
    error: str | None = None
    exit_code: int | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    api_tokens_used: int = 0
    cost_usd: float = 0.0
    started_at: str | None = None
    ended_at: str | None = None


@dataclass(frozen=True, kw_only=True)
class Details:
    runs: tuple[Run, ...] = ()
    steps: tuple[Step, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    depends_on: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Details:
        return cls(
            runs=tuple(read_all(Run, data.get("runs", ()))),
            steps=tuple(read_all(Step, data.get("steps", ()))),
            attempts=tuple(read_all(Attempt, data.get("attempts", ()))),
            depends_on=tuple(data.get("depends_on", ())),
        )


@dataclass(frozen=True, kw_only=True)
class Event:
    """One entry of a ticket's history. ``kind``: transition, output, model_call, egress or another."""

    seq: int
    kind: str = ""
    at: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    step_id: str | None = None
    attempt_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of what an agent printed. ``stream``: stdout, stderr, or swarm (a note about it). `str` is the text."""

    text: str
    step: str = ""
    stream: str = "stdout"
    at: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class File:
    """What an agent left in /work/out. ``kind``: file, link, directory, or 'left out', which was not kept."""

    name: str
    kind: str = "file"
    bytes: int = 0
    mode: str = ""


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """``change``: added, removed or changed. ``diff``: of texts, as `diff -u` has it. ``bytes``, ``mode``: before and
    after."""

    name: str
    change: str = ""
    bytes: Sequence[int | None] = (None, None)
    mode: Sequence[str | None] = (None, None)
    diff: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two attempts side by side. ``a``, ``b``: what is told of each; ``outputs``, ``commands``: their diff, '' if they
    are the same."""

    a: Mapping[str, Any] = field(default_factory=dict)
    b: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[FileChange, ...] = ()
    outputs: str = ""
    commands: str = ""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Comparison:
        return read(cls, data, files=tuple(read_all(FileChange, data.get("files", ()))))


@dataclass(frozen=True, kw_only=True)
class ApprovalFields:
    """A step that waits for a person."""

    ticket_id: str
    title: str = ""
    step_id: str = ""
    question: str | None = None


@dataclass(frozen=True, kw_only=True)
class Agent:
    id: str
    name: str = ""
    version: str = ""
    description: str = ""
    runtime: str = ""
    network: str = ""
    memory_mb: int = 0
    vcpus: int = 0
    timeout_seconds: float = 0.0
    inputs_schema: Any = None
    outputs_schema: Any = None


@dataclass(frozen=True, kw_only=True)
class Workflow:
    id: str
    name: str = ""
    version: str = ""
    description: str | None = None
    enabled: bool = True
    definition: Any = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Of a file. ``line`` and ``column`` from 1; 0: of all of it."""

    message: str
    line: int = 0
    column: int = 0


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Model calls of one agent, workflow, model, ticket or day. ``cost_usd`` leaves out calls of unknown price."""

    name: str
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cost_usd: float = 0.0
    unpriced_calls: int = 0
    open_calls: int = 0
    estimated_calls: int = 0
    estimated_usd: float = 0.0
