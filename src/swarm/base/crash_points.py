"""Crash points: named places between two writes to the database, at which a test can kill this process.

Nothing happens unless `arm` was called, which the command line does when ``SWARM_FAULT`` is set. A crash test starts an
engine that way and then shows that a restart recovers. `reach` costs one comparison.

A point is named after the step just completed: ``claimed``, ``placed`` (the VM runs, its number isn't written yet),
``flushed``, ``renewed``, ``executed`` (the VM is gone, its outcome isn't written yet), ``finished``. The store adds
``claim:uncommitted``, ``claim:committed``, and likewise for finish, running, renew and append; ``decided`` and
``apply:…`` for a workflow decision too expensive for a transaction, ``write_items:…`` for rows that are written ahead
of one; ``fire:…`` for the tickets of a schedule. Of sandboxes: ``sandbox:started`` (its row doesn't say so yet),
``sandbox:saved`` (its VM is gone, and its row doesn't know of the snapshot). The suffix ``@3`` means the third time.
"""

from __future__ import annotations

import os
import signal

_WRITES = ("claim", "finish", "running", "renew", "append")
POINTS = (
    "claimed", "placed", "flushed", "renewed", "executed", "finished",
    *(f"{write}:{state}" for write in _WRITES for state in ("uncommitted", "committed")),
)  # fmt: skip
OF_SANDBOXES = ("sandbox:started", "sandbox:saved")
OF_SCHEDULES = ("fire:uncommitted", "fire:committed")
OF_WORKFLOWS = ("decided", "apply:uncommitted", "apply:committed")  # of decisions made outside a transaction
OF_ITEMS = ("write_items:uncommitted", "write_items:committed")  # of rows that are written ahead of them

armed: str | None = None
_left = 0


def arm(spec: str) -> None:
    """Die at a point: ``name`` or ``name@count``. Raises ValueError for an unknown name."""
    global armed, _left
    name, _, count = spec.partition("@")
    known = (*POINTS, *OF_SANDBOXES, *OF_SCHEDULES, *OF_WORKFLOWS, *OF_ITEMS)
    if name not in known:
        raise ValueError(f"unknown crash point {name!r}; use one of {', '.join(known)}")
    armed, _left = name, int(count or 1)


def reach(name: str) -> None:
    """Die here, if this point is armed and was reached as often as asked."""
    global _left
    if armed is not None and armed == name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # without any clean-up, as in a crash
