"""Runs workflows without agents or VMs: the test itself finishes each claim at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from swarm import agents
from swarm.model import Agent, Claim, Failed, FailureReason, Outcome, Succeeded
from swarm.store.sql.rows import StepRow
from swarm.store.store import Store
from swarm.workflow import validate
from swarm.workflow.pinning import Registry
from tests.store.databases import ECHO, LEASE, Outside, insert

Behaviour = Callable[[Claim], Outcome]


def well(claim: Claim) -> Outcome:
    """Every step succeeds, with its inputs as outputs."""
    return Succeeded(outputs=claim.inputs)


def gives(**values: Any) -> Behaviour:
    """The outputs of steps by their names (without '[…]'), an exception for one that fails; other steps succeed."""

    def behave(claim: Claim) -> Outcome:
        name = claim.step_id.rpartition("/")[2].partition("[")[0]
        if name not in values:
            return well(claim)
        if isinstance(values[name], Exception):
            return Failed(reason=FailureReason.AGENT_FAILED, message=str(values[name]))
        return Succeeded(outputs=json.dumps(values[name]))

    return behave


@cache
def _builtin() -> list[Agent]:
    """Read once: a test registers a workflow in less time."""
    return [agents.read(directory) for directory in agents.builtin()]


async def register(store: Store, text: str, *, name: str = "flow") -> str:
    """Steps in YAML as a workflow; its id. The agents are those of `databases` and the built-in ones."""
    known = [ECHO, *(await store.agents()), *_builtin()]
    rows = await store.workflows()

    def workflow(reference: str) -> Any:
        return next(row for row in rows if row.name == reference.partition("@")[0]).parsed()

    def agent(reference: str) -> Any:
        found = next(one for one in known if one.name == reference.partition("@")[0])
        return replace(found, inputs_schema=None, outputs_schema=None)

    checked = validate.checked(f"name: {name}\nversion: 1.0.0\n{text}", Registry(agent=agent, workflow=workflow))
    return (await store.put_workflow(checked)).id


async def ticket(store: Store, outside: Outside, text: str, *, id: str = "t", **columns: Any) -> None:
    """A ready ticket with a workflow of its own."""
    workflow = await register(store, text, name=f"of-{id}")
    insert(outside, id, agent_id=None, execution_mode="workflow", workflow_id=workflow, **columns)


async def claims(store: Store, limit: int = 4) -> list[Claim]:
    """The claims of a worker, once all decisions are made."""
    await store.decided()  # a decision that ends during the claim would be missed by both
    found = await store.claim("test", limit=limit, lease_seconds=LEASE)
    while not found and await store.decided():
        found = await store.claim("test", limit=limit, lease_seconds=LEASE)
    return found


async def finish(store: Store, claim: Claim, behave: Behaviour = well) -> None:
    await store.finish(claim.attempt_id, behave(claim), timings={}, vm_time_ms=1.0)


async def run(store: Store, behave: Behaviour = well, *, limit: int = 4) -> list[str]:
    """Claim and finish until nothing is left. Returns the steps in the order of their starts."""
    started: list[str] = []
    while found := await claims(store, limit):
        started += [claim.step_id for claim in found]
        for claim in found:
            await finish(store, claim, behave)
    return started


async def rows(store: Store, id: str = "t") -> dict[str, StepRow]:
    """The steps of the ticket's own run, and of nested runs."""
    own = (await store.ticket(id)).run_id
    runs = await store.runs(id)
    last = [run.id for run in runs[next(i for i, run in enumerate(runs) if run.id == own) :]]
    return {step.step_id: step for step in await store.steps(id) if step.run_id in last}


async def statuses(store: Store, id: str = "t") -> dict[str, str]:
    return {name: row.status for name, row in (await rows(store, id)).items()}


async def state(store: Store, id: str = "t") -> tuple[str, Any]:
    """The state of a ticket, and its outputs or its error."""
    found = await store.ticket(id)
    return found.state, json.loads(found.outputs) if found.outputs else found.error


def names(found: Sequence[Claim]) -> list[str]:
    return sorted(claim.step_id for claim in found)
