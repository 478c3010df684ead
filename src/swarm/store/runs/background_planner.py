"""Decisions of workflows that are too dear for a transaction: made on a thread of its own, of a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import sqlalchemy as sa
import structlog

from swarm.base import faults
from swarm.errors import SwarmError
from swarm.store.runs.decision import Decided
from swarm.store.runs.workflow_engine import WorkflowExecutor
from swarm.store.sql.database import Database
from swarm.store.sql.threads import Lane

log = structlog.get_logger(__name__)


class Decider:
    """``write``: the lane that decisions are written down on. The thread starts at first need."""

    def __init__(self, db: Database, executor: WorkflowExecutor, write: Lane) -> None:
        self._db = db
        self._executor = executor
        self._write = write
        self._lane: Lane | None = None
        self._deciding: dict[str, asyncio.Task[None]] = {}  # by run

    def take_up(self, runs: Iterable[str]) -> None:
        """Decide on these meanwhile; the commits tell whoever waits for work."""
        for run in runs:
            if run not in self._deciding and not self._write.closed:
                self._deciding[run] = asyncio.create_task(self._carry_on(run))

    async def decided(self) -> bool:
        """Wait for all that was taken up; False when there is nothing."""
        any_ = bool(self._deciding)
        while self._deciding:
            await asyncio.wait(set(self._deciding.values()))
        return any_

    async def close(self) -> None:
        """What is not decided yet stays noted in the run's row."""
        for task in self._deciding.values():
            task.cancel()
        await asyncio.gather(*self._deciding.values(), return_exceptions=True)
        if self._lane is not None:
            await self._lane.close()
        await asyncio.to_thread(self._executor.close)

    async def _carry_on(self, run: str) -> None:
        self._lane = self._lane or Lane(self._db, write=False)

        def decide(connection: sa.Connection) -> Decided | None:
            with self._db.transaction(connection) as tx:
                return self._executor.decide(tx, run)

        try:
            again = True
            while again:
                decided = await self._lane.call_raw(decide)
                faults.reach("decided")
                again = decided is not None and await self._write.call(self._executor.apply, decided)
        except SwarmError as error:
            log.warning("can't carry a workflow on yet", run=run, error=str(error))
        except Exception:  # a mistake of ours, in one run: it is tried again, and others go on
            log.exception("a decision failed", run=run)
        finally:
            del self._deciding[run]
