"""A client of WebSockets for tests, over any address of a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)


class Rejected(Exception):
    """The server answered the handshake with an error."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"{status} {body[:300]!r}")
        self.status, self.headers, self.body = status, headers, body


class Socket:
    """``receive`` returns texts and bytes, and None when the server closed; ``code`` then says why. Pings are answered
    while it waits."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self.code: int | None = None
        self._messages: list[str | bytes] = []
        self._part: list[Any] = []
        self._early: list[Any] = []  # came with the handshake

    async def shake(self, host: str, target: str, headers: Mapping[str, str]) -> None:
        extra = [(name.encode(), text.encode()) for name, text in headers.items()]
        self.writer.write(self.protocol.send(Request(host=host, target=target, extra_headers=extra)))
        rejected: RejectConnection | None = None
        body = b""
        while True:
            events = await self._events()
            for number, event in enumerate(events):
                if isinstance(event, AcceptConnection):
                    self._early = events[number + 1 :]
                    return
                if isinstance(event, RejectConnection):
                    rejected = event
                if isinstance(event, RejectData):
                    body += event.data
                if rejected is not None and (not rejected.has_body or getattr(event, "body_finished", False)):
                    named = {name.decode(): text.decode() for name, text in rejected.headers}
                    raise Rejected(rejected.status_code, named, body)

    async def _events(self) -> list[Any]:
        if early := self._early:
            self._early = []
            return early
        data = await self.reader.read(1 << 16)
        self.protocol.receive_data(data or None)
        return list(self.protocol.events())

    async def send(self, message: str | bytes | Mapping[str, Any]) -> None:
        self.say(message)
        await self.writer.drain()

    def say(self, message: str | bytes | Mapping[str, Any]) -> None:
        """`send` that does not wait for a server that takes nothing, as a browser's."""
        data: Any = json.dumps(message) if isinstance(message, Mapping) else message
        self.writer.write(self.protocol.send(Message[Any](data=data)))

    async def receive(self) -> str | bytes | None:
        while not self._messages:
            if self.code is not None:
                return None
            for event in await self._events():
                if isinstance(event, TextMessage | BytesMessage):
                    self._part.append(event.data)
                    if event.message_finished:
                        empty: Any = b"" if isinstance(event, BytesMessage) else ""
                        self._messages.append(empty.join(self._part))
                        self._part = []
                elif isinstance(event, Ping):
                    self.writer.write(self.protocol.send(event.response()))
                elif isinstance(event, CloseConnection):
                    self.code = event.code
        return self._messages.pop(0)

    async def close(self) -> None:
        self.writer.write(self.protocol.send(CloseConnection(code=1000)))
        while await self.receive() is not None:
            pass

    async def __aenter__(self) -> Socket:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.writer.transport.abort()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def web_socket(url: str, target: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[Socket]:
    """Raises Rejected."""
    parts = urlsplit(url)
    async with Socket(*await asyncio.open_connection(parts.hostname, parts.port)) as socket:
        await socket.shake(parts.netloc, target, headers or {})
        yield socket
