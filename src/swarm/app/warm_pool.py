"""Which VMs an engine keeps ready from its start."""

from __future__ import annotations

from swarm.app import wiring
from swarm.config import Settings
from swarm.vm.driver import VmSpec
from swarm.vm.launcher import Launcher
from swarm.vm.pool import Pool


async def pool(settings: Settings, vms: Launcher, warm: int | None) -> Pool:
    """Starts with the template that was used last; on a fresh host, with the default VM."""
    image = await wiring.images(settings).find()
    used = sorted((t for t in wiring.templates(settings).all() if t.image == image.digest), key=lambda t: -t.used_at)
    built = wiring.guest_layers(settings)
    specs = [
        VmSpec(
            image=image,
            layer=built.named(t.layer) if t.layer else None,
            vcpus=t.vcpus,
            memory_mb=t.memory_mb,
            disk_mb=t.disk_mb,
            preload=t.preload,
            interpreter=t.interpreter,
        )
        for t in used
        if not t.layer or built.named(t.layer)
    ]
    return Pool(vms, warm=warm, specs=specs[:1] or [VmSpec(image=image)])
