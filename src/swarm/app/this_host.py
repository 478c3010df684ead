"""What the database knows of the machine that an engine starts on."""

from __future__ import annotations

import asyncio
import os
import socket
from hashlib import sha256
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


def agreed(settings: Settings) -> dict[str, str]:
    """Settings that must be the same on all hosts; of files, their digest."""
    names = (
        "budget_usd_per_day", "budget_tokens_per_day", "over_budget", "project_share", "egress_private",
        "lease_seconds", "queue_timeout_seconds", "host_timeout_seconds",
    )  # fmt: skip
    told = {
        name: ", ".join(map(str, of)) if isinstance(of := getattr(settings, name), tuple) else str(of) for name in names
    }
    for name in ("prices", "upstreams"):
        try:
            file = getattr(settings, name) or settings.home / f"{name}.toml"
            told[name] = sha256(file.read_bytes()).hexdigest()[:12]
        except OSError:
            told[name] = "built in"
    return told


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
