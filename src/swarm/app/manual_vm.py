"""Manually started VMs and manual installs: `swarm-spawn-ns`, `swarm-cleanup`, `swarm vm`, `swarm install`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.app import wiring
from swarm.base import unix_socket
from swarm.base.files import host_errors
from swarm.base.progress import Progress, silent
from swarm.config import Settings
from swarm.errors import HostError

if TYPE_CHECKING:
    from swarm.vm.slots.inventory import VmRecord
    from swarm.vm.slots.sweep import CleanupReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """A VM that no engine runs. ``driver``: the driver, and why it was chosen."""

    record: VmRecord
    driver: str
    console: Path


async def spawn(settings: Settings, n: int, *, memory_mb: int, vcpus: int, progress: Progress = silent) -> Spawned:
    """Start VM ``n``, which keeps running when this process ends."""
    from swarm.vm.driver import VmSpec

    progress("image", 0.0)
    spec = VmSpec(image=await wiring.images(settings).find(), vcpus=vcpus, memory_mb=memory_mb)
    await wiring.sweep(settings)
    progress("driver", 0.1)
    chosen = await wiring.choice(settings)
    progress("booting", 0.3)
    record = await wiring.launcher(settings, chosen).spawn(n, spec)
    return Spawned(record=record, driver=chosen.describe(), console=wiring.inventory(settings).dir(n) / "console.log")


async def remove(settings: Settings, n: int) -> None:
    """Raises NotFound; Conflict when a live engine uses the VM."""
    from swarm.vm.slots.sweep import remove_vm

    net = wiring.network(settings)
    await remove_vm(wiring.inventory(settings), net, n)
    await asyncio.to_thread(wiring.ssh_dir(settings).know, net.address(n), None)


async def cleanup(settings: Settings, *, force: bool = False) -> CleanupReport:
    from swarm.app import address
    from swarm.vm.slots import sweep

    swept = await sweep.cleanup(wiring.inventory(settings), wiring.network(settings), force=force)
    try:
        left = [f"{path}, of a server that was killed" for path in address.forget_dead(settings)]
        with host_errors("can't remove sockets of dead engines"):
            dead = unix_socket.remove_dead(settings.state_dir / "live")
        left += [f"{path}, of an engine that was killed" for path in dead]
        return replace(swept, removed=(*swept.removed, *left))
    except HostError as error:
        return replace(swept, failed=(*swept.failed, str(error)))


async def install_firecracker(
    version: str | None, source: Path | None, target: Path, *, progress: Progress = silent
) -> list[Path]:
    """Download (or take from ``source``), check and install Firecracker and its jailer. Returns their paths."""
    from swarm.vm.drivers.firecracker_install import DEFAULT_VERSION, install

    return await install(version=version or DEFAULT_VERSION, source=source, target=target, progress=progress)
