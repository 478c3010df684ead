"""`swarm image …`: the guest image that VMs boot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui import render
from swarm.cli.ui.table import Column

app = new_app("image", "Build, list and remove guest images.")


@command(
    app,
    "build",
    examples=["swarm image build", 'swarm image build --kernel ./vmlinux --boot-args "nomodule"'],
    json=True,
)
async def build(
    cli: Cli,
    force: Annotated[bool, typer.Option("--force", help="Build it, even if it exists here or elsewhere.")] = False,
    kernel: Annotated[
        Path | None,
        typer.Option(
            "--kernel",
            metavar="FILE",
            help="Boot this kernel instead of the distribution's.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    boot_args: Annotated[
        str | None, typer.Option("--boot-args", metavar="ARGS", help="Arguments for that kernel's command line.")
    ] = None,
) -> None:
    """Fetch the guest image from another host, or build it from the distribution's packages, if it doesn't exist."""
    from swarm.app import oneoff, wiring

    keep = wiring.images_of_templates(cli.settings)
    async with oneoff.others(cli.settings) as others:
        images = wiring.images(cli.settings, others)
        with cli.out.progress("guest image") as progress:
            image = await images.build(force=force, kernel=kernel, boot_args=boot_args, keep=keep, progress=progress)
    cli.out.result(image, f"image {image.digest[:12]} in {image.dir}")


@command(app, "list", examples=["swarm image list", "swarm image list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List the images."""
    from swarm.app import wiring

    found = wiring.images(cli.settings).list()
    rows = [(i.digest, i.built_at, render.size(i.size_bytes), i.kernel_version) for i in found]
    columns = (
        Column("DIGEST", digest=True), Column("BUILT", drop=2), Column("SIZE", drop=1, right=True),
        Column("KERNEL", drop=3, least=8),
    )  # fmt: skip
    cli.out.listing(found, columns, rows, empty="no image: run `swarm image build`")


@command(app, "rm", examples=["swarm image rm 4be1b6c3a8d2"])
async def rm(
    cli: Cli,
    digest: Annotated[list[str], typer.Argument(metavar="DIGEST", help="Digests, or unique beginnings of them.")],
) -> None:
    """Remove images."""
    from swarm.app import wiring

    images = wiring.images(cli.settings)
    for prefix in digest:
        image = await images.find(prefix)
        images.remove(image.digest)
        await cli.record("image.remove", name=image.digest)
        cli.out.line(f"removed {image.digest[:12]}")
