"""Removing VMs whose owner died, and (`swarm-cleanup`) everything of Swarm on this host.

There is no daemon for this: every command that starts a VM sweeps first. The inventory (locks and processes) decides
what is stale; marks in the kernel and the slot's directory decide what belongs to a VM; a name alone never does.
The order can be interrupted anywhere and started again: VMM, network, directory, lock file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from swarm.base import files, process
from swarm.base.log import logger
from swarm.errors import Conflict, NotFound, SwarmError
from swarm.vm.choose import PROBE_PREFIX
from swarm.vm.driver import TAP_NAME
from swarm.vm.drivers import cgroups, jailer
from swarm.vm.network import netns
from swarm.vm.network.network import Network, netns_of
from swarm.vm.slots.inventory import Busy, Inventory, Kind, SlotLease, VmRecord, read_record

log = logger(__name__)

_PROBE_LOCKED_SECONDS = 5.0  # a live probe boot locks its directory long before it is this old


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    n: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """``failed``: one sentence for each that could not be removed; the next sweep tries again."""

    removed: tuple[Removed, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupReport:
    """Lines for people. ``kept``: what live processes use, and the network that their VMs need."""

    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


async def take(
    inventory: Inventory, network: Network | None, n: int, *, replace: bool = True, timeout_seconds: float = 15.0
) -> SlotLease:
    """Reserve slot n for a new VM, and remove what is left in it: a dead owner's VM, or (``replace``) a manual one.

    Raises Conflict if a live process owns slot n.
    """
    lease = await _reserve(inventory, n, replace=replace, timeout_seconds=timeout_seconds)
    if lease.leftover:
        try:
            await clear(lease, network)
            lease.create_dir()
        except BaseException:
            lease.unlock()  # the directory stays, so the next one finds it
            raise
    return lease


async def remove_vm(inventory: Inventory, network: Network | None, n: int) -> None:
    """Remove VM n: a manual one, or a leftover. Raises NotFound, or Conflict if it is in use."""
    if n not in inventory.numbers():
        raise NotFound(f"VM {n} does not exist on this host; see `swarm vm list`")
    lease = await _reserve(inventory, n, replace=True)
    await _clear_and_release(lease, network)


async def sweep(inventory: Inventory, network: Network | None) -> SweepReport:
    """Remove what dead owners left, never a live owner's VM. One that can't be removed does not stop the others."""
    removed, failed = [], []
    for stale in inventory.stale():
        try:
            lease = inventory.reserve(stale.n)
        except Conflict:  # another process has taken it, or is removing it too
            continue
        if not lease.leftover:  # another process has removed it
            lease.release()
            continue
        log.info("removing a leftover", vm=stale.n, reason=stale.reason)
        try:
            await _clear_and_release(lease, network)
        except SwarmError as error:
            failed.append(f"VM {stale.n}: {error}")
        else:
            removed.append(Removed(n=stale.n, reason=stale.reason))
    await asyncio.to_thread(_remove_probes, inventory.state_dir)
    return SweepReport(removed=tuple(removed), failed=tuple(failed))


async def cleanup(inventory: Inventory, network: Network, *, force: bool = False) -> CleanupReport:
    """Remove everything of Swarm: manual VMs, leftovers, bridge, route, rules. Idempotent.

    What a live process owns is kept, and named. With ``force`` its VMs are killed as well; the process itself keeps
    running, and will find its VMs dead.
    """
    removed: list[str] = []
    kept: list[str] = []
    failed: list[str] = []

    async def remove(there: Inventory, n: int, name: str, description: str, *, spare: bool = False) -> None:
        try:
            try:
                lease = await _reserve(there, n, replace=True)
            except Conflict as conflict:
                if not (spare or force):
                    kept.append(f"{name}: {conflict}")
                if spare or not force:
                    return
                lease = await asyncio.to_thread(there.evict, n)
            await _clear_and_release(lease, network)
            removed.append(description)
        except SwarmError as error:
            failed.append(f"{name}: {error}")

    for n in inventory.numbers():
        await remove(inventory, n, f"VM {n}", _describe(n, read_record(inventory.dir(n))))
    # Namespaces with our mark but without a directory here: it was deleted manually, or it is in another installation's
    # state directory, whose locks then say if it is in use. Each is reserved first: an engine may have made it since
    # the loop above.
    for slot in await network.list():
        owner = Path(await network.owner(slot.n) or inventory.state_dir)
        theirs = owner.is_dir() and not (inventory.state_dir.is_dir() and owner.samefile(inventory.state_dir))
        if theirs:
            name = f"VM {slot.n} of {owner}"
            await remove(Inventory(state_dir=owner), slot.n, name, name)
        else:
            description = f"namespace {slot.netns}, which had no directory in {inventory.state_dir}"
            await remove(inventory, slot.n, slot.netns, description, spare=True)
    removed += await asyncio.to_thread(_remove_probes, inventory.state_dir)
    await asyncio.to_thread(cgroups.remove_parents)
    try:
        removed += await network.remove_host()
    except Conflict as conflict:
        kept.append(str(conflict))
    except SwarmError as error:
        failed.append(str(error))
    return CleanupReport(removed=tuple(removed), kept=tuple(kept), failed=tuple(failed))


async def clear(lease: SlotLease, network: Network | None) -> None:
    """Kill what runs in a slot that we hold, remove its network and its directory. Idempotent."""
    record = read_record(lease.dir)
    if record is not None and record.pid and record.boot_id == process.boot_id():
        await process.kill_stranger(record.pid, record.started)
    if network is not None and not (record is not None and record.driver and not record.netns):
        # If the owner was killed between starting its VMM and recording it, no record names the VMM.
        await _kill_vmms(netns_of(lease.n), lease.dir)
        await network.destroy(lease.n)
    await asyncio.to_thread(jailer.remove, lease.dir)
    await asyncio.to_thread(lease.remove_dir)


def _remove_probes(state_dir: Path) -> list[str]:
    """Remove what killed probe boots left: a live one holds a lock on its directory."""
    removed = []
    for directory in state_dir.glob(f"{PROBE_PREFIX}*"):
        with contextlib.suppress(OSError):  # another sweep was faster
            fd = files.try_lock(directory)
            if fd is None:
                continue
            try:
                if time.time() - os.fstat(fd).st_mtime < _PROBE_LOCKED_SECONDS:
                    continue
                for pid in _vmms_with_paths_in(directory):  # a benchmark's bare VMM: nothing else would end it
                    log.info("killing a VMM of a dead owner", pid=pid, directory=str(directory))
                    os.kill(pid, signal.SIGKILL)
                jailer.remove(directory)
                shutil.rmtree(directory)
                removed.append(f"files of a probe boot in {directory}")
            finally:
                os.close(fd)
    return removed


def _vmms_with_paths_in(directory: Path) -> list[int]:
    """The QEMUs that were started with paths in the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else [b""]
            if Path(os.fsdecode(words[0])).name.startswith("qemu-system-") and any(
                f"{directory}/".encode() in w for w in words
            ):
                found.append(int(entry.name))
    return found


async def _clear_and_release(lease: SlotLease, network: Network | None) -> None:
    try:
        await clear(lease, network)
        await asyncio.to_thread(lease.release)
    finally:
        lease.unlock()


async def _reserve(inventory: Inventory, n: int, *, replace: bool, timeout_seconds: float = 15.0) -> SlotLease:
    """`Inventory.reserve`, but wait while another process is removing a leftover there."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return inventory.reserve(n, replace=replace)
        except Busy:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)


async def _kill_vmms(name: str, directory: Path | None) -> None:
    """Kill the VMMs of our namespace ``name``: processes that have its tap open, or that run in it with paths in the
    VM's directory. Other processes in there (a person's shell) are not Swarm's, and stay.
    """
    for pid, started in await netns.in_thread(lambda: _vmms(name, directory)):
        log.info("killing a VMM that no record names", pid=pid, netns=name)
        await process.kill_stranger(pid, started)


def _vmms(name: str, directory: Path | None) -> list[tuple[int, int]]:
    space = netns.inode(name)
    if space is None or not netns.enter_ours(name):
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        pid = int(entry.name)
        with contextlib.suppress(OSError):  # it has ended meanwhile
            started = process.start_time(pid)
            if started is not None and (_holds_tap(pid, space) or _runs_in(entry, space, directory)):
                found.append((pid, started))
    return found


def _holds_tap(pid: int, space: tuple[int, int]) -> bool:
    """Does it have our tap open? The descriptor tells, whichever namespace the process itself is in."""
    for fd in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            # tun_chr_show_fdinfo, linux/drivers/net/tun.c
            if f"iff:\t{TAP_NAME}" in fd.read_text().splitlines() and netns.of_tap(pid, int(fd.name)) == space:
                return True
    return False


def _runs_in(entry: Path, space: tuple[int, int], directory: Path | None) -> bool:
    """Is it in the namespace, and was it started with paths in the VM's directory, or jailed there? (A VMM that opens
    its tap by name may not have done so yet.)"""
    status = (entry / "ns" / "net").stat()
    return (
        directory is not None
        and (status.st_dev, status.st_ino) == space
        and (f"{directory}/".encode() in (entry / "cmdline").read_bytes() or jailer.holds(directory, int(entry.name)))
    )


def _describe(n: int, record: VmRecord | None) -> str:
    if record is None:
        return f"VM {n} (half made)"
    of = f"ticket {record.ticket_id!r}" if record.ticket_id else ""
    if record.sandbox_id:
        of = f"sandbox {record.sandbox_id!r}"
    if record.kind is Kind.MANUAL:
        of = "started manually"
    return f"VM {n}" + (f" ({of})" if of else "")
