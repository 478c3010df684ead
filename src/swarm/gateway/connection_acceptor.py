"""Accepts connections from one VM, a bounded number at a time, on a socket that can be closed at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable

from swarm.base.log import logger

log = logger(__name__)


class ConnectionAcceptor:
    """Calls ``handle`` with each connection, in a task. If that raises, the connection is closed; otherwise
    `connection_ended` must be called when it has ended. At most ``max_connections`` are open; more wait in the kernel's
    queue, which is bounded too."""

    def __init__(
        self, sock: socket.socket, *, max_connections: int, handle: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        self._socket = sock
        self._free = max_connections
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        sock.setblocking(False)
        self._listen()

    def connection_ended(self) -> None:
        self._free += 1
        if self._free == 1:
            self._listen()

    def stop(self) -> None:
        """Accept nothing from now on. Idempotent; doesn't wait."""
        if not self._stopped:
            self._stopped = True
            self._loop.remove_reader(self._socket)
            self._socket.close()
            for task in self._tasks:
                task.cancel()

    async def close(self, *, seconds: float) -> None:
        """Stop, and wait for the tasks that handle connections."""
        self.stop()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)

    def _listen(self) -> None:
        if not self._stopped and self._free:
            self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        """Accept one connection. Not by `loop.sock_accept`: a socket that it waits for can't be closed at once."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as problem:
            if problem.errno == errno.EINVAL:  # the engine has shut it down, and will say so
                self._loop.remove_reader(self._socket)
                return
            # Out of descriptors: some may be closed soon.
            log.warning("can't accept a VM's connection", error=str(problem))
            self._loop.remove_reader(self._socket)
            self._loop.call_later(0.1, self._listen)
            return
        self._free -= 1
        if not self._free:
            self._loop.remove_reader(self._socket)
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._handle_connection(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle_connection(self, connection: socket.socket) -> None:
        try:
            await self._handle(connection)
        except BaseException as problem:
            connection.close()
            self.connection_ended()
            if not isinstance(problem, OSError):
                raise
