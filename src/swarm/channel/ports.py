"""TCP ports of a guest, on this host's loopback: each connection is a conversation with agentd, which dials the port.

::

    async with ports.forward(guest.open, 8000) as port:
        …  # http://127.0.0.1:{port} is the guest's 127.0.0.1:8000

The guest's firewall and the host's rules have no part in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Final

from swarm.channel.asking import talk
from swarm.channel.conversation import Conversation, Open
from swarm.errors import ChannelError, Conflict, HostError, SwarmError, UsageError

MAX_FORWARDED: Final = 32  # connections at once, of the 64 that agentd takes
# Not 127.0.0.1: cookies know no ports, so a browser would send the dashboard's session to the guest.
HOST: Final = "127.0.0.2"
_PIECE_BYTES: Final = 64 << 10
_DIAL_SECONDS: Final = 20.0
_RESET: Final = struct.pack("ii", 1, 0)


class Dialled:
    """A connection to a port of the guest."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.ended = False  # the port has closed it, or has been reset

    async def read(self) -> bytes:
        """The next piece; b"" once the port sends no more. Raises ConnectionResetError if the port reset it."""
        if self.ended:
            return b""
        frame = await self._conversation.receive()
        if frame.head.get("ok") is True:
            self.ended = True
            if frame.flag("reset"):
                raise ConnectionResetError("the guest's port reset the connection")
            return b""
        if frame.head.get("stream") != "data":
            raise ChannelError("the guest sent a frame that does not belong to a port")
        return frame.payload

    async def write(self, data: bytes) -> None:
        """Not empty."""
        await self._conversation.send({"op": "data"}, data)

    async def write_end(self) -> None:
        """No more will be written; the port may still send."""
        await self._conversation.send({"op": "data"}, b"")


@contextlib.asynccontextmanager
async def dial(guest: Open, port: int) -> AsyncIterator[Dialled]:
    """Connect to the guest's 127.0.0.1:port. Raises Conflict if nothing answers there."""
    if not 0 < port < 65536:
        raise UsageError(f"a port is a number from 1 to 65535, not {port}")
    async with talk(guest, "dial", {"port": port}) as it:
        try:
            async with asyncio.timeout(_DIAL_SECONDS) as limit:
                started = await it.receive()
        except TimeoutError:
            if not limit.expired():
                raise
            raise ChannelError(f"the guest did not connect to its port {port} in {_DIAL_SECONDS:g} s") from None
        if "started_ns" not in started.head:
            raise ChannelError("the guest sent a frame that does not belong to a port")
        yield Dialled(it.conversation)


async def relay(dialled: Dialled, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Both directions, until both have ended, or either side is gone."""

    async def outward() -> None:
        while data := await reader.read(_PIECE_BYTES):
            await dialled.write(data)
        await dialled.write_end()

    try:
        async with asyncio.TaskGroup() as group:
            out = group.create_task(outward())
            ended = False
            while not dialled.ended:
                if data := await dialled.read():
                    writer.write(data)
                    await writer.drain()
                elif not ended:  # the port sends no more, and may still listen
                    ended = True
                    writer.write_eof()
            out.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


@contextlib.asynccontextmanager
async def forward(
    guest: Open,
    port: int,
    *,
    host: str = HOST,
    host_port: int = 0,
    on_error: Callable[[SwarmError], None] | None = None,
) -> AsyncIterator[int]:
    """Listen on this host (0: any free port, which is returned) and pass each connection on to the guest's ``port``. A
    connection that fails is reset, and ``on_error`` is told; the next may succeed. At the end all are closed."""
    tell = on_error or (lambda error: None)
    busy: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = False
        try:
            if len(busy) > MAX_FORWARDED:
                raise Conflict(f"more than {MAX_FORWARDED} connections to port {port} at once")
            async with dial(guest, port) as dialled:
                await relay(dialled, reader, writer)
            whole = True
        except SwarmError as error:
            tell(error)
        except OSError:
            pass  # either side reset it
        finally:
            if not whole and (sock := writer.get_extra_info("socket")) is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(handle(reader, writer))
        busy.add(task)
        task.add_done_callback(busy.discard)

    try:
        server = await asyncio.start_server(accept, host, host_port)
    except OSError as error:
        raise HostError(f"can't listen on {host}:{host_port}: {error.strerror or error}") from None
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
