"""Does a workflow make sense? Everything that is wrong with it at once, each with its place.

Ids, needs, cycles, unreachable steps; every expression: syntax, names, steps that have certainly ended by then; agents
and workflows that exist; and types, where schemas make a mismatch certain.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from swarm import schema
from swarm.base.manifest import Document, Invalid, KeyPath, Problem
from swarm.cel import template
from swarm.cel.expression import Expression, ExpressionError
from swarm.errors import NotFound
from swarm.workflow import parse
from swarm.workflow.definition import Schedule, Step, Webhook, Workflow
from swarm.workflow.pinning import Endless, Registry, count_steps, pin

_STEP_FIELDS: Final = {"outputs": {}, "status": {"type": "string"}, "error": {"type": ["string", "null"]}}
_TICKET: Final = schema.expand({"id": "string", "title": "string", "description": "string?", "project_id": "string?"})
_TRIGGER: Final = {"type": "object", "properties": {"type": {"type": "string"}}}
# What the inputs of a trigger may speak of; `swarm.triggers.schedules` and `swarm.api.webhooks` fill it in.
_OF_TRIGGERS: Final = {
    "schedule": schema.expand(
        {"type": "string", "time": "string", "cron": "string", "time_zone": "string", "missed": "integer"}
    ),
    "webhook": schema.expand(
        {"type": "string", "time": "string", "body": "any", "headers": {"type": "object"}, "key": "string?"}
    ),
}


def load(text: str | bytes, registry: Registry, *, name: str = parse.FILE) -> Workflow:
    """`checked`, with its references pinned: as a run has it."""
    return pin(checked(text, registry, name=name), registry)


def checked(text: str | bytes, registry: Registry, *, name: str = parse.FILE) -> Workflow:
    """Read and check a file; references stay as they are written. Raises manifest.Invalid with every problem."""
    workflow, document, problems = parse.read_all(text, name=name)
    if workflow is not None:
        problems += validate(workflow, registry, document)
    if problems or workflow is None:
        raise Invalid(name, problems)
    return workflow


def validate(workflow: Workflow, registry: Registry, document: Document) -> list[Problem]:
    checker = _Checker(registry, document)
    checker.workflow(workflow, ())
    if not checker.problems:
        checker.check_all(workflow)
    return sorted(set(checker.problems))


@dataclass(slots=True)
class _Scope:
    """What the names at one place stand for, as schemas; ``before``: the steps that have certainly ended by then."""

    names: dict[str, Any]
    steps: Mapping[str, Any] = field(default_factory=dict)  # id -> schema of its outputs
    before: frozenset[str] = frozenset()
    why: str = ""


class _Checker:
    def __init__(self, registry: Registry, document: Document) -> None:
        self._registry = registry
        self._document = document
        self.problems: list[Problem] = []

    def workflow(self, flow: Workflow, path: KeyPath, within: tuple[str, ...] = ()) -> None:
        names: dict[str, Any] = {
            "inputs": flow.inputs_schema if flow.inputs_schema is not None else {},
            "trigger": _TRIGGER,
            "ticket": _TICKET,
        }
        start = _Scope(dict(names), why="before any step has run")
        for name, value in flow.variables.items():
            self._value(value, (*path, "variables", name), start)
        variables = {name: self._type(value, start) for name, value in flow.variables.items()}
        names["variables"] = _object(variables)
        for kind in ("schedule", "webhook"):
            self._trigger(flow, kind, path)
        outputs: dict[str, Any] = {}
        ids: dict[str, KeyPath] = {}
        for part in ("steps", "on_error", "on_success"):
            for i, step in enumerate(getattr(flow, part)):
                where = (*path, part, i)
                if step.id in ids:
                    self._bad((*where, "id"), f"the id {step.id!r} is taken by another step")
                ids.setdefault(step.id, where)
                outputs.setdefault(step.id, self._outputs(step, where, within))
        main = self._order(flow.steps, (*path, "steps"))
        everything = frozenset(main)
        self._part(flow.steps, (*path, "steps"), names, outputs, main, frozenset())
        for part, extra in (("on_error", {"error": _ERROR}), ("on_success", {})):
            steps = getattr(flow, part)
            before = self._order(steps, (*path, part))
            self._part(steps, (*path, part), {**names, **extra}, outputs, before, everything)
        last = _Scope({**names, "steps": {}}, outputs, frozenset(ids))
        for name, value in (flow.outputs or {}).items():
            self._value(value, (*path, "outputs", name), last)

    def check_all(self, flow: Workflow) -> None:
        try:
            count_steps(flow, self._registry)
        except Endless as error:
            self._bad(("steps",), str(error))

    # --- the graph ---

    def _order(self, steps: Sequence[Step], path: KeyPath) -> dict[str, frozenset[str]]:
        """What comes before each step, directly or not. Complains of cycles, self-needs and unknown steps."""
        known = {step.id: i for i, step in enumerate(steps)}
        needs: dict[str, set[str]] = {}
        for i, step in enumerate(steps):
            needs[step.id] = set()
            for k, need in enumerate(step.needs):
                where = (*path, i, "needs", k)
                if need == step.id:
                    self._bad(where, f"the step {step.id!r} needs itself")
                elif need not in known:
                    self._bad(where, f"there is no step {need!r} here{_near(need, known)}")
                elif need in needs[step.id]:
                    self._bad(where, f"{need!r} is needed twice")
                else:
                    needs[step.id].add(need)
            if step.join != "all" and not step.needs:
                self._bad((*path, i, "join"), "join says how many of the needs must succeed; this step needs none")
            elif isinstance(step.join, int) and step.join > len(step.needs):
                self._bad((*path, i, "join"), f"join wants {step.join} of {len(step.needs)} needs: it can't be reached")
            if step.when is False:
                self._bad((*path, i, "when"), f"the step {step.id!r} can't be reached: its `when` is false")
        before: dict[str, frozenset[str]] = {}
        sorter = graphlib.TopologicalSorter(needs)
        try:
            order = list(sorter.static_order())
        except graphlib.CycleError as error:
            cycle = list(reversed(error.args[1]))
            self._bad((*path, known[cycle[0]], "needs"), f"a cycle: {' needs '.join(reversed(cycle))}")
            return {step.id: frozenset(known) - {step.id} for step in steps}  # no more complaints of what follows
        for one in order:
            before[one] = frozenset(needs[one]).union(*(before[need] for need in needs[one]))
        return before

    def _part(
        self,
        steps: Sequence[Step],
        path: KeyPath,
        names: Mapping[str, Any],
        outputs: Mapping[str, Any],
        before: Mapping[str, frozenset[str]],
        earlier: frozenset[str],
    ) -> None:
        for i, step in enumerate(steps):
            scope = _Scope({**names, "steps": {}}, outputs, before[step.id] | earlier, f"the step {step.id!r}")
            self._one(step, (*path, i), scope)

    def _one(self, step: Step, path: KeyPath, scope: _Scope) -> None:
        inner = replace(scope, names=dict(scope.names))
        if step.for_each is not None:
            where = (*path, "for_each", "items")
            if where not in self._document.positions:
                where = (*path, "for_each")
            items = self._wants(step.for_each.items, where, scope, {"type": "array"}, "for_each wants a list")
            inner.names["item"] = items.get("items", {}) if isinstance(items, Mapping) else {}
            inner.names["index"] = {"type": "integer"}
        if step.repeat is not None:
            inner.names["previous"] = {}
            inner.names["index"] = {"type": "integer"}
            ended = replace(inner, before=inner.before | {step.id}, why=inner.why)
            self._wants(
                step.repeat.until, (*path, "repeat", "until"), ended, {"type": "boolean"}, "until wants true or false"
            )
        self._wants(step.when, (*path, "when"), inner, {"type": "boolean"}, "when wants true or false")
        if step.approval is not None:
            message = (*path, "approval", "message")
            self._value(
                step.approval.message, message if message in self._document.positions else (*path, "approval"), inner
            )
        self._value(step.inputs, (*path, "inputs"), inner)
        wanted = self._inputs_schema(step)
        if wanted is not None:
            self._fits(step.agent or step.id, step.inputs, wanted, (*path, "inputs"), inner)

    # --- what it runs ---

    def _outputs(self, step: Step, path: KeyPath, within: tuple[str, ...]) -> Any:
        """Schema of a step's outputs, or {}. Complains of agents and workflows that don't exist."""
        made: Any = {}
        if step.agent is not None:
            try:
                text = self._registry.agent(step.agent).outputs_schema
                made = schema.parsed(text) if text else {}
            except NotFound as error:
                self._bad((*path, "agent"), str(error))
        elif isinstance(step.workflow, str):
            try:
                named = self._registry.workflow(step.workflow)
                made = self._outputs_of(named)
                count_steps(named, self._registry, (step.workflow,))
            except (NotFound, Endless) as error:
                self._bad((*path, "workflow"), str(error))
        elif step.workflow is not None:
            if len(within) < parse.MAX_DEPTH:
                self.workflow(step.workflow, (*path, "workflow"), (*within, step.id))
            made = self._outputs_of(step.workflow)
        else:
            made = schema.expand({"approved": "boolean", "by": "string", "why": "string?"})
        return {"type": "array", "items": made} if step.for_each is not None else made

    @staticmethod
    def _outputs_of(flow: Workflow) -> Any:
        if flow.outputs_schema is not None:
            return flow.outputs_schema
        return _object({name: {} for name in flow.outputs}) if flow.outputs is not None else {}

    def _inputs_schema(self, step: Step) -> Any:
        try:
            if step.agent is not None:
                text = self._registry.agent(step.agent).inputs_schema
                return schema.parsed(text) if text else None
            if isinstance(step.workflow, str):
                return self._registry.workflow(step.workflow).inputs_schema
            return step.workflow.inputs_schema if step.workflow is not None else None
        except NotFound:
            return None  # said already

    def _fits(self, name: str, given: Mapping[str, Any], wanted: Any, path: KeyPath, scope: _Scope) -> None:
        properties = wanted.get("properties") or {}
        for key, value in given.items():
            inner = schema.at(wanted, (key,))
            if inner is False:
                there = f"; it takes {', '.join(properties)}" if properties else ""
                self._bad((*path, key), f"{name} takes no input {key!r}{there}", at_key=True)
            elif why := schema.mismatch(self._type(value, scope), inner):
                self._bad((*path, key), f"the input {key!r} of {name} does not fit: {why}")
        for key in wanted.get("required") or ():
            if key not in given and "default" not in (properties.get(key) or {}):
                self._bad(path, f"{name} wants an input {key!r}")

    def _trigger(self, flow: Workflow, kind: str, path: KeyPath) -> None:
        given: tuple[Schedule | Webhook, ...] = flow.schedule
        if kind == "webhook":
            given = (flow.webhook,) if flow.webhook else ()
        for i, one in enumerate(given):
            where = (
                (*path, kind, i, "inputs") if (*path, kind, i) in self._document.positions else (*path, kind, "inputs")
            )
            scope = _Scope({"trigger": _OF_TRIGGERS[kind]}, why=f"the inputs of the {kind}")
            self._value(one.inputs, where, scope)
            if flow.inputs_schema is not None:
                self._fits("the workflow", one.inputs, flow.inputs_schema, where, scope)

    # --- values ---

    def _wants(self, value: Any, path: KeyPath, scope: _Scope, wanted: Mapping[str, Any], message: str) -> Any:
        """Check a value that is one expression or a constant. Returns what schema it has."""
        if isinstance(value, str):
            try:
                only = template.text(value).only
            except ExpressionError:
                only = None
                self._value(value, path, scope)
                return {}
            if only is None:
                self._bad(path, f"{message}: write it as one ${{…}}")
                return {}
        self._value(value, path, scope)
        found = self._type(value, scope)
        if why := schema.mismatch(found, wanted):
            self._bad(path, f"{message}: {why}")
        return found

    def _value(self, value: Any, path: KeyPath, scope: _Scope) -> None:
        for inner, source in template.texts(value):
            try:
                cut = template.text(source)
            except ExpressionError as error:
                self._bad((*path, *inner), f"bad expression: {error}", offset=error.offset)
                continue
            for expression, offset in cut.expressions:
                for problem, at in self._names(expression, scope):
                    self._bad((*path, *inner), problem, offset=offset + at)

    def _names(self, expression: Expression, scope: _Scope) -> Iterator[tuple[str, int]]:
        for reference in expression.references:
            root, path = reference.root, reference.path
            if root == "steps" and scope.steps:
                yield from ((said, reference.offset) for said in _step_name(path, scope))
                continue
            if root not in scope.names:
                where = "outside of a for_each" if root == "item" else scope.why or "here"
                yield (
                    f"{root!r} means nothing {where if where.startswith(('before', 'outside')) else 'here'}",
                    reference.offset,
                )
                continue
            for end in range(1, len(path) + 1):
                if (
                    schema.at(scope.names[root], path[:end]) is False
                    and schema.at(scope.names[root], path[: end - 1]) is not False
                ):
                    known = (schema.at(scope.names[root], path[: end - 1]) or {}).get("properties") or {}
                    base = ".".join(map(str, (root, *path[: end - 1])))
                    yield f"{base} has no {path[end - 1]!r}{_near(str(path[end - 1]), known)}", reference.offset
                    break

    def _type(self, value: Any, scope: _Scope) -> Any:
        """What is certain of a value with expressions in it, as a schema."""
        if isinstance(value, str) and "${" in value:
            try:
                cut = template.text(value)
            except ExpressionError:
                return {}
            if cut.only is None:
                return {"type": "string"}
            return self._type_of(cut.only, scope)
        if isinstance(value, Mapping):
            return {**_object({k: self._type(v, scope) for k, v in value.items()}), "required": list(value)}
        if isinstance(value, list):
            kinds = [self._type(v, scope) for v in value]
            same = bool(kinds) and all(k.get("type") == kinds[0].get("type") for k in kinds if isinstance(k, Mapping))
            items = {"type": kinds[0]["type"]} if same and isinstance(kinds[0], Mapping) and "type" in kinds[0] else {}
            return {"type": "array", "items": items, "minItems": len(value)}
        return schema.of_value(value)

    def _type_of(self, expression: Expression, scope: _Scope) -> Any:
        if expression.plain is None:
            return {}
        root, path = expression.plain.root, expression.plain.path
        if root == "steps":
            if len(path) < 2 or path[0] not in scope.steps or path[1] not in _STEP_FIELDS:
                return {}
            found = scope.steps[str(path[0])] if path[1] == "outputs" else _STEP_FIELDS[str(path[1])]
            found = schema.at(found, path[2:])
        else:
            found = schema.at(scope.names.get(root, {}), path)
        return {} if found is False else found

    def _bad(self, path: KeyPath, message: str, *, at_key: bool = False, offset: int = 0) -> None:
        self.problems.append(self._document.problem(path, message, at_key=at_key, offset=offset))


_ERROR: Final = {
    "type": "object",
    "properties": {"step": {"type": "string"}, "message": {"type": "string"}},
    "additionalProperties": False,
}


def _step_name(path: tuple[str | int, ...], scope: _Scope) -> Iterator[str]:
    if not path or not isinstance(path[0], str):
        yield 'write which step is meant: steps.build.outputs, or steps["build-it"].outputs'
        return
    step = path[0]
    if step not in scope.steps:
        hyphened = next((one for one in scope.steps if one.startswith(f"{step}-")), None)
        hint = f'; for an id with a hyphen write steps["{hyphened}"]' if hyphened else _near(step, scope.steps)
        yield f"there is no step {step!r}{hint}"
    elif step not in scope.before:
        yield f"{scope.why} uses {step!r}, which has not certainly ended by then: add it to `needs`"
    elif len(path) < 2 or path[1] not in _STEP_FIELDS:
        yield f"steps.{step} has {', '.join(_STEP_FIELDS)}; write steps.{step}.outputs"
    elif path[1] == "outputs":
        made = scope.steps[step]
        for end in range(3, len(path) + 1):
            if schema.at(made, path[2:end]) is False:
                known = (schema.at(made, path[2 : end - 1]) or {}).get("properties") or {}
                missing = ".".join(map(str, path[2:end]))
                yield f"the outputs of {step!r} have no {missing!r}{_near(str(path[end - 1]), known)}"
                break


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _near(name: str, known: Mapping[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(list(known)[:12])}" if known else ""
