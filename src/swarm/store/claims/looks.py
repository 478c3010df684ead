"""Has the inputs of large tickets read before their claims (`pace`), by whoever can do that in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from swarm.base.aio import cancel_all
from swarm.base.log import logger
from swarm.store.claims import ready
from swarm.store.claims.pace import Look, Pace
from swarm.store.sql.threads import ConnectionThread

log = logger(__name__)


class Looks:
    """For one store. Nobody looks, and a claim takes large tickets as they are, except within `by`."""

    def __init__(self, pace: Pace, reader: ConnectionThread) -> None:
        self._pace, self._reader = pace, reader
        self._look: Callable[[str], Awaitable[str | None]] | None = None
        self._tasks = set[asyncio.Task[None]]()

    @asynccontextmanager
    async def by(self, look: Callable[[str], Awaitable[str | None]]) -> AsyncIterator[None]:
        """``look`` says what is wrong with inputs; None: nothing."""
        self._look, self._pace.looks = look, True
        try:
            yield
        finally:
            self._pace.looks = False
            await cancel_all(self._tasks)

    def take_up(self) -> None:
        """Begin with those that the last claim found."""
        for id in self._pace.to_look_at():
            task = asyncio.create_task(self._find_out(id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _find_out(self, ticket_id: str) -> None:
        look = Look(ticket_id=ticket_id)
        try:
            inputs = await self._reader.call(ready.inputs, ticket_id)
            if isinstance(inputs, str) and self._look is not None:
                look = Look(ticket_id=ticket_id, inputs=inputs, error=await self._look(inputs))
        except Exception as error:  # its attempt finds out, and tells
            log.warning("can't look at a ticket's inputs before its claim", ticket=ticket_id, error=str(error))
        finally:
            self._pace.looked(look)
