"""Reserved slots (directory and lock) with their networks, kept for the next VM when one has ended.

Making a slot's network takes 20 ms and removing it 30, nearly all of it in the kernel; resetting it takes 4. So an
engine keeps some. Number, directory, lock and namespace stay together: at every moment a directory with a record of its
owner points at whatever exists, so that a sweep finds it.

Returning a slot is immediate, since a result waits for it. It is reset in the background; the next taker waits for it.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass

from swarm.base.aio import finish_uninterrupted, quietly
from swarm.base.clock import iso
from swarm.base.log import logger
from swarm.errors import Conflict
from swarm.vm.driver import Slot
from swarm.vm.network.network import Network
from swarm.vm.slots.inventory import Inventory, SlotLease, VmRecord

log = logger(__name__)

_TRIES = 64  # numbers in a row that others may have taken


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSlot:
    """``slot`` is None if the driver's VMs have no network of their own."""

    lease: SlotLease
    slot: Slot | None


class SlotPool:
    """``keep``: how many free slots are kept when VMs end; 0 keeps none. ``first``: the lowest slot to take."""

    def __init__(self, *, inventory: Inventory, network: Network | None, first: int) -> None:
        self._inventory = inventory
        self._network = network
        self._first = first
        self._free: list[VmSlot] = []
        self._resetting: set[asyncio.Task[None]] = set()
        self.keep = 0

    @property
    def free(self) -> int:
        return len(self._free)

    async def take(self, undo: AsyncExitStack) -> VmSlot:
        """A slot that is new or was reset. ``undo`` gives it back; it must run after the VM's end. Raises Conflict,
        HostError."""

        async def take() -> VmSlot:
            while not self._free and self._resetting:
                await asyncio.wait(self._resetting, return_when=asyncio.FIRST_COMPLETED)
            vm_slot = self._free.pop() if self._free else await self._make()
            undo.push_async_callback(self._give_back, vm_slot)
            return vm_slot

        return await finish_uninterrupted(take())

    async def fill(self, count: int) -> None:
        """Make slots until ``count`` are free."""
        while len(self._free) < count:
            await finish_uninterrupted(self._fill_one())

    async def _fill_one(self) -> None:
        self._free.append(await self._make())

    async def close(self) -> None:
        """Remove the free slots, and from now on each that is given back."""
        self.keep = 0
        await finish_uninterrupted(self.idle())
        vm_slots, self._free = self._free, []
        await finish_uninterrupted(_all(*(self._remove(vm_slot) for vm_slot in vm_slots)))

    async def idle(self) -> None:
        """Return when no slot is being reset."""
        while self._resetting:
            await asyncio.wait(self._resetting)

    async def _make(self) -> VmSlot:
        """If the next number is taken in the kernel, but not in our inventory (by another installation, or a namespace
        with the same name), the one after it is tried."""
        first = self._first
        for _ in range(_TRIES):
            lease = await asyncio.to_thread(self._inventory.reserve_free, first)
            try:
                slot = await self._network.create(lease.n) if self._network is not None else None
            except Conflict as conflict:
                await asyncio.to_thread(lease.release)
                log.warning("a slot is taken by another installation", n=lease.n, reason=str(conflict))
                first, last = lease.n + 1, conflict
            except BaseException:
                await asyncio.to_thread(lease.release)
                raise
            else:
                return VmSlot(lease=lease, slot=slot)
        raise last

    async def _give_back(self, vm_slot: VmSlot) -> None:
        if len(self._free) + len(self._resetting) >= self.keep:
            await self._remove(vm_slot)
            return
        task = asyncio.create_task(self._reset(vm_slot), name=f"reset-slot-{vm_slot.lease.n}")
        self._resetting.add(task)
        task.add_done_callback(self._resetting.discard)

    async def _reset(self, vm_slot: VmSlot) -> None:
        try:
            await asyncio.to_thread(_empty, vm_slot.lease)
            if self._network is not None:
                await self._network.recycle(vm_slot.lease.n)
        except Exception as error:  # also "can't start new thread": a slot that nobody knows would stay reserved
            log.warning("a slot could not be reset", n=vm_slot.lease.n, reason=str(error))
            await quietly(self._remove(vm_slot))
        else:
            self._free.append(vm_slot)

    async def _remove(self, vm_slot: VmSlot) -> None:
        try:
            if self._network is not None:
                await self._network.destroy(vm_slot.lease.n)
        except BaseException:
            vm_slot.lease.unlock()  # its directory stays, so that a sweep finds what is left
            raise
        await asyncio.to_thread(vm_slot.lease.release)


def _empty(lease: SlotLease) -> None:
    """Remove what the last VM left in its directory. The record stays, but no longer names a VM."""
    lease.record(VmRecord(n=lease.n, created_at=iso()))
    for entry in lease.dir.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "vm.json":
            entry.unlink()


async def _all(*steps: object) -> None:
    await asyncio.gather(*(quietly(step) for step in steps))  # type: ignore[arg-type]
