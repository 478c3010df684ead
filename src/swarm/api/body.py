"""Reads the body of a request, with a limit to its size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from starlette.requests import ClientDisconnect, Request

from swarm.api.problem import Refused

CLOSE: Final[Mapping[str, str]] = {"connection": "close"}  # of an answer that doesn't wait for the body
_WRITTEN_AT_ONCE: Final = 1 << 20


async def read(request: Request, limit: int) -> bytes:
    """Raises Refused for a body of more than ``limit`` bytes, or one that does not arrive whole."""
    return b"".join([part async for part in _parts(request, limit)])


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
                async for part in _parts(request, limit):
                    waiting.append(part)
                    size += len(part)
                    if size >= _WRITTEN_AT_ONCE:
                        await asyncio.to_thread(write, opened, b"".join(waiting))
                        waiting, size = [], 0
                await asyncio.to_thread(write, opened, b"".join(waiting))
    except TimeoutError:
        raise _late(seconds) from None


async def _parts(request: Request, limit: int) -> AsyncIterator[bytes]:
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
