"""What dead owners leave is removed; live VMs, and what is not Swarm's, stay."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from swarm.base import process
from swarm.config import Settings
from swarm.errors import Conflict, NotFound
from swarm.vm.driver import Slot
from swarm.vm.network import netns
from swarm.vm.network.network import Network
from swarm.vm.slots import sweep
from swarm.vm.slots.inventory import Inventory, Kind, VmRecord
from tests.vm.standin import host_state, ip, open_tap

pytestmark = pytest.mark.needs("netns")


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    return Inventory(state_dir=tmp_path / "state")


# An engine with a VM whose VMM survives it. It waits to be killed after the step ``how``.
ENGINE = """
import asyncio, os, sys
from ipaddress import IPv4Network
from pathlib import Path
from swarm.base import process
from swarm.vm.slots.inventory import Inventory, VmRecord
from swarm.vm.network.network import Network
from swarm.vm.drivers.tap import open_tap

state, n, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

async def main():
    lease = Inventory(state_dir=state).reserve(n)
    pid = 0
    if how != "reserved":
        slot = await Network(subnet=IPv4Network("10.0.0.0/16"), bridge="br0").create(n)
    if how in ("unrecorded", "not entered", "running", "manual"):
        os.set_inheritable(tap := open_tap(slot.netns), True)
        inside = None if how == "not entered" else slot.netns
        child = await process.spawn(["sleep", "600"], output=lease.dir / "log", netns=inside, pass_fds=[tap],
                                    die_with_parent=False)
        pid = child.pid
    if how in ("running", "manual"):
        lease.record(VmRecord(n=n, pid=pid, started=process.start_time(pid), ticket_id="t1"))
    if how == "manual":
        lease.detach()
    print("vmm", pid, flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@contextmanager
def engine(inventory: Inventory, n: int, how: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    argv = [sys.executable, "-c", ENGINE, str(inventory.state_dir), str(n), how]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        vmm = next(int(line.split()[1]) for line in child.stdout if line.startswith("vmm "))  # others are its log
        try:
            yield child, vmm
        finally:
            child.kill()


def lives(pid: int) -> bool:
    return process.start_time(pid) is not None


# "not entered": a VMM before `nsenter` has moved it into the namespace: only its tap tells which VM it belongs to.
@pytest.mark.parametrize("how", ["reserved", "networked", "unrecorded", "not entered", "running"])
async def test_what_a_killed_engine_leaves_is_swept(inventory: Inventory, network: Network, how: str) -> None:
    await network.ensure_host()
    before = await host_state()
    with engine(inventory, 1000, how) as (child, vmm):
        assert await sweep.sweep(inventory, network) == sweep.SweepReport()  # alive
        assert vmm == 0 or lives(vmm)
        child.kill()
        child.wait()
        report = await sweep.sweep(inventory, network)
    assert [(r.n, r.reason) for r in report.removed] == [(1000, f"its owner (pid {child.pid}) ended")]
    assert vmm == 0 or not lives(vmm)
    assert inventory.numbers() == [] and await host_state() == before
    assert await sweep.sweep(inventory, network) == sweep.SweepReport()


async def test_only_the_vmm_of_the_dead_slot_is_killed(inventory: Inventory, network: Network) -> None:
    """Every slot's tap has the same name, and another program's tap may have it too."""

    def strangers_tap() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x40000000) == 0
        return open_tap("tap0")

    tap = await netns.in_thread(strangers_tap)
    stranger = await process.spawn(["sleep", "600"], output=inventory.state_dir.parent / "log", pass_fds=[tap])
    os.close(tap)
    try:
        with (
            engine(inventory, 1000, "not entered") as (dead, vmm),
            engine(inventory, 1001, "not entered") as (_, not_entered),
            engine(inventory, 1002, "unrecorded") as (_, unrecorded),
        ):
            dead.kill()
            dead.wait()
            assert [r.n for r in (await sweep.sweep(inventory, network)).removed] == [1000]
            assert [lives(p) for p in (vmm, not_entered, unrecorded, stranger.pid)] == [False, True, True, True]
        assert [r.n for r in (await sweep.sweep(inventory, network)).removed] == [1001, 1002]
        assert [lives(p) for p in (not_entered, unrecorded, stranger.pid)] == [False, False, True]
    finally:
        await process.kill(stranger)


async def test_a_manual_vm_stays_until_its_vmm_is_dead(inventory: Inventory, network: Network) -> None:
    with engine(inventory, 1, "manual") as (child, vmm):
        child.communicate()
        assert await sweep.sweep(inventory, network) == sweep.SweepReport()
        assert lives(vmm)
        await process.kill_stranger(vmm, process.start_time(vmm) or 0)
        assert [r.n for r in (await sweep.sweep(inventory, network)).removed] == [1]
        assert await network.list() == []


async def test_taking_a_slot_removes_what_was_there(inventory: Inventory, network: Network) -> None:
    with engine(inventory, 1, "manual") as (child, vmm):
        child.communicate()
        with pytest.raises(Conflict, match="was started manually"):
            await sweep.take(inventory, network, 1, replace=False)
        lease = await sweep.take(inventory, network, 1)
    assert not lives(vmm) and await network.list() == []
    await network.create(1)
    lease.record(VmRecord(n=1))
    with pytest.raises(Conflict, match=f"pid {os.getpid()}"):
        await sweep.take(inventory, network, 1)
    with pytest.raises(Conflict, match=f"pid {os.getpid()}"):
        await sweep.remove_vm(inventory, network, 1)
    lease.unlock()  # as if we had died
    await sweep.remove_vm(inventory, network, 1)
    assert await network.list() == []
    with pytest.raises(NotFound, match="VM 1 does not exist on this host"):
        await sweep.remove_vm(inventory, network, 1)


async def test_processes_wait_for_each_other_at_the_same_leftover(inventory: Inventory, network: Network) -> None:
    with engine(inventory, 1, "running") as (child, _):
        child.kill()
        child.wait()
        results = await asyncio.gather(
            *(sweep.sweep(Inventory(state_dir=inventory.state_dir), network) for _ in range(4)),
            *(sweep.take(Inventory(state_dir=inventory.state_dir), network, 1) for _ in range(3)),
            return_exceptions=True,
        )
    assert sum(isinstance(r, Conflict) for r in results[4:]) == 2, results
    assert all(isinstance(r, sweep.SweepReport) and not r.failed for r in results[:4]), results
    assert await network.list() == []


async def test_cleanup_on_a_clean_host_does_nothing(inventory: Inventory, network: Network) -> None:
    before = await host_state()
    assert await sweep.cleanup(inventory, network) == sweep.CleanupReport()
    assert await host_state() == before


async def test_cleanup_removes_everything_of_swarm_and_nothing_else(inventory: Inventory, network: Network) -> None:
    await ip("netns", "add", "vm99")
    await ip("link", "add", "br7", "type", "bridge")
    await process.run(["nft", "add", "table", "inet", "swarmish"])
    foreign = await host_state()
    bystander = await asyncio.create_subprocess_exec("sleep", "600", stdin=subprocess.DEVNULL)
    try:
        with (
            engine(inventory, 1, "manual") as (manual, first),
            engine(inventory, 1000, "running") as (killed, second),
            engine(inventory, 1001, "networked") as (alive, _),
        ):
            manual.communicate()
            killed.kill()
            killed.wait()
            # A person's shell in a VM's namespace is not Swarm's.
            inside = await process.spawn(["sleep", "600"], output=inventory.state_dir / "log", netns="vm1")

            report = await sweep.cleanup(inventory, network)
            assert report.removed == ("VM 1 (started manually)", "VM 1000 (ticket 't1')") and not report.failed
            assert len(report.kept) == 2 and f"pid {alive.pid}" in report.kept[0] and "br0" in report.kept[1]
            assert [slot.n for slot in await network.list()] == [1001]
            assert not lives(first) and not lives(second) and lives(alive.pid) and lives(inside.pid)

            report = await sweep.cleanup(inventory, network, force=True)
            assert report.kept == report.failed == ()
            assert report.removed[0] == "VM 1001" and len(report.removed) == 4
            assert lives(alive.pid) and lives(bystander.pid) and lives(inside.pid)
            await process.kill(inside)
        assert await sweep.cleanup(inventory, network) == sweep.CleanupReport()
        assert inventory.numbers() == [] and await host_state() == foreign
    finally:
        await process.kill(bystander)
        await ip("netns", "del", "vm99")
        await ip("link", "del", "br7")
        await process.run(["nft", "delete", "table", "inet", "swarmish"])


async def test_cleanup_finds_vms_whose_directory_is_gone(inventory: Inventory, network: Network) -> None:
    elsewhere = Inventory(state_dir=inventory.state_dir / "elsewhere")
    with engine(elsewhere, 1, "manual") as (child, vmm):
        child.communicate()
        assert await sweep.sweep(inventory, network) == sweep.SweepReport()
        assert lives(vmm)  # it may be in use: a sweep looks only at directories
        report = await sweep.cleanup(inventory, network)
    assert not lives(vmm)
    assert report.removed[0].startswith("namespace vm1, which had no directory in ")


async def test_another_installs_vms_are_kept_while_they_are_used(inventory: Inventory, tmp_path: Path) -> None:
    """The namespace says which state directory it belongs to; the locks in there say if it is in use."""
    theirs = Inventory(state_dir=tmp_path / "theirs")
    elsewhere = Network(subnet=IPv4Network("10.0.0.0/16"), bridge="br0", owner=str(theirs.state_dir))
    ours = Network(subnet=IPv4Network("10.0.0.0/16"), bridge="br0", owner=str(inventory.state_dir))
    used, forgotten = theirs.reserve(7), theirs.reserve(8)
    for lease in (used, forgotten):
        await elsewhere.create(lease.n)
    forgotten.unlock()
    report = await sweep.cleanup(inventory, ours)
    assert report.removed == (f"VM 8 of {theirs.state_dir}",)
    assert report.kept[0].startswith(f"VM 7 of {theirs.state_dir}: ") and "in use" in report.kept[0]
    assert report.failed == ()
    assert ([slot.n for slot in await ours.list()], theirs.numbers(), inventory.numbers()) == ([7], [7], [])
    report = await sweep.cleanup(inventory, ours, force=True)
    assert f"VM 7 of {theirs.state_dir}" in report.removed
    assert (await ours.list(), theirs.numbers()) == ([], [])
    used.release()  # it has no effect any more
    assert (await sweep.cleanup(inventory, ours)).removed == ()


async def test_a_foreign_namespace_with_the_name_of_a_slot_stays(inventory: Inventory, network: Network) -> None:
    """Our engine died between reserving slot 99 and noticing that a foreign vm99 exists."""
    await ip("netns", "add", "vm99")
    try:
        with engine(inventory, 99, "reserved") as (child, _):
            child.kill()
            child.wait()
            assert [r.n for r in (await sweep.sweep(inventory, network)).removed] == [99]
        assert "vm99" in netns.names()
        assert not (await sweep.cleanup(inventory, network)).removed
        assert "vm99" in netns.names()
    finally:
        await ip("netns", "del", "vm99")


async def test_one_stuck_vm_does_not_stop_the_others(inventory: Inventory, network: Network) -> None:
    for n in (1, 2):
        inventory.reserve(n).unlock()
    await ip("netns", "add", "vm99")  # /run/netns exists now
    try:
        (netns.RUN / "vm1").mkdir()  # can't be unlinked as a file
        report = await sweep.sweep(inventory, network)
        assert [r.n for r in report.removed] == [2]
        assert report.failed[0].startswith("VM 1: can't remove the network of VM 1")
        (netns.RUN / "vm1").rmdir()
        assert [r.n for r in (await sweep.sweep(inventory, network)).removed] == [1]
    finally:
        await ip("netns", "del", "vm99")


async def test_without_a_network_only_process_and_files_go(inventory: Inventory) -> None:
    """The driver `process` has no network."""
    lease = inventory.reserve(1)
    child = await process.spawn(["sleep", "600"], output=lease.dir / "log")
    lease.record(VmRecord(n=1, kind=Kind.ATTEMPT, pid=child.pid, started=process.start_time(child.pid) or 0))
    lease.unlock()
    assert [r.n for r in (await sweep.sweep(inventory, None)).removed] == [1]
    await child.wait()
    assert inventory.numbers() == []


async def test_a_vm_without_a_network_leaves_the_network_alone(inventory: Inventory, network: Network) -> None:
    """A VM of the driver `process` has a number, but no namespace: the one with its name belongs to another VM."""
    await network.create(1)
    lease = inventory.reserve(1)
    lease.record(VmRecord(n=1, pid=1, driver="process"))
    lease.unlock()
    assert [r.n for r in (await sweep.sweep(inventory, network)).removed] == [1]
    assert [slot.n for slot in await network.list()] == [1]


async def test_cleanup_spares_what_an_engine_makes_meanwhile(
    inventory: Inventory, network: Network, settings: Settings
) -> None:
    """An engine takes a slot after the clean-up has looked at all directories, before it looks at the namespaces."""
    leases = []

    class Meanwhile(Network):
        async def list(self) -> list[Slot]:
            leases.append(inventory.reserve(1000))
            await network.create(1000)
            return await super().list()

    report = await sweep.cleanup(inventory, Meanwhile(subnet=settings.subnet, bridge=settings.bridge))
    assert [slot.n for slot in await network.list()] == [1000]
    assert not report.removed and not report.failed and len(report.kept) == 1
    leases[0].release()


async def test_what_a_killed_probe_boot_leaves_is_swept(inventory: Inventory) -> None:
    for name in ("probe-dead", "probe-alive", "probe-new"):
        (lease := inventory.state_dir / name).mkdir(parents=True)
        (lease / "work.ext4").touch()
        os.utime(lease, (1, 1) if name != "probe-new" else None)
    alive = os.open(inventory.state_dir / "probe-alive", os.O_RDONLY)
    try:
        fcntl.flock(alive, fcntl.LOCK_SH)
        await sweep.sweep(inventory, None)
        assert sorted(p.name for p in inventory.state_dir.glob("probe-*")) == ["probe-alive", "probe-new"]
    finally:
        os.close(alive)
