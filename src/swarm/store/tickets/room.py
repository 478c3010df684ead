"""What is left of a host for VMs. Attempts of tickets and sandboxes are claimed by the same measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Room:
    """``memory_mb`` and ``disk_mb``: what is left now; ``most_…``: for one VM while nothing else runs;
    ``whole_disk_mb``: if its disk were empty, too. None: no limit. A claim sets ``waits_for``, if it leaves the next in
    turn since that lacks room, and ``full_disk``, if it leaves one since other things than VMs fill the disk."""

    memory_mb: int | None = None
    disk_mb: int | None = None
    most_memory_mb: int | None = None
    most_disk_mb: int | None = None
    whole_disk_mb: int | None = None
    waits_for: str = ""
    full_disk: str = ""

    def never(self, memory_mb: int, disk_mb: int) -> str:
        """Why a VM can't run here at all, as the end of a sentence about it; '' if it can. One that is only waited for
        would be in the way of all behind it, for ever."""
        return _too_much(memory_mb, self.most_memory_mb, "", "memory_mb") or _too_much(
            disk_mb, self.whole_disk_mb, " of disk", "disk_mb"
        )

    def not_now(self, disk_mb: int) -> str:
        """The same, until what else fills the disk is gone: nobody knows when."""
        meanwhile = " while other files fill the rest"
        return _too_much(disk_mb, self.most_disk_mb, " of disk", "disk_mb", meanwhile=meanwhile)

    def lacks(self, memory_mb: int, disk_mb: int) -> str:
        """Why it can't run now; '' if it can."""
        if self.memory_mb is not None and memory_mb > self.memory_mb:
            return f"memory: {max(0, self.memory_mb)} MB are left for VMs, and the next one needs {memory_mb} MB"
        if self.disk_mb is not None and disk_mb > self.disk_mb:
            return (
                f"disk: {max(0, self.disk_mb)} MB are left beside what running VMs may still write, and the next one "
                f"needs {disk_mb} MB: see disk_mb"
            )
        return ""

    def take(self, memory_mb: int, disk_mb: int) -> None:
        if self.memory_mb is not None:
            self.memory_mb -= memory_mb
        if self.disk_mb is not None:
            self.disk_mb -= disk_mb


def _too_much(needs: int, most: int | None, what: str, column: str, *, meanwhile: str = "") -> str:
    if most is None or needs <= most:
        return ""
    may = f"all VMs of this host together may take {max(0, most)} MB{meanwhile}"
    return f"needs {needs} MB{what}, and {may}; lower its {column}"
