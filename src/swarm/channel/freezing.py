"""Stopping the programs of a guest before its VM is saved, and letting them go on afterwards.

So in a fork, or in a VM that is resumed, no program runs before the guest has its new randomness, clock and identity.
"""

from __future__ import annotations

import time

from swarm.channel.client import Channel
from swarm.channel.dial import Endpoint
from swarm.errors import ChannelError

_SECONDS = 10.0


async def freeze(channel: Channel) -> None:
    """Stop all programs of the guest but agentd. Raises ChannelError."""
    await _ask(channel, "freeze")


async def thaw(channel: Channel) -> None:
    """Let them go on, after the clock was set: it stood still with the VM. Raises ChannelError."""
    await _ask(channel, "thaw", wall_ns=time.time_ns())


async def thaw_anew(endpoint: Endpoint, token: bytes) -> None:
    """`thaw`, over a connection of its own. Raises ChannelError."""
    async with Channel.connect(endpoint, token=token, timeout_seconds=_SECONDS, listening=True) as channel:
        await thaw(channel)


async def _ask(channel: Channel, op: str, wall_ns: int | None = None) -> None:
    try:
        await channel._ask(op, wall_ns=wall_ns)
    except ChannelError as error:
        if "no such operation" not in str(error):
            raise
