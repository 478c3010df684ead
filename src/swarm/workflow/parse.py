"""`workflow.yaml` as people write it: its fields, their bounds, and how they become a `definition.Workflow`.

`read` checks the shape; `validate.validate` checks the meaning.
"""

from __future__ import annotations

import contextlib
import copy
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, TypeVar

import pydantic
from pydantic import ConfigDict, Field, StringConstraints

from swarm.base import manifest
from swarm.base.manifest import Document, Problem
from swarm.fields import (
    HEADER,
    REFERENCE,
    STEP,
    Labels,
    Name,
    RetryFields,
    Variable,
    Version,
    bounded,
    complaint,
    unknown,
)
from swarm.model import FailureReason, RetryPolicy
from swarm.schema import SchemaError, check_schema, expand
from swarm.workflow import schedule
from swarm.workflow.definition import Approval, ForEach, Repeat, Schedule, Step, Webhook, Workflow

FILE: Final = "workflow.yaml"
MAX_STEPS: Final = 1000
MAX_STEPS_IN_ALL: Final = 10_000  # with those of nested workflows
MAX_DEPTH: Final = 8  # of nested workflows
MAX_SCHEDULES: Final = 20

_M = TypeVar("_M", bound=pydantic.BaseModel)
_Id = Annotated[str, StringConstraints(pattern=STEP)]
_Ref = Annotated[str, StringConstraints(pattern=REFERENCE)]
_Header = Annotated[str, StringConstraints(pattern=HEADER)]
_Text = Annotated[str, StringConstraints(max_length=4096)]
_Expression = Annotated[str, StringConstraints(max_length=5000)]
_Join = Literal["all", "any", "first_success"] | Annotated[int, Field(ge=1, le=MAX_STEPS)]
_Seconds = Annotated[float, bounded("timeout_seconds")]
_Parallel = Annotated[int, Field(ge=1, le=10_000)]

# A file with problems is repaired and read again, this often, so that the problems behind the first ones show up too.
_REPAIR_ROUNDS: Final = 4
_PLACEHOLDERS: Final[Mapping[str, Any]] = {"version": "0.0.0", "steps": [{"id": "x", "approval": True}], "items": []}


class _Strict(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Retry(RetryFields, _Strict):
    on: list[str] = sorted(RetryPolicy().on)


class _ForEach(_Strict):
    items: list[Any] | _Expression
    max_parallel: _Parallel | None = None
    join: _Join = "all"
    best: _Expression | None = None
    timeout_seconds: _Seconds | None = None


class _Repeat(_Strict):
    until: _Expression
    max_times: int = Field(default=3, ge=1, le=100)


class _Approval(_Strict):
    message: _Text = ""
    timeout_seconds: _Seconds | None = None


class _Step(_Strict):
    id: _Id
    description: _Text = ""
    agent: _Ref | None = None
    workflow: _Ref | dict[str, Any] | None = None
    inputs: dict[str, Any] = {}
    needs: list[_Id] | _Id = []
    join: _Join = "all"
    when: bool | _Expression = True
    for_each: _ForEach | list[Any] | _Expression | None = None
    max_parallel: _Parallel | None = None
    best: _Expression | None = None
    repeat: _Repeat | None = None
    approval: _Approval | str | bool | None = None
    retry: _Retry | Annotated[int, bounded("max_attempts")] | None = None
    timeout_seconds: _Seconds | None = None
    continue_on_error: bool = False
    from_: _Id | None = Field(default=None, alias="from")
    keep_vm: Literal["never", "failure", "always"] | None = None
    requires: Labels | None = None


class _Schedule(_Strict):
    cron: str
    time_zone: str = "UTC"
    missed: Literal["skip", "once", "all"] = "once"
    overlap: Literal["allow", "skip", "queue"] = "allow"
    inputs: dict[str, Any] = {}


class _Webhook(_Strict):
    secret: Variable
    header: _Header = "X-Swarm-Signature"
    timestamp: bool = True
    idempotency: _Header = "Idempotency-Key"
    inputs: dict[str, Any] = {}


class _Body(_Strict):
    """The fields of a nested workflow, which needs no name."""

    description: _Text = ""
    inputs: dict[str, Any] | None = None
    variables: dict[_Id, Any] = {}
    steps: list[_Step] = Field(min_length=1, max_length=MAX_STEPS)
    outputs: dict[str, Any] | None = None
    outputs_schema: dict[str, Any] | None = None
    on_error: list[_Step] = Field(default=[], max_length=MAX_STEPS)
    on_success: list[_Step] = Field(default=[], max_length=MAX_STEPS)
    fail_fast: bool = False


class _File(_Body):
    id: uuid.UUID | None = Field(default=None, strict=False)
    name: Name
    version: Version
    budget_usd: float | None = bounded("budget_usd", None)
    budget_tokens: int | None = bounded("budget_tokens", None)
    schedule: _Schedule | Annotated[list[_Schedule | str], Field(max_length=MAX_SCHEDULES)] | str | None = None
    webhook: _Webhook | None = None


def read(text: str | bytes, *, name: str = FILE) -> tuple[Workflow | None, Document, list[Problem]]:
    """The workflow in a file, the places of its values, and every problem of shape.

    With problems, the workflow has what could be read of the rest, so that more problems can be found in it, unless
    there are enough. Raises
    manifest.Invalid for a text that isn't YAML.
    """
    document = manifest.load(text, name=name)
    builder, workflow = _Builder(document), None
    with contextlib.suppress(manifest.Enough):
        workflow = builder.file(document.value)
    return workflow, document, builder.problems


class _Builder:
    def __init__(self, document: Document) -> None:
        self._document = document
        self.problems = manifest.Problems()
        self._bad_at: set[manifest.KeyPath] = set()  # with all that is around it

    def file(self, value: Any) -> Workflow | None:
        raw = self._model(_File, value, ())
        if raw is None:
            return None
        if isinstance(raw.schedule, list):
            schedules = [self._schedule(one, ("schedule", i)) for i, one in enumerate(raw.schedule)]
        else:
            schedules = [self._schedule(raw.schedule, ("schedule",))] if raw.schedule is not None else []
        return self._workflow(
            raw,
            (),
            0,
            id=str(raw.id) if raw.id else None,
            name=raw.name,
            version=raw.version,
            budget_usd=raw.budget_usd,
            budget_tokens=raw.budget_tokens,
            schedule=tuple(schedules),
            webhook=raw.webhook and Webhook(**raw.webhook.model_dump()),
        )

    def _workflow(self, raw: _Body, path: manifest.KeyPath, depth: int, **named: Any) -> Workflow:
        if depth > MAX_DEPTH:
            self._bad(path, f"workflows are nested more than {MAX_DEPTH} deep")
        return Workflow(
            description=raw.description,
            inputs_schema=self._schema(raw.inputs, (*path, "inputs")),
            outputs_schema=self._schema(raw.outputs_schema, (*path, "outputs_schema")),
            variables=raw.variables,
            steps=self._steps(raw.steps, (*path, "steps"), depth),
            outputs=raw.outputs,
            on_error=self._steps(raw.on_error, (*path, "on_error"), depth),
            on_success=self._steps(raw.on_success, (*path, "on_success"), depth),
            fail_fast=raw.fail_fast,
            **named,
        )

    def _steps(self, raw: Sequence[_Step], path: manifest.KeyPath, depth: int) -> tuple[Step, ...]:
        here = {one.id for one in raw}
        return tuple(self._step(one, (*path, i), depth, here) for i, one in enumerate(raw))

    def _step(self, raw: _Step, path: manifest.KeyPath, depth: int, here: Set[str]) -> Step:
        workflow: Workflow | str | None = None
        if isinstance(raw.workflow, dict):
            body = self._model(_Body, raw.workflow, (*path, "workflow"))
            if body is not None:
                workflow = self._workflow(body, (*path, "workflow"), depth + 1, name=raw.id, version="0.0.0")
        else:
            workflow = raw.workflow
        if raw.agent and raw.workflow:
            self._bad((*path, "workflow"), "a step has an agent or a workflow, not both", at_key=True)
        if not raw.agent and not raw.workflow and not raw.approval and not self._has_problem(path):
            self._bad(path, f"the step {raw.id!r} does nothing: give it an agent, a workflow or an approval")
        if raw.repeat and raw.for_each is not None:
            self._bad(
                (*path, "repeat"), "repeat and for_each can't be combined: put one in a nested workflow", at_key=True
            )
        if (raw.repeat or raw.for_each is not None) and not raw.agent and not raw.workflow:
            self._bad(path, "an approval alone can't be repeated")
        self._check_effect(raw, path)
        for name in ("max_parallel", "best"):
            if getattr(raw, name) is not None and (raw.for_each is None or isinstance(raw.for_each, _ForEach)):
                message = f"{name} needs a for_each; if that has fields, put it among them"
                self._bad((*path, name), message, at_key=True)
        if isinstance(raw.for_each, _ForEach) and raw.for_each.best is not None and raw.for_each.join != "all":
            message = "best waits until all have ended, and takes one of them: leave out join"
            self._bad((*path, "for_each", "join"), message, at_key=True)
        if isinstance(raw.for_each, _ForEach) and raw.for_each.timeout_seconds and raw.for_each.best is None:
            message = "timeout_seconds for all items together needs best; for each item, put it beside for_each"
            self._bad((*path, "for_each", "timeout_seconds"), message, at_key=True)
        needs = [raw.needs] if isinstance(raw.needs, str) else [*raw.needs]
        if raw.from_ is not None and raw.from_ in here - {raw.id} - {*needs} and raw.join == "all":
            needs.append(raw.from_)
        return Step(
            id=raw.id,
            description=raw.description,
            agent=raw.agent,
            workflow=workflow,
            inputs=raw.inputs,
            needs=tuple(needs),
            join=raw.join,
            when=raw.when,
            for_each=_for_each(raw),
            repeat=Repeat(**raw.repeat.model_dump()) if raw.repeat else None,
            approval=_approval(raw.approval),
            retry=self._retry(raw.retry, (*path, "retry")),
            timeout_seconds=raw.timeout_seconds,
            continue_on_error=raw.continue_on_error,
            from_step=raw.from_,
            keep_vm=raw.keep_vm,
            requires=raw.requires or {},
        )

    def _check_effect(self, raw: _Step, path: manifest.KeyPath) -> None:
        """Refuse fields that would have no effect: their author expects one."""
        if raw.agent:
            return
        if raw.retry is not None:
            message = "retry needs an agent; the steps of a nested workflow have their own"
            self._bad((*path, "retry"), message, at_key=True)
        for name, value in (("from", raw.from_), ("keep_vm", raw.keep_vm), ("requires", raw.requires)):
            if value is not None:
                message = f"{name} needs an agent: without one, the step has no VM of its own"
                self._bad((*path, name), message, at_key=True)
        if raw.approval and not raw.workflow:
            if raw.inputs:
                self._bad((*path, "inputs"), "an approval alone has no use for inputs", at_key=True)
            if raw.timeout_seconds is not None:
                message = "put the timeout_seconds of an approval alone into `approval:`"
                self._bad((*path, "timeout_seconds"), message, at_key=True)

    def _retry(self, raw: _Retry | int | None, path: manifest.KeyPath) -> RetryPolicy | None:
        if raw is None or isinstance(raw, int):
            return None if raw is None else RetryPolicy(max_attempts=raw)
        reasons = set()
        for i, reason in enumerate(raw.on):
            try:
                reasons.add(FailureReason(reason))
            except ValueError:
                self._bad((*path, "on", i), f"unknown reason {reason!r}; use some of {', '.join(FailureReason)}")
        return RetryPolicy(**{**raw.model_dump(exclude={"on"}), "on": frozenset(reasons)})

    def _schedule(self, raw: _Schedule | str, path: manifest.KeyPath) -> Schedule:
        one = Schedule(cron=raw) if isinstance(raw, str) else Schedule(**raw.model_dump())
        checks: tuple[tuple[str, Callable[[str], object], str], ...] = (
            ("cron", schedule.parse, one.cron),
            ("time_zone", schedule.zone, one.time_zone),
        )
        for field, check, value in checks:
            try:
                check(value)
            except ValueError as error:
                self._bad(path if isinstance(raw, str) else (*path, field), str(error))
        if one.missed == "all" and one.overlap != "allow":
            self._bad((*path, "overlap"), "missed: all may start several at once, so it needs overlap: allow")
        return one

    def _schema(self, given: Mapping[str, Any] | None, path: manifest.KeyPath) -> dict[str, Any] | None:
        if given is None:
            return None
        try:
            full = expand(given)
            check_schema(full)
        except SchemaError as error:
            self._bad((*path, *error.path), str(error))
            return None
        return full

    def _model(self, model: type[_M], value: Any, path: manifest.KeyPath) -> _M | None:
        if not isinstance(value, dict):
            self._bad(path, "must be a mapping of fields, such as `name: my-workflow`")
            return None
        for round_ in range(_REPAIR_ROUNDS):
            try:
                return model.model_validate(value)
            except pydantic.ValidationError as error:
                for where, message, at_key in _problems(path, value, error, model):
                    # A field that is missing in a later round was removed by the repair.
                    if round_ == 0 or not message.endswith("is missing"):
                        self._bad(where, message, at_key=at_key)
                value = _repaired(value, error)
        return None

    def _has_problem(self, path: manifest.KeyPath) -> bool:
        """Is there a problem at this place, or inside it?"""
        return path in self._bad_at

    def _bad(self, path: manifest.KeyPath, message: str, *, at_key: bool = False) -> None:
        self._bad_at |= {path, *manifest.around((path,))}
        self.problems.append(self._document.problem(path, message, at_key=at_key))


def _for_each(raw: _Step) -> ForEach | None:
    if raw.for_each is None:
        return None
    if isinstance(raw.for_each, _ForEach):
        return ForEach(**raw.for_each.model_dump())
    return ForEach(items=raw.for_each, max_parallel=raw.max_parallel, best=raw.best)


def _approval(raw: _Approval | str | bool | None) -> Approval | None:
    if isinstance(raw, _Approval):
        return Approval(**raw.model_dump())
    if isinstance(raw, str):
        return Approval(message=raw)
    return Approval() if raw else None


def _repaired(value: dict[str, Any], error: pydantic.ValidationError) -> dict[str, Any]:
    """A copy without the wrong values, and with placeholders for the missing ones."""
    copied: dict[str, Any] = copy.deepcopy(value)
    for one in error.errors():
        path, rest = _place(value, one["loc"])
        target: Any = copied
        try:
            for part in path[:-1]:
                target = target[part]
            if one["type"] == "missing" and rest:
                inner = target[path[-1]] if path else target
                inner.setdefault(rest[-1], _PLACEHOLDERS.get(str(rest[-1]), "x"))
            elif path and isinstance(target, list):
                target[int(path[-1])] = {}
            elif path:
                target.pop(path[-1], None)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # was removed with the value around it
    return copied


# What other systems call a field of ours.
_ELSEWHERE: Final = {
    "if": "when", "on": "schedule", "triggers": "schedule", "cron": "schedule", "depends_on": "needs", "uses": "agent",
    "with": "inputs", "timeout": "timeout_seconds", "jobs": "steps", "tasks": "steps", "params": "inputs",
}  # fmt: skip

# --- pydantic's errors, as sentences with a place --------------------------------------------------------------------


def _problems(
    path: manifest.KeyPath, value: Any, error: pydantic.ValidationError, model: type[pydantic.BaseModel]
) -> Iterator[tuple[manifest.KeyPath, str, bool]]:
    """One problem for each place: the place, the message, and whether it is about the key. Of a union's branches, only
    those that got furthest count."""
    at: dict[manifest.KeyPath, list[tuple[Any, list[str | int]]]] = {}
    for one in error.errors(include_url=False):
        inner, rest = _place(value, one["loc"])
        at.setdefault(inner, []).append((one, rest))
    outer = manifest.around(at)
    for inner, found in at.items():
        if inner in outer and all(one["type"].endswith("_type") for one, _ in found):
            continue
        missing = [f"the field {rest[-1]!r} is missing" for one, rest in found if one["type"] == "missing" and rest]
        is_unknown = any(one["type"] == "extra_forbidden" for one, _ in found)
        if missing:
            message = "; ".join(dict.fromkeys(missing))
        elif is_unknown:
            message = _unknown(str(inner[-1]), model)
        else:
            # The same place in several branches of a union: prefer errors about the value to those about its type.
            errors = [one for one, _ in found]
            about = complaint([one for one in errors if not one["type"].endswith("_type")] or errors)
            name = next((str(part) for part in reversed((*path, *inner)) if isinstance(part, str)), "")
            each = "each of " if inner and isinstance(inner[-1], int) else ""
            message = f"{each}{name} {about}" if about.startswith("must be ") and name else about
        yield (*path, *inner), message, is_unknown


def _unknown(name: str, model: type[pydantic.BaseModel]) -> str:
    meant = _ELSEWHERE.get(name)
    if meant:
        return f"unknown field {name!r}; here it is {meant!r}"
    return unknown(name, _fields(model), page="docs/workflows.md").replace("field", f"field {name!r}", 1)


def _place(value: Any, loc: Sequence[str | int]) -> tuple[manifest.KeyPath, list[str | int]]:
    """Pydantic's path, as the keys that are in the value, and the rest: names of union branches, missing fields."""
    path: list[str | int] = []
    rest: list[str | int] = []
    for part in loc:
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside and not any(r == part for r in rest):
            value = value[part]
            path.append(part)
        else:
            rest.append(part)
    return tuple(path), rest


@lru_cache(maxsize=16)
def _fields(model: type[pydantic.BaseModel]) -> frozenset[str]:
    inner = (_Step, _Retry, _ForEach, _Repeat, _Approval, _Schedule, _Webhook) if issubclass(model, _Body) else ()
    return frozenset(field.alias or name for each in (model, *inner) for name, field in each.model_fields.items())
