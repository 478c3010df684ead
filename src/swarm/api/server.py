"""Runs one HTTP server for the duration of a block."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import uvicorn

from swarm.base.aio import finish_uninterrupted
from swarm.errors import HostError, UsageError

# How long running requests may take when the server stops.
GRACE_SECONDS: Final = 10


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
async def serving(app: Any, *, host: str, port: int) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """Serve an ASGI app; yields its URL, and the task that ends if the server does. Port 0: any free port.

    Raises HostError when the server can't listen there.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        http="h11",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=256,  # connections; the app limits the requests
        timeout_keep_alive=5,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server, bound = _Server(config), _bind(host, port)
    task = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        address, number = bound.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        yield f"http://{shown}:{number}", task
    finally:
        server.should_exit = True
        await finish_uninterrupted(_ended(task))


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.gather(task, return_exceptions=True)


def _bind(host: str, port: int) -> socket.socket:
    """Bind here instead of in uvicorn: clients can then connect as soon as they know the URL."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(kind, socket.SOCK_STREAM)
    except OSError as error:
        raise HostError(f"can't listen on {host}: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise HostError(f"can't listen on {host}, port {port}: {error.strerror}; choose another --port") from None
    return bound
