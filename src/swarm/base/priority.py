"""A thread that keeps others waiting goes first on its CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_FIRST: Final = os.sched_param(1)
_ORDINARY: Final = os.sched_param(0)


@contextmanager
def ahead_of_others() -> Iterator[None]:
    """Run the block, of milliseconds at most, as a real-time thread: no ordinary one takes its CPU from it. For a lock
    that others don't wait for, but fail at: a VM that preempts its holder prolongs it by a time slice.

    Where this is not allowed (CAP_SYS_NICE), and for a thread that has another policy already, the block just runs.
    """
    # RESET_ON_FORK: no child inherits it. Only the privileged may clear that flag again, so it stays.
    raised = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER
    if raised:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, _FIRST)
        except OSError:
            raised = False
    try:
        yield
    finally:
        if raised:
            os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, _ORDINARY)
