"""Crash points: places between two writes to the database, by name, where a test can have this process die.

Nothing happens unless `arm` was called, which the command line does when ``SWARM_FAULT`` is set: a crash test starts an
engine with it and then shows that a restart ends right. `reach` costs a comparison.

A point is named by what has just been done: ``claimed``, ``placed`` (a VM is there, its number not yet written),
``flushed``, ``renewed``, ``executed`` (the VM is gone, its outcome not yet written), ``finished``; and by the store:
``claim:uncommitted``, ``claim:committed``, and so on for finish, running, renew, append; ``decided`` and ``apply:…``
where a workflow's decision was too dear for a transaction; ``fire:…`` where a schedule's tickets are made. ``@3``
behind it: the third time.
"""

from __future__ import annotations

import os
import signal

_WRITES = ("claim", "finish", "running", "renew", "append")
POINTS = (
    "claimed", "placed", "flushed", "renewed", "executed", "finished",
    *(f"{write}:{state}" for write in _WRITES for state in ("uncommitted", "committed")),
)  # fmt: skip
OF_SCHEDULES = ("fire:uncommitted", "fire:committed")

# On the way of a workflow whose decisions are made outside of a transaction.
OF_WORKFLOWS = ("decided", "apply:uncommitted", "apply:committed")

armed: str | None = None
_left = 0


def arm(spec: str) -> None:
    """Die at a point: ``name`` or ``name@count``. Raises ValueError for a name that nobody reaches."""
    global armed, _left
    name, _, count = spec.partition("@")
    known = (*POINTS, *OF_SCHEDULES, *OF_WORKFLOWS)
    if name not in known:
        raise ValueError(f"no crash point {name!r}; there are {', '.join(known)}")
    armed, _left = name, int(count or 1)


def reach(name: str) -> None:
    global _left
    if armed is not None and armed == name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # no clean-up of any kind, as in a crash
