"""Lets other tickets go between large ones.

SQLite reads and writes a row as a whole at each of its transitions, with its one write lock: one of 15 MB takes the
writing thread 0.1 to 0.2 s of CPU from its start to its end, and all others wait. So while small tickets begin too, a
large one begins only when the last one's pause is over, however many there are; what is behind it need not wait.

Large inputs are looked at before their ticket is claimed, outside the transaction: so one that is refused is written
once, not twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from swarm.store.sql.rows import Due
from swarm.store.sql.transaction import Tx

LARGE: Final = 1 << 20  # bytes of a ticket
BYTES_PER_SECOND: Final = 5 << 20  # of large tickets that begin, or are refused
MOST_SECONDS: Final = 30.0
OTHERS_SECONDS: Final = 10.0  # after a small one began, others are expected
MOST: Final = 512  # put off; those behind them take their turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """At a ticket's ``inputs``; ``error`` says what is wrong with them. Without both, nothing was found out."""

    ticket_id: str
    inputs: str | None = None
    error: str | None = None


class Pace:
    """For one process, on the writing thread. Forgetting it would do no harm. ``looks``: there is somebody who looks at
    inputs, and calls `to_look_at` and `looked`, on any thread."""

    def __init__(self) -> None:
        self.looks = False
        self._wanted = dict[str, bool]()  # tickets whose inputs are to be looked at; True: that has begun
        self._look: Look | None = None  # the last one
        self._until = 0.0
        self._small_at = -OTHERS_SECONDS
        self._put_off: dict[str, tuple[float, str]] = {}

    def left_out(self) -> tuple[str, ...]:
        """The ids of those that were put off. Once the pause is over, the first of them may begin."""
        if self._put_off and self._left() <= 0:
            del self._put_off[min(self._put_off, key=self._put_off.__getitem__)]
        return *self._put_off, *(tuple(self._wanted) if self.looks else ())

    def puts_off(self, id: str, turn: tuple[float, str]) -> bool:
        """Is this large ticket left to a later claim?"""
        if self._left() <= 0 or len(self._put_off) >= MOST:
            return False
        self._put_off[id] = turn
        return True

    def look(self, id: str) -> Look | None:
        """What was found at this ticket; None: it is left to a later claim, since it is to be looked at first."""
        if not self.looks:
            return Look(ticket_id=id)
        if (look := self._look) is not None and look.ticket_id == id:
            return look
        self._wanted.setdefault(id, False)
        return None

    def to_look_at(self) -> list[str]:
        """Each id once."""
        found = [id for id, begun in tuple(self._wanted.items()) if not begun]
        self._wanted.update(dict.fromkeys(found, True))
        return found

    def looked(self, look: Look) -> None:
        self._look = look
        self._wanted.pop(look.ticket_id, None)

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
