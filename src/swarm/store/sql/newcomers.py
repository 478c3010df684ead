"""Lets a program that has just opened the database write first.

The `sqlite3` shell opens the file, writes a millisecond later, waits for no lock, and closes the file. Our transactions
hold the write lock for a fifth of that. So one that waits while a program is between its open and its close does not
refuse it, and a short one that began before is over when the program comes to write.
"""

from __future__ import annotations

import math
import os
import select
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from asyncinotify import Mask

from swarm.base import libc
from swarm.base.files import real

_MASK: Final = Mask.OPEN | Mask.CLOSE_WRITE | Mask.CLOSE_NOWRITE
_READ_BYTES: Final = 1 << 14
_READS: Final = 32  # more than the kernel's default queue: a program that opens the file without end holds up nobody
_EVENT: Final = struct.Struct("iIII")  # inotify(7), of a watched file


class Newcomers:
    """To the database ``file``. For one thread.

    ``most_seconds``: for one newcomer, who may only read, or stay: nobody is waited for twice. ``now``: in seconds.
    """

    def __init__(self, file: Path, *, most_seconds: float = 0.01, now: Callable[[], float] = time.monotonic) -> None:
        self._file, self.most_seconds, self._now = os.fsencode(real(file)), most_seconds, now
        self._fd: int | None = None
        self._refused = False  # the kernel has no watch left, or this process no descriptor
        self._poll = select.poll()
        self._someone = False  # the last that happened to the file is that it was opened
        self._allowed, self._since = 0.0, -math.inf  # seconds that it may wait

    def let_in(self) -> float | None:
        """Wait for who has opened the file since the last time. Returns the seconds, at most half of all time however
        many come; None if nobody has come, or gone."""
        if self._fd is None and not self._watch():
            return None
        came = self._look()
        began, waited = self._now(), 0.0
        self._allowed = min(self._allowed + began - self._since, 2 * self.most_seconds)
        while self._someone and waited < (most := min(self.most_seconds, self._allowed)):
            self._poll.poll((most - waited) * 1000)
            self._look()
            waited = self._now() - began
        self._someone = False
        # This process may have been stopped for an hour meanwhile.
        self._allowed, self._since = max(self._allowed - waited, -self.most_seconds), began + waited
        return waited if came else None

    def _watch(self) -> bool:
        if self._refused:
            return False
        try:
            self._fd = libc.inotify()
            libc.add_watch(self._fd, self._file, _MASK)
        except OSError:
            self._refused = True
            self.close()
            return False
        self._poll.register(self._fd, select.POLLIN)
        return True

    def _look(self) -> bool:
        """Has anybody come or gone? A close is taken for the last newcomer's, whose ever it is: events don't tell."""
        assert self._fd is not None
        for number in range(_READS):
            try:
                events = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                return number > 0
            *_, (_, mask, _, _) = _EVENT.iter_unpack(events)
            self._someone = bool(mask & Mask.OPEN)
        return True

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
