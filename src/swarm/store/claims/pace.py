"""Lets other tickets go between large ones.

SQLite reads and writes a row as a whole at each of its transitions, with its one write lock: one of 15 MB takes the
writing thread 0.1 to 0.2 s of CPU from its start to its end, and all others wait. So while small tickets begin too, a
large one begins only when the last one's pause is over, however many there are; what is behind it need not wait.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Final

from swarm.store.sql.rows import Due
from swarm.store.sql.transaction import Tx

LARGE: Final = 1 << 20  # bytes of a ticket
BYTES_PER_SECOND: Final = 5 << 20  # of large tickets that begin, or are refused
MOST_SECONDS: Final = 30.0
OTHERS_SECONDS: Final = 10.0  # after a small one began, others are expected
MOST: Final = 512  # put off; those behind them take their turn


class Pace:
    """For one process, on the writing thread. Forgetting it would do no harm."""

    def __init__(self) -> None:
        self._until = 0.0
        self._small_at = -OTHERS_SECONDS
        self._put_off: dict[str, tuple[float, str]] = {}

    def left_out(self) -> tuple[str, ...]:
        """The ids of those that were put off. Once the pause is over, the first of them may begin."""
        if self._put_off and self._left() <= 0:
            del self._put_off[min(self._put_off, key=self._put_off.__getitem__)]
        return tuple(self._put_off)

    def puts_off(self, id: str, turn: tuple[float, str]) -> bool:
        """Is this large ticket left to a later claim?"""
        if self._left() <= 0 or len(self._put_off) >= MOST:
            return False
        self._put_off[id] = turn
        return True

    def note(self, tx: Tx, size: int) -> None:
        """A ticket of this size begins, or is refused."""
        if size < LARGE:
            self._small_at = time.monotonic()
        else:
            tx.if_undone(partial(setattr, self, "_until", self._until))
            pause = min(size / BYTES_PER_SECOND, MOST_SECONDS)
            self._until = max(self._until, time.monotonic() + pause)

    def due(self, due: Due) -> Due:
        """Of those that were put off, the first may begin when the pause is over."""
        if not self._put_off:
            return due
        left_ms = max(0.0, self._left() * 1000)
        return replace(due, next_ms=left_ms if due.next_ms is None else min(left_ms, due.next_ms))

    def _left(self) -> float:
        """Seconds until the pause is over."""
        return min(self._until, self._small_at + OTHERS_SECONDS) - time.monotonic()
