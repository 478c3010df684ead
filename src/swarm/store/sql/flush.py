"""Puts commits on the disk, after the write lock was released and before anybody is told of them.

With ``synchronous = FULL``, SQLite flushes inside COMMIT, so it holds the write lock for milliseconds, in which any
other program's INSERT is refused. So connections use NORMAL, which flushes only at checkpoints, and we flush the
write-ahead log ourselves. One flush covers all earlier commits, of every process: the log is one file, in order.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from swarm.base import files


class Flusher:
    """For the write-ahead log of one database, on one thread."""

    def __init__(self, file: Path) -> None:
        file = files.real(file)  # SQLite keeps its log beside the real file
        self._log = file.with_name(f"{file.name}-wal")
        self._fd: int | None = None
        self._inode: tuple[int, int] | None = None

    def prepare(self) -> None:
        """Open the log now, if it exists: later this process may be out of descriptors."""
        with contextlib.suppress(OSError):
            if self._fd is None:
                self._open()

    def flush(self) -> None:
        """Raises OSError. Without a log there is nothing to flush: whoever closed the database last has put all of it
        into the file, and flushed that."""
        try:
            found = self._log.stat()
        except FileNotFoundError:
            return
        if self._fd is None or (found.st_dev, found.st_ino) != self._inode:
            self._open()
        assert self._fd is not None
        os.fdatasync(self._fd)

    def _open(self) -> None:
        """Also flushes the directory: a new file's data is of no use without its name.

        Opening and closing the log is safe: SQLite's locks, which a close would drop, are on other files.
        """
        self.close()
        self._fd = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self._fd)
        self._inode = found.st_dev, found.st_ino
        directory = os.open(self._log.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
