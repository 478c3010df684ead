"""The connections to one guest, for any number of conversations with it at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from swarm.channel.client import Channel
from swarm.channel.conversation import Conversation
from swarm.channel.dial import Endpoint
from swarm.errors import ChannelError

_MAX_IDLE: Final = 4


class Guest:
    """The connections to one guest: each conversation has its own, and a few are kept for the next.

    ``token``: see `Channel.connect`; it must not change while this is used.
    """

    def __init__(self, endpoint: Endpoint, token: bytes, *, connect_seconds: float = 30.0) -> None:
        self._endpoint = endpoint
        self._token = token
        self._connect_seconds = connect_seconds
        self._idle: list[Channel] = []
        self._busy: set[Channel] = set()
        self._closed = False

    @asynccontextmanager
    async def open(self, op: str, fields: Mapping[str, object], payload: bytes = b"") -> AsyncIterator[Conversation]:
        """A conversation for the length of the block. Leaving the block before its end ends what it was about.

        Raises ChannelError, and whatever `Conversation` raises.
        """
        channel = await self._connected()
        self._busy.add(channel)
        try:
            async with channel.converse(op, fields, payload) as conversation:
                yield conversation
        finally:
            self._busy.discard(channel)
            if channel.usable and len(self._idle) < _MAX_IDLE and not self._closed:
                self._idle.append(channel)
            else:
                await channel.end()

    async def _connected(self) -> Channel:
        if self._closed:
            raise ChannelError("the guest is no longer used")
        while self._idle:
            channel = self._idle.pop()
            if channel.usable:
                return channel
            await channel.end()
        return await Channel.reach(self._endpoint, self._token, self._connect_seconds, listening=True)

    async def close(self) -> None:
        """Close all connections, and with them the conversations. Idempotent."""
        self._closed = True
        idle, self._idle = self._idle, []
        for channel in (*idle, *self._busy):
            channel.close()
        for channel in idle:
            await channel.end()
