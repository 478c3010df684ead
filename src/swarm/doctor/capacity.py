"""`swarm doctor --capacity`: how many VMs fit on this host, and what limits them.

One clone is started and measured, since the cost of a VM depends on VMM, image and size; the rest is arithmetic. Memory
and disk are promised to guests, not reserved for them, so there are two answers: how many idle VMs fit, and how many
that use all the memory and disk they may.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from swarm.base import cgroup
from swarm.base.clock import Timeline
from swarm.engine.room import available_bytes
from swarm.vm.driver import VmSpec
from swarm.vm.drivers.disk import used_bytes
from swarm.vm.launcher import Assignment, Launcher
from swarm.vm.network.bridge import MAX_PORTS
from swarm.vm.slots.inventory import MAX_SLOT, Inventory

_MB = 1 << 20
_RESERVE_SHARE = 0.1  # of memory and disk, left to the rest of the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of one idle clone. ``descriptors`` are the engine's, ``threads`` the VMM's."""

    private_mb: float
    shared_mb: float
    disk_mb: float
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """``idle`` and ``full``: how many VMs each limit allows, if they are idle, and if they use all they may."""

    memory_mb: int
    disk_mb: int
    vcpus: int
    cost: Cost
    idle: Mapping[str, int]
    full: Mapping[str, int]
    cores: float

    @property
    def fits_idle(self) -> tuple[int, str]:
        return _least(self.idle)

    @property
    def fits_full(self) -> tuple[int, str]:
        return _least(self.full)


async def measure(launcher: Launcher, inventory: Inventory, spec: VmSpec) -> Capacity:
    """Start one such VM, measure its cost, and calculate how many fit now. Raises HostError."""
    await launcher.template(spec)
    before = _descriptors()
    async with launcher.vm(spec, Assignment(), Timeline()) as live:
        place = inventory.dir(live.n)
        rollup = Path(f"/proc/{live.vm.pid}/smaps_rollup").read_text().splitlines()[1:]
        fields = {line.split(":")[0]: int(line.split()[1]) for line in rollup}
        cost = Cost(
            private_mb=round(fields["Anonymous"] / 1024, 1),
            shared_mb=round((fields["Rss"] - fields["Anonymous"]) / 1024, 1),
            disk_mb=round(sum(used_bytes(path) for path in place.iterdir()) / _MB, 1),
            descriptors=_descriptors() - before,
            threads=psutil.Process(live.vm.pid).num_threads(),
        )
    return fit(cost, spec, inventory.state_dir)


def fit(cost: Cost, spec: VmSpec, state_dir: Path) -> Capacity:
    """How many VMs of this cost fit on the host as it is now."""
    memory = psutil.virtual_memory()
    limits = cgroup.memory_limits()
    total = min(memory.total, *(limit.bytes for limit in limits), 1 << 62)
    free_mb = (available_bytes(limits) - total * _RESERVE_SHARE) / _MB
    disk_mb = shutil.disk_usage(state_dir).free * (1 - _RESERVE_SHARE) / _MB
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    descriptors = hard if hard != resource.RLIM_INFINITY else _number("/proc/sys/fs/nr_open")
    common = {
        "bridge ports": MAX_PORTS,
        "slots": MAX_SLOT,
        "open files": max(0, descriptors - 256) // max(1, cost.descriptors),
        "threads": _threads() // max(1, cost.threads),
    }
    # A VM in full use also needs memory for its VMM.
    full_mb = spec.memory_mb + min(cost.private_mb, 64)
    return Capacity(
        memory_mb=spec.memory_mb,
        disk_mb=spec.disk_mb,
        vcpus=spec.vcpus,
        cost=cost,
        idle={
            "memory": _times(free_mb - spec.memory_mb, cost.private_mb),
            "disk": _times(disk_mb, cost.disk_mb),
            **common,
        },
        full={"memory": _times(free_mb, full_mb), "disk": _times(disk_mb, spec.disk_mb), **common},
        cores=cgroup.cpus(),
    )


def _times(have: float, each: float) -> int:
    return max(0, int(have / max(each, 0.1)))


def _least(limits: Mapping[str, int]) -> tuple[int, str]:
    name = min(limits, key=lambda limit: limits[limit])
    return limits[name], name


def _threads() -> int:
    host, ours = _number("/proc/sys/kernel/threads-max"), cgroup.processes_left()
    return host if ours is None else min(host, ours)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path for each costs more than the call


def _number(path: str) -> int:
    return int(Path(path).read_text())
