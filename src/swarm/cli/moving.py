"""Files of this host on their way into /work of a VM for a command, and what `--out` brings back."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swarm.base import trees
from swarm.base.trees import Entry
from swarm.cli import sending
from swarm.cli.sending import Source
from swarm.errors import UsageError

if TYPE_CHECKING:
    from swarm.channel import Channel

# Of a directory of which git does not say what belongs to it. Somebody may have typed the command in a home directory.
MAX_BYTES: Final = 256 << 20
MAX_FILES: Final = 20_000


@dataclass(slots=True)
class Picked:
    """What goes in. ``left_out``: what can't, each with the reason."""

    files: list[tuple[Entry, Path]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    bytes: int = 0


async def pick(top: Path, *, all_files: bool) -> Picked:
    """The files of a directory: of a git work tree those that belong to it, tracked or new. Raises UsageError."""
    if not top.is_dir():
        raise UsageError(f"--dir {top}: it is not a directory")
    async with AsyncExitStack() as stack:
        try:
            sources = await sending.sources_of(top, stack, all_files=all_files, history=False)
            return await asyncio.to_thread(_picked, sources, all_files)
        except OSError as error:
            raise UsageError(f"{error.filename} can't be read: {error.strerror}") from None


def _picked(sources: list[Source], all_files: bool) -> Picked:
    found = Picked()
    for source in sources:
        for name in source.names:
            _add(found, source.top / name, name, source.top)
            if source.chosen or all_files:
                continue
            if len(found.files) > MAX_FILES or found.bytes > MAX_BYTES:
                limit = f"{MAX_FILES:,} files" if len(found.files) > MAX_FILES else f"{MAX_BYTES >> 20} MiB"
                raise UsageError(
                    f"{source.top} has more than {limit}, and is no git work tree that says what belongs to it: name "
                    "a smaller directory with --dir, send all of it with --all-files, or nothing with --no-files"
                )
    return found


def _add(found: Picked, path: Path, name: str, top: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:  # it has just gone
        return
    if stat.S_ISDIR(status.st_mode):
        found.files.append((Entry(f"{name.rstrip('/')}/", trees.DIR, 0), path))
    elif stat.S_ISLNK(status.st_mode):
        target = os.readlink(path)  # noqa: PTH115  its text, as it stands
        if trees.stays_within(name, target):
            found.files.append((Entry(name, stat.S_IFLNK | 0o777, len(os.fsencode(target))), path))
        else:
            found.left_out.append(f"{name}, a link to {target[:200]!r}, which leads out of {top}")
    elif stat.S_ISREG(status.st_mode):
        mode = stat.S_IFREG | stat.S_IMODE(status.st_mode) & 0o777
        found.files.append((Entry(name, mode, status.st_size), path))
        found.bytes += status.st_size
    else:
        found.left_out.append(f"{name}, a socket, a device or a pipe")


async def send(channel: Channel, picked: Picked) -> None:
    """Write them below /work, for the user of programs there. Raises UsageError, ChannelError."""
    pieces = _Pieces(picked)

    async def contents(_: int, size: int) -> AsyncIterator[bytes]:
        try:
            while size > 0:
                piece = await asyncio.to_thread(pieces.take, min(size, trees.PART_BYTES))
                size -= len(piece)
                yield piece
        except OSError as error:
            raise UsageError(f"{error.filename} can't be read: {error.strerror}") from None

    await channel.put_entries([entry for entry, _ in picked.files], contents, dest="/work")


class _Pieces:
    """The contents of all files, one after the other."""

    def __init__(self, picked: Picked) -> None:
        self._data = bytearray()
        self._all = self._read(picked)

    def take(self, size: int) -> bytes:
        while len(self._data) < size:
            self._data += next(self._all)
        piece = bytes(self._data[:size])
        del self._data[:size]
        return piece

    @staticmethod
    def _read(picked: Picked) -> Iterator[bytes]:
        for entry, path in picked.files:
            if entry.is_dir:
                continue
            left = entry.size
            if entry.is_link:
                data = os.fsencode(os.readlink(path))  # noqa: PTH115
                left -= len(data)
                yield data
            else:
                # Another program may have put something else in its place: never a link out, never a pipe that waits.
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    # One that grows meanwhile, such as a log, is sent as long as it was.
                    while left and (data := os.read(fd, min(left, trees.PART_BYTES))):
                        left -= len(data)
                        yield data
                finally:
                    os.close(fd)
            if left:
                raise UsageError(f"{path} changed while it was read: try again")
