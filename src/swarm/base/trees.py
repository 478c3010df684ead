"""Directory trees as values: packed into a manifest and parts that a database can hold, and written to a disk again.

The manifest is JSON: ``{"tree": [[name, mode, size], …], "parts": [digest, …]}``. A mode has the type of its file in it
(`stat`), and a directory's name ends in '/'; only empty ones are listed. The parts are the contents of all files (of a
link: its target), one after the other, cut every MiB, compressed, as JSON texts. Both are named by their SHA-256, so
the same tree is kept once.

Whoever wrote a tree, it is checked when it is read: a guest chooses names, and other programs write the database.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import os
import secrets
import stat
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.errors import Conflict, HostError, StoreError, UsageError

PART_BYTES: Final = 1 << 20
MAX_BYTES: Final = 256 << 20  # of a tree's files together; also agentd's limit for one request
MAX_ENTRIES: Final = 50_000
_MAX_NAME_BYTES: Final = 4000
_BATCH_CHARS: Final = 4 << 20
_MAX_MANIFEST_BYTES: Final = 16 << 20
DIR: Final = stat.S_IFDIR | 0o755
_TYPES: Final = (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a link or an empty directory. ``size`` is that of its contents, or of a link's target."""

    name: str
    mode: int
    size: int

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True, slots=True)
class Tree:
    entries: Sequence[Entry]
    parts: Sequence[str]  # digests

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries)

    def offsets(self) -> Iterator[tuple[Entry, int]]:
        """Each entry, and where its contents begin."""
        at = 0
        for entry in self.entries:
            yield entry, at
            at += entry.size


Part = tuple[str, str]  # digest and text


def is_plain(name: str) -> bool:
    """Is this a relative path that leads nowhere else?"""
    parts = name.removesuffix("/").split("/")
    try:
        fits = len(os.fsencode(name)) <= _MAX_NAME_BYTES and all(len(os.fsencode(part)) <= 255 for part in parts)
    except UnicodeEncodeError:
        return False
    return fits and "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def is_place(name: str) -> bool:
    """May files be put there, below /work? ``input.json`` and ``output.json`` are the agent's own."""
    return is_plain(name) and name.rstrip("/") not in ("input.json", "output.json")


def names_git(name: str) -> bool:
    """Is this a .git, or in one? Its hooks and settings name programs, which git runs."""
    return ".git" in name.lower().split("/")


def runs_git(name: str) -> bool:
    """Would git run, here, programs that what has this name names? If it is a .git or in one, and if it is the HEAD
    that makes a directory a repository, whose settings then count. Nothing of that may come from a guest. A directory's
    name ends in '/'."""
    return names_git(name) or name.rpartition("/")[2] == "HEAD"


def refuse_repository(place: Path) -> None:
    """Raises Conflict if git would take this directory, or one above it, for a repository: what a guest puts there may
    be a hook of it. Git looks upward likewise, until there is a work tree."""
    here = Path(os.path.realpath(place))
    for above in (here, *here.parents):
        if os.path.lexists(above / "HEAD"):
            raise Conflict(f"{above} has a HEAD in it: git may take it for a repository, and run what is put there")
        if os.path.lexists(above / ".git"):
            return


def may_come(name: str, target: str) -> bool:
    """May a link be made that comes from a guest? Not one into a .git or to a HEAD, though there be none yet: whoever
    writes to it later would write there."""
    return stays_within(name, target) and not runs_git(target)


def stays_within(name: str, target: str) -> bool:
    """Does the link ``name`` lead to a place below the top of its tree, whatever else is a link there? Only if '..'
    stands nowhere but at the beginning: behind a name, it leaves what that name, perhaps a link, leads to."""
    parts = target.split("/")
    ups = 0
    while ups < len(parts) and parts[ups] in ("..", "."):
        ups += 1
    plain = ".." not in parts[ups:] and "\0" not in target and target != ""
    return plain and not target.startswith("/") and parts[:ups].count("..") <= name.count("/")


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(files: Iterable[tuple[Entry, Iterable[bytes]]]) -> Iterator[Part]:
    """The parts of these files as they are read, and the manifest at last. Raises UsageError."""
    entries: list[list[object]] = []
    parts: list[str] = []
    data, total = bytearray(), 0
    for entry, contents in files:
        if not is_plain(entry.name):
            raise UsageError(f"{ascii(entry.name)[:300]} can't be sent: the name is too long")
        entries.append([entry.name, entry.mode, entry.size])
        total += entry.size
        if len(entries) > MAX_ENTRIES:
            raise UsageError(f"there are more than {MAX_ENTRIES:,} files; the limit is {MAX_ENTRIES:,}")
        if total > MAX_BYTES:
            raise UsageError(f"the files have more than {MAX_BYTES >> 20} MiB together; the limit is that")
        left = entry.size
        for piece in contents:
            data += piece
            left -= len(piece)
            while len(data) >= PART_BYTES:
                part = _part(bytes(data[:PART_BYTES]))
                del data[:PART_BYTES]
                parts.append(part[0])
                yield part
        if left:
            raise UsageError(f"{ascii(entry.name)[:300]} changed while it was read; try again")
    if data:
        part = _part(bytes(data))
        parts.append(part[0])
        yield part
    text = json.dumps({"tree": entries, "parts": parts}, separators=(",", ":"))
    if len(text) > _MAX_MANIFEST_BYTES:
        raise UsageError(f"the names of the files take more than {_MAX_MANIFEST_BYTES >> 20} MiB")
    yield hashlib.sha256(text.encode()).hexdigest(), text


def batch(parts: Iterator[Part]) -> list[Part]:
    """The next parts, for one transaction. Empty at the end."""
    taken: list[Part] = []
    size = 0
    for part in parts:
        taken.append(part)
        size += len(part[1])
        if size >= _BATCH_CHARS:
            break
    return taken


def _part(data: bytes) -> Part:
    text = f'"{base64.b64encode(zlib.compress(data, 1)).decode()}"'
    return hashlib.sha256(text.encode()).hexdigest(), text


def manifest(text: str) -> Tree:
    """Raises UsageError."""
    try:
        if len(text) > _MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        value = json.loads(text)
        entries = [Entry(name, mode, size) for name, mode, size in value["tree"]]
        parts = list(value["parts"])
        sane = all(isinstance(part, str) and len(part) == 64 for part in parts) and len(entries) <= MAX_ENTRIES
        if not sane or not all(map(is_sane, entries)):
            raise ValueError("a value is out of its bounds")
        tree = Tree(entries, parts)
        if tree.bytes > MAX_BYTES or -(-tree.bytes // PART_BYTES) != len(parts):
            raise ValueError("sizes and parts don't fit")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"that artifact is no list of files: {error}") from None
    return tree


def is_sane(entry: Entry) -> bool:
    """Is this what a manifest may hold?"""
    if not isinstance(entry.name, str) or not all(type(one) is int and one >= 0 for one in (entry.mode, entry.size)):
        return False
    known = stat.S_IFMT(entry.mode) in _TYPES and entry.is_dir == entry.name.endswith("/") and is_plain(entry.name)
    return known and not (entry.is_dir and entry.size) and (entry.size < 4096 or not entry.is_link)


def content(digest: str, text: str) -> bytes:
    """What is in a part. Raises StoreError if it is damaged."""
    try:
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError
        reader = zlib.decompressobj()
        data = reader.decompress(base64.b64decode(text[1:-1], validate=True), PART_BYTES)
        if not reader.eof:
            raise ValueError
        return data
    except (ValueError, binascii.Error, zlib.error):
        raise StoreError(f"the artifact {digest[:12]} in the table artifacts is damaged") from None


class Contents:
    """Reads contents of a tree, part by part. ``load`` gets a digest and returns the part's text."""

    def __init__(self, parts: Sequence[str], load: Callable[[str], Awaitable[str]]) -> None:
        self._parts = parts
        self._load = load
        self._number, self._data = -1, b""

    async def chunks(self, offset: int, size: int) -> AsyncIterator[bytes]:
        while size > 0:
            number, within = divmod(offset, PART_BYTES)
            if number != self._number:
                digest = self._parts[number]
                self._number, self._data = number, await asyncio.to_thread(content, digest, await self._load(digest))
            piece = self._data[within : within + size]
            if not piece:
                raise StoreError(f"the artifact {self._parts[number][:12]} in the table artifacts is too short")
            yield piece
            offset, size = offset + len(piece), size - len(piece)


# --- a directory of this host -----------------------------------------------------------------------------------------


def walk(top: Path) -> Iterator[str]:
    """The names of all files, links and empty directories below ``top``, sorted."""
    for here, dirs, files in os.walk(top, onerror=_raise):
        dirs.sort()
        below = Path(here).relative_to(top).as_posix()
        prefix = "" if below == "." else f"{below}/"
        links = [name for name in dirs if (Path(here) / name).is_symlink()]
        yield from (f"{prefix}{name}" for name in sorted([*files, *links]))
        if not dirs and not files and prefix:
            yield prefix


def read(top: Path, names: Iterable[str], *, prefix: str = "") -> Iterator[tuple[Entry, Iterable[bytes]]]:
    """For `pack`. Raises UsageError for a special file, and a link that leads out of ``top``."""
    for name in names:
        path = top / name
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            yield Entry(f"{prefix}{name.rstrip('/')}/", DIR, 0), ()
        elif stat.S_ISLNK(found.st_mode):
            target = os.readlink(path)  # noqa: PTH115  its text, as it stands
            if not stays_within(name, target):
                raise UsageError(f"{path} is a link to {target!r}, which leads out of {top}: it can't be sent to a VM")
            data = os.fsencode(target)
            yield Entry(f"{prefix}{name}", stat.S_IFLNK | 0o777, len(data)), (data,)
        elif stat.S_ISREG(found.st_mode):
            mode = stat.S_IFREG | stat.S_IMODE(found.st_mode) & 0o777
            yield Entry(f"{prefix}{name}", mode, found.st_size), _read(path, found.st_size)
        else:
            raise UsageError(f"{path} is a socket, a device or a pipe: it can't be sent to a VM")


def _read(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while size > 0 and (data := file.read(min(size, PART_BYTES))):
            size -= len(data)
            yield data
        if file.read(1):  # one that grows, or one of /proc, whose size is 0 whatever is in it
            raise UsageError(f"{path} has more in it than its size says: copy it, and send the copy")


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _raise(error: OSError) -> None:
    raise UsageError(f"{error.filename} can't be read: {error.strerror}") from None


class Target:
    """A directory of this host into which files of a tree are written: never outside it, and through no link; nor,
    unless ``git``, into what git may take for a repository. Raises Conflict for that, and if something else has its
    name, HostError if it can't be made."""

    def __init__(self, top: Path, *, git: bool = False) -> None:
        if not git:
            refuse_repository(top)
        try:
            top.mkdir(parents=True, exist_ok=True)
            self._top = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileExistsError, NotADirectoryError):
            raise Conflict(f"{top} is not a directory, or leads through something that is none") from None
        except OSError as error:
            raise HostError(f"can't make the directory {top}: {error.strerror}") from None
        self.path = top
        self._git = git
        self._last = "", -1  # a directory in it, and a descriptor

    def close(self) -> None:
        for fd in (self._top, self._last[1]):
            if fd >= 0:
                os.close(fd)

    def holds(self, entry: Entry) -> bool:
        """Would writing it replace something?"""
        here, name = self._parent(entry.name, create=False)
        if here is None:
            return False
        try:
            found = os.lstat(name, dir_fd=here)
            return not (entry.is_dir and stat.S_ISDIR(found.st_mode))
        except FileNotFoundError:
            return False
        finally:
            os.close(here)

    async def write(self, entry: Entry, chunks: AsyncIterator[bytes]) -> None:
        """Raises Conflict where a directory or a link is in the way. Replaces a file. Who calls it has asked
        `stays_within` about a link."""
        here, name = self._parent(entry.name, create=True)
        assert here is not None
        try:
            if entry.is_dir:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, stat.S_IMODE(entry.mode) & 0o777 | 0o700, dir_fd=here)
                return
            beside = f".{secrets.token_hex(8)}.part"  # renamed at the end: nobody sees half of it
            try:
                if entry.is_link:
                    os.symlink(os.fsdecode(b"".join([chunk async for chunk in chunks])), beside, dir_fd=here)
                else:
                    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=here)
                    try:
                        async for chunk in chunks:
                            _write(fd, chunk)
                        os.fchmod(fd, entry.mode & 0o755)  # whoever wrote the tree chose it
                    finally:
                        os.close(fd)
                os.rename(beside, name, src_dir_fd=here, dst_dir_fd=here)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside, dir_fd=here)
                raise
        except IsADirectoryError:
            raise Conflict(f"{self.path / entry.name} is a directory") from None
        except PermissionError as error:
            raise HostError(f"can't write {self.path / entry.name}: {error.strerror}") from None
        finally:
            os.close(here)

    def _refuse_repository(self, fd: int, folder: str) -> None:
        if self._git:
            return
        with contextlib.suppress(OSError):
            os.lstat("HEAD", dir_fd=fd)
            os.close(fd)
            place = self.path / folder
            raise Conflict(f"{place} has a HEAD in it: git may take it for a repository, and run what is put there")

    def _parent(self, path: str, *, create: bool) -> tuple[int | None, str]:
        """The directory of a file, as a descriptor, and the file's name there. It is looked for from the last one on,
        which is most often the same, or one above it: a tree may be deep."""
        if not is_plain(path):
            raise Conflict(f"{ascii(path)[:300]} is not a name below {self.path}")
        folder, _, name = path.rstrip("/").rpartition("/")
        known, here = self._last
        if here < 0 or not (known == "" or folder == known or folder.startswith(f"{known}/")):
            known, here = "", self._top
        here = os.dup(here)
        for part in folder[len(known) :].strip("/").split("/") if folder != known else ():
            try:
                below = _open_dir(here, part, create=create)
            except FileNotFoundError:
                return None, name
            except NotADirectoryError:  # also a link
                raise Conflict(f"{self.path / path} can't be written: {part!r} is a link or a file there") from None
            finally:
                os.close(here)
            here = below
            self._refuse_repository(here, folder)
        if self._last[1] >= 0:
            os.close(self._last[1])
        self._last = folder, os.dup(here)
        return here, name


def _open_dir(parent: int, name: str, *, create: bool) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent)
    return os.open(name, flags, dir_fd=parent)
