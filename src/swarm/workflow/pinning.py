"""A workflow as a run freezes it: agents pinned to versions, named workflows replaced by their definitions.

So it may be far larger than its file; its size is checked first.
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
    """Finds what a workflow refers to. Both raise NotFound."""

    agent: Callable[[str], Agent]
    workflow: Callable[[str], Workflow]


class TooLarge(Exception):
    """More steps, or deeper nesting, than a run may have."""


def pin(workflow: Workflow, registry: Registry) -> Workflow:
    """The workflow as a run freezes it. Raises manifest.Invalid if that is too large."""
    try:
        count_steps(workflow, registry)
    except TooLarge as error:
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
    """The number of its steps, those of nested workflows included, and how deep these are nested. Raises TooLarge.

    ``within``: the named workflows around it. Each named workflow is counted once and remembered in ``known``: walking
    all steps could take too long.
    """
    known = {} if known is None else known
    count, depth = 0, 0
    for step in flow.all_steps():
        inner = (0, 0)
        if isinstance(step.workflow, str):
            if step.workflow in within:
                raise TooLarge(f"workflows run each other endlessly: {' runs '.join((*within, step.workflow))}")
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
        raise TooLarge(f"workflows are nested more than {parse.MAX_DEPTH} deep")
    if count > parse.MAX_STEPS_IN_ALL:
        raise TooLarge(f"{count:,} steps, nested workflows included; {parse.MAX_STEPS_IN_ALL:,} are allowed")
    return count, depth
