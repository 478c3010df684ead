"""A VM's serial console: kept on disk, bounded however much the guest prints."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

# Enough for a boot and a panic with its call trace. If a guest prints more, the middle is dropped, never the end.
HEAD_BYTES = 64 * 1024
TAIL_BYTES = 64 * 1024


class Console:
    """Reads the console from one end of a socket pair; the VMM writes to the other.

    The first ``HEAD_BYTES`` are written to ``path`` as they arrive; the last ``TAIL_BYTES`` are kept in memory and
    appended when the console ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        ours, self._theirs = socket.socketpair()
        ours.setblocking(False)
        self._ours = ours
        self._file = path.open("wb", buffering=0)
        self._head = bytearray()
        self._dropped = 0
        self._tail = bytearray()
        self._waiters: list[tuple[bytes, asyncio.Future[None]]] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(ours.fileno(), self._read)

    def fileno(self) -> int:
        """The VMM's end."""
        return self._theirs.fileno()

    def started(self) -> None:
        """The VMM has inherited its end: close our copy, so that the console ends when the VMM dies."""
        self._theirs.close()

    async def printed(self, text: bytes) -> None:
        """Return when the guest has printed ``text``. Waits for ever if it never does: cancel it."""
        if text in self._head + self._tail:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append((text, future))
        await future

    def close(self) -> None:
        """Read what is left and write the tail. Idempotent."""
        self._theirs.close()
        if self._file.closed:
            return
        while self._read():
            pass
        self._loop.remove_reader(self._ours.fileno())
        self._ours.close()
        with contextlib.suppress(OSError):  # a full disk must not keep a VM from being cleaned up
            if self._dropped:
                self._file.write(b"\n[... %d bytes dropped ...]\n" % self._dropped)
            self._file.write(self._tail)
        self._file.close()

    def text(self) -> str:
        """What the guest printed, without control characters."""
        return printable(bytes(self._head + self._tail))

    def _read(self) -> bool:
        try:
            data = self._ours.recv(65536)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._ours.fileno())
            return False
        head = data[: HEAD_BYTES - len(self._head)]
        if head:
            with contextlib.suppress(OSError):  # a full disk must not end the VM
                self._file.write(head)
        self._head += head
        self._tail += data[len(head) :]
        if len(self._tail) > TAIL_BYTES:
            self._dropped += len(self._tail) - TAIL_BYTES
            del self._tail[:-TAIL_BYTES]
        if self._waiters:
            seen = self._head + self._tail
            for text, future in self._waiters:
                if text in seen and not future.done():
                    future.set_result(None)
            self._waiters = [(t, f) for t, f in self._waiters if not f.done()]
        return True


def printable(data: bytes) -> str:
    """Guest output as text without control characters, safe for a terminal."""
    text = data.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c if c.isprintable() or c in "\n\t" else "" for c in text)


def last_lines(path: Path, *, lines: int = 20, limit_bytes: int = 16384) -> list[str]:
    """The last lines of a console log on disk; empty if the file doesn't exist."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit_bytes))
            text = printable(file.read(limit_bytes))
    except OSError:
        return []
    return [line for line in text.split("\n") if line.strip()][-lines:]
