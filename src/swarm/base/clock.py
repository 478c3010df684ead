"""The honest clock: every attempt's way from its row to its result, on one monotonic clock."""

from __future__ import annotations

import time
from typing import Final

# Marks in the order in which an attempt passes them, each with the name of the phase that ends there.
MARKS: Final = (
    ("claimed", "queue"),  # the row was committed (database clock) → this worker has it
    ("template", "template"),  # → its template is there; built now if nobody needed it before
    ("slot", "network"),  # → its network place is ready
    ("running", "vmm"),  # → the VMM runs the VM (booted or restored)
    ("answered", "boot"),  # → agentd answered: userspace is up
    ("renewed", "connect"),  # → the guest has its own identity, clock and randomness; agent and input are there
    ("started", "start"),  # → the agent's first instruction
    ("ended", "agent"),  # → the agent ended
    ("collected", "collect"),  # → its output is on the host, checked
    ("stopped", "stop"),  # → the VM and all it had are gone
)
PHASES: Final = tuple(phase for _, phase in MARKS)


class Timeline:
    """Marks of one attempt. ``queued_ms``: how long the row had waited when the attempt began (database clock)."""

    def __init__(self, *, queued_ms: float = 0.0) -> None:
        self._queued_ms = queued_ms
        self._marks: dict[str, int] = {"claimed": time.monotonic_ns()}

    def mark(self, name: str, at_ns: int | None = None) -> None:
        self._marks[name] = time.monotonic_ns() if at_ns is None else at_ns

    def __contains__(self, name: str) -> bool:
        return name in self._marks

    @property
    def last(self) -> str:
        """The phase that is going on now: the one after the last mark."""
        passed = max(i for i, (mark, _) in enumerate(MARKS) if mark in self._marks)
        return PHASES[min(passed + 1, len(PHASES) - 1)]

    def since_ms(self, mark: str) -> float:
        return (time.monotonic_ns() - self._marks[mark]) / 1e6 if mark in self._marks else 0.0

    def phases(self) -> dict[str, float]:
        """Milliseconds of each phase passed so far, in order, and their ``total``. A phase whose mark was never
        reached is left out, and its time counts to the next one that was."""
        result = {"queue": round(self._queued_ms, 2)}
        before = self._marks["claimed"]
        for mark, phase in MARKS[1:]:
            if mark in self._marks:
                result[phase] = round(max(0, self._marks[mark] - before) / 1e6, 2)
                before = max(before, self._marks[mark])
        return result | {"total": round(self._queued_ms + (before - self._marks["claimed"]) / 1e6, 2)}
