"""What VMs may take of this host's memory and disk. Attempts of tickets and sandboxes are counted alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from swarm.base.cgroup import Limit, memory_limits
from swarm.engine.worker import Attempt
from swarm.store.tickets.room import Room

# Kept free on the VM disk: this much, or 5 % if that is less.
_DISK_RESERVE_MB, _INODES_RESERVE = 512, 200
# A VM whose work disk is no larger (the default) may always be the only one, however little is free.
_SMALL_DISK_MB = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class VmInUse:
    """``executing``: it has a VM, or is about to. ``settled``: its guest has booted, and allocated its memory."""

    memory_mb: int
    disk_mb: int
    vm_id: int | None
    executing: bool
    settled: bool


def of_attempts(attempts: Iterable[Attempt]) -> Iterator[VmInUse]:
    for one in attempts:
        agent, settled = one.claim.agent, "answered" in one.timeline
        yield VmInUse(
            memory_mb=agent.memory_mb,
            disk_mb=agent.disk_mb,
            vm_id=one.vm_id,
            executing=one.executing,
            settled=settled,
        )


def available_bytes(limits: Sequence[Limit]) -> int:
    """What the host has, and no more than what this engine's control groups leave."""
    return min(psutil.virtual_memory().available, *(max(0, each.bytes - each.used) for each in limits), 1 << 62)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory that VMs may use. ``available_mb`` reads the host's; ``reserve_mb`` stays free for other programs."""

    total_mb: int
    reserve_mb: int
    available_mb: Callable[[], int]
    overhead_mb: int = 64  # of each VMM, beside the guest's memory

    @classmethod
    def of_this_host(cls) -> Memory:
        total_mb = min(psutil.virtual_memory().total, *(limit.bytes for limit in memory_limits()), 1 << 62) >> 20
        return cls(
            total_mb=total_mb,
            reserve_mb=min(1024, total_mb // 8),
            available_mb=lambda: available_bytes(memory_limits()) >> 20,
        )

    def left_mb(self, vms: Iterable[VmInUse]) -> int:
        """For one more VM: bounded by what running VMs were promised, and by what the host really has."""
        vms = list(vms)
        promised = sum(vm.memory_mb + self.overhead_mb for vm in vms if vm.executing)
        # Guests allocate their memory while they boot: until then it still looks free.
        free_now = self.available_mb() - self.reserve_mb - sum(vm.memory_mb for vm in vms if not vm.settled)
        return min(self.total_mb - self.reserve_mb - promised, free_now) - self.overhead_mb

    @property
    def most_mb(self) -> int:
        """For one VM while nothing else runs."""
        return self.total_mb - self.reserve_mb - self.overhead_mb


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The directory with the VMs' files. Work disks are sparse, so what running VMs may still write is kept for them:
    a further VM is started if there is room for its own work disk beside that. ``used_bytes`` of VM n's work disk;
    None if VMs have none. ``space``: of the file system with a directory."""

    dir: Path
    used_bytes: Callable[[int], int] | None = None
    space: Callable[[Path], os.statvfs_result] = os.statvfs

    def room(self, vms: Iterable[VmInUse] = ()) -> tuple[Room, str]:
        """What is left for one more, and why no VM may be started now; '' when one of some size may. ~3 µs, and 7 for
        each running VM."""
        try:
            info = self.space(self.dir)
        except OSError:  # making the VM's directory will give the better error
            return Room(), ""
        free_mb, total_mb = (blocks * info.f_frsize >> 20 for blocks in (info.f_bavail, info.f_blocks))
        if free_mb < (reserve_mb := min(_DISK_RESERVE_MB, total_mb // 20)):
            return Room(), f"disk: {free_mb} MB are free in {self.dir}, of which {reserve_mb} MB are kept"
        if info.f_files and info.f_favail < _INODES_RESERVE:
            return Room(), f"disk: {info.f_favail} inodes are free in {self.dir}, of which {_INODES_RESERVE} are kept"
        if self.used_bytes is None:
            return Room(), ""
        left_mb = most_mb = free_mb - reserve_mb
        alone = True
        for vm in vms:
            if vm.executing:
                used_mb = 0 if vm.vm_id is None else self.used_bytes(vm.vm_id) >> 20
                left_mb -= max(0, vm.disk_mb - used_mb)
                most_mb += used_mb
                alone = False
        # If the usual VM is the only one and fills the disk, the writes of its own programs fail.
        most_mb, whole_mb = (max(mb, _SMALL_DISK_MB) for mb in (most_mb, total_mb - reserve_mb))
        return Room(disk_mb=most_mb if alone else left_mb, most_disk_mb=most_mb, whole_disk_mb=whole_mb), ""


def room_for_one(memory: Memory | None, disk: Disk | None, vms: Iterable[VmInUse]) -> tuple[Room, str]:
    """What is left for one more VM, and why none may be started, whatever its size."""
    vms = list(vms)
    room, shortage = disk.room(vms) if disk is not None else (Room(), "")
    if memory is not None:
        room.memory_mb, room.most_memory_mb = memory.left_mb(vms), memory.most_mb
    if shortage:
        room.memory_mb = -1  # too little for any VM; a claim still does its upkeep
    return room, shortage
