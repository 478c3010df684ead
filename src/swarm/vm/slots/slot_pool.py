"""Places for VMs: a reserved slot (its directory and lock) with its network, kept for the next VM when one has ended.

Making a slot's network takes 20 ms and removing it 30, nearly all of it in the kernel; making it as good as new takes
4. So whoever runs many VMs keeps some. Number, directory, lock and namespace go together and stay together: at every
moment a directory with a record of its owner points at whatever there is, and a sweep finds it.

Who gives a seat back does not wait until it is as good as new (his VM is dead, and somebody waits for his result); who
needs one does.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from swarm.base.aio import finish_uninterrupted, quietly
from swarm.errors import Conflict, SwarmError
from swarm.vm.driver import Slot
from swarm.vm.network.network import Network
from swarm.vm.slots.inventory import Inventory, SlotLease, VmRecord

log = structlog.get_logger(__name__)

_TRIES = 64  # numbers that others may have taken in a row


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSlot:
    """``slot`` is None for a driver whose VMs have no network of their own."""

    lease: SlotLease
    slot: Slot | None


class SlotPool:
    """``keep``: how many free seats stay when VMs end; 0 removes each at once. ``first``: the lowest slot to take."""

    def __init__(self, *, inventory: Inventory, network: Network | None, first: int) -> None:
        self._inventory = inventory
        self._network = network
        self._first = first
        self._free: list[VmSlot] = []
        self._renewing: set[asyncio.Task[None]] = set()
        self.keep = 0

    @property
    def free(self) -> int:
        return len(self._free)

    async def take(self, undo: AsyncExitStack) -> VmSlot:
        """A seat that nobody has used since it was made or made new. ``undo`` gives it back; it must run after the VM's
        death. Raises Conflict, HostError."""

        async def take() -> VmSlot:
            while not self._free and self._renewing:
                await asyncio.wait(self._renewing, return_when=asyncio.FIRST_COMPLETED)
            vm_slot = self._free.pop() if self._free else await self._make()
            undo.push_async_callback(self._give_back, vm_slot)
            return vm_slot

        return await finish_uninterrupted(take())

    async def fill(self, count: int) -> None:
        """Make free seats ahead, so that there are ``count``."""
        while len(self._free) < count:
            await finish_uninterrupted(self._fill_one())

    async def _fill_one(self) -> None:
        self._free.append(await self._make())

    async def close(self) -> None:
        """Remove the free ones, and from now on each that is given back."""
        self.keep = 0
        await finish_uninterrupted(self.idle())
        vm_slots, self._free = self._free, []
        await finish_uninterrupted(_all(*(self._remove(vm_slot) for vm_slot in vm_slots)))

    async def idle(self) -> None:
        """Return when none is being made as good as new."""
        while self._renewing:
            await asyncio.wait(self._renewing)

    async def _make(self) -> VmSlot:
        """The next number may be taken in the kernel by somebody whom our inventory does not know: another install, or
        a namespace that only has the name. Then the one after it."""
        first = self._first
        for _ in range(_TRIES):
            lease = await asyncio.to_thread(self._inventory.reserve_free, first)
            try:
                slot = await self._network.create(lease.n) if self._network is not None else None
            except Conflict as conflict:
                await asyncio.to_thread(lease.release)
                log.warning("a slot is taken by somebody else", n=lease.n, reason=str(conflict))
                first, last = lease.n + 1, conflict
            except BaseException:
                await asyncio.to_thread(lease.release)
                raise
            else:
                return VmSlot(lease=lease, slot=slot)
        raise last

    async def _give_back(self, vm_slot: VmSlot) -> None:
        if len(self._free) + len(self._renewing) >= self.keep:
            await self._remove(vm_slot)
            return
        task = asyncio.create_task(self._renew(vm_slot), name=f"renew-slot-{vm_slot.lease.n}")
        self._renewing.add(task)
        task.add_done_callback(self._renewing.discard)

    async def _renew(self, vm_slot: VmSlot) -> None:
        try:
            await asyncio.to_thread(_empty, vm_slot.lease)
            if self._network is not None:
                await self._network.recycle(vm_slot.lease.n)
        except (SwarmError, OSError) as error:
            log.warning("a slot is made anew", n=vm_slot.lease.n, reason=str(error))
            await quietly(self._remove(vm_slot))
        else:
            self._free.append(vm_slot)

    async def _remove(self, vm_slot: VmSlot) -> None:
        try:
            if self._network is not None:
                await self._network.destroy(vm_slot.lease.n)
        except BaseException:
            vm_slot.lease.unlock()  # its directory stays, and with it a sweep's way to what is left
            raise
        await asyncio.to_thread(vm_slot.lease.release)


def _empty(lease: SlotLease) -> None:
    """Remove what the last VM left in its directory; the record stays, and names no VM any more."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    lease.record(VmRecord(n=lease.n, created_at=now))
    for entry in lease.dir.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "vm.json":
            entry.unlink()


async def _all(*steps: object) -> None:
    await asyncio.gather(*(quietly(step) for step in steps))  # type: ignore[arg-type]
