"""SlotPool: slots with their networks, where another program may have taken a number, or a removal fails."""

from __future__ import annotations

import pytest

from swarm.app import wiring
from swarm.base.aio import undoing
from swarm.base.process import run
from swarm.config import Settings
from swarm.vm.driver import Slot
from swarm.vm.network.network import Network
from swarm.vm.slots.slot_pool import SlotPool

pytestmark = pytest.mark.needs("netns", "root")

FIRST = 4000


async def test_a_number_that_is_taken_is_skipped(settings: Settings) -> None:
    """Otherwise the lowest number would fail for ever, and no ticket would run on this host again."""
    vm_slots = SlotPool(inventory=wiring.inventory(settings), network=wiring.network(settings), first=FIRST)
    await run(["ip", "netns", "add", f"vm{FIRST}"])
    try:
        async with undoing() as undo:
            vm_slot = await vm_slots.take(undo)
            assert vm_slot.lease.n == FIRST + 1
        assert f"vm{FIRST}" in (await run(["ip", "netns", "list"])).stdout.decode().split()  # theirs is untouched
        assert wiring.inventory(settings).numbers() == []
    finally:
        await run(["ip", "netns", "delete", f"vm{FIRST}"])


async def test_a_free_slot_is_used_again_and_removed_at_the_end(settings: Settings) -> None:
    vm_slots = SlotPool(inventory=wiring.inventory(settings), network=wiring.network(settings), first=FIRST)
    vm_slots.keep = 1
    numbers = []
    for _ in range(3):
        async with undoing() as undo:
            vm_slot = await vm_slots.take(undo)
            (vm_slot.lease.dir / "left").write_text("by the last VM")
            numbers.append(vm_slot.lease.n)
        await vm_slots.idle()
        assert vm_slots.free == 1
        assert [entry.name for entry in vm_slot.lease.dir.iterdir()] == ["vm.json"]
    assert numbers == [FIRST] * 3
    await vm_slots.close()
    assert wiring.inventory(settings).numbers() == []
    assert await wiring.network(settings).list() == []


class Exhausted(Network):
    """On a host that has no more threads just when a slot is reset."""

    async def recycle(self, n: int) -> Slot:
        raise RuntimeError("can't start new thread")


async def test_a_slot_that_can_not_be_reset_is_removed_whatever_the_reason(settings: Settings) -> None:
    """Otherwise it is in no list any more: an orderly stop would leave it reserved, by an owner that is dead."""
    network = Exhausted(subnet=settings.subnet, bridge=settings.bridge)
    vm_slots = SlotPool(inventory=wiring.inventory(settings), network=network, first=FIRST)
    vm_slots.keep = 2
    async with undoing() as undo:
        await vm_slots.take(undo)
        await vm_slots.take(undo)
    await vm_slots.close()
    assert wiring.inventory(settings).numbers() == []
    assert await wiring.network(settings).list() == []
