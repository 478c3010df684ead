"""One-off runs, without a ticket: of an agent (`swarm agent run` and `swarm agent test`), and VMs for a command of a
person (`swarm run`). Only the cost of their model calls is kept."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from swarm.agents import Example, Package, check
from swarm.base.clock import Timeline
from swarm.base.redact import Redactor
from swarm.engine.egress import Egress, Record, account_of
from swarm.engine.engine import Engine, ImageSource, LayerSource, Watcher, vm_spec
from swarm.errors import UsageError
from swarm.model import Agent, Claim, Failed, FailureReason, Outcome, Ticket, TicketState
from swarm.vm.launcher import Assignment, Launcher, LiveVm

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
    claim = _claim(agent, inputs, title=title)
    return await engine.execute(claim, _OutputWatcher(on_output), Timeline())


def _claim(agent: Agent, inputs: Mapping[str, Any], *, title: str = "") -> Claim:
    name = f"oneoff-{uuid.uuid4()}"
    return Claim(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandVm:
    """A VM for a command. ``env``: how programs reach what they may, and the secrets that they get, which ``redactor``
    finds."""

    live: LiveVm
    env: Mapping[str, str]
    redactor: Redactor


class CommandVms:
    """VMs without a ticket."""

    def __init__(self, *, launcher: Launcher, images: ImageSource, layers: LayerSource, egress: Egress) -> None:
        self._launcher = launcher
        self._images = images
        self._layers = layers
        self._egress = egress

    @asynccontextmanager
    async def vm(
        self, agent: Agent, timeline: Timeline, *, on_build: Callable[[float | None], None], record: Record
    ) -> AsyncIterator[CommandVm]:
        """A VM like one of this agent, with its network policy and secrets, and nothing in it. ``record`` gets the
        events of its egress. Raises NotConfigured, LayerMissing, BootFailed, HostError."""
        account = account_of(_claim(agent, {}), one_off=True)
        grant = await self._egress.granted(agent, account, to="the command")  # whose secrets and network these are
        image = await self._images.find(agent.image)
        spec = vm_spec(agent, image, await self._layers.find(agent, image))
        async with (
            self._egress.attempt(grant, record) as egress,
            self._launcher.vm(spec, Assignment(), timeline, on_build=on_build) as live,
        ):
            try:
                await egress.open(lambda port: self._launcher.listen(live, port))
                timeline.mark("renewed")
                yield CommandVm(live=live, env=egress.env, redactor=egress.redactor)
            finally:
                egress.stop()


async def examples(engine: Engine, package: Package) -> AsyncIterator[tuple[Example, list[str]]]:
    """Run each example of a package; with each, the problems of its result (none: it passed)."""
    for example in package.examples:
        outcome = await run(engine, package.agent, example.inputs, title=example.name, on_output=lambda *_: None)
        yield example, _problems(example, outcome)


def without_vm(agent: Agent) -> Agent:
    """The agent as the `process` driver can run it: its arguments can't name /agent, which exists only in a VM."""
    if agent.imported:
        raise UsageError(f"the agent {agent.name!r} runs on the image {agent.image!r}, which takes a VM: use --vm")
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
