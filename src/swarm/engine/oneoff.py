"""One-off runs of an agent, without a ticket: `swarm agent run` and `swarm agent test`. Only the cost of their model
calls is kept."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from swarm.agents import Example, Package, check
from swarm.base.clock import Timeline
from swarm.engine.engine import Engine, Watcher
from swarm.model import Agent, Claim, Failed, FailureReason, Outcome, Ticket, TicketState

# Failures that are not the agent's fault: no example expects them.
_HOST_FAILURES: Final = frozenset(
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
    """One attempt, as a ticket of this agent would run. ``on_output`` gets everything that is printed, live."""
    name = f"oneoff-{uuid.uuid4()}"
    claim = Claim(
        attempt_id=name,
        attempt_number=1,
        step_execution_id=name,
        step_id="main",
        run_id=name,
        ticket=Ticket(id=name, title=title or f"a run of {agent.name}", state=TicketState.IN_PROGRESS),
        agent=agent,
        inputs=json.dumps(inputs),
        timeout_seconds=agent.timeout_seconds,
        queued_ms=0.0,
    )
    return await engine.execute(claim, _OutputWatcher(on_output), Timeline())


async def examples(engine: Engine, package: Package) -> AsyncIterator[tuple[Example, list[str]]]:
    """Run each example of a package; with each, the problems of its result (none: it passed)."""
    for example in package.examples:
        outcome = await run(engine, package.agent, example.inputs, title=example.name, on_output=lambda *_: None)
        yield example, _problems(example, outcome)


def without_vm(agent: Agent) -> Agent:
    """The agent as the `process` driver can run it: its arguments can't name /agent, which exists only in a VM."""
    first, *rest = agent.entry
    return replace(agent, entry=(first, *(f"..{one}" if one.startswith("/agent/") else one for one in rest)))


def _problems(example: Example, outcome: Outcome) -> list[str]:
    if isinstance(outcome, Failed):
        return [] if example.fails and outcome.reason not in _HOST_FAILURES else outcome.message.split("\n")
    outputs = json.loads(getattr(outcome, "outputs", "null"))
    if example.fails:
        return ["it succeeded, and the example says that it fails"]
    return [] if example.outputs is None else check.differences(example.outputs, outputs)


class _OutputWatcher(Watcher):
    def __init__(self, on_output: OnOutput) -> None:
        self._on_output = on_output

    def output(self, stream: str, data: bytes) -> None:
        self._on_output(stream, data)
