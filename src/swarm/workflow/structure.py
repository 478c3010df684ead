"""A workflow prepared for planning, and the context of a new run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from swarm import schema
from swarm.cel import template
from swarm.cel.evaluate import Evaluator
from swarm.cel.expression import ExpressionError
from swarm.model import FILES
from swarm.workflow.definition import Step, Workflow
from swarm.workflow.state import RunContext

PHASES: Final = ("steps", "on_error", "on_success")


class Graph:
    """A workflow prepared for planning. It never changes: make one for each definition, and keep it."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.steps: dict[str, Step] = {step.id: step for step in workflow.all_steps()}
        self.phase: dict[str, str] = {step.id: part for part in PHASES for step in getattr(workflow, part)}
        self.dependants: dict[str, list[str]] = {one: [] for one in self.steps}
        for step in self.steps.values():
            for need in step.needs:
                self.dependants[need].append(step.id)
        # Steps of whose VMs other steps start in forks.
        self.sources = {step.from_step for step in self.steps.values() if step.from_step is not None}
        self.fan_outs = {step.id for step in self.steps.values() if step.for_each or step.repeat}
        self.timed = any(step.for_each and step.for_each.timeout_seconds for step in self.steps.values())
        self.leaves = [step.id for step in workflow.steps if not self.dependants[step.id]]
        # A `when` that uses the item is evaluated for each item; others once, before there are items.
        self.when_per_item = {
            step.id for step in self.steps.values() if step.for_each and _uses(step.when, {"item", "index"})
        }

    def part(self, phase: str) -> tuple[Step, ...]:
        steps: tuple[Step, ...] = getattr(self.workflow, phase)
        return steps

    def can_do_without(self, step_id: str) -> bool:
        """Can the run succeed though this step failed, because the joins of all steps that need it allow that?"""
        dependants = self.dependants[step_id]
        return bool(dependants) and all(self.steps[one].join != "all" for one in dependants)

    def after(self, step_id: str) -> tuple[str, ...]:
        """The step, all that depend on it, and the on_error and on_success steps: what `retry --from` runs again.

        Raises KeyError for an unknown id.
        """
        found, queue = {step_id}, deque([step_id])
        while queue:
            for one in self.dependants[queue.popleft()]:
                if one not in found:
                    found.add(one)
                    queue.append(one)
        return tuple(one for one in self.steps if one in found or self.phase[one] != "steps")


def run_context(
    workflow: Workflow, *, inputs: Any, trigger: Mapping[str, Any], ticket: Mapping[str, Any], evaluator: Evaluator
) -> RunContext:
    """What a run's expressions see: inputs checked and with their defaults, variables filled in.

    Raises ExpressionError, with a sentence for the run's `error`, when the inputs don't fit or a variable has no value.
    """
    files = {FILES: inputs[FILES]} if isinstance(inputs, Mapping) and FILES in inputs else {}
    if workflow.inputs_schema is not None:
        if files:
            inputs = {name: value for name, value in inputs.items() if name != FILES}
        inputs = schema.with_defaults(inputs, workflow.inputs_schema)
        wrong = schema.issues(inputs, schema.text(workflow.inputs_schema))
        if wrong:
            raise ExpressionError("the inputs don't fit the workflow: " + "; ".join(map(str, wrong)))
        inputs = {**inputs, **files} if files else inputs
    names = {"inputs": inputs, "trigger": trigger, "ticket": ticket}
    variables = template.fill({"variables": dict(workflow.variables)}, names, evaluator)["variables"]
    return RunContext(inputs=inputs, variables=variables, trigger=trigger, ticket=ticket)


def _uses(value: Any, roots: set[str]) -> bool:
    for _, source in template.texts(value):
        for expression, _ in template.text(source).expressions:
            if any(reference.root in roots for reference in expression.references):
                return True
    return False
