"""One claim → one Outcome: get a VM, run the agent in it, collect what it left.

Lower layers raise errors; only this module turns them into outcomes. The engine doesn't know the database or the
drivers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from swarm.agents import Installed
from swarm.base import files, trace
from swarm.base.aio import first
from swarm.base.clock import Timeline
from swarm.base.log import logger
from swarm.base.process import how_it_ended, signal_name
from swarm.base.redact import Redactor, Stream
from swarm.channel import Exit
from swarm.engine import files as ticket_files
from swarm.engine.egress import AttemptEgress, Egress
from swarm.engine.files import FileStore, Left
from swarm.engine.kept import AGENT_DIR as AGENT_DIR
from swarm.engine.kept import EVENT, WORK_DIR, Keeper, clear
from swarm.engine.values import OUTPUT_FILE, Values
from swarm.errors import (
    AgentFailed,
    AgentTimeout,
    GuestSilent,
    HostError,
    ImageError,
    LeaseLost,
    NoImage,
    NoSpace,
    NotFound,
    OutcomeUnknown,
    OutputInvalid,
    OverBudget,
    StepError,
    SwarmError,
    UsageError,
    no_more_threads,
)
from swarm.model import Agent, Claim, Failed, FailureReason, Outcome, Succeeded
from swarm.vm.driver import Image, Layer, Root, VmSpec
from swarm.vm.drivers.console import printable
from swarm.vm.launcher import Assignment, Launcher, LiveVm

log = logger(__name__)

INPUT_FILE = "input.json"
# How long an agent may keep running after a budget has refused it a call.
_OVER_BUDGET_SECONDS = 20.0
# How much of the agent's output an error quotes.
_QUOTED_LINES, _QUOTED_BYTES = 15, 4096
# The next ticket would fail for the same reason.
_HOST_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
# An attempt for which the host's disk has no room goes back uncounted, but not for ever: it may be the one that is too
# large for the disk.
_FULL_TRIES = 20
_BY_SIGNAL = 128  # a shell's status after a program that a signal ended, less the signal's number


class Watcher:
    """Follows an attempt while it runs. This one ignores everything."""

    async def placed(self, vm_id: int) -> None:
        """The attempt has VM ``vm_id``. May raise LeaseLost, which ends the attempt."""

    def record(self, kind: str, data: Mapping[str, object]) -> None:
        """Add an event to the ticket's history. Must not block."""

    def output(self, stream: str, data: bytes) -> None:
        """The agent printed ``data`` on ``stream`` ('stdout', 'stderr', or 'swarm' for a note). Must not block."""

    async def ready(self) -> None:
        """Awaited before more output is read: until then the agent waits, once its pipe is full."""


class ImageSource(Protocol):
    async def find(self, ref: str | None = None) -> Image: ...


class LayerSource(Protocol):
    async def find(self, agent: Agent, image: Image) -> Layer | None:
        """Raises LayerMissing. It is only looked for, unless another host has it: then it is fetched, or built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one attempt may cost the host at most. Agents can't change it."""

    output_json_bytes: int = 16 << 20
    printed_bytes: int = 64 << 20
    files_bytes: int = 64 << 20  # in /work/out


class Engine:
    """``installed``: which agents may run, whatever their rows say; None for agents that don't come from rows.
    ``files``: where tickets' files are kept, and ``keeper``: their VMs; None for runs without a ticket."""

    def __init__(
        self,
        *,
        launcher: Launcher,
        images: ImageSource,
        layers: LayerSource,
        limits: Limits,
        egress: Egress,
        values: Values,
        installed: Installed | None,
        files: FileStore | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self._installed = installed
        self._keeper = keeper
        self._files = files
        self._launcher = launcher
        self._images = images
        self._layers = layers
        self._egress = egress
        self._values = values
        self._limits = limits
        self.over_budget_seconds = _OVER_BUDGET_SECONDS

    async def execute(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> Outcome:
        """Run one attempt to its end. Returns Succeeded or Failed. The VM is gone in every case.

        Raises LeaseLost, CancelledError; HostError when the host is out of descriptors, memory or threads; NoSpace when
        a disk is full; NoImage when the host lacks the default image.
        """
        tail = _OutputTail(watcher)
        try:
            return await self._run(claim, watcher, timeline, tail)
        except StepError as error:
            _raise_if_exhausted(error)
            _raise_if_full(error, claim, timeline, self._launcher.state_dir)
            message = tail.redactor.text(str(error))
            if quoted := tail.quoted():
                message += f"\nThe last that it printed:\n{quoted}"
            code = error.exit_code if isinstance(error, BadExit) else None
            left = error.outputs if isinstance(error, OverBudget) else None
            return Failed(reason=error.reason, message=message, retryable=error.retryable, exit_code=code, outputs=left)
        except (LeaseLost, NoImage):
            raise
        except UsageError as error:  # the agent's files, arguments or environment can't be sent
            return Failed(reason=FailureReason.INPUT_INVALID, message=f"the agent {claim.agent.name!r}: {error}")
        except (ImageError, NotFound) as error:  # the image or layer that this agent names
            return Failed(reason=FailureReason.HOST_ERROR, message=str(error))
        except SwarmError as error:
            _raise_if_exhausted(error)
            _raise_if_full(error, claim, timeline, self._launcher.state_dir)
            return Failed(reason=FailureReason.HOST_ERROR, message=str(error), retryable=True)
        except MemoryError:
            # This process hit its memory limit, perhaps because of this agent's output. Count the attempt, so that
            # such a ticket can't end one engine after another.
            message = "the engine ran out of memory while it ran this ticket"
            log.error(message, ticket=claim.ticket.id)
            return Failed(reason=FailureReason.HOST_ERROR, message=message, retryable=True)
        except Exception as error:
            _raise_if_exhausted(error)
            _raise_if_full(error, claim, timeline, self._launcher.state_dir)
            # A bug in Swarm must not leave a ticket without an end, nor stop an engine that other tickets need.
            message = files.named(error) or f"unexpected {type(error).__name__}: {error}"
            log.error(message, ticket=claim.ticket.id)
            log.debug("where", exc_info=True)
            return Failed(reason=FailureReason.HOST_ERROR, message=message, retryable=True)
        finally:
            timeline.mark("stopped")

    async def _run(self, claim: Claim, watcher: Watcher, timeline: Timeline, tail: _OutputTail) -> Succeeded:
        if self._installed is not None:
            claim = replace(claim, agent=await self._installed.here(claim.agent))
        agent = claim.agent
        given, places = await self._values.input_json(claim)  # checked before a VM is started
        grant = await self._egress.grant(claim)
        async with (
            self._egress.attempt(grant, watcher.record) as egress,
            await self._vm(claim, watcher, timeline) as live,
        ):
            try:
                await watcher.placed(live.n)
                await egress.open(lambda port: self._launcher.listen(live, port))
                tail.redactor = egress.redactor
                timeline.mark("renewed")
                if claim.source is not None:
                    await clear(live)
                await live.while_alive(_send_files(live, agent, given))
                if places:
                    await live.while_alive(ticket_files.send(live.channel, self._files, claim.ticket.id, places))
                timeline.mark("sent")
                try:
                    ended = await live.while_alive(self._run_within_budget(claim, live, tail, egress, timeline))
                except AgentTimeout:
                    timeline.cut()
                    with contextlib.suppress(SwarmError):  # why it was stopped matters more
                        await live.while_alive(self._keep_files(claim, live, watcher))
                    raise
                timeline.mark("ended", int(ended.ended_at * 1e9))
                left = await live.while_alive(self._keep_files(claim, live, watcher)) if ended.out else None
                check_exit(ended)
                made = await live.while_alive(self._collect(live))
                outputs = await self._values.outputs(
                    agent,
                    made,
                    egress.redacted,
                    self._limits.output_json_bytes,
                    {ticket_files.OUT: left.digest} if left is not None else {},
                )
                timeline.mark("collected")
                left_vm = await self._keeper.leave(claim, live) if self._keeper is not None else None
                await self._keep_vm(claim, live, watcher, failed=egress.over_budget is not None)
            except StepError as error:
                if not isinstance(error, OutcomeUnknown):
                    await self._keep_vm(claim, live, watcher, failed=True)
                if (reason := egress.over_budget) is not None:  # the cause of any later failure of the agent
                    raise OverBudget(reason) from None
                raise
            finally:
                egress.stop()
                if frames := await self._launcher.refused(live):
                    watcher.record("egress", {"via": "tap", "refused": "source", "frames": frames})
        if (reason := egress.over_budget) is not None:
            raise OverBudget(reason, outputs=outputs)
        return Succeeded(outputs=outputs, snapshot_id=left_vm)

    async def _vm(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> AbstractAsyncContextManager[LiveVm]:
        """The VM of its agent's own, or a fork of the one that another step left."""
        agent, assignment = claim.agent, Assignment(ticket_id=claim.ticket.id, attempt_id=claim.attempt_id)
        if self._keeper is not None and (source := await self._keeper.source(claim)) is not None:
            return self._launcher.restored(source, assignment, timeline, fork=True)
        image = await self._image(agent)
        spec = vm_spec(agent, image, await self._layers.find(agent, image))
        return self._launcher.vm(
            spec,
            assignment,
            timeline,
            on_build=lambda seconds: watcher.record("template", {"about_seconds": seconds}),
        )

    async def _keep_vm(self, claim: Claim, live: LiveVm, watcher: Watcher, *, failed: bool) -> None:
        if self._keeper is not None and (told := await self._keeper.keep(claim, live, failed=failed)) is not None:
            watcher.record(EVENT, told)

    async def _image(self, agent: Agent) -> Image:
        try:
            return await self._images.find(agent.image)
        except (ImageError, NotFound) as error:
            if agent.image is None:
                raise NoImage(str(error)) from error
            raise

    async def _run_within_budget(
        self, claim: Claim, live: LiveVm, tail: _OutputTail, egress: AttemptEgress, timeline: Timeline
    ) -> Exit:
        """The agent sees its call refused by the budget, and gets a moment to end by itself."""

        async def over_budget() -> Exit:
            reason = await egress.exceeded()
            await asyncio.sleep(self.over_budget_seconds)
            raise OverBudget(reason)

        try:
            return await first(self._run_agent(claim, live, tail, egress.env, timeline), over_budget())
        finally:
            tail.end()

    async def _run_agent(
        self, claim: Claim, live: LiveVm, tail: _OutputTail, env: Mapping[str, str], timeline: Timeline
    ) -> Exit:
        agent, root = claim.agent, live.spec.layer.root if live.spec.layer else None
        argv, cwd = guest_program(agent, root)
        try:
            return await live.channel.run(
                argv,
                cwd=cwd,
                env={"TRACEPARENT": _traceparent(claim), **agent.env, **env},
                warm=agent.runtime == "python" and root is None,
                timeout_seconds=claim.timeout_seconds,
                idle_timeout_seconds=agent.idle_timeout_seconds,
                on_start=lambda: timeline.mark("started"),
                on_output=tail.add,
                ready=tail.ready,
                max_output_bytes=self._limits.printed_bytes,
                leaves=claim.is_source,
            )
        except GuestSilent as error:
            why = await self._launcher.why_silent(live)
            raise AgentTimeout(f"the agent {agent.name!r} was stopped: {error}: {why}") from error
        except AgentTimeout as error:
            raise AgentTimeout(f"the agent {agent.name!r} was stopped: {error}") from error

    async def _keep_files(self, claim: Claim, live: LiveVm, watcher: Watcher) -> Left | None:
        """What the agent left in /work/out, also if it failed."""
        if self._files is None:
            return None
        left = await ticket_files.collect(
            live.channel,
            self._files,
            claim.ticket.id,
            limit_bytes=self._limits.files_bytes,
            scratch=self._launcher.state_dir,
        )
        if left is not None:
            watcher.record("files", left.event)
        return left

    async def _collect(self, live: LiveVm) -> bytes:
        data = await live.channel.get(f"{WORK_DIR}/{OUTPUT_FILE}", limit_bytes=self._limits.output_json_bytes)
        if data is None:
            raise OutputInvalid(
                f"the agent ended with status 0 but left no {OUTPUT_FILE} in its work directory",
                reason=FailureReason.NO_OUTPUT,
            )
        return data


def vm_spec(agent: Agent, image: Image, layer: Layer | None) -> VmSpec:
    """The VM that an agent's programs run in."""
    return VmSpec(
        image=image,
        layer=layer,
        vcpus=agent.vcpus,
        memory_mb=agent.memory_mb,
        disk_mb=agent.disk_mb,
        disk_mb_per_second=agent.disk_mb_per_second,
        network_mb_per_second=agent.network_mb_per_second,
        preload=agent.preload if agent.runtime == "python" else (),
        interpreter=agent.runtime == "python" and layer is not None and layer.root is not None,
    )


class BadExit(AgentFailed):
    """The agent ended with a status other than 0, or by a signal (``exit_code`` None)."""

    def __init__(self, message: str, *, exit_code: int | None, reason: FailureReason) -> None:
        super().__init__(message, reason=reason)
        self.exit_code = exit_code


def check_exit(ended: Exit) -> None:
    """Raise BadExit unless the agent ended with status 0."""
    if ended.oom:
        raise BadExit(
            f"the agent ran out of memory: the guest's kernel killed it (peak {ended.max_rss_kb >> 10} MB in one "
            "process); give the agent more with memory_mb",
            exit_code=ended.code,
            reason=FailureReason.OUT_OF_MEMORY,
        )
    if ended.code == 0:
        return
    how = how_it_ended(ended.code if ended.code is not None else -(ended.signal or 0))
    if ended.code is not None and ended.code - _BY_SIGNAL in signal.valid_signals():
        how += f", by which shells mean {signal_name(ended.code - _BY_SIGNAL)}"
    raise BadExit(f"the agent {how}", exit_code=ended.code, reason=FailureReason.AGENT_FAILED)


def guest_program(agent: Agent, root: Root | None) -> tuple[list[str], str]:
    """Argv and directory in the guest: a relative program is a file of the agent. In an image's root it is run by the
    image's own Python, and without an entry it is the image's program, in the image's directory if it names one."""
    if root and not agent.entry:
        return list(root.entry), root.cwd if root.cwd != "/" else WORK_DIR
    program, *arguments = agent.entry
    interpreter = [root.python] if root and agent.runtime == "python" else []
    return [*interpreter, program if program.startswith("/") else f"{AGENT_DIR}/{program}", *arguments], WORK_DIR


def _raise_if_exhausted(error: Exception) -> None:
    """Raise HostError if the error is caused by a host that is out of descriptors, memory or threads."""
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in _HOST_EXHAUSTED) or no_more_threads(cause):
            raise HostError(f"this host can't go on running tickets: {error}") from error
        cause = cause.__cause__


def _raise_if_full(error: BaseException, claim: Claim, timeline: Timeline, place: Path) -> None:
    """Raise NoSpace if the error is caused by a full disk of the host (or another limit that it calls so).

    A program that could not write does not always say so. Until the agent starts, a full disk at ``place``, where the
    files of VMs are, is reason enough."""
    cause: BaseException | None = error
    full = "sent" not in timeline and files.has_no_room(place)
    while cause is not None and claim.attempt_number < _FULL_TRIES:
        if isinstance(cause, NoSpace):
            raise NoSpace(str(error)) from error
        full = full or files.is_full(cause)
        cause = cause.__cause__
    if full and claim.attempt_number < _FULL_TRIES:
        raise NoSpace(files.no_space(place, str(error))) from error


async def _send_files(live: LiveVm, agent: Agent, given: bytes) -> None:
    """Send the agent's files and its input together, in one round trip."""
    await asyncio.gather(
        live.channel.put_tree(Path(agent.path), dest=AGENT_DIR, owner="root"),
        live.channel.put({INPUT_FILE: given}, dest=WORK_DIR, owner="agent"),
    )


class _OutputTail:
    """Redacts output, passes it on, and keeps its last part for an error message."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._last: deque[bytes] = deque()
        self._size = 0
        self.redactor = Redactor({})  # set before the agent starts
        self._streams: dict[str, Stream] = {}

    def add(self, stream: str, data: bytes) -> None:
        if self.redactor:
            if stream not in self._streams:
                self._streams[stream] = self.redactor.stream()
            data = self._streams[stream].feed(data)
        if data:
            self._pass_on(stream, data)

    async def ready(self) -> None:
        await self._watcher.ready()

    def end(self) -> None:
        """The agent has ended: what was held back is not the start of a secret."""
        for stream, held in self._streams.items():
            if rest := held.end():
                self._pass_on(stream, rest)

    def _pass_on(self, stream: str, data: bytes) -> None:
        self._watcher.output(stream, data)
        self._last.append(data)
        self._size += len(data)
        while self._size - len(self._last[0]) >= _QUOTED_BYTES:
            self._size -= len(self._last.popleft())

    def quoted(self) -> str:
        lines = printable(b"".join(self._last)[-_QUOTED_BYTES:]).split("\n")
        return "\n".join(f"  {line}" for line in [line for line in lines if line.strip()][-_QUOTED_LINES:])


def _traceparent(claim: Claim) -> str:
    """So that what the agent traces belongs to its attempt."""
    return trace.traceparent(claim.ticket.id, claim.ticket.trigger_data, claim.attempt_id)
