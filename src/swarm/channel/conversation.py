"""Conversations: requests to agentd that go on both ways until its last reply, such as a program with its input.

``Open`` is how everything above this gets one. `Guest.open` is one, `Channel.converse` another, and the engine's socket
a third, so what works with one works with all. The guest is hostile: nothing that it says is trusted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final

from swarm.channel import frames
from swarm.channel.frames import Frame, printable
from swarm.errors import ChannelError, GuestRefused, UsageError

# Of a frame that is not the last of its reply: many may come, and honest ones take 100 bytes beside their payload.
MAX_PART_HEADER_BYTES: Final = 1024
_FRAMES_PER_TURN: Final = 32


class Conversation:
    """One request and all that follows it. The last frame that `receive` returns has ``ok`` in its head, and then
    ``ended`` is true."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, op: str, id: int) -> None:
        self._reader = reader
        self._writer = writer
        self._op = op
        self._id = id
        self._heard = 0
        self.ended = False  # agentd has answered: the connection is free for another

    async def begin(self, head: Mapping[str, object], payload: bytes) -> None:
        """Send the request; a payload of any size."""
        await self.send(head, payload[: frames.MAX_PAYLOAD_BYTES])
        for at in range(frames.MAX_PAYLOAD_BYTES, len(payload), frames.MAX_PAYLOAD_BYTES):
            await self.send({"op": "data"}, payload[at : at + frames.MAX_PAYLOAD_BYTES])

    async def send(self, head: Mapping[str, object], payload: bytes = b"") -> None:
        """Send a frame; its ``id`` is added. Waits while the guest takes nothing. Raises ChannelError, UsageError."""
        try:
            data = frames.encode({**head, "id": self._id}, payload)
        except ValueError as error:
            raise UsageError(f"{self._op}: names, arguments and environment are too long: {error}") from None
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ChannelError(f"the connection to the guest broke: {error}") from None

    async def receive(self) -> Frame:
        """The next frame. Raises ChannelError, GuestRefused (which is the end). A call that is cancelled may have read
        half a frame: close the conversation then."""
        if self.ended:
            raise ChannelError(f"{self._op} has ended: nothing follows")
        self._heard += 1
        if self._heard % _FRAMES_PER_TURN == 0:  # thousands of short frames may be here already: others get a turn
            await asyncio.sleep(0)
        frame = await frames.read(self._reader)
        try:
            check_reply(frame, self._id, self._op)
        except GuestRefused:
            self.ended = True
            raise
        self.ended = frame.head.get("ok") is True
        return frame

    def close(self) -> None:
        """Leave it: agentd ends what it was about. Idempotent."""
        if not self.ended:
            self._writer.transport.abort()


# The op, its other fields, the request's payload.
Open = Callable[[str, Mapping[str, object], bytes], AbstractAsyncContextManager[Conversation]]


def check_reply(frame: Frame, id: int, op: str) -> None:
    """Raises GuestRefused for an error, ChannelError for a frame that has no place in this reply."""
    head = frame.head
    if head.get("id") != id:
        raise ChannelError(f"the guest's reply does not belong to this {op} request")
    if (error := head.get("error")) is not None:
        said = error if isinstance(error, dict) else {}
        raise GuestRefused(op, printable(said.get("type")), printable(said.get("message"), limit=2000))
    if "ok" in head and head["ok"] is not True:
        raise ChannelError("the guest sent an unexpected frame")
    if "ok" not in head and frame.head_bytes > MAX_PART_HEADER_BYTES:
        raise ChannelError(f"the guest sent a header of {frame.head_bytes} bytes in the middle of {op}")
