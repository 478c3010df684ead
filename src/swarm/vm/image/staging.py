"""Files that appear whole or not at all: what is built is built beside its place, under a lock, and renamed in.

Whoever holds a directory's `.lock` owns everything in it that is named `.building-*`; what a dead builder left goes
when the next one starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from swarm.base.aio import finish_uninterrupted

log = structlog.get_logger(__name__)

BUILDING: Final = ".building-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file as it was built."""

    path: Path
    size_bytes: int
    sha256: str


def damage(parts: Sequence[Part], stamp: Path) -> str:
    """What is wrong with files that nobody should have changed; '' when nothing is.

    What was hashed before, from the very inodes that are there now, is not hashed again: ``stamp`` remembers them.
    """
    try:
        known = json.loads(stamp.read_text())
    except (OSError, ValueError):
        known = {}
    seen: dict[str, list[int]] = {}
    for part in parts:
        name = part.path.name
        try:
            stat = part.path.stat()
            seen[name] = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            if stat.st_size != part.size_bytes:
                return f"{part.path} has {stat.st_size} bytes instead of {part.size_bytes}"
            if known.get(name) != seen[name] and file_digest(part.path) != part.sha256:
                return f"{part.path} is not what was built (its sha256 differs)"
        except OSError as error:
            return f"{part.path}: {error.strerror}"
    # Only a saving: a store that can't be written to is hashed each time.
    with contextlib.suppress(OSError):
        if seen == known:
            os.utime(stamp)  # when it was last used: see `unused`
        else:
            stamp.parent.mkdir(exist_ok=True)
            replace(stamp, json.dumps(seen).encode())
    return ""


@contextlib.contextmanager
def used(dir: Path) -> Iterator[None]:  # noqa: A002
    """For the length of the block, in every process, what is in ``dir`` is not `unused`."""
    fd = os.open(dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def unused(dir: Path, stamp: Path, *, seconds: float) -> bool:  # noqa: A002
    """Was it made, and last looked at by `damage`, longer ago than that, and does no live process have it `used`?"""
    last = max((path.stat().st_mtime for path in (dir, stamp) if path.exists()), default=0.0)
    if time.time() - last < seconds:
        return False
    fd = os.open(dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.asynccontextmanager
async def locked(path: Path, waiting: Callable[[], None]) -> AsyncIterator[None]:
    """Hold the flock on ``path``. It is the kernel's: a holder that dies, however it dies, has let go of it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                await asyncio.sleep(0.2)  # a blocking flock could not be cancelled
        yield
    finally:
        os.close(fd)


def sweep(dir: Path) -> None:  # noqa: A002
    """Remove what dead builds left. The caller holds the lock, so no live build owns any of it."""
    for left in dir.glob(f"{BUILDING}*"):
        log.info("removing what an interrupted build left", path=str(left))
        _remove(left)


def _remove(stage: Path) -> None:
    for _ in range(50):  # a program of that build may be dying just now, and still write
        shutil.rmtree(stage, ignore_errors=True)
        if not stage.exists():
            break
        time.sleep(0.02)


@contextlib.asynccontextmanager
async def staged(dir: Path) -> AsyncIterator[Path]:  # noqa: A002
    """A directory beside the final one; whatever is in it at the end goes."""
    stage = Path(tempfile.mkdtemp(prefix=BUILDING, dir=dir))
    try:
        yield stage
    finally:
        await finish_uninterrupted(asyncio.to_thread(_remove, stage))


def move_in(stage: Path, final: Path) -> None:
    """Rename ``stage`` to ``final``, on disk before it has its name; a torn or older ``final`` makes way."""
    for path in [*stage.rglob("*"), stage]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    if final.exists():
        final.rename(Path(tempfile.mkdtemp(prefix=BUILDING, dir=final.parent)) / "old")
    stage.rename(final)
    fd = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    sweep(final.parent)


def replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
