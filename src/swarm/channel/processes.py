"""Programs in a guest, any number at once: start, feed, hear, signal, list them, and come back to them.

All of it works over any `Open`. What a guest says is checked; it may lie about its own programs, but not make the host
keep more than a few megabytes of what it says.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from swarm.channel.conversation import Conversation, Open
from swarm.channel.frames import MAX_PAYLOAD_BYTES, Frame, printable
from swarm.channel.values import code_and_signal
from swarm.errors import ChannelError, GuestRefused, UsageError

SCROLLBACK_BYTES: Final = 256 << 10  # of a program's output are kept by the guest
_WINDOW_BYTES: Final = 256 << 10  # of input that may be on the way to the program; agentd's WINDOW
_PIECE_BYTES: Final = 64 << 10
_MAX_PARTS: Final = 32  # of output that wait here: 2 MiB as agentd sends it
_GRACE_SECONDS: Final = 25.0  # what agentd may need to kill and reap a program after its time is up
_MAX_LATE_BYTES: Final = 32 << 20  # of output that come after that: more than all buffers on the way hold
_MAX_LIST_BYTES: Final = 4 << 20
_MAX_LISTED: Final = 1000
STREAMS: Final = ("stdout", "stderr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A program to run. ``cwd``: the user's home directory, or below it, if not absolute. ``pty``: columns
    and rows of a terminal, where stdout and stderr are one. ``stdin``: what it reads first (at most 1 MiB); with
    ``open_stdin``, or in a terminal, `Process.write` sends more. ``background``: it outlives the conversation.
    ``process``: its name, 1 to 64 of a-z, 0-9 and '-'."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str = "agent"
    pty: tuple[int, int] | None = None
    timeout_seconds: float | None = None
    background: bool = False
    stdin: bytes = b""
    open_stdin: bool = False
    process: str = field(default_factory=lambda: secrets.token_hex(6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a program ended. One of ``code`` and ``signal`` is set. ``started_ns`` and ``ended_ns`` are the guest's
    CLOCK_MONOTONIC. ``dropped_bytes``: of its output, were gone before they could be sent to this conversation."""

    code: int | None
    signal: int | None
    timed_out: bool
    oom: bool
    cpu_ms: int
    max_rss_kb: int
    started_ns: int
    ended_ns: int
    dropped_bytes: int = 0

    @property
    def status(self) -> int:
        """As a shell says it: 124 after a time-out, 128 + n after signal n."""
        if self.timed_out:
            return 124
        return self.code if self.code is not None else 128 + (self.signal or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A program that runs in a guest, or one of the last hundred that have ended (``ended`` says how)."""

    process: str
    argv: tuple[str, ...]  # may be cut
    user: str
    pid: int
    background: bool
    pty: bool
    attached: int  # conversations that listen to it
    output_bytes: int
    running_seconds: float  # until now, or its end
    ended: Ended | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A program's whole output and its end. ``truncated``: it wrote more than was wanted, which was dropped."""

    stdout: bytes
    stderr: bytes
    ended: Ended
    truncated: bool


class Process:
    """A program that runs in a guest. Iterate over it for its output, (stream, data) as they come, then `exit`.

    While nobody iterates, a little output waits here and the program blocks in its own write; so whoever writes more
    than a pipe holds must let somebody iterate meanwhile.
    """

    def __init__(
        self,
        conversation: Conversation,
        name: str,
        *,
        pty: bool,
        sent_bytes: int = 0,
        writes: bool,
        limit_seconds: float | None = None,
    ) -> None:
        self.name = name
        self.pid = 0
        self.dropped_bytes = 0  # of its output, before what is heard
        self.output_bytes = 0  # all that it has written until what came last; for `attach(after=…)`
        self._heard_bytes = 0
        self._conversation = conversation
        self._pty = pty
        self._writes = writes
        self._sent = sent_bytes
        self._taken = 0
        self._limit_seconds = limit_seconds  # of waiting for the guest: what whoever listens takes is not counted
        self._waited = 0.0
        self._began = asyncio.get_running_loop().time()
        self._late_bytes = 0
        self._parts: asyncio.Queue[tuple[str, bytes, int] | None] = asyncio.Queue(_MAX_PARTS)
        self._changed = asyncio.Condition()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()

    def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        return self._output()

    async def _output(self) -> AsyncIterator[tuple[str, bytes]]:
        while (part := await self._parts.get()) is not None:
            stream, data, self.output_bytes = part
            yield stream, data
        self._parts.put_nowait(None)  # for whoever iterates again
        if (error := self._ended.exception()) is not None:
            raise error

    async def write(self, data: bytes) -> None:
        """Send input. Waits while the program takes none. After its end, or when it reads no more, input is dropped."""
        if not self._writes:
            raise UsageError(f"the input of the process {self.name} is not open")
        for at in range(0, len(data), _PIECE_BYTES):
            async with self._changed:
                await self._changed.wait_for(lambda: self._ended.done() or self._sent - self._taken < _WINDOW_BYTES)
            if self._ended.done():
                return
            piece = data[at : at + _PIECE_BYTES]
            self._sent += len(piece)
            await self._conversation.send({"op": "stdin"}, piece)

    async def close_stdin(self) -> None:
        """The end of its input (Ctrl+D in a terminal)."""
        await self._say({"op": "stdin"})

    async def signal(self, name: str, *, descendants: bool = False) -> None:
        """Send a signal such as 'INT' to its process group, in a terminal to the one in the foreground.
        ``descendants``: to all that it has started."""
        await self._say({"op": "signal", "signal": name, "all": descendants})

    async def resize(self, columns: int, rows: int) -> None:
        if self._pty:
            await self._say({"op": "resize", "size": [columns, rows]})

    async def _say(self, head: Mapping[str, object]) -> None:
        if not self._ended.done():
            await self._conversation.send(head)

    async def exit(self) -> Ended:
        """Wait for its end; output that nobody has read is dropped. Raises ChannelError, GuestRefused."""
        async for _ in self:
            pass
        return self._ended.result()

    async def collect(self, limit_bytes: int) -> Done:
        """Wait for its end, and return up to ``limit_bytes`` of its output."""
        kept: dict[str, bytearray] = {name: bytearray() for name in STREAMS}
        left, truncated = limit_bytes, False
        async for stream, data in self:
            kept[stream] += data[:left]
            truncated = truncated or len(data) > left
            left -= min(left, len(data))
        out, err = (bytes(kept[name]) for name in STREAMS)
        return Done(stdout=out, stderr=err, ended=self._ended.result(), truncated=truncated)

    # --- what agentd says

    async def listen(self) -> None:
        """Read all that agentd says. Run by `start` and `attach`."""
        try:
            while not (frame := await self._next()).head.get("ok"):
                await self._hear(frame)
            if not self._started.done():
                raise ChannelError("the guest told of a program's end before its start")
            self._ended.set_result(ended_of(frame))
        except asyncio.CancelledError:
            self._fail(ChannelError(f"the process {self.name} was left"))
            raise
        except (ChannelError, GuestRefused) as error:
            self._fail(error)
        async with self._changed:
            self._changed.notify_all()
        await self._parts.put(None)

    async def _next(self) -> Frame:
        """The time limit is the guest's to keep. One that does not is not waited for."""
        if self._limit_seconds is None:
            return await self._conversation.receive()
        now = asyncio.get_running_loop().time
        began, late = now(), ChannelError("its time was up, and the guest did not stop it")
        try:
            async with asyncio.timeout(max(0.0, self._limit_seconds - self._waited)):
                frame = await self._conversation.receive()
        except TimeoutError:
            raise late from None
        self._waited += now() - began
        if now() - self._began > self._limit_seconds:
            self._late_bytes += len(frame.payload)
            if self._late_bytes > _MAX_LATE_BYTES:
                raise late
        return frame

    def _fail(self, error: Exception) -> None:
        for future in (self._started, self._ended):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: it is raised where somebody waits

    async def _hear(self, frame: Frame) -> None:
        head = frame.head
        if (stream := head.get("stream")) in STREAMS and frame.payload:
            self._heard_bytes = frame.number("offset")
            await self._parts.put((str(stream), frame.payload, self._heard_bytes))
        elif "taken" in head:
            taken = frame.number("taken")
            if not self._taken <= taken <= self._sent:
                raise ChannelError("the guest says that a program took more input than it got")
            self._taken = taken
            async with self._changed:
                self._changed.notify_all()
        elif "started_ns" in head and not self._started.done():
            self.pid = frame.number("pid")
            self._started.set_result(None)
        elif "dropped" in head and not self.dropped_bytes:
            self.dropped_bytes = frame.number("dropped")
        elif "refused" in head:
            refused = f"swarm: {printable(frame.text('refused'))}\n"
            await self._parts.put(("stderr", refused.encode(), self._heard_bytes))
        else:
            raise ChannelError("the guest sent a frame that does not belong to a process")

    async def started(self) -> None:
        await asyncio.shield(self._started)


@asynccontextmanager
async def start(open_: Open, order: Order, *, grace_seconds: float = _GRACE_SECONDS) -> AsyncIterator[Process]:
    """Start a program. Leaving the block kills it and all that it started, unless it has ended or is a background one.
    A guest that has not ended it ``grace_seconds`` after its time limit is not waited for any longer.

    Raises GuestRefused (``kind`` is CannotStart, if there is no such program or directory), ChannelError, UsageError.
    """
    if (
        not order.argv
        or not order.argv[0]
        or any("\0" in text for text in (*order.argv, *order.env, *order.env.values()))
    ):
        raise UsageError("argv or its first word is empty, or argv or env has a NUL character in it")
    if len(order.stdin) > MAX_PAYLOAD_BYTES:
        raise UsageError(f"stdin has {len(order.stdin)} bytes; open it, and write what is more than 1 MiB")
    writes = order.open_stdin or order.pty is not None
    fields = {
        "process": order.process,
        "argv": list(order.argv),
        "env": dict(order.env),
        "cwd": order.cwd,
        "user": order.user,
        "pty": list(order.pty) if order.pty else None,
        "timeout": order.timeout_seconds,
        "background": order.background,
        "stdin": writes,
    }
    async with open_("exec", fields, order.stdin) as conversation:
        limit = None if order.timeout_seconds is None else order.timeout_seconds + grace_seconds
        pty = order.pty is not None
        process = Process(conversation, order.process, pty=pty, writes=writes, limit_seconds=limit)
        async with _listening(process):
            yield process


@asynccontextmanager
async def attach(open_: Open, process: str, *, after: int | None = None) -> AsyncIterator[Process]:
    """Come back to a program: first what is left of its output (the last 256 KiB; ``dropped_bytes`` says what is gone),
    or of that after the first ``after`` bytes, then what it writes from now on. Leaving the block leaves it running."""
    async with open_("attach", {"process": process, "after": after}, b"") as conversation:
        it = Process(conversation, process, pty=True, writes=True)
        async with _listening(it):
            yield it


@asynccontextmanager
async def _listening(process: Process) -> AsyncIterator[None]:
    task = asyncio.create_task(process.listen(), name=f"process {process.name}")
    try:
        await process.started()
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def run(open_: Open, order: Order, *, limit_bytes: int = 16 << 20) -> Done:
    """A program from its start to its end, with its output."""
    async with start(open_, order) as process:
        return await process.collect(limit_bytes)


async def processes(open_: Open) -> list[Listed]:
    """The programs that run in a guest, and the last that have ended, in the order of their starts."""
    data = bytearray()
    async with open_("processes", {}, b"") as conversation:
        while not (frame := await conversation.receive()).head.get("ok"):
            data += frame.payload
            if frame.head.get("stream") != "data" or not frame.payload or len(data) > _MAX_LIST_BYTES:
                raise ChannelError("the guest's list of processes makes no sense")
        now_ns = frame.number("now_ns")
    lines = await asyncio.to_thread(_parsed, bytes(data))
    return [_listed(line, now_ns) for line in lines]


async def signal(open_: Open, process: str, name: str, *, descendants: bool = False) -> None:
    """Send a signal to a program; see `Process.signal`. Raises GuestRefused if there is no such process or signal, or
    if it has ended."""
    await _ask(open_, "signal", {"process": process, "signal": name, "all": descendants})


async def freeze(open_: Open, *, disk: bool = False) -> bool:
    """Stop all programs of the guest where they are, until `thaw`. To be called before a snapshot: in what is made from
    it no program runs before it has been renewed. Programs whose conversation ends meanwhile live on.

    ``disk``: nothing is to be written to the work disk either, also not by what is made from the snapshot, until that
    is thawed. Returns whether that is so."""
    return (await _ask(open_, "freeze", {"disk": disk})).flag("disk_still")


async def thaw(open_: Open) -> None:
    """Let the programs go on. A VM's clock, which stood still with it, is set. Raises ChannelError."""
    await _ask(open_, "thaw", {"wall_ns": time.time_ns()})


async def _ask(open_: Open, op: str, fields: Mapping[str, object]) -> Frame:
    async with open_(op, fields, b"") as conversation:
        answer = await conversation.receive()
        if not answer.head.get("ok"):
            raise ChannelError(f"the guest sent an unexpected frame after {op}")
        return answer


def ended_of(frame: Frame) -> Ended:
    """The end of a program as agentd tells it."""
    code, signal = code_and_signal(frame)
    return Ended(
        code=code,
        signal=signal,
        timed_out=frame.flag("timed_out"),
        oom=frame.flag("oom"),
        cpu_ms=frame.number("cpu_ms"),
        max_rss_kb=frame.number("max_rss_kb"),
        started_ns=frame.number("started_ns"),
        ended_ns=frame.number("ended_ns"),
        dropped_bytes=frame.number("dropped_bytes"),
    )


def _parsed(data: bytes) -> list[dict[str, object]]:
    """Lines of JSON from a guest. Parsing many brackets takes long, so a line may have few, as a header may."""
    lines = data.splitlines()
    if len(lines) > _MAX_LISTED:
        raise ChannelError(f"the guest lists {len(lines)} processes")
    found = []
    for line in lines:
        if len(line) > 64 << 10 or line.count(b"[") + line.count(b"{") > 256 or line.count(b",") > 1024:
            raise ChannelError("the guest's list of processes makes no sense")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise ChannelError("the guest's list of processes is not JSON")
        found.append(said)
    return found


def _listed(line: Mapping[str, object], now_ns: int) -> Listed:
    frame = Frame(head=line, payload=b"")
    end = line.get("end")
    ended = ended_of(Frame(head={**end, "dropped_bytes": 0}, payload=b"")) if isinstance(end, dict) else None
    started = frame.number("started_ns")
    return Listed(
        process=printable(frame.text("process")),
        argv=tuple(printable(part) for part in frame.texts("argv")),
        user=printable(frame.text("user")),
        pid=frame.number("pid"),
        background=frame.flag("background"),
        pty=frame.flag("pty"),
        attached=frame.number("attached"),
        output_bytes=frame.number("output_bytes"),
        running_seconds=max(0.0, ((ended.ended_ns if ended else now_ns) - started) / 1e9) if started else 0.0,
        ended=ended,
    )
