"""The driver conformance suite: every driver goes through all of it, by the Protocol alone.

A *way* is a driver and how its VMs start: booted, or restored from a template. Where a cold boot takes minutes, only
the template is booted. A driver's Probe says what it can't do; the suite doesn't test that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.base import process
from swarm.base.aio import undoing
from swarm.channel import Channel, Identity, processes
from swarm.config import Settings
from swarm.errors import BootFailed, SwarmError
from swarm.vm.choose import Choice
from swarm.vm.driver import Driver, Image, Slot, Snapshot, Template, Vm, VmSpec
from swarm.vm.drivers.firecracker import FirecrackerDriver
from swarm.vm.drivers.process import ProcessDriver
from swarm.vm.drivers.qemu import QemuDriver
from swarm.vm.slots import ssh
from tests.conftest import PATIENCE_SECONDS, need
from tests.vm import firecracker_here

NOTHING = Path(os.devnull)
NO_IMAGE = Image(digest="", dir=NOTHING, kernel=NOTHING, kernel_elf=NOTHING, root=NOTHING, initramfs=None, boot_args="")
FIRST_SLOT = 2000


@dataclass(frozen=True, kw_only=True)
class Way:
    """`start` starts a VM in its directory; `shared_files` are those that no VM may change."""

    driver: Driver
    settings: Settings
    spec: VmSpec
    template: Template | None
    timeout_seconds: float

    async def start(self, place: Path, slot: Slot | None, *, outlive: bool = False, token: bytes = b"") -> Vm:
        if self.template:
            return await self.driver.restore(self.template, slot, place, outlive=outlive)
        return await self.driver.boot(self.spec, slot, place, outlive=outlive, token=token)

    def connect(self, vm: Vm, token: bytes) -> AbstractAsyncContextManager[Channel]:
        token = self.template.token if self.template else token
        return Channel.connect(vm.endpoint, token=token, timeout_seconds=self.timeout_seconds)

    def shared_files(self) -> list[Path]:
        files = [self.spec.image.root, self.spec.image.kernel] if self.driver.networked else []
        return [*files, *(sorted(self.template.dir.glob("[ms]*")) if self.template else [])]


def process_way(settings: Settings) -> Way:
    spec = VmSpec(image=NO_IMAGE)
    return Way(driver=ProcessDriver(), settings=settings, spec=spec, template=None, timeout_seconds=120)


async def qemu_way(settings: Settings, image: Image, *, restored: bool) -> Way:
    driver = QemuDriver(accelerator="tcg", disk_cache=settings.state_dir / "blank")
    return await _way(driver, settings, VmSpec(image=image), restored=restored, timeout_seconds=60)


async def firecracker_way(settings: Settings) -> Way:
    image = await firecracker_here.image(settings)
    settings = firecracker_here.with_firecracker(settings, image)
    driver = FirecrackerDriver(disk_cache=settings.state_dir / "blank", holes_allowed=True)
    return await _way(driver, settings, firecracker_here.spec(image), restored=True, timeout_seconds=60)


async def _way(driver: Driver, settings: Settings, spec: VmSpec, *, restored: bool, timeout_seconds: float) -> Way:
    probe = await driver.probe()
    assert probe.usable, probe.reason
    launcher = wiring.launcher(settings, Choice(driver=driver, probe=probe), clones=restored)
    template = await launcher.template(spec)
    return Way(driver=driver, settings=settings, spec=spec, template=template, timeout_seconds=timeout_seconds)


@pytest.fixture(scope="module", params=["process", "qemu-booted", "qemu-restored", "firecracker-restored"])
def way(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Way]:
    match request.param:
        case "process":
            yield process_way(settings)
        case "firecracker-restored":
            need("firecracker")
            with firecracker_here.on_path():
                yield asyncio.run(firecracker_way(settings))
        case name:
            need("qemu")
            image = request.getfixturevalue("image")
            yield asyncio.run(qemu_way(settings, image, restored=name == "qemu-restored"))


class Host:
    """Gives VMs a directory and a network slot, and takes them back at the end of a test."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.network = wiring.network(way.settings)
        self._inventory = wiring.inventory(way.settings)
        self.vms: list[Vm] = []

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[tuple[Path, Slot | None]]:
        async with undoing() as undo:
            place = self._inventory.reserve_free(FIRST_SLOT)
            undo.push_async_callback(asyncio.to_thread, place.release)
            slot = None
            if self.way.driver.networked:
                undo.push_async_callback(self.network.destroy, place.n)
                slot = await self.network.create(place.n)
            yield place.dir, slot

    @contextlib.asynccontextmanager
    async def vm(self) -> AsyncIterator[Guest]:
        async with self.place() as (place, slot):
            token = secrets.token_bytes(32)
            vm = await self.way.start(place, slot, token=token)
            try:
                async with self.way.connect(vm, token) as channel:
                    yield Guest(vm=vm, channel=channel, dir=place, token=token)
            finally:
                await vm.kill()

    @contextlib.asynccontextmanager
    async def resumed(self, guest: Guest, snapshot: Snapshot, *, own: bool) -> AsyncIterator[Guest]:
        """A VM that goes on where a snapshot of ``guest`` was taken."""
        seconds = self.way.timeout_seconds
        async with self.place() as (place, slot):
            vm = await self.way.driver.resume(snapshot, slot, place, own=own)
            try:
                async with Channel.connect(vm.endpoint, token=guest.token, timeout_seconds=seconds) as channel:
                    yield Guest(vm=vm, channel=channel, dir=place, token=guest.token)
            finally:
                await vm.kill()


@dataclass(frozen=True, kw_only=True)
class Guest:
    vm: Vm
    channel: Channel
    dir: Path
    token: bytes

    async def renew(self, name: str = "here") -> str:
        """Its new generation."""
        renewed = await self.channel.renew(
            Identity(
                generation=secrets.token_hex(16),
                seed=os.urandom(64),
                hostname=name,
                machine_id=secrets.token_hex(16),
                ssh_host_key=ssh.new_key().private.decode(),
                authorized_keys="",
                token=self.token,
            )
        )
        assert renewed.generation is not None
        return renewed.generation


@pytest.fixture
def host(way: Way) -> Host:
    return Host(way)


async def test_it_says_what_it_is(way: Way) -> None:
    probe = await way.driver.probe()
    assert probe.usable
    assert probe.reason
    assert probe.version
    assert probe.snapshots or way.template is None


async def test_a_whole_life(host: Host) -> None:
    """Up, renewed, an agent's files in, the agent run, its output out, killed; nothing but logs stays."""
    async with host.vm() as guest:
        generation = await guest.renew()
        assert guest.channel.greeting.generation != generation == (await guest.channel.hello()).generation
        await guest.channel.put({"input.json": b'{"inputs": 1}'}, dest="/work")
        await guest.channel.put(
            {"main.py": b"open('output.json', 'w').write(open('input.json').read())"}, dest="/agent"
        )
        ended = await guest.channel.run(["/agent/main.py"], warm=True, timeout_seconds=120)
        assert ended.code == 0
        assert await guest.channel.get("/work/output.json", limit_bytes=100) == b'{"inputs": 1}'
        pid, vm, place = guest.vm.pid, guest.vm, guest.dir
        assert process.start_time(pid) is not None
        await vm.kill()
        assert process.start_time(pid) is None
        assert inside(place) == []
        assert await vm.wait()  # a sentence
        await vm.kill()  # idempotent
        left = {path.name for path in place.iterdir()}
        assert left <= {"vm.json", "console.log", "qemu.log", "firecracker.log", "jailer.log", "work.ext4"}


async def test_wait_ends_with_the_vmm(host: Host) -> None:
    async with host.vm() as guest:
        wait = asyncio.create_task(guest.vm.wait())
        os.kill(guest.vm.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_SECONDS):
            said = await wait
        assert "\n" not in said
        assert said
        await guest.vm.kill()
        assert inside(guest.dir) == []


async def test_wait_can_be_cancelled(host: Host) -> None:
    async with host.vm() as guest:
        wait = asyncio.create_task(guest.vm.wait())
        await asyncio.wait({wait}, timeout=0.01)
        wait.cancel()
        await asyncio.gather(wait, return_exceptions=True)
        assert await guest.channel.hello()


async def test_two_do_not_share(host: Host) -> None:
    """Neither sees what the other writes, and the files that they share don't change."""
    before = [digest(file) for file in host.way.shared_files()]
    async with host.vm() as one, host.vm() as other:
        await one.renew("one")
        await other.renew("other")
        await one.channel.put({"mine": b"x" * (256 << 10)}, dest="/work")
        assert await other.channel.get("/work/mine", limit_bytes=10) is None
        mine, its = await one.channel.hello(), await other.channel.hello()
        assert mine.generation != its.generation
        assert mine.boot_id == its.boot_id or host.way.template is None or not host.way.driver.networked
        if host.way.driver.networked:
            assert (mine.hostname, its.hostname) == ("one", "other")
            assert mine.machine_id != its.machine_id
    assert [digest(file) for file in host.way.shared_files()] == before


async def test_it_goes_on_after_it_was_saved_and_in_its_snapshots(host: Host, tmp_path: Path) -> None:
    """Saved, it goes on; forks of that are what it was, apart from each other; paused, it ends, and goes on later."""

    def taken(name: str) -> Snapshot:
        (tmp_path / name).mkdir()
        identity = Identity(
            generation="", seed=b"", hostname="", machine_id="", ssh_host_key="", authorized_keys="", token=b""
        )
        return Snapshot(
            id=name, dir=tmp_path / name, spec=host.way.spec, driver="", accelerator="", version="", identity=identity
        )

    async def freeze() -> None:
        await processes.freeze(guest.channel.converse)

    async with host.vm() as guest:
        await guest.renew("parent")
        saved = taken("saved")
        if host.way.template is None:  # nothing says what its memory was before
            with pytest.raises(BootFailed):
                await guest.vm.save(saved.dir, freeze=freeze)
            with pytest.raises(BootFailed):
                async with guest.vm.pausing(saved.dir, freeze=freeze):
                    raise AssertionError("it can't be paused")
            return
        await guest.channel.put({"mine": b"parent"}, dest="/work")
        await guest.vm.save(saved.dir, freeze=freeze)
        await processes.thaw(guest.channel.converse)
        await guest.channel.put({"mine": b"changed"}, dest="/work")
        before = [digest(file) for file in sorted(saved.dir.iterdir())]
        async with host.resumed(guest, saved, own=False) as one, host.resumed(guest, saved, own=False) as other:
            assert await one.renew("one") != await other.renew("other")
            for fork, name in ((one, "one"), (other, "other")):
                assert (await fork.channel.hello()).hostname == name
                assert await fork.channel.get("/work/mine", limit_bytes=100) == b"parent"
                await processes.thaw(fork.channel.converse)  # until then, nothing is written to its disk
                await fork.channel.put({"mine": name.encode()}, dest="/work")
            assert await one.channel.get("/work/mine", limit_bytes=100) == b"one"
        assert [digest(file) for file in sorted(saved.dir.iterdir())] == before
        with pytest.raises(ZeroDivisionError):
            async with guest.vm.pausing(taken("failed").dir, freeze=freeze):
                _ = 1 / 0
        await processes.thaw(guest.channel.converse)
        assert await guest.channel.get("/work/mine", limit_bytes=100) == b"changed"
        paused = taken("paused")
        async with guest.vm.pausing(paused.dir, freeze=freeze):
            pass
        assert process.start_time(guest.vm.pid) is None
    async with host.resumed(guest, paused, own=True) as again:
        assert await again.channel.get("/work/mine", limit_bytes=100) == b"changed"
        assert (await again.channel.hello()).boot_id == guest.channel.greeting.boot_id


async def test_it_dies_with_its_owner(host: Host) -> None:
    """In whatever way the owner ends; the next sweep removes what is on disk."""
    async with host.place() as (place, slot):
        async with owner(host.way, place, slot, outlive=False) as (child, pid):
            assert process.start_time(pid) is not None
            gone = death_of(pid)
            child.kill()
            await child.wait()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await gone
        await until(lambda: inside(place) == [])
        clear(place)


async def test_it_can_outlive_its_owner(host: Host) -> None:
    async with host.place() as (place, slot):
        async with owner(host.way, place, slot, outlive=True) as (child, pid):
            assert child.stdin
            child.stdin.close()
            assert await child.wait() == 0
        started = process.start_time(pid)
        assert started is not None
        gone = death_of(pid)
        await process.kill_stranger(pid, started)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await gone
        await until(lambda: inside(place) == [])
        clear(place)


async def test_a_failed_start_leaves_nothing(host: Host) -> None:
    broken = VmSpec(image=NO_IMAGE, disk_mb=1)  # too small for a file system, and no kernel
    if not host.way.driver.networked:
        pytest.skip("nothing of a spec applies to the process driver")
    async with host.place() as (place, slot):
        with pytest.raises(SwarmError):
            await host.way.driver.boot(broken, slot, place)
        assert inside(place) == []
        assert {path.name for path in place.iterdir()} <= {
            "vm.json", "console.log", "qemu.log", "jailer.log", "firecracker.log",
        }  # fmt: skip


async def test_a_torn_template_is_an_error(host: Host, tmp_path: Path) -> None:
    way = host.way
    if way.template is None:
        torn = Template(key="k", dir=tmp_path, spec=way.spec, token=b"t" * 32)
    else:
        torn = Template(key="k", dir=tmp_path, spec=way.spec, token=way.template.token)
        for name in ("memory", "state"):
            with (way.template.dir / name).open("rb") as file:
                (tmp_path / name).write_bytes(file.read(4096))
    async with host.place() as (place, slot):
        with pytest.raises((BootFailed, SwarmError)):
            await way.driver.restore(torn, slot, place)
        assert inside(place) == []


# --- helpers ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from ipaddress import IPv4Address
from swarm.base.log import configure
from swarm.vm.driver import Image, Slot, Template, VmSpec
from swarm.vm.drivers.process import ProcessDriver
from swarm.vm.drivers.qemu import QemuDriver
from swarm.vm.drivers.firecracker import FirecrackerDriver
PosixPath = Path

configure(debug=False)
async def main():
    driver = {driver}
    template, slot, spec, place = {template!r}, {slot!r}, {spec!r}, Path({place!r})
    if template:
        template = Template(key=template[0], dir=Path(template[1]), spec=spec, token=b"t" * 32)
        vm = await driver.restore(template, slot, place, outlive={outlive})
    else:
        vm = await driver.boot(spec, slot, place, outlive={outlive})
    print(vm.pid, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)
asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def owner(
    way: Way, place: Path, slot: Slot | None, *, outlive: bool
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Another process that starts a VM and holds it: (that process, the VM's pid). It ends when its stdin does."""
    cache = f"Path({str(way.settings.state_dir / 'blank')!r})"
    driver = {
        "process": "ProcessDriver()",
        "qemu": f"QemuDriver(accelerator='tcg', disk_cache={cache})",
        "firecracker": f"FirecrackerDriver(disk_cache={cache}, holes_allowed=True)",
    }[way.driver.name]
    source = PROGRAM.format(
        root=str(firecracker_here.ROOT),
        driver=driver,
        template=(way.template.key, str(way.template.dir)) if way.template else None,
        slot=slot,
        spec=way.spec,
        place=str(place),
        outlive=outlive,
    )
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", source, stdin=pipe, stdout=pipe)
    try:
        assert child.stdout
        async with asyncio.timeout(PATIENCE_SECONDS):
            line = await child.stdout.readline()
        assert line, "the owner started no VM"
        yield child, int(line)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def inside(place: Path) -> list[int]:
    """Processes that name the VM's directory on their command line, work below it, or have their root there."""
    roots = [path.stat() for path in place.glob("jail/*/*/root")]
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (
                    f"{place}/".encode() in (entry / "cmdline").read_bytes()
                    or (entry / "cwd").readlink().is_relative_to(place)
                    or any(os.path.samestat((entry / "root").stat(), root) for root in roots)
                ):
                    found.append(int(entry.name))
    return found


def clear(place: Path) -> None:
    """What `swarm.vm.slots.sweep` does to a directory whose VM is dead."""
    from swarm.vm.drivers import jailer

    jailer.remove(place)


def death_of(pid: int) -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(pid)
    gone: asyncio.Future[None] = loop.create_future()

    def seen() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        gone.set_result(None)

    loop.add_reader(fd, seen)
    return gone


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.to_thread(os.sched_yield)


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
