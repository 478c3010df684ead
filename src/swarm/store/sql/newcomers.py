"""Lets a program that has just opened the database write first.

The `sqlite3` shell opens the file, writes a millisecond later, waits for no lock, and closes the file. Our transactions
hold the write lock for a fifth of that. So one that waits while a program is between its open and its close does not
refuse it, and one that began before is over when the program comes to write.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from asyncinotify import InitFlags, Inotify, Mask

from swarm.base.files import real

_MASK: Final = Mask.OPEN | Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE
_READ_BYTES: Final = 1 << 14
_READS: Final = 32  # more than the kernel's longest queue: a program that opens the file without end holds up nobody
_EVENT: Final = struct.Struct("iIII")  # inotify(7), of a watched file


class Newcomers:
    """To the database ``file``. For one thread.

    ``most_seconds``: for one newcomer, who may only read, or stay: nobody is waited for twice. ``now``: in seconds.
    """

    def __init__(self, file: Path, *, most_seconds: float = 0.01, now: Callable[[], float] = time.monotonic) -> None:
        self._file, self.most_seconds, self._now = real(file), most_seconds, now
        self._inotify: Inotify | None = None
        self._refused = False  # the kernel has no watch left, or this process no descriptor
        self._poll = select.poll()
        self._someone = False  # the last that happened to the file is that it was opened
        self._allowed, self._since = 0.0, -math.inf  # seconds that it may wait

    def let_in(self) -> float:
        """Wait for who has opened the file since the last time. Returns the seconds; they are at most half of all time,
        however many come."""
        if self._inotify is None and not self._watch():
            return 0.0
        self._look()
        began, waited = self._now(), 0.0
        self._allowed = min(self._allowed + began - self._since, 2 * self.most_seconds)
        while self._someone and waited < (most := min(self.most_seconds, self._allowed)):
            self._poll.poll((most - waited) * 1000)
            self._look()
            waited = self._now() - began
        self._someone = False
        self._allowed, self._since = self._allowed - waited, began + waited
        return waited

    def _watch(self) -> bool:
        if self._refused:
            return False
        try:
            self._inotify = Inotify(InitFlags.CLOEXEC)
            os.set_blocking(self._inotify.fd, False)  # its InitFlags.NONBLOCK is not the kernel's
            self._inotify.add_watch(self._file, _MASK)
        except OSError:
            self._refused = True
            self.close()
            return False
        self._poll.register(self._inotify.fd, select.POLLIN)
        return True

    def _look(self) -> None:
        """A close is taken for the last newcomer's, whose ever it is: events don't tell."""
        assert self._inotify is not None
        with contextlib.suppress(BlockingIOError):
            for _ in range(_READS):
                *_, (_, mask, _, _) = _EVENT.iter_unpack(os.read(self._inotify.fd, _READ_BYTES))
                self._someone = bool(mask & Mask.OPEN)

    def close(self) -> None:
        inotify, self._inotify = self._inotify, None
        if inotify is not None:
            inotify.close()
