"""The queue, the engines, and the VMs of this host. Apart from `engines`, which needs nothing of VMs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from swarm.admin.engines import Engine, engines, settings_that_differ
from swarm.store.sql.rows import QueueStatus
from swarm.store.store import Store
from swarm.store.tickets.places import Elsewhere
from swarm.vm.slots.inventory import Inventory, VmRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """As `swarm-engine status --json` prints it. ``vms``: of this host, those that were started. ``elsewhere``: what
    hosts must have for which something waits. ``settings_differ``: see `settings_that_differ`."""

    queue: QueueStatus
    vms: list[VmRecord]
    engines: list[Engine]
    elsewhere: list[Elsewhere]
    settings_differ: list[str]


async def status(store: Store, inventory: Inventory) -> Status:
    queue, found = await store.queue(), await engines(store)
    vms = [vm for vm in await asyncio.to_thread(inventory.records) if vm.pid]
    return Status(
        queue=queue,
        vms=vms,
        engines=found,
        elsewhere=await store.elsewhere(),
        settings_differ=settings_that_differ(found),
    )
