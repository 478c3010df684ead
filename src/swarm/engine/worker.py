"""Attempts under leases: claims, renews, executes, finishes. The one user of both the store and the engine.

Every attempt is one task. One loop renews all leases and learns from the same statement which attempts are lost or
cancelled; those lose their VM at once. If the database can't be reached for as long as a lease lasts, the attempts end
by themselves: somebody else may own their steps by then.
"""

from __future__ import annotations

import asyncio
import codecs
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog

from swarm.base import crash_points
from swarm.base.aio import finish_uninterrupted
from swarm.base.clock import Timeline
from swarm.engine.engine import Watcher
from swarm.errors import HostError, LeaseLost, StoreError, SwarmError
from swarm.model import Cancelled, Claim, Event, Failed, FailureReason, Interrupted, Outcome
from swarm.store.store import Store

log = structlog.get_logger(__name__)

# Cancellation from outside is seen by the next renewal, so this bounds how long a cancelled agent goes on.
RENEW_EVERY_SECONDS = 1.0
# Output and VM numbers are written to the database in batches this far apart.
FLUSH_EVERY_SECONDS = 0.1
# One event holds at most this much of an agent's output.
CHUNK_BYTES = 16 * 1024
# So many events have what an agent prints on its streams in the order in which it did.
_IN_ORDER = 1000
_STREAMS = 3
# How long the putting back of an interrupted step is tried: after that its lease does it.
_PUT_BACK_SECONDS = 5.0
_STORE_RETRY_SECONDS = 0.5


class Executor(Protocol):
    """What turns a claim into an outcome: `swarm.engine.engine.Engine`, or a benchmark's null agent."""

    async def execute(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> Outcome: ...


class Attempt:
    """One claim being executed, by the task that makes this object."""

    def __init__(self, claim: Claim) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.claim = claim
        self.timeline = Timeline(queued_ms=claim.queued_ms)
        self.vm_id: int | None = None
        self.vm_recorded = False
        self.events: list[Event] = []  # not yet written
        self.executing = True
        self.ended = False
        self.verdict: Outcome | None = None
        self._task = task
        self._cancels = task.cancelling()

    def end(self, verdict: Outcome | None) -> None:
        """Stop the agent and end with this outcome (None: nothing may be written). Only the first call counts."""
        if self.executing and not self.ended:
            self.ended, self.verdict = True, verdict
            self._task.cancel()

    def stop_executing(self) -> None:
        """From here on `end` does nothing. Takes back the cancellation that it asked for."""
        self.executing = False
        if self.ended:
            self._task.uncancel()

    @property
    def cancelled(self) -> bool:
        """Does somebody other than `end` want the task to stop?"""
        return self._task.cancelling() > self._cancels


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An attempt that is over. ``outcome`` None: its lease was lost and nothing was written."""

    claim: Claim
    outcome: Outcome | None
    timings: Mapping[str, float]
    vm_id: int | None


class Worker:
    """``name`` tells this process from every other worker of the same database.

    ``ending`` is called when an attempt's VM is gone and its outcome is queued to be written: a claim that is asked for
    from then on comes behind it, or into the same transaction.
    """

    def __init__(
        self,
        *,
        store: Store,
        engine: Executor,
        name: str,
        lease_seconds: float,
        queue_timeout_seconds: float | None = None,
    ) -> None:
        self.ending: Callable[[Claim], None] = lambda _: None
        self._store = store
        self._engine = engine
        self.name = name
        self._lease_seconds = lease_seconds
        self._queue_timeout_seconds = queue_timeout_seconds
        self._running: dict[str, Attempt] = {}
        self._events: list[Event] = []  # of attempts that are over
        self._news = asyncio.Event()  # something is to be written

    @property
    def running(self) -> Mapping[str, Attempt]:
        """Attempts in hand, by id."""
        return self._running

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """The loops that every attempt needs: renewing leases, writing events. One that dies ends the block with its
        own error."""
        block = asyncio.current_task()
        assert block is not None
        fault: list[BaseException] = []

        def ended(loop: asyncio.Task[None]) -> None:
            if not loop.cancelled() and (error := loop.exception()) is not None:
                fault.append(error)
                block.cancel()

        loops = [asyncio.create_task(self._renewing()), asyncio.create_task(self._flushing())]
        for loop in loops:
            loop.add_done_callback(ended)
        try:
            yield
        except asyncio.CancelledError:
            if fault:
                block.uncancel()
                raise fault[0] from None
            raise
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
        await self._flush()

    def claim(
        self,
        *,
        limit: int = 1,
        ticket_id: str | None = None,
        memory_mb: int | None = None,
        most_memory_mb: int | None = None,
    ) -> Coroutine[Any, Any, list[Claim]]:
        """See `swarm.store.store.Store.claim`."""
        asked = self._store.claim(
            self.name,
            limit=limit,
            lease_seconds=self._lease_seconds,
            ticket_id=ticket_id,
            memory_mb=memory_mb,
            most_memory_mb=most_memory_mb,
            held=self._running.keys(),
            # Who asks for one ticket by name wants it run.
            queue_timeout_seconds=None if ticket_id else self._queue_timeout_seconds,
        )

        async def claimed() -> list[Claim]:
            if claims := await asked:
                crash_points.reach("claimed")
            return claims

        return claimed()

    async def attempt(self, claim: Claim) -> Ended:
        """Execute one claim and write its outcome.

        Cancelling this call stops the agent; the step goes back and the try is not counted. So does an error that is
        neither the agent's fault nor the ticket's, which is then raised: it would hit the next ticket as well.
        """
        attempt = self._running[claim.attempt_id] = Attempt(claim)
        try:
            try:
                outcome = await self._execute(attempt)
            except asyncio.CancelledError:
                await finish_uninterrupted(self._finish(attempt, Interrupted()))
                raise
            except Exception as error:
                await finish_uninterrupted(
                    self._finish(attempt, Interrupted(message=f"the engine can't go on: {error}"))
                )
                if isinstance(error, OSError):
                    raise HostError(f"this host can't go on running tickets: {error}") from error
                raise
            if outcome is not None:
                outcome = await finish_uninterrupted(self._finish(attempt, outcome))
            else:
                log.warning("lease lost, VM killed", ticket=claim.ticket.id, attempt=claim.attempt_id)
            if attempt.cancelled:
                raise asyncio.CancelledError
            return Ended(claim=claim, outcome=outcome, timings=attempt.timeline.phases(), vm_id=attempt.vm_id)
        finally:
            del self._running[claim.attempt_id]
            if attempt.events:
                self._events += attempt.events
                self._news.set()

    async def _execute(self, attempt: Attempt) -> Outcome | None:
        """The VM is gone when this returns: "cancelled" in the row means that nothing runs any more."""
        claim = attempt.claim
        try:
            outcome: Outcome | None = None
            if claim.in_workflow:
                try:
                    claim = replace(claim, inputs=await self._store.resolve_references(claim.inputs))
                except StoreError as error:
                    outcome = Failed(reason=FailureReason.HOST_ERROR, message=str(error), retryable=True)
                except SwarmError as error:
                    outcome = Failed(reason=FailureReason.INPUT_INVALID, message=f"its inputs: {error}")
            if outcome is None:
                outcome = await self._engine.execute(claim, _Watcher(self, attempt), attempt.timeline)
        except LeaseLost:
            outcome = None
        except asyncio.CancelledError:
            if not attempt.ended:
                raise
            outcome = None
        finally:
            attempt.stop_executing()
        crash_points.reach("executed")
        if attempt.ended:
            return attempt.verdict
        return outcome

    async def _finish(self, attempt: Attempt, outcome: Outcome) -> Outcome | None:
        claim, timings = attempt.claim, attempt.timeline.phases()
        vm_time_ms = attempt.timeline.since_ms("slot")
        patience = (
            min(_PUT_BACK_SECONDS, self._lease_seconds) if isinstance(outcome, Interrupted) else self._lease_seconds
        )
        deadline = time.monotonic() + patience
        while True:
            events, attempt.events = attempt.events, []
            try:
                await self._store.finish(
                    claim.attempt_id,
                    outcome,
                    timings=timings,
                    vm_time_ms=vm_time_ms,
                    vm_id=attempt.vm_id,
                    events=events,
                    in_workflow=claim.in_workflow,
                    queued=functools.partial(self.ending, claim),
                )
            except LeaseLost as error:
                log.warning("outcome refused by the fence", ticket=claim.ticket.id, why=str(error))
                attempt.events = [*events, _refused(claim, outcome, str(error))]
                return None
            except StoreError as error:
                # Locked, full: the result is worth waiting for as long as the lease can be ours.
                attempt.events = [*events, *attempt.events]
                if time.monotonic() > deadline:
                    raise
                log.warning("can't write an outcome yet", ticket=claim.ticket.id, error=str(error))
                await asyncio.sleep(_STORE_RETRY_SECONDS)
            else:
                crash_points.reach("finished")
                log.info(
                    "ticket ended" if not isinstance(outcome, Interrupted) else "ticket put back",
                    ticket=claim.ticket.id,
                    outcome=type(outcome).__name__.lower(),
                    attempt=claim.attempt_number,
                    vm=attempt.vm_id,
                    **timings,
                )
                return outcome

    async def _renewing(self) -> None:
        every = min(RENEW_EVERY_SECONDS, self._lease_seconds / 3)
        good_until = time.monotonic() + self._lease_seconds
        while True:
            await asyncio.sleep(every)
            ids = list(self._running)
            asked = time.monotonic()
            if not ids:
                good_until = asked + self._lease_seconds
                continue
            try:
                renewal = await self._store.renew(ids, lease_seconds=self._lease_seconds)
            except StoreError as error:
                log.warning("can't renew leases", error=str(error), attempts=len(ids))
                if time.monotonic() > good_until:
                    for attempt in self._running.values():
                        attempt.end(None)
                continue
            crash_points.reach("renewed")
            good_until = asked + self._lease_seconds
            for ids_, verdict in ((renewal.lost, None), (renewal.cancelled, Cancelled())):
                for attempt_id in ids_ & self._running.keys():
                    self._running[attempt_id].end(verdict)

    def emit(self, event: Event) -> None:
        """Write an event with the next batch."""
        attempt = self._running.get(event.attempt_id or "")
        (attempt.events if attempt is not None else self._events).append(event)
        self._news.set()

    def placed(self, attempt: Attempt, vm_id: int) -> None:
        attempt.vm_id = vm_id
        self._news.set()

    async def _flushing(self) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(FLUSH_EVERY_SECONDS)
            try:
                await self._flush()
            except StoreError as error:  # kept, and tried again
                log.warning("can't write events yet", error=str(error))
                await asyncio.sleep(_STORE_RETRY_SECONDS)

    async def _flush(self) -> None:
        """All that is to be written, asked for at once: the store makes one transaction of it."""
        self._news.clear()
        writes = [self._append(), *(self._record(a) for a in list(self._running.values()) if _has_news(a))]
        for result in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(result, BaseException):
                self._news.set()
                raise result
        crash_points.reach("flushed")

    async def _append(self) -> None:
        batch, self._events = self._events, []
        taken = [(attempt, attempt.events) for attempt in self._running.values() if attempt.events]
        for attempt, events in taken:
            attempt.events = []
            batch += events
        try:
            await self._store.append(batch)
        except StoreError:
            self._events = batch + self._events
            raise

    async def _record(self, attempt: Attempt) -> None:
        assert attempt.vm_id is not None
        try:
            await self._store.running(attempt.claim.attempt_id, attempt.vm_id)
        except LeaseLost:
            attempt.end(None)
        attempt.vm_recorded = True


def _has_news(attempt: Attempt) -> bool:
    return attempt.executing and attempt.vm_id is not None and not attempt.vm_recorded


def _refused(claim: Claim, outcome: Outcome, why: str) -> Event:
    return Event(
        ticket_id=claim.ticket.id,
        step_id=claim.step_id,
        attempt_id=claim.attempt_id,
        kind="refused",
        data={"outcome": type(outcome).__name__.lower(), "why": why},
    )


class _Watcher:
    """See `swarm.engine.engine.Watcher`."""

    def __init__(self, worker: Worker, attempt: Attempt) -> None:
        self._worker = worker
        self._attempt = attempt
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}  # a character may be split between two reads
        self._printed = 0  # events

    async def placed(self, vm_id: int) -> None:
        crash_points.reach("placed")
        self._worker.placed(self._attempt, vm_id)

    def record(self, kind: str, data: Mapping[str, object]) -> None:
        claim = self._attempt.claim
        self._worker.emit(
            Event(ticket_id=claim.ticket.id, step_id=claim.step_id, attempt_id=claim.attempt_id, kind=kind, data=data)
        )

    def output(self, stream: str, data: bytes) -> None:
        if stream not in self._decoders:
            self._decoders[stream] = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for at in range(0, len(data), CHUNK_BYTES):
            self._add(stream, self._decoders[stream].decode(data[at : at + CHUNK_BYTES]))

    def _add(self, stream: str, text: str) -> None:
        """One event, or the end of the last one: an agent that prints byte by byte must not cost an event for each,
        nor, in the long run, one that does it on two streams in turn."""
        claim, unwritten = self._attempt.claim, self._attempt.events
        for back in range(1, min(len(unwritten), 1 if self._printed < _IN_ORDER else _STREAMS) + 1):
            last = unwritten[-back]
            if last.kind == "output" and last.data["stream"] == stream:
                before = str(last.data["text"])
                if len(before) + len(text) <= CHUNK_BYTES:
                    unwritten[-back] = replace(last, data={"stream": stream, "text": before + text})
                    return
                break
        self._printed += 1
        self._worker.emit(
            Event(
                ticket_id=claim.ticket.id,
                step_id=claim.step_id,
                attempt_id=claim.attempt_id,
                kind="output",
                data={"stream": stream, "text": text},
            )
        )
