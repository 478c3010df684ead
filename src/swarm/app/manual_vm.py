"""VMs by hand, and what is installed by hand: `swarm-spawn-ns`, `swarm-cleanup`, `swarm vm`, `swarm install`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.app import wiring
from swarm.config import Settings

if TYPE_CHECKING:
    from swarm.vm.slots.inventory import VmRecord
    from swarm.vm.slots.sweep import CleanupReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """A VM that runs by itself. ``driver`` says which one runs it, and why that one."""

    record: VmRecord
    driver: str
    console: Path


async def spawn(
    settings: Settings, n: int, *, memory_mb: int, vcpus: int, progress: wiring.Progress = wiring.silent
) -> Spawned:
    """VM ``n``, which goes on when this process ends."""
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
    """Remove VM ``n``. Raises NotFound; Conflict when a live engine uses it."""
    from swarm.vm.slots.sweep import remove_vm

    net = wiring.network(settings)
    await remove_vm(wiring.inventory(settings), net, n)
    await asyncio.to_thread(wiring.ssh_dir(settings).know, net.address(n), None)


async def cleanup(settings: Settings, *, force: bool = False) -> CleanupReport:
    from swarm.vm.slots import sweep

    return await sweep.cleanup(wiring.inventory(settings), wiring.network(settings), force=force)


async def install_firecracker(
    version: str | None, source: Path | None, target: Path, *, progress: wiring.Progress = wiring.silent
) -> list[Path]:
    """Download (or take from ``source``), check and install Firecracker and its jailer. Returns their paths."""
    from swarm.vm.drivers.firecracker_install import DEFAULT_VERSION, install

    return await install(version=version or DEFAULT_VERSION, source=source, target=target, progress=progress)
