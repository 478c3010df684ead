"""Lets other tickets go between large ones.

SQLite reads and writes a row as a whole at each of its transitions, with its one write lock: one of 15 MB takes the
writing thread 0.1 to 0.2 s of CPU from its start to its end, and all others wait. So while small tickets begin too, a
large one begins only when the last one's pause is over, however many there are; what is behind it need not wait.

Large inputs are looked at before their ticket is claimed, outside the transaction: so one that is refused is written
once, not twice.
"""

from __future__ import annotations

import time
from collections.abc import Collection
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
    """At a ticket's inputs. ``error``: what is wrong with these ``inputs``; None: nothing, for all that is known."""

    error: str | None = None
    inputs: str | None = None


NOTHING: Final = Look()


class Pace:
    """For one process, on the writing thread; but `in_hand`, `looked` and `due` are for the event loop's. Forgetting it
    would do no harm. ``looks``: somebody looks at the inputs of ``in_hand``, and then calls `looked`."""

    def __init__(self) -> None:
        self.looks = False
        self.in_hand: str | None = None  # the ticket whose inputs are to be looked at
        self._looks = dict[str, Look]()  # by ticket, the oldest first
        self._until = 0.0
        self._small_at = -OTHERS_SECONDS
        self._put_off: dict[str, tuple[float, str]] = {}

    def left_out(self) -> tuple[str, ...]:
        """The ids of those that were put off. Once the pause is over, the first of them may begin."""
        in_hand = self.in_hand
        if self._put_off and self._left() <= 0 and in_hand is None:
            del self._put_off[min(self._put_off, key=self._put_off.__getitem__)]
        return *self._put_off, *([in_hand] if in_hand is not None else [])

    def waiting(self) -> tuple[str, ...]:
        """Those that were put off, once the next one may begin."""
        return tuple(self._put_off) if self._left() <= 0 and self.in_hand is None else ()

    def keep(self, ids: Collection[str]) -> None:
        """Of those that were put off, only these are still ready: nobody waits for the others."""
        self._put_off = {id: turn for id, turn in self._put_off.items() if id in ids}

    def puts_off(self, id: str, turn: tuple[float, str]) -> bool:
        """Is this large ticket left to a later claim? Before a look at it, others are looked at in their turn."""
        waits = self._left() > 0
        if self.looks and id not in self._looks:
            waits |= self.in_hand is not None or any(other < turn for other in self._put_off.values())
        if not waits or len(self._put_off) >= MOST:
            return False
        self._put_off[id] = turn
        return True

    def look(self, id: str) -> Look | None:
        """What was found in this ticket's inputs. None: it is left to a later claim, since they are looked at first."""
        if not self.looks:
            return NOTHING
        if (look := self._looks.get(id)) is None and self.in_hand is None:
            self.in_hand = id
            return None
        return look or NOTHING

    def looked(self, id: str, look: Look) -> None:
        good = [one for one, found in self._looks.items() if found.error is None]  # the inputs of one are kept at most
        self._looks = dict.fromkeys(good[-MOST:], NOTHING) | {id: look}
        self.in_hand = None

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
        if not self._put_off or self.in_hand is not None:
            return due
        left_ms = max(0.0, self._left() * 1000)
        return replace(due, next_ms=left_ms if due.next_ms is None else min(left_ms, due.next_ms))

    def _left(self) -> float:
        """Seconds until the pause is over."""
        return min(self._until, self._small_at + OTHERS_SECONDS) - time.monotonic()
