"""The QEMU driver by itself: how it starts and ends a VM, and what it says when it can't."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.base.process import run
from swarm.channel import Channel
from swarm.config import Settings
from swarm.errors import BootFailed, HostError
from swarm.vm.choose import Choice
from swarm.vm.driver import BASE_UID, Image, Slot, Template, VmSpec
from swarm.vm.drivers.qemu import QemuDriver
from swarm.vm.launcher import Assignment
from tests.base.test_process import blocked_signals
from tests.conftest import PATIENCE_SECONDS
from tests.vm.drivers.test_drivers import Guest, inside
from tests.vm.drivers.test_firecracker import seconds_to_send, seconds_to_write

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture
def driver(settings: Settings) -> QemuDriver:
    return QemuDriver(accelerator="tcg", disk_cache=settings.state_dir / "blank")


@pytest.fixture
def spec(image: Image) -> VmSpec:
    return VmSpec(image=image, memory_mb=128, disk_mb=16)


async def test_it_knows_its_version_and_accelerator(driver: QemuDriver) -> None:
    probe = await driver.probe()
    assert (probe.usable, probe.accelerator, probe.snapshots) == (True, "tcg", True)
    assert int(probe.version.split(".")[0]) >= 7


async def test_a_vm_runs_without_rights_as_its_own_uid_and_dies_when_killed(
    driver: QemuDriver, spec: VmSpec, tmp_path: Path
) -> None:
    vm = await driver.boot(spec, None, tmp_path)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await vm.printed(b"swarm-init: up after")
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{vm.pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["Uid"].split() == [str(BASE_UID)] * 4
        assert status["Groups"].strip() == ""
        assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        # A stop that reaches all processes of a service ends the engine, and only the engine ends its VMs.
        assert {blocked & 0x4003 for blocked in blocked_signals(vm.pid)} == {0x4003}
        opened = {str(fd.readlink()) for fd in Path(f"/proc/{vm.pid}/fd").iterdir()}
        assert not any(name.endswith("qmp.sock") for name in opened), "nothing that others could connect to"
    finally:
        await vm.kill()
    await vm.kill()  # again: nothing
    assert "signal 9" in await vm.wait()
    assert not Path(f"/proc/{vm.pid}").exists()


async def test_a_guest_that_panics_ends_its_vm(driver: QemuDriver, spec: VmSpec, tmp_path: Path) -> None:
    broken = replace(spec, image=replace(spec.image, boot_args=f"{spec.image.boot_args} rdinit=/nothing init=/nothing"))
    vm = await driver.boot(broken, None, tmp_path)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await vm.wait()
        assert "anic" in vm.console.read_text(errors="replace")
    finally:
        await vm.kill()


async def test_a_full_disk_of_the_host_is_an_error_in_the_guest(
    driver: QemuDriver, spec: VmSpec, settings: Settings, tmp_path: Path
) -> None:
    """The agent that writes gets an error, and its VM goes on. (QEMU's default is to pause it, for ever.)"""
    network, token = wiring.network(settings), secrets.token_bytes(32)
    await network.ensure_host()
    slot = await network.create(1950)
    await run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(tmp_path)])
    try:
        vm = await driver.boot(replace(spec, disk_mb=256), slot, tmp_path, token=token)
        try:
            async with Channel.connect(vm.endpoint, token=token, timeout_seconds=60) as channel:
                await Guest(vm=vm, channel=channel, dir=tmp_path, token=token).renew()
                fill = ["dd", "if=/dev/zero", "of=/work/big", "bs=1M", "count=64", "conv=fsync"]
                said = bytearray()
                ended = await channel.run(fill, timeout_seconds=60, on_output=lambda _, data: said.extend(data))
                assert (ended.code, b"error" in said) == (1, True), bytes(said)
                assert (await channel.run(["true"], cwd="/", timeout_seconds=60)).code == 0
        finally:
            await vm.kill()
    finally:
        await run(["umount", str(tmp_path)])
        await network.destroy(1950)


async def test_a_guest_that_qemu_stops_is_not_waited_for(driver: QemuDriver, spec: VmSpec, tmp_path: Path) -> None:
    vm = await driver.boot(spec, None, tmp_path)
    try:
        await vm._qmp.execute("stop")  # as QEMU itself does after an error that it can't go on with
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert "QEMU stopped the guest by itself (paused)" in await vm.wait()
        assert inside(tmp_path) == []
    finally:
        await vm.kill()


async def test_what_qemu_says_is_in_the_error(driver: QemuDriver, spec: VmSpec, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"not a kernel")
    kernel.chmod(0o644)
    place = tmp_path / "vm"
    place.mkdir()
    with pytest.raises(BootFailed, match=r"QEMU did not start: .+"):
        await driver.boot(replace(spec, image=replace(spec.image, kernel=kernel)), None, place)


async def test_a_file_that_is_not_there_is_named(driver: QemuDriver, spec: VmSpec, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(HostError, match=r"can't open .*missing: No such file"):
        await driver.boot(replace(spec, image=replace(spec.image, root=missing)), None, tmp_path)


async def test_a_template_without_its_parts_is_named(driver: QemuDriver, spec: VmSpec, tmp_path: Path) -> None:
    template = Template(key="k", dir=tmp_path / "gone", spec=spec, token=b"t")
    with pytest.raises(HostError, match=r"can't open .*gone/memory"):
        await driver.restore(template, None, tmp_path)


async def test_every_descriptor_is_closed_again(driver: QemuDriver, spec: VmSpec, tmp_path: Path) -> None:
    async def once(name: str) -> None:
        place = tmp_path / name
        place.mkdir()
        vm = await driver.boot(spec, None, place)
        await vm.kill()

    await once("first")  # libraries open some for good
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    await once("second")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


async def test_a_cancelled_start_leaves_no_process(driver: QemuDriver, spec: VmSpec, tmp_path: Path) -> None:
    start = asyncio.ensure_future(driver.boot(spec, None, tmp_path))
    while not (tmp_path / "console.log").exists():
        await asyncio.sleep(0)  # to the next step
        if start.done():
            break
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    if not start.cancelled() and start.exception() is None:
        await start.result().kill()
    assert inside(tmp_path) == []


@pytest.mark.parametrize("clones", [False, True], ids=["booted", "restored"])
async def test_the_limits_of_an_agent_hold(settings: Settings, image: Image, clones: bool) -> None:
    """How long a guest takes at least to write, to be sent and to send; then the next VM of its slot, without limits.
    The template has none either way."""
    driver = QemuDriver(accelerator="tcg", disk_cache=settings.state_dir / "blank")
    launcher = wiring.launcher(settings, Choice(driver=driver, probe=await driver.probe()), clones=clones)
    await wiring.network(settings).ensure_host()
    free = VmSpec(image=image)
    async with launcher.keeping(1):
        async with launcher.vm(
            replace(free, disk_mb_per_second=1, network_mb_per_second=0.1), Assignment(), Timeline()
        ) as live:
            assert await seconds_to_write(live, blocks=5) > 1.5, "of 2.5 MB, 0.1 s pass at once, and the last block"
            assert await seconds_to_send(live, megabytes=0.5) > 2, "of 0.5 MB, 128 KiB pass at once"
            made = await live.channel.run(
                ["/bin/dd", "if=/dev/urandom", "of=/work/made", "bs=1000", "count=500"], timeout_seconds=60
            )
            assert made.code == 0
            began = time.monotonic()
            assert len(await live.channel.get("/work/made", limit_bytes=500_000) or b"") == 500_000
            assert time.monotonic() - began > 2
            slot = live.vm_slot.slot
            assert slot
            assert await limits_of(slot) == ["qdisc tbf", "table netdev swarm-limit"]
        async with launcher.vm(free, Assignment(), Timeline()) as live:
            assert live.vm_slot.slot == slot
            assert await limits_of(slot) == []


async def limits_of(slot: Slot) -> list[str]:
    said = [
        (await run(argv, netns=slot.netns)).stdout.decode()
        for argv in (["tc", "qdisc", "show", "dev", "tap0"], ["nft", "list", "tables"])
    ]
    return re.findall(r"qdisc tbf|table netdev swarm-limit", "".join(said))
