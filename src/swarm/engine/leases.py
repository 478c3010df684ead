"""Leases that an engine keeps up: of attempts, and of sandboxes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final, Never

from swarm.base.log import logger
from swarm.errors import StoreError

log = logger(__name__)

RENEW_SECONDS: Final = 1.0  # a renewal sees a cancellation from outside: this bounds how long that takes
_MARGIN: Final = 0.1  # of a lease: the VMs of a lost one are gone before it ends


async def keep(
    held: Callable[[], Collection[str]],
    renew: Callable[[Collection[str]], Awaitable[None]],
    lost: Callable[[], None],
    *,
    lease_seconds: float,
) -> Never:
    """Renew the leases of what is ``held``, all at once, for ever. ``lost`` is called when none can be ours for much
    longer, by this process's own clock: also while the database neither answers nor fails."""
    every = min(RENEW_SECONDS, lease_seconds / 3)
    good_until, said = _good_until(lease_seconds), ""
    while True:
        await asyncio.sleep(every)
        ids = held()
        good_again = _good_until(lease_seconds)
        if not ids:
            good_until = good_again
            continue
        try:
            async with asyncio.timeout(max(every, good_until - time.monotonic())):
                await renew(ids)
        except (StoreError, TimeoutError) as error:
            if (now := str(error) or "the database does not answer") != said:
                said = now
                log.warning("can't renew leases", error=said, leases=len(ids))
            if time.monotonic() >= good_until:
                lost()
        else:
            good_until, said = good_again, ""


def _good_until(lease_seconds: float) -> float:
    return time.monotonic() + lease_seconds * (1 - _MARGIN)
