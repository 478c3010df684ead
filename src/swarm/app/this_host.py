"""What the database knows of the machine that an engine starts on."""

from __future__ import annotations

import asyncio
import os
import socket
from importlib.metadata import version

from swarm.base import cgroup, host, process
from swarm.config import Settings
from swarm.engine.room import Memory
from swarm.store.hosts import Machine
from swarm.store.store import Store
from swarm.vm.driver import Probe


def labels(settings: Settings, probe: Probe) -> dict[str, str | bool | int]:
    """What agents may require of this host. That /dev/kvm is there does not say that VMs run with it."""
    kvm = probe.accelerator == "kvm"
    return {"host": socket.gethostname(), "arch": os.uname().machine, "kvm": kvm, **settings.labels}


async def register(settings: Settings, store: Store, *, max_vms: int, max_sandboxes: int) -> Memory | None:
    """Tell the database, with the store's labels, and return the memory that VMs may use here; None: there is no limit.
    Raises HostError, and Conflict if another machine has this one's id."""
    id = await asyncio.to_thread(host.make_host_id, settings.state_dir)
    memory = Memory.of_this_host()
    if settings.driver != "process":
        store.vm_memory_mb = memory.most_mb
    capacity = {
        "memory_mb": memory.total_mb, "slots": max_vms, "sandboxes": max_sandboxes,
        "vcpus": round(cgroup.cpus(), 2), "kvm": store.labels["kvm"], "arch": store.labels["arch"],
        "vm_memory_mb": store.vm_memory_mb,
    }  # fmt: skip
    await store.register_host(
        Machine(
            id=id,
            name=socket.gethostname(),
            machine_id=host.machine_id(),
            boot_id=process.boot_id(),
            labels=store.labels,
            capacity=capacity,
            versions={"swarm": version("swarm-engine"), "kernel": os.uname().release},
        )
    )
    return None if settings.driver == "process" else memory
