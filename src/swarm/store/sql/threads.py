"""Threads that own a connection each: one that writes, one that reads. What asks is asyncio.

Group commit: while a transaction runs, requests pile up; the next transaction serves all of them, those of one kind by
the same few statements. A request that may not do what it asks (LeaseLost, NotFound, …) gets its own error and leaves
the others alone; an unforeseen one is found by running each of them again by itself.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sqlalchemy.engine import Connection

from swarm.base import faults
from swarm.errors import StoreError, SwarmError
from swarm.store.sql.database import Database, Tx

Request = TypeVar("Request")
Result = TypeVar("Result")

# Serves all requests of a kind in one transaction: as many results as requests, a SwarmError in place of a refused one.
Many = Callable[[Tx, Sequence[Request]], Sequence[Result | SwarmError]]

_MEMORY_PAUSE_SECONDS: Final = 0.1
GROUP: Final = 256  # requests in one transaction: bounds the time that other processes wait for the write lock


def each(function: Callable[[Tx, Request], Result]) -> Many[Request, Result]:
    """A kind that is served one by one, each undone alone when it is refused."""

    def many(tx: Tx, requests: Sequence[Request]) -> Sequence[Result | SwarmError]:
        results: list[Result | SwarmError] = []
        for request in requests:
            try:
                with tx.savepoint():
                    results.append(function(tx, request))
            except SwarmError as error:
                results.append(error)
        return results

    many.__name__ = function.__name__  # crash points are named by it
    return many


@dataclass(frozen=True, slots=True)
class _Job:
    many: Many[Any, Any] | None
    request: Any  # with many None: called with the bare connection, outside a transaction
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class ConnectionThread:
    """One thread, one connection. ``close`` serves what was asked before, then ends both."""

    def __init__(self, database: Database, *, write: bool) -> None:
        self._database = database
        self._write = write
        self._connection: Connection | None = None
        self._checked = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(
            target=self._run, name=f"swarm-store-{'write' if write else 'read'}", daemon=True
        )
        self._thread.start()

    async def call(self, many: Many[Request, Result], request: Request) -> Result:
        """The result once its transaction is committed. Not begun when the caller is cancelled before its turn."""
        result: Result = await self.submit(many, request)
        return result

    async def call_raw(self, function: Callable[[Connection], Result]) -> Result:
        """Run a function on the thread with the bare connection, alone, before any check of the tables."""
        result: Result = await self.submit(None, function)
        return result

    def submit(self, many: Many[Any, Any] | None, request: Any) -> asyncio.Future[Any]:
        if self._closed:
            raise StoreError("the store is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._jobs.put(_Job(many, request, future, loop))
        return future

    @property
    def closed(self) -> bool:
        return self._closed

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    # --- on the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            stop = False
            while not stop:
                jobs: list[_Job] = []
                try:
                    stop = self._take(jobs)
                    self._answer(jobs)
                except MemoryError:
                    self._refuse(jobs)
        finally:
            self._drop()

    def _take(self, jobs: list[_Job]) -> bool:
        """Fill ``jobs`` with what is asked; True when nothing comes after it."""
        while len(jobs) < GROUP:
            try:
                job = self._jobs.get(block=not jobs)
            except queue.Empty:
                break
            if job is None:
                return True
            jobs.append(job)
        return False

    def _answer(self, jobs: list[_Job]) -> None:
        asked = [job for job in jobs if not job.future.cancelled()]
        for job in asked:
            if job.many is None:
                _deliver([(job, self._raw(job))])
        if grouped := [job for job in asked if job.many is not None]:
            _deliver(list(zip(grouped, self._serve(grouped), strict=True)))

    def _refuse(self, jobs: list[_Job]) -> None:
        """Without memory for an answer: whoever has none yet gets an error, since nobody may wait for ever. What was
        committed stays; asked once more, the fence tells."""
        while True:
            try:
                why = f"out of memory beside the database {self._database.place}"
                return _deliver([(job, StoreError(why)) for job in jobs])
            except MemoryError:
                time.sleep(_MEMORY_PAUSE_SECONDS)

    def _serve(self, jobs: list[_Job]) -> list[Any]:
        try:
            return self._transaction(jobs)
        except StoreError as error:  # the database itself: the same for each of them
            return [StoreError(*error.args) for _ in jobs]
        except Exception as error:  # a mistake in one of them, or in us: the one who asked gets it
            return [error] if len(jobs) == 1 else [self._serve([job])[0] for job in jobs]

    def _transaction(self, jobs: list[_Job]) -> list[Any]:
        results: dict[int, Any] = {}
        kinds: dict[Many[Any, Any], list[int]] = {}
        for number, job in enumerate(jobs):
            assert job.many is not None
            kinds.setdefault(job.many, []).append(number)
        try:
            with self._database.transaction(self._open(check=True)) as tx:
                for many, numbers in kinds.items():
                    found = many(tx, [jobs[number].request for number in numbers])
                    results.update(zip(numbers, found, strict=True))
                if faults.armed is not None:
                    _reach(kinds, "uncommitted")
            if faults.armed is not None:
                _reach(kinds, "committed")
        except BaseException:
            self._drop()  # whatever state it is in
            raise
        return [results[number] for number in range(len(jobs))]

    def _raw(self, job: _Job) -> Any:
        try:
            return job.request(self._open(check=False))
        except Exception as error:
            self._drop()
            return error

    def _open(self, *, check: bool) -> Connection:
        if self._connection is None:
            if check and not self._database.exists():
                raise StoreError(f"there is no database {self._database.place}; run `swarm init`")
            self._connection = self._database.connect(write=self._write)
        if check and not self._checked:
            self._database.check_revision(self._connection)
            if self._write:
                self._database.check_writable(self._connection)
            self._checked = True
        return self._connection

    def _drop(self) -> None:
        connection, self._connection, self._checked = self._connection, None, False
        if connection is not None:
            connection.close()


def _reach(kinds: Iterable[Many[Any, Any]], state: str) -> None:
    for many in kinds:
        faults.reach(f"{getattr(many, '__name__', '')}:{state}")


def _deliver(answers: list[tuple[_Job, Any]]) -> None:
    """Hand results over to the loops that asked: one wake-up for each loop, not one for each answer."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Any]]] = {}
    for job, result in answers:
        loops.setdefault(job.loop, []).append((job, result))
    for loop, of_loop in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, of_loop)
        except RuntimeError:  # that loop has ended: nobody waits
            continue


def _resolve(answers: list[tuple[_Job, Any]]) -> None:
    for job, result in answers:
        if job.future.done():
            continue
        if isinstance(result, BaseException):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
