"""`swarm artifact …`: the large values that steps of workflows left."""

from __future__ import annotations

from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app

app = new_app("artifact", "Artifacts, the large values that steps of workflows left: list, show.")


@command(app, "list", examples=["swarm artifact list", "swarm artifact list --ticket report-7 --json"], json=True)
async def list_(
    cli: Cli,
    ticket: Annotated[str | None, typer.Option("--ticket", metavar="ID", help="Those of one ticket.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most this many, the largest first.")] = 50,
) -> None:
    """List artifacts. They go when the last ticket that has them is deleted."""
    from swarm.app import wiring

    async with wiring.store(cli.settings) as store:
        if ticket is not None:
            await store.ticket(ticket)  # none of that id is another matter than none of its artifacts
        found = await store.artifacts(ticket_id=ticket, limit=limit)
    if cli.out.json:
        cli.out.dump(found)
        return
    rows = [(one.digest, one.bytes, one.tickets, one.created_at) for one in found]
    cli.out.table(("DIGEST", "BYTES", "TICKETS", "CREATED"), rows, empty="no artifacts")


@command(app, "show", examples=["swarm artifact show 481c37e5", "swarm artifact show 481c37e5 > value.json"])
async def show(
    cli: Cli,
    digest: Annotated[
        str, typer.Argument(metavar="DIGEST", help="Its digest, or the beginning of it.", show_default=False)
    ],
) -> None:
    """Print the value of an artifact, as JSON."""
    from swarm.app import wiring

    async with wiring.store(cli.settings) as store:
        text = await store.artifact(digest)
    cli.out.text(f"{text}\n")
