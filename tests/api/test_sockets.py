"""WebSockets: how the server bounds them, and what is done in sandboxes by them."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from swarm.api.server import MAX_MESSAGE_BYTES, serving
from tests.api.web_socket import web_socket
from tests.conftest import PATIENCE_SECONDS


class _Echo:
    """Says back what it hears; ``left``: how conversations ended."""

    def __init__(self) -> None:
        self.left: asyncio.Queue[object] = asyncio.Queue()
        self.app = Starlette(routes=[WebSocketRoute("/echo", self._echo), WebSocketRoute("/flood", self._flood)])

    async def _echo(self, socket: WebSocket) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_bytes(await socket.receive_bytes())
        except WebSocketDisconnect as error:
            self.left.put_nowait(error.code)

    async def _flood(self, socket: WebSocket) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_bytes(bytes(64 << 10))
        except WebSocketDisconnect:
            self.left.put_nowait("flood")


async def test_a_socket_outlives_what_a_request_may_take() -> None:
    """The server's time for the head of a request is over long before."""
    echo = _Echo()
    async with (
        serving(echo.app, host="127.0.0.1", port=0, head_seconds=1.0) as (url, _),
        web_socket(url, "/echo") as socket,
    ):
        await asyncio.sleep(1.5)
        await socket.send(b"\0x" * 1000)
        assert await socket.receive() == b"\0x" * 1000
        await socket.close()
        assert (await echo.left.get(), socket.code) == (1000, 1000)


async def test_a_message_that_is_too_large_ends_the_conversation() -> None:
    echo = _Echo()
    async with serving(echo.app, host="127.0.0.1", port=0) as (url, _), web_socket(url, "/echo") as socket:
        await socket.send(bytes(MAX_MESSAGE_BYTES))
        assert len(await socket.receive() or b"") == MAX_MESSAGE_BYTES
        await socket.send(bytes(MAX_MESSAGE_BYTES + 1))
        assert await socket.receive() is None
        assert (socket.code, await echo.left.get()) == (1009, 1009)


@pytest.mark.parametrize("path", ["/echo", "/flood"], ids=["silent", "takes nothing"])
async def test_who_gives_no_sign_of_life_is_gone(path: str) -> None:
    """Also one that takes nothing of what is sent: else what is sent to it would wait for ever."""
    echo = _Echo()
    alive = serving(echo.app, host="127.0.0.1", port=0, stalled_seconds=1.0, ping_seconds=0.5)
    async with asyncio.timeout(PATIENCE_SECONDS), alive as (url, _), web_socket(url, path):
        assert await echo.left.get() in (1005, 1006, "flood")


async def test_the_server_stops_while_sockets_are_open() -> None:
    echo = _Echo()
    async with asyncio.timeout(PATIENCE_SECONDS):
        async with serving(echo.app, host="127.0.0.1", port=0) as (url, _):
            listens = web_socket(url, "/echo")
            flooded = web_socket(url, "/flood")
            one, _ = await listens.__aenter__(), await flooded.__aenter__()
        assert await one.receive() is None and one.code == 1012
        assert {await echo.left.get(), await echo.left.get()} == {1012, "flood"}
        await flooded.__aexit__(None, None, None)
        await listens.__aexit__(None, None, None)
