"""`swarm artifact …`: large values that workflow steps produced."""

from __future__ import annotations

from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.inputs import Limit
from swarm.cli.ui.table import Column

app = new_app("artifact", "List and show artifacts: large values that workflow steps produced.")


@command(app, "list", examples=["swarm artifact list", "swarm artifact list --ticket report-7 --json"], json=True)
async def list_(
    cli: Cli,
    ticket: Annotated[str | None, typer.Option("--ticket", metavar="ID", help="Only of this ticket.")] = None,
    limit: Limit = 50,
) -> None:
    """List artifacts, largest first. One is removed with the last ticket that uses it."""

    async with cli.store() as store:
        if ticket is not None:
            ticket = await store.ticket_id(ticket)
        found = await store.artifacts(ticket_id=ticket, limit=limit)
    rows = [(one.digest, one.bytes, one.tickets, one.created_at) for one in found]
    columns = (
        Column("DIGEST", digest=True), Column("BYTES", right=True), Column("TICKETS", drop=2, right=True),
        Column("CREATED", drop=1),
    )  # fmt: skip
    cli.out.listing(found, columns, rows, empty="no artifacts")


@command(app, "show", examples=["swarm artifact show 481c37e5", "swarm artifact show 481c37e5 > value.json"])
async def show(
    cli: Cli,
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The digest, or a unique beginning of it.")],
) -> None:
    """Print an artifact, as JSON."""

    async with cli.store() as store:
        text = await store.artifact(digest)
    cli.out.json_text(text)
