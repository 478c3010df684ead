"""The `firecracker` driver against the real binary: its API, its jail, its snapshots, and what it leaves.

Most of this needs no guest that gets anywhere: a kernel's first lines are enough, and a VM can be frozen there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.app import wiring
from swarm.base import process
from swarm.base.aio import undoing
from swarm.base.clock import Timeline
from swarm.channel import Channel, Identity
from swarm.config import Settings
from swarm.errors import BootFailed, HostError
from swarm.vm import choose, driver
from swarm.vm.driver import Image, Slot, Snapshot, Template, VmSpec
from swarm.vm.drivers import cgroups, disk, firecracker, jailer
from swarm.vm.drivers.firecracker import FirecrackerDriver
from swarm.vm.drivers.firecracker_api import Refused
from swarm.vm.drivers.firecracker_vm import MEMORY_FILE, STATE_FILE, FirecrackerVm
from swarm.vm.drivers.jailer import JailFile
from swarm.vm.drivers.qemu import QemuDriver
from swarm.vm.launcher import Assignment, LiveVm
from swarm.vm.network import netns
from tests.conftest import PATIENCE_SECONDS
from tests.vm import firecracker_here
from tests.vm.drivers.test_drivers import death_of, inside

pytestmark = pytest.mark.needs("firecracker")

FIRST_SLOT = 3000
NOBODY = Identity(
    generation="", seed=b"", hostname="", machine_id="", ssh_host_key="", authorized_keys="", token=b""
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with firecracker_here.on_path():
        yield


@pytest.fixture(scope="module")
def fc_image(settings: Settings) -> Image:
    return asyncio.run(firecracker_here.image(settings))


@pytest.fixture(scope="module")
def talking(fc_image: Image) -> VmSpec:
    """A small VM whose kernel says what it does."""
    loud = re.sub(r"\b(quiet|loglevel=\d)\b", "", fc_image.boot_args) + " loglevel=7 earlyprintk=ttyS0"
    return VmSpec(image=dataclasses.replace(fc_image, boot_args=loud), memory_mb=128, disk_mb=16)


@pytest.fixture
def fc(settings: Settings) -> FirecrackerDriver:
    return FirecrackerDriver(disk_cache=settings.state_dir / "blank", holes_allowed=True)


@contextlib.asynccontextmanager
async def places(settings: Settings, count: int = 1) -> AsyncIterator[list[tuple[Path, Slot]]]:
    inventory, network = wiring.inventory(settings), wiring.network(settings)
    async with undoing() as undo:
        found = []
        for _ in range(count):
            place = inventory.reserve_free(FIRST_SLOT)
            undo.push_async_callback(asyncio.to_thread, place.release)
            undo.push_async_callback(network.destroy, place.n)
            found.append((place.dir, await network.create(place.n)))
        yield found


def groups_of(name: str) -> list[Path]:
    return sorted(Path("/sys/fs/cgroup").glob(f"**/{cgroups.PARENT}/{name}"))


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# --- the API ----------------------------------------------------------------------------------------------------------


async def test_every_call_is_accepted(settings: Settings, fc: FirecrackerDriver, talking: VmSpec) -> None:
    """A whole VM described, devices that Swarm does not use too; started; the kernel's banner on the serial console."""
    limited = dataclasses.replace(talking, disk_mb_per_second=10.0, network_mb_per_second=1.5)
    async with places(settings) as [(place, slot)]:
        files = [JailFile(firecracker.KERNEL, talking.image.kernel_elf)]
        if talking.image.initramfs:
            files.append(JailFile(firecracker.INITRAMFS, talking.image.initramfs))
        vm = await fc._start(limited, slot, place, files, outlive=False)
        try:
            assert (await vm.api.get("/"))["state"] == "Not started"
            assert (await vm.api.get("/version"))["firecracker_version"].startswith("1.")
            for path, body in firecracker.configuration(limited, networked=True).items():
                await vm.api.put(path, **body)
            await vm.api.put("/balloon", amount_mib=16, deflate_on_oom=True, stats_polling_interval_s=1)
            await vm.api.put("/vsock", guest_cid=3, uds_path="v.sock")
            await vm.api.put("/mmds/config", version="V2", network_interfaces=[firecracker.NET_ID])
            (vm.jail.root / "metrics").touch()
            os.chown(vm.jail.root / "metrics", vm.jail.uid, vm.jail.uid)
            await vm.api.put("/metrics", metrics_path="metrics")
            await vm.api.put("/logger", level="Info", show_level=True)
            described = await vm.api.get("/vm/config")
            assert described["machine-config"]["mem_size_mib"] == 128
            assert [(d["drive_id"], d["is_read_only"]) for d in described["drives"]] == [
                ("root", True),
                ("work", False),
            ]
            assert described["drives"][1]["rate_limiter"]["bandwidth"]["size"] == 10_000_000
            assert described["network-interfaces"][0]["tx_rate_limiter"]["bandwidth"]["size"] == 1_500_000
            await vm.api.put("/actions", action_type="InstanceStart")
            async with asyncio.timeout(PATIENCE_SECONDS):
                await vm.printed(b"Linux version")
            assert "Linux version" in vm.console.read_text()
            assert (await vm.api.get("/"))["state"] == "Running"
            await vm.api.put("/actions", action_type="FlushMetrics")
            assert b'"vcpu"' in (vm.jail.root / "metrics").read_bytes()
            await vm.api.patch("/vm", state="Paused")
            assert (await vm.api.get("/"))["state"] == "Paused"
            await vm.api.patch("/vm", state="Resumed")
        finally:
            await vm.kill()


@pytest.mark.parametrize(
    ("path", "body", "fault"),
    [
        ("/machine-config", {"vcpu_count": 0, "mem_size_mib": 128}, "vCPU"),
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 0}, "memory"),
        ("/machine-config", {"vcpu_count": "one", "mem_size_mib": 128}, "vcpu_count|invalid type"),
        ("/boot-source", {"kernel_image_path": "absent"}, "kernel"),
        ("/drives/work", {"drive_id": "work", "path_on_host": "absent", "is_root_device": False}, "absent"),
        ("/drives/work", {"drive_id": "other", "path_on_host": "root.erofs", "is_root_device": False}, "(?i)id"),
        ("/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": "tap7"}, "(?i)tap"),
        ("/network-interfaces/eth0", {"iface_id": "eth0", "guest_mac": "x", "host_dev_name": "tap0"}, "(?i)mac|valid"),
        ("/snapshot/load", {"snapshot_path": "gone", "mem_backend": {"backend_type": "File", "backend_path": "m"}}, ""),
        ("/actions", {"action_type": "InstanceStart"}, "(?i)kernel|boot"),
        ("/actions", {"action_type": "Dance"}, "Dance"),
        ("/no-such-thing", {}, ""),
    ],
)  # fmt: skip
async def test_refusals(
    settings: Settings, fc: FirecrackerDriver, talking: VmSpec, path: str, body: dict[str, Any], fault: str
) -> None:
    async with places(settings) as [(place, slot)]:
        vm = await fc._start(talking, slot, place, [], outlive=False)
        try:
            with pytest.raises(Refused, match=re.escape(path)) as caught:
                await vm.api.put(path, **body)
        finally:
            await vm.kill()
        assert caught.value.status == 400
        assert caught.value.fault
        assert re.search(fault, caught.value.fault), caught.value.fault
        assert not caught.value.retryable


async def test_a_refused_vm_is_gone(settings: Settings, fc: FirecrackerDriver, talking: VmSpec) -> None:
    """The error says what Firecracker said, and nothing of the VM remains."""
    async with places(settings) as [(place, slot)]:
        with pytest.raises(BootFailed, match=r"Firecracker refused PUT /machine-config: .*vCPU"):
            await fc.boot(dataclasses.replace(talking, vcpus=200), slot, place)
        assert inside(place) == []
        assert not (place / "jail").exists()


# --- the jail ---------------------------------------------------------------------------------------------------------


async def test_the_jail(settings: Settings, fc: FirecrackerDriver, talking: VmSpec) -> None:
    spec = dataclasses.replace(talking, memory_mb=200)
    async with places(settings) as [(place, slot)]:
        vm = await fc.boot(spec, slot, place)
        name, pid, uid = vm.jail.id, vm.pid, driver.BASE_UID + slot.n
        try:
            said = status(pid)
            assert said["Name"] == "firecracker"
            assert pid in running(name)
            assert said["Uid"].split() == said["Gid"].split() == [str(uid)] * 4
            assert said["Groups"] == ""
            assert int(said["CapEff"], 16) == int(said["CapPrm"], 16) == int(said["CapInh"], 16) == 0
            assert said["NoNewPrivs"] == "1"
            assert said["Seccomp"] == "2", "every thread is behind a filter"
            assert len(said["NSpid"].split()) == len(status(os.getpid())["NSpid"].split()) + 1
            for space in ("mnt", "net", "pid"):
                assert Path(f"/proc/{pid}/ns/{space}").stat().st_ino != Path(f"/proc/self/ns/{space}").stat().st_ino
            assert netns.inode(slot.netns) == inode(Path(f"/proc/{pid}/ns/net"))
            seen = {str(p.relative_to(f"/proc/{pid}/root")) for p in Path(f"/proc/{pid}/root").rglob("*")}
            image_files = {"vmlinux", "root.erofs", *(("initramfs",) if spec.image.initramfs else ())}
            assert seen >= image_files | {"work.ext4", "dev/kvm", "dev/net/tun", "api.sock", "firecracker"}
            assert not seen & {"etc", "proc", "sys", "usr", "home"}
            mounts = Path(f"/proc/{pid}/mountinfo").read_text()
            assert all(re.search(rf" /{file} ro", mounts) for file in image_files), mounts
            assert inode(vm.jail.root / "dev/kvm") != inode(Path("/dev/kvm"))
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"Max core file size\s+0\s+0", limits)
            assert re.search(r"Max open files\s+256\s+256", limits)
            assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == driver.OOM_SCORE
            version, controllers = cgroups.usable()
            mine = Path(f"/proc/{pid}/cgroup").read_text()
            assert mine.count(f"/{cgroups.PARENT}/{name}") == len({"cpu", "memory", "pids"} & set(controllers)) or (
                version == 2
            )
            memory = {1: "memory.limit_in_bytes", 2: "memory.max"}[version]
            for cgroup in groups_of(name):
                if (cgroup / memory).exists():
                    assert 200 << 20 < int((cgroup / memory).read_text()) < 400 << 20
                if (cgroup / "pids.max").exists():
                    assert int((cgroup / "pids.max").read_text()) < 64
            assert "/jail/" not in Path("/proc/self/mountinfo").read_text(), "mounts stay in the jail's own namespace"
        finally:
            await vm.kill()
        assert groups_of(name) == []
        assert not (place / "jail").exists()
        assert not running(name)


async def test_a_dead_owners_vm_is_swept(settings: Settings, fc: FirecrackerDriver, talking: VmSpec) -> None:
    """SIGKILL of the process that owns it ends the VM; the next sweep removes chroot and cgroup with the rest."""
    async with places(settings) as [(place, slot)]:
        vm = await fc.boot(talking, slot, place)
        name, died = vm.jail.id, death_of(vm.pid)
        assert jailer.holds(place, vm.pid)
        # As if its owner had died: the process that the death signal goes to.
        os.kill(vm._child.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await died
        assert groups_of(name) or not cgroups.usable()[1]
        assert (place / "jail").exists()
        jailer.remove(place)
        assert groups_of(name) == []
        assert not (place / "jail").exists()
        assert (talking.image.root).exists()
        await vm.kill()


async def test_without_the_jail_by_an_explicit_setting(settings: Settings, talking: VmSpec) -> None:
    bare = FirecrackerDriver(disk_cache=settings.state_dir / "blank", jailed=False, holes_allowed=True)
    assert "NOT jailed" in (await bare.probe()).reason
    async with places(settings) as [(place, slot)]:
        vm = await bare.boot(talking, slot, place)
        try:
            assert status(vm.pid)["Uid"].split()[0] == "0"
            assert status(vm.pid)["Seccomp"] == "2", "left on all the same"
            assert netns.inode(slot.netns) == inode(Path(f"/proc/{vm.pid}/ns/net"))
        finally:
            await vm.kill()
        assert inside(place) == []
        assert not (place / "jail").exists()
    assert talking.image.root.stat().st_size > 0


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(settings: Settings, talking: VmSpec, tmp_path_factory: pytest.TempPathFactory) -> Template:
    """A VM that was frozen while its kernel started."""
    directory = tmp_path_factory.mktemp("frozen")

    async def freeze() -> None:
        fc = FirecrackerDriver(disk_cache=settings.state_dir / "blank", holes_allowed=True)
        async with places(settings) as [(place, slot)]:
            vm = await fc.boot(talking, slot, place, for_template=True)
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await vm.printed(b"Linux version")
                await vm.snapshot(directory)
            finally:
                await vm.kill()
            assert not (place / "jail").exists()

    asyncio.run(freeze())
    for name in (MEMORY_FILE, STATE_FILE):
        file = (directory / name).stat()
        assert (file.st_uid, file.st_mode & 0o777) == (0, 0o444), "no VM's uid may write what others start from"
    return Template(key="frozen", dir=directory, spec=talking, token=b"")


async def test_load_with_another_tap(settings: Settings, fc: FirecrackerDriver, frozen: Template) -> None:
    async with places(settings) as [(place, slot)]:
        await netns.in_thread(lambda: _rename_tap(slot.netns, "tap9"))
        with pytest.raises(BootFailed, match=r"(?i)tap"):
            await fc.restore(frozen, slot, place)
        files = [JailFile(name, frozen.dir / name) for name in ("memory", "state")]
        (place / "work.ext4").unlink()
        vm = await fc._start(frozen.spec, slot, place, files, outlive=False)
        try:
            await vm.api.put(
                "/snapshot/load",
                snapshot_path="state",
                mem_backend={"backend_type": "File", "backend_path": "memory"},
                network_overrides=[{"iface_id": firecracker.NET_ID, "host_dev_name": "tap9"}],
                resume_vm=False,
            )
            assert (await vm.api.get("/"))["state"] == "Paused"
            await vm.api.patch("/vm", state="Resumed")
            assert (await vm.api.get("/"))["state"] == "Running"
        finally:
            await vm.kill()


async def test_a_clone_has_its_own_limits(settings: Settings, fc: FirecrackerDriver, frozen: Template) -> None:
    """Set before it runs. (Firecracker doesn't report them: its /vm/config shows what a VM was booted with.)"""
    limited = dataclasses.replace(frozen.spec, disk_mb_per_second=2.0, network_mb_per_second=0.5)
    async with places(settings) as [(place, slot)]:
        vm = await fc.restore(dataclasses.replace(frozen, spec=limited), slot, place)
        try:
            assert (await vm.api.get("/"))["state"] == "Running"
        finally:
            await vm.kill()


async def test_a_vm_goes_on_after_it_was_saved_and_forks_and_its_pause_run(
    settings: Settings, fc: FirecrackerDriver, frozen: Template, tmp_path: Path
) -> None:
    froze: list[str] = []

    async def freeze() -> None:
        froze.append("before it stands still")

    def taken(name: str) -> Snapshot:
        (tmp_path / name).mkdir()
        return Snapshot(
            id=name, dir=tmp_path / name, spec=frozen.spec, driver="", accelerator="", version="", identity=NOBODY
        )

    async with places(settings, 4) as found:
        (first, slot), *others = found
        vm = await fc.restore(frozen, slot, first)
        vms = [vm]
        try:
            os.pwrite((work := os.open(first / "work.ext4", os.O_RDWR)), b"written", 8 << 20)
            os.close(work)
            saved = taken("saved")
            await vm.save(saved.dir, freeze=freeze)
            assert (await vm.api.get("/"))["state"] == "Running"
            assert not list(vm.jail.root.glob("saved.*"))
            assert disk.used_bytes(saved.dir / "memory") < 128 << 20, "with holes"
            for place, other in others[:2]:
                vms.append(await fc.resume(saved, other, place, own=False))
                assert (await vms[-1].api.get("/"))["state"] == "Running"
                assert (place / "work.ext4").read_bytes() == (first / "work.ext4").read_bytes()
            with pytest.raises(ZeroDivisionError):
                async with vm.pausing(taken("failed").dir, freeze=freeze):
                    assert (await vm.api.get("/"))["state"] == "Paused"
                    _ = 1 / 0
            assert (await vm.api.get("/"))["state"] == "Running"
            paused = taken("paused")
            async with vm.pausing(paused.dir, freeze=freeze):
                pass
            assert process.start_time(vm.pid) is None
            place, other = others[2]
            vms.append(await fc.resume(paused, other, place, own=True))
            assert (await vms[-1].api.get("/"))["state"] == "Running"
            assert (place / "work.ext4").read_bytes() == (paused.dir / "work").read_bytes()
            assert len(froze) == 3
        finally:
            await asyncio.gather(*(vm.kill() for vm in vms))
        for place, _ in found:
            assert inside(place) == []


async def test_twenty_at_once(settings: Settings, fc: FirecrackerDriver, frozen: Template) -> None:
    """All alive at the same time, each as its own uid in its own namespaces, all from one file; then none."""
    async with places(settings, 20) as found:
        starting = [asyncio.create_task(fc.restore(frozen, slot, place)) for place, slot in found]
        vms: list[FirecrackerVm] = []
        try:
            vms = await asyncio.gather(*starting)
            assert len({vm.pid for vm in vms}) == 20
            assert len({status(vm.pid)["Uid"] for vm in vms}) == 20
            for vm in vms:
                assert (await vm.api.get("/"))["state"] == "Running"
            private = [private_kb(vm.pid) for vm in vms]
            assert max(private) < 64 << 10, private
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await asyncio.gather(*(vm.kill() for vm in vms))
        for place, _ in found:
            assert inside(place) == []
            assert not (place / "jail").exists()
    assert [group for vm in vms for group in groups_of(vm.jail.id)] == []


async def test_a_clone_answers(settings: Settings, fc_image: Image) -> None:
    """The template of the cache, whose guest is all there: restored, agentd reached, and how long each step takes."""
    ours = firecracker_here.with_firecracker(settings, fc_image)
    fc = FirecrackerDriver(disk_cache=ours.state_dir / "blank", holes_allowed=True)
    template = await firecracker_here.template(ours)
    async with places(settings) as [(place, slot)]:
        vm = await fc.restore(template, slot, place)
        try:
            assert private_kb(vm.pid) < 64 << 10
            async with Channel.connect(vm.endpoint, token=template.token, timeout_seconds=60) as channel:
                assert (await channel.hello()).boot_id
        finally:
            await vm.kill()


@firecracker_here.slow_where_emulated
async def test_the_limits_hold(settings: Settings, fc_image: Image) -> None:
    """How long a guest takes to write, and to be sent, the same with limits and without."""
    ours = firecracker_here.with_firecracker(settings, fc_image)
    await firecracker_here.template(ours)
    launcher = wiring.launcher(ours, await wiring.choice(ours))
    free = firecracker_here.spec(fc_image)
    # Far below what is possible, which for a disk is a megabyte a second where kernel mode is emulated.
    disk_limit, network_limit = (0.5, 0.03) if firecracker_here.has_hardware() else (0.05, 0.006)
    limited = dataclasses.replace(free, disk_mb_per_second=disk_limit, network_mb_per_second=network_limit)
    took = []
    for spec in (free, limited):
        async with launcher.vm(spec, Assignment(), Timeline()) as live:
            took.append((await seconds_to_write(live, blocks=3), await seconds_to_send(live, megabytes=0.06)))
    (free_disk, free_network), (disk, network) = took
    # A second's worth goes through at once, and the last request is paid for afterwards: 2 of 3 blocks of 0.5 MB wait.
    assert disk > 0.98 * (2 * 0.499712 - disk_limit) / disk_limit > free_disk, took
    assert network > (0.06 - network_limit) / network_limit > free_network, took


async def seconds_to_write(live: LiveVm, *, blocks: int) -> float:
    """Blocks of half a megabyte, past all caches; by the guest's own clock."""
    code = (
        "import mmap, os, time\n"
        "block = mmap.mmap(-1, 499_712)\n"
        "fd = os.open('/work/big', os.O_WRONLY | os.O_CREAT | os.O_DIRECT)\n"
        "began = time.monotonic()\n"
        f"for _ in range({blocks}):\n    os.write(fd, block)\n"
        "os.fsync(fd)\n"
        "print(time.monotonic() - began)"
    )
    said: list[bytes] = []
    ended = await live.channel.run(
        ["/usr/bin/python3", "-S", "-c", code], timeout_seconds=120, on_output=lambda _, data: said.append(data)
    )
    assert ended.code == 0, said
    return float(b"".join(said))


async def seconds_to_send(live: LiveVm, *, megabytes: float) -> float:
    began = time.monotonic()
    await live.channel.put({"big": os.urandom(round(megabytes * 1e6))}, dest="/work", owner="agent")
    return time.monotonic() - began


# --- the choice -------------------------------------------------------------------------------------------------------


async def test_the_probes_verdict(settings: Settings, fc: FirecrackerDriver, image: Image) -> None:
    """With the distribution's kernel: usable with hardware virtualisation, otherwise refused with the CPU's error."""
    tcg = QemuDriver(accelerator="tcg", disk_cache=settings.state_dir / "blank")
    chosen = await choose.choose(
        [fc, tcg], image, state_dir=settings.state_dir, cache=firecracker_here.PROBES, timeout_seconds=300
    )
    if firecracker_here.has_hardware():
        assert chosen.driver is fc
        assert chosen.rejected == ()
    else:
        assert chosen.driver is tcg
        assert "without KVM), because firecracker with KVM can't be used: Firecracker 1." in chosen.describe()
        assert "the guest's CPU failed" in chosen.describe()


async def test_auto_takes_firecracker_where_a_guest_gets_to_userspace(
    settings: Settings, fc: FirecrackerDriver, fc_image: Image
) -> None:
    tcg = QemuDriver(accelerator="tcg", disk_cache=settings.state_dir / "blank")
    chosen = await choose.choose(
        [fc, tcg], fc_image, state_dir=settings.state_dir, cache=firecracker_here.PROBES, timeout_seconds=600
    )
    assert chosen.driver is fc
    assert chosen.describe().startswith("firecracker (Firecracker 1.")


@pytest.mark.parametrize(
    ("firecracker_says", "jailer_says", "reason"),
    [
        ("Firecracker v1.7.0", "Jailer v1.7.0", r"Firecracker 1\.7\.0 is too old, 1\.12 or newer is needed"),
        ("Firecracker v1.13.0", "Jailer v1.12.1", r"Firecracker is version 1\.13\.0 but its jailer 1\.12\.1"),
        ("hello", "Jailer v1.12.1", "printed no version: 'hello"),
        ("Firecracker v1.12.1", None, "jailer is not installed: run `swarm install firecracker`"),
        ("Firecracker v1.12.1", "Jailer v1.12.1", r"1\.12\.1 has a known hole \(CVE-2026-1386\): run `swarm install"),
        ("Firecracker v1.13.1", "Jailer v1.13.1", "CVE-2026-1386"),
        ("Firecracker v1.13.2", "Jailer v1.13.2", ""),
        ("Firecracker v1.14.0", "Jailer v1.14.0", "CVE-2026-1386"),
        ("Firecracker v1.14.1", "Jailer v1.14.1", ""),
        ("Firecracker v2.0.1", "Jailer v2.0.1", ""),
    ],
)
async def test_versions(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    firecracker_says: str,
    jailer_says: str | None,
    reason: str,
) -> None:
    for name, says in (("firecracker", firecracker_says), ("jailer", jailer_says)):
        if says is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    probe = await FirecrackerDriver(disk_cache=settings.state_dir / "blank").probe()
    assert probe.usable == (not reason), probe.reason
    assert re.search(reason, probe.reason)


async def test_not_installed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    named = settings.model_copy(update={"driver": "firecracker"})
    with pytest.raises(HostError, match="firecracker is not installed: run `swarm install firecracker`"):
        await wiring.choice(named)


# --- helpers ----------------------------------------------------------------------------------------------------------


def inode(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_dev, info.st_ino


def running(name: str) -> list[int]:
    """Processes of the VM of this name. Uids are no sign: other sandboxes of this machine have VMs of that number."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and name.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def private_kb(pid: int) -> int:
    """Memory of a process that no other process shares."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+)", rollup, re.M)))


def _rename_tap(space: str, name: str) -> None:
    netns.enter(space)
    with netns.netlink() as inner:
        index = inner.link_lookup(ifname=driver.TAP_NAME)[0]
        inner.link("set", index=index, state="down")
        inner.link("set", index=index, ifname=name)
        inner.link("set", index=index, state="up")
