"""A workflow as a run freezes it: what it refers to is pinned, and workflows that it names are written out in it.

So it may be far larger than its file, and is weighed before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from swarm.base.manifest import Invalid, Problem
from swarm.model import Agent
from swarm.workflow import parse
from swarm.workflow.definition import Step, Workflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """What a workflow may refer to. Each raises NotFound."""

    agent: Callable[[str], Agent]
    workflow: Callable[[str], Workflow]


class Endless(Exception):
    """More steps, or deeper, than a run may have."""


def pin(workflow: Workflow, registry: Registry) -> Workflow:
    """The workflow as a run freezes it: agents by name and version, workflows by their whole definition. Raises
    manifest.Invalid for one that is too large then."""
    try:
        count_steps(workflow, registry)
    except Endless as error:
        raise Invalid(workflow.name, [Problem(line=0, column=0, message=str(error))]) from None
    return _pin(workflow, registry)


def _pin(workflow: Workflow, registry: Registry) -> Workflow:
    def one(step: Step) -> Step:
        if step.agent is not None:
            agent = registry.agent(step.agent)
            return replace(step, agent=f"{agent.name}@{agent.version}")
        if isinstance(step.workflow, str):
            return replace(step, workflow=_pin(registry.workflow(step.workflow), registry))
        return replace(step, workflow=step.workflow and _pin(step.workflow, registry))

    return replace(
        workflow,
        steps=tuple(map(one, workflow.steps)),
        on_error=tuple(map(one, workflow.on_error)),
        on_success=tuple(map(one, workflow.on_success)),
    )


def count_steps(
    flow: Workflow,
    registry: Registry,
    within: tuple[str, ...] = (),
    known: dict[str, tuple[int, int]] | None = None,
) -> tuple[int, int]:
    """How many steps it has, with those of workflows within it (``within`` names those that it is in itself), and how
    deep these go. Raises Endless.

    Each named one is looked at once: together they may have more steps than there is time.
    """
    known = {} if known is None else known
    count, depth = 0, 0
    for step in flow.all_steps():
        inner = (0, 0)
        if isinstance(step.workflow, str):
            if step.workflow in within:
                raise Endless(f"workflows within workflows without end: {' runs '.join((*within, step.workflow))}")
            if step.workflow not in known:
                named = registry.workflow(step.workflow)
                known[step.workflow] = count_steps(named, registry, (*within, step.workflow), known)
            inner = known[step.workflow]
        elif step.workflow is not None:
            inner = count_steps(step.workflow, registry, within, known)
        if step.workflow is not None:
            depth = max(depth, 1 + inner[1])
        count += 1 + inner[0]
    if depth > parse.MAX_DEPTH:
        raise Endless(f"workflows within workflows, more than {parse.MAX_DEPTH} deep")
    if count > parse.MAX_STEPS_IN_ALL:
        raise Endless(f"{count:,} steps with those of workflows within; {parse.MAX_STEPS_IN_ALL:,} are allowed")
    return count, depth
