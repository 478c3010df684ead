"""Wiring of one-off runs: without a ticket, and with no engine that serves."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.app import wiring
from swarm.base.progress import Progress, silent
from swarm.config import Settings
from swarm.errors import Conflict, HostError, StoreError

if TYPE_CHECKING:
    from swarm.engine.egress import Egress
    from swarm.engine.engine import Engine
    from swarm.engine.oneoff import CommandVms
    from swarm.store.store import Store
    from swarm.vm.live import LiveVm


@asynccontextmanager
async def engine(settings: Settings, *, vm: bool) -> AsyncIterator[Engine]:
    """Runs an agent without a ticket. Without ``vm`` it runs as a plain process of this host, which needs no image and
    no root rights, and isolates nothing."""
    from swarm.engine.values import Values

    async with AsyncExitStack() as stack:
        host_egress = await stack.enter_async_context(_egress(settings))
        values = await stack.enter_async_context(Values())
        if vm:
            await stack.enter_async_context(leaving_no_network(settings))
            await wiring.sweep(settings)
            vms = wiring.launcher(settings, await wiring.choice(settings))
            yield wiring.engine(settings, vms, host_egress, values, files=None)
            return
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-"))
        own = settings.model_copy(update={"driver": "process", "state_dir": Path(scratch)})
        vms = wiring.launcher(own, await wiring.choice(own), clones=False)
        yield wiring.engine(own, vms, host_egress, values, files=None)


@asynccontextmanager
async def command_vms(settings: Settings, *, books: bool, progress: Progress = silent) -> AsyncIterator[CommandVms]:
    """VMs for commands. ``books``: they may need secrets or the gateway, and so the database."""
    from swarm.engine.oneoff import CommandVms

    async with _egress(settings, books=books) as host_egress, leaving_no_network(settings):
        await wiring.sweep(settings)
        yield CommandVms(
            launcher=wiring.launcher(settings, await wiring.choice(settings, progress)),
            images=wiring.image_source(settings),
            layers=wiring.layers(settings),
            egress=host_egress,
        )


@asynccontextmanager
async def leaving_no_network(settings: Settings) -> AsyncIterator[None]:
    """At its end the host's bridge, route and rules are gone, unless a VM uses them, of whichever owner. Who makes one
    at that moment makes them again: `Network.create`. ~0.1 s."""
    from swarm.base.aio import finish_uninterrupted
    from swarm.base.log import logger

    try:
        yield
    finally:
        if settings.driver != "process" and os.geteuid() == 0:
            try:
                await finish_uninterrupted(wiring.network(settings).remove_host())
            except Conflict:
                pass
            except HostError as error:  # the command has run, all the same
                logger(__name__).warning("the bridge stays: swarm-cleanup removes it", error=str(error))


def has_home(settings: Settings) -> bool:
    """Is there a database?"""
    return not settings.database.startswith("sqlite:") or (settings.data_dir / "swarm.db").exists()


@asynccontextmanager
async def others(settings: Settings) -> AsyncIterator[Store | None]:
    """The database, for what other hosts have. None without one, and while it can't be used: who builds an image or a
    layer needs none."""
    async with AsyncExitStack() as stack:
        opened = None
        with contextlib.suppress(StoreError):
            if has_home(settings):
                opened = await stack.enter_async_context(wiring.store(settings))
        yield opened


@asynccontextmanager
async def _egress(settings: Settings, *, books: bool = True) -> AsyncIterator[Egress]:
    """Secrets and bills are in the home's database. Who writes agents, or runs commands, may not have a home."""
    async with AsyncExitStack() as stack:
        opened = await stack.enter_async_context(wiring.store(settings)) if books and has_home(settings) else None
        yield await stack.enter_async_context(wiring.egress(settings, opened, one_off=True))


@asynccontextmanager
async def kept_vm(settings: Settings, snapshot_id: str, *, progress: Progress = silent) -> AsyncIterator[LiveVm]:
    """A copy of a VM that was kept, with nothing that it could reach, for the length of the block. Raises NotFound,
    ImageError, BootFailed, HostError."""
    from swarm.base.clock import Timeline
    from swarm.vm.launcher import Assignment

    found = await wiring.snapshots(settings).find(snapshot_id)
    await wiring.sweep(settings)
    vms = wiring.launcher(settings, await wiring.choice(settings, progress))
    async with leaving_no_network(settings), vms.restored(found, Assignment(), Timeline(), fork=True) as live:
        yield live
