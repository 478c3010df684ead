"""`swarm`: everything but running tickets, which `swarm-engine` does."""

from __future__ import annotations

from typing import Annotated

import typer

from swarm.cli import (
    agent,
    artifact,
    bench,
    cluster,
    cost,
    db,
    diff,  # noqa: F401  a command of `ticket`
    files,  # noqa: F401  commands of `ticket`
    host,
    image,
    in_sandbox,  # noqa: F401  commands of `sandbox`
    install,
    notice,
    prove,
    registry,
    running,
    sandbox,
    secret,
    serve,
    template,
    ticket,
    token,
    vm,
    workflow,
)
from swarm.cli.frame import Cli, command, new_app, start

app = new_app(
    "swarm",
    "Add tickets, agents and workflows, and see what came of them. `swarm-engine` runs the tickets, each in a microVM.",
    examples=[
        "swarm init",
        'swarm ticket add "Say hello" --agent echo --input name=world --id hello',
        "swarm-engine run-ticket hello --wait",
        "swarm ticket show hello",
        "swarm --version",
    ],
)
for group in (
    ticket.app,
    agent.app,
    workflow.app,
    sandbox.app,
    sandbox.snapshots,
    artifact.app,
    image.app,
    registry.app,
    template.app,
    vm.app,
    host.app,
    cluster.app,
    secret.app,
    token.app,
    notice.app,
    db.app,
    install.app,
):
    app.add_typer(group)


@command(app, examples=["swarm init", "swarm init --home ~/swarm --no-image"])
async def init(
    cli: Cli,
    image: Annotated[
        bool, typer.Option("--image/--no-image", help="Also build the guest image, if it doesn't exist.")
    ] = True,
    template: Annotated[
        bool,
        typer.Option("--template/--no-template", help="With the image, also make the template of the default VM."),
    ] = True,
) -> None:
    """Create or update a home: database, registry, built-in agents and workflows, guest image, template.

    Safe to repeat: what exists is kept."""
    from swarm.app import setup

    with cli.out.progress() as progress:
        done = await setup.init(cli.settings, image=image, template=template, progress=progress)
    for line in done:
        cli.out.line(line)


@command(
    app,
    examples=["swarm doctor", "swarm doctor --json", "swarm doctor --production", "swarm doctor --capacity"],
    json=True,
)
async def doctor(
    cli: Cli,
    production: Annotated[
        bool, typer.Option("--production", help="Only check whether this host isolates agents from each other.")
    ] = False,
    capacity: Annotated[
        bool, typer.Option("--capacity", help="Only show how many VMs fit on this host, and what limits them.")
    ] = False,
    memory: Annotated[
        int, typer.Option("--memory", min=128, max=1 << 20, metavar="MB", help="For --capacity: memory of each VM.")
    ] = 256,
    disk: Annotated[
        int, typer.Option("--disk", min=16, max=1 << 20, metavar="MB", help="For --capacity: size of each VM's disk.")
    ] = 2048,
) -> int:
    """Check this host, this home and every VM, and show how to fix each fault. Exit status 1 if a check fails."""
    from swarm.app import doctor_wiring
    from swarm.cli.ui.doctor_report import show, show_capacity

    if capacity:
        show_capacity(cli.out, await doctor_wiring.capacity(cli.settings, memory_mb=memory, disk_mb=disk))
        return 0
    checks = await (
        doctor_wiring.examine_production(cli.settings) if production else doctor_wiring.examine(cli.settings)
    )
    show(cli.out, checks)
    return 1 if any(check.status == "fail" for check in checks) else 0


prove.register(app)
cost.register(app)
bench.register(app)
serve.register(app)
token.register(app)
running.register(app)


def run() -> None:
    start(app, "swarm")


if __name__ == "__main__":
    run()
