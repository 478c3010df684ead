"""`swarm-cleanup`: remove everything that Swarm's VMs left on this host, and nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app, start

app = new_app(
    "swarm-cleanup",
    "Remove Swarm's VMs, namespaces, taps, bridge and work files from this host.",
    many=False,
)


@command(
    app,
    examples=[
        "swarm-cleanup            # all but VMs in use by an engine",
        "swarm-cleanup --force    # those too",
    ],
    json=True,
)
async def cleanup(
    cli: Cli,
    force: Annotated[bool, typer.Option("--force", help="Also kill VMs in use by a live engine.")] = False,
) -> int:
    """Remove Swarm's VMs, namespaces, taps, bridge and work files from this host.

    VMs in use by a live engine stay, and so does their bridge, unless --force is given. The address and the socket of a
    server that was killed go too. Safe to repeat, and on a clean host. Tickets, agents and images are not touched. Exit
    status 1 if something could not be removed.
    """
    from swarm.app import manual_vm

    swept = await manual_vm.cleanup(cli.settings, force=force)
    status = 1 if swept.failed else 0
    if cli.out.json:
        cli.out.dump(swept)
        return status
    for word in ("removed", "kept", "failed"):
        for line in getattr(swept, word):
            cli.out.line(f"{word:<7} {line}")
    if not (swept.removed or swept.kept or swept.failed):
        cli.out.line("nothing to remove")
    return status


def run() -> None:
    start(app, "swarm-cleanup")


if __name__ == "__main__":
    run()
