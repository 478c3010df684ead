"""What is done in a sandbox: commands and processes. Whatever is asked of a paused one resumes it first.

A command by POST ends with its request: when the client goes away, it is killed. What needs a stream both ways is in
`swarm.api.sockets`, files in guest_files.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator
from starlette.responses import Response, StreamingResponse

from swarm.admin import sandboxes
from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.api.v1.sandboxes import Text, forbidden, usable_sandbox, while_wanted
from swarm.base.aio import cancel_all, first
from swarm.channel import processes
from swarm.channel.frames import MAX_PAYLOAD_BYTES, MAX_WORD_BYTES
from swarm.channel.processes import Listed, Order, Process
from swarm.errors import ChannelError, UsageError
from swarm.fields import NO_NUL, Variable, bounded
from swarm.live.client import Live
from swarm.model import Role

MAX_OUTPUT_BYTES: Final = 16 << 20  # of each stream, in one answer
MAX_EXEC_BYTES: Final = 8 << 20  # of a request
PROCESS: Final = r"^[a-z0-9-]{1,64}$"
_USUAL_OUTPUT_BYTES: Final = 1 << 20
_PIECE_BYTES: Final = 1 << 20
Word = Annotated[str, Field(max_length=MAX_WORD_BYTES, pattern=NO_NUL)]


class Command(Fields):
    """``process``: its name in the guest; by default a new one. With ``background`` it outlives the request."""

    argv: Annotated[tuple[Word, ...], Field(min_length=1, max_length=1000)]
    env: Annotated[dict[Variable, Text], Field(max_length=100)] = Field(default_factory=dict)
    cwd: Text | None = Field(default=None, description="default: /work")
    user: Literal["agent", "root"] = "agent"
    timeout_seconds: float | None = bounded("timeout_seconds", None, description="then all that it started is killed")
    background: bool = False
    process: str | None = Field(default=None, pattern=PROCESS)


class Exec(Command):
    """``stdin`` as text, or ``stdin_base64``."""

    stdin: str | None = Field(default=None, max_length=4 << 20)
    stdin_base64: Annotated[str, Field(max_length=6 << 20)] | None = None
    max_output_bytes: int = Field(
        default=1 << 20, ge=0, le=MAX_OUTPUT_BYTES, description="of each stream; more is lost"
    )
    encoding: Literal["utf-8", "base64"] = Field(default="utf-8", description="of `stdout` and `stderr` in the answer")

    @model_validator(mode="after")
    def _one_stdin(self) -> Self:
        if self.stdin is not None and self.stdin_base64 is not None:
            raise ValueError("give `stdin` or `stdin_base64`, not both")
        return self


class Signal(Fields):
    signal: str = Field(default="TERM", pattern=r"^[A-Z0-9]{2,10}$", description="such as INT, TERM, KILL")
    all: bool = Field(default=True, description="to all that it started, too")


class OutputQuery(Fields):
    after: int | None = Field(default=None, ge=0, lt=1 << 63, description="what it wrote before this byte is known")
    follow: bool = Field(default=False, description="go on until it has ended")
    lines: bool = Field(default=False, description="lines of JSON: each piece with its stream, at last how it ended")


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """How a command ended; of `code` and `signal`, one is set. One in the background runs on, and has neither.
    ``dropped_bytes``: of its output, beyond the limit."""

    process: str
    code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    oom: bool = False
    cpu_ms: int = 0
    max_rss_kb: int = 0
    ms: float = 0.0
    stdout: str = ""
    stderr: str = ""
    dropped_bytes: int = 0


def order_of(given: Command, *, pty: tuple[int, int] | None = None, open_stdin: bool = False) -> Order:
    return Order(
        process=given.process or f"api-{secrets.token_hex(6)}",
        argv=given.argv,
        env=given.env,
        cwd=given.cwd,
        user=given.user,
        pty=pty,
        timeout_seconds=given.timeout_seconds,
        background=given.background,
        open_stdin=open_stdin,
    )


async def live_of(call: Call) -> Live:
    """The way to the sandbox that the path names, which runs then. Raises Refused, NotFound, Conflict."""
    row = await usable_sandbox(call)
    reaching = sandboxes.reach(call.store, row.id, by=call.actor.name)
    if call.request.scope.get("method") in ("GET", "DELETE", "POST"):
        return await while_wanted(call, reaching)
    return await first(reaching, forbidden(call))  # what is to be read of an upload, or a socket, is not read here


async def begun(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same, of which the first part is there: what goes wrong before it is an answer of its own."""
    head = await anext(parts, b"")

    async def all_of_them() -> AsyncIterator[bytes]:
        yield head
        async for part in parts:
            yield part

    return all_of_them()


# --- commands ---------------------------------------------------------------------------------------------------------


async def exec_command(call: Call) -> Executed:
    given: Exec = call.body

    live = await live_of(call)
    if given.max_output_bytes <= _USUAL_OUTPUT_BYTES:
        return await while_wanted(call, _executed(live, given))
    with call.context.outgoing.kept(2 * given.max_output_bytes):
        return await while_wanted(call, _executed(live, given))


async def _executed(live: Live, given: Exec) -> Executed:
    stdin = _decoded(given.stdin_base64) if given.stdin_base64 is not None else (given.stdin or "").encode()
    if given.background and len(stdin) > MAX_PAYLOAD_BYTES:
        raise UsageError("a command in the background takes at most 1 MiB of stdin ahead: write a file that it reads")
    ahead = stdin if given.background else b""  # whoever leaves at once can't know what of the rest arrives
    order = replace(order_of(given, open_stdin=bool(stdin) and not ahead), stdin=ahead)
    kept = _Kept(given.max_output_bytes)
    async with processes.start(live.open, order) as process:
        if given.background:
            return Executed(process=order.process)
        feeding = asyncio.create_task(_feed(process, stdin))
        try:
            async for stream, data in process:
                kept.add(stream, data)
            ended = await process.exit()
        finally:
            await cancel_all([feeding])
    return Executed(
        process=order.process,
        code=ended.code,
        signal=ended.signal,
        timed_out=ended.timed_out,
        oom=ended.oom,
        cpu_ms=ended.cpu_ms,
        max_rss_kb=ended.max_rss_kb,
        ms=max(0, ended.ended_ns - ended.started_ns) / 1e6,
        stdout=await asyncio.to_thread(_text, kept.streams["stdout"], given.encoding),
        stderr=await asyncio.to_thread(_text, kept.streams["stderr"], given.encoding),
        dropped_bytes=kept.dropped_bytes + ended.dropped_bytes,
    )


async def _feed(process: Process, stdin: bytes) -> None:
    """It may end without having read all of it."""
    if stdin:
        with suppress(ChannelError):
            await process.write(stdin)
            await process.close_stdin()


class _Kept:
    """The first bytes of each stream."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.streams = {name: bytearray() for name in processes.STREAMS}
        self.dropped_bytes = 0

    def add(self, stream: str, data: bytes) -> None:
        kept = self.streams[stream]
        room = self._most - len(kept)
        kept += data[:room]
        self.dropped_bytes += max(0, len(data) - room)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UsageError("stdin_base64 is not base64") from None


def _text(data: bytes | bytearray, encoding: str) -> str:
    return base64.b64encode(data).decode() if encoding == "base64" else data.decode(errors="replace")


# --- processes --------------------------------------------------------------------------------------------------------


async def list_processes(call: Call) -> list[Listed]:
    return await processes.processes((await live_of(call)).open)


async def signal_process(call: Call) -> None:
    given: Signal = call.body
    live = await live_of(call)
    await processes.signal(live.open, call.path["process"], given.signal, descendants=given.all)


async def show_process_output(call: Call) -> Response:
    """stdout and stderr as they came; of older output, the guest keeps the end. ``lines``: each piece with its stream
    and the ``offset`` behind it, which is the next ``after``; before them, how much is gone."""
    query: OutputQuery = call.query
    live = await live_of(call)
    name = call.path["process"]
    known = None
    if not query.follow:
        known = next((one.output_bytes for one in await processes.processes(live.open) if one.process == name), 0)

    async def output() -> AsyncIterator[bytes]:
        async with processes.attach(live.open, name, after=query.after) as process:
            if known is not None and known <= (query.after or 0):
                return
            dropped = False
            async for stream, data in process:
                if query.lines and process.dropped_bytes and not dropped:
                    dropped = True
                    yield _line({"dropped_bytes": process.dropped_bytes})
                text = base64.b64encode(data).decode()
                about = {"stream": stream, "offset": process.output_bytes, "data": text}
                yield _line(about) if query.lines else data
                if known is not None and process.output_bytes >= known:
                    return
            if query.lines:
                yield _line({"exit": asdict(await process.exit())})

    headers = {"cache-control": "no-store"}
    return StreamingResponse(await begun(output()), media_type="application/octet-stream", headers=headers)


def _line(said: Mapping[str, object]) -> bytes:
    return json.dumps(said, separators=(",", ":")).encode() + b"\n"


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="POST",
        path="/v1/sandboxes/{id}/exec",
        role=Role.OPERATOR,
        summary="Run a command in a sandbox to its end, and answer with its output",
        handler=exec_command,
        body=Exec,
        max_body_bytes=MAX_EXEC_BYTES,
        answer=Executed,
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/processes",
        role=Role.OPERATOR,
        summary="List what runs in a sandbox, and the last that have ended, with their status",
        handler=list_processes,
        answer=list[Listed],
    ),
    Endpoint(
        method="POST",
        path="/v1/sandboxes/{id}/processes/{process}/signal",
        role=Role.OPERATOR,
        summary="Send a signal to a process of a sandbox",
        handler=signal_process,
        body=Signal,
    ),
    Endpoint(
        method="GET",
        path="/v1/sandboxes/{id}/processes/{process}/output",
        role=Role.OPERATOR,
        summary="What a process of a sandbox has written; with `follow`, until it has ended",
        handler=show_process_output,
        query=OutputQuery,
        media_type="application/octet-stream",
    ),
)
