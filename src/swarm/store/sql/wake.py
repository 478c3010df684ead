"""Notices within milliseconds that any process committed to the SQLite file, at no cost while none does.

inotify reports writes to the file or its write-ahead log; ``PRAGMA data_version`` says whether a commit is visible (the
log is written before the shared index, so the first check may be too early). No interval delays this. On file systems
without inotify events (NFS), the check repeats every ``FALLBACK_SECONDS``; where the kernel refuses inotify (its limits
are reached), every ``POLL_SECONDS``, with a line in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol

from asyncinotify import InitFlags, Inotify, Mask, Watch

from swarm.base.files import real
from swarm.base.log import logger
from swarm.errors import StoreError
from swarm.store.sql import files

log = logger(__name__)

# Checks after a write event until the commit is visible: that takes 20 µs, or an fsync with synchronous=FULL (the
# default of the sqlite3 shell). A check costs 10 µs, a timer of the event loop 1 to 2 ms: so the first checks use no
# timer, only a turn of the loop each. After a commit that was seen they are ever rarer: a further write event seldom
# belongs to another commit, and every check takes time from the writing thread.
_CHECKS_SECONDS = (*[0.0] * 30, *[0.001] * 20, *[0.005] * 6)
_CHECKS_AFTER_COMMIT_SECONDS = tuple(0.001 * 2**n for n in range(9))
FALLBACK_SECONDS = 1.0
POLL_SECONDS = 0.05
_FILES = Mask.CREATE | Mask.MOVED_TO | Mask.DELETE
_MASK = Mask.MODIFY | _FILES
_READ_BYTES = 1 << 14
_EVENT = struct.Struct("iIII")
_MERGE_SECONDS, _MOST_MERGE_SECONDS = 0.001, 0.008  # writes within that are told once; more while they go on


class Wake(Protocol):
    """Tells one waiter of commits to a database, by whatever program: `Store.watching`."""

    def mute(self) -> None:
        """Notice no writes until `unmute`: a thread of this process is about to take the write lock."""

    def unmute(self) -> None:
        """The lock was released."""

    async def changed(self, *, timeout_seconds: float) -> bool:
        """True as soon as a commit is visible that the last call did not tell; False after ``timeout_seconds``. Raises
        StoreError when it is another database now."""


class FileWake:
    """Use `watching`. One waiter at a time."""

    def __init__(self, file: Path) -> None:
        self._file = real(file)
        self._names = [os.fsencode(f"{self._file.name}{suffix}") + b"\0" for suffix in ("", "-wal", "-shm")]
        self._written = asyncio.Event()
        self._write_seen = False  # a write event whose commit is not visible yet
        self._after_commit = False  # the last write event led to a commit that was seen
        self._check_seconds = FALLBACK_SECONDS
        self._version = 0
        self._loop = asyncio.get_running_loop()
        self._inotify: Inotify | None = None
        self._changing = threading.Lock()  # other threads change the watch: not while it is closed
        self._connection = sqlite3.connect(f"{self._file.as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=0)
        self._version = self._data_version()
        self._opened = files.OpenFiles(self._file)

    @classmethod
    @asynccontextmanager
    async def watching(cls, file: Path) -> AsyncIterator[FileWake]:
        try:
            wake = cls(file)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"can't watch {file}: {error}") from error
        try:
            with wake._listening():
                yield wake
        finally:
            wake._connection.close()

    def mute(self) -> None:
        """Notice no writes until `unmute`. A thread of this process calls it when it is about to take the write lock,
        under which nobody else writes. A commit is some 30 writes; each would wake the event loop, which then takes the
        CPU and the GIL from that thread, and the lock is held for twice as long."""
        self._watch(_FILES)

    def unmute(self) -> None:
        """The lock was released: look once, for that commit and for what others wrote just before and after it."""
        self._watch(_MASK)
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(self._written.set)

    def _watch(self, mask: Mask) -> None:
        with self._changing, contextlib.suppress(OSError):  # the directory is gone: `changed` says so
            if self._inotify is not None:
                self._inotify.add_watch(self._file.parent, mask)  # if it is watched already, this changes the mask

    async def changed(self, *, timeout_seconds: float) -> bool:
        """True as soon as a commit is visible that the last call did not see; False after ``timeout_seconds``. Raises
        StoreError when the database's files were moved, removed or replaced."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while True:
            if self._written.is_set():
                self._write_seen, self._after_commit = True, False
                self._written.clear()
            self._opened.check()
            if await self._check_until_visible(deadline):
                return True
            left = deadline - loop.time()
            if left <= 0:
                return False
            if not await self._wait_for_write(min(left, self._check_seconds)):
                if self._version_changed():
                    return True
                if loop.time() >= deadline:
                    return False

    async def _check_until_visible(self, deadline: float) -> bool:
        """Check until a commit is visible or can't be on its way. Stops at a new write event."""
        loop = asyncio.get_running_loop()
        pauses = _CHECKS_AFTER_COMMIT_SECONDS if self._after_commit else _CHECKS_SECONDS
        self._after_commit = False
        for pause in pauses:
            if self._version_changed():
                self._after_commit = True
                return True
            if not self._write_seen:
                return False  # without a write, one check is enough
            if not pause:
                await asyncio.sleep(0)
            elif await self._wait_for_write(min(pause, max(0.0, deadline - loop.time()))):
                return False
        self._write_seen = False
        return False

    async def _wait_for_write(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._written.wait()
        except TimeoutError:
            return False
        self._write_seen = True
        return True

    def _version_changed(self) -> bool:
        try:
            version = self._data_version()
        except StoreError as error:
            self._opened.check(nonsense="SQLITE_NOTADB" in getattr(error.__cause__, "sqlite_errorname", ""))
            raise
        seen, self._version = self._version, version
        return version != seen

    def _data_version(self) -> int:
        try:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
                return self._version  # its log is being recovered or reset: the next check decides
            raise StoreError(f"can't read {self._file}: {error}") from error

    @contextmanager
    def _listening(self) -> Iterator[None]:
        with contextlib.ExitStack() as opened:
            try:
                inotify = opened.enter_context(Inotify(InitFlags.CLOEXEC))
                watch = inotify.add_watch(self._file.parent, _MASK)
            except OSError as error:
                self._check_seconds = POLL_SECONDS
                log.warning(
                    f"no inotify, so the database is checked every {POLL_SECONDS * 1e3:g} ms; raise "
                    "fs.inotify.max_user_instances (or max_user_watches) and restart",
                    error=error.strerror,
                )
            else:
                thread = threading.Thread(target=self._listen, args=(inotify.fd,), name="swarm-wake", daemon=True)
                thread.start()
                opened.callback(self._end, inotify, watch, thread)
                self._inotify = inotify
            yield

    def _end(self, inotify: Inotify, watch: Watch, thread: threading.Thread) -> None:
        with self._changing:
            self._inotify = None
        with contextlib.suppress(OSError):  # the directory is gone, and so the thread has ended
            inotify.rm_watch(watch)
        thread.join()

    def _listen(self, fd: int) -> None:
        """Until the watch is removed. A batch thread takes nobody's CPU when it wakes: a commit of another program is
        some 30 writes under its write lock, one of 15 MB 7,000, and the event loop would come between them."""
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        pause, began = _MERGE_SECONDS, time.monotonic()
        while events := os.read(fd, _READ_BYTES):
            if any(name in events for name in self._names):
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                    self._loop.call_soon_threadsafe(self._written.set)
            if any(mask & Mask.IGNORED for mask in _masks(events)):
                return
            goes_on = time.monotonic() - began < pause
            pause = min(2 * pause, _MOST_MERGE_SECONDS) if goes_on else _MERGE_SECONDS
            time.sleep(pause)
            began = time.monotonic()


def _masks(events: bytes) -> Iterator[int]:
    """Of inotify's struct inotify_event, one after the other."""
    at = 0
    while at < len(events):
        _, mask, _, length = _EVENT.unpack_from(events, at)
        at += _EVENT.size + length
        yield mask
