"""An engine's live socket: it passes conversations with the guests of its sandboxes on, and does what it is asked to do
with them. It knows neither the ops of agentd nor what a sandbox is: whoever holds them does.

Both sides are paced by each other: nothing is read from one that the other has not taken. When either goes, the
conversation ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

from swarm.base import unix_socket
from swarm.base.aio import cancel_all, finish_uninterrupted, first
from swarm.base.files import host_errors, make_directory
from swarm.base.log import logger
from swarm.channel import frames
from swarm.channel.frames import Frame, printable
from swarm.errors import ChannelError, Conflict, GuestRefused, SwarmError, UsageError
from swarm.live import wire
from swarm.live.wire import NotHeld, Request

log = logger(__name__)

MAX_CONNECTIONS: Final = 512
_LAST_SECONDS: Final = 10.0  # for a client that has its answer and is slow to go


class Talk(Protocol):
    """What is passed on: a `Conversation`, or what wraps one."""

    async def send(self, head: Mapping[str, object], payload: bytes = b"") -> None: ...

    async def receive(self) -> Frame: ...


class Holder(Protocol):
    """Who holds sandboxes: `swarm.engine.sandboxes.Sandboxes`. Raises SwarmErrors of one sentence: NotHeld for a
    sandbox that is not held here, or is on its way out."""

    def converse(
        self, id: str, op: str, fields: Mapping[str, object], payload: bytes, *, by: str
    ) -> AbstractAsyncContextManager[Talk]:
        """A conversation with its guest, for the length of the block. The caller may go at any time."""

    async def pause(self, id: str, *, by: str) -> None:
        """Returns when it is paused."""

    async def snapshot(
        self, id: str, *, by: str, name: str | None, keep_seconds: float | None, without_secrets: bool
    ) -> str:
        """The id of a new snapshot of kind 'named'. ``keep_seconds`` None: until it is removed."""

    async def fork(self, id: str, *, by: str, count: int, name: str | None) -> Sequence[str]:
        """The ids of new sandboxes, which start from its state. ``name``: of one; of several, with '-1', '-2' …"""

    async def end(self, id: str, *, by: str) -> None:
        """Returns when its VM is gone."""


@asynccontextmanager
async def serving(holder: Holder, directory: Path) -> AsyncIterator[Path]:
    """Listen on a socket of our own in this directory, for the length of the block; yields its path. What dead engines
    left there is removed. Raises HostError."""
    with host_errors(f"can't listen in {directory}"):
        make_directory(directory, 0o700)
        unix_socket.remove_dead(directory)
    path = directory / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
    bound = unix_socket.bind(path)
    assert bound is not None  # nobody else has that name
    live = _Live(holder)
    try:
        async with await asyncio.start_unix_server(live.serve, sock=bound, limit=wire.READ_BYTES):
            yield path
    finally:
        path.unlink(missing_ok=True)
        await finish_uninterrupted(live.close())


class _Live:
    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._busy: set[asyncio.Task[None]] = set()
        self._closing = False

    async def close(self) -> None:
        self._closing = True
        await cancel_all(self._busy)

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            await self._answer(reader, writer)
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            self._busy.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: StreamReader, writer: StreamWriter) -> None:
        """What is wrong is told as a fault; that nobody hears it is no matter."""
        try:
            if len(self._busy) > MAX_CONNECTIONS:
                raise Conflict(f"the engine serves {MAX_CONNECTIONS} uses of its sandboxes already: try later")
            async with asyncio.timeout(wire.FIRST_SECONDS):
                request = await wire.asked(reader)
            if request.asks:
                await self._ask(request, reader, writer)
            else:
                await self._converse(request, reader, writer)
            return
        except _Gone:
            return
        except SwarmError as error:
            said = wire.fault(error)
        except TimeoutError:
            return
        except asyncio.CancelledError:
            if self._closing:
                stops = NotHeld("the engine stops, and pauses its sandboxes: ask again")
                await _tell(writer, wire.fault(stops))
            raise
        except Exception as error:
            log.error("a request to a sandbox failed by a bug in Swarm", error=f"{type(error).__name__}: {error}")
            said = wire.fault(SwarmError(f"unexpected {type(error).__name__}: see the engine's log"))
        await _tell(writer, said)

    async def _ask(self, request: Request, reader: StreamReader, writer: StreamWriter) -> None:
        """What was begun is done to its end, whether somebody still waits for it or not."""
        answer = await _VERBS.get(request.verb, _unknown)(self._holder, request)
        await _send(writer, {"answer": answer})
        await _taken(reader, writer)

    async def _converse(self, request: Request, reader: StreamReader, writer: StreamWriter) -> None:
        opening = self._holder.converse(request.sandbox, request.verb, request.fields, request.payload, by=request.by)
        opened = asyncio.Event()
        ahead = asyncio.ensure_future(frames.read(reader, who="client"))  # tells of a client that goes meanwhile

        async def talk() -> None:
            async with opening as guest:
                opened.set()
                await _send(writer, {"opened": True})
                await first(_said(ahead, reader, guest), _heard(guest, writer))

        try:
            await first(talk(), _left(ahead, opened))
        finally:
            await cancel_all([ahead])
        await _taken(reader, writer)


class _Gone(Exception):
    """Whoever asked has closed the connection."""


async def _left(ahead: asyncio.Future[Frame], opened: asyncio.Event) -> None:
    """Raises _Gone when the client goes before the guest has begun: a guest may never do so."""
    await asyncio.wait({ahead})
    if not opened.is_set() and ahead.exception() is not None:
        raise _Gone
    await asyncio.Event().wait()  # for ever: from now on `_said` looks


async def _said(ahead: asyncio.Future[Frame], reader: StreamReader, guest: Talk) -> None:
    """From the client to the guest. ``ahead``: the first frame."""
    coming: Awaitable[Frame] = ahead
    while True:
        try:
            frame = await coming
        except ChannelError:
            raise _Gone from None
        await guest.send(frame.head, frame.payload)
        coming = frames.read(reader, who="client")


async def _heard(guest: Talk, writer: StreamWriter) -> None:
    """From the guest to the client, up to the end of the conversation."""
    while True:
        try:
            frame = await guest.receive()
        except GuestRefused as error:
            await _send(writer, {"error": {"type": error.kind, "message": error.said}})
            return
        if "fault" in frame.head:
            raise ChannelError("the guest sent what only an engine may say")
        await _send(writer, frame.head, frame.payload)
        if frame.head.get("ok"):
            return


async def _send(writer: StreamWriter, head: Mapping[str, object], payload: bytes = b"") -> None:
    try:
        data = frames.encode({**head, "id": wire.ID}, payload)
    except ValueError:
        raise ChannelError("the guest sent a header that is too long to be passed on") from None
    try:
        writer.write(data)
        await writer.drain()
    except (OSError, RuntimeError):  # RuntimeError: it was told the end already
        raise _Gone from None


async def _tell(writer: StreamWriter, said: Mapping[str, object]) -> None:
    with contextlib.suppress(_Gone, TimeoutError):
        async with asyncio.timeout(_LAST_SECONDS):
            await _send(writer, said)


async def _taken(reader: StreamReader, writer: StreamWriter) -> None:
    """Until the client has taken all and gone: to abort a connection drops what is not taken."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LAST_SECONDS):
            writer.write_eof()
            while await reader.read(wire.READ_BYTES):
                pass


# --- what an engine is asked to do ------------------------------------------------------------------------------------


async def _pause(holder: Holder, request: Request) -> object:
    await holder.pause(request.sandbox, by=request.by)
    return None


async def _snapshot(holder: Holder, request: Request) -> object:
    return await holder.snapshot(
        request.sandbox,
        by=request.by,
        name=request.text("name"),
        keep_seconds=request.number("keep_seconds"),
        without_secrets=bool(request.fields.get("without_secrets")),
    )


async def _fork(holder: Holder, request: Request) -> object:
    count = int(request.number("count") or 1)
    return list(await holder.fork(request.sandbox, by=request.by, count=count, name=request.text("name")))


async def _end(holder: Holder, request: Request) -> object:
    await holder.end(request.sandbox, by=request.by)
    return None


async def _unknown(holder: Holder, request: Request) -> object:
    raise UsageError(f"an engine can't {printable(request.verb)} a sandbox")


_VERBS: Final[Mapping[str, Callable[[Holder, Request], Awaitable[object]]]] = {
    "pause": _pause,
    "snapshot": _snapshot,
    "fork": _fork,
    "end": _end,
}
