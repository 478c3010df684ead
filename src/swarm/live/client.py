"""The way to a sandbox's guest, by the engine that holds it. `Live.open` is an `Open` of the channel's, so what works
over a guest's own connection works over it: processes, files, ports."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from swarm.base import unix_socket
from swarm.channel import frames
from swarm.channel.conversation import Conversation
from swarm.channel.frames import Frame
from swarm.errors import ChannelError, Conflict, SwarmError
from swarm.live import wire


class Live:
    """One sandbox, by the socket of the engine that holds it. ``by``: who asks, for its history."""

    def __init__(self, socket: Path, sandbox: str, *, by: str) -> None:
        self._socket = socket
        self.sandbox, self._by = sandbox, by

    @asynccontextmanager
    async def open(self, op: str, fields: Mapping[str, object], payload: bytes = b"") -> AsyncIterator[Conversation]:
        """A conversation with its guest. Leaving the block before its end ends what it was about. Raises what the
        engine does: Conflict if it does not hold the sandbox any more."""
        async with self._connected() as (reader, writer):
            conversation = _Relayed(reader, writer, op, wire.ID)
            await conversation.send({"open": op, **self._of(fields)}, payload)
            await _answer(reader)
            yield conversation

    async def pause(self) -> None:
        await self._ask("pause")

    async def end(self) -> None:
        await self._ask("end")

    async def snapshot(
        self, *, name: str | None = None, keep_seconds: float | None = None, without_secrets: bool = False
    ) -> str:
        """The id of a snapshot of its present state. It runs on."""
        fields = {"name": name, "keep_seconds": keep_seconds, "without_secrets": without_secrets}
        return str(await self._ask("snapshot", **fields))

    async def fork(self, *, count: int = 1, name: str | None = None) -> list[str]:
        """The ids of new sandboxes that start from its present state. It runs on."""
        return [str(id) for id in await self._ask("fork", count=count, name=name)]

    async def _ask(self, verb: str, **fields: object) -> Any:
        async with self._connected() as (reader, writer):
            await Conversation(reader, writer, verb, wire.ID).send({"ask": verb, **self._of(fields)})
            return (await _answer(reader)).head.get("answer")

    def _of(self, fields: Mapping[str, object]) -> Mapping[str, object]:
        return {"sandbox": self.sandbox, "by": self._by, "fields": dict(fields)}

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
        try:
            with unix_socket.short_path(self._socket) as path:
                reader, writer = await asyncio.open_unix_connection(path, limit=wire.READ_BYTES)
        except OSError:
            raise Conflict(f"the engine that held the sandbox {self.sandbox} has ended: try again") from None
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class _Relayed(Conversation):
    """A conversation that an engine passes on."""

    async def receive(self) -> Frame:
        """Raises ChannelError too when the engine ends it, with the engine's reason."""
        frame = await super().receive()
        try:
            wire.raise_fault(frame)
        except SwarmError as error:
            raise ChannelError(str(error)) from None
        return frame


async def _answer(reader: StreamReader) -> Frame:
    frame = await frames.read(reader, who="engine")
    wire.raise_fault(frame)
    return frame
