"""Reads the body of a request, with a limit to its size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, Final

from starlette.requests import ClientDisconnect, Request

from swarm.api.problem import Refused

CLOSE: Final[Mapping[str, str]] = {"connection": "close"}  # of an answer that doesn't wait for the body
_WRITTEN_AT_ONCE: Final = 1 << 20


class Strangers:
    """Bodies of requests whose senders are not known before these have arrived: so many are waited for, and so long."""

    def __init__(self, *, most: int = 32, seconds: float = 5.0) -> None:
        self._most, self._seconds = most, seconds
        self._waiting: dict[asyncio.Timeout, None] = {}  # the oldest first

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Raises Refused for a body that is late, or the oldest when there are others: to refuse new ones would help
        whoever is slow."""
        if len(self._waiting) >= self._most:
            next(iter(self._waiting)).reschedule(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(self._seconds) as timeout:
                self._waiting[timeout] = None
                try:
                    yield
                finally:
                    del self._waiting[timeout]
        except TimeoutError:
            why = f"the body did not arrive within {self._seconds:g} s, or while many others waited"
            raise Refused(408, why, headers=CLOSE) from None


async def read(request: Request, limit: int) -> bytes:
    """Raises Refused for a body of more than ``limit`` bytes, or one that does not arrive whole."""
    return b"".join([part async for part in parts(request, limit)])


async def read_in_time(request: Request, limit: int, *, seconds: float) -> bytes:
    """`read`; raises Refused also for a body that takes longer."""
    try:
        async with asyncio.timeout(seconds):
            return await read(request, limit)
    except TimeoutError:
        raise _late(seconds) from None


async def save(request: Request, limit: int, file: Path, *, seconds: float) -> None:
    """Write the body into a new file. Raises Refused as `read_in_time`."""

    def write(opened: BinaryIO, data: bytes) -> None:
        opened.write(data)

    try:
        async with asyncio.timeout(seconds):
            with file.open("xb") as opened:
                waiting, size = [], 0
                async for part in parts(request, limit):
                    waiting.append(part)
                    size += len(part)
                    if size >= _WRITTEN_AT_ONCE:
                        await asyncio.to_thread(write, opened, b"".join(waiting))
                        waiting, size = [], 0
                await asyncio.to_thread(write, opened, b"".join(waiting))
    except TimeoutError:
        raise _late(seconds) from None


async def parts(request: Request, limit: int) -> AsyncIterator[bytes]:
    """A body as it comes. Raises Refused as `read`."""
    too_large = f"the body has more than {limit:,} bytes"
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:12]) > limit:
        raise Refused(413, too_large, headers=CLOSE)
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise Refused(413, too_large, headers=CLOSE)
            yield part
    except ClientDisconnect:
        raise Refused(400, "the connection ended before the body did") from None


def _late(seconds: float) -> Refused:
    return Refused(408, f"the body did not arrive within {seconds:g} s", headers=CLOSE)
