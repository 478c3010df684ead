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
from swarm.vm.launcher import LiveVm
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


# Words of the shell alone: where the guest's kernel is emulated, each program that is started takes seconds.
_READ = (
    "read a < /run/x; read b < /work/x; read c < /etc/machine-id; read d < /proc/sys/kernel/hostname; echo $a $b $c $d"
)


async def test_a_vm_is_saved_forked_paused_and_resumed(settings: Settings, fc_image: Image, tmp_path: Path) -> None:
    own = firecracker_here.with_firecracker(settings, fc_image)
    launcher = wiring.launcher(own, await wiring.choice(own))
    snapshots = wiring.snapshots(own.model_copy(update={"snapshots_dir": tmp_path / "snapshots"}))

    async def say(live: LiveVm, command: str) -> str:
        return await sh(live, command, timeout_seconds=300)

    async with a_vm(launcher, firecracker_here.spec(fc_image)) as parent:
        await say(parent, "echo memory > /run/x; echo disk > /work/x")
        limit, snapshots.limit_bytes = snapshots.limit_bytes, 1 << 20
        with pytest.raises(NoSpace):
            async with snapshots.stage() as stage:
                await launcher.pause(parent, stage)
        snapshots.limit_bytes = limit
        assert names(snapshots) == []
        async with snapshots.stage() as stage:
            saved = await launcher.save(parent, stage)
        assert saved.size_bytes < 200 << 20, "a memory of 256 MB, with holes"
        async with going_on(launcher, snapshots, saved, fork=True) as fork:
            identity = fork.identity
            assert identity.machine_id != parent.identity.machine_id
            whole = f"{identity.machine_id} {identity.hostname}"
            assert await say(fork, f"{_READ}; echo fork > /work/x") == f"memory disk {whole}"
            assert abs((await fork.channel.hello()).clock_ns - time.time_ns()) < 2e9
            assert f"Uid:\t{BASE_UID + fork.n}" in Path(f"/proc/{fork.vm.pid}/status").read_text()
            async with snapshots.stage() as stage:
                paused = await launcher.pause(fork, stage)
        assert (await say(parent, _READ)).startswith("memory disk "), "it goes on, and has its own disk"
    async with going_on(launcher, snapshots, paused, fork=False) as again:
        assert await snapshots.remove(paused.id)
        assert await say(again, _READ) == f"memory fork {whole}"
    await snapshots.find(saved.id)  # still as it was
