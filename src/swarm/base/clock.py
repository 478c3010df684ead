"""Times and ages as text; and the clock of an attempt, from its row to its result, which is monotonic."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

from swarm.errors import UsageError

# The marks of an attempt, in order, each with the name of the phase that it ends.
MARKS: Final = (
    ("claimed", "queue"),  # the row was committed (database clock) → this worker has claimed it
    ("template", "template"),  # → its template is there; built now if it is the first to need it
    ("slot", "network"),  # → its network slot is ready
    ("running", "vmm"),  # → the VMM runs the VM (booted or restored)
    ("answered", "boot"),  # → agentd answered: userspace is up
    ("renewed", "connect"),  # → the guest has its own identity, clock and randomness, and its way to the gateway
    ("sent", "upload"),  # → the agent, its input and the ticket's files are there
    ("started", "start"),  # → the agent's first instruction
    ("ended", "agent"),  # → the agent has ended
    ("collected", "collect"),  # → its output is on the host, checked
    ("stopped", "stop"),  # → the VM and its resources are gone
)
PHASES: Final = tuple(phase for _, phase in MARKS)

MAX_AGE_SECONDS: Final = 100 * 365 * 86_400  # a time before year 1 has no date
_FIRST_MS, _LAST_MS = -62_135_596_800_000, 253_402_300_799_999
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def iso(ms: float | None = None) -> str:
    """Milliseconds since the epoch, or now, as ISO-8601 UTC: 2026-01-31T12:00:00.000Z, like every time we print. What
    is beyond all dates becomes the first or the last one."""
    ms = time.time() * 1000 if ms is None else min(max(ms, _FIRST_MS), _LAST_MS)
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def age_seconds(text: str) -> float:
    """'30d', '12h', '90m', '60s' or '2w' in seconds. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text.strip())
    if match is None or float(match[1]) * _UNITS[match[2]] > MAX_AGE_SECONDS:
        raise UsageError(f"{text!r} is not an age up to a century: write a number and s, m, h, d or w, such as 30d")
    return float(match[1]) * _UNITS[match[2]]


def moment(text: str) -> str:
    """An ISO-8601 time, or an age before now, as the database writes times; '' for ''. Raises UsageError."""
    if not text:
        return ""
    try:
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            at = datetime.now(UTC) - timedelta(seconds=age_seconds(text))
        at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (UsageError, OverflowError):
        raise UsageError(f"{text!r} is not a time: write 2026-01-31, 2026-01-31T12:00, or an age such as 7d") from None
    return at.isoformat(timespec="milliseconds")[:-6] + "Z"


class Timeline:
    """Marks of one attempt. ``queued_ms``: how long the row had waited when the attempt began (database clock)."""

    def __init__(self, *, queued_ms: float = 0.0) -> None:
        self._queued_ms = queued_ms
        self._marks: dict[str, int] = {"claimed": time.monotonic_ns()}
        self._cuts: dict[str, int] = {}

    def mark(self, name: str, at_ns: int | None = None) -> None:
        self._marks[name] = time.monotonic_ns() if at_ns is None else at_ns

    def cut(self) -> None:
        """The current phase ends before its mark, by a time-out, say: what it took until now is counted as its own,
        instead of as the next one's."""
        mark = MARKS[PHASES.index(self.last)][0]
        if mark != "stopped":
            self._cuts[mark] = time.monotonic_ns()

    @contextmanager
    def cut_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.cut()
            raise

    def __contains__(self, name: str) -> bool:
        """Was the mark reached?"""
        return name in self._marks

    @property
    def last(self) -> str:
        """The current phase: the one after the last mark."""
        passed = max(i for i, (mark, _) in enumerate(MARKS) if mark in self._cuts | self._marks)
        return PHASES[min(passed + 1, len(PHASES) - 1)]

    def since_ms(self, mark: str) -> float:
        return (time.monotonic_ns() - self._marks[mark]) / 1e6 if mark in self._marks else 0.0

    def phases(self) -> dict[str, float]:
        """Milliseconds of each phase that has ended, in order, and their ``total``. If a mark was neither reached nor
        cut, its phase is left out and its time counts towards the next phase."""
        result = {"queue": round(self._queued_ms, 2)}
        marks = self._cuts | self._marks
        before = marks["claimed"]
        for mark, phase in MARKS[1:]:
            if mark in marks:
                result[phase] = round(max(0, marks[mark] - before) / 1e6, 2)
                before = max(before, marks[mark])
        return result | {"total": round(self._queued_ms + (before - self._marks["claimed"]) / 1e6, 2)}
