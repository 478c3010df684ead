"""Threads that own one connection each: one writes, one reads. Their callers are asyncio tasks.

Group commit: while a transaction runs, requests queue up. The next one serves all of them that are for the same batch
function; a single function has a transaction of its own. A request of a batch that is refused (LeaseLost, NotFound, …)
gets its own error and leaves the others alone. After an unexpected error the whole transaction is undone, and each
request runs again by itself.

A transaction reads and computes without the write lock, so that other programs' INSERTs get in, and takes it for as
long as it takes to write. If another program wrote meanwhile, the function runs again; the fourth time with the lock
from the start.

A result is handed out when what it tells is on the disk (`flush`), so that a power failure can't take it back.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from swarm.base import crash_points
from swarm.errors import FilesChanged, Locked, StoreError, SwarmError
from swarm.store.sql.connection import Connection
from swarm.store.sql.database import Database
from swarm.store.sql.flush import Flusher
from swarm.store.sql.transaction import NotExact, Outdated, Tx

P = ParamSpec("P")
Request = TypeVar("Request")
Result = TypeVar("Result")

# Serves several requests with the same few statements. Returns a result for each; a SwarmError for a refused one.
Batch = Callable[[Tx, Sequence[Request]], Sequence[Result | SwarmError]]

_MEMORY_PAUSE_SECONDS: Final = 0.1
_REFUSALS: Final = 8  # of a transaction, before it keeps others out; and then again, if it could not
GROUP: Final = 256  # requests in one transaction: bounds how long other processes wait for the write lock


class _Kind(Enum):
    SINGLE = auto()  # function(tx, *args, **kwargs), in a transaction of its own
    BATCH = auto()  # function(tx, requests), with the first argument of each job as its request
    RAW = auto()  # function(connection), alone and outside a transaction


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    kind: _Kind
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop


class _Refused(Exception):
    """A single function refused: what it changed is undone."""

    def __init__(self, error: SwarmError) -> None:
        super().__init__()
        self.error = error


@dataclass(slots=True)
class Use:
    """What a thread has done so far. ``seconds``: in transactions, waits for the lock included, which are also counted
    by themselves; ``repeated``: transactions that another program's write came before."""

    transactions: int = 0
    seconds: float = 0.0
    lock_seconds: float = 0.0
    repeated: int = 0

    def numbers(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 6) for name in self.__slots__}


class ConnectionThread:
    """One thread, one connection. ``close`` serves the requests made before it, then ends both.

    ``shared``: functions that lock the rows that they depend on, or say `Tx.exact`. ``joined``: two of these; requests
    for the second behind requests for the first are served in one shared transaction with them.

    ``untold``: functions whose results may be handed out before they are on the disk, since nobody outside learns of
    them, or since it does no harm if a power failure takes them back.
    """

    def __init__(
        self,
        database: Database,
        *,
        write: bool,
        untold: Collection[Callable[..., Any]] = (),
        shared: Collection[Callable[..., Any]] = (),
        joined: tuple[Callable[..., Any], ...] = (),
    ) -> None:
        self._database = database
        self._write = write
        self._shared = frozenset(shared)
        self._joined = joined if database.dialect.begin_shared is not None else ()
        self._untold = frozenset(untold)
        self._flusher = Flusher(database.file) if database.file is not None else None
        self._seen: tuple[int, int | None] | None = None  # own changes, and others', up to the last transaction
        self._unflushed = False  # results may tell something that isn't on the disk yet
        self._connection: Connection | None = None
        self._checked = False
        self._jobs: queue.SimpleQueue[Sequence[_Job] | None] = queue.SimpleQueue()
        self._held: list[_Job] | None = None
        self._closed = False
        self.use = Use()
        self._thread = threading.Thread(
            target=self._run, name=f"swarm-store-{'write' if write else 'read'}", daemon=True
        )
        self._thread.start()

    async def call(
        self, function: Callable[Concatenate[Tx, P], Result], /, *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        """``function(tx, …)``; the result, once its transaction is committed. It may run again (`Tx.if_undone`), and
        never starts if the caller is cancelled before its turn."""
        result: Result = await self._submit(_Kind.SINGLE, function, *args, **kwargs)
        return result

    async def call_batch(self, batch: Batch[Request, Result], request: Request) -> Result:
        """The same for one request of a batch: requests for the same function share one call of it."""
        result: Result = await self.submit_batch(batch, request)
        return result

    def submit_batch(self, batch: Batch[Any, Any], request: Any) -> asyncio.Future[Any]:
        """Like `call_batch`, but queued when this returns."""
        return self._submit(_Kind.BATCH, batch, request)

    async def call_raw(self, function: Callable[[Connection], Result]) -> Result:
        """Run ``function`` on the thread with the bare connection, alone, before any check of the tables."""
        result: Result = await self._submit(_Kind.RAW, function)
        return result

    def _submit(self, kind: _Kind, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        if self._closed:
            raise StoreError("the store is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        job = _Job(kind=kind, function=function, args=args, kwargs=kwargs, future=future, loop=loop)
        if self._held is not None:
            self._held.append(job)
        else:
            self._jobs.put((job,))
        return future

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is requested in the block is queued at its end: so the thread takes all of it together."""
        held = self._held = []
        try:
            yield
        finally:
            self._held = None
            self._jobs.put(held)

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
        """Fill ``jobs`` from the queue; True when the thread is to end after them."""
        while len(jobs) < GROUP:
            try:
                found = self._jobs.get(block=not jobs)
            except queue.Empty:
                break
            if found is None:
                return True
            jobs += found
        return False

    def _answer(self, jobs: list[_Job]) -> None:
        wanted = [job for job in jobs if not job.future.cancelled()]
        for job in wanted:
            if job.kind is _Kind.RAW:
                _deliver([(job, self._on_disk([job], [self._raw(job)])[0])])
        if grouped := [job for job in wanted if job.kind is not _Kind.RAW]:
            _deliver(list(zip(grouped, self._on_disk(grouped, self._serve(grouped)), strict=True)))

    def _on_disk(self, jobs: list[_Job], results: list[Any]) -> list[Any]:
        """The results, once what they tell is on the disk. The write lock was released before."""
        if self._flusher is None or not self._unflushed or not any(self._told(job) for job in jobs):
            return results
        try:
            self._flusher.flush()
        except OSError as error:
            self._drop()
            why = (
                f"can't flush the database {self._database.place} to the disk: {error.strerror}; "
                "what was written last may be gone after a power failure"
            )
            return [StoreError(why) for _ in jobs]
        self._unflushed = False
        return results

    def _told(self, job: _Job) -> bool:
        if job.kind is _Kind.RAW:
            return self._write
        return job.function not in self._untold

    def _refuse(self, jobs: list[_Job]) -> None:
        """Out of memory: every job without a result gets an error, since no caller may wait for ever. What was
        committed stays; a caller that tries again learns that from the fence."""
        while True:
            try:
                why = f"out of memory while using the database {self._database.place}"
                return _deliver([(job, StoreError(why)) for job in jobs])
            except MemoryError:
                time.sleep(_MEMORY_PAUSE_SECONDS)

    def _serve(self, jobs: list[_Job]) -> list[Any]:
        """Their results, in their order."""
        groups: dict[object, list[int]] = {}
        for number, job in enumerate(jobs):
            groups.setdefault(job.function if job.kind is _Kind.BATCH else number, []).append(number)
        results: list[Any] = [None] * len(jobs)
        failed: StoreError | None = None
        if self._joined and tuple(one for one in groups if one in self._joined) == self._joined:
            first, second = self._joined
            groups[first] += groups.pop(second)
        waiting = deque(groups.values())
        while waiting:
            numbers = waiting.popleft()
            group = [jobs[number] for number in numbers]
            found: list[Any] = []
            if failed is None:
                try:
                    found = self._serve_group(group)
                except StoreError as error:
                    failed = error
                except NotExact:  # two transactions, so that the second may be a shared one
                    waiting.extendleft(reversed(_by_function(jobs, numbers)))
                    continue
                except Exception as error:
                    if len(group) > 1:  # one of them hit a bug: each runs by itself, so that only that one gets it
                        waiting.extendleft([number] for number in reversed(numbers))
                        continue
                    found = [error]
            if failed is not None:  # the database itself failed: the same error for all that is not done
                kind = type(failed) if isinstance(failed, Locked | FilesChanged) else StoreError
                found = [kind(*failed.args) for _ in group]
            for number, result in zip(numbers, found, strict=True):
                results[number] = result
        return results

    def _serve_group(self, jobs: list[_Job]) -> list[Any]:
        """Jobs for the same function. Raises StoreError when the database itself failed."""
        shared, tries = jobs[0].function in self._shared, self._database.dialect.tries
        until = time.monotonic() + self._database.busy_timeout_seconds
        for number in itertools.count(1):
            try:
                alone = not shared and number % (_REFUSALS + 1) == 0
                return self._transaction(jobs, optimistic=True, shared=shared, alone=alone)
            except NotExact:
                if jobs[0].function != jobs[-1].function:
                    raise
                shared = False
            except Outdated as outdated:
                self.use.repeated += 1
                if tries is None and time.monotonic() > until and outdated.__cause__ is not None:
                    raise outdated.__cause__ from None
                self._wait_for_others()
            if number == tries:
                break
        return self._transaction(jobs, optimistic=False)

    def _wait_for_others(self) -> None:
        connection, began = self._open(check=True), time.monotonic()
        try:
            self._database.wait_for_others(connection)
        except BaseException:
            self._drop()
            raise
        finally:
            self.use.lock_seconds += time.monotonic() - began

    def _transaction(
        self, jobs: list[_Job], *, optimistic: bool, shared: bool = False, alone: bool = False
    ) -> list[Any]:
        connection = self._open(check=True)
        name = getattr(jobs[0].function, "__name__", "")
        began = time.monotonic()
        try:
            with self._database.transaction(connection, optimistic=optimistic, shared=shared, alone=alone) as tx:
                tx.joined = jobs[0].function != jobs[-1].function
                results = self._call(tx, jobs)
                # A batch tells only of what it has written itself. A single function may tell what another process
                # wrote and has not flushed yet.
                tells = jobs[0].kind is _Kind.SINGLE and self._flusher is not None and self._told(jobs[0])
                others = tx.written_by_others if tells else None
                crash_points.reach(f"{name}:uncommitted")
            crash_points.reach(f"{name}:committed")
        except _Refused as refused:
            return [refused.error]
        except (Outdated, NotExact):
            raise
        except BaseException:
            self._drop()  # its state is unknown
            raise
        finally:
            self.use.transactions += 1
            self.use.seconds += time.monotonic() - began
            self.use.lock_seconds += connection.lock_seconds
            connection.lock_seconds = 0.0
        self._note_changes(connection, others)
        return results

    def _call(self, tx: Tx, jobs: Sequence[_Job]) -> list[Any]:
        job = jobs[0]
        if job.kind is _Kind.BATCH:
            groups = itertools.groupby(jobs, lambda one: one.function)
            return [result for function, group in groups for result in function(tx, [one.args[0] for one in group])]
        try:
            return [job.function(tx, *job.args, **job.kwargs)]
        except SwarmError as error:
            raise _Refused(error) from error

    def _note_changes(self, connection: Connection, others: int | None) -> None:
        """Is there anything to flush?"""
        if self._flusher is None:
            return
        own = int(connection.driver.total_changes)
        seen = own, self._seen[1] if others is None and self._seen is not None else others
        if seen != self._seen:
            self._seen, self._unflushed = seen, True

    def _raw(self, job: _Job) -> Any:
        self._unflushed = True  # it may write anything, tables included
        try:
            return job.function(self._open(check=False))
        except Exception as error:
            self._drop()
            return error

    def _open(self, *, check: bool) -> Connection:
        if self._connection is not None and self._database.dialect.is_stale(self._connection.driver):
            self._drop()
        if self._connection is None:
            if check and not self._database.exists():
                raise StoreError(f"the database {self._database.place} does not exist; run `swarm init`")
            self._connection = self._database.connect(write=self._write)
        if check and not self._checked:
            try:
                self._check(self._connection)
            except BaseException:
                self._drop()  # it may be lost
                raise
        return self._connection

    def _check(self, connection: Connection) -> None:
        self._database.check_revision(connection)
        if self._write:
            self._database.check_writable(connection)
        if self._flusher is not None:
            self._flusher.prepare()
        self._checked = True

    def _drop(self) -> None:
        connection, self._connection, self._checked = self._connection, None, False
        self._seen = None
        if self._flusher is not None:
            self._flusher.close()
        if connection is not None:
            connection.close()


def _by_function(jobs: Sequence[_Job], numbers: Sequence[int]) -> list[list[int]]:
    return [list(group) for _, group in itertools.groupby(numbers, lambda number: jobs[number].function)]


def _deliver(answers: list[tuple[_Job, Any]]) -> None:
    """Hand results to the event loops of the callers: one wake-up per loop, not per result."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Any]]] = {}
    for job, result in answers:
        loops.setdefault(job.loop, []).append((job, result))
    for loop, of_loop in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, of_loop)
        except RuntimeError:  # that loop has ended: no caller waits
            continue


def _resolve(answers: list[tuple[_Job, Any]]) -> None:
    for job, result in answers:
        if job.future.done():
            continue
        if isinstance(result, BaseException):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
