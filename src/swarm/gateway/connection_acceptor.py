"""Accepting connections from one VM, a bounded number at a time, on a listener that can be shut at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)


class ConnectionAcceptor:
    """Calls ``welcome`` with each connection, in a task; if it raises, the connection is over, else somebody must say
    `left` when it is. ``most`` may be in; more wait in the kernel's queue, which is bounded as well."""

    def __init__(
        self, listener: socket.socket, *, most: int, welcome: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        self._listener = listener
        self._room = most
        self._welcome = welcome
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._shut = False
        listener.setblocking(False)
        self._listen()

    def left(self) -> None:
        self._room += 1
        if self._room == 1:
            self._listen()

    def shut(self) -> None:
        """Nobody gets in from here on. Idempotent; waits for nothing."""
        if not self._shut:
            self._shut = True
            self._loop.remove_reader(self._listener)
            self._listener.close()
            for task in self._tasks:
                task.cancel()

    async def close(self, *, seconds: float) -> None:
        """Shut, and wait for those who were being welcomed."""
        self.shut()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)

    def _listen(self) -> None:
        if not self._shut and self._room:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Somebody knocks. Not by `loop.sock_accept`: a listener that it waits for can't be closed at once."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as problem:  # out of descriptors: others may let go of some
            log.warning("can't accept a VM's connection", error=str(problem))
            self._loop.remove_reader(self._listener)
            self._loop.call_later(0.1, self._listen)
            return
        self._room -= 1
        if not self._room:
            self._loop.remove_reader(self._listener)
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._receive(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _receive(self, connection: socket.socket) -> None:
        try:
            await self._welcome(connection)
        except BaseException as problem:
            connection.close()
            self.left()
            if not isinstance(problem, OSError):
                raise
