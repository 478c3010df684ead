"""Files of a guest: looked at, read, written, watched; each call is a conversation with its agentd.

Paths are the guest's; one that is not absolute is below /work. Everything happens with the rights of ``user`` ('agent'
or 'root'), and follows links as that user would. Names may be any bytes, as Python has them (surrogateescape). What a
guest says is checked, and may still be a lie. Directories as a whole: `swarm.channel.guest_trees`.

Raises NotFound if a path isn't there, Conflict if what is there forbids it, NoSpace if the guest's disk is full,
UsageError for what makes no sense, GuestRefused for what else the guest says, ChannelError if it breaks the protocol or
doesn't answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat as stat_module
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base import trees
from swarm.channel.asking import ANSWER_SECONDS, ask, lines, send, talk
from swarm.channel.conversation import Open
from swarm.channel.frames import Frame, printable
from swarm.errors import ChannelError, Conflict, HostError, NoSpace, NotFound, SwarmError, UsageError

MAX_LISTED: Final = 10_000
MAX_WATCH_PATH: Final = 8192
_REMOVE_SECONDS: Final = 1800.0  # of a million files
_TRIES: Final = 3  # of a file that is sent
_KINDS: Final = ("file", "directory", "link", "pipe", "socket", "device")
_READ_BYTES: Final = 4 << 20
_GROWTH_BYTES: Final = 64 << 20
_MOST_BYTES: Final = (1 << 63) - 1  # of a file, on any Linux
_EVENTS: Final = ("created", "written", "attributes", "removed", "moved", "lost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """One file, directory, link, pipe, socket or device. ``mode``: its permission bits. ``target``: a link's."""

    name: str
    kind: str
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    entries: tuple[Info, ...]  # by name
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something below a watched path: 'created', 'written', 'attributes', 'removed', 'moved' (``to``), or 'lost': what
    changed is not all told, because of ``why``. ``path`` is relative to what is watched, '' for itself."""

    event: str
    path: str
    directory: bool = False
    to: str | None = None
    why: str | None = None


async def stat(guest: Open, path: str, *, user: str = "agent", follow: bool = True) -> Info:
    reply = await ask(guest, "stat", {"path": path, "user": user, "follow": follow})
    return _info(reply.head, path.rstrip("/").rpartition("/")[2] or "/")


async def exists(guest: Open, path: str, *, user: str = "agent") -> bool:
    """False as well for a link that leads nowhere."""
    try:
        await stat(guest, path, user=user)
    except NotFound:
        return False
    return True


async def list_dir(guest: Open, path: str, *, user: str = "agent", limit: int = MAX_LISTED) -> Listing:
    """At most ``limit`` entries, in the guest's own order before they are sorted."""
    found: list[Info] = []
    async with talk(guest, "list", {"path": path, "user": user, "limit": limit}) as it:
        async for line in lines(it):
            found.append(_info(line, _name(line.get("name"))))
            if len(found) > limit:
                raise ChannelError("the guest sent more of a directory than it may")
        complete = it.reply.flag("complete")
    return Listing(entries=tuple(sorted(found, key=lambda one: os.fsencode(one.name))), complete=complete)


async def make_dir(guest: Open, path: str, *, user: str = "agent", parents: bool = False) -> None:
    """``parents``: also what is above it; it may be there already."""
    await ask(guest, "make_dir", {"path": path, "user": user, "parents": parents})


async def move(guest: Open, path: str, to: str, *, user: str = "agent") -> None:
    """A file that is at ``to`` is replaced."""
    await ask(guest, "move", {"path": path, "to": to, "user": user})


async def remove(guest: Open, path: str, *, user: str = "agent", recursive: bool = False) -> None:
    """A link is removed, never what it leads to. A directory must be empty, unless ``recursive``."""
    limit = _REMOVE_SECONDS if recursive else ANSWER_SECONDS
    await ask(guest, "remove", {"path": path, "user": user, "recursive": recursive}, limit_seconds=limit)


# --- reading


async def read(
    guest: Open,
    path: str,
    *,
    user: str = "agent",
    offset: int = 0,
    length: int | None = None,
    limit_bytes: int | None = None,
) -> AsyncGenerator[bytes, None]:
    """What is in a file, in pieces of at most 1 MiB, from ``offset`` on, to its end or ``length`` bytes. Raises
    Conflict if that is more than ``limit_bytes``."""
    async for piece in _read(guest, path, user, offset, length, limit_bytes, holes=False):
        assert isinstance(piece, bytes)
        yield piece


async def read_bytes(guest: Open, path: str, *, user: str = "agent", limit_bytes: int = 16 << 20) -> bytes:
    """A whole file that is not large."""
    async with contextlib.aclosing(read(guest, path, user=user, limit_bytes=limit_bytes)) as pieces:
        return b"".join([piece async for piece in pieces])


async def _read(
    guest: Open, path: str, user: str, offset: int, length: int | None, limit: int | None, *, holes: bool
) -> AsyncGenerator[bytes | int, None]:
    """Pieces of the file, and the sizes of its holes. Of what is limited, one byte more is asked for, which tells that
    there is more."""
    asked = length if limit is None or (length is not None and length <= limit) else limit + 1
    fields = {"path": path, "user": user, "offset": offset, "length": asked, "holes": holes}
    received = 0
    async with talk(guest, "read", fields) as it:
        while (frame := await it.next()) is not None:
            hole = frame.number("hole") if holes and "hole" in frame.head else 0
            if bool(hole) == bool(frame.payload) or (frame.payload and frame.head.get("stream") != "data"):
                raise ChannelError("the guest sent a frame that does not belong in a read")
            received += hole or len(frame.payload)
            if received > _MOST_BYTES:
                raise ChannelError("the guest sent more of a file than a file can hold")
            if limit is not None and received > limit:
                raise Conflict(f"{printable(path)} has more than the limit of {limit} bytes")
            if asked is not None and received > asked:
                raise ChannelError("the guest sent more of a file than was asked for")
            yield hole or frame.payload
        if it.reply.number("bytes") != received:
            raise ChannelError(f"the guest sent {received} bytes of {it.reply.number('bytes')}")


async def get(guest: Open, path: str, to: Path, *, user: str = "agent", limit_bytes: int | None = None) -> int:
    """Bring a file to this host; returns its size. Written beside ``to`` and then in its place, so nobody sees half of
    it. Its permissions are kept (of those, what the umask allows), and so are its holes. Raises Conflict where git
    would take it for part of a repository."""
    trees.refuse_repository(to.parent)
    info = await stat(guest, path, user=user)
    limit_bytes = info.size + _GROWTH_BYTES if limit_bytes is None else limit_bytes  # a guest could send for ever
    beside = to.with_name(f".{to.name[:200]}.{secrets.token_hex(4)}.part")
    size = 0
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, info.mode & 0o777 | 0o600)
        try:
            async with contextlib.aclosing(_read(guest, path, user, 0, None, limit_bytes, holes=True)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, int):
                        size += piece
                    else:
                        await asyncio.to_thread(_write_at, fd, piece, size)
                        size += len(piece)
            os.ftruncate(fd, size)  # the last hole
        finally:
            os.close(fd)
        beside.replace(to)
    except OSError as error:
        raise _host_error(error, to) from None
    finally:
        beside.unlink(missing_ok=True)
    return size


def _write_at(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def _host_error(error: OSError, path: Path) -> SwarmError:
    kind = NoSpace if error.errno == errno.ENOSPC else HostError
    return kind(f"can't write {path}: {error.strerror}")


# --- writing


async def write(
    guest: Open,
    path: str,
    data: bytes | AsyncIterable[bytes],
    *,
    user: str = "agent",
    owner: str | None = None,
    size: int | None = None,
    mode: int | None = None,
    parents: bool = False,
    upload: str = "",
    offset: int = 0,
) -> int:
    """Write a file in the guest; returns its size. It is replaced as a whole, once all has come.

    ``mode``: default that of the file that it replaces, or 644. ``owner``: for root, who may give it to 'agent';
    default the owner of the file that root replaces, or ``user``.
    ``parents``: make the directories above it. ``size``: of all; without it, an early end of ``data`` is not noticed.
    ``upload``: 1 to 64 letters, digits and '-' of the caller's choice, under which what came of a broken write is
    kept: ask `uploaded` how much, and go on with the rest of the data at that ``offset``.
    """
    if isinstance(data, bytes):
        size = len(data) + offset if size is None else size
    fields = {
        "path": path, "user": user, "owner": owner, "size": size, "mode": mode, "parents": parents, "upload": upload,
        "offset": offset,
    }  # fmt: skip
    return (await send(guest, "write", fields, data)).number("bytes")


async def uploaded(guest: Open, path: str, upload: str, *, user: str = "agent") -> int:
    """How many bytes of a broken `write` are there; 0 if none."""
    return (await ask(guest, "uploaded", {"path": path, "user": user, "upload": upload})).number("bytes")


async def put(
    guest: Open,
    source: Path,
    path: str,
    *,
    user: str = "agent",
    owner: str | None = None,
    mode: int | None = None,
    parents: bool = False,
) -> int:
    """Send a file of this host; ``mode``: default its own. If the connection breaks, it is taken up where it broke."""
    try:
        status = await asyncio.to_thread(source.stat)
        if not stat_module.S_ISREG(status.st_mode):
            raise UsageError(f"{source} is not a file")
        mode = status.st_mode & 0o777 if mode is None else mode
        upload, offset = secrets.token_hex(8), 0
        for left in reversed(range(_TRIES)):
            fields = {"user": user, "owner": owner, "mode": mode, "parents": parents, "upload": upload}
            try:
                async with contextlib.aclosing(_pieces(source, offset, status.st_size - offset)) as pieces:
                    return await write(guest, path, pieces, size=status.st_size, offset=offset, **fields)  # type: ignore[arg-type]
            except ChannelError:
                if not left:
                    raise
                offset = await uploaded(guest, path, upload, user=user)
    except OSError as error:
        raise UsageError(f"{source} can't be read: {error.strerror}") from None
    raise AssertionError


async def _pieces(source: Path, offset: int, size: int) -> AsyncGenerator[bytes]:
    with source.open("rb", buffering=0) as file:
        file.seek(offset)
        while size > 0 and (data := await asyncio.to_thread(file.read, min(size, _READ_BYTES))):
            yield data
            size -= len(data)


# --- watching


@contextlib.asynccontextmanager
async def watch(
    guest: Open, path: str, *, user: str = "agent", recursive: bool = False
) -> AsyncIterator[AsyncIterator[Change]]:
    """What changes in a directory, or of a file, from now on. Ends when what is watched is gone."""
    fields = {"path": path, "user": user, "recursive": recursive}
    async with talk(guest, "watch", fields) as it:
        async with asyncio.timeout(_REMOVE_SECONDS):
            started = await it.receive()
        if "started_ns" not in started.head:
            raise ChannelError("the guest sent a frame that does not belong in a watch")

        async def changes() -> AsyncGenerator[Change, None]:
            async for line in lines(it, patient=True):
                yield _change(line)

        async with contextlib.aclosing(changes()) as found:
            yield found


def _change(line: Mapping[str, object]) -> Change:
    event, to, why = line.get("event"), line.get("to"), line.get("why")
    if event not in _EVENTS or (event == "moved") != isinstance(to, str):
        raise ChannelError(f"the guest tells of a change that makes no sense: {printable(event)}")
    return Change(
        event=str(event),
        path=_path(line.get("path")),
        directory=line.get("directory") is True,
        to=None if to is None else _path(to),
        why=None if why is None else printable(why),
    )


# --- what a guest says


def _info(said: Mapping[str, object], name: str) -> Info:
    frame = Frame(head=said, payload=b"")
    kind = frame.text("kind")
    if kind not in _KINDS:
        raise ChannelError(f"the guest has a file of an unknown kind: {printable(kind)}")
    numbers = {key: frame.number(key) for key in ("size", "mode", "uid", "gid", "mtime_ns")}
    if numbers["mode"] > 0o7777:
        raise ChannelError("what the guest says of a file makes no sense")
    return Info(name=name, kind=kind, target=frame.text("target") if kind == "link" else None, **numbers)


def _name(value: object) -> str:
    name = _path(value)
    if name in ("", ".", "..") or "/" in name:
        raise ChannelError(f"the guest has a file named {printable(name)}")
    return name


def _path(value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_WATCH_PATH or "\0" in value:
        raise ChannelError(f"the guest has a file named {printable(value)}")
    return value
