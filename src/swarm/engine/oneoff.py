"""One-off runs of an agent, without a ticket: `swarm agent run` and `swarm agent test`. What is kept of them is what
calls of models have cost."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from swarm.agents import Example, Package, check
from swarm.base.clock import Timeline
from swarm.engine.engine import Engine
from swarm.model import Agent, Claim, Failed, FailureReason, Outcome, Ticket, TicketState

# Failures of ours: they tell nothing of the agent, so no example wants them.
_NOT_ITS_OWN: Final = frozenset(
    {
        FailureReason.BOOT_FAILED,
        FailureReason.CHANNEL_BROKEN,
        FailureReason.VM_DIED,
        FailureReason.GUEST_PANIC,
        FailureReason.HOST_ERROR,
    }
)
OnOutput = Callable[[str, bytes], None]


async def run(
    engine: Engine, agent: Agent, inputs: Mapping[str, Any], *, title: str = "", on_output: OnOutput
) -> Outcome:
    """One attempt, as a ticket of this agent would have it. ``on_output`` is told of all that is printed, live."""
    name = f"trial-{uuid.uuid4()}"
    claim = Claim(
        attempt_id=name,
        attempt_number=1,
        step_execution_id=name,
        step_id="main",
        run_id=name,
        ticket=Ticket(id=name, title=title or f"a trial of {agent.name}", state=TicketState.IN_PROGRESS),
        agent=agent,
        inputs=json.dumps(inputs),
        timeout_seconds=agent.timeout_seconds,
        queued_ms=0.0,
    )
    return await engine.execute(claim, _Watcher(on_output), Timeline())


async def examples(engine: Engine, package: Package) -> AsyncIterator[tuple[Example, list[str]]]:
    """Run each example of a package; with each, what is wrong with its result (nothing: it is as it should be)."""
    for example in package.examples:
        outcome = await run(engine, package.agent, example.inputs, title=example.name, on_output=lambda *_: None)
        yield example, _wrong(example, outcome)


def without_vm(agent: Agent) -> Agent:
    """The agent as the `process` driver can run it: there, arguments can't name /agent, which is a VM's."""
    first, *rest = agent.entry
    return replace(agent, entry=(first, *(f"..{one}" if one.startswith("/agent/") else one for one in rest)))


def _wrong(example: Example, outcome: Outcome) -> list[str]:
    if isinstance(outcome, Failed):
        return [] if example.fails and outcome.reason not in _NOT_ITS_OWN else outcome.message.split("\n")
    outputs = json.loads(getattr(outcome, "outputs", "null"))
    if example.fails:
        return ["it succeeded, and the example says that it fails"]
    return [] if example.outputs is None else check.differences(example.outputs, outputs)


class _Watcher:
    def __init__(self, on_output: OnOutput) -> None:
        self._on_output = on_output

    async def placed(self, vm_id: int) -> None:
        pass

    def record(self, kind: str, data: Mapping[str, object]) -> None:
        pass

    def output(self, stream: str, data: bytes) -> None:
        self._on_output(stream, data)
