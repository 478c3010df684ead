"""`swarm install …`: programs that no distribution packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app

app = new_app("install", "Install programs that no distribution packages.")


@app.callback()
def group() -> None:
    """Makes `firecracker` a sub-command: without a callback, Typer would make a group's only command the group."""


@command(
    app,
    "firecracker",
    examples=[
        "swarm install firecracker",
        "swarm install firecracker --version 1.15.1 --from ./firecracker-v1.15.1-x86_64.tgz",
    ],
    json=True,
)
async def firecracker(
    cli: Cli,
    version: Annotated[
        str | None,
        typer.Option("--version", metavar="VERSION", help="The release. Default: the newest that Swarm knows."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Use this archive; don't download one.", dir_okay=False),
    ] = None,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Where to install the two programs.", file_okay=False)
    ] = Path("/usr/local/bin"),
) -> None:
    """Install Firecracker and its jailer from the official release, checked against digests in Swarm's source."""
    from swarm.app import manual_vm

    with cli.out.progress("firecracker") as progress:
        done = await manual_vm.install_firecracker(version, source, to, progress=progress)
    if cli.out.json:
        cli.out.dump(done)
    else:
        for path in done:
            cli.out.line(f"installed {path}")
