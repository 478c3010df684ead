"""The `process` driver: the whole life of a VM, and nothing left after it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.base import process
from swarm.channel import Channel, Identity
from swarm.errors import BootFailed, HostError
from swarm.vm.driver import Driver, Image, Layer, Root, Template, Vm, VmSpec
from swarm.vm.drivers.process import ProcessDriver
from tests.conftest import PATIENCE_SECONDS

NOTHING = Path(os.devnull)
SPEC = VmSpec(
    image=Image(digest="", dir=NOTHING, kernel=NOTHING, kernel_elf=NOTHING, root=NOTHING, initramfs=None, boot_args="")
)
TOKEN = b"t" * 16


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vm")  # short: a Unix socket lives there


def related(dir: Path) -> list[int]:
    """Processes that name the VM's directory on their command line, or work below it."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (
                os.fsencode(dir) in (entry / "cmdline").read_bytes() or (entry / "cwd").readlink().is_relative_to(dir)
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def test_probe() -> None:
    driver: Driver = ProcessDriver()
    probe = await driver.probe()
    assert probe.usable
    assert not probe.snapshots
    assert not driver.networked
    assert "without any isolation" in probe.reason


async def test_an_imported_image_is_refused(place: Path) -> None:
    with pytest.raises(BootFailed, match="needs a VM"):
        await ProcessDriver().boot(replace(SPEC, layer=Layer(digest="d", path=NOTHING, root=Root())), None, place)


async def test_it_ends_also_when_its_owner_has_no_descriptors_left(place: Path) -> None:
    vm = await ProcessDriver().boot(SPEC, None, place)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(HostError, match="Too many open files"):
            process.start_time(vm.pid)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await vm.kill()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert process.start_time(vm.pid) is None
    await vm.kill()  # what it could not look for then
    assert related(place) == []


async def test_boot_to_kill_leaves_nothing(place: Path) -> None:
    vm: Vm = await ProcessDriver().boot(SPEC, None, place)
    async with Channel.connect(vm.endpoint, token=TOKEN, timeout_seconds=120) as channel:
        identity = Identity(
            generation="g",
            seed=b"s" * 32,
            hostname="h",
            machine_id="0" * 32,
            ssh_host_key="",
            authorized_keys="",
            token=TOKEN,
        )
        assert (await channel.renew(identity)).generation == "g"
        await channel.put({"input.json": b'{"inputs": 1}'}, dest="/work")
        await channel.put({"main.py": b"open('output.json', 'w').write(open('input.json').read())"}, dest="/agent")
        assert (await channel.run(["/agent/main.py"], warm=True, timeout_seconds=120)).code == 0
        assert await channel.get("/work/output.json", limit_bytes=100) == b'{"inputs": 1}'
    assert related(place)
    await vm.kill()
    assert related(place) == []
    assert [p.name for p in place.iterdir()] == ["console.log"]
    assert await vm.wait() == f"agentd (pid {vm.pid}) ended with status 0"
    await vm.kill()  # idempotent


@pytest.mark.parametrize("how", ["vm.kill", "SIGKILL"])
async def test_what_runs_dies_too(place: Path, how: str) -> None:
    vm = await ProcessDriver().boot(SPEC, None, place)
    said: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    script = "trap '' TERM INT HUP; setsid sleep 1000 </dev/null & echo $$ $!; wait"
    async with Channel.connect(vm.endpoint, token=TOKEN, timeout_seconds=120) as channel:
        run = asyncio.create_task(
            channel.run(["/bin/sh", "-c", script], timeout_seconds=60, on_output=lambda _, data: said.set_result(data))
        )
        pids = [int(word) for word in (await said).split()]
        if how == "SIGKILL":
            os.kill(vm.pid, signal.SIGKILL)
            assert await vm.wait() == f"agentd (pid {vm.pid}) was killed by signal 9 (SIGKILL)"
        await vm.kill()
        await asyncio.gather(run, return_exceptions=True)
    assert [process.start_time(pid) for pid in pids] == [None, None]
    assert related(place) == []


async def test_it_dies_with_its_owner(place: Path) -> None:
    """In whatever way the owner ends."""
    source = f"""
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.vm.drivers.test_process_driver import SPEC, TOKEN
from swarm.channel import Channel
from swarm.vm.drivers.process import ProcessDriver
async def main():
    vm = await ProcessDriver().boot(SPEC, None, Path({str(place)!r}))
    async with Channel.connect(vm.endpoint, token=TOKEN, timeout_seconds=120):
        os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", source, stdout=asyncio.subprocess.DEVNULL)
    assert await owner.wait() == -signal.SIGKILL
    for pid in related(place):
        started = process.start_time(pid)
        if started is not None:
            fd = os.pidfd_open(pid)
            dead = asyncio.Event()
            asyncio.get_running_loop().add_reader(fd, dead.set)
            async with asyncio.timeout(PATIENCE_SECONDS):
                await dead.wait()
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
    assert related(place) == []


async def test_it_can_outlive_its_owner(place: Path) -> None:
    vm = await ProcessDriver().boot(SPEC, None, place, outlive=True)
    try:
        line = Path(f"/proc/{vm.pid}/status").read_text()
        assert "setpriv" not in line
        async with Channel.connect(vm.endpoint, token=TOKEN, timeout_seconds=120) as channel:
            assert channel.greeting.mode == "process"
    finally:
        await vm.kill()


async def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(BootFailed, match="set a shorter state_dir"):
        await ProcessDriver().boot(SPEC, None, tmp_path / ("x" * 100))


async def test_no_templates(place: Path) -> None:
    with pytest.raises(BootFailed, match="can't be cloned"):
        await ProcessDriver().restore(Template(key="k", dir=place, spec=SPEC, token=TOKEN), None, place)
    vm = await ProcessDriver().boot(SPEC, None, place)
    try:
        with pytest.raises(BootFailed, match="can't be cloned"):
            await vm.snapshot(place)
    finally:
        await vm.kill()
