"""Conversations with agentd about files and ports: what they ask, what may be answered, and errors in our own words.

What a guest says is bounded: in time, in bytes, and in what it costs to parse.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from typing import Any, Final

from swarm.channel.conversation import Conversation, Open
from swarm.channel.frames import MAX_PAYLOAD_BYTES, Frame
from swarm.errors import ChannelError, Conflict, GuestRefused, NoSpace, NotFound, SwarmError, UsageError

ANSWER_SECONDS: Final = 60.0
_STALL_SECONDS: Final = 120.0  # of the guest, within a transfer
_MAX_LINE_BYTES: Final = 64 << 10
_MAX_LINE_MARKS: Final = 6000  # brackets and commas, as in names: what parsing a line may cost grows with them
_MAX_LINES: Final = 8192  # of one frame


class Talk:
    """One conversation in which the guest answers; ``reply`` is its last frame."""

    def __init__(self, op: str, conversation: Conversation) -> None:
        self.op = op
        self.conversation = conversation
        self.reply: Frame

    async def receive(self) -> Frame:
        return await self.conversation.receive()

    async def next(self, *, patient: bool = False) -> Frame | None:
        """The next frame before the last."""
        try:
            async with asyncio.timeout(None if patient else _STALL_SECONDS) as limit:
                frame = await self.receive()
        except TimeoutError:
            if not limit.expired():
                raise
            raise ChannelError(f"the guest did not go on with {self.op} for {_STALL_SECONDS:g} s") from None
        if frame.head.get("ok") is True:
            self.reply = frame
            return None
        return frame


@contextlib.asynccontextmanager
async def talk(guest: Open, op: str, fields: Mapping[str, object], payload: bytes = b"") -> AsyncIterator[Talk]:
    try:
        async with guest(op, fields, payload) as conversation:
            yield Talk(op, conversation)
    except GuestRefused as refusal:
        raise _error(refusal) from None


async def ask(guest: Open, op: str, fields: Mapping[str, object], *, limit_seconds: float = ANSWER_SECONDS) -> Frame:
    async with talk(guest, op, fields) as it:
        try:
            async with asyncio.timeout(limit_seconds) as limit:
                frame = await it.next(patient=True)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ChannelError(f"the guest did not answer {op} within {limit_seconds:g} s") from None
        if frame is not None:
            raise ChannelError(f"the guest sent a frame that does not belong in {op}")
        return it.reply


def _error(refusal: GuestRefused) -> SwarmError:
    """In this host's words. The guest chooses the kind: it can mislead who asks about its own files, and no more."""
    kinds: dict[str, type[SwarmError]] = {
        "FileNotFoundError": NotFound,
        "DiskFull": NoSpace,
        "Refused": UsageError,
        "NotListening": Conflict,
        "NotRegular": Conflict,
        "FileExistsError": Conflict,
        "IsADirectoryError": Conflict,
        "NotADirectoryError": Conflict,
        "PermissionError": Conflict,
        "OSError": Conflict,
    }
    kind = kinds.get(refusal.kind)
    return refusal if kind is None else kind(f"in the guest: {refusal.said}")


async def lines(it: Talk, *, patient: bool = False) -> AsyncIterator[dict[str, Any]]:
    """The JSON texts that a guest sends, a line each. Whatever they are, they cost little to parse."""
    while (frame := await it.next(patient=patient)) is not None:
        if frame.head.get("stream") != "data" or not frame.payload.endswith(b"\n"):
            raise ChannelError(f"the guest sent a frame that does not belong in {it.op}")
        if frame.payload.count(b"\n") > _MAX_LINES:
            raise ChannelError("the guest sent too many lines at once")
        for text in frame.payload[:-1].split(b"\n"):
            if len(text) > _MAX_LINE_BYTES or sum(map(text.count, (b"[", b"{", b","))) > _MAX_LINE_MARKS:
                raise ChannelError("the guest sent a line that is too long")
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict):
                raise ChannelError("the guest sent a line that is no JSON object")
            yield line
        await asyncio.sleep(0)  # many may be here already: others get a turn


async def send(guest: Open, op: str, fields: Mapping[str, object], data: bytes | AsyncIterable[bytes]) -> Frame:
    """A conversation in which the host sends data and the guest answers once, perhaps before it has it all."""
    payload, pieces = (data, None) if isinstance(data, bytes) else (b"", data)
    async with talk(guest, op, fields, payload[:MAX_PAYLOAD_BYTES]) as it:
        answer = asyncio.ensure_future(it.receive())
        try:
            async with asyncio.timeout(None) as limit:

                async def say(piece: bytes) -> None:
                    limit.reschedule(asyncio.get_running_loop().time() + _STALL_SECONDS)
                    await it.conversation.send({"op": "data"}, piece)
                    limit.reschedule(None)

                for piece in _cut(payload[MAX_PAYLOAD_BYTES:]):
                    if answer.done():
                        break
                    await say(piece)
                if pieces is not None:
                    async for larger in pieces:
                        for piece in _cut(larger):
                            await say(piece)
                        if answer.done():
                            break
                if answer.done():
                    answer.result()  # the guest's error
                    raise ChannelError(f"the guest answered {op} before it had the data")
                await say(b"")
                limit.reschedule(asyncio.get_running_loop().time() + _STALL_SECONDS)
                frame = await answer
        except TimeoutError:
            if not limit.expired():
                raise
            raise ChannelError(f"the guest did not go on with {op} for {_STALL_SECONDS:g} s") from None
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
    if frame.head.get("ok") is not True:
        raise ChannelError(f"the guest sent a frame that does not belong in {op}")
    return frame


def _cut(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), MAX_PAYLOAD_BYTES):
        yield data[at : at + MAX_PAYLOAD_BYTES] if len(data) > MAX_PAYLOAD_BYTES else data
