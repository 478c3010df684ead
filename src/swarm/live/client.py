"""The way to a sandbox's guest, by the engine that holds it. `Live.open` is an `Open` of the channel's, so what works
over a guest's own connection works over it: processes, files, ports."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from swarm.base import unix_socket
from swarm.channel import frames
from swarm.channel.conversation import Conversation
from swarm.channel.frames import Frame
from swarm.errors import ChannelError, SwarmError
from swarm.live import wire
from swarm.live.wire import NotHeld

_AGAIN_SECONDS: Final = 60.0


class Live:
    """One sandbox, by the socket of the engine that holds it. ``by``: who asks, for its history. ``again``: where it is
    held now, to be asked when an engine holds it no more."""

    def __init__(
        self, socket: Path, sandbox: str, *, by: str, again: Callable[[], Awaitable[Path]] | None = None
    ) -> None:
        self.socket, self.sandbox = socket, sandbox
        self._by, self._again = by, again

    @asynccontextmanager
    async def open(self, op: str, fields: Mapping[str, object], payload: bytes = b"") -> AsyncIterator[Conversation]:
        """A conversation with its guest. Leaving the block before its end ends what it was about. Raises what the
        engine does: NotHeld if it does not hold the sandbox any more."""
        async with self._answered({"open": op}, fields, payload) as (reader, writer, _):
            yield _Relayed(reader, writer, op, wire.ID)

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
        async with self._answered({"ask": verb}, fields) as (_, _, answer):
            return answer.head.get("answer")

    @asynccontextmanager
    async def _answered(
        self, what: Mapping[str, str], fields: Mapping[str, object], payload: bytes = b""
    ) -> AsyncIterator[tuple[StreamReader, StreamWriter, Frame]]:
        """A connection with its first answer. An engine that pauses the sandbox, or stops, at this very moment says
        so: then it is soon held again, perhaps by another."""
        until = asyncio.get_running_loop().time() + _AGAIN_SECONDS
        async with AsyncExitStack() as stack:
            while True:
                try:
                    found = await stack.enter_async_context(self._connected(what, fields, payload))
                    break
                except NotHeld:
                    if self._again is None or asyncio.get_running_loop().time() > until:
                        raise
                    self.socket = await self._again()
            yield found

    @asynccontextmanager
    async def _connected(
        self, what: Mapping[str, str], fields: Mapping[str, object], payload: bytes
    ) -> AsyncIterator[tuple[StreamReader, StreamWriter, Frame]]:
        try:
            with unix_socket.short_path(self.socket) as path:
                reader, writer = await asyncio.open_unix_connection(path, limit=wire.READ_BYTES)
        except OSError:
            raise NotHeld(f"the engine that held the sandbox {self.sandbox} has ended: try again") from None
        try:
            fields, payload = frames.fit(fields, payload)
            first = {**what, "sandbox": self.sandbox, "by": self._by, "fields": dict(fields)}
            await Conversation(reader, writer, next(iter(what.values())), wire.ID).begin(first, payload)
            answer = await frames.read(reader, who="engine")
            wire.raise_fault(answer)
            yield reader, writer, answer
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class _Relayed(Conversation):
    """A conversation that an engine passes on."""

    async def receive(self) -> Frame:
        """Raises ChannelError too when the engine ends it, with the engine's reason, or ends itself."""
        try:
            frame = await super().receive()
        except ChannelError:
            if self._reader.at_eof():
                raise ChannelError("the engine that held the sandbox has ended") from None
            raise
        try:
            wire.raise_fault(frame)
        except SwarmError as error:
            raise ChannelError(str(error)) from None
        return frame
