"""`swarm ticket files` and `swarm ticket get`: what a ticket's agents left in /work/out."""

from __future__ import annotations

import fnmatch
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.frame import Cli, command
from swarm.cli.inputs import TicketId
from swarm.cli.ticket import app
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.base.trees import Contents, Entry
    from swarm.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketFile:
    """``kind``: file, link, directory, or 'left out', which was too large or no file. ``mode``: '' of those."""

    name: str
    kind: str
    bytes: int
    mode: str


@command(app, "files", examples=["swarm ticket files report-7", "swarm ticket files report-7 --json"], json=True)
async def files(cli: Cli, id: TicketId) -> None:
    """List what the ticket's agents left in /work/out; of a workflow, below the name of each step."""
    listed: list[TicketFile] = []
    complete = True
    async with cli.store() as store:
        id = await store.ticket_id(id)
        async for name, entry, _, _ in _entries(store, id):
            mode = f"{stat.S_IMODE(entry.mode):04o}"
            listed.append(TicketFile(name=name, kind=_kind(entry), bytes=entry.size, mode=mode))
        for one in await store.files(id):
            complete = complete and one.complete
            listed += [
                TicketFile(name=f"{one.prefix}{name}", kind="left out", bytes=size, mode="")
                for name, size in one.left_out
            ]
    rows = [(one.name, one.bytes, one.kind, one.mode) for one in listed]
    columns = ("NAME", Column("BYTES", drop=3, right=True), Column("KIND", drop=2), Column("MODE", drop=1))
    cli.out.listing(listed, columns, rows, empty="it left no files in /work/out")
    if not complete:
        cli.out.note("There was more than this in /work/out: it was not kept (docs/agents.md has the limits).")


@command(
    app,
    "get",
    examples=[
        "swarm ticket get report-7",
        "swarm ticket get report-7 '*.csv' --to results",
        "swarm ticket get release-3 build/dist --force",
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
) -> None:
    """Bring back what the ticket's agents left in /work/out; `swarm ticket files` lists it. Prints each name."""
    from swarm.base.trees import Target, names_git, stays_within
    from swarm.errors import Conflict, NotFound

    async with cli.store() as store:
        id = await store.ticket_id(id)
        found = [one async for one in _entries(store, id) if pattern is None or _matches(one[0], pattern)]
        if not found:
            what = "left no files in /work/out" if pattern is None else f"left nothing that is named {pattern!r}"
            raise NotFound(f"the ticket {id} {what}; `swarm ticket files {id}` lists what there is")
        if unsafe := [name for name, _, _, _ in found if names_git(name)]:
            more = f" and {len(unsafe) - 1} more" if len(unsafe) > 1 else ""
            cli.out.note(f"left out: {unsafe[0]}{more}: git would run what is in a .git here; an archive can hold it")
            found = [one for one in found if not names_git(one[0])]
        target = Target(to)
        try:
            there = [name for name, entry, _, _ in found if target.holds(replace(entry, name=name))]
            if there and not force:
                more = f" and {len(there) - 1} more" if len(there) > 1 else ""
                raise Conflict(f"{to / there[0]}{more} exists: give --force to replace, or --to another directory")
            for name, entry, contents, offset in found:
                if entry.is_link:
                    data = b"".join([chunk async for chunk in contents.chunks(offset, entry.size)])
                    if not stays_within(name, data.decode(errors="surrogateescape")):
                        cli.out.note(f"left out: {name} is a link to {data[:200]!r}, which leads out of {to}")
                        continue
                await target.write(replace(entry, name=name), contents.chunks(offset, entry.size))
                cli.out.line(to / name)
        finally:
            target.close()


async def _entries(store: Store, id_: str) -> AsyncIterator[tuple[str, Entry, Contents, int]]:
    """Each file: its name, what it is, and where its contents are."""
    import asyncio

    from swarm.base import trees

    async def load(digest: str) -> str:
        return await store.artifact_of(id_, digest)

    for one in await store.files(id_):
        tree = await asyncio.to_thread(trees.manifest, await load(one.digest))
        contents = trees.Contents(tree.parts, load)
        for entry, offset in tree.offsets():
            yield f"{one.prefix}{entry.name}", entry, contents, offset


def _kind(entry: Entry) -> str:
    return "link" if entry.is_link else "directory" if entry.is_dir else "file"


def _matches(name: str, pattern: str) -> bool:
    name, pattern = name.rstrip("/"), pattern.rstrip("/")
    return name == pattern or name.startswith(f"{pattern}/") or fnmatch.fnmatchcase(name, pattern)
