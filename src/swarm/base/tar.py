"""Trees as tar archives. Whoever wrote one, it is read a header at a time, none of which may hold much."""

from __future__ import annotations

import stat
import tarfile
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import BinaryIO, Final

from swarm.base import trees
from swarm.base.trees import Entry
from swarm.errors import SwarmError, UsageError

_BLOCK: Final = 512
_MAX_EXTENSION_BYTES: Final = 64 << 10  # a long name, or a PAX header
_MAX_EXTENSIONS: Final = 8  # before one member
_MAX_MEMBERS: Final = 2 * trees.MAX_ENTRIES  # files and directories
_MAX_NAMES: Final = 16 << 20  # characters of all names, those of directories above them included
_MAX_DEPTH: Final = 100
_PIECE_BYTES: Final = 1 << 20
_EXTENSIONS: Final = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_FILES: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX_KEYS: Final = ("path", "linkpath", "size")
_SPARSE: Final = "GNU.sparse"  # how keys begin that describe a file with holes
_MAX_LENGTH_DIGITS: Final = 6  # of a record in a PAX header


def entries(file: BinaryIO) -> Iterator[tuple[Entry, Iterable[bytes]]]:
    """For `trees.pack`: the files, links and empty directories of an archive that is not compressed. Raises UsageError
    for devices, hard links, names that lead elsewhere or come twice, and an archive that is cut off."""
    reader = _Reader(file)
    names: set[str] = set()
    parents: set[str] = set()
    directories: dict[str, None] = {}
    held = 0
    for number, info in enumerate(reader):
        twice = False
        if number >= _MAX_MEMBERS or max(len(parents), len(directories)) > trees.MAX_ENTRIES:
            raise UsageError(
                f"the archive has more than {_MAX_MEMBERS:,} files and directories together, or more than "
                f"{trees.MAX_ENTRIES:,} directories"
            )
        name = info.name.removeprefix("./").rstrip("/")
        if name in ("", "."):
            continue
        if not trees.is_plain(name):
            raise UsageError(f"the archive has a file named {ascii(name)[:200]}, which is not a plain relative path")
        if name.count("/") > _MAX_DEPTH:
            raise UsageError(
                f"the archive has {ascii(name)[:200]}, which is nested in more than {_MAX_DEPTH} directories"
            )
        above, held = name, held + len(name)
        while (above := above.rpartition("/")[0]) and above not in parents:
            parents.add(above)
            held += len(above)
            twice = twice or above in names
        if held > _MAX_NAMES:
            raise UsageError(f"the names in the archive take more than {_MAX_NAMES >> 20} MiB")
        if info.isdir():
            directories[name] = None
            continue
        twice = twice or name in names or name in parents
        if twice:
            raise UsageError(f"the archive has {ascii(name)[:200]} twice, or as a file and a directory")
        names.add(name)
        if info.issym():
            if not trees.stays_within(name, info.linkname):
                raise UsageError(f"{ascii(name)[:200]} is a link that leads out of the archive")
            target = info.linkname.encode("utf-8", "surrogateescape")
            yield Entry(name, stat.S_IFLNK | 0o777, len(target)), (target,)
        elif info.type in _FILES:
            yield Entry(name, stat.S_IFREG | info.mode & 0o777, info.size), reader.contents(info.size)
        else:
            raise UsageError(f"{ascii(name)[:200]} is neither a plain file nor a directory nor a symbolic link")
    for name in directories:
        if name in names:
            raise UsageError(f"the archive has {ascii(name)[:200]} twice, or as a file and a directory")
        if name not in parents:
            yield Entry(f"{name}/", trees.DIR, 0), ()


class _Headers:
    """Makes members of blocks: extended headers are applied to the member that follows them."""

    def __init__(self, broken: type[SwarmError] = UsageError) -> None:
        self._broken = broken
        self._said: dict[str, str] = {}
        self._extensions = 0

    def read(self, block: bytes) -> tarfile.TarInfo:
        """A member; or an extended header, whose ``size`` bytes `extend` must get."""
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            _check_size(info)
            if info.type in _EXTENSIONS:
                self._extensions += 1
                if self._extensions > _MAX_EXTENSIONS:
                    raise ValueError(f"a member has more than {_MAX_EXTENSIONS} extended headers")
                if info.size > _MAX_EXTENSION_BYTES:
                    raise ValueError("a header is too large")
                return info
            said, self._said, self._extensions = self._said, {}, 0
            info.name, info.linkname = said.get("path", info.name), said.get("linkpath", info.linkname)
            info.size = int(said.get("size", info.size))
            _check_size(info)
        except (tarfile.TarError, ValueError) as error:
            raise self._broken(f"that is not a tar archive: {error}") from None
        if _SPARSE in said:
            info.type = tarfile.GNUTYPE_SPARSE
        return info

    def extend(self, info: tarfile.TarInfo, data: bytes) -> None:
        try:
            self._said |= self._extension(info, data)
        except ValueError as error:
            raise self._broken(f"that is not a tar archive: {error}") from None

    @staticmethod
    def _extension(info: tarfile.TarInfo, data: bytes) -> dict[str, str]:
        if info.type == tarfile.XGLTYPE:
            return {}
        if info.type != tarfile.XHDTYPE:
            text = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            return {"path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath": text}
        said = {}
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + _MAX_LENGTH_DIGITS + 1)
            size = int(data[at:space]) if space > at else 0
            if not space < at + size <= len(data):
                raise ValueError("an extended header is damaged")
            key, _, value = data[space + 1 : at + size - 1].decode("utf-8", "surrogateescape").partition("=")
            if key in _PAX_KEYS:
                said[key] = value
            elif key.startswith(_SPARSE):
                said[_SPARSE] = ""
            at += size
        return said


class _Reader:
    """The members of an archive in a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = 0  # of the present member's contents, padding included

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        headers = _Headers()
        while True:
            while self._left:
                self._read(min(self._left, _PIECE_BYTES))
            block = self._file.read(_BLOCK)
            if not block.strip(b"\0"):
                return
            info = headers.read(block)
            if info.type in _EXTENSIONS:
                self._left = _padded(info.size)
                headers.extend(info, self._read(self._left)[: info.size])
                continue
            if info.type in _FILES:
                self._left = _padded(info.size)
            yield info

    def contents(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self._read(min(size, _PIECE_BYTES))
            size -= len(piece)
            yield piece

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise UsageError("the archive is cut off")
        self._left -= size
        return data


class Arriving:
    """The members of an archive that arrives in pieces, as they come. ``broken``: what is raised for one that is
    damaged."""

    def __init__(self, pieces: AsyncIterator[bytes], *, broken: type[SwarmError] = UsageError) -> None:
        self._pieces = pieces
        self._broken = broken
        self._rest = memoryview(b"")
        self._left = 0  # of the present member's contents, padding included

    async def __aiter__(self) -> AsyncIterator[tarfile.TarInfo]:
        """Ends with the archive. What is in a file may be read, by `contents`, before the next."""
        headers = _Headers(self._broken)
        while True:
            while self._left:
                await self._some(self._left)
            self._left = _BLOCK
            block = await self._take(_BLOCK)
            if not block.strip(b"\0"):
                async for _ in self._pieces:
                    pass
                return
            info = headers.read(block)
            if info.type in _EXTENSIONS:
                self._left = _padded(info.size)
                headers.extend(info, (await self._take(self._left))[: info.size])
                continue
            if info.type in _FILES:
                self._left = _padded(info.size)
            yield info

    async def contents(self, size: int) -> AsyncIterator[bytes]:
        while size:
            piece = await self._some(size)
            size -= len(piece)
            yield bytes(piece)

    async def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += await self._some(size - len(data))
        return data

    async def _some(self, most: int) -> memoryview:
        while not self._rest:
            try:
                self._rest = memoryview(await anext(self._pieces))
            except StopAsyncIteration:
                raise self._broken("the archive is cut off") from None
        piece, self._rest = self._rest[:most], self._rest[most:]
        self._left -= len(piece)
        return piece


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _check_size(info: tarfile.TarInfo) -> None:
    if info.size < 0:
        raise ValueError("a negative size")


async def archive(files: AsyncIterator[tuple[Entry, AsyncIterator[bytes]]]) -> AsyncIterator[bytes]:
    """The archive of these entries, as it is made."""
    async for entry, chunks in files:
        info = tarfile.TarInfo(entry.name.rstrip("/"))
        info.mode = stat.S_IMODE(entry.mode)
        if entry.is_link:
            info.type = tarfile.SYMTYPE
            info.linkname = b"".join([chunk async for chunk in chunks]).decode("utf-8", "surrogateescape")
        elif entry.is_dir:
            info.type = tarfile.DIRTYPE
        else:
            info.size = entry.size
        yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        if info.size:
            async for chunk in chunks:
                yield chunk
            yield b"\0" * (-info.size % _BLOCK)
    yield b"\0" * (2 * _BLOCK)
