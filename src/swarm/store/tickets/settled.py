"""Where those who follow the events may go on without missing one.

PostgreSQL gives an event its number before its transaction commits, so one with a lower number may appear after one
with a higher. Who wants all that follow a number waits until whoever writes events now has ended: milliseconds.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from swarm.store.sql.dialect import Dialect, Sql
from swarm.store.sql.threads import ConnectionThread
from swarm.store.sql.transaction import Row, Tx

# Somebody may keep a transaction open for hours that wrote an event, by deleting a ticket: that one is not waited for.
PATIENCE_SECONDS: Final = 5.0
_NO_LIMIT: Final = (1 << 63) - 1


class Settled:
    def __init__(self, read: ConnectionThread, dialect: Dialect) -> None:
        self._read = read
        self._newest = Sql(dialect.newest_event) if dialect.newest_event is not None else None
        self._ended = Sql(dialect.has_ended)
        self._since = "0"  # who began before was waited for, in vain

    async def newest(self) -> int:
        """A number: no event with this or a lower one will appear any more."""
        if self._newest is None:
            return _NO_LIMIT
        seq, them = await self._read.call(_one, self._newest)
        if not them:
            return int(seq)
        began, pause = time.monotonic(), 0.0005
        while not (await self._read.call(_one, self._ended, them=them, since=self._since))[0]:
            if time.monotonic() - began > PATIENCE_SECONDS:
                self._since = them
            await asyncio.sleep(pause)
            pause = min(2 * pause, 0.05)
        return int(seq)


def _one(tx: Tx, statement: Sql, /, **values: str) -> Row:
    (row,) = tx.all(statement, **values)
    return row
