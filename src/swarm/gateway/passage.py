"""An answer on its way from a service to a guest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final

import aiohttp
from aiohttp import web

from swarm.gateway.call import Call
from swarm.gateway.wire import KeyMasker


class GuestGone(Exception):
    """It reads no more of the answer."""


async def to_guest(write: Awaitable[object]) -> None:
    try:
        await write
    except ConnectionError:  # aiohttp's is a ClientError as well, like those of the connection to the service
        raise GuestGone from None


class Passage(asyncio.Protocol):
    """Passes one answer on, from the moment that its head has been sent to the guest.

    It stands between the service's transport and aiohttp's protocol, which still reads the HTTP. So a piece is written
    to the guest while the event loop handles its arrival: waking a task for each of them, and setting a timer anew,
    takes as long as all else that is done with it. Only what the guest is too slow for waits for `run`.
    """

    def __init__(
        self,
        call: Call,
        masker: KeyMasker,
        answer: aiohttp.ClientResponse,
        *,
        guest: web.BaseRequest,
        chunked: bool,
    ) -> None:
        self._call = call
        self._masker = masker
        self._content: Final = answer.content
        self._guest = guest
        self._chunked = chunked
        self._service = answer.connection.transport if answer.connection is not None else None  # None: all has come
        self._inner: asyncio.BaseProtocol | None = None
        self._loop = asyncio.get_running_loop()
        self._needed: asyncio.Future[None] | None = None  # while `run` waits for what is for it to do
        self._heard = 0.0
        self._reason: str | None = None

    async def run(self, *, idle_seconds: float) -> str | None:
        """Returns at the end of the answer: why the budget cut it, or None. Raises GuestGone, aiohttp's errors, and
        TimeoutError when the service is silent for so long. The time that the guest takes to read does not count."""
        if self._service is not None:
            self._inner = self._service.get_protocol()
            self._service.set_protocol(self)
        try:
            while self._reason is None:
                await self._guest_has_read()
                if piece := self._content.read_nowait():
                    self._pass_on(piece)
                elif self._content.is_eof():
                    break
                else:
                    await self._wait(idle_seconds)
        finally:
            self._restore()
        return self._reason

    def write(self, data: bytes) -> None:
        """To the guest; nothing happens if it is gone, which `run` finds out."""
        transport = self._guest.transport
        if transport is not None and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def _pass_on(self, piece: bytes) -> None:
        if out := self._masker.feed(self._call.feed(piece)):
            self.write(out)
        self._reason = self._call.cut_reason()

    async def _guest_has_read(self) -> None:
        await to_guest(self._guest.writer.drain())
        if self._guest.transport is None or self._guest.transport.is_closing():
            raise GuestGone

    async def _wait(self, idle_seconds: float) -> None:
        self._needed = needed = self._loop.create_future()
        self._heard = self._loop.time()
        try:
            while not needed.done():
                left = self._heard + idle_seconds - self._loop.time()
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait([needed], timeout=left)
        finally:
            self._needed = None

    def _restore(self) -> None:
        if self._service is not None and self._inner is not None:
            self._service.set_protocol(self._inner)
            self._service = None

    def _wake(self) -> None:
        if self._needed is not None:
            if not self._needed.done():
                self._needed.set_result(None)
            self._needed = None

    # What the service's transport calls.

    def data_received(self, data: bytes) -> None:
        assert isinstance(self._inner, asyncio.Protocol)
        content = self._content
        self._inner.data_received(data)
        if content.is_eof():  # aiohttp may give the connection to the next call at once
            self._restore()
        if self._needed is None:
            return
        self._heard = self._loop.time()
        broken = content.exception() is not None
        if not broken and (piece := content.read_nowait()):
            self._pass_on(piece)
        if broken or content.is_eof() or self._reason is not None or self._guest.protocol.writing_paused:
            self._wake()

    def eof_received(self) -> bool | None:
        assert isinstance(self._inner, asyncio.Protocol)
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._inner is not None
        self._inner.connection_lost(exc)
        self._wake()

    def pause_writing(self) -> None:
        assert self._inner is not None
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        assert self._inner is not None
        self._inner.resume_writing()
