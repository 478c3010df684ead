"""Who goes first on a CPU: a thread that keeps others waiting, then the engine, VMs, and what reads large values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

# Steps of nice(1) down from the engine's. A step is a fifth less: a VM has a third of the engine's share.
BELOW_ENGINE: Final = 5
BELOW_VMS: Final = 10  # for large values: who has small ones waits for their VM alone
LOWEST: Final = 19

_OUR_SESSION: Final = Path("/proc/self/autogroup")  # "/autogroup-25 nice 0"; empty for init's, the kernel's first
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


def lower(pid: int, by: int) -> None:
    """Give a process a smaller share of the CPUs than this one has: ``by`` steps of nice(1), down to `LOWEST`.

    Many kernels first share the CPUs out between sessions (sched(7), "The autogroup feature"), and a nice value counts
    within a session only. So the process's session gets the same value, unless it is also ours.
    """
    nice = min(os.getpriority(os.PRIO_PROCESS, 0) + by, LOWEST)
    with suppress(OSError):  # it has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():  # on Linux a priority belongs to a thread
            with suppress(OSError):  # and this one
                os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
    with suppress(OSError, ValueError):  # not every kernel has it, and takes only ten a second from others than root
        if os.getsid(pid) == pid or os.getsid(pid) != os.getsid(0):
            ours = _OUR_SESSION.read_text().rpartition(" ")[2] or "0"
            Path(f"/proc/{pid}/autogroup").write_text(str(min(int(ours) + by, LOWEST)))
