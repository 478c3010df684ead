"""Workflows with some history, for tests and for looking at pages."""

from __future__ import annotations

import json
from collections.abc import Sequence

from swarm.model import Claim, Failed, FailureReason, Succeeded, Ticket
from swarm.store.store import Store
from swarm.workflow import parse
from swarm.workflow.definition import Step, Workflow

# What a hostile author, agent or person may write anywhere.
HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m\"'&\u2066"


def workflow(name: str, *steps: dict[str, object], **more: object) -> Workflow:
    found, _, problems = parse.read(json.dumps({"name": name, "version": "1.0.0", "steps": list(steps), **more}))
    assert found is not None and not problems, problems
    return found


def echo(id: str, *needs: str, **more: object) -> dict[str, object]:
    return {"id": id, "agent": "echo", "needs": list(needs), "retry": 1, **more}


async def start(store: Store, flow: Workflow, id: str, **fields: object) -> None:
    row = await store.put_workflow(flow)
    values = {"title": id, "state": "ready", "execution_mode": "workflow", "workflow_id": row.id, **fields}
    await store.add_ticket(Ticket(id=id, **values))  # type: ignore[arg-type]


async def run(store: Store, *, failing: tuple[str, ...] = (), only: tuple[str, ...] | None = None) -> None:
    """Run all that can run, as an engine would. ``only``: other steps stay claimed."""
    for _ in range(5000):
        claims = await store.claim("tests", limit=50, lease_seconds=600)
        if not claims and not await store.decided():
            return
        await finish_all(store, claims, failing=failing, only=only)


async def finish_all(
    store: Store, claims: Sequence[Claim], *, failing: tuple[str, ...] = (), only: tuple[str, ...] | None = None
) -> None:
    for claim in claims:
        if only is not None and claim.step_id not in only:
            await store.running(claim.attempt_id, 1000)
            continue
        outcome = (
            Failed(reason=FailureReason.AGENT_FAILED, message=f"it broke: {HOSTILE}")
            if claim.step_id in failing
            else Succeeded(outputs=json.dumps({"said": claim.step_id}))
        )
        await store.finish(claim.attempt_id, outcome, timings={}, vm_time_ms=5.0, in_workflow=True)


def large(name: str, count: int, width: int = 20) -> Workflow:
    """A step, then chains of ``width`` steps side by side, then a step that needs the last of each."""
    middle = [
        Step(id=f"s{i}", agent="echo", needs=(f"s{i - 1}" if i % width else "a",), continue_on_error=True)
        for i in range(count - 2)
    ]
    last = tuple(f"s{i}" for i in range(count - 2) if i % width == width - 1 or i == count - 3)
    steps = (Step(id="a", agent="echo"), *middle, Step(id="z", agent="echo", needs=last))
    return Workflow(name=name, version="1.0.0", steps=steps)
