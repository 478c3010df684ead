"""Which process owns which VM on this host: files and locks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swarm.base import process
from swarm.errors import Conflict, HostError, UsageError
from swarm.vm.slots.inventory import Busy, Inventory, Kind, VmRecord, read_record


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    return Inventory(state_dir=tmp_path / "state")


OWNER = """
import sys
from pathlib import Path
from swarm.vm.slots.inventory import Inventory
lease = Inventory(state_dir=Path(sys.argv[1])).reserve(int(sys.argv[2]))
print("holding", flush=True)
sys.stdin.read()
"""


@contextmanager
def owner(inventory: Inventory, n: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds slot n, until it is killed."""
    argv = [sys.executable, "-c", OWNER, str(inventory.state_dir), str(n)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "holding\n"
        try:
            yield child
        finally:
            child.kill()


@contextmanager
def vmm() -> Iterator[tuple[int, int]]:
    """Pid and start time of a process that stands for a VMM."""
    with subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        try:
            yield child.pid, process.start_time(child.pid) or 0
        finally:
            child.kill()


def test_a_slot_is_reserved_used_and_released(inventory: Inventory) -> None:
    lease = inventory.reserve(7)
    assert lease.dir == inventory.dir(7) and lease.dir.stat().st_mode & 0o777 == 0o700
    (intent,) = inventory.records()
    assert (intent.n, intent.kind, intent.pid, intent.owner_pid) == (7, Kind.ATTEMPT, 0, os.getpid())
    assert intent.owner_alive and not intent.alive and intent.created_at.endswith("Z")

    me = os.getpid(), process.start_time(os.getpid()) or 0
    lease.record(VmRecord(n=7, pid=me[0], started=me[1], driver="qemu", ticket_id="t'\"\n", attempt_id="a"))
    (record,) = inventory.records()
    assert record.alive and record.ticket_id == "t'\"\n"
    assert (record.owner_pid, record.boot_id, record.created_at) == (me[0], process.boot_id(), intent.created_at)

    assert inventory.stale() == []
    lease.release()
    lease.release()
    assert inventory.numbers() == [] and inventory.records() == []
    assert [p for p in inventory.state_dir.rglob("*") if not p.is_dir()] == []
    with pytest.raises(Conflict, match="or given back"):
        lease.record(VmRecord(n=7))


def test_only_one_holds_a_slot(inventory: Inventory) -> None:
    lease = inventory.reserve(7)
    with pytest.raises(Conflict, match=rf"VM 7 is in use by a Swarm command \(pid {os.getpid()}\)"):
        Inventory(state_dir=inventory.state_dir).reserve(7)
    lease.release()
    with owner(inventory, 7) as child:
        with pytest.raises(Conflict, match=f"pid {child.pid}"):
            inventory.reserve(7)
        assert list(inventory.held()) == [7] and inventory.stale() == []
        child.kill()
        child.wait()
        assert [s.reason for s in inventory.stale()] == [f"its owner (pid {child.pid}) ended"]
        inherited = inventory.reserve(7)
        assert inherited.leftover
        with pytest.raises(Conflict, match="clear it first"):
            inherited.record(VmRecord(n=7))
        inherited.release()


def test_a_stopped_owner_is_alive(inventory: Inventory) -> None:
    with owner(inventory, 7) as child:
        child.send_signal(signal.SIGSTOP)
        assert inventory.stale() == []
        with pytest.raises(Conflict):
            inventory.reserve(7)


def test_free_slots_skip_what_is_there(inventory: Inventory) -> None:
    with owner(inventory, 1000) as child:
        first, second = inventory.reserve_free(1000), inventory.reserve_free(1000)
        assert (first.n, second.n) == (1001, 1002)
        child.kill()
        child.wait()
        assert inventory.reserve_free(1000).n == 1003  # the leftover waits for a sweep
    first.release()
    assert inventory.reserve_free(1000).n == 1001
    for n in (0, -1, 65534):
        with pytest.raises(UsageError, match="from 1 to 65533"):
            inventory.reserve(n)
    inventory.reserve(65533)
    with pytest.raises(Conflict, match="no free slot"):
        inventory.reserve_free(65533)


def test_a_manual_vm_outlives_its_command(inventory: Inventory) -> None:
    lease = inventory.reserve(1)
    with pytest.raises(Conflict, match="no VMM process was recorded"):
        lease.detach()
    with vmm() as (pid, started):
        lease.record(VmRecord(n=1, pid=pid, started=started))
        assert lease.detach().kind is Kind.MANUAL
        assert inventory.stale() == [] and inventory.held() == {}
        lease.release()  # as a clean-up would: it has no effect, because the slot is no longer ours
        with pytest.raises(Conflict, match=rf"VM 1 was started manually \(pid {pid}\)"):
            inventory.reserve(1)
        replacing = inventory.reserve(1, replace=True)
        assert replacing.leftover
        replacing.unlock()
    assert [s.reason for s in inventory.stale()] == [f"its VMM (pid {pid}) ended"]
    assert inventory.reserve(1).leftover


def test_pids_mean_nothing_after_a_reboot(inventory: Inventory) -> None:
    lease = inventory.reserve(1)
    with vmm() as (pid, started):
        lease.record(VmRecord(n=1, pid=pid, started=started, boot_id="another"))
        lease.detach()
        assert not inventory.records()[0].alive
        assert len(inventory.stale()) == 1


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "null", '{"n": 3}', '{"kind": "other", "n": 3}', '{"kind": "attempt", "n": 3, "x": 1}'],
)
def test_a_torn_record_is_half_made(inventory: Inventory, text: str | None) -> None:
    inventory.reserve(3).unlock()
    file = inventory.dir(3) / "vm.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    assert read_record(inventory.dir(3)) is None
    assert [(s.n, s.reason) for s in inventory.stale()] == [(3, "half made: no readable vm.json")]


def test_a_lock_file_alone_is_litter(inventory: Inventory) -> None:
    inventory.reserve(3).unlock()
    for file in inventory.dir(3).iterdir():
        file.unlink()
    inventory.dir(3).rmdir()
    assert [(s.n, s.reason) for s in inventory.stale()] == [(3, "a lock file without an owner")]
    assert inventory.numbers() == []  # looking removed it


def test_eviction_takes_a_slot_from_a_live_owner(inventory: Inventory) -> None:
    old = inventory.reserve(5)
    (old.dir / "work.ext4").touch()
    new = inventory.evict(5)
    assert new.leftover
    new.remove_dir()
    new.create_dir()
    for write in (lambda: old.record(VmRecord(n=5)), old.detach):
        with pytest.raises(Conflict):
            write()
    old.release()
    assert new.dir.exists() and read_record(new.dir) is not None


def test_other_files_are_not_vms(inventory: Inventory) -> None:
    inventory.reserve(5).unlock()
    for name in ("0", "x", "007", "123456", "-1"):
        (inventory.state_dir / "vms" / name).mkdir()
    (inventory.state_dir / "locks" / "vmx.lock").touch()
    assert inventory.numbers() == [5]


async def test_many_tasks_share_the_slots(inventory: Inventory) -> None:
    leases = await asyncio.gather(*(asyncio.to_thread(inventory.reserve_free, 1000) for _ in range(40)))
    assert len({p.n for p in leases}) == 40
    await asyncio.gather(*(asyncio.to_thread(p.release) for p in leases))
    assert inventory.numbers() == []


@pytest.mark.needs("root", "netns")
def test_a_full_disk_leaves_no_half_made_slot(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(tmp_path)], check=True)
    try:
        inventory = Inventory(state_dir=tmp_path)
        inventory.reserve_free(1).release()
        with pytest.raises(OSError), (tmp_path / "fill").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        with pytest.raises(HostError, match="No space left"):
            inventory.reserve_free(1)
        assert inventory.numbers() == []
        (tmp_path / "fill").unlink()
        inventory.reserve_free(1).release()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_without_descriptors_no_slot_stays_taken(tmp_path: Path, left: int) -> None:
    inventory = Inventory(state_dir=tmp_path)
    inventory.reserve(1).release()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + left, limits[1]))
    try:
        with contextlib.suppress(HostError):  # where it fails depends on how many there are
            inventory.reserve(1).release()
            assert left > 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    inventory.reserve(1).release()  # it is free
    assert inventory.numbers() == []


RACE = """
import sys
from pathlib import Path
from swarm.vm.slots.inventory import Inventory
inventory = Inventory(state_dir=Path(sys.argv[1]))
sys.stdin.readline()
mine = []
for _ in range(30):
    lease = inventory.reserve_free(1)
    # Nobody else is in here: an exclusive file would exist already.
    (lease.dir / "mine").touch(exist_ok=False)
    mine.append(lease)
    if len(mine) == 3:
        mine.pop(0).release()
print(" ".join(str(p.n) for p in mine), flush=True)
sys.stdin.read()
"""


def test_many_processes_share_the_slots(inventory: Inventory) -> None:
    argv = [sys.executable, "-c", RACE, str(inventory.state_dir)]
    children = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        held = [n for child in children if child.stdout is not None for n in child.stdout.readline().split()]
        assert len(held) == len(set(held)) == 8
        assert sorted(inventory.held()) == sorted(map(int, held))
    finally:
        for child in children:
            child.communicate()
    assert len(inventory.stale()) == 8


def test_a_state_dir_that_cant_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"can't use .*/file/state \(SWARM_STATE_DIR\)"):
        Inventory(state_dir=tmp_path / "file" / "state").reserve(1)


def test_an_unfinished_reservation_is_not_taken_for_an_owner(inventory: Inventory) -> None:
    """Between another process's lock and its record there is nothing to read, for a moment."""
    lease = inventory.reserve(1)
    (lease.dir / "vm.json").unlink()
    with pytest.raises(Busy, match="try again"):
        inventory.reserve(1)
