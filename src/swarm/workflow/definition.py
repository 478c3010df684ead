"""A workflow as a value, and its canonical JSON, which is frozen into every run.

Values with `${…}` in them stay as their authors wrote them (`Any` below: JSON values); `swarm.cel.template` fills them
when their step starts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.model import FailureReason, RetryPolicy

FORMAT: Final = 1  # of the frozen JSON

Join = str | int  # 'all', 'any', 'first_success', or how many must succeed


@dataclass(frozen=True, slots=True, kw_only=True)
class ForEach:
    """Fan-out: one step execution for each item. ``items`` is a list, or an expression for one.

    ``best``: an expression for a number. When all have ended, or ``timeout_seconds`` are over, the step's outputs are
    those of the one, among those that succeeded, with the highest; of equals, the first.
    """

    items: Any
    max_parallel: int | None = None
    join: Join = "all"
    best: str | None = None
    timeout_seconds: float | None = None

    @property
    def has_winner(self) -> bool:
        """Does one of the executions stand for the step in what follows?"""
        return self.best is not None or self.join in ("any", "first_success", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """Run the step until ``until`` is true; if it still isn't after ``max_times`` times, the step fails."""

    until: str
    max_times: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A person decides whether the step starts. Without an answer for ``timeout_seconds`` it is rejected."""

    message: str = ""
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One node. Exactly one of ``agent`` (a reference) and ``workflow`` (a reference, or a definition) is set; neither
    is in a step that is only an approval.

    ``from_step``: it starts in a fork of the VM that this step left when it completed. ``keep_vm``: a `KeepVm`.
    """

    id: str
    agent: str | None = None
    workflow: Workflow | str | None = None
    description: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    join: Join = "all"
    when: Any = True  # a boolean, or an expression for one
    for_each: ForEach | None = None
    repeat: Repeat | None = None
    approval: Approval | None = None
    retry: RetryPolicy | None = None  # None: the agent's own
    timeout_seconds: float | None = None
    continue_on_error: bool = False
    from_step: str | None = None
    keep_vm: str | None = None  # None: as its ticket, or its agent, says
    requires: Mapping[str, str | bool | int] = field(default_factory=dict)  # of its host, beside its agent's


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """``missed``: what to do about times that passed while no engine ran: 'skip', 'once' or 'all'. ``overlap``: what to
    do when the ticket of the previous time has not ended: 'allow', 'skip' or 'queue'."""

    cron: str
    time_zone: str = "UTC"
    missed: str = "once"
    overlap: str = "allow"
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """POST with an HMAC-SHA256 under the secret named ``secret``, as hex after `sha256=` in ``header``.

    It signs the seconds since 1970 (as in the header X-Swarm-Timestamp), a dot and the body; without ``timestamp`` only
    the body. ``idempotency`` names the header that tells a sender's retry from a new event.
    """

    secret: str
    header: str = "X-Swarm-Signature"
    timestamp: bool = True
    idempotency: str = "Idempotency-Key"
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflow:
    """``inputs_schema`` is a JSON Schema. ``outputs`` None: the outputs of the last steps, by id."""

    name: str
    version: str
    steps: tuple[Step, ...]
    id: str | None = None
    description: str = ""
    inputs_schema: Mapping[str, Any] | None = None
    outputs_schema: Mapping[str, Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, Any] | None = None
    on_error: tuple[Step, ...] = ()
    on_success: tuple[Step, ...] = ()
    fail_fast: bool = False
    budget_usd: float | None = None  # for all model calls of one run together
    budget_tokens: int | None = None
    schedule: tuple[Schedule, ...] = ()
    webhook: Webhook | None = None

    def all_steps(self) -> Iterator[Step]:
        yield from self.steps
        yield from self.on_error
        yield from self.on_success

    def agents(self) -> Iterator[str]:
        """The references to agents, also those in nested definitions."""
        for step in self.all_steps():
            if step.agent is not None:
                yield step.agent
            elif isinstance(step.workflow, Workflow):
                yield from step.workflow.agents()

    def workflows(self) -> Iterator[str]:
        """The references to registered workflows, also those in nested definitions."""
        for step in self.all_steps():
            if isinstance(step.workflow, str):
                yield step.workflow
            elif step.workflow is not None:
                yield from step.workflow.workflows()


# --- JSON ---------------------------------------------------------------------------------------------------------

_NESTED: Final = {"for_each": ForEach, "repeat": Repeat, "approval": Approval, "webhook": Webhook}


def to_json(workflow: Workflow) -> dict[str, Any]:
    """The frozen form. Fields at their defaults are left out, so a file keeps its digest when Swarm gets new fields."""
    return {"format": FORMAT, **_plain(workflow)}


def from_json(data: Mapping[str, Any]) -> Workflow:
    """The inverse of `to_json`. Raises ValueError for JSON of another format."""
    if data.get("format") != FORMAT:
        raise ValueError(f"a workflow frozen in format {data.get('format')!r}; this version of Swarm reads {FORMAT}")
    return _workflow(data)


def canonical(workflow: Workflow) -> str:
    """JSON text, always the same for the same workflow."""
    return json.dumps(to_json(workflow), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(workflow: Workflow) -> str:
    return hashlib.sha256(canonical(workflow).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        if isinstance(value, tuple | list):
            return [_plain(v) for v in value]
        return sorted(value) if isinstance(value, frozenset) else value
    plain = {}
    for f in dataclasses.fields(value):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        inner = getattr(value, f.name)
        if not (inner == default and type(inner) is type(default)):
            plain[f.name] = _plain(inner)
    return plain


def _workflow(data: Mapping[str, Any]) -> Workflow:
    known: dict[str, Any] = {k: v for k, v in data.items() if k != "format"}
    for name in ("steps", "on_error", "on_success"):
        known[name] = tuple(map(_step, known.get(name, ())))
    known["schedule"] = tuple(Schedule(**one) for one in known.get("schedule", ()))
    if known.get("webhook"):
        known["webhook"] = Webhook(**known["webhook"])
    return Workflow(**known)


def _step(data: Mapping[str, Any]) -> Step:
    known: dict[str, Any] = dict(data)
    for name, kind in _NESTED.items():
        if known.get(name) is not None:
            known[name] = kind(**known[name])
    if isinstance(known.get("workflow"), Mapping):
        known["workflow"] = _workflow(known["workflow"])
    if known.get("retry") is not None:
        retry = dict(known["retry"])
        if "on" in retry:
            retry["on"] = frozenset(map(FailureReason, retry["on"]))
        known["retry"] = RetryPolicy(**retry)
    known["needs"] = tuple(known.get("needs", ()))
    return Step(**known)
