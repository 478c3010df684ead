"""The files of a ticket: what its agent finds below /work, and what it leaves in /work/out.

A step's inputs name them, in ``$files``: a place below /work, and the digest of the tree that belongs there. Only trees
that the ticket itself uses are sent, since an agent may have chosen the inputs of a later step.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, cast

from swarm.base import trees
from swarm.base.trees import Contents, Entry, Tree
from swarm.channel import Channel
from swarm.channel.files import Received
from swarm.channel.frames import printable
from swarm.errors import NotFound, StepError, StoreError, UsageError
from swarm.model import FILES, FailureReason

OUT: Final = "out/"
MAX_PLACES: Final = 100
_NAMED: Final = 20  # files that an event names
_PATIENCE_SECONDS: Final = 30.0
_PAUSE_SECONDS: Final = 0.5


class FileStore(Protocol):
    async def artifact_of(self, ticket_id: str, digest: str) -> str:
        """Raises NotFound if the ticket uses no such artifact."""

    async def keep_artifacts(self, ticket_id: str, parts: Mapping[str, str]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What an agent left. ``left_out``: names and sizes of what did not fit, or is no file; ``complete`` is False if
    there was even more."""

    digest: str
    files: int
    bytes: int
    left_out: tuple[tuple[str, int], ...]
    complete: bool

    @property
    def event(self) -> dict[str, object]:
        named = [{"name": printable(name), "bytes": size} for name, size in self.left_out[:_NAMED]]
        return {
            "trees": {OUT: self.digest},
            "files": self.files,
            "bytes": self.bytes,
            "left_out": named,
            "left_out_files": len(self.left_out),
            "complete": self.complete,
        }


def places(inputs: Any) -> dict[str, str]:
    """Takes ``$files`` out of a step's inputs: place below /work → digest. Raises StepError."""
    given = inputs.pop(FILES, None) if isinstance(inputs, dict) else None
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > MAX_PLACES:
        raise _bad(f"must be an object of at most {MAX_PLACES} places")
    for place, digest in given.items():
        if not trees.is_place(place):
            raise _bad(f"names the place {printable(place)!r}, which is not below /work, or is the agent's own")
        if not isinstance(digest, str) or len(digest) != 64:
            raise _bad(f"names {printable(str(digest))!r} for {printable(place)!r}, which is no digest")
    return dict(given)


async def send(channel: Channel, store: FileStore | None, ticket_id: str, given: Mapping[str, str]) -> None:
    """Write these trees below /work. Raises StepError."""
    if store is None:
        raise _bad("can only be used by tickets")

    async def load(digest: str) -> str:
        try:
            return await store.artifact_of(ticket_id, digest)
        except NotFound as error:
            raise _bad(str(error)) from None

    for place, digest in given.items():
        text = await load(digest)
        try:
            tree = _placed(await asyncio.to_thread(trees.manifest, text), place)
        except UsageError as error:
            raise _bad(f"{printable(place)!r}: {error}") from None
        await channel.put_entries(tree.entries, Contents(tree.parts, load).chunks, dest="/work")


def _placed(tree: Tree, place: str) -> Tree:
    if place.endswith("/"):
        inside = [replace(entry, name=f"{place}{entry.name}") for entry in tree.entries]
        return Tree([Entry(place, trees.DIR, 0), *inside], tree.parts)
    if len(tree.entries) != 1 or tree.entries[0].is_dir:
        raise UsageError("that is a directory: write its place with '/' at the end")
    return Tree([replace(tree.entries[0], name=place)], tree.parts)


async def collect(
    channel: Channel, store: FileStore, ticket_id: str, *, limit_bytes: int, scratch: Path
) -> Left | None:
    """Keep what is in /work/out; None if that is nothing. Raises SwarmError."""
    with cast("BinaryIO", await asyncio.to_thread(tempfile.TemporaryFile, dir=scratch)) as spool:
        complete = await channel.get_tree(
            f"/work/{OUT.rstrip('/')}", limit_bytes=limit_bytes, limit_entries=trees.MAX_ENTRIES, spool=spool
        )
        received = Received(spool)
        parts = trees.pack(received.entries())
        digest = text = ""
        while batch := await asyncio.to_thread(trees.batch, parts):
            await _keep(store, ticket_id, dict(batch))
            digest, text = batch[-1]  # at last, the manifest
    tree = await asyncio.to_thread(trees.manifest, text)
    if not tree.entries and not received.left_out:
        return None
    return Left(
        digest=digest,
        files=len(tree.entries),
        bytes=tree.bytes,
        left_out=tuple(received.left_out),
        complete=complete,
    )


async def _keep(store: FileStore, ticket_id: str, parts: Mapping[str, str]) -> None:
    """The work is done: a database that is locked or full for a while must not cost it."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return await store.keep_artifacts(ticket_id, parts)
        except StoreError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(_PAUSE_SECONDS)


def _bad(what: str) -> StepError:
    return StepError(f"its inputs: {FILES} {what}", reason=FailureReason.INPUT_INVALID, retryable=False)
