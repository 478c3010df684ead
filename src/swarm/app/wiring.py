"""Wiring: the concrete classes that make up Swarm under given settings. The only place that names them.

Command line, API and benchmarks get their store, engine and launcher here; nothing else constructs them. Heavy modules
are imported by the function that needs them, so that `swarm ticket list` doesn't load a VMM driver.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.base import cgroup
from swarm.base.progress import Progress, silent
from swarm.config import Settings
from swarm.errors import HostError, ImageError, NotFound

if TYPE_CHECKING:
    from swarm.admin.fetching import OtherHosts
    from swarm.admin.vault import Vault
    from swarm.engine.dispatch import Dispatcher
    from swarm.engine.egress import Egress
    from swarm.engine.engine import Engine
    from swarm.engine.sandboxes import Sandboxes
    from swarm.engine.values import Values
    from swarm.engine.worker import Ended, Worker
    from swarm.gateway.prices import Prices
    from swarm.gateway.process import GatewayProcess
    from swarm.gateway.upstreams import Services, Upstream
    from swarm.store.store import Store
    from swarm.vm.choose import Choice
    from swarm.vm.drivers.process import NoImages
    from swarm.vm.image.image import Images
    from swarm.vm.image.layer import HostLayers, Layers
    from swarm.vm.image.oci.store import Imported
    from swarm.vm.launcher import Launcher
    from swarm.vm.network.network import Network
    from swarm.vm.pool import Pool
    from swarm.vm.slots.inventory import Inventory
    from swarm.vm.slots.ssh import SshDir
    from swarm.vm.snapshots import Snapshots
    from swarm.vm.template import Templates

# --- parts ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def store(settings: Settings) -> AsyncIterator[Store]:
    from swarm.base import host
    from swarm.store.store import Store

    async with Store.open(
        settings.database, busy_timeout_seconds=settings.busy_timeout_seconds, over_budget=settings.over_budget,
        host_timeout_seconds=settings.host_timeout_seconds, host_id=host.host_id(settings.state_dir),
    ) as opened:  # fmt: skip
        yield opened


def images(settings: Settings, others: Store | None = None) -> Images:
    """``others``, here and below: the database, for what this host lacks and others have."""
    from swarm.vm.image.image import Images

    return Images(
        dir=settings.images, cache=_cache() / "base", default=settings.image, others=_elsewhere(others),
        imported=imported(settings, others),
    )  # fmt: skip


def imported(settings: Settings, others: Store | None = None) -> Imported:
    """OCI images: what agents that name one see as their root."""
    from swarm.vm.image.oci.store import Imported

    return Imported(dir=settings.images / "oci", others=_elsewhere(others))


def image_source(settings: Settings, others: Store | None = None) -> Images | NoImages:
    """Where an engine gets its images; the `process` driver needs none."""
    from swarm.vm.drivers.process import NoImages

    return NoImages() if settings.driver == "process" else images(settings, others)


def layers(settings: Settings, others: Store | None = None) -> Layers | HostLayers:
    from swarm.vm.image.layer import HostLayers

    return HostLayers(dir=_cache() / "modules") if settings.driver == "process" else guest_layers(settings, others)


def guest_layers(settings: Settings, others: Store | None = None) -> Layers:
    from swarm.vm.image.layer import Layers

    return Layers(dir=settings.layers, others=_elsewhere(others), imported=imported(settings, others))


def _elsewhere(others: Store | None) -> OtherHosts | None:
    from swarm.admin.fetching import OtherHosts

    return OtherHosts(others) if others is not None else None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm"


def network(settings: Settings) -> Network:
    from swarm.vm.network.network import Network

    return Network(subnet=settings.subnet, bridge=settings.bridge, owner=str(settings.state_dir.absolute()))


def inventory(settings: Settings) -> Inventory:
    from swarm.vm.slots.inventory import Inventory

    return Inventory(state_dir=settings.state_dir)


def ssh_dir(settings: Settings) -> SshDir:
    """Shared by all homes of this host, like the addresses."""
    from swarm.vm.slots.ssh import SshDir

    return SshDir(settings.state_dir / "ssh")


def default_max_vms() -> int:
    """Two for each CPU that this process may use."""
    return max(1, int(2 * cgroup.cpus()))


def default_max_sandboxes() -> int:
    """Most of them do nothing most of the time."""
    return max(1, int(16 * cgroup.cpus()))


async def choice(settings: Settings, progress: Progress = silent, others: Store | None = None) -> Choice:
    """The driver that the settings name, or for `auto` the best one that works on this host. Raises HostError.

    To find out what works, the image is booted once (some seconds). The result is kept until host, VMM or image change.
    """
    from swarm.vm.choose import Choice, choose
    from swarm.vm.driver import Driver
    from swarm.vm.drivers.firecracker import FirecrackerDriver
    from swarm.vm.drivers.process import ProcessDriver
    from swarm.vm.drivers.qemu import QemuDriver
    from swarm.vm.network import lacks

    if settings.driver == "process":
        process = ProcessDriver()
        return Choice(driver=process, probe=await process.probe())
    lacks.check()  # before anything is booted: a probe boot has no network, and its failure would be kept
    disks = settings.state_dir / "blank"
    firecracker = FirecrackerDriver(
        disk_cache=disks, jailed=settings.jailer, holes_allowed=settings.firecracker_holes_allowed
    )
    if settings.driver == "firecracker":
        # Named in the settings, so no probe boot: the first VM shows whether guests run.
        probe = await firecracker.probe()
        if not probe.usable:
            raise HostError(f"Firecracker can't be used: {probe.reason}; or set SWARM_DRIVER to auto or qemu")
        return Choice(driver=firecracker, probe=probe)
    candidates: list[Driver] = [QemuDriver(accelerator=name, disk_cache=disks) for name in ("kvm", "tcg")]
    if settings.driver == "auto":
        candidates.insert(0, firecracker)
    return await choose(
        candidates,
        await images(settings, others).find(),
        state_dir=settings.state_dir,
        cache=settings.images / ".probes",
        timeout_seconds=settings.boot_timeout_seconds,
        progress=progress,
    )


def launcher(settings: Settings, chosen: Choice, *, clones: bool = True) -> Launcher:
    """Starts VMs with the chosen driver; without ``clones`` each boots from its image."""
    from swarm.vm.launcher import Launcher

    return Launcher(
        choice=chosen,
        network=network(settings),
        inventory=inventory(settings),
        templates=templates(settings) if clones else None,
        ssh_dir=ssh_dir(settings),
        first_slot=settings.first_engine_slot,
        boot_timeout_seconds=settings.boot_timeout_seconds,
    )


def engine(settings: Settings, vms: Launcher, host_egress: Egress, values: Values, *, files: Store | None) -> Engine:
    """Runs one attempt in a VM of this launcher. ``files``: of tickets, whose agents are registered; None: agents from
    anywhere, for one-off runs."""
    from swarm.agents import Installed
    from swarm.engine.engine import Engine, Limits
    from swarm.engine.kept import Keeper

    return Engine(
        launcher=vms,
        images=image_source(settings, files),
        layers=layers(settings, files),
        limits=Limits(output_json_bytes=settings.max_output_mb << 20),
        egress=host_egress,
        values=values,
        installed=Installed(settings.agents, files) if files is not None else None,
        files=files,
        keeper=Keeper(launcher=vms, snapshots=snapshots(settings), rows=files, host=files.here) if files else None,
    )


def images_of_templates(settings: Settings) -> set[str]:
    """Digests of the images that templates and snapshots were made from. Their clones still read them."""
    return {template.image for template in templates(settings).all()} | snapshots(settings).images()


def templates(settings: Settings) -> Templates:
    from swarm.vm.template import Templates

    return Templates(dir=settings.templates)


def snapshots(settings: Settings) -> Snapshots:
    """VMs on this host's disk: paused sandboxes, and kept VMs of tickets."""
    from swarm.vm.snapshots import Snapshots

    limit = None if settings.snapshots_gb is None else int(settings.snapshots_gb * 1e9)
    own, layers, share = settings.database, guest_layers(settings), settings.project_share
    return Snapshots(
        dir=settings.snapshots, limit_bytes=limit, project_share=share, images=images(settings), layers=layers,
        owner=own,
    )  # fmt: skip


def services(settings: Settings, opened: Store | None) -> Services:
    """Without a store, no keys are read from Swarm's secrets."""
    from swarm.gateway.upstreams import Services, UpstreamKeys

    keys = UpstreamKeys(secret=None if opened is None else vault(settings, opened).get)
    return Services(upstreams=upstreams(settings), keys=keys)


def prices(settings: Settings) -> Prices:
    from swarm.gateway.prices import load

    return load(_own_file(settings.prices, settings.home / "prices.toml"))


def gateway(settings: Settings, opened: Store | None) -> GatewayProcess:
    """Without a store, no calls are booked."""
    from swarm.gateway.process import GatewayProcess
    from swarm.ledger import Limit, Unbooked

    return GatewayProcess(
        ledger=opened if opened is not None else Unbooked(),
        prices=prices(settings),
        day=Limit(usd=settings.budget_usd_per_day, tokens=settings.budget_tokens_per_day),
        within=settings.egress_private,
        never=(settings.subnet,),
    )


def egress(settings: Settings, opened: Store | None, *, one_off: bool = False) -> Egress:
    """What attempts may reach beyond their VMs: `async with` it. ``one_off``: attempts without a ticket."""
    from swarm.engine.egress import Egress

    return Egress(
        services=lambda: services(settings, opened),
        gateway=lambda: gateway(settings, opened),
        secrets=None if opened is None else vault(settings, opened),
        one_off=one_off,
    )


def vault(settings: Settings, opened: Store) -> Vault:
    from swarm.admin.vault import Vault

    def gateway_keys() -> dict[str, str]:
        return {service.key: name for name, service in upstreams(settings).items()}

    return Vault(opened, key_file=settings.data_dir / "secret.key", gateway_keys=gateway_keys)


def upstreams(settings: Settings) -> dict[str, Upstream]:
    from swarm.gateway.upstreams import load

    return load(_own_file(settings.upstreams, settings.home / "upstreams.toml"), os.environ)


def _own_file(named: Path | None, usual: Path) -> Path | None:
    """The user's own file: the one that the settings name, which must exist, or the usual one if it exists."""
    return named or (usual if usual.exists() else None)


async def sweep(settings: Settings) -> None:
    """Remove the VMs of dead owners. There is no daemon for this: each command that starts VMs does it."""
    from swarm.vm.slots.sweep import sweep

    # With any driver: the VMs may have been started with another one.
    await sweep(inventory(settings), network(settings) if os.geteuid() == 0 else None)


# --- running tickets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vms:
    """What makes VMs here, and what they may reach."""

    launcher: Launcher
    egress: Egress
    values: Values
    pool: Pool | None


@asynccontextmanager
async def _vms(
    settings: Settings, opened: Store, chosen: Choice, *, warm: int | None, slots: int, ahead: int
) -> AsyncIterator[_Vms]:
    """Leftovers of dead engines are removed first."""
    from swarm.app import warm_pool
    from swarm.base.log import logger
    from swarm.engine.values import Values
    from swarm.schema import validator  # noqa: F401  loaded now, not while the first ticket's outputs wait for it

    log = logger(__name__)
    await sweep(settings)
    await opened.bury_dead_workers()
    vms = launcher(settings, chosen)
    source = image_source(settings)
    async with AsyncExitStack() as stack:
        with contextlib.suppress(HostError, ImageError, NotFound):  # the first ticket reports it
            stack.enter_context(source.used(await source.find()))
        host_egress = await stack.enter_async_context(egress(settings, opened))
        values = await stack.enter_async_context(Values())
        await stack.enter_async_context(vms.keeping(slots, ahead=ahead))
        pool = await warm_pool.pool(settings, vms, warm) if warm != 0 and vms.choice.probe.snapshots else None
        if pool is not None:
            await stack.enter_async_context(pool)
        elif warm != 0:
            log.warning("--warm changes nothing: this driver makes no clones", driver=vms.choice.driver.name)
        yield _Vms(launcher=vms, egress=host_egress, values=values, pool=pool)


@asynccontextmanager
async def worker(
    settings: Settings,
    opened: Store,
    *,
    warm: int | None = 0,
    slots: int = 1,
    ahead: int = 0,
    progress: Progress = silent,
) -> AsyncIterator[Worker]:
    """A worker on this host, with a unique name. Leftovers of dead workers are removed first.

    ``warm``: how many VMs to keep ready of each template in use; None follows the demand. ``slots``: how many network
    slots to keep free; ``ahead`` of them are made at the start.
    """
    from swarm.app import this_host

    chosen = await choice(settings, progress, opened)
    async with _vms(settings, opened, chosen, warm=warm, slots=slots, ahead=ahead) as parts:
        await opened.this_host()
        opened.labels = this_host.labels(settings, parts.launcher.choice.probe)
        yield _worker(settings, opened, parts)


def _worker(settings: Settings, opened: Store, parts: _Vms) -> Worker:
    from swarm.engine.worker import Worker

    pool = parts.pool
    return Worker(
        store=opened,
        engine=engine(settings, parts.launcher, parts.egress, parts.values, files=opened),
        name=f"{opened.here}:{os.getpid()}:{secrets.token_hex(4)}",
        lease_seconds=settings.lease_seconds,
        queue_timeout_seconds=settings.queue_timeout_seconds,
        kept_ready=lambda: 0 if pool is None else sum(len(one.ready) for one in pool.inspect()),
        driver=parts.launcher.choice.driver.name,
    )


def _sandboxes(settings: Settings, opened: Store, parts: _Vms, ours: Worker, *, most: int) -> Sandboxes:
    from swarm.agents import Installed
    from swarm.engine.machines import Machines
    from swarm.engine.sandboxes import Sandboxes

    machines = Machines(
        launcher=parts.launcher,
        snapshots=snapshots(settings),
        images=image_source(settings, opened),
        layers=layers(settings, opened),
        egress=parts.egress,
        installed=Installed(settings.agents, opened),
        at_once=default_max_vms(),
        host=opened.here,
    )
    return Sandboxes(
        store=opened, worker=ours.name, machines=machines, lease_seconds=settings.lease_seconds, most=most,
        emit=ours.emit, project_share=settings.project_share,
    )  # fmt: skip


@asynccontextmanager
async def dispatcher(
    settings: Settings,
    opened: Store,
    *,
    max_vms: int,
    grace_seconds: float,
    max_sandboxes: int = 0,
    ended: Callable[[Ended], None] = lambda _: None,
    warm: int | None = 0,
) -> AsyncIterator[Dispatcher]:
    """Serves tickets on this host, once it is `run`, and holds up to ``max_sandboxes`` sandboxes. ``warm``: see
    `worker`."""
    from swarm.app import sharing, this_host
    from swarm.base import process
    from swarm.engine import live
    from swarm.engine.dispatch import Dispatcher
    from swarm.engine.room import Disk
    from swarm.triggers.schedules import Scheduler
    from swarm.vm.drivers.disk import WORK_DISK, used_bytes

    def used(n: int) -> int:
        return used_bytes(inventory(settings).dir(n) / WORK_DISK)

    async with AsyncExitStack() as stack:
        chosen = await choice(settings, others=opened)
        opened.labels = this_host.labels(settings, chosen.probe)
        memory = await this_host.register(settings, opened, max_vms=max_vms, max_sandboxes=max_sandboxes)
        await stack.enter_async_context(sharing.sharing(settings, opened))
        vm_parts = _vms(settings, opened, chosen, warm=warm, slots=max_vms, ahead=min(2, max_vms))
        parts = await stack.enter_async_context(vm_parts)
        wake = await stack.enter_async_context(opened.watching(events=False))
        ours = _worker(settings, opened, parts)
        sandboxes = _sandboxes(settings, opened, parts, ours, most=max_sandboxes)
        started, agreed = process.start_time(os.getpid()), this_host.agreed(settings)
        info = {"driver": ours.driver, "started": started, "machine": process.machine(), "settings": agreed}
        if max_sandboxes:
            info["live"] = str(await stack.enter_async_context(live.serving(sandboxes, settings.state_dir / "live")))
        yield Dispatcher(
            store=opened, worker=ours, wake=wake, max_vms=max_vms, memory=memory, grace_seconds=grace_seconds,
            disk=Disk(dir=settings.state_dir, used_bytes=None if settings.driver == "process" else used),
            scheduler=Scheduler(store=opened, evaluator=opened.jail), sandboxes=sandboxes, info=info, ended=ended,
            inputs_fault=parts.values.fault,
        )  # fmt: skip
