"""Tells any number of waiting requests that the database has changed: one watch for all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from swarm.store.store import Store

_CHECK_SECONDS: Final = 30.0


class Feed:
    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.closed = False

    @classmethod
    @asynccontextmanager
    async def of(cls, store: Store) -> AsyncIterator[Feed]:
        """Raises StoreError."""
        feed = cls()
        async with store.watching() as wake:

            async def watch() -> None:
                try:
                    while True:
                        await wake.changed(timeout_seconds=_CHECK_SECONDS)
                        feed._tell()
                finally:  # the files were replaced: requests find out what is wrong themselves
                    feed._tell()

            task = asyncio.create_task(watch())
            try:
                yield feed
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def now(self) -> asyncio.Event:
        """To be taken before the database is read: it is set by the first commit after that."""
        return self._changed

    async def changed(self, since: asyncio.Event, *, timeout_seconds: float) -> bool:
        """Wait for a commit after `now` gave ``since``; False if none came in time, or if the server stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await since.wait()
        return since.is_set() and not self.closed

    def close(self) -> None:
        """Let all that wait go: the server stops."""
        self.closed = True
        self._tell()

    def _tell(self) -> None:
        told, self._changed = self._changed, asyncio.Event()
        told.set()
        if self.closed:
            self._changed.set()
