"""Messages between the engine and the gateway's process: JSON objects over a socket pair that keeps their borders.

A message may carry one descriptor. Sending never blocks: what the other side does not take yet waits here, so a process
that is stopped stops nobody else. What waits is bounded by what each side does: the engine opens and closes listeners,
the gateway has a bounded number of calls under way, and an end with very much waiting ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

MAX_BYTES: Final = 192 * 1024  # of a message: the kernel's buffer takes 208 KiB unless its settings say otherwise
# Parsing takes time by these: see `swarm.channel.frames`. The engine doesn't trust the gateway either.
_MAX_BRACKETS: Final = 1024
_MAX_COMMAS: Final = 8192
_BUFFER_BYTES: Final = 1 << 20
_MESSAGES_PER_TURN: Final = 32
_MAX_WAITING: Final = 20_000  # messages: more than all honest listeners are handed over and answered

Message = dict[str, Any]


class Link:
    """One end. ``received`` is called with each message and its descriptor, ``ended`` once, when the other end is gone,
    sent what is no message, or takes none. The caller closes it. ``descriptors``: does it take any? One that doesn't
    ends when it is sent some."""

    def __init__(
        self,
        sock: socket.socket,
        received: Callable[[Message, int | None], None],
        ended: Callable[[], None],
        *,
        descriptors: bool = False,
    ) -> None:
        self._descriptors = int(descriptors)
        self._socket = sock
        self._received = received
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[bytes, int | None]] = deque()
        self.closed = False
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._loop.add_reader(sock, self._read)

    def send(self, message: Mapping[str, object], descriptor: int | None = None) -> None:
        """Never blocks; dropped if the link has ended. ``descriptor`` may be closed afterwards. Raises ValueError for
        what is too long."""
        data = encode(message)
        if len(self._waiting) >= _MAX_WAITING:
            self._loop.call_soon(self._end)
        elif not self.closed:
            self._waiting.append((data, None if descriptor is None else os.dup(descriptor)))
            if len(self._waiting) == 1:
                self._write()

    def close(self) -> None:
        """Idempotent."""
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            while self._waiting:
                _close(self._waiting.popleft()[1])

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self._ended()

    def _write(self) -> None:
        try:
            while self._waiting:
                data, descriptor = self._waiting[0]
                socket.send_fds(self._socket, [data], [] if descriptor is None else [descriptor])
                self._waiting.popleft()
                _close(descriptor)
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._write)
        except OSError:
            self._end()
        else:
            self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):  # the rest after what else the loop has to do
            try:
                data, descriptors, flags, _ = socket.recv_fds(
                    self._socket, MAX_BYTES, self._descriptors, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                data, descriptors, flags = b"", [], 0
            descriptor = descriptors[0] if descriptors else None
            try:
                if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    raise ValueError("the other end is gone")
                _check(data)
                message = json.loads(data)
                if not isinstance(message, dict):
                    raise TypeError("not an object")
            except (ValueError, TypeError, RecursionError):
                _close(descriptor)
                self._end()
                return
            self._received(message, descriptor)
            if self.closed:
                return


def encode(message: Mapping[str, object]) -> bytes:
    """Raises ValueError for what is too long."""
    # Half of a surrogate pair is no text to the other end; hostile guests and services may send one.
    data = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
    _check(data)
    return data


def _check(data: bytes) -> None:
    brackets, commas = sum(map(data.count, (b"[", b"{"))), data.count(b",")
    if len(data) > MAX_BYTES or brackets > _MAX_BRACKETS or commas > _MAX_COMMAS:
        raise ValueError(f"a message is too long: {len(data)} bytes, {brackets} brackets, {commas} commas")


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
