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


async def register(settings: Settings, store: Store, *, max_vms: int, max_sandboxes: int) -> Memory | None:
    """Tell the database, and return the memory that VMs may use here; None: there is no limit. Raises HostError, and
    Conflict if another machine has this one's id."""
    id = await asyncio.to_thread(host.make_host_id, settings.state_dir)
    memory = Memory.of_this_host()
    name, kvm, arch = socket.gethostname(), os.access("/dev/kvm", os.R_OK | os.W_OK), os.uname().machine
    capacity = {
        "memory_mb": memory.total_mb, "slots": max_vms, "sandboxes": max_sandboxes,
        "vcpus": round(cgroup.cpus(), 2), "kvm": kvm, "arch": arch,
    }  # fmt: skip
    await store.register_host(
        Machine(
            id=id,
            name=name,
            machine_id=host.machine_id(),
            boot_id=process.boot_id(),
            labels={"host": name, "arch": arch, "kvm": kvm},
            capacity=capacity,
            versions={"swarm": version("swarm-engine"), "kernel": os.uname().release},
        )
    )
    return None if settings.driver == "process" else memory
