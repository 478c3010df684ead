"""Reads the body of a request, with a limit to its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from starlette.requests import ClientDisconnect, Request

from swarm.api.problem import Refused

CLOSE: Final[Mapping[str, str]] = {"connection": "close"}  # of an answer that doesn't wait for the body


async def read(request: Request, limit: int) -> bytes:
    """Raises Refused for a body of more than ``limit`` bytes, or one that does not arrive whole."""
    too_large = f"the body has more than {limit:,} bytes"
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:12]) > limit:
        raise Refused(413, too_large, headers=CLOSE)
    parts, size = [], 0
    try:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise Refused(413, too_large, headers=CLOSE)
    except ClientDisconnect:
        raise Refused(400, "the connection ended before the body did") from None
    return b"".join(parts)
