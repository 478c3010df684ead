"""Workflows run by a test's own hand: claims answered at once, no agent, no VM."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from swarm.model import Claim, Failed, FailureReason, Outcome, Succeeded
from swarm.store.store import Store
from swarm.workflow import validate
from swarm.workflow.definition import Workflow
from tests.store.databases import LEASE
from tests.workflow.execute import REGISTRY

Behaviour = Callable[[Claim], Outcome]
NUMBERS = itertools.count(1)


def done(value: Any = None) -> Succeeded:
    import json

    return Succeeded(outputs=json.dumps({} if value is None else value))


def broken(message: str = "it broke") -> Failed:
    return Failed(reason=FailureReason.AGENT_FAILED, message=message)


def well(claim: Claim) -> Outcome:
    """Every step succeeds, with its inputs as outputs."""
    return Succeeded(outputs=claim.inputs)


def fails(*names: str) -> Behaviour:
    """These steps fail, the others succeed."""
    return lambda claim: broken(f"{claim.step_id} broke") if claim.step_id in names else well(claim)


async def register(store: Store, text: str) -> str:
    """A workflow by its YAML; its id."""
    workflow: Workflow = validate.checked(text, REGISTRY)
    return (await store.put_workflow(workflow)).id


async def run(store: Store, behave: Behaviour = well, *, limit: int = 4, history: list[str] | None = None) -> list[str]:
    """Claim and answer until nothing is to be done. The steps in the order of their starts."""
    started = history if history is not None else []
    while True:
        claims = await store.claim("test", limit=limit, lease_seconds=LEASE)
        if not claims:
            await store.decided()
            claims = await store.claim("test", limit=limit, lease_seconds=LEASE)
            if not claims:
                return started
        for claim in claims:
            started.append(claim.step_id)
        for claim in claims:
            await store.finish(claim.attempt_id, behave(claim), timings={}, vm_time_ms=1.0)


async def statuses(store: Store, ticket: str = "t") -> Mapping[str, str]:
    """Of the newest run's steps, those of runs within it too."""
    return {step.step_id: step.status for step in await store.steps(ticket)}
