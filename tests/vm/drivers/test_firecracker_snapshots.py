"""VMs saved, paused, resumed and forked with Firecracker. What all drivers have in common is shown with QEMU:
tests/vm/test_snapshots.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.config import Settings
from swarm.errors import NoSpace
from swarm.vm.driver import BASE_UID, Image
from tests.vm import firecracker_here
from tests.vm.test_snapshots import a_vm, going_on, names, sh

pytestmark = pytest.mark.needs("firecracker")


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with firecracker_here.on_path():
        yield


@pytest.fixture(scope="module")
def fc_image(settings: Settings) -> Image:
    return asyncio.run(firecracker_here.image(settings))


async def test_a_vm_is_saved_forked_paused_and_resumed(settings: Settings, fc_image: Image, tmp_path: Path) -> None:
    own = firecracker_here.with_firecracker(settings, fc_image)
    launcher = wiring.launcher(own, await wiring.choice(own))
    snapshots = wiring.snapshots(own.model_copy(update={"snapshots_dir": tmp_path / "snapshots"}))
    async with a_vm(launcher, firecracker_here.spec(fc_image)) as parent:
        await sh(parent, "echo memory > /run/x; echo disk > /work/x")
        limit, snapshots.limit_bytes = snapshots.limit_bytes, 1 << 20
        with pytest.raises(NoSpace):
            async with snapshots.stage() as stage:
                await launcher.pause(parent, stage)
        snapshots.limit_bytes = limit
        assert names(snapshots) == []
        async with snapshots.stage() as stage:
            saved = await launcher.save(parent, stage)
        assert saved.size_bytes < 200 << 20, "a memory of 256 MB, with holes"
        assert await sh(parent, "cat /run/x /work/x; echo parent > /work/x") == "memory\ndisk"
        async with going_on(launcher, snapshots, saved, fork=True) as fork:
            assert await sh(fork, "cat /run/x /work/x; echo fork > /work/x; cat /etc/machine-id; hostname") == (
                f"memory\ndisk\n{fork.identity.machine_id}\n{fork.identity.hostname}"
            )
            assert fork.identity.machine_id != parent.identity.machine_id
            assert abs((await fork.channel.hello()).clock_ns - time.time_ns()) < 1e9
            assert f"Uid:\t{BASE_UID + fork.n}" in Path(f"/proc/{fork.vm.pid}/status").read_text()
            async with snapshots.stage() as stage:
                paused = await launcher.pause(fork, stage)
        assert await sh(parent, "cat /work/x") == "parent"
    async with going_on(launcher, snapshots, paused, fork=False) as again:
        assert await snapshots.remove(paused.id)
        assert await sh(again, "cat /work/x /run/x /etc/machine-id") == f"fork\nmemory\n{fork.identity.machine_id}"
    await snapshots.find(saved.id)  # still as it was
