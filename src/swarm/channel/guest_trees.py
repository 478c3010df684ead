"""Directories of a guest, there and back, as tar archives that are made and read while they are sent.

Names, modes, links and (towards the guest) times are kept, owners are not: all that is written belongs to ``user``. A
guest's archive is made anew from what it says, so nobody gets one that a guest has made: no absolute names, no '..', no
devices, no more than was asked for. For errors see `swarm.channel.guest_files`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import tarfile
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base import tar, trees
from swarm.base.trees import Entry
from swarm.channel.asking import send, talk
from swarm.channel.conversation import Open
from swarm.channel.frames import Frame, printable
from swarm.errors import ChannelError, UsageError

MAX_BYTES: Final = 64 << 30
MAX_ENTRIES: Final = 500_000
_SENT_BYTES: Final = 256 << 10  # at least, of one piece of an archive
_MAX_NOTED: Final = 20
_OVERHEAD_BYTES: Final = 16 << 10  # of an entry: headers with a name and a target of 4000 bytes, padding
_KINDS: Final = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What has come or gone. ``left_out``: some of what was left out, each with the reason."""

    entries: int  # files, links and directories
    bytes: int
    left_out: tuple[str, ...] = ()


class _Tree:
    """What a guest sends of a directory, checked."""

    def __init__(self, guest: Open, path: str, user: str, limit_bytes: int, limit_entries: int) -> None:
        self._guest = guest
        self._fields = {"path": path, "user": user, "limit": limit_bytes, "entries": limit_entries}
        self._limit_bytes, self._limit_entries = limit_bytes, limit_entries
        self.entries = self.bytes = 0
        self.left_out: list[str] = []

    async def __aiter__(self) -> AsyncGenerator[tuple[tarfile.TarInfo, AsyncIterator[bytes]], None]:
        reply: list[Frame] = []
        async with contextlib.aclosing(self._sent(reply)) as pieces:
            archive = tar.Arriving(pieces, broken=ChannelError)
            async for info in archive:
                self._check(info)
                yield info, archive.contents(info.size)
        if not reply:
            raise ChannelError("the guest sent only a part of a directory")
        if number := reply[0].number("left_out"):
            first = printable(reply[0].text("first"))
            self.left_out.insert(0, first if number == 1 else f"{first}, and {number - 1} more")

    async def _sent(self, reply: list[Frame]) -> AsyncGenerator[bytes, None]:
        left = self._limit_bytes + self._limit_entries * _OVERHEAD_BYTES
        async with talk(self._guest, "pack", self._fields) as it:
            while (frame := await it.next()) is not None:
                left -= len(frame.payload)
                if frame.head.get("stream") != "data" or not frame.payload or left < 0:
                    raise ChannelError("the guest sent more of a directory than it may")
                yield frame.payload
            reply.append(it.reply)

    def _check(self, info: tarfile.TarInfo) -> None:
        self.entries += 1
        self.bytes += info.size
        info.name = info.name.rstrip("/")
        if info.type not in _KINDS or not trees.is_plain(info.name) or (info.size and not info.isreg()):
            raise ChannelError(f"the guest sent a file named {printable(info.name)!r}, of type {info.type!r}")
        if info.issym() and not 0 < len(os.fsencode(info.linkname)) < 4096:
            raise ChannelError(f"the guest sent the link {printable(info.name)!r} without a target")
        if self.entries > self._limit_entries or self.bytes > self._limit_bytes:
            raise ChannelError("the guest sent more of a directory than it may")

    def note(self, text: str) -> None:
        if len(self.left_out) < _MAX_NOTED:
            self.left_out.append(text)


async def pack(
    guest: Open,
    path: str,
    *,
    user: str = "agent",
    limit_bytes: int = MAX_BYTES,
    limit_entries: int = MAX_ENTRIES,
    left_out: list[str] | None = None,
) -> AsyncGenerator[bytes, None]:
    """A directory of the guest (or one file) as a tar archive, in PAX format. Raises UsageError if it has more than the
    limits allow. ``left_out`` gets what was left out, such as sockets, and why."""
    tree = _Tree(guest, path, user, limit_bytes, limit_entries)
    unsent = bytearray()
    async with contextlib.aclosing(tree.__aiter__()) as found:
        async for told, contents in found:
            info = tarfile.TarInfo(told.name)
            info.type, info.linkname, info.size = told.type, told.linkname if told.issym() else "", told.size
            info.mode, info.mtime = told.mode & 0o7777, told.mtime
            unsent += info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            async for piece in contents:
                unsent += piece
                if len(unsent) >= _SENT_BYTES:
                    yield bytes(unsent)
                    unsent.clear()
            unsent += bytes(-info.size % tarfile.BLOCKSIZE)
            if len(unsent) >= _SENT_BYTES:
                yield bytes(unsent)
                unsent.clear()
    yield bytes(unsent) + bytes(2 * tarfile.BLOCKSIZE)
    if left_out is not None:
        left_out += tree.left_out


async def unpack(guest: Open, path: str, archive: bytes | AsyncIterable[bytes], *, user: str = "agent") -> Moved:
    """Unpack a tar archive (ustar, PAX or GNU, not compressed) below ``path``, which is made if need be. What is there
    stays, unless the archive has a file of that name."""
    reply = await send(guest, "unpack", {"path": path, "user": user}, archive)
    return Moved(entries=reply.number("entries"), bytes=reply.number("bytes"))


async def get_tree(
    guest: Open,
    path: str,
    to: Path,
    *,
    user: str = "agent",
    limit_bytes: int = MAX_BYTES,
    limit_entries: int = MAX_ENTRIES,
    git: bool = False,
    below: str = "",
) -> Moved:
    """Bring a directory to this host, where ``to`` is made if need be, and files in it are replaced; ``below``: to the
    directory of this name in it, through no link. Links that lead out of ``to`` are left out, and unless ``git``, what
    is in a .git or makes a repository, where programs are named that git would run here."""
    tree = _Tree(guest, path, user, limit_bytes, limit_entries)
    target = await asyncio.to_thread(trees.Target, to, git=git)
    try:
        async with contextlib.aclosing(tree.__aiter__()) as found:
            async for info, contents in found:
                if below:
                    info.name = f"{below}/{info.name}"
                if not git and trees.runs_git(f"{info.name}/" if info.isdir() else info.name):
                    if info.name.lower().endswith(".git"):
                        tree.note(f"{info.name}: git would run what is in it")
                    elif not trees.names_git(info.name):
                        tree.note(f"{info.name}: git would take its directory for a repository, and run what is in it")
                    continue
                if info.issym():
                    if not (trees.stays_within if git else trees.may_come)(info.name, info.linkname):
                        where = (
                            f"out of {to}"
                            if not trees.stays_within(info.name, info.linkname)
                            else "into a .git or to a HEAD"
                        )
                        tree.note(f"{info.name}: it is a link to {info.linkname[:200]!r}, which leads {where}")
                        continue
                    data = os.fsencode(info.linkname)
                    await target.write(Entry(info.name, stat.S_IFLNK | 0o777, len(data)), _one(data))
                elif info.isdir():
                    await target.write(Entry(f"{info.name}/", stat.S_IFDIR | info.mode & 0o777, 0), _one(b""))
                else:
                    await target.write(Entry(info.name, stat.S_IFREG | info.mode & 0o777, info.size), contents)
    finally:
        target.close()
    return Moved(entries=tree.entries, bytes=tree.bytes, left_out=tuple(tree.left_out))


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def put_tree(
    guest: Open, top: Path, path: str, *, names: Iterable[str] | None = None, user: str = "agent"
) -> Moved:
    """Send a directory of this host; ``names``: only these, below ``top`` (default: all). Raises UsageError for a
    special file, or a link that leads out of it."""
    blocks = _archive(top, _walk(top) if names is None else names)

    async def pieces() -> AsyncIterator[bytes]:
        while piece := await asyncio.to_thread(next, blocks, b""):
            yield piece

    return await unpack(guest, path, pieces(), user=user)


def _walk(top: Path) -> Iterator[str]:
    """All of it, directories before what is in them."""
    for here, dirs, files in os.walk(top):
        dirs.sort()
        below = Path(here).relative_to(top).as_posix()
        prefix = "" if below == "." else f"{below}/"
        yield from (f"{prefix}{name}" for name in sorted([*dirs, *files]))


def _archive(top: Path, names: Iterable[str]) -> Iterator[bytes]:
    """In pieces of some size: each costs a turn of a thread."""
    unsent = bytearray()
    for entry, contents in trees.read(top, names):
        status = (top / entry.name).lstat()
        info = tarfile.TarInfo(entry.name.rstrip("/"))
        info.mode, info.mtime = stat.S_IMODE(status.st_mode) & 0o777, int(status.st_mtime)
        if entry.is_link:
            info.type, info.linkname = tarfile.SYMTYPE, os.fsdecode(b"".join(contents))
            contents = ()
        elif entry.is_dir:
            info.type = tarfile.DIRTYPE
        else:
            info.size = entry.size
        unsent += info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        left = info.size
        for data in contents:
            left -= len(data)
            unsent += data
            if len(unsent) >= _SENT_BYTES:
                yield bytes(unsent)
                unsent.clear()
        if left:
            raise UsageError(f"{top / entry.name} changed while it was read; try again")
        unsent += bytes(-info.size % tarfile.BLOCKSIZE)
        if len(unsent) >= _SENT_BYTES:
            yield bytes(unsent)
            unsent.clear()
    yield bytes(unsent) + bytes(2 * tarfile.BLOCKSIZE)
