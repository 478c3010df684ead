"""`agent.yaml`: its fields, their bounds, and the agent that they describe."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from swarm.base import files
from swarm.base import manifest as yaml_manifest
from swarm.errors import UsageError
from swarm.fields import (
    DEBIAN_PACKAGE,
    MODULE,
    NO_NUL,
    NPM_PACKAGE,
    REQUIREMENT,
    SERVICE,
    Labels,
    Name,
    RetryFields,
    Variable,
    Version,
    bounded,
    complaint,
    no_domain,
    place,
    unknown,
)
from swarm.model import BUILT, Agent, FailureReason, RetryPolicy, names_imported
from swarm.schema import SchemaError, check_schema, expand

MANIFEST: Final = "agent.yaml"
# An agent without an id of its own gets one that is derived from its name and version.
_NAMESPACE: Final = uuid.UUID("6b1f5a0e-6c3b-5d0e-9b1e-2f4f3f1c7a55")

_Word = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=NO_NUL)]
_Text = Annotated[str, StringConstraints(max_length=4096, pattern=NO_NUL)]
_Module = Annotated[str, StringConstraints(pattern=MODULE)]


def _domain(text: str) -> str:
    if why := no_domain(text):
        raise ValueError(why)
    return text


_Domain = Annotated[str, AfterValidator(_domain)]
_Service = Annotated[str, StringConstraints(pattern=SERVICE)]
_Requirement = Annotated[str, StringConstraints(pattern=REQUIREMENT)]
_DebianPackage = Annotated[str, StringConstraints(pattern=DEBIAN_PACKAGE)]
_NpmPackage = Annotated[str, StringConstraints(pattern=NPM_PACKAGE)]


class _Strict(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Retry(RetryFields, _Strict):
    on: frozenset[FailureReason] = RetryPolicy().on


class _Network(_Strict):
    """Several policies together. ``gateway: true`` is the model API; a list names services of the gateway's table."""

    gateway: bool | Annotated[tuple[_Service, ...], Field(min_length=1)] = False
    allow: tuple[_Domain, ...] = ()
    open: bool = False

    def __str__(self) -> str:
        parts = []
        if isinstance(self.gateway, tuple):
            parts.append("gateway:" + ",".join(self.gateway))
        elif self.gateway:
            parts.append("gateway")
        if self.allow:
            parts.append("allow:" + ",".join(self.allow))
        return ";".join([*parts, *(["open"] if self.open else [])]) or "none"


class _Example(_Strict):
    name: str = Field(default="", max_length=200)
    inputs: dict[str, Any] = Field(default_factory=dict)
    outputs: Any = None
    fails: bool = False


class _Build(_Strict):
    """``context`` and ``dockerfile`` are of the agent's own files; the latter is relative to the former."""

    context: _Text = "."
    dockerfile: _Text = "Dockerfile"
    args: dict[Variable, _Text] = Field(default_factory=dict, max_length=100)
    target: _Text = ""


class Manifest(_Strict):
    """The fields of `agent.yaml`: those of `swarm.model.Agent`, with their bounds.

    ``inputs`` and ``outputs`` are schemas in short or full form; ``inputs_schema`` and ``outputs_schema`` are other
    names for the full form.
    """

    id: uuid.UUID | None = None
    name: Name
    version: Version
    description: str = Field(default="", max_length=4096)
    runtime: Literal["python", "exec"] = "python"
    entry: Annotated[tuple[_Word, ...], Field(min_length=1, max_length=256)] | None
    image: _Text | None = None
    build: _Build | None = None
    inputs: dict[str, Any] | None = None
    outputs: dict[str, Any] | None = None
    inputs_schema: dict[str, Any] | None = None
    outputs_schema: dict[str, Any] | None = None
    memory_mb: int = bounded("memory_mb", 256)
    vcpus: int = bounded("vcpus", 1)
    disk_mb: int = bounded("disk_mb", 2048)
    disk_mb_per_second: float | None = bounded("disk_mb_per_second", None)
    network_mb_per_second: float | None = bounded("network_mb_per_second", None)
    timeout_seconds: float = bounded("timeout_seconds", 600.0)
    idle_timeout_seconds: float | None = bounded("idle_timeout_seconds", None)
    network: Literal["none", "gateway", "open"] | _Network = "none"
    secrets: tuple[Variable, ...] = ()
    env: dict[Variable, _Text] = Field(default_factory=dict)
    preload: tuple[_Module, ...] = ()
    requirements: tuple[_Requirement, ...] = Field(default=(), max_length=200)
    packages: tuple[_DebianPackage, ...] = Field(default=(), max_length=200)
    npm: tuple[_NpmPackage, ...] = Field(default=(), max_length=200)
    retry: _Retry = _Retry()
    idempotent: bool = False
    budget_usd: float | None = bounded("budget_usd", None)
    budget_tokens: int | None = bounded("budget_tokens", None)
    over_budget: Literal["fail", "wait"] | None = None
    keep_vm: Literal["never", "failure", "always"] | None = None
    keep_vm_seconds: float | None = bounded("keep_vm_seconds", None)
    requires: Labels = Field(default_factory=dict)
    examples: tuple[_Example, ...] = Field(default=(), max_length=100)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _image_says_what_runs(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if isinstance(given.get("build"), str):
            given = {**given, "build": {"context": given["build"]}}
        if "entry" not in given and ("build" in given or names_imported(str(given.get("image") or ""))):
            return {"entry": None, "runtime": "exec", **given}
        return given

    @pydantic.field_validator("inputs", "outputs", "inputs_schema", "outputs_schema")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any] | None, info: pydantic.ValidationInfo) -> dict[str, Any] | None:
        if schema is None:
            return None
        try:
            full = schema if str(info.field_name).endswith("_schema") else expand(schema)
            check_schema(full)
        except SchemaError as error:
            where = f" (at {'.'.join(map(str, error.path))})" if error.path else ""
            raise ValueError(f"{error}{where}") from None
        return full

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Manifest:
        if self.preload and self.runtime != "python":
            raise ValueError("preload needs runtime: python")
        imported = self.build is not None or names_imported(self.image)
        if self.build and self.image:
            raise ValueError("image and build both say what its root is: give only one")
        if self.entry is None and (self.runtime == "python" or not imported):
            raise ValueError("entry is missing")
        if self.build and self.installs:
            raise ValueError("requirements, packages and npm can't be used with `build`: the Dockerfile installs them")
        for name in ("inputs", "outputs"):
            if getattr(self, name) is not None and getattr(self, f"{name}_schema") is not None:
                raise ValueError(f"{name} and {name}_schema are the same thing: give only one")
        return self

    @property
    def installs(self) -> bool:
        return bool(self.requirements or self.packages or self.npm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A run for `swarm agent test`. ``outputs`` may omit what needn't be compared (see `check.differences`)."""

    name: str
    inputs: Mapping[str, Any]
    outputs: Any = None
    fails: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """Of what the agent's image is built: paths below its directory; ``args`` are NAME=VALUE."""

    context: Path
    dockerfile: Path
    args: tuple[str, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An agent, and what its row in the database doesn't hold. ``base``: the imported image that it adds to."""

    agent: Agent
    examples: tuple[Example, ...] = ()
    build: Build | None = None
    base: str = ""


def read(directory: Path) -> Agent:
    """The agent in a directory. Raises UsageError that names the file and every bad field."""
    return read_package(directory).agent


def read_package(directory: Path) -> Package:
    """Raises UsageError that names the file and every bad field, with its line."""
    file = directory / MANIFEST
    try:
        text = files.read_own(file)
    except FileNotFoundError:
        raise UsageError(f"{directory} is not an agent: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} can't be read: {error}") from error
    document = yaml_manifest.load(text, name=f"{file} can't be read")
    if not isinstance(document.value, dict):
        raise UsageError(f"{file} must be a mapping of fields, such as `name: my-agent`")
    try:
        given = Manifest.model_validate(document.value)
    except pydantic.ValidationError as error:
        raise yaml_manifest.Invalid(str(file), _problems(document, error)) from None
    _check_entry(given, directory)
    _check_preload(given, directory)
    return Package(
        agent=_agent(given, directory),
        examples=tuple(
            Example(name=e.name or f"example {i}", inputs=e.inputs, outputs=e.outputs, fails=e.fails)
            for i, e in enumerate(given.examples, 1)
        ),
        build=_build(given.build, directory) if given.build else None,
        base=given.image or "" if names_imported(given.image) and given.installs else "",
    )


def _build(given: _Build, directory: Path) -> Build:
    context, dockerfile = Path(given.context), Path(given.context, given.dockerfile)
    for field, path in (("context", context), ("dockerfile", dockerfile)):
        where = f"{directory / MANIFEST}: build.{field}: {str(path)[:200]!r}"
        try:
            full = (directory / path).resolve()
            there = full.is_dir() if field == "context" else full.is_file()
        except (OSError, RuntimeError):  # a name that is too long, links that go round
            there = False
        if not there:
            raise UsageError(f"{where} is not a {'directory' if field == 'context' else 'file'} of this agent")
        if not full.is_relative_to(directory.resolve()):
            raise UsageError(f"{where} is not in the agent's directory")
    args = tuple(f"{name}={value}" for name, value in sorted(given.args.items()))
    return Build(context=context, dockerfile=dockerfile, args=args, target=given.target)


def _image(manifest: Manifest, directory: Path) -> str | None:
    """An image that is built is named by all that it is built of: the agent's files, or an image and lists."""
    from swarm.agents.bundle import bundle_digest  # which imports this module

    if manifest.build:
        return f"{BUILT}{manifest.name}:{bundle_digest(directory)[:12]}"
    if names_imported(manifest.image) and manifest.installs:
        added = [manifest.image, *map(sorted, (manifest.requirements, manifest.packages, manifest.npm))]
        return f"{BUILT}{manifest.name}:{hashlib.sha256(json.dumps(added).encode()).hexdigest()[:12]}"
    return manifest.image


def _check_preload(manifest: Manifest, directory: Path) -> None:
    """An agent's own modules reach a template in its layer, so only an agent with a layer can preload them. An
    imported image has none of them."""
    own = next((name for name in manifest.preload if (directory / f"{name}.py").is_file()), None)
    if own and (manifest.build or names_imported(manifest.image) or not manifest.installs):
        raise UsageError(
            f"{directory / MANIFEST}: preload: {own!r} is a file of this agent; only an agent with requirements,"
            " packages or npm, and without an imported image, can preload its own files"
        )


def _problems(document: yaml_manifest.Document, error: pydantic.ValidationError) -> list[yaml_manifest.Problem]:
    """One problem for each bad place. An error inside a value replaces those about the whole value."""
    found: dict[yaml_manifest.KeyPath, list[Any]] = {}
    for one in error.errors():
        path = place(document.value, one["loc"])
        found.setdefault((*path, one["loc"][-1]) if one["type"] == "missing" else path, []).append(one)
    problems, outer = list[yaml_manifest.Problem](), yaml_manifest.around(found)
    for path, errors in found.items():
        if path in outer:
            continue
        if len(problems) >= yaml_manifest.MAX_PROBLEMS:
            break
        is_unknown = errors[0]["type"] == "extra_forbidden"
        if is_unknown:
            message = unknown(str(path[-1]), _fields(path), page="docs/agents.md")
        else:
            message = "is missing" if errors[0]["type"] == "missing" else complaint(errors)
        named = ".".join(map(str, path)) or "agent"
        problems.append(document.problem(path, f"{named}: {message}", at_key=is_unknown))
    return problems


def _fields(path: yaml_manifest.KeyPath) -> list[str]:
    inner: dict[str, type[BaseModel]] = {"network": _Network, "retry": RetryFields, "examples": _Example}
    return list(inner.get(str(path[0]) if len(path) > 1 else "", Manifest).model_fields)


def _check_entry(manifest: Manifest, directory: Path) -> None:
    if manifest.entry is None:
        return
    first = Path(manifest.entry[0])
    inside = not first.is_absolute() and ".." not in first.parts
    if manifest.runtime == "python" and not (inside and first.suffix == ".py" and (directory / first).is_file()):
        raise UsageError(f"{directory / MANIFEST}: entry: {manifest.entry[0]!r} is not a .py file of this agent")
    if manifest.runtime == "exec" and not first.is_absolute() and not (inside and (directory / first).is_file()):
        raise UsageError(
            f"{directory / MANIFEST}: entry: {manifest.entry[0]!r} is not a file of this agent; give the absolute"
            " path of a program in the guest, or of a file below /agent"
        )


def _agent(manifest: Manifest, path: Path) -> Agent:
    def schema(value: dict[str, Any] | None) -> str | None:
        return None if value is None else json.dumps(value, sort_keys=True)

    return Agent(
        id=str(manifest.id or uuid.uuid5(_NAMESPACE, f"{manifest.name}@{manifest.version}")),
        name=manifest.name,
        version=manifest.version,
        path=path,
        entry=manifest.entry or (),
        runtime=manifest.runtime,
        description=manifest.description,
        image=_image(manifest, path),
        inputs_schema=schema(manifest.inputs or manifest.inputs_schema),
        outputs_schema=schema(manifest.outputs or manifest.outputs_schema),
        memory_mb=manifest.memory_mb,
        vcpus=manifest.vcpus,
        disk_mb=manifest.disk_mb,
        disk_mb_per_second=manifest.disk_mb_per_second,
        network_mb_per_second=manifest.network_mb_per_second,
        timeout_seconds=manifest.timeout_seconds,
        idle_timeout_seconds=manifest.idle_timeout_seconds,
        network=str(manifest.network),
        secrets=manifest.secrets,
        env=dict(manifest.env),
        preload=manifest.preload,
        requirements=manifest.requirements,
        packages=manifest.packages,
        npm=manifest.npm,
        retry=RetryPolicy(**manifest.retry.model_dump()),
        idempotent=manifest.idempotent,
        budget_usd=manifest.budget_usd,
        budget_tokens=manifest.budget_tokens,
        over_budget=manifest.over_budget,
        keep_vm=manifest.keep_vm,
        keep_vm_seconds=manifest.keep_vm_seconds,
        requires=manifest.requires,
    )
