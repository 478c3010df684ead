"""The memory limit of the control group in which this process runs; the VMs that it starts are in it too."""

from __future__ import annotations

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
    """The limits of this group and of each around it, in either version of the interface (cgroups(7))."""
    return list(_limits(root, ours))


def _limits(root: Path, ours: Path) -> Iterator[Limit]:
    for line in ours.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, most, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, cache = root / "memory", "total_inactive_file"
            most, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for place in (group, *group.parents):
            try:
                limit = (place / most).read_text().strip()
                if limit != "max":
                    stat = dict(item.split() for item in (place / "memory.stat").read_text().splitlines())
                    taken = int((place / used).read_text()) - int(stat.get(cache, 0))
                    yield Limit(bytes=int(limit), used=max(0, taken))
            except (OSError, ValueError):
                pass  # the root of all has none, and a container may not see what is around it
            if place == base:
                break
