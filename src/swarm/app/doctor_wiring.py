"""`swarm doctor`: which checks run under given settings, and in which order. `swarm.doctor` has the checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.app import wiring
from swarm.config import Settings
from swarm.errors import HostError, LayerMissing, StoreError, SwarmError, UsageError

if TYPE_CHECKING:
    from swarm.doctor import Check
    from swarm.doctor.capacity import Capacity
    from swarm.store.store import Store


async def examine(settings: Settings) -> Sequence[Check]:
    """Every check of `swarm doctor`, in display order."""
    from swarm.doctor import home, host, vm_path
    from swarm.doctor.check import fail, ok

    places = {"state_dir": settings.state_dir, "images_dir": settings.images, "data_dir": settings.data_dir}
    checks = await host.examine(**places)
    checks.append(
        await home.attempt("subnet", "set SWARM_SUBNET, or `subnet` in swarm.toml", lambda: _subnet(settings))
    )
    checks.append(await home.attempt("image", "swarm image build", lambda: _image(settings)))
    checks.append(await home.attempt("VM driver", "see the cause", lambda: _driver(settings)))
    checks += await _database(settings)
    checks.append(await _models(settings))
    checks.append(_server(settings))
    if settings.share_address:
        fix = "set SWARM_SHARE_ADDRESS to a free port of an address of this host"
        checks.append(await home.attempt("files for other hosts", fix, lambda: _sharing(settings)))
    try:
        records = wiring.inventory(settings).records()
    except HostError as error:
        fix = f"look what stands in the way in {settings.state_dir}, or set SWARM_STATE_DIR to another directory"
        denied = isinstance(error.__cause__, PermissionError)
        return [*checks, fail("VMs", str(error), "run it as root: sudo swarm doctor" if denied else fix)]
    for record in records:
        if record.owner_alive and not record.pid:
            checks.append(ok(f"VM {record.n}", f"is being made, or kept ready, by process {record.owner_pid}"))
            continue
        if record.alive and not record.netns:
            checks.append(ok(f"VM {record.n}", f"process {record.pid}, by driver {record.driver}: without a network"))
            continue
        vm = vm_path.ExaminedVm(
            n=record.n,
            pid=record.pid,
            netns=record.netns,
            owner_pid=record.owner_pid,
            address=wiring.network(settings).address(record.n),
            console=wiring.inventory(settings).dir(record.n) / "console.log",
            how_it_ended="" if record.alive else "it ended, or was killed",
            token=_token(wiring.inventory(settings).dir(record.n)),
            manual=record.kind == "manual",
        )
        checks += await vm_path.examine(vm, bridge=settings.bridge, subnet=settings.subnet)
    return checks


async def examine_production(settings: Settings) -> Sequence[Check]:
    """Every check of `swarm doctor --production`."""
    from swarm.doctor import production
    from swarm.vm.drivers import firecracker

    try:
        jailer = await firecracker.version_of(firecracker.JAILER)
    except HostError:
        jailer = None
    return production.examine(jailed=settings.jailer, jailer=jailer, hole=firecracker.hole_in(jailer or "99.0.0"))


async def capacity(settings: Settings, *, memory_mb: int, disk_mb: int) -> Capacity:
    """How many VMs of this size fit on this host now. Starts one."""
    from swarm.doctor.capacity import measure
    from swarm.vm.driver import VmSpec

    await wiring.sweep(settings)
    spec = VmSpec(image=await wiring.images(settings).find(), memory_mb=memory_mb, disk_mb=disk_mb)
    return await measure(wiring.launcher(settings, await wiring.choice(settings)), wiring.inventory(settings), spec)


def _token(directory: Path) -> bytes | None:
    """agentd's token, for a manual VM; engines don't store the tokens of their VMs."""
    from swarm.vm.launcher import TOKEN_FILE

    try:
        return (directory / TOKEN_FILE).read_bytes()
    except OSError:
        return None


async def _subnet(settings: Settings) -> str:
    from swarm.vm.network import netns
    from swarm.vm.network.bridge import Bridge

    bridge = Bridge(subnet=settings.subnet, name=settings.bridge)
    await netns.in_thread(bridge.check_clashes)
    return f"{settings.subnet} on {settings.bridge} is free for VMs"


def _server(settings: Settings) -> Check:
    """That none runs is no fault: tickets don't need one."""
    from swarm.app import address
    from swarm.doctor.check import ok, warn

    found = address.running(settings)
    if found is None and address.hidden(settings):
        return warn("server", f"this user may not look into {settings.data_dir}", "run it as the user of `swarm serve`")
    how = "none runs: `swarm serve` starts one" if found is None else f"{found.url}, process {found.pid}"
    return ok("server", how)


async def _sharing(settings: Settings) -> str:
    from swarm.api import server
    from swarm.app import sharing

    try:
        with server.bind(*sharing.address(settings), choose="SWARM_SHARE_ADDRESS"):
            return f"{settings.share_address} is free: engines hand out images and layers there"
    except HostError:
        if not await sharing.answers(settings):
            raise
        return f"images and layers are handed out at {settings.share_address}"


async def _models(settings: Settings) -> Check:
    """A missing key is not a failure: only agents that call a model need one."""
    from swarm.doctor.check import fail, ok
    from swarm.gateway import policy

    try:
        async with wiring.store(settings) as opened:
            services, prices = wiring.services(settings, opened), wiring.prices(settings)
            try:
                [(upstream, _)] = (await services.of(policy.parse("gateway"))).values()
            except UsageError as missing:
                return ok("models", f"{missing}; until then agents that call a model fail at once")
            return ok("models", f"a key for {upstream.base_url}; prices as of {prices.date}")
    except StoreError as error:
        return fail("models", str(error), "see `database`")
    except SwarmError as error:
        return fail("models", str(error), "fix that file (docs/claude.md)")


async def _driver(settings: Settings) -> str:
    return (await wiring.choice(settings)).describe()


async def _image(settings: Settings) -> str:
    image = await wiring.images(settings).find()
    return f"{image.digest[:12]} in {image.dir}, every part as it was built"


async def _database(settings: Settings) -> list[Check]:
    from swarm.app import address
    from swarm.doctor import home
    from swarm.doctor.check import fail
    from swarm.store.sql.dialect import without_password
    from swarm.store.store import Store

    checks = []
    try:
        async with wiring.store(settings) as opened:
            checks += await home.database(without_password(settings.database), opened, Store.head(), settings.agents)
            if not any(check.status == "fail" for check in checks):  # else the tables may be missing
                checks += await _layers(settings, opened)
                checks.append(await _secrets(settings, opened))
    except SwarmError as error:
        fix = "run it as the user of `swarm serve`, or as root" if address.hidden(settings) else "swarm init"
        checks.append(fail("database", str(error), fix))
    if settings.database.startswith("sqlite:"):
        checks.append(home.registry(settings.registry_link, settings.data_dir / "swarm.db"))
    return checks


async def _secrets(settings: Settings, opened: Store) -> Check:
    from swarm.doctor import home

    async def opened_with_the_key() -> str:
        count = await wiring.vault(settings, opened).check()
        return f"{count}, which the key of this host opens" if count else "none is set"

    return await home.attempt("secrets", "copy data/secret.key from the host where they were set", opened_with_the_key)


async def _layers(settings: Settings, opened: Store) -> list[Check]:
    """Layers and imported images that registered agents need and that are not there, but for layers that nobody has
    asked for."""
    from swarm.admin.layers import on_request
    from swarm.doctor.check import ok, warn

    layered = [
        agent
        for agent in await opened.agents(broken=False)
        if agent.imported or (agent.needs_layer and not on_request(agent))
    ]
    checks = []
    for agent in layered:
        try:
            await wiring.layers(settings).find(agent, await wiring.image_source(settings).find(agent.image))
        except LayerMissing as error:
            checks.append(warn("layers", str(error), f"swarm agent build {agent.name}@{agent.version}"))
        except SwarmError as error:
            if not agent.imported:
                return []  # no image: another check reports that
            checks.append(warn("layers", f"{agent.name}@{agent.version}: {error}", f"swarm image import {agent.image}"))
    return checks or [
        ok("layers", f"those of {', '.join(agent.name for agent in layered)}" if layered else "none needed")
    ]
