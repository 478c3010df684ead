"""Files: replaced atomically, locked between processes, hashed; and what to say when a disk is full."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from swarm.errors import HostError

_NO_ROOM_BYTES = 64 << 10
_BLOCK_BYTES: Final = 1 << 20
_PART_BYTES: Final = 8 << 20
_HASHERS: Final = 2
_ZEROS: Final = bytes(_BLOCK_BYTES)


def write_atomically(path: Path, data: bytes | str, *, mode: int = 0o644, flush: bool = False) -> None:
    """Write or replace a file: a reader finds the old content or the new, never a part of it.

    ``mode``: its permissions, whatever the umask. ``flush``: the content is on disk before it has the name.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    partial.unlink(missing_ok=True)  # of a dead process that had our pid
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            os.fchmod(fd, mode)
            if flush:
                file.flush()
                os.fsync(fd)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_own(path: Path) -> bytes:
    """A small file of a fixed name, such as Swarm's own. Raises OSError, and ValueError for what is no file: nothing
    waits for a pipe that stands in its place."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is not a file")
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def open_to_append(path: Path) -> BinaryIO:
    """Raises OSError, also for a pipe that nobody reads: opening it would take until somebody does."""
    file = open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))  # noqa: SIM115
    os.set_blocking(file.fileno(), True)
    return file


def real(path: Path) -> Path:
    """Without links. Unlike `Path.resolve`, it does not fail for links that lead to themselves: what opens it does."""
    return Path(os.path.realpath(path))


def make_directory(path: Path, mode: int = 0o755) -> None:
    """Make a directory with these permissions, and its missing parents with 0755, whatever the umask: 077 would keep
    from agents and VMMs what they must read, and with 0 any user could change it. One that exists stays as it is."""
    for parent in reversed(path.parents):
        if not parent.exists():
            _make(parent, 0o755)
    _make(path, mode)


def _make(path: Path, mode: int) -> None:
    try:
        path.mkdir(mode)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        path.chmod(mode)


_MOUNTED: Final = {"ro": os.ST_RDONLY, "noexec": os.ST_NOEXEC, "nodev": os.ST_NODEV}


def mounted(place: Path, *forbidden: str) -> str:
    """Which of these options ('ro', 'noexec', 'nodev') the file system has on which the place is or will be; or ''."""
    there = next(path for path in (place, *place.parents) if path.exists())
    flags = os.statvfs(there).f_flag
    return ", ".join(name for name in forbidden if flags & _MOUNTED[name])


def try_lock(path: Path, *, shared: bool = False, create: int | None = None) -> int | None:
    """A descriptor that holds the lock (flock) on a file or directory until it is closed; None if another holds it.

    The kernel releases the lock when the process ends, however it ends. ``create``: the permissions of a lock file that
    is made if there is none. Who may read a file or directory may lock it, and keep the lock for ever.
    """
    fd = _open(path, create)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return fd


@contextmanager
def locked(path: Path, *, shared: bool = False, timeout_seconds: float = 10.0) -> Iterator[None]:
    """Hold the lock on a file or directory for the length of the block. Blocks the thread until it is free; raises
    HostError if it doesn't become free. (Tried again and again: a thread in a blocking flock can't be stopped.)"""
    deadline = time.monotonic() + timeout_seconds
    while (fd := try_lock(path, shared=shared)) is None:
        if time.monotonic() > deadline:
            raise HostError(
                f"another process has held the lock on {path} for more than {timeout_seconds:g} s: "
                f"find it with `lsof {path}`"
            )
        time.sleep(0.005)
    try:
        yield
    finally:
        os.close(fd)


@asynccontextmanager
async def locked_async(
    path: Path,
    *,
    poll_seconds: float,
    shared: bool = False,
    create: int | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> AsyncIterator[None]:
    """`locked`, for coroutines: tried every ``poll_seconds``, since a blocking flock can't be cancelled. ``waiting`` is
    called before each further try; what it raises ends the waiting."""
    while (fd := try_lock(path, shared=shared, create=create)) is None:
        waiting()
        await asyncio.sleep(poll_seconds)
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def host_errors(what: str) -> Iterator[None]:
    """Report errors of the operating system as HostError. ``what`` could not be done, as in "can't write the file"."""
    try:
        yield
    except OSError as error:
        raise HostError(f"{what}: {error.strerror or error}") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sparse_sha256_of(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """A digest of a file's content that takes as long as its data, however large its holes are.

    It covers the size, and place and content of each block that isn't all zeros: so it is the same for a copy with
    other holes. Parts of the file are hashed at the same time. ``check`` is called before each block; what it raises
    ends the work.
    """
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(_HASHERS, thread_name_prefix="hash") as threads:
        fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size}\n".encode())
        for part in threads.map(lambda start: _sparse_part(fd, start, check), _parts_with_data(fd, size)):
            digest.update(part)
    return digest.hexdigest()


def _parts_with_data(fd: int, size: int) -> Iterator[int]:
    at = 0
    while at < size and (data_at := _data_after(fd, at)) is not None:
        yield (start := data_at - data_at % _PART_BYTES)
        at = start + _PART_BYTES


def _sparse_part(fd: int, start: int, check: Callable[[], None]) -> bytes:
    """b"" if it is all zeros."""
    digest, at, empty = hashlib.sha256(), start, True
    while at < start + _PART_BYTES:
        check()
        data_at = _data_after(fd, at)
        if data_at is None or data_at >= start + _PART_BYTES:
            break
        at = data_at - data_at % _BLOCK_BYTES
        block = os.pread(fd, _BLOCK_BYTES, at)
        if not _ZEROS.startswith(block):
            digest.update(b"%d %d\n" % (at, len(block)))
            digest.update(block)
            empty = False
        at += _BLOCK_BYTES
    return b"" if empty else digest.digest()


def _data_after(fd: int, at: int) -> int | None:
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data after this point
            return None
        raise


def is_full(error: BaseException) -> bool:
    """Is it the error of a full disk, or of a used-up quota?"""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def named(error: BaseException) -> str:
    """What an error of the operating system says of a file, which something else may stand in place of; '' if none."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return ""


def has_no_room(place: Path) -> bool:
    """Is its disk so full that hardly a small file fits?"""
    try:
        disk = os.statvfs(place)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < _NO_ROOM_BYTES or (disk.f_files > 0 and disk.f_favail < 1)


def no_space(place: Path, consequence: str, *, setting: str = "") -> str:
    """The message for a full disk. ``setting``: the environment variable that would choose another place."""
    instead = f", or set {setting} to a place on another disk" if setting else ""
    return f"no space left in {place}: {consequence}; free some{instead}"


def _open(path: Path, create: int | None) -> int:
    if create is None:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, create)
