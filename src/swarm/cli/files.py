"""`swarm ticket files` and `swarm ticket get`: what a ticket's agents left in /work/out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli import kept
from swarm.cli.frame import Cli, command
from swarm.cli.inputs import TicketId
from swarm.cli.ticket import app
from swarm.cli.ui.table import Column

Vm = Annotated[
    str | None, typer.Option("--vm", metavar="PATH", help="Of the kept VM: a path in it, below /work unless absolute.")
]


@command(
    app, "files", examples=["swarm ticket files report-7", "swarm ticket files report-7 --vm /work --json"], json=True
)
async def files(cli: Cli, id: TicketId, vm: Vm = None) -> None:
    """List what the ticket's agents left in /work/out; of a workflow, below the name of each step.

    With --vm, what is in a directory of the VM itself, if that was kept; of a workflow, ID is TICKET:STEP.
    """
    from swarm.store import ticket_files

    if vm is not None:
        await kept.listed(cli, id, vm)
        return
    async with cli.store() as store:
        found = await ticket_files.listed(store, await store.ticket_id(id))
    rows = [(one.name, one.bytes, one.kind, one.mode) for one in found.files]
    columns = ("NAME", Column("BYTES", drop=3, right=True), Column("KIND", drop=2), Column("MODE", drop=1))
    cli.out.listing(found.files, columns, rows, empty="it left no files in /work/out")
    if not found.complete:
        cli.out.note("There was more than this in /work/out: it was not kept (docs/agents.md has the limits).")


@command(
    app,
    "get",
    examples=[
        "swarm ticket get report-7",
        "swarm ticket get report-7 '*.csv' --to results",
        "swarm ticket get release-3 build/dist --force",
        "swarm ticket get report-7 --vm /work/core",
    ],
)
async def get(
    cli: Cli,
    id: TicketId,
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="Only these: a name, a directory, or a pattern with *.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where to. Default: here.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    vm: Vm = None,
) -> None:
    """Bring back what the ticket's agents left in /work/out; `swarm ticket files` lists it. Prints each name.

    With --vm, a file or directory of the VM itself, if that was kept.
    """
    from swarm.base.trees import Target, may_come, runs_git
    from swarm.errors import Conflict, NotFound, UsageError
    from swarm.store.ticket_files import entries, matches, target_of

    if vm is not None:
        if pattern is not None:
            raise UsageError("--vm names what to get: leave the pattern out")
        await kept.brought(cli, id, vm, to, force=force)
        return
    async with cli.store() as store:
        id = await store.ticket_id(id)
        found = [one async for one in entries(store, id) if pattern is None or matches(one[0].name, pattern)]
        if not found:
            what = "left no files in /work/out" if pattern is None else f"left nothing that is named {pattern!r}"
            raise NotFound(f"the ticket {id} {what}; `swarm ticket files {id}` lists what there is")
        if unsafe := [entry.name for entry, _, _ in found if runs_git(entry.name)]:
            more = f" and {len(unsafe) - 1} more" if len(unsafe) > 1 else ""
            why = "git would run what is in a .git here, or beside a HEAD; an archive can hold it"
            cli.out.note(f"left out: {unsafe[0]}{more}: {why}")
            found = [one for one in found if not runs_git(one[0].name)]
        target = Target(to)
        try:
            there = [entry.name for entry, _, _ in found if target.holds(entry)]
            if there and not force:
                more = f" and {len(there) - 1} more" if len(there) > 1 else ""
                raise Conflict(f"{to / there[0]}{more} exists: give --force to replace, or --to another directory")
            for entry, contents, offset in found:
                if entry.is_link:
                    leads_to = await target_of(contents, entry, offset)
                    if not may_come(entry.name, leads_to):
                        where = f"out of {to}, into a .git or to a HEAD"
                        cli.out.note(f"left out: {entry.name} is a link to {leads_to[:200]!r}, which leads {where}")
                        continue
                await target.write(entry, contents.chunks(offset, entry.size))
                cli.out.line(to / entry.name)
        finally:
            target.close()
