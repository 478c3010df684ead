"""Knowing within milliseconds that somebody committed to the SQLite file, at no cost while nobody does.

inotify says that the file or its write-ahead log was written; ``PRAGMA data_version`` says whether a commit became
visible (the log is written before the shared index, so the first look may be too early). No interval decides how soon
a commit is seen. On file systems without inotify events (NFS) the look repeats every ``FALLBACK_SECONDS``; where the
kernel gives us no inotify at all (its limits are reached), every ``DEAF_SECONDS``, with a line in the log.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from asyncinotify import Inotify, Mask

from swarm.errors import StoreError

log = structlog.get_logger(__name__)

# Looks after a write event until the commit shows: it takes 20 µs, or with synchronous=FULL (what the sqlite3 shell
# does) an fsync between the two. A look costs 10 µs, a timer of the event loop takes 1 to 2 ms: so the first looks come
# without one, each after one turn of the loop. Not those after a commit that was seen: hardly ever is another one under
# way that was heard of already, and turns of the loop cost the writing thread its own.
_AT_ONCE_LOOKS = 30
_LATER_LOOKS_SECONDS = (*[0.001] * 20, *[0.005] * 6)
FALLBACK_SECONDS = 1.0
DEAF_SECONDS = 0.05
_MASK = Mask.MODIFY | Mask.CREATE | Mask.MOVED_TO | Mask.DELETE


class Wake:
    """Use `watching`. One waiter at a time."""

    def __init__(self, file: Path) -> None:
        self._file = file.resolve()
        self._names = {self._file.name, f"{self._file.name}-wal"}
        self._inode = self._file.stat().st_ino
        self._written = asyncio.Event()
        self._heard = False
        self._after_one = False  # what was heard led to a commit that was seen
        self._look_seconds = FALLBACK_SECONDS
        self._version = 0
        self._connection = sqlite3.connect(f"file:{self._file}?mode=ro", uri=True, isolation_level=None, timeout=0)
        self._version = self._data_version()

    @classmethod
    @asynccontextmanager
    async def watching(cls, file: Path) -> AsyncIterator[Wake]:
        try:
            wake = cls(file)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"can't watch {file}: {error}") from error
        listener = asyncio.ensure_future(wake._listen())
        try:
            yield wake
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            wake._connection.close()

    async def changed(self, *, timeout_seconds: float) -> bool:
        """True as soon as a commit by any connection is visible that was not seen by the last call; False when the
        time is over. Raises StoreError when another file has taken the database's place."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while True:
            if self._written.is_set():
                self._heard, self._after_one = True, False
                self._written.clear()
            self._check_place()
            if await self._look(deadline):
                return True
            left = deadline - loop.time()
            if left <= 0:
                return False
            if not await self._hear(min(left, self._look_seconds)):
                if self._moved_on():
                    return True
                if loop.time() >= deadline:
                    return False

    async def _look(self, deadline: float) -> bool:
        """Look until a commit shows, or none can be on its way; a new write begins anew."""
        loop = asyncio.get_running_loop()
        at_once, self._after_one = 0 if self._after_one else _AT_ONCE_LOOKS, False
        for pause in (*[0.0] * at_once, *_LATER_LOOKS_SECONDS):
            if self._moved_on():
                self._after_one = True
                return True
            if not self._heard:
                return False  # nobody wrote: one look tells it
            if not pause:
                await asyncio.sleep(0)
            elif await self._hear(min(pause, max(0.0, deadline - loop.time()))):
                return False
        self._heard = False
        return False

    async def _hear(self, seconds: float) -> bool:
        """Wait for a write, for so long at most."""
        try:
            async with asyncio.timeout(seconds):
                await self._written.wait()
        except TimeoutError:
            return False
        self._heard = True
        return True

    def _moved_on(self) -> bool:
        version = self._data_version()
        seen, self._version = self._version, version
        return version != seen

    def _data_version(self) -> int:
        try:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
                return self._version  # its log is being recovered or reset: the next look tells
            raise StoreError(f"can't read {self._file}: {error}") from error

    def _check_place(self) -> None:
        try:
            same = self._file.stat().st_ino == self._inode
        except OSError:
            same = False
        if not same:
            raise StoreError(
                f"{self._file} was moved or replaced while an engine was using it: stop and start the engine"
            )

    async def _listen(self) -> None:
        try:
            with Inotify() as inotify:
                inotify.add_watch(self._file.parent, _MASK)
                async for event in inotify:
                    if event.name is not None and event.name.name in self._names:
                        self._written.set()
        except OSError as error:
            self._look_seconds = DEAF_SECONDS
            self._written.set()
            log.warning(
                f"no inotify, so the database is looked at every {DEAF_SECONDS * 1e3:g} ms; raise "
                "fs.inotify.max_user_instances (or max_user_watches) and start again",
                error=error.strerror,
            )
