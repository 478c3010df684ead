"""What the sandboxes of one project may take of a worker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from swarm.model import SandboxClaim
from swarm.store.tickets.room import Room

DEFAULT_MEMORY_MB: Final = 256
DEFAULT_DISK_MB: Final = 2048


@dataclass(slots=True, kw_only=True)
class Share:
    """The most that the sandboxes of one project may take of a worker: ``places``, ``memory_mb`` and ``disk_mb`` (None:
    any), which are a ``part`` of what it has, no less than one usual VM takes. What is of no project is not bounded.

    ``taken``: of each project that has some, (places, memory, disk). A claim adds what it takes; it says who is
    ``over``, in a sentence for each project, and whether others wait too."""

    places: int
    memory_mb: int | None
    disk_mb: int | None
    part: float
    taken: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    over: dict[str, str] = field(default_factory=dict)
    others_wait: bool = False

    @classmethod
    def of(cls, claims: Iterable[SandboxClaim], *, most: int, room: Room, part: float) -> Share:
        """``most`` places; ``claims``: what is held."""

        def share_of(most_mb: int | None, usual_mb: int) -> int | None:
            return max(int(most_mb * part), usual_mb) if most_mb is not None and part < 1 else None

        share = cls(
            places=max(1, int(most * part)),
            memory_mb=share_of(room.most_memory_mb, DEFAULT_MEMORY_MB),
            disk_mb=share_of(room.most_disk_mb, DEFAULT_DISK_MB),
            part=part,
        )
        for claim in claims:
            share.add(claim)
        return share

    def never(self, project: str | None, memory_mb: int, disk_mb: int) -> str:
        """Why it gets none of this size, whatever else it has; '' if it may."""
        for needs, most, what in ((memory_mb, self.memory_mb, "memory"), (disk_mb, self.disk_mb, "disk")):
            if project and most is not None and needs > most:
                return (
                    f"it needs {needs} MB of {what}, and the sandboxes of one project may take {most} MB together "
                    f"(SWARM_PROJECT_SHARE); lower its {what}_mb"
                )
        return ""

    def refuses(self, project: str | None, memory_mb: int = 0, disk_mb: int = 0) -> str:
        """Why it gets no more; '' if it does."""
        places, used_mb, written_mb = self.taken.get(project or "", (0, 0, 0))
        what = ""  # a sentence that stays the same, since rows tell it
        if project and places >= self.places:
            what = f"{self.places} places"
        elif project and self.memory_mb is not None and used_mb + memory_mb > self.memory_mb:
            what = f"{self.memory_mb} MB of memory"
        elif project and self.disk_mb is not None and written_mb + disk_mb > self.disk_mb:
            what = f"{self.part:.0%} of the disk for VMs"
        said = f"it waits: the sandboxes of one project take {what} at most (SWARM_PROJECT_SHARE)"
        return what and f"{said}; it starts when one of them ends or sleeps"

    def add(self, claim: SandboxClaim) -> None:
        if (project := claim.sandbox.project_id) is not None:
            places, used_mb, written_mb = self.taken.get(project, (0, 0, 0))
            self.taken[project] = places + 1, used_mb + claim.memory_mb, written_mb + claim.disk_mb
