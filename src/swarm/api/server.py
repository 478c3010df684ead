"""Runs one HTTP server for the duration of a block."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol

from swarm.api.problem import RETRY_SECONDS, problem
from swarm.base import unix_socket
from swarm.base.aio import cancel_all, finish_uninterrupted
from swarm.base.log import logger
from swarm.errors import HostError, UsageError

log = logger(__name__)

# How long running requests may take when the server stops.
GRACE_SECONDS: Final = 10
_UNREAD_SECONDS: Final = 0.5  # between two looks at answers that their clients don't read
HEAD_SECONDS: Final = 10.0
STALLED_SECONDS: Final = 60.0  # in which a client takes nothing of its answer
PING_SECONDS: Final = 20.0  # between two that a WebSocket's client has to answer
_TAKE_OVER_SECONDS: Final = 2.0
_MAX_WITHOUT_HEAD: Final = 128  # connections that have not sent one, or no other; the oldest makes room
_MAX_CONNECTIONS: Final = 256  # the app limits the requests
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TELL_AGAIN_SECONDS: Final = 60.0
MAX_MESSAGE_BYTES: Final = 1 << 20  # of a WebSocket


def _protocol(head_seconds: float, stalled_seconds: float) -> type[H11Protocol]:
    """uvicorn's, with a limit to the time that a request's head may take, to how many may be waited for, and to the
    time in which a client takes nothing of its answer."""
    waiting: dict[Protocol, asyncio.TimerHandle] = {}  # the oldest first

    class Protocol(H11Protocol):
        stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > _MAX_CONNECTIONS:
                self.app = _full
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.transport.get_protocol() is not self:
                return  # it is a WebSocket now
            if self.cycle is not None and not self.cycle.response_complete:
                self._wait_no_more()
            elif self not in waiting:
                self._wait()

        def handle_websocket_upgrade(self, event: Any) -> None:
            self._wait_no_more()
            super().handle_websocket_upgrade(event)

        def on_response_complete(self) -> None:
            """An answered connection that waits for nothing makes room too."""
            super().on_response_complete()
            idle = self.cycle.response_complete and not self.transport.get_write_buffer_size()
            if idle and not self.transport.is_closing() and self not in waiting:
                self._wait()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.stalled = asyncio.get_running_loop().call_later(stalled_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.stalled is not None:
                self.stalled.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_no_more()
            if self.stalled is not None:
                self.stalled.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if len(waiting) >= _MAX_WITHOUT_HEAD:
                oldest = next(iter(waiting))
                oldest._wait_no_more()
                oldest.transport.close()
            waiting[self] = asyncio.get_running_loop().call_later(head_seconds, self.transport.close)

        def _wait_no_more(self) -> None:
            if (timer := waiting.pop(self, None)) is not None:
                timer.cancel()

    return Protocol


class _WebSocket(WSProtocol):
    """uvicorn's, with the same limits. It asks for a sign of life now and then: a client that gives none, or takes
    nothing of what is sent to it, is gone."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()

    def keepalive_timeout(self) -> None:
        self.transport.abort()


async def _full(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"retry-after": str(RETRY_SECONDS), "connection": "close"}
    refused = problem(503, f"there are {_MAX_CONNECTIONS} connections already: try again", headers=headers)
    await refused(scope, receive, send)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The command line handles signals."""
        yield


def check_host(host: str, *, remote: bool) -> None:
    """Raises UsageError for an address that other hosts can reach, unless ``remote``."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not remote:
        raise UsageError(
            f"--host {host} can be reached from other hosts, and the server has no encryption: keep 127.0.0.1 and put "
            "a TLS proxy in front of it, or pass --allow-remote"
        )


@asynccontextmanager
async def serving(
    app: Any,
    *,
    host: str,
    port: int,
    head_seconds: float = HEAD_SECONDS,
    stalled_seconds: float = STALLED_SECONDS,
    ping_seconds: float = PING_SECONDS,
) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """Serve an ASGI app; yields its URL, and the task that ends if the server does. Port 0: any free port.

    Raises HostError when the server can't listen there.
    """
    bound = bind(host, port)
    address, number = bound.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    async with serving_on(app, bound, head_seconds, stalled_seconds, ping_seconds) as task:
        yield f"http://{shown}:{number}", task


@asynccontextmanager
async def serving_locally(app: Any, path: Path) -> AsyncIterator[asyncio.Task[None]]:
    """Serve an ASGI app on a Unix socket that only this user can open; yields the task that ends if the server does.
    While another server of this home has the socket, that is as good; once it is gone, ours takes the socket over.

    Raises HostError when the server can't listen there.
    """
    task = asyncio.create_task(_serve_locally(app, path, unix_socket.bind(path)))
    try:
        yield task
    finally:
        await cancel_all([task])


async def _serve_locally(app: Any, path: Path, bound: socket.socket | None) -> None:
    while bound is None:
        await asyncio.sleep(_TAKE_OVER_SECONDS)
        bound = unix_socket.bind(path)
    ours = unix_socket.inode(path)
    async with serving_on(app, bound) as task:
        try:
            await asyncio.wait({task})
            task.result()
        finally:  # while it still listens: as soon as it does not, the file may be another server's
            if unix_socket.inode(path) == ours:
                path.unlink(missing_ok=True)


@asynccontextmanager
async def serving_on(
    app: Any,
    bound: socket.socket,
    head_seconds: float = HEAD_SECONDS,
    stalled_seconds: float = STALLED_SECONDS,
    ping_seconds: float = PING_SECONDS,
) -> AsyncIterator[asyncio.Task[None]]:
    """Serve an ASGI app on this socket; yields the task that ends if the server does."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws=_WebSocket,
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_ping_interval=ping_seconds,
        ws_ping_timeout=stalled_seconds,
        ws_per_message_deflate=False,
        http=_protocol(head_seconds, stalled_seconds),
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(_tell_when_exhausted())
    task = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        yield task
    finally:
        loop.set_exception_handler(before)
        server.should_exit = True
        dropping = asyncio.create_task(_drop_unread(server))
        try:
            await finish_uninterrupted(_ended(task))
        finally:
            await cancel_all([dropping])


def _tell_when_exhausted() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object]:
    """asyncio accepts nothing for a second when it lacks descriptors, and says so to a log that goes nowhere."""
    told: float | None = None

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _EXHAUSTED:
            loop.default_exception_handler(context)
        elif told is None or loop.time() - told > _TELL_AGAIN_SECONDS:
            told = loop.time()
            log.warning("no connection can be accepted", error=error.strerror, limits="ulimit -n, LimitNOFILE")

    return handle


async def _drop_unread(server: uvicorn.Server) -> None:
    """Connections whose client has read nothing of what is sent to it since the last look: nothing would end a stream
    of events. Again and again, since an answer may have begun to wait for its client only now."""
    before: dict[Any, int] = {}
    while True:
        await asyncio.sleep(_UNREAD_SECONDS)
        transports = [one.transport for one in server.server_state.connections if one.transport is not None]
        unread = {one: size for one in transports if (size := one.get_write_buffer_size())}
        for transport, size in unread.items():
            if before.get(transport) == size:
                transport.abort()
        before = unread


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.gather(task, return_exceptions=True)


def bind(host: str, port: int, *, choose: str = "--port") -> socket.socket:
    """Bind here instead of in uvicorn: clients can then connect as soon as they know the URL. ``choose``: the option or
    setting that would choose another. Raises HostError."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol: without it, asyncio leaves Nagle's algorithm on, and small answers wait 40 ms for an ACK.
        bound = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise HostError(f"can't listen on {host}: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise HostError(f"can't listen on {host}, port {port}: {error.strerror}; choose another {choose}") from None
    return bound
