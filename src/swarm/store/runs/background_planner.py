"""Makes the decisions that are too expensive for a transaction, from a snapshot: on a reading thread, or in a process
if they read or make much. The rows of a large fan-out's items are written ahead, a few at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence

from swarm.base import crash_points
from swarm.base.log import logger
from swarm.errors import SwarmError
from swarm.store.runs import limits
from swarm.store.runs.decision import Decided
from swarm.store.runs.decision_process import DecisionProcess
from swarm.store.runs.items import Batch
from swarm.store.runs.workflow_engine import WorkflowEngine
from swarm.store.sql.connection import Connection
from swarm.store.sql.database import Database
from swarm.store.sql.threads import ConnectionThread
from swarm.store.tickets.changes import Culprit
from swarm.store.tickets.isolation import IsolatingThread, RowFault, sentence

log = logger(__name__)


class BackgroundPlanner:
    """``write``: the thread that writes decisions. The reading thread starts when it is first needed."""

    def __init__(self, db: Database, workflows: WorkflowEngine, write: IsolatingThread) -> None:
        self._db = db
        self._workflows = workflows
        self._write = write
        self._reader: ConnectionThread | None = None
        self._process = DecisionProcess(db)
        self._asking = asyncio.Lock()  # one thread waits for the process: threads are few, and shared
        self._deciding: dict[str, asyncio.Task[None]] = {}  # by run

    def take_up(self, runs: Iterable[str]) -> None:
        """Start to decide on these runs. The commits wake those who wait for work."""
        for run in runs:
            if run not in self._deciding and not self._write.closed:
                self._deciding[run] = asyncio.create_task(self._advance(run))

    async def decided(self) -> bool:
        """Wait for all decisions taken up; False if there were none."""
        found = bool(self._deciding)
        while self._deciding:
            await asyncio.wait(set(self._deciding.values()))
        return found

    async def close(self) -> None:
        """Unfinished decisions stay noted in their runs' rows."""
        for task in self._deciding.values():
            task.cancel()
        await asyncio.gather(*self._deciding.values(), return_exceptions=True)
        if self._reader is not None:
            await self._reader.close()
        await asyncio.to_thread(self._process.close)
        await asyncio.to_thread(self._workflows.close)

    async def _advance(self, run: str) -> None:
        try:
            again = True
            while again:
                decided, batches = await self._decide(run)
                crash_points.reach("decided")
                again = decided is not None and await self._apply(decided, batches)
        except SwarmError as error:
            log.warning("can't advance a workflow yet", run=run, error=str(error))
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # a value that another program wrote
            fault = RowFault(Culprit("run", run), sentence(error))
            with contextlib.suppress(Exception):  # what can't be failed is taken up again by a later claim
                await self._write.call(self._workflows.isolation.fail, fault)
        except Exception:  # a bug that affects one run: it is tried again, and other runs continue
            log.exception("a decision failed", run=run)
        finally:
            del self._deciding[run]

    async def _decide(self, run: str) -> tuple[Decided | None, Iterable[Batch]]:
        """And what is to be written ahead of it."""
        self._reader = self._reader or ConnectionThread(self._db, write=False)

        def decide(connection: Connection) -> tuple[Decided | None, Sequence[Batch]]:
            with self._db.transaction(connection) as tx:
                return self._workflows.decide(tx, run, limits.ON_THREAD)

        decided, batches = await self._reader.call_raw(decide)
        if decided is None or not decided.too_expensive:
            return decided, batches
        async with self._asking:
            return await asyncio.to_thread(self._process.decide, decided, self._workflows.definitions)

    async def _apply(self, decided: Decided, batches: Iterable[Batch]) -> bool:
        """True if the run needs another decision at once."""
        for batch in batches:
            if not await self._write.call_batch(self._workflows.write_items, batch):
                return False
        return await self._write.call_batch(self._workflows.apply, decided)
