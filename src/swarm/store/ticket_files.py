"""What a ticket's agents left in /work/out, by name; of a workflow, below the name of each step."""

from __future__ import annotations

import asyncio
import fnmatch
import stat
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from swarm.base import trees
from swarm.base.trees import Contents, Entry
from swarm.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketFile:
    """``kind``: file, link, directory, or 'left out', which was too large or no file. ``mode``: '' of those."""

    name: str
    kind: str
    bytes: int
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketFiles:
    """Not ``complete``: there was more, which was not kept."""

    files: list[TicketFile]
    complete: bool


async def listed(store: Store, ticket_id: str) -> TicketFiles:
    """Raises NotFound."""
    found = [
        TicketFile(name=entry.name, kind=_kind(entry), bytes=entry.size, mode=f"{stat.S_IMODE(entry.mode):04o}")
        async for entry, _, _ in entries(store, ticket_id)
    ]
    complete = True
    for one in await store.files(ticket_id):
        complete = complete and one.complete
        found += [
            TicketFile(name=f"{one.prefix}{name}", kind="left out", bytes=size, mode="") for name, size in one.left_out
        ]
    return TicketFiles(files=found, complete=complete)


async def entries(store: Store, ticket_id: str) -> AsyncGenerator[tuple[Entry, Contents, int]]:
    """Each file, and where its contents are. Raises NotFound."""

    async def load(digest: str) -> str:
        return await store.artifact_of(ticket_id, digest)

    for one in await store.files(ticket_id):
        tree = await asyncio.to_thread(trees.manifest, await load(one.digest))
        contents = trees.Contents(tree.parts, load)
        for entry, offset in tree.offsets():
            yield replace(entry, name=f"{one.prefix}{entry.name}"), contents, offset


async def entry(store: Store, ticket_id: str, name: str) -> tuple[Entry, Contents, int] | None:
    """The one of this name. Raises NotFound if there is no such ticket."""
    async for found in entries(store, ticket_id):
        if found[0].name == name:
            return found
    return None


async def target_of(contents: Contents, entry: Entry, offset: int) -> str:
    """Where a link leads."""
    return b"".join([chunk async for chunk in contents.chunks(offset, entry.size)]).decode(errors="surrogateescape")


def matches(name: str, pattern: str) -> bool:
    """Is it this name, below this directory, or does it fit the pattern?"""
    name, pattern = name.rstrip("/"), pattern.rstrip("/")
    return name == pattern or name.startswith(f"{pattern}/") or fnmatch.fnmatchcase(name, pattern)


def _kind(entry: Entry) -> str:
    return "link" if entry.is_link else "directory" if entry.is_dir else "file"
