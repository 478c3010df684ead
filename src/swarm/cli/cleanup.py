"""`swarm-cleanup`: nothing of Swarm's VMs stays on this host, and nothing of anybody else's is touched."""

from __future__ import annotations

from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app, start

app = new_app(
    "swarm-cleanup",
    "Remove every VM, namespace, tap, bridge and work file of Swarm's from this host.",
    many=False,
)


@command(
    app,
    examples=[
        "swarm-cleanup            # VMs that nobody runs any more, and those made by hand",
        "swarm-cleanup --force    # also those that a live engine is using",
    ],
    json=True,
)
async def cleanup(
    cli: Cli,
    force: Annotated[bool, typer.Option("--force", help="Also kill the VMs of engines that are alive.")] = False,
) -> int:
    """Remove every VM, namespace, tap, bridge and work file of Swarm's from this host.

    VMs that a live engine is using right now stay, and so does the bridge they hang on, unless --force is given.
    Safe to run twice, and on a clean host. Tickets, agents and images are not touched.
    """
    from swarm.app import manual_vm

    swept = await manual_vm.cleanup(cli.settings, force=force)
    status = 1 if swept.failed else 0
    if cli.out.json:
        cli.out.dump(swept)
        return status
    for line in swept.removed:
        cli.out.line(f"removed {line}")
    for line in swept.kept:
        cli.out.line(f"kept    {line}")
    for line in swept.failed:
        cli.out.line(f"failed  {line}")
    if not (swept.removed or swept.kept or swept.failed):
        cli.out.line("nothing to remove")
    return status


def run() -> None:
    start(app, "swarm-cleanup")


if __name__ == "__main__":
    run()
