"""One claim → one Outcome: get a VM, run the agent in it, collect what it left.

Outcomes are returned, faults are raised below, and this is the one place that turns the latter into the former. The
engine knows nothing of the database and nothing of drivers.
"""

from __future__ import annotations

import asyncio
import errno
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from swarm.agents import check
from swarm.base import jsontext
from swarm.base.clock import Timeline
from swarm.base.redact import Redactor, Stream
from swarm.channel import Exit
from swarm.engine.egress import AttemptEgress, Egress
from swarm.errors import (
    AgentFailed,
    AgentTimeout,
    HostError,
    ImageError,
    LeaseLost,
    NoImage,
    NotFound,
    OutputInvalid,
    OverBudget,
    StepError,
    SwarmError,
    UsageError,
    no_more_threads,
)
from swarm.model import Agent, Claim, Failed, FailureReason, Outcome, Succeeded
from swarm.vm.driver import Image, Layer, VmSpec
from swarm.vm.drivers.console import printable
from swarm.vm.launcher import Assignment, Launcher, LiveVm

log = structlog.get_logger(__name__)

WORK_DIR, AGENT_DIR = "/work", "/agent"
INPUT_FILE, OUTPUT_FILE = "input.json", "output.json"
# How long an agent may go on after a budget has refused it a call.
_OVER_BUDGET_SECONDS = 5.0
# What an error quotes of the agent's output.
_QUOTED_LINES, _QUOTED_BYTES = 15, 4096
# What the next ticket would lack as well.
_HOST_IS_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
# Of an output.json: each takes some hundred bytes of memory, and as little as three in the file.
MAX_CONTAINERS = 1_000_000


class Watcher(Protocol):
    """Whoever wants to know how an attempt is doing while it runs."""

    async def placed(self, vm_id: int) -> None:
        """The attempt has VM ``vm_id``. May raise LeaseLost, which ends the attempt."""

    def record(self, kind: str, data: Mapping[str, object]) -> None:
        """Something happened that belongs into the ticket's history. Must not block."""

    def output(self, stream: str, data: bytes) -> None:
        """The agent printed ``data`` on ``stream`` ('stdout', 'stderr', or 'swarm' for a note). Must not block."""


class ImageSource(Protocol):
    async def find(self, ref: str | None = None) -> Image: ...


class LayerSource(Protocol):
    async def find(self, agent: Agent, image: Image) -> Layer | None:
        """Raises LayerMissing: nothing is built while a ticket waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one attempt may cost the host, whatever its agent says."""

    output_json_bytes: int = 16 << 20
    printed_bytes: int = 64 << 20


class Engine:
    def __init__(
        self, *, launcher: Launcher, images: ImageSource, layers: LayerSource, limits: Limits, egress: Egress
    ) -> None:
        self._launcher = launcher
        self._images = images
        self._layers = layers
        self._egress = egress
        self._limits = limits

    async def execute(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> Outcome:
        """Run one attempt to its end. Returns Succeeded or Failed; LeaseLost and cancellation pass through; a host
        without descriptors, memory or threads is an error (HostError, StepError), and so is one without an image
        for agents that ask for none (NoImage). The VM is gone in every case."""
        tail = _Tail(watcher)
        try:
            return Succeeded(outputs=await self._run(claim, watcher, timeline, tail))
        except StepError as error:
            if _is_host_out(error):
                raise
            message = tail.redactor.text(str(error))
            if quoted := tail.quoted():
                message += f"\nThe last that it printed:\n{quoted}"
            code = error.exit_code if isinstance(error, BadExit) else None
            return Failed(reason=error.reason, message=message, retryable=error.retryable, exit_code=code)
        except LeaseLost:
            raise
        except UsageError as error:  # the agent's files, arguments or environment can't be sent
            return Failed(reason=FailureReason.INPUT_INVALID, message=f"the agent {claim.agent.name!r}: {error}")
        except NoImage:
            raise
        except (ImageError, NotFound) as error:  # what this agent asks for by name
            return Failed(reason=FailureReason.HOST_ERROR, message=str(error))
        except SwarmError as error:
            if _is_host_out(error):
                raise
            return Failed(reason=FailureReason.HOST_ERROR, message=str(error), retryable=True)
        except MemoryError:
            # Of this process, where a limit is set: perhaps by what this one agent left. Counted as a try, then, so
            # that such a ticket can't end one engine after the other.
            message = "the engine ran out of memory while it ran this ticket"
            log.error(message, ticket=claim.ticket.id)
            return Failed(reason=FailureReason.HOST_ERROR, message=message, retryable=True)
        except Exception as error:
            if _is_host_out(error):
                raise HostError(f"this host can't go on running tickets: {error}") from error
            # A mistake of ours must leave no ticket without an end, nor stop an engine that others need.
            message = f"unexpected {type(error).__name__}: {error}"
            log.error(message, ticket=claim.ticket.id)
            log.debug("where", exc_info=True)
            return Failed(reason=FailureReason.HOST_ERROR, message=message, retryable=True)
        finally:
            timeline.mark("stopped")

    async def _run(self, claim: Claim, watcher: Watcher, timeline: Timeline, tail: _Tail) -> str:
        agent = claim.agent
        given = _inputs(claim)  # before a VM is started for them
        permit = await self._egress.permit(claim)
        image = await self._image(agent)
        spec = VmSpec(
            image=image,
            layer=await self._layers.find(agent, image),
            vcpus=agent.vcpus,
            memory_mb=agent.memory_mb,
            disk_mb=agent.disk_mb,
            disk_mb_per_second=agent.disk_mb_per_second,
            network_mb_per_second=agent.network_mb_per_second,
            preload=agent.preload if agent.runtime == "python" else (),
        )
        assignment = Assignment(ticket_id=claim.ticket.id, attempt_id=claim.attempt_id)
        async with (
            self._egress.reach(permit, watcher.record) as reach,
            self._launcher.vm(spec, assignment, timeline) as live,
        ):
            try:
                await watcher.placed(live.n)
                await reach.open(lambda port: self._launcher.listen(live, port))
                tail.redact(reach.redactor)
                await live.unless_it_dies(_put(live, claim, given))
                timeline.mark("renewed")
                ended = await live.unless_it_dies(self._within_budget(claim, live, tail, reach))
                timeline.mark("started", int(ended.started_at * 1e9))
                timeline.mark("ended", int(ended.ended_at * 1e9))
                judge(ended)
                outputs = _redacted(await live.unless_it_dies(self._collect(live)), reach.redactor)
                _check_outputs(agent, outputs)
                timeline.mark("collected")
            except StepError:
                if (sums := reach.over_budget) is not None:  # whatever became of the agent, that is why
                    raise OverBudget(sums) from None
                raise
            finally:
                reach.shut()
                if frames := await self._launcher.refused(live):
                    watcher.record("egress", {"via": "tap", "refused": "source", "frames": frames})
        if (sums := reach.over_budget) is not None:
            raise OverBudget(sums)
        return outputs

    async def _image(self, agent: Agent) -> Image:
        try:
            return await self._images.find(agent.image)
        except (ImageError, NotFound) as error:
            if agent.image is None:
                raise NoImage(str(error)) from error
            raise

    async def _within_budget(self, claim: Claim, live: LiveVm, tail: _Tail, reach: AttemptEgress) -> Exit:
        """An agent whose call a budget refused is told so, and gets a moment to end by itself."""

        async def told() -> None:
            await reach.exceeded()
            await asyncio.sleep(_OVER_BUDGET_SECONDS)

        agent = asyncio.ensure_future(self._start(claim, live, tail, reach.env))
        over = asyncio.ensure_future(told())
        try:
            await asyncio.wait({agent, over}, return_when=asyncio.FIRST_COMPLETED)
            if not agent.done():
                raise OverBudget(reach.over_budget or "over budget")
            return agent.result()
        finally:
            for each in (agent, over):
                each.cancel()
            await asyncio.gather(agent, over, return_exceptions=True)
            tail.end()

    async def _start(self, claim: Claim, live: LiveVm, tail: _Tail, env: Mapping[str, str]) -> Exit:
        agent = claim.agent
        try:
            return await live.channel.run(
                entry(agent),
                env={**agent.env, **env},
                warm=agent.runtime == "python",
                timeout_seconds=claim.timeout_seconds,
                idle_timeout_seconds=agent.idle_timeout_seconds,
                on_output=tail.add,
                max_output_bytes=self._limits.printed_bytes,
            )
        except AgentTimeout as error:
            raise AgentTimeout(f"the agent {agent.name!r} was stopped: {error}") from error

    async def _collect(self, live: LiveVm) -> str:
        data = await live.channel.get(f"{WORK_DIR}/{OUTPUT_FILE}", limit_bytes=self._limits.output_json_bytes)
        if data is None:
            raise OutputInvalid(
                f"the agent ended with status 0 but left no {OUTPUT_FILE} in its work directory",
                reason=FailureReason.NO_OUTPUT,
            )
        return canonical_json(data)


class BadExit(AgentFailed):
    """The agent ended with a status other than 0, or by a signal (``exit_code`` None)."""

    def __init__(self, message: str, *, exit_code: int | None, reason: FailureReason) -> None:
        super().__init__(message, reason=reason)
        self.exit_code = exit_code


def judge(ended: Exit) -> None:
    """Only an exit status of 0 is success. Raises BadExit."""
    if ended.oom:
        raise BadExit(
            f"the agent ran out of memory: the guest's kernel killed it (peak {ended.max_rss_kb >> 10} MB in one "
            "process); give the agent more with memory_mb",
            exit_code=ended.code,
            reason=FailureReason.OUT_OF_MEMORY,
        )
    if ended.signal is not None:
        raise BadExit(
            f"the agent was killed by signal {ended.signal}", exit_code=None, reason=FailureReason.AGENT_FAILED
        )
    if ended.code != 0:
        raise BadExit(
            f"the agent ended with status {ended.code}", exit_code=ended.code, reason=FailureReason.AGENT_FAILED
        )


def entry(agent: Agent) -> list[str]:
    """Argv in the guest: a relative first word names a file of the agent's."""
    program, *arguments = agent.entry
    return [program if program.startswith("/") else f"{AGENT_DIR}/{program}", *arguments]


def _inputs(claim: Claim) -> Any:
    """The step's inputs, with the defaults of its agent's schema. Raises StepError (INPUT_INVALID)."""
    return check.inputs(claim.agent, json.loads(claim.inputs))


def _redacted(outputs: str, redactor: Redactor) -> str:
    """JSON text without the secrets that its agent was given."""
    if not redactor:
        return outputs
    value = json.loads(outputs)
    clean = redactor.value(value)
    return outputs if clean == value else canonical_json(json.dumps(clean).encode())


def _check_outputs(agent: Agent, outputs: str) -> None:
    """Raises OutputInvalid when they don't fit the agent's schema."""
    if agent.outputs_schema is not None:
        check.outputs(agent, json.loads(outputs))


def input_json(claim: Claim, inputs: Any) -> bytes:
    """What the agent finds as input.json."""
    ticket = claim.ticket
    document = {
        "inputs": inputs,
        "ticket": {
            "id": ticket.id,
            "title": ticket.title,
            "description": ticket.description,
            "project_id": ticket.project_id,
        },
        "step": {"id": claim.step_id, "attempt": claim.attempt_number},
    }
    return json.dumps(document).encode()  # ASCII: every text arrives as it is, a lone surrogate too


def canonical_json(data: bytes) -> str:
    """An agent's output.json as compact JSON text. Raises OutputInvalid."""
    if data.count(b"{") + data.count(b"[") > MAX_CONTAINERS:
        raise OutputInvalid(f"{OUTPUT_FILE} has more than {MAX_CONTAINERS:,} objects and lists")
    try:
        value = jsontext.loads(data.decode())
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        # A lone surrogate ("\\ud800") is JSON, but no text that a database takes: then it stays escaped.
        return compact if _encodable(compact) else json.dumps(value, separators=(",", ":"), allow_nan=False)
    except UnicodeDecodeError as error:
        raise OutputInvalid(f"{OUTPUT_FILE} is not UTF-8: {error}") from None
    except jsontext.TooDeep as error:
        raise OutputInvalid(f"{OUTPUT_FILE} is {error}") from None
    except ValueError as error:
        raise OutputInvalid(f"{OUTPUT_FILE} is not JSON: {error}") from None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_host_out(error: BaseException | None) -> bool:
    """Is the host out of descriptors, memory or threads, at the bottom of this?"""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _HOST_IS_OUT_OF:
            return True
        if no_more_threads(error):
            return True
        error = error.__cause__
    return False


async def _put(live: LiveVm, claim: Claim, inputs: Any) -> None:
    """The agent's files and its input; sent together, one round trip."""
    given = {INPUT_FILE: input_json(claim, inputs)}
    await asyncio.gather(
        live.channel.put_tree(Path(claim.agent.path), dest=AGENT_DIR, owner="root"),
        live.channel.put(given, dest=WORK_DIR, owner="agent"),
    )


class _Tail:
    """Passes output on and remembers its end, for an error message."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._last: deque[bytes] = deque()
        self._size = 0
        self.redactor = Redactor({})
        self._streams: dict[str, Stream] = {}

    def redact(self, redactor: Redactor) -> None:
        self.redactor = redactor

    def add(self, stream: str, data: bytes) -> None:
        if self.redactor:
            if stream not in self._streams:
                self._streams[stream] = self.redactor.stream()
            data = self._streams[stream].feed(data)
        if data:
            self._pass_on(stream, data)

    def end(self) -> None:
        """The agent has ended: what was held back was no secret."""
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
