"""Looks up names for agents, so that a name whose server never answers delays nobody but the agent that asked.

Each look-up has a thread of its own, outside the pool that the engine uses for everything else; one attempt has few at
a time. A thread that has waited too long is left behind (the C library can't be interrupted) and counts until it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from swarm.base.aio import cancel_all

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

LOOKUP_SECONDS: Final = 5.0  # with the wait for a turn
AT_ONCE: Final = 4
_MAX_NAME_CHARS: Final = 253  # RFC 1035


class Lookups:
    """The look-ups of one attempt."""

    def __init__(self, resolve: Resolve, *, seconds: float = LOOKUP_SECONDS) -> None:
        self._resolve = resolve
        self._seconds = seconds
        self._free = asyncio.Semaphore(AT_ONCE)
        self._running: set[asyncio.Future[Sequence[Address]]] = set()

    async def addresses(self, host: str, port: int) -> Sequence[Address]:
        """Raises OSError, UnicodeError for what is no name, TimeoutError."""
        if len(host) > _MAX_NAME_CHARS:
            raise UnicodeError("label too long")
        async with asyncio.timeout(self._seconds):
            await self._free.acquire()
            lookup = asyncio.ensure_future(self._resolve(host, port))
            self._running.add(lookup)
            lookup.add_done_callback(self._ended)
            return await asyncio.shield(lookup)

    def _ended(self, lookup: asyncio.Future[Sequence[Address]]) -> None:
        self._running.discard(lookup)
        self._free.release()
        if not lookup.cancelled():
            lookup.exception()  # nobody may be waiting for it any more

    async def close(self) -> None:
        await cancel_all(list(self._running))


async def resolved(host: str, port: int) -> Sequence[Address]:
    """The addresses that the host's resolver finds. Raises OSError."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[Address]] = loop.create_future()

    def set_answer(found: Sequence[Address] | Exception) -> None:
        if not answer.done():
            answer.set_exception(found) if isinstance(found, Exception) else answer.set_result(found)

    def look_up() -> None:
        found: Sequence[Address] | Exception
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in infos]
        except Exception as error:  # UnicodeError among them
            found = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(set_answer, found)

    try:
        threading.Thread(target=look_up, name="lookup", daemon=True).start()  # a daemon: the end doesn't wait for it
    except RuntimeError as error:
        raise OSError(f"no thread for it: {error}") from None
    return await answer
