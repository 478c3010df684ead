"""`swarm template …`: booted, frozen VMs on disk, from which VMs are cloned. The first ticket builds one."""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui import render

_MODULE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"  # as in an agent's manifest
app = new_app("template", "Build, list and remove templates, from which VMs are cloned.")


@command(app, "list", examples=["swarm template list", "swarm template list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List the templates, most recently used first."""
    from swarm.app import wiring

    found = sorted(wiring.templates(cli.settings).all(), key=lambda t: -t.used_at)
    now = time.time()
    rows = [
        (
            t.key[:12],
            t.driver,
            t.image[:12],
            f"{t.vcpus} CPU, {t.memory_mb} MB, disk {t.disk_mb} MB",
            ",".join(t.preload) or None,
            render.size(t.size_bytes),
            _ago(now - t.created_at),
            _ago(now - t.used_at),
        )
        for t in found
    ]
    columns = ("KEY", "DRIVER", "IMAGE", "VM", "PRELOADED", "SIZE", "BUILT", "USED")
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
    for prefix in key or ():  # printed one by one, in case a later one does not exist
        cli.out.line(f"removed {(await templates.remove(prefix))[:12]}")
    if unused is not None:
        for each in await templates.collect(unused_seconds=unused * 86400):
            cli.out.line(f"removed {each[:12]}")


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"
