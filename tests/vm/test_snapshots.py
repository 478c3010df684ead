"""VMs saved, paused, resumed and forked: with QEMU, by the launcher."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import asyncssh
import pytest

from swarm.app import wiring
from swarm.base.clock import Timeline
from swarm.base.process import run
from swarm.channel import Channel, processes
from swarm.channel.guest import Guest
from swarm.channel.processes import Order
from swarm.config import Settings
from swarm.errors import BootFailed, ChannelError, ImageError, NoSpace, NotFound, SwarmError
from swarm.vm.driver import BASE_UID, Image, Snapshot, VmSpec
from swarm.vm.drivers.disk import WORK_DISK
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.slots import ssh
from swarm.vm.snapshots import Snapshots
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.needs("qemu")


@pytest.fixture
def spec(image: Image) -> VmSpec:
    return VmSpec(image=image)


@pytest.fixture
def snapshots(settings: Settings, tmp_path: Path) -> Snapshots:
    return wiring.snapshots(settings.model_copy(update={"snapshots_dir": tmp_path / "snapshots"}))


def names(snapshots: Snapshots) -> list[str]:
    return sorted(path.name for path in snapshots.dir.iterdir())


async def sh(live: LiveVm, command: str, *, timeout_seconds: float = 60) -> str:
    order = Order(argv=["/bin/sh", "-c", command], user="root", timeout_seconds=timeout_seconds)
    done = await processes.run(live.channel.converse, order)
    assert done.ended.code == 0, done
    return done.stdout.decode().strip()


@asynccontextmanager
async def a_vm(launcher: Launcher, spec: VmSpec) -> AsyncIterator[LiveVm]:
    async with launcher.vm(spec, Assignment(), Timeline()) as live:
        yield live


@asynccontextmanager
async def going_on(
    launcher: Launcher, snapshots: Snapshots, snapshot: Snapshot, *, fork: bool
) -> AsyncIterator[LiveVm]:
    found = await snapshots.find(snapshot.id)
    assert found.digest == snapshot.digest
    async with launcher.restored(found, Assignment(), Timeline(), fork=fork) as live:
        yield live


async def test_a_vm_is_saved_forked_paused_and_resumed(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec, settings: Settings
) -> None:
    async with a_vm(launcher, spec) as parent:
        # In memory (a tmpfs), on disk, and on disk but not flushed.
        await sh(parent, "echo memory > /run/x; echo disk > /work/x; sync; echo late > /work/y")
        async with snapshots.stage() as stage:
            saved = await launcher.save(parent, stage)
        assert await sh(parent, "cat /run/x /work/x /work/y; echo parent > /work/x") == "memory\ndisk\nlate"
        assert (saved.dir.stat().st_mode & 0o777, saved.dir.parent.stat().st_mode & 0o777) == (0o700, 0o700)
        assert {path.stat().st_mode & 0o177 for path in saved.dir.iterdir()} == {0}
        assert names(snapshots) == [saved.id]
        assert saved.size_bytes <= snapshots.used_bytes() < 400 << 20

        async with going_on(launcher, snapshots, saved, fork=True) as fork:
            assert await sh(fork, "cat /run/x /work/x /work/y; echo fork > /work/x") == "memory\ndisk\nlate"
            assert fork.identity.token != parent.identity.token
            async with snapshots.stage() as stage:
                paused = await launcher.pause(fork, stage)
            assert await fork.vm.wait()  # it has ended
        assert await sh(parent, "cat /work/x") == "parent"
        await snapshots.find(saved.id)  # still as it was: verified

    for turn in ("first", "second"):  # the second VM's memory file was its own
        async with going_on(launcher, snapshots, paused, fork=False) as again:
            assert await snapshots.remove(paused.id)
            assert await sh(again, "cat /work/x; cat /run/x") == "fork\nmemory", turn
            assert again.identity.machine_id == fork.identity.machine_id
            told = [one.host_key for one in wiring.inventory(settings).records() if one.n == again.n]
            assert told == [ssh.public_of(fork.identity.ssh_host_key)], "the guest has the key that it had"
            async with snapshots.stage() as stage:
                paused = await launcher.pause(again, stage)
    assert names(snapshots) == sorted([saved.id, paused.id])
    assert not saved.disk_still and not paused.disk_still, "small disks are copied"


async def test_a_paused_ones_disk_stays_as_it_is_until_its_programs_go_on(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec
) -> None:
    """Whoever resumes it may die meanwhile; and a disk that is large is not copied first."""

    class Died(Exception):
        pass

    async def die(live: LiveVm) -> None:
        began = await live.channel.hello()
        while (await live.channel.hello()).uptime_ms < began.uptime_ms + 1500:  # its kernel has had its turn
            pass
        if not found.disk_still:
            assert (live.vm_slot.lease.dir / WORK_DISK).stat().st_nlink == 1
        raise Died

    async with a_vm(launcher, spec) as live, AsyncExitStack() as stack:
        guest = Guest(live.vm.endpoint, live.identity.token)
        stack.push_async_callback(guest.close)
        await sh(live, "yes | head -c 70M > /work/large; sync")
        for name in ("dirty_writeback_centisecs", "dirty_expire_centisecs"):  # what is written goes to the disk soon
            await sh(live, f"echo 20 > /proc/sys/vm/{name}")
        writes = Order(argv=["/bin/sh", "-c", "while echo x; do sleep 0.01; done > /work/x"], background=True)
        async with processes.start(guest.open, writes):
            pass
        await sh(live, "until [ -s /work/x ]; do sleep 0.1; done")
        async with snapshots.stage() as stage:
            paused = await launcher.pause(live, stage)
    assert paused.disk_still
    for still in (False, True, True):  # a guest that does not keep it still costs a copy
        found = replace(await snapshots.find(paused.id), disk_still=still)
        with pytest.raises(Died):
            async with launcher.restored(found, Assignment(), Timeline(), fork=False, prepare=die):
                pass
    async with going_on(launcher, snapshots, paused, fork=False) as live:
        size = int(await sh(live, "stat -c %s /work/x"))
        await sh(live, f"until [ $(stat -c %s /work/x) -gt {size} ]; do sleep 0.1; done; sync")


async def test_a_damaged_snapshot_is_found_before_it_runs(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec
) -> None:
    async with a_vm(launcher, spec) as parent, snapshots.stage() as stage:
        saved = await launcher.save(parent, stage)
    for name in ("memory", "state", "work"):
        with (saved.dir / name).open("r+b") as file:
            file.seek(4096)
            kept = file.read(1)
            file.seek(4096)
            file.write(bytes([kept[0] ^ 1]))
        with pytest.raises(ImageError, match=f"damaged.*{name}"):
            await snapshots.find(saved.id)
        with (saved.dir / name).open("r+b") as file:
            file.seek(4096)
            file.write(kept)
        await snapshots.find(saved.id)
    (saved.dir / "snapshot.json").write_text("{}")
    with pytest.raises(ImageError, match="damaged"):
        await snapshots.find(saved.id)
    assert await snapshots.remove(saved.id)
    with pytest.raises(NotFound):
        await snapshots.find(saved.id)


async def test_without_room_the_vm_runs_on_and_nothing_is_left(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec
) -> None:
    snapshots.limit_bytes = 1 << 20
    async with a_vm(launcher, spec) as live:
        for take in (launcher.save, launcher.pause):
            with pytest.raises(NoSpace, match="SWARM_SNAPSHOTS_GB"):
                async with snapshots.stage() as stage:
                    await take(live, stage)
            assert names(snapshots) == []
            assert await sh(live, "echo alive") == "alive"


async def test_collect_spares_what_is_wanted_new_or_being_written(snapshots: Snapshots) -> None:
    async with snapshots.stage() as stage:
        (stage.dir / "memory").write_bytes(b"x")
        for name in ("a" * 32, "b" * 32, ".building-" + "c" * 32):
            (snapshots.dir / name).mkdir()
            (snapshots.dir / name / "snapshot.json").write_text(json.dumps({"owner": snapshots.owner}))
            os.utime(snapshots.dir / name, (0, 0))
        other = snapshots.dir / ("f" * 32)  # of another database, which shares the directory
        other.mkdir()
        (other / "snapshot.json").write_text('{"owner": "/other"}')
        os.utime(other, (0, 0))
        os.utime(stage.dir, (0, 0))  # it is locked
        for name in ("d" * 32, ".building-" + "e" * 32):
            (snapshots.dir / name).mkdir()
        assert await snapshots.collect({"a" * 32}) == ["b" * 32]
        assert names(snapshots) == sorted(["a" * 32, "d" * 32, "f" * 32, stage.dir.name, ".building-" + "e" * 32])
        assert (stage.dir / "memory").exists()
    assert stage.dir.name not in names(snapshots)


async def test_the_manifest_tells_no_seed(launcher: Launcher, snapshots: Snapshots, spec: VmSpec) -> None:
    async with a_vm(launcher, spec) as live, snapshots.stage() as stage:
        saved = await launcher.save(live, stage)
    manifest = json.loads((saved.dir / "snapshot.json").read_text())
    assert live.identity.seed.hex() not in json.dumps(manifest)


async def test_many_snapshots_leave_no_descriptor_open(launcher: Launcher, snapshots: Snapshots, spec: VmSpec) -> None:
    async with a_vm(launcher, spec) as live:

        def descriptors() -> list[int]:
            return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (live.vm.pid, os.getpid())]  # noqa: PTH208

        counts = []
        for _ in range(20):
            async with snapshots.stage() as stage, cast(Any, live.vm)._standing(stage.dir):
                assert (stage.dir / "state").stat().st_size > 10_000, "it is not in the file before"
            counts.append(descriptors())
        async with snapshots.stage() as stage:
            await launcher.save(live, stage)
        assert await sh(live, "echo alive") == "alive"
        assert [a <= b for a, b in zip(counts[-1], counts[0], strict=True)] == [True, True], counts


# --- forks ------------------------------------------------------------------------------------------------------------

# Goes on for as long as its VM: each line has what two forks may not share, and when.
_WITNESS = """
import os, time
def read(path):
    with open(path) as file:
        return file.read().strip()
with open("/run/witness", "a", buffering=1) as out:
    while True:
        random = os.urandom(8).hex(), read("/proc/sys/kernel/random/uuid")
        print(read("/etc/machine-id"), os.uname().nodename, *random, int(time.time()), file=out)
        time.sleep(0.1)
"""


async def test_forks_share_nothing_that_must_differ_and_no_program_of_theirs_runs_before(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec
) -> None:
    async with AsyncExitStack() as stack:
        parent = await stack.enter_async_context(a_vm(launcher, spec))
        order = Order(argv=["/usr/bin/python3", "-S", "-c", _WITNESS], user="root", background=True)
        guest = Guest(parent.vm.endpoint, parent.identity.token)
        stack.push_async_callback(guest.close)
        async with processes.start(guest.open, order):
            pass
        await sh(parent, "until [ -s /run/witness ]; do sleep 0.1; done; hostname > /work/where")
        began = time.time_ns()
        async with snapshots.stage() as stage:
            saved = await launcher.save(parent, stage)
        forks = [await stack.enter_async_context(going_on(launcher, snapshots, saved, fork=True)) for _ in range(2)]
        # A clock is behind by what it took to tell the guest the time, which is less than all of this.
        late_ns = time.time_ns() - began
        known = await sh(forks[0], "cat /run/witness")
        lines: list[list[str]] = []
        for live in (*forks, parent):
            # The line that was being made when the snapshot was taken may be of both; the last one may be torn.
            own = f"until [ $(grep -c {live.identity.machine_id} /run/witness) -gt 4 ]; do sleep 0.3; done"
            await sh(live, own)
            lines.append((await sh(live, "cat /run/witness")).splitlines())
            assert await sh(live, "cat /work/where") == parent.identity.hostname
        common = next(n for n, line in enumerate(lines[0]) if any(own[n] != line for own in lines))
        assert 0 < common <= len(known.splitlines())
        after = [[line.split() for line in own[common + 1 : -1]] for own in lines]
        for live, said in zip((*forks, parent), after, strict=True):
            assert {line[0] for line in said} == {live.identity.machine_id}
            assert {line[1] for line in said} == {live.identity.hostname}
            assert all(abs(int(line[4]) - time.time()) < 120 for line in said)
        for column in (2, 3):
            values = [line[column] for said in after for line in said]
            assert len(set(values)) == len(values), "two of them drew the same random bytes"
        keys = [await host_key(live) for live in forks]
        assert keys[0] != keys[1]
        assert len({live.identity.token for live in (*forks, parent)}) == 3
        assert len({live.vm.endpoint.host for live in (*forks, parent)}) == 3
        for live in forks:  # the parent's connection, which was open, is gone; the parent's token opens nothing
            assert await established(live) == 1
            with pytest.raises(ChannelError):
                async with Channel.connect(live.vm.endpoint, token=parent.identity.token, timeout_seconds=120):
                    pass
        for live in (*forks, parent):
            now = time.time_ns()
            assert now - late_ns < (await live.channel.hello()).clock_ns < time.time_ns() + 0.1e9


async def host_key(live: LiveVm) -> str:
    key = await asyncssh.get_server_host_key(live.vm.endpoint.host, config=None)
    assert key is not None
    return key.export_public_key().decode()


async def established(live: LiveVm) -> int:
    """Connections of agentd that the guest knows of."""
    return int(await sh(live, "grep -c ':0400 [0-9A-F:]* 01 ' /proc/net/tcp"))


# --- what goes wrong ------------------------------------------------------------------------------------------------


async def test_a_full_disk_costs_the_snapshot_and_not_the_vm(
    launcher: Launcher, settings: Settings, spec: VmSpec, tmp_path: Path
) -> None:
    full = tmp_path / "small"
    full.mkdir()
    await run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(full)])
    others = full / "others"

    def fill(spare: int) -> None:
        disk = os.statvfs(full)
        others.write_bytes(bytes(disk.f_bavail * disk.f_frsize - spare))

    async def freeze_and_fill() -> None:
        await live.freeze()
        fill(0)

    try:
        snapshots = wiring.snapshots(settings.model_copy(update={"snapshots_dir": full / "snapshots"}))
        async with a_vm(launcher, spec) as live:
            fill(100 << 20)  # seen at once, and nothing is written
            for take in (launcher.save, launcher.pause):
                with pytest.raises(NoSpace, match="the snapshot was not taken"):
                    async with snapshots.stage() as stage:
                        await take(live, stage)
                assert names(snapshots) == []
            others.unlink()
            await sh(live, "cat /usr/bin/* > /work/much 2>/dev/null; sync; rm /work/much")  # more than a few pages
            for late in (False, True):  # in the middle: while it is paused, or saved
                with pytest.raises(NoSpace, match="the snapshot was not taken"):
                    async with snapshots.stage() as stage:
                        with stage.explained():
                            if late:
                                async with live.vm.pausing(stage.dir, freeze=freeze_and_fill):
                                    raise AssertionError("it did not fit")
                            else:
                                await live.vm.save(stage.dir, freeze=freeze_and_fill)
                others.unlink()
                await live.thaw()
                assert names(snapshots) == []
                assert await sh(live, "echo alive") == "alive"
    finally:
        await run(["umount", str(full)])


async def test_a_cancelled_or_failed_snapshot_leaves_the_vm_running(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec
) -> None:
    async with a_vm(launcher, spec) as live:
        qmp = cast(Any, live.vm)._qmp
        for event, take in (("STOP", launcher.save), ("STOP", launcher.pause)):
            with pytest.raises(asyncio.CancelledError):
                async with snapshots.stage() as stage:
                    with qmp.listener(event) as stops:
                        taking = asyncio.create_task(take(live, stage))
                        await stops.get()  # it stands still
                        taking.cancel()
                    await taking
            assert names(snapshots) == []
            assert await sh(live, "echo alive") == "alive"
        with pytest.raises(ZeroDivisionError):
            async with snapshots.stage() as stage, live.vm.pausing(stage.dir, freeze=live.freeze):
                _ = 1 / 0
        await live.thaw()
        assert await sh(live, "echo alive") == "alive"


async def test_a_vm_that_dies_while_it_is_saved_is_told(launcher: Launcher, snapshots: Snapshots, spec: VmSpec) -> None:
    async with a_vm(launcher, spec) as live:

        async def freeze() -> None:
            os.kill(live.vm.pid, signal.SIGKILL)
            await live.vm.wait()

        with pytest.raises(SwarmError):
            async with snapshots.stage() as stage:
                await live.vm.save(stage.dir, freeze=freeze)
        assert names(snapshots) == []


async def test_a_guest_that_stops_by_itself_is_still_ended_after_it_was_saved(
    launcher: Launcher, snapshots: Snapshots, spec: VmSpec
) -> None:
    async with a_vm(launcher, spec) as live:
        async with snapshots.stage() as stage:
            await launcher.save(live, stage)
        await cast(Any, live.vm)._qmp.execute("stop")  # as after an error of its CPU
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert "stopped the guest by itself" in await live.vm.wait()


async def test_a_vm_that_can_not_go_on_is_ended(launcher: Launcher, snapshots: Snapshots, spec: VmSpec) -> None:
    async with a_vm(launcher, spec) as live:
        vm = cast(Any, live.vm)
        with pytest.raises(SwarmError):
            async with snapshots.stage() as stage, vm.pausing(stage.dir, freeze=live.freeze):
                await vm._qmp.disconnect()  # so nothing can tell it to
                raise BootFailed("the disk is full, say")
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert "could not go on" in await live.vm.wait()


async def test_a_fork_is_confined_as_a_clone_is(launcher: Launcher, snapshots: Snapshots, spec: VmSpec) -> None:
    async with a_vm(launcher, spec) as parent, snapshots.stage() as stage:
        saved = await launcher.save(parent, stage)
    async with going_on(launcher, snapshots, saved, fork=True) as live:
        status = Path(f"/proc/{live.vm.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        uid = BASE_UID + live.n
        assert fields["Uid"].split() == fields["Gid"].split() == [str(uid)] * 4
        assert fields["Groups"].split() == [str(BASE_UID)]  # of the memory files of snapshots
        assert (fields["CapEff"], fields["NoNewPrivs"], fields["Seccomp"]) == ("0" * 16, "1", "2")
        assert (saved.dir / "memory").stat().st_mode & 0o777 == 0o660
        assert (saved.dir / "memory").stat().st_gid == BASE_UID
