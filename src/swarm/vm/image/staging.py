"""Directories that appear whole or not at all, for images, layers and templates.

They are built beside their final place, under a lock, and renamed into it. Who holds a directory's `.lock` owns
everything in it that is named `.building-*`; the next build removes what an interrupted one left there. What was built
is verified by hashes before it is used, and removed when nothing has used it for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from swarm.base import files
from swarm.base.aio import finish_uninterrupted
from swarm.base.log import logger
from swarm.base.process import boot_id
from swarm.base.progress import Progress
from swarm.errors import CommandFailed, HostError, ImageError
from swarm.vm.image.apt import FULL_DISK

log = logger(__name__)

BUILDING: Final = ".building-"
VERIFIED: Final = ".verified"  # the directory of the stamps of images and layers
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM})
_LOCK_SECONDS: Final = 0.5  # a remover holds a directory's lock for a moment


def digest_of(value: object) -> str:
    """The sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- verifying ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file as it was built."""

    path: Path
    size_bytes: int
    sha256: str
    digest: Callable[[Path], str] = files.sha256_of


def damage(parts: Sequence[Part], stamp: Path, *, flushed: bool = True) -> str:
    """What is wrong with files that should be as they were built; '' if nothing is. Raises HostError.

    Hashing 256 MB takes about 0.2 s, so a file is hashed again only if its inode says that it may have changed: the
    file ``stamp`` remembers the inodes. Files that were not ``flushed`` to disk are hashed again after a reboot too.
    """
    known, seen = _known(stamp, flushed), {}
    for part in parts:
        name = part.path.name
        try:
            stat = part.path.stat()
            seen[name] = _inode(stat, flushed)
            if stat.st_size != part.size_bytes:
                return f"{part.path} has {stat.st_size} bytes instead of {part.size_bytes}"
            if known.get(name) != seen[name] and part.digest(part.path) != part.sha256:
                return f"{part.path} is not what was built (its sha256 differs)"
        except OSError as error:
            raise_host_error(error, part.path, denied=not flushed)
            return f"{part.path}: {error.strerror}"
    with contextlib.suppress(OSError):
        if seen == known:
            os.utime(stamp)  # see `last_used`
        else:
            files.make_directory(stamp.parent)
            _write_stamp(stamp, seen, flushed)
    return ""


def stamp(parts: Sequence[Part], stamp: Path, *, flushed: bool = True) -> None:
    """Remember that these files are as they were built: they have just been."""
    with contextlib.suppress(OSError):
        _write_stamp(stamp, {part.path.name: _inode(part.path.stat(), flushed) for part in parts}, flushed)


def raise_host_error(error: Exception, place: Path, *, denied: bool = True) -> None:
    """Raise HostError for an error that says nothing about the file: no descriptors, no memory; with ``denied``, no
    permission either. (An image that can't be read is built again. A template is not: its user may be another.)"""
    if isinstance(error, OSError) and error.errno in (_EXHAUSTED | _DENIED if denied else _EXHAUSTED):
        raise HostError(f"can't look into {place}: {error.strerror}") from error


def _write_stamp(stamp: Path, seen: dict[str, list[int]], flushed: bool) -> None:
    """Only a saving: where it can't be written, the files are hashed each time."""
    told = seen if flushed else {"boot": boot_id(), "files": seen}
    files.write_atomically(stamp, json.dumps(told), mode=0o644 if flushed else 0o600)


def _known(stamp: Path, flushed: bool) -> dict[str, list[int]]:
    try:
        content = json.loads(stamp.read_bytes())
        if flushed:
            return dict(content)
        return dict(content["files"]) if content["boot"] == boot_id() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _inode(stat: os.stat_result, flushed: bool) -> list[int]:
    """What changes whenever the content may have. Not a template's change time: a jailer changes its files' owner."""
    if flushed:
        return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


@contextlib.contextmanager
def used(dir: Path) -> Iterator[None]:
    """For the length of the block, ``dir`` is not `unused` for any process."""
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.locked(dir, shared=True, timeout_seconds=_LOCK_SECONDS))
            held = stack.pop_all()
    except HostError as error:
        # Any user can hold this lock for ever. As long as it is held, nobody can remove the directory either.
        log.warning("can't mark as used", dir=str(dir), error=str(error))
        held = contextlib.ExitStack()
    with held:
        yield


def last_used(dir: Path, stamp: Path) -> float:
    """When it was last verified, else when it was made, in seconds since the epoch. Raises FileNotFoundError."""
    return (stamp if stamp.exists() else dir).stat().st_mtime


def unused(dir: Path, stamp: Path, *, seconds: float) -> bool:
    """True if it was last used longer ago than that, and no live process has it `used`."""
    if time.time() - max(dir.stat().st_mtime, last_used(dir, stamp)) < seconds:
        return False
    fd = files.try_lock(dir)
    if fd is not None:
        os.close(fd)
    return fd is not None


# --- building -------------------------------------------------------------------------------------------------------


def lock(dir: Path, progress: Progress) -> AbstractAsyncContextManager[None]:
    """One build at a time in ``dir``."""

    def waiting() -> None:
        progress("waiting for another build", 0.0)

    return files.locked_async(dir / ".lock", poll_seconds=0.2, create=0o600, waiting=waiting)


@contextlib.contextmanager
def build_errors(what: str, place: Path, consequence: str, *, setting: str = "") -> Iterator[None]:
    """Report a full disk as ImageError, and other errors of files as HostError."""

    def full() -> ImageError:
        return ImageError(files.no_space(place, consequence, setting=setting))

    try:
        yield
    except CommandFailed as error:
        if not FULL_DISK.search(str(error)):
            raise
        raise full() from error
    except OSError as error:
        if files.is_full(error):
            raise full() from error
        raise HostError(f"can't build {what}: {error.filename or place}: {error.strerror or error}") from error


def sweep(dir: Path) -> None:
    """Remove what interrupted builds left. The caller holds the lock, so no live build owns any of it."""
    for left in dir.glob(f"{BUILDING}*"):
        log.info("removing what an interrupted build left", path=str(left))
        _remove(left)


async def discard(stage: Path) -> None:
    """Remove a directory while its lock is held. Not cancellable: a thread that goes on removing would take away what
    the next holder of the lock makes there."""
    await finish_uninterrupted(asyncio.to_thread(_remove, stage))


def _remove(stage: Path) -> None:
    for _ in range(50):  # a program of that build may be dying just now, and still write
        shutil.rmtree(stage, ignore_errors=True)
        if not stage.exists():
            break
        time.sleep(0.02)


@contextlib.asynccontextmanager
async def staged(dir: Path) -> AsyncIterator[Path]:
    """A new directory in ``dir``, removed at the end if it is still there."""
    stage = Path(tempfile.mkdtemp(prefix=BUILDING, dir=dir))
    try:
        yield stage
    finally:
        await discard(stage)


def move_in(stage: Path, final: Path) -> None:
    """Rename ``stage`` to ``final``, which replaces a torn or older one. It is on disk before it has its name."""
    for path in [*stage.rglob("*"), stage]:
        _fsync(path)
    old = None
    if final.exists():
        old = Path(tempfile.mkdtemp(prefix=BUILDING, dir=final.parent))
        final.rename(old / "old")
    stage.rename(final)
    _fsync(final.parent)
    if old is not None:
        _remove(old)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    files.write_atomically(path, json.dumps(manifest, indent=1, sort_keys=True))


def remove(dir: Path, name: str) -> None:
    """Remove the image or layer ``name``. Renamed first, so that nobody finds a part of it."""
    doomed = dir / f"{BUILDING}removed-{name}"
    (dir / name).rename(doomed)
    (dir / VERIFIED / name).unlink(missing_ok=True)
    shutil.rmtree(doomed)
