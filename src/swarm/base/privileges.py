"""Gives up, for good, what a process that reads hostile input does not need."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from swarm.base.libc import check, libc

# A user of no file, no name and no other process of this host: above the ids that systemd hands out, below nobody's.
UID: Final = 65533
_PDEATHSIG, _DUMPABLE, _CAPBSET_DROP, _NO_NEW_PRIVS = 1, 4, 24, 38  # linux/prctl.h


def keep(capabilities: Collection[int]) -> None:
    """What this process, which is root, executes from now on has no capabilities but these. Raises OSError."""
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if capability not in capabilities:
            _prctl(_CAPBSET_DROP, capability)
    _prctl(_NO_NEW_PRIVS, 1)


def drop(limits: Mapping[int, int]) -> None:
    """Become `UID`, if this is root, without groups and capabilities. Whoever this is: no program gains rights again,
    no other process reads or traces this one, and ``limits`` hold.

    What is imported later must be readable for that user, so import first. Raises OSError.
    """
    if os.geteuid() == 0:
        for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
            _prctl(_CAPBSET_DROP, capability)
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)  # the kernel empties the other sets of capabilities
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_DUMPABLE, 0)
    limit(limits)


def limit(limits: Mapping[int, int]) -> None:
    """These ``limits`` (RLIMIT_… → value) hold for this process and what it starts; a lower one stays. Raises
    OSError."""
    for one, value in limits.items():
        hard = resource.getrlimit(one)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(one, (value, value))


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends. Call it after `drop`: a change of user clears
    it."""
    _prctl(_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    check(libc().prctl(option, value, 0, 0, 0), f"prctl({option}, {value})")
