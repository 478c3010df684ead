"""An agent's files: named by their content, installed read-only, unpacked from archives that may be hostile."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from swarm.agents.package import MANIFEST, read
from swarm.base import files, trees
from swarm.base.aio import finish_uninterrupted
from swarm.errors import Conflict, UsageError
from swarm.fields import IN_WORDS, NAME
from swarm.model import Agent

MAX_BUNDLE_BYTES: Final = 256 << 20
MAX_FILES: Final = 20_000
_RESTORED: Final = ".restored-"
_IN_MEMORY_BYTES: Final = 4 << 20
_MAX_PATH_BYTES: Final = 1024
_MAX_HEADER_BYTES: Final = 1 << 20  # what tarfile may read at once: names and extended headers
_IGNORED: Final = frozenset({"__pycache__", ".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache"})


def install(directory: Path, into: Path) -> Agent:
    """Copy an agent to ``into/<name>-<version>-<digest>``, read-only, and return it with that path. Idempotent.

    Raises UsageError for a bad manifest and for files that an agent can't have (links, devices, too many, too large).
    """
    agent = read(directory)
    digest = bundle_digest(directory)
    target = into / f"{agent.name}-{agent.version}-{digest[:12]}"
    if not target.exists():
        files.make_directory(into)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=into))
        try:
            for path in _files(directory):
                copy = partial / path.relative_to(directory)
                files.make_directory(copy.parent)
                if path.is_symlink():
                    copy.symlink_to(path.readlink())
                    continue
                shutil.copyfile(path, copy)
                copy.chmod(0o555 if os.access(path, os.X_OK) else 0o444)
            if bundle_digest(partial) != digest:
                raise Conflict(f"{directory} changed while it was being copied; try again")
            partial.chmod(0o755)
            try:
                partial.rename(target)
            except OSError:
                if not target.exists():  # if it does, another process installed the same content first
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return dataclasses.replace(agent, path=target)


def bundle_digest(directory: Path) -> str:
    """SHA-256 of the names, execute bits, contents and links of an agent's files; independent of their location."""
    digest = hashlib.sha256()
    total = 0
    for count, path in enumerate(_files(directory), 1):
        total += path.lstat().st_size
        if count > MAX_FILES or total > MAX_BUNDLE_BYTES:
            raise UsageError(
                f"{directory} is too large for an agent: at most {MAX_FILES} files and {MAX_BUNDLE_BYTES >> 20} MiB"
            )
        if path.is_symlink():
            name = json.dumps(path.relative_to(directory).as_posix())
            digest.update(f"{name} link {json.dumps(os.readlink(path))}\n".encode())  # noqa: PTH115  as it stands
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        name = json.dumps(path.relative_to(directory).as_posix())
        digest.update(f"{name} {os.access(path, os.X_OK):d} {content}\n".encode())
    return digest.hexdigest()


def packed(directory: Path) -> IO[str]:
    """An installed agent as `unpacked` takes it: parts of at most about `trees.PART_BYTES`, one in a line, and the list
    of its files at last. Raises UsageError."""
    file = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, mode="w+", encoding="ascii")  # noqa: SIM115  the caller's
    try:
        names = (path.relative_to(directory).as_posix() for path in _files(directory))
        for _, text in trees.pack(trees.read(directory, names)):
            file.write(f"{text}\n")
        return file
    except BaseException:
        file.close()
        raise


async def unpacked(name: str, into: Path, load: Callable[[int], Awaitable[str | None]]) -> None:
    """Make the copy ``into/<name>``, as `install` does, of what `packed` made; unless it is there. ``load`` gets the
    number of a part; 0 is the list of files. Raises UsageError if something lacks or was changed."""
    damaged = UsageError(f"what the database has of its files (table packages, {name}) is damaged")
    text = await load(0)
    if text is None:
        raise damaged
    try:
        tree = await asyncio.to_thread(trees.manifest, text)
    except UsageError:
        raise damaged from None
    numbers = {digest: number for number, digest in enumerate(tree.parts, 1)}

    async def part(digest: str) -> str:
        found = await load(numbers[digest])
        if found is None or hashlib.sha256(found.encode()).hexdigest() != digest:
            raise damaged
        return found

    await asyncio.to_thread(files.make_directory, into)
    async with files.locked_async(into, poll_seconds=0.05):
        await asyncio.to_thread(_remove_left, into)
        if (into / name).exists():
            return
        partial = Path(tempfile.mkdtemp(prefix=_RESTORED, dir=into))
        try:
            await _write(tree, trees.Contents(tree.parts, part), partial)
            if (await asyncio.to_thread(bundle_digest, partial))[:12] != name[-12:]:
                raise damaged
            partial.chmod(0o755)
            partial.rename(into / name)
        finally:
            await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True))


def _remove_left(into: Path) -> None:
    """What an engine left that was killed. Who makes one holds the lock."""
    for left in into.glob(f"{_RESTORED}*"):
        shutil.rmtree(left, ignore_errors=True)


async def _write(tree: trees.Tree, contents: trees.Contents, partial: Path) -> None:
    target = trees.Target(partial, git=True)  # it was added here, by who may write to the database
    try:
        for entry, offset in tree.offsets():
            data = b"".join([chunk async for chunk in contents.chunks(offset, entry.size)]) if entry.is_link else b""
            if entry.is_link and not trees.stays_within(entry.name, os.fsdecode(data)):
                raise UsageError(f"{entry.name!r} is a link that leads out of its directory")
            await target.write(entry, contents.chunks(offset, entry.size))
            await asyncio.sleep(0)  # thousands of small files must not keep the event loop from all else
    finally:
        target.close()


def builtin() -> list[Path]:
    """The directories of the agents that ship with Swarm."""
    return _packages("agents")


def _packages(kind: str) -> list[Path]:
    root = Path(str(resources.files("swarm"))) / "builtin" / kind
    return sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))


def _files(directory: Path, top: Path | None = None) -> Iterator[Path]:
    """Every file and link of an agent, in a fixed order. Links stay within ``top``, the agent's directory."""
    top = top or directory
    for path in sorted(directory.iterdir()):
        if path.name in _IGNORED or path.name.endswith(".pyc"):
            continue
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield from _files(path, top)
        elif stat.S_ISREG(mode):
            yield path
        elif not stat.S_ISLNK(mode):
            raise UsageError(f"{path} is a special file; an agent can only have files, directories and links to them")
        elif not trees.stays_within(path.relative_to(top).as_posix(), os.readlink(path)):  # noqa: PTH115
            raise UsageError(f"{path} is a link that leads out of {top}; in an agent, links stay within its directory")
        else:
            yield path


def templates() -> list[str]:
    """The languages for which `swarm agent init` has a template."""
    return [path.name for path in _packages("templates")]


def template(language: str, name: str, into: Path) -> Path:
    """Write a new agent's files into the directory ``into``, which must be empty or new. Returns its manifest."""
    source = next((path for path in _packages("templates") if path.name == language), None)
    if source is None:
        raise UsageError(f"there is no template for {language!r}; use one of {', '.join(templates())}")
    if not re.fullmatch(NAME, name):
        raise UsageError(f"an agent's name must be {IN_WORDS[NAME]}, but is {name!r}")
    if into.exists() and any(into.iterdir()):
        raise Conflict(f"{into} is not empty; choose another directory")
    into.mkdir(parents=True, exist_ok=True)
    for path in _files(source):
        copy = into / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o755 if os.access(path, os.X_OK) else 0o644)
    manifest = into / MANIFEST
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace("name: my-agent", f"name: {name}"), encoding="utf-8"
    )
    return manifest


# --- archives -------------------------------------------------------------------------------------------------------


@contextmanager
def opened(source: Path) -> Iterator[Path]:
    """An agent's directory, given that directory or a .tar.gz, which is unpacked until the block ends."""
    if source.is_dir():
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="swarm-agent-") as scratch:
        yield unpack(source, Path(scratch))


def unpack(archive: Path, into: Path) -> Path:
    """Unpack a .tar.gz into an empty directory. Returns the directory of `agent.yaml`: that one or its only child.

    Raises UsageError for anything but regular files and directories below it: links, devices, absolute names, `..`,
    duplicate names, sparse files, too many files, too many bytes (unpacked).
    """
    try:
        with archive.open("rb") as file, gzip.open(file, "rb") as plain:
            reader = _Bounded(plain)
            with tarfile.open(fileobj=reader, mode="r:", errorlevel=1) as tar:
                _unpack(tar, into, archive)
    except FileNotFoundError:
        raise UsageError(f"{archive} does not exist; name an agent's directory, or a .tar.gz of one") from None
    except gzip.BadGzipFile:
        if archive.name.endswith((".gz", ".tgz")):
            raise UsageError(f"{archive} can't be unpacked: it is not gzipped; make it by `tar -czf`") from None
        own = (archive.parent / MANIFEST).is_file()
        what = f"name its directory, {archive.parent}" if own else f"name an agent's directory (it has {MANIFEST})"
        raise UsageError(
            f"{archive} is a file, not an agent: {what}, or a .tar.gz of one; `swarm agent init` makes a new agent"
        ) from None
    except RecursionError:  # tarfile recurses for each header that belongs to the next one
        raise UsageError(f"{archive} can't be unpacked: too many headers before one file") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError) as error:
        raise UsageError(f"{archive} can't be unpacked: {error}") from None
    entries = list(into.iterdir())
    if not (into / MANIFEST).exists() and len(entries) == 1 and entries[0].is_dir():
        return entries[0]
    return into


def _unpack(tar: tarfile.TarFile, into: Path, archive: Path) -> None:
    seen: set[PurePosixPath] = set()
    total = 0
    for count, member in enumerate(tar, 1):
        name = PurePosixPath(member.name)
        if count > MAX_FILES:
            raise UsageError(f"{archive} has more than {MAX_FILES} files")
        bad = name.is_absolute() or ".." in name.parts or "\0" in member.name or "\\" in member.name
        if bad or len(os.fsencode(member.name)) > _MAX_PATH_BYTES or any(len(os.fsencode(p)) > 255 for p in name.parts):
            raise UsageError(f"{archive} has a file named {member.name[:200]!r}, which is not allowed in an agent")
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None
        if not plain and not member.isdir():
            raise UsageError(f"{archive} has {member.name[:200]!r}, which is a link or a special file")
        if name in seen or not name.parts:
            if member.isdir():
                continue
            raise UsageError(f"{archive} has {member.name[:200]!r} twice")
        seen.add(name)
        target = into.joinpath(*name.parts)
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        total += member.size
        if total > MAX_BUNDLE_BYTES:
            raise UsageError(f"{archive} has more than {MAX_BUNDLE_BYTES >> 20} MiB of files")
        target.parent.mkdir(parents=True, exist_ok=True)
        content = tar.extractfile(member)
        assert content is not None
        with content, target.open("xb") as copy:
            shutil.copyfileobj(content, copy, 64 << 10)
        target.chmod(0o755 if member.mode & 0o100 else 0o644)


class _Bounded:
    """A file that limits what is read from it: a small archive may unpack to gigabytes of headers."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too large")
        data = self._file.read(size)
        self._check(self._file.tell())
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            self._check(offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, position: int) -> None:
        if position > MAX_BUNDLE_BYTES + MAX_FILES * 2048:
            raise tarfile.ReadError(f"more than {MAX_BUNDLE_BYTES >> 20} MiB")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
