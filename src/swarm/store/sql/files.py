"""Notices that the files of an SQLite database were removed, replaced or overwritten while they are open.

SQLite itself does not: it goes on in files that have no name any more, or mixes the pages that its log has with those
of another database, so what others wrote is destroyed.

Files that were removed or replaced are other inodes. One that was overwritten (`cp older.db swarm.db`) is the same, but
in WAL mode SQLite writes to the database's file only while it copies the log into it (a checkpoint), and counts in the
-shm file how far that went. So a file that changed while the counters did not was changed by something else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import stat
import struct
from pathlib import Path
from typing import Final, NamedTuple

from swarm.base import files
from swarm.errors import FilesChanged

# The head of the -shm file (sqlite.org/walformat.html): in its first 48 bytes the page size, the number of frames in
# the log and the log's salts; from byte 96 on, how many frames were copied into the database, and how many are to be.
_HEAD: Final = struct.Struct("=14xHI12x8s8x 48x I 28x I 4x")
_LOG_HEAD_BYTES, _FRAME_HEAD_BYTES = 32, 24
_STABLE_TRIES: Final = 5


def is_own(file: Path) -> bool:
    """May nobody but root and this user write to the database, or put another one in its place?"""
    for path in (file, files.real(file).parent):
        found = path.stat()
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if found.st_uid not in (0, os.geteuid()) or (found.st_mode & 0o022 and not sticky):
            return False
    return True


class _Log(NamedTuple):
    """What the -shm file says."""

    page_bytes: int
    frames: int
    salts: bytes
    copied: int
    to_copy: int

    @property
    def checkpoint(self) -> tuple[bytes, int, int]:
        return self.salts, self.copied, self.to_copy

    @property
    def at_rest(self) -> bool:
        """False while a checkpoint runs, and after one that did not end."""
        return self.copied == self.to_copy

    @property
    def least_bytes(self) -> int:
        page = 65536 if self.page_bytes == 1 else self.page_bytes
        return _LOG_HEAD_BYTES + self.frames * (_FRAME_HEAD_BYTES + page) if self.frames else 0


class OpenFiles:
    """The files of a database to which this thread has a connection. Not thread-safe."""

    def __init__(self, file: Path) -> None:
        real = files.real(file)  # SQLite keeps its log beside the real file
        self._file = file
        self._paths = (file, Path(f"{real}-wal"), Path(f"{real}-shm"))
        self._opened = [_inode(_stat(path)) for path in self._paths]
        self._shm = _descriptor_of(self._opened[2])
        self._known: tuple[tuple[int, int], tuple[bytes, int, int]] | None = None  # the file, and the checkpoint
        self._fault = ""
        self._compare()

    def check(self, *, nonsense: bool = False) -> None:
        """Raises FilesChanged, from then on always, when one of the files is gone, or isn't what SQLite left.
        ``nonsense``: what SQLite reads is no database. It was one, so it is being overwritten just now."""
        if not self._fault:
            found = [_stat(path) for path in self._paths]
            for path, before, after in zip(self._paths, self._opened, map(_inode, found), strict=True):
                if before is not None and before != after:
                    self._fault = f"{path} was changed from outside (it was moved, removed or replaced)"
                    break
            else:
                log = self._read_log()
                if log is not None and found[0] is not None and not self._is_as_known(log, found[0], found[1]):
                    self._compare()
            if nonsense and not self._fault:
                self._fault = f"{self._paths[0]} was changed from outside (it was overwritten)"
            if self._fault and _inode(found[0]) == self._opened[0]:
                _keep_open(self._file)
        if self._fault:
            raise FilesChanged(
                f"{self._fault} while it was in use; nothing more is written: stop all engines and servers, check the "
                "database (one that is put back by hand needs its old -wal and -shm removed first), and start again"
            )

    def note(self) -> None:
        """To be called after a transaction: its first write may begin the log anew, which changes the salts."""
        log = self._read_log()
        if log is not None and (self._known is None or self._known[1] != log.checkpoint):
            self._compare()

    def _is_as_known(self, log: _Log, file: os.stat_result, wal: os.stat_result | None) -> bool:
        """Nothing has happened but new frames. ``log`` was read last."""
        return (
            self._known == (_state(file), log.checkpoint)
            and log.at_rest
            and wal is not None
            and wal.st_size >= log.least_bytes
        )

    def _compare(self) -> None:
        for _ in range(_STABLE_TRIES):
            before = self._read_log()
            file, wal = _stat(self._paths[0]), _stat(self._paths[1])
            after = self._read_log()
            if before is None or after is None or file is None or wal is None:
                return
            if before != after:
                continue  # somebody writes just now
            if wal.st_size < after.least_bytes:
                self._fault = f"{self._paths[1]} was changed from outside (it was cut off)"
            elif not after.at_rest:
                self._known = None
            elif self._known is not None and self._known[1] == after.checkpoint and self._known[0] != _state(file):
                self._fault = f"{self._paths[0]} was changed from outside (it was overwritten)"
            else:
                self._known = _state(file), after.checkpoint
            return
        self._known = None

    def _read_log(self) -> _Log | None:
        """By SQLite's own descriptor: to close one of ours would drop SQLite's locks on the file."""
        if self._shm is None:
            return None
        try:
            if _inode(os.fstat(self._shm)) != self._opened[2]:
                self._shm = None
                return None
            return _Log(*_HEAD.unpack(os.pread(self._shm, _HEAD.size, 0)))
        except (OSError, struct.error):
            return None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _inode(info: os.stat_result | None) -> tuple[int, int] | None:
    return None if info is None else (info.st_dev, info.st_ino)


def _state(info: os.stat_result) -> tuple[int, int]:
    return info.st_mtime_ns, info.st_size


def _descriptor_of(inode: tuple[int, int] | None) -> int | None:
    """This process's descriptor of a file that is open."""
    with contextlib.suppress(OSError):
        for name in Path("/proc/self/fd").iterdir() if inode is not None else ():
            with contextlib.suppress(OSError):
                if _inode(os.fstat(int(name.name))) == inode:
                    return int(name.name)
    return None


def _keep_open(file: Path) -> None:
    """Hold the file until this process has ended: a checkpoint by its last connection would write the log over what
    others have written since, and remove theirs."""
    connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
    with contextlib.suppress(sqlite3.Error):
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # never closed, not even by the interpreter's end
