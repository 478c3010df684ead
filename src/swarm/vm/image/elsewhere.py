"""Images and layers of other hosts: what of one is fetched, how it is asked for, and what a fetch comes to.

An image or a layer is a directory with a manifest, which has the sha256 of each of its files. A file is asked for by
that digest alone, at ``http://<address>/v1/files/<sha256>``, with a token that is good for this file only: it is made
from a key that the host that has it keeps in the database, and changes now and then. So no two clocks must agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from swarm.base import files
from swarm.base.aio import finish_uninterrupted
from swarm.base.progress import Progress
from swarm.errors import ImageError, SwarmError
from swarm.vm.image import staging
from swarm.vm.image.staging import Part

IMAGE, LAYER = "image", "layer"  # kinds
PREFIX: Final = "/v1/files/"
MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_FILE_BYTES: Final = 8 << 30


def token(key: str, sha256: str) -> str:
    """What a request for this file bears."""
    return hmac.digest(key.encode(), sha256.encode(), "sha256").hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """An image or layer of this host. ``made_of``: the digest of all that shapes it; ``files``: its files, with their
    digests, the manifest first."""

    kind: str
    name: str
    made_of: str
    built_at: str
    files: Mapping[str, Path]  # sha256 -> file

    @property
    def digest(self) -> str:
        return next(iter(self.files))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """``name`` is '' if it could not be fetched; ``why`` says why, and is '' if no other host has it."""

    name: str = ""
    why: str = ""


# The files that belong to what has this manifest and this name. Raises ImageError if it is no such manifest.
PartsOf = Callable[[dict[str, Any], str], Sequence[Part]]


class Elsewhere(Protocol):
    """What other hosts have."""

    async def known(self, kind: str, wanted: str) -> bool:
        """Has a host built it, whether it can be fetched now or not? ``wanted``: what it is made of, or how its name
        begins."""

    async def fetch(
        self, kind: str, wanted: str, *, into: Path, manifest: str, parts: PartsOf, progress: Progress
    ) -> Fetched:
        """Put it into the directory ``into``, in one that was just built beside it; each file verified. Raises OSError,
        ImageError for a lack of space here."""


def shared(kind: str, name: str, made_of: str, built_at: str, manifest: Path, parts: Sequence[Part]) -> Shared:
    """Raises OSError."""
    told = {files.sha256_of(manifest): manifest} | {part.sha256: part.path for part in parts}
    return Shared(kind=kind, name=name, made_of=made_of, built_at=built_at, files=told)


def read(data: bytes, name: str, parts: PartsOf) -> Sequence[Part]:
    """Raises ImageError."""
    try:
        found = parts(json.loads(data), name)
        for part in found:
            if part.path.name != str(part.path) or part.path.name.startswith(".") or not isinstance(part.sha256, str):
                raise ValueError(str(part.path))
            if type(part.size_bytes) is not int or not 0 <= part.size_bytes <= MAX_FILE_BYTES:
                raise ValueError(f"{part.path} of {part.size_bytes} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(f"its manifest can't be read ({error!r})") from None
    return found


async def fetch(
    others: Elsewhere | None, kind: str, wanted: str, *, dir: Path, manifest: str, parts: PartsOf, progress: Progress
) -> Fetched:
    """Into ``dir``, whose lock the caller holds. Raises OSError, ImageError for a lack of space."""
    if others is None:
        return Fetched()
    async with staging.staged(dir) as stage:
        found = await others.fetch(kind, wanted, into=stage, manifest=manifest, parts=parts, progress=progress)
        if found.name:
            await finish_uninterrupted(asyncio.to_thread(staging.move_in, stage, dir / found.name))
    return found


@contextlib.contextmanager
def saying(why: Sequence[str]) -> Iterator[None]:
    """An error of a build that was to make what could not be fetched says also why it could not."""
    try:
        yield
    except SwarmError as error:
        if not any(why):
            raise
        raise ImageError(f"{error}; and it can't be fetched: {why[-1]}") from error
