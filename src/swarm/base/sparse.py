"""Large sparse files, copied without their holes: by reference where the file system can, else by the kernel.

All of it blocks, so it runs in a thread. ``check`` is called before each piece of at most a few MiB; what it raises
ends the work (`swarm.base.aio.stoppable`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from swarm.base.libc import check as checked
from swarm.base.libc import libc

Check = Callable[[], None]
_FICLONE: Final = 0x40049409  # linux/fs.h
_PIECE_BYTES: Final = 4 << 20
_COMPARED_BYTES: Final = 64 << 10
COPIED_BYTES: Final = 64 << 20  # some 40 ms
_SPARE_BYTES: Final = 64 << 20
_TICK_NS: Final = 50_000_000
_SYNC_FILE_RANGE_WRITE: Final = 2  # linux/fs.h
_ZEROS: Final = bytes(_COMPARED_BYTES)
_KEEP_SIZE_PUNCH_HOLE: Final = 0x01 | 0x02  # linux/falloc.h
# Not for these two files, or not by this kernel.
_CANNOT: Final = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM})


def _never() -> None:
    pass


def need_room(dir: Path, size: int) -> None:
    """Raises OSError (ENOSPC) at once if ``size`` bytes, and some for others, don't fit there: while a disk is full,
    what others write there fails too."""
    disk = os.statvfs(dir)
    if disk.f_bavail * disk.f_frsize < size + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(dir))


def used_bytes(fd: int) -> int:
    """What an open file takes on disk."""
    return os.fstat(fd).st_blocks * 512


def copy(source: int, target: Path, *, mode: int = 0o600, check: Check = _never) -> None:
    """Copy an open file to a new one at ``target``. Raises OSError, and then leaves a part of it there."""
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        if reflink(source, fd):
            return
        os.ftruncate(fd, os.fstat(source).st_size)
        by_kernel = True
        for start, end in data_in(source):
            while start < end:
                check()
                size = min(end - start, _PIECE_BYTES)
                moved = 0
                if by_kernel:
                    try:
                        moved = os.copy_file_range(source, fd, size, start, start)
                    except OSError as error:
                        if error.errno not in _CANNOT:
                            raise
                        by_kernel = False
                if not moved and not (moved := os.pwrite(fd, os.pread(source, size, start), start)):
                    break  # it became shorter meanwhile
                start += moved
    finally:
        os.close(fd)


def update(source: int, target: int, check: Check = _never) -> int:
    """Make ``target``, a slightly older copy, equal to ``source``, which nobody changes meanwhile. Returns how many
    bytes were written."""
    if reflink(source, target):
        return 0
    size, written, at = os.fstat(source).st_size, 0, 0
    os.ftruncate(target, size)
    for start, end in data_in(source):
        _punch(target, at, start)
        for piece in range(start, end, _PIECE_BYTES):
            check()
            block = os.pread(source, min(_PIECE_BYTES, end - piece), piece)
            written += write_differing(target, piece, block)
        at = end
    _punch(target, at, size)
    return written


class Ahead:
    """A copy of a file that others may still write; `finish` makes it right when nobody does any more."""

    def __init__(self, source: Path, target: Path, check: Check = _never) -> None:
        self._source = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # A write changes the time of the last one, unless that was within the same tick of the kernel's clock.
            written, now = os.fstat(self._source).st_mtime_ns, time.time_ns()
            self._unchanged = written if written < now - _TICK_NS else None
            copy(self._source, target, check=check)
            self._target = os.open(target, os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            os.close(self._source)
            raise

    def finish(self, check: Check = _never) -> int:
        """Returns how many bytes were written."""
        if os.fstat(self._source).st_mtime_ns == self._unchanged:
            return 0
        return update(self._source, self._target, check)

    def close(self) -> None:
        os.close(self._source)
        os.close(self._target)


def write_differing(target: int, offset: int, data: bytes) -> int:
    """Write those 64 KiB of ``data`` that ``target`` does not have there yet. Returns how many bytes that were."""
    present = os.pread(target, len(data), offset)
    if present == data:
        return 0
    written = 0
    for start in range(0, len(data), _COMPARED_BYTES):
        piece = data[start : start + _COMPARED_BYTES]
        if present[start : start + _COMPARED_BYTES] != piece:
            written += os.pwrite(target, piece, offset + start)
    return written


def link_or_copy(source: Path, target: Path, *, check: Check = _never) -> None:
    """A second name for a file; on another file system, a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP}:
            raise
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            copy(fd, target, check=check)
        finally:
            os.close(fd)


def copy_or_link(source: Path, target: Path, *, link: bool, check: Check = _never) -> None:
    """A file that can be written while ``source`` stays as it is; where a copy would take long, and if ``link``, a
    second name."""
    fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not link or used_bytes(fd) <= COPIED_BYTES:
            copy(fd, target, check=check)
            return
        with target.open("xb") as file:
            if reflink(fd, file.fileno()):
                return
        target.unlink()
    finally:
        os.close(fd)
    link_or_copy(source, target, check=check)


def move(source: Path, target: Path) -> None:
    """Move a file, also to another file system. Keeps its mode."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with source.open("rb") as file:
            copy(file.fileno(), target)
        shutil.copymode(source, target)
        source.unlink()


def reflink(source: int, target: int) -> bool:
    """Give ``target`` the blocks of ``source``, to be copied when either is written. False where that can't be."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def data_in(fd: int) -> Iterator[tuple[int, int]]:
    """Where an open file has data: (start, end) of each part that is no hole."""
    size, end = os.fstat(fd).st_size, 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after this point
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def write_back(path: Path) -> None:
    """Have the kernel begin to write the file to the disk, which it would do within half a minute, and don't wait."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc().sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
    finally:
        os.close(fd)


def dig(path: Path, check: Check = _never) -> None:
    """Make holes of a file's 64 KiB blocks that are all zeros."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for start, end in list(data_in(fd)):
            for piece in range(start, end, _PIECE_BYTES):
                check()
                block = os.pread(fd, min(_PIECE_BYTES, end - piece), piece)
                for at in range(0, len(block), _COMPARED_BYTES):
                    if _ZEROS.startswith(part := block[at : at + _COMPARED_BYTES]):
                        _punch(fd, piece + at, piece + at + len(part))
    finally:
        os.close(fd)


def _punch(fd: int, start: int, end: int) -> None:
    if start < end:
        offset, length = ctypes.c_long(start), ctypes.c_long(end - start)
        checked(libc().fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, offset, length), "fallocate")
