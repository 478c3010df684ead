"""Has the inputs of large tickets read before their claims (`pace`), by whoever can do that in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from swarm.base.aio import cancel_all
from swarm.base.log import logger
from swarm.store.claims import ready
from swarm.store.claims.pace import NOTHING, Look, Pace
from swarm.store.sql.threads import ConnectionThread

log = logger(__name__)


class Looks:
    """For one store: at one ticket at a time. Except within `by`, a claim takes large tickets as they are."""

    def __init__(self, pace: Pace, reader: ConnectionThread) -> None:
        self._pace, self._reader = pace, reader
        self._fault: Callable[[str], Awaitable[str | None]] | None = None
        self._looked: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def by(
        self, fault: Callable[[str], Awaitable[str | None]], *, looked: Callable[[], None] = lambda: None
    ) -> AsyncIterator[None]:
        """``fault`` says what is wrong with inputs; None: nothing. ``looked``: called when a ticket can be claimed."""
        self._fault, self._looked, self._pace.looks = fault, looked, True
        try:
            yield
        finally:
            self._fault, self._pace.looks = None, False
            if self._task is not None:
                await cancel_all([self._task])
            self._pace.in_hand = None

    def take_up(self) -> None:
        """Begin with what the last claim has found."""
        id, fault = self._pace.in_hand, self._fault
        if id is not None and fault is not None and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._find_out(id, fault))

    async def _find_out(self, ticket_id: str, fault: Callable[[str], Awaitable[str | None]]) -> None:
        look = NOTHING
        try:
            inputs = await self._reader.call(ready.inputs, ticket_id)
            if isinstance(inputs, str) and (error := await fault(inputs)) is not None:
                look = Look(error=error, inputs=inputs)
        except Exception as error:  # its attempt finds out, and tells
            log.warning("can't look at a ticket's inputs before its claim", ticket=ticket_id, error=str(error))
        finally:
            self._pace.looked(ticket_id, look)
            self._looked()
