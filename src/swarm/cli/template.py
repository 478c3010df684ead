"""`swarm template …`: booted, frozen VMs on disk, from which VMs are cloned. The first ticket builds one."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from swarm.base.clock import iso
from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui import render
from swarm.cli.ui.table import Column

_MODULE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"  # as in an agent's manifest
app = new_app("template", "Build, list and remove templates, from which VMs are cloned.")


@command(app, "list", examples=["swarm template list", "swarm template list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List the templates, most recently used first."""
    from swarm.app import wiring

    found = sorted(wiring.templates(cli.settings).all(), key=lambda t: -t.used_at)
    rows = [
        (
            t.key,
            t.driver,
            t.image,
            f"{t.vcpus} CPU, {t.memory_mb} MB, disk {t.disk_mb} MB",
            ",".join(t.preload) or None,
            render.size(t.size_bytes),
            iso(t.created_at * 1000),
            iso(t.used_at * 1000),
        )
        for t in found
    ]
    columns = (
        Column("KEY", digest=True), Column("DRIVER", drop=4), Column("IMAGE", drop=2, digest=True), "VM",
        Column("PRELOADED", drop=3, least=12), Column("SIZE", drop=6, right=True), Column("BUILT", drop=1),
        Column("USED", drop=5),
    )  # fmt: skip
    cli.out.listing(found, columns, rows, empty="no templates: the first ticket builds one, or `swarm template build`")


@command(
    app, "build", examples=["swarm template build", "swarm template build --memory 512 --preload json,ssl"], json=True
)
async def build(
    cli: Cli,
    memory: Annotated[
        int, typer.Option("--memory", min=128, max=1 << 20, metavar="MB", help="Memory of the VMs.")
    ] = 256,
    vcpus: Annotated[int, typer.Option("--vcpus", min=1, max=64, metavar="N", help="Virtual CPUs of the VMs.")] = 1,
    disk: Annotated[
        int, typer.Option("--disk", min=16, max=1 << 20, metavar="MB", help="Size of the VMs' disks.")
    ] = 2048,
    preload: Annotated[str, typer.Option("--preload", metavar="M,…", help="Python modules to import in advance.")] = "",
) -> None:
    """Build a template now, if it doesn't exist, so that the first ticket that needs it need not wait."""
    from swarm.app import setup, wiring
    from swarm.errors import HostError, UsageError
    from swarm.vm.driver import VmSpec

    modules = tuple(word.strip() for word in preload.split(",") if word.strip())
    if wrong := next((name for name in modules if not re.fullmatch(_MODULE, name)), None):
        raise UsageError(f"--preload takes names of Python modules, as in json,ssl, not {wrong!r}")
    await wiring.sweep(cli.settings)
    launcher = wiring.launcher(cli.settings, await wiring.choice(cli.settings))
    image = await setup.ensure_image(cli.settings)
    spec = VmSpec(image=image, vcpus=vcpus, memory_mb=memory, disk_mb=disk, preload=modules)
    template = await launcher.template(spec)
    if template is None:
        raise HostError("this host's driver makes no templates: each VM boots from the image")
    line = f"template {template.key[:12]} in {template.dir}"
    cli.out.result({"key": template.key, "dir": template.dir}, line)


@command(app, "rm", examples=["swarm template rm 4be1b6c3a8d2", "swarm template rm --unused 7"])
async def rm(
    cli: Cli,
    key: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="Keys, or unique beginnings of them.")] = None,
    unused: Annotated[
        float | None,
        typer.Option("--unused", min=0, metavar="DAYS", help="Also those from which no VM was cloned for this long."),
    ] = None,
) -> None:
    """Remove templates. VMs that were cloned from them keep running."""
    from swarm.app import wiring
    from swarm.errors import UsageError

    if not key and unused is None:
        raise UsageError("name the templates to remove (see `swarm template list`), or use --unused DAYS")
    templates = wiring.templates(cli.settings)

    async def say(removed: str) -> None:
        await cli.record("template.remove", name=removed)
        cli.out.line(f"removed {removed[:12]}")

    for prefix in key or ():  # printed one by one, in case a later one does not exist
        await say(await templates.remove(prefix))
    if unused is not None:
        for each in await templates.collect(unused_seconds=unused * 86400):
            await say(each)
