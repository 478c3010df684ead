"""Trees as tar archives. Whoever wrote one, it is read a header at a time, none of which may hold much."""

from __future__ import annotations

import stat
import tarfile
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import BinaryIO, Final

from swarm.base import trees
from swarm.base.trees import Entry
from swarm.errors import UsageError

_BLOCK: Final = 512
_MAX_EXTENSION_BYTES: Final = 64 << 10  # a long name, or a PAX header
_MAX_EXTENSIONS: Final = 8  # before one member
_MAX_MEMBERS: Final = 2 * trees.MAX_ENTRIES  # files and directories
_MAX_NAMES: Final = 16 << 20  # characters of all names, those of directories above them included
_MAX_DEPTH: Final = 100
_PIECE_BYTES: Final = 1 << 20
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


class _Reader:
    """The members of an archive, their extended headers applied."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = 0  # of the present member's contents, padding included

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        said: dict[str, str] = {}
        extensions = 0
        while True:
            while self._left:
                self._read(min(self._left, _PIECE_BYTES))
            header = self._file.read(_BLOCK)
            if not header.strip(b"\0"):
                return
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                _check_size(info)
                if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
                    extensions += 1
                    if extensions > _MAX_EXTENSIONS:
                        raise ValueError(f"a member has more than {_MAX_EXTENSIONS} extended headers")
                    said |= self._extension(info)
                    continue
                info.name, info.linkname = said.get("path", info.name), said.get("linkpath", info.linkname)
                info.size = int(said.get("size", info.size))
                _check_size(info)
            except (tarfile.TarError, ValueError) as error:
                raise UsageError(f"that is not a tar archive: {error}") from None
            if _SPARSE in said:
                info.type = tarfile.GNUTYPE_SPARSE
            said, extensions = {}, 0
            if info.type in _FILES:
                self._left = -(-info.size // _BLOCK) * _BLOCK
            yield info

    def _extension(self, info: tarfile.TarInfo) -> dict[str, str]:
        if info.size > _MAX_EXTENSION_BYTES:
            raise ValueError("a header is too large")
        self._left = -(-info.size // _BLOCK) * _BLOCK
        data = self._read(self._left)[: info.size]
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
