"""Checks the meaning of a workflow, and finds all problems at once, each with its place.

Ids, needs, cycles, unreachable steps; in every expression: syntax, names, and that the steps it uses have certainly
ended by then; that agents and workflows exist; and types, where schemas make a mismatch certain.
"""

from __future__ import annotations

import contextlib
import difflib
import graphlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final

from swarm import schema
from swarm.base.manifest import Document, Enough, Invalid, KeyPath, Problem, Problems
from swarm.cel import template
from swarm.cel.expression import Expression, ExpressionError
from swarm.errors import NotFound
from swarm.model import BUILT, FILES, Agent
from swarm.workflow import parse
from swarm.workflow.definition import Schedule, Step, Webhook, Workflow
from swarm.workflow.pinning import Registry, TooLarge, count_steps, pin

_STEP_FIELDS: Final = {"outputs": {}, "status": {"type": "string"}, "error": {"type": ["string", "null"]}}
_ERROR: Final = {
    "type": "object",
    "properties": {"step": {"type": "string"}, "message": {"type": "string"}},
    "additionalProperties": False,
}
_TICKET: Final = schema.expand({"id": "string", "title": "string", "description": "string?", "project_id": "string?"})
_TRIGGER: Final = {"type": "object", "properties": {"type": {"type": "string"}}}
# `trigger` in a trigger's inputs; `swarm.triggers.schedules` and `swarm.api.webhooks` fill it in.
_OF_TRIGGERS: Final = {
    "schedule": schema.expand(
        {"type": "string", "time": "string", "cron": "string", "time_zone": "string", "missed": "integer"}
    ),
    "webhook": schema.expand(
        {"type": "string", "time": "string", "body": "any", "headers": {"type": "object"}, "key": "string?"}
    ),
}


def load(text: str | bytes, registry: Registry, *, name: str = parse.FILE) -> Workflow:
    """`checked`, with its references pinned, as a run has it."""
    return pin(checked(text, registry, name=name), registry)


def checked(text: str | bytes, registry: Registry, *, name: str = parse.FILE) -> Workflow:
    """Read and check a file; references stay as they are written. Raises manifest.Invalid with every problem."""
    workflow, document, problems = parse.read(text, name=name)
    if workflow is not None:
        problems = [*problems, *validate(workflow, registry, document)]
    if problems or workflow is None:
        raise Invalid(name, problems)
    return workflow


def validate(workflow: Workflow, registry: Registry, document: Document) -> list[Problem]:
    checker = _Checker(registry, document)
    with contextlib.suppress(Enough):
        checker.workflow(workflow, ())
        if not checker.problems:
            checker.check_size(workflow)
    return sorted(set(checker.problems))


@dataclass(slots=True)
class _Scope:
    """What an expression at one place may use."""

    names: dict[str, Any]  # name -> schema
    steps: Mapping[str, Any] = field(default_factory=dict)  # id -> schema of its outputs
    before: frozenset[str] = frozenset()  # the steps that have certainly ended by then
    where: str = ""  # the place, for messages
    flow: Mapping[str, Step] = field(default_factory=dict)  # all steps, by id


class _Checker:
    def __init__(self, registry: Registry, document: Document) -> None:
        self._registry = registry
        self._document = document
        self.problems = Problems()

    def workflow(self, flow: Workflow, path: KeyPath, within: tuple[str, ...] = ()) -> None:
        names: dict[str, Any] = {
            "inputs": flow.inputs_schema if flow.inputs_schema is not None else {},
            "trigger": _TRIGGER,
            "ticket": _TICKET,
        }
        start = _Scope(dict(names), where="before any step has run")
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
                    self._bad((*where, "id"), f"another step already has the id {step.id!r}")
                ids.setdefault(step.id, where)
                outputs.setdefault(step.id, self._outputs(step, where, within))
        main = self._order(flow.steps, (*path, "steps"))
        everything = frozenset(main)
        by_id = {step.id: step for step in flow.all_steps()}
        self._part(flow.steps, (*path, "steps"), _Scope(names, outputs, flow=by_id), main)
        for part, extra in (("on_error", {"error": _ERROR}), ("on_success", {})):
            steps = getattr(flow, part)
            before = self._order(steps, (*path, part))
            self._part(steps, (*path, part), _Scope({**names, **extra}, outputs, everything, flow=by_id), before)
        last = _Scope({**names, "steps": {}}, outputs, frozenset(ids))
        for name, value in (flow.outputs or {}).items():
            self._value(value, (*path, "outputs", name), last)

    def check_size(self, flow: Workflow) -> None:
        try:
            count_steps(flow, self._registry)
        except TooLarge as error:
            self._bad(("steps",), str(error))

    # --- the graph ---

    def _order(self, steps: Sequence[Step], path: KeyPath) -> dict[str, frozenset[str]]:
        """For each step, all steps that come before it. Reports cycles, wrong needs, joins and `when`s."""
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
                    self._bad(where, f"{need!r} is listed twice")
                else:
                    needs[step.id].add(need)
            if step.join != "all" and not step.needs:
                self._bad((*path, i, "join"), "join says how many needs must succeed, but this step has no needs")
            elif isinstance(step.join, int) and step.join > len(step.needs):
                self._bad((*path, i, "join"), f"join is {step.join}, but the step has only {len(step.needs)} needs")
            if step.when is False:
                self._bad((*path, i, "when"), f"the step {step.id!r} never runs: its `when` is false")
        before: dict[str, frozenset[str]] = {}
        sorter = graphlib.TopologicalSorter(needs)
        try:
            order = list(sorter.static_order())
        except graphlib.CycleError as error:
            cycle = list(reversed(error.args[1]))
            self._bad((*path, known[cycle[0]], "needs"), f"a cycle: {' needs '.join(reversed(cycle))}")
            return {step.id: frozenset(known) - {step.id} for step in steps}  # no problems that follow from the cycle
        for one in order:
            before[one] = frozenset(needs[one]).union(*(before[need] for need in needs[one]))
        return before

    def _part(
        self,
        steps: Sequence[Step],
        path: KeyPath,
        around: _Scope,
        before: Mapping[str, frozenset[str]],
    ) -> None:
        """``around``: what all of these steps may use."""
        for i, step in enumerate(steps):
            ended, where = around.before | before[step.id], f"the step {step.id!r}"
            self._one(step, (*path, i), replace(around, names={**around.names, "steps": {}}, before=ended, where=where))

    def _one(self, step: Step, path: KeyPath, scope: _Scope) -> None:
        inner = replace(scope, names=dict(scope.names))
        if step.for_each is not None:
            where = (*path, "for_each", "items")
            if where not in self._document.positions:
                where = (*path, "for_each")
            items = self._typed(step.for_each.items, where, scope, {"type": "array"}, "for_each must be a list")
            inner.names["item"] = items.get("items", {}) if isinstance(items, Mapping) else {}
            inner.names["index"] = {"type": "integer"}
            if step.for_each.best is not None:
                self._best(step, step.for_each.best, path, scope)
        if step.from_step is not None:
            self._from(step, step.from_step, path, scope)
        if step.repeat is not None:
            inner.names["previous"] = {}
            inner.names["index"] = {"type": "integer"}
            ended = replace(inner, before=inner.before | {step.id})
            where = (*path, "repeat", "until")
            self._typed(step.repeat.until, where, ended, {"type": "boolean"}, "until must be true or false")
        self._typed(step.when, (*path, "when"), inner, {"type": "boolean"}, "when must be true or false")
        if step.approval is not None:
            where = (*path, "approval", "message")
            if where not in self._document.positions:
                where = (*path, "approval")
            self._value(step.approval.message, where, inner)
        self._value(step.inputs, (*path, "inputs"), inner)
        wanted = self._inputs_schema(step)
        if wanted is not None:
            self._fits(step.agent or step.id, step.inputs, wanted, (*path, "inputs"), inner)

    def _best(self, step: Step, best: str, path: KeyPath, scope: _Scope) -> None:
        where = (*path, "for_each", "best")
        if where not in self._document.positions:
            where = (*path, "best")
        names = {**scope.names, "outputs": scope.steps[step.id], "index": {"type": "integer"}}
        wanted = {"type": ["number", "boolean"]}
        self._typed(best, where, replace(scope, names=names), wanted, "best must be a number")

    def _from(self, step: Step, name: str, path: KeyPath, scope: _Scope) -> None:
        """Has the step that it starts from certainly ended by then, with one VM that this one's agent can work in?"""
        where, source = (*path, "from"), scope.flow.get(name)
        if source is None:
            self._bad(where, f"there is no step {name!r}{_near(name, scope.flow)}")
        elif name == step.id:
            self._bad(where, f"the step {name!r} can't start from its own VM")
        elif name not in scope.before:
            self._bad(where, f"the step {name!r} may not have ended by then: add it to `needs`")
        elif source.agent is None:
            self._bad(where, f"the step {name!r} has no agent, so it leaves no VM to start from")
        elif source.for_each is not None and not source.for_each.has_winner:
            self._bad(where, f"the step {name!r} leaves a VM for each item: give it `best` or `join: first_success`")
        else:
            for _ in scope.flow:  # not `while`: a workflow with a cycle, which `_order` has reported, comes here too
                source = scope.flow.get(source.from_step or "", source)
            with contextlib.suppress(NotFound):  # `_outputs` has reported it
                own, theirs = self._registry.agent(step.agent or ""), self._registry.agent(source.agent or "")
                if lacks := _lacks(own, theirs):
                    self._bad(where, f"the VM of {name!r} was made for the agent {theirs.name}, and {own.name} {lacks}")

    # --- agents and workflows ---

    def _outputs(self, step: Step, path: KeyPath, within: tuple[str, ...]) -> Any:
        """Schema of a step's outputs, or {}. Reports agents and workflows that don't exist."""
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
            except (NotFound, TooLarge) as error:
                self._bad((*path, "workflow"), str(error))
        elif step.workflow is not None:
            if len(within) < parse.MAX_DEPTH:
                self.workflow(step.workflow, (*path, "workflow"), (*within, step.id))
            made = self._outputs_of(step.workflow)
        else:
            made = schema.expand({"approved": "boolean", "by": "string", "why": "string?"})
        return {"type": "array", "items": made} if step.for_each is not None and step.for_each.best is None else made

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
            return None  # `_outputs` has reported it

    def _fits(self, name: str, given: Mapping[str, Any], wanted: Any, path: KeyPath, scope: _Scope) -> None:
        properties = wanted.get("properties") or {}
        for key, value in given.items():
            if key == FILES:
                continue
            inner = schema.at(wanted, (key,))
            if inner is False:
                known = f"; it has {', '.join(properties)}" if properties else ""
                self._bad((*path, key), f"{name} has no input {key!r}{known}", at_key=True)
            elif why := schema.mismatch(self._type(value, scope), inner):
                self._bad((*path, key), f"the input {key!r} of {name} has the wrong type: {why}")
        for key in wanted.get("required") or ():
            if key not in given and "default" not in (properties.get(key) or {}):
                self._bad(path, f"{name} needs an input {key!r}")

    def _trigger(self, flow: Workflow, kind: str, path: KeyPath) -> None:
        given: tuple[Schedule | Webhook, ...] = flow.schedule
        if kind == "webhook":
            given = (flow.webhook,) if flow.webhook else ()
        for i, one in enumerate(given):
            listed = (*path, kind, i) in self._document.positions
            where = (*path, kind, i, "inputs") if listed else (*path, kind, "inputs")
            scope = _Scope({"trigger": _OF_TRIGGERS[kind]}, where=f"the inputs of the {kind}")
            self._value(one.inputs, where, scope)
            if flow.inputs_schema is not None:
                self._fits("the workflow", one.inputs, flow.inputs_schema, where, scope)

    # --- values ---

    def _typed(self, value: Any, path: KeyPath, scope: _Scope, wanted: Mapping[str, Any], message: str) -> Any:
        """Check a value that must be one expression or a constant of the wanted type. Returns its schema."""
        if isinstance(value, str):
            try:
                only = template.text(value).only
            except ExpressionError:
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
                yield from ((problem, reference.offset) for problem in _step_name(path, scope))
            elif root in scope.names:
                if missing := _missing(scope.names[root], path):
                    i, hint = missing
                    yield f"{'.'.join(map(str, (root, *path[:i])))} has no {path[i]!r}{hint}", reference.offset
            else:
                where = "outside of a for_each" if root == "item" else scope.where
                where = where if where.startswith(("before", "outside")) else "here"
                yield f"{root!r} is unknown {where}", reference.offset

    def _type(self, value: Any, scope: _Scope) -> Any:
        """What is certain about a value with expressions in it, as a schema."""
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


def _missing(known: Any, path: tuple[str | int, ...]) -> tuple[int, str] | None:
    """The index of the first key in ``path`` that values of the schema ``known`` can't have, and a hint."""
    for i in range(len(path)):
        if schema.at(known, path[: i + 1]) is False:
            properties = (schema.at(known, path[:i]) or {}).get("properties") or {}
            return i, _near(str(path[i]), properties)
    return None


def _step_name(path: tuple[str | int, ...], scope: _Scope) -> Iterator[str]:
    if not path or not isinstance(path[0], str):
        yield 'name the step: steps.build.outputs, or steps["build-it"].outputs'
        return
    step = path[0]
    if step not in scope.steps:
        hyphened = next((one for one in scope.steps if one.startswith(f"{step}-")), None)
        hint = f'; for an id with a hyphen write steps["{hyphened}"]' if hyphened else _near(step, scope.steps)
        yield f"there is no step {step!r}{hint}"
    elif step not in scope.before:
        yield f"{scope.where} uses {step!r}, which may not have ended by then: add it to `needs`"
    elif len(path) < 2 or path[1] not in _STEP_FIELDS:
        yield f"steps.{step} has {', '.join(_STEP_FIELDS)}; write steps.{step}.outputs"
    elif path[1] == "outputs" and (missing := _missing(scope.steps[step], path[2:])):
        i, hint = missing
        yield f"the outputs of {step!r} have no {'.'.join(map(str, path[2 : 3 + i]))!r}{hint}"


def _lacks(own: Agent, theirs: Agent) -> str:
    """What an agent needs of a VM that was made for another; '' if nothing is missing."""
    for name in ("memory_mb", "vcpus", "disk_mb"):
        if (wanted := getattr(own, name)) > (given := getattr(theirs, name)):
            return f"needs {name} {wanted}; that one's is {given}"
    if own.image is not None and _made_of(own.image) != _made_of(theirs.image or ""):
        return f"needs the image {own.image}"
    for name in ("requirements", "packages", "npm"):
        if missing := sorted({*getattr(own, name)} - {*getattr(theirs, name)}):
            return f"needs the {name} {', '.join(missing)}, which that one has not"
    return ""


def _made_of(image: str) -> str:
    """What an agent's image is built of is in its name, behind the agent's."""
    return image.rpartition(":")[2] if image.startswith(BUILT) else image


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(islice(known, 1000)), n=1) if len(name) <= 100 else []
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(list(known)[:12])}" if known else ""
