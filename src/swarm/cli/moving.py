"""Files of this host on their way into /work of a VM for a command, and what `--out` brings back."""

from __future__ import annotations

import asyncio
import fnmatch
import os
import re
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swarm.base import trees
from swarm.base.trees import Entry, Target
from swarm.cli import sending
from swarm.cli.sending import Source
from swarm.errors import Conflict, NotFound, UsageError

if TYPE_CHECKING:
    from swarm.channel import Channel
    from swarm.channel.conversation import Open
    from swarm.channel.guest_files import Info

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


# --- back -------------------------------------------------------------------------------------------------------------


def parts_of(pattern: str) -> tuple[str, ...]:
    """Of a pattern below /work. Raises UsageError."""
    parts = tuple(part for part in pattern.removeprefix("/work/").split("/") if part not in ("", "."))
    if not parts or ".." in parts or (pattern.startswith("/") and not pattern.startswith("/work/")) or "\0" in pattern:
        raise UsageError(f"{pattern[:200]!r} is not below /work: write a name or a pattern such as 'dist/*.whl'")
    return parts


async def bring_back(
    guest: Open,
    patterns: Sequence[str],
    top: Path,
    *,
    limit_bytes: int,
    brought: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Write what fits the patterns below /work of the guest to the same place below ``top``; a directory with all that
    is in it. ``brought`` gets each name, ``note`` a sentence for what was left out. The guest chose the names and the
    contents: nothing is written outside ``top``, or through a link there. Raises SwarmError."""
    from swarm.channel import guest_trees

    found: dict[str, Info] = {}
    for pattern in patterns:
        fitting = await _find(guest, parts_of(pattern), note)
        if not fitting:
            note(f"nothing in /work fits {pattern!r}")
        found |= fitting
    within = [f"{name}/" for name, info in found.items() if info.kind == "directory"]
    target = Target(top)
    left = limit_bytes
    try:
        for name, info in found.items():
            if any(name.startswith(directory) for directory in within):  # it comes with that
                continue
            if why := _not_taken(name, info):
                note(f"left out: {name}: {why}")
                continue
            if info.kind == "directory":
                await target.write(Entry(f"{name}/", trees.DIR, 0), _text(""))
                moved = await guest_trees.get_tree(guest, f"/work/{name}", top, below=name, limit_bytes=left)
                for what in moved.left_out:
                    note(f"left out of {name}: {what}")
                left -= moved.bytes
            else:
                if (left := left - info.size) < 0:
                    raise Conflict(
                        f"--out fits more than {limit_bytes >> 20} MiB; the limit is the size of the VM's disk"
                    )
                await _write(guest, target, name, info)
            brought(f"{name}/" if info.kind == "directory" else name)
    finally:
        target.close()


def _not_taken(name: str, info: Info) -> str:
    """Why it can't be written here; '' if it can."""
    if trees.runs_git(f"{name}/" if info.kind == "directory" else name):
        return "git would run what is in a .git here, or beside a HEAD"
    if not trees.is_plain(name):
        return "its name is too long, or leads elsewhere"
    if info.kind == "link" and not trees.may_come(name, info.target or ""):
        return f"a link to {(info.target or '')[:200]!r}, which leads out of this directory, into a .git or to a HEAD"
    return "" if info.kind in ("file", "link", "directory") else f"a {info.kind}"


async def _write(guest: Open, target: Target, name: str, info: Info) -> None:
    from swarm.channel import guest_files

    if info.kind == "link":
        await target.write(Entry(name, stat.S_IFLNK | 0o777, 0), _text(info.target or ""))
        return
    # No longer than it was said to be, so that one which grows does not fill this disk.
    async with aclosing(guest_files.read(guest, f"/work/{name}", length=info.size)) as pieces:
        await target.write(Entry(name, stat.S_IFREG | info.mode & 0o777, info.size), pieces)


async def _text(text: str) -> AsyncIterator[bytes]:
    yield os.fsencode(text)


async def _find(guest: Open, parts: tuple[str, ...], note: Callable[[str], None]) -> dict[str, Info]:
    """All that fits, by name; a directory stands for all that is in it."""
    from swarm.channel import guest_files

    found: dict[str, Info] = {}
    waiting = [("", parts)]
    while waiting:
        here, (part, *rest) = waiting.pop()
        try:
            if part != "**" and not re.search(r"[*?\[]", part):
                entries = [(f"{here}{part}", await guest_files.stat(guest, f"/work/{here}{part}", follow=False))]
            else:
                listing = await guest_files.list_dir(guest, f"/work/{here}")
                if not listing.complete:
                    note(f"/work/{here} has more than {len(listing.entries):,} entries: the others are left out")
                entries = [(f"{here}{info.name}", info) for info in listing.entries if _fits(info.name, part)]
        except (NotFound, Conflict):  # Conflict: what it would be in is a file
            continue
        if part == "**" and rest:
            waiting.append((here, tuple(rest)))
        for name, info in entries:
            if part == "**" and rest:
                if info.kind == "directory":
                    waiting.append((f"{name}/", (part, *rest)))
            elif rest:
                waiting.append((f"{name}/", tuple(rest)))
            elif name not in found:
                found[name] = info
        if len(found) > trees.MAX_ENTRIES or len(waiting) > trees.MAX_ENTRIES:
            raise Conflict(f"--out fits more than {trees.MAX_ENTRIES:,} files")
    return found


def _fits(name: str, part: str) -> bool:
    """As shells have it: what begins with a dot only if the pattern does."""
    return fnmatch.fnmatchcase(name, part) and (not name.startswith(".") or part.startswith("."))
