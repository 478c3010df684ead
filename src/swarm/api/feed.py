"""Tells any number of waiting requests that the database has changed: one watch for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Final

from swarm.errors import Locked, StoreError
from swarm.store.sql.wake import Wake
from swarm.store.store import Store

_CHECK_SECONDS: Final = 30.0
_ALL_SECONDS: Final = 1.0  # since another program may change a ticket without an event
_EVENTS: Final = 1000
_TRIED_SECONDS: Final = 1.0


class Feed:
    """``watch``: the task that watches the database. It ends with StoreError when the database's files were moved,
    removed or replaced, after which reads would tell what no longer is: then the server must end."""

    watch: asyncio.Task[None]

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tried, self._fault = 0.0, False
        self._changed = asyncio.Event()
        self._of_tickets: dict[str, asyncio.Event] = {}
        self._closing = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Does the server stop?"""
        return self._closing.is_set()

    @classmethod
    @asynccontextmanager
    async def of(cls, store: Store) -> AsyncIterator[Feed]:
        """Raises StoreError."""
        feed = cls(store)
        async with store.watching() as wake:
            feed.watch = asyncio.create_task(feed._watch(store, wake))
            try:
                yield feed
            finally:
                feed.watch.cancel()
                await asyncio.gather(feed.watch, return_exceptions=True)

    async def well(self) -> bool:
        """Can the database be read? As of a second ago, however many ask. That it is locked is no fault."""
        if not self.watch.done() and time.monotonic() >= self._tried + _TRIED_SECONDS:
            self._tried = time.monotonic()
            try:
                await self._store.newest_event()
                self._fault = False
            except StoreError as error:
                self._fault = not isinstance(error, Locked)
        return not self._fault and not self.watch.done()

    def now(self, ticket_id: str | None = None) -> asyncio.Event:
        """To be taken before the database is read: it is set by the first commit after that. With ``ticket_id``, by the
        first that tells of this ticket; and now and then by others."""
        if ticket_id is None or self.closed:
            return self._changed
        return self._of_tickets.setdefault(ticket_id, asyncio.Event())

    async def changed(self, since: asyncio.Event, *, timeout_seconds: float) -> bool:
        """Wait for a commit after `now` gave ``since``; False if none came in time, or if the server stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await since.wait()
        return since.is_set() and not self.closed

    async def pause(self, seconds: float) -> None:
        """Until then, or until the server stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    def close(self) -> None:
        """Let all that wait go: the server stops."""
        self._closing.set()
        self._tell()
        self._changed.set()
        self._tell_of(list(self._of_tickets))

    async def _watch(self, store: Store, wake: Wake) -> None:
        """One read for all tickets that somebody waits for, instead of one for each of them at every commit."""
        told = 0.0  # when all were
        after: int | None = None  # the newest event that was seen; None: unknown
        try:
            while True:
                await wake.changed(timeout_seconds=_CHECK_SECONDS)
                self._tell()
                if not self._of_tickets:
                    after = None
                    continue
                changed: Collection[str] | None = None
                with contextlib.suppress(StoreError):  # requests find out what is wrong themselves
                    after, changed = await store.tickets_with_events(after, limit=_EVENTS)
                if changed is None or time.monotonic() - told >= _ALL_SECONDS:
                    changed, told = list(self._of_tickets), time.monotonic()
                self._tell_of(changed)
        finally:
            self._tell()
            self._tell_of(list(self._of_tickets))

    def _tell(self) -> None:
        told, self._changed = self._changed, asyncio.Event()
        told.set()

    def _tell_of(self, ticket_ids: Collection[str]) -> None:
        for id in ticket_ids:
            if (told := self._of_tickets.pop(id, None)) is not None:
                told.set()
