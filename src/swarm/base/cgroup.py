"""What the control groups of this process allow it, and the VMs that it starts, in both versions (cgroups(7))."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OURS = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """``used`` is without page cache that the kernel can drop."""

    bytes: int
    used: int


def memory_limits(root: Path = _ROOT, ours: Path = _OURS) -> list[Limit]:
    """The limits of this group and of each around it."""
    return list(_memory_limits(root, ours))


def own_groups(ours: Path = _OURS) -> dict[str, str]:
    """Version 1: controller -> the path of our group below where that controller is mounted."""
    found: dict[str, str] = {}
    for line in ours.read_text().splitlines() if ours.exists() else ():  # a kernel without control groups
        _, controllers, path = line.split(":", 2)
        found |= {name: path.lstrip("/") for name in controllers.split(",") if name}
    return found


def cpus(root: Path = _ROOT, ours: Path = _OURS) -> float:
    """How many CPUs' time this process gets: those it may run on, and no more than the quotas of its groups."""
    return min(float(len(os.sched_getaffinity(0))), *_cpu_quotas(root, ours), float("inf"))


def processes_left(root: Path = _ROOT, ours: Path = _OURS) -> int | None:
    """How many more processes and threads the groups allow; None if they set no limit."""
    found = []
    for _, group in _groups("pids", root, ours):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(max(0, _number(group / "pids.max") - _number(group / "pids.current")))
    return min(found, default=None)


def _memory_limits(root: Path, ours: Path) -> Iterator[Limit]:
    for version, group in _groups("memory", root, ours):
        if version == 2:
            most, used, cache = "memory.max", "memory.current", "inactive_file"
        else:
            most, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        with contextlib.suppress(OSError, ValueError):
            limit = _number(group / most)
            stat = dict(item.split() for item in (group / "memory.stat").read_text().splitlines())
            yield Limit(bytes=limit, used=max(0, _number(group / used) - int(stat.get(cache, 0))))


def _cpu_quotas(root: Path, ours: Path) -> Iterator[float]:
    for version, group in _groups("cpu", root, ours):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
            if quota > 0 and period > 0:  # -1: none
                yield quota / period


def _groups(controller: str, root: Path, ours: Path) -> Iterator[tuple[int, Path]]:
    """Version and directory of our group and of each around it. (The root of all has no limits, and a container may not
    see what is around it: files may be missing.)"""
    with contextlib.suppress(OSError):  # a kernel without control groups
        for line in ours.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                version, base = 2, root
            elif controller in controllers.split(","):
                version, base = 1, root / controller
            else:
                continue
            group = base / path.lstrip("/")
            for place in (group, *group.parents):
                yield version, place
                if place == base:
                    break


def _number(file: Path) -> int:
    return int(file.read_text())
