"""A server that answers as it is told: real HTTP, one planned answer for each request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

# What happens to a request: an answer; the connection ends before one; it ends within one; no answer at all.
DROP, CUT, SILENCE = "drop", "cut", "silence"


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    def raw(self) -> bytes:
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        head = "".join(f"{name}: {text}\r\n" for name, text in self.headers.items())
        return f"HTTP/1.1 {self.status} X\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


@dataclass
class Faulty:
    url: str = ""
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)  # the first line, headers, body


@asynccontextmanager
async def faulty(plan: Sequence[Answer | str | bytes]) -> AsyncIterator[Faulty]:
    """The last of the plan is for all further requests. Bytes: an answer as it is, after which the connection ends."""
    told, left = Faulty(), list(plan)
    open_: set[asyncio.Task[Any]] = set()
    closing = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().strip().split("\r\n")
                headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                told.requests.append((first.removesuffix(" HTTP/1.1"), headers, body))
                answer = left.pop(0) if len(left) > 1 else left[0]
                if answer == SILENCE:
                    await closing.wait()
                    break
                if isinstance(answer, Answer):
                    writer.write(answer.raw())
                    continue
                writer.write(answer if isinstance(answer, bytes) else b"HTTP/1.1 200 OK\r\n" if answer == CUT else b"")
                break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    told.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield told
    finally:
        closing.set()
        server.close()
        await server.wait_closed()
        await asyncio.gather(*open_)
