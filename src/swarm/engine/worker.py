"""Attempts under leases: claims, renews, executes, finishes. The only user of both the store and the engine.

Every attempt is one task. One loop renews all leases; the same statement returns which attempts are lost or cancelled,
and their VMs are killed at once. If the database can't be reached for the length of a lease, all attempts end: another
worker may own their steps by then.
"""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from swarm.base import crash_points
from swarm.base.aio import cancel_all, finish_uninterrupted
from swarm.base.clock import Timeline
from swarm.base.log import logger
from swarm.engine import leases
from swarm.engine.engine import Watcher
from swarm.errors import HostError, LeaseLost, StoreError, SwarmError, TicketWithdrawn
from swarm.model import Cancelled, Claim, Event, Failed, FailureReason, Interrupted, Outcome
from swarm.store.claims.finish import AppendRequest
from swarm.store.sql.rows import dump
from swarm.store.store import Store
from swarm.store.tickets.room import Room

log = logger(__name__)

# Output and VM numbers are written to the database in batches this far apart.
FLUSH_EVERY_SECONDS = 0.1
# One event holds at most this much of an agent's output.
CHUNK_BYTES = 16 * 1024
# What an attempt's output may take in the database, as it is stored there: as JSON, \x01 takes six bytes, a byte that
# isn't UTF-8 three, and a secret's mark more than the secret. An event's ids and times are counted too.
STORED_BYTES = 64 << 20
# An attempt with this much output that is not written yet, as it is stored, has to wait with more: else one transaction
# would keep all others from the database for as long as a flood of output lasts.
UNWRITTEN_BYTES = 1 << 20
_EVENT_BYTES = 256
# Up to this many output events, the order between an agent's streams is kept.
_IN_ORDER = 1000
_STREAMS = 3
# How long to try to put an interrupted step back. After that it goes back when its lease ends.
_PUT_BACK_SECONDS = 5.0
_STORE_RETRY_SECONDS = 0.5
# What a signal that was meant for the whole service does to an attempt, if it reaches more than the engine.
_CAUSED_BY_STOPPING = frozenset(
    {FailureReason.VM_DIED, FailureReason.BOOT_FAILED, FailureReason.CHANNEL_BROKEN, FailureReason.HOST_ERROR}
)


class Executor(Protocol):
    """Turns a claim into an outcome: `swarm.engine.engine.Engine`, or a benchmark's null agent."""

    async def execute(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> Outcome: ...


class Attempt:
    """One claim being executed, by the task that makes this object. ``outcome_queued``: see `Worker.attempt`."""

    def __init__(self, claim: Claim, outcome_queued: Callable[[], None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.claim = claim
        self.outcome_queued = outcome_queued
        self.timeline = Timeline(queued_ms=claim.queued_ms)
        self.vm_id: int | None = None
        self.vm_recorded = False
        self.events: list[Event] = []  # not yet written
        self.unwritten_bytes = 0  # of output
        self.written = asyncio.Event()
        self.executing = True
        self.ended = False
        self.forced_outcome: Outcome | None = None
        self._task = task
        self._cancels = task.cancelling()

    def end(self, outcome: Outcome | None) -> None:
        """Stop the agent and end with this outcome (None: nothing may be written). Only the first call counts."""
        if self.executing and not self.ended:
            self.ended, self.forced_outcome = True, outcome
            self._task.cancel()

    def stop_executing(self) -> None:
        """Make later calls of `end` do nothing, and take back the cancellation of an earlier one."""
        self.executing = False
        if self.ended:
            self._task.uncancel()

    @property
    def cancelled(self) -> bool:
        """Was the task cancelled by anything other than `end`?"""
        return self._task.cancelling() > self._cancels


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An ended attempt. ``outcome`` None: its lease was lost and nothing was written."""

    claim: Claim
    outcome: Outcome | None
    timings: Mapping[str, float]
    vm_id: int | None


class Worker:
    """``name`` is unique among the workers of a database."""

    def __init__(
        self,
        *,
        store: Store,
        engine: Executor,
        name: str,
        lease_seconds: float,
        queue_timeout_seconds: float | None = None,
        kept_ready: Callable[[], int] = lambda: 0,
        driver: str = "",
    ) -> None:
        self._store, self._engine = store, engine
        self.name = name
        self._lease_seconds, self._queue_timeout_seconds = lease_seconds, queue_timeout_seconds
        self.kept_ready, self.driver = kept_ready, driver  # VMs of its pool; the driver's name
        self.stopping = False  # from now on, attempts that lose their VM are put back instead of failed
        self._running: dict[str, Attempt] = {}
        self._events: list[Event] = []  # of ended attempts
        self._unsure: AppendRequest | None = None  # others that were not written, for all that is known
        self._unwritten = asyncio.Event()  # there are events or VM numbers to write

    @property
    def running(self) -> Mapping[str, Attempt]:
        """Attempts of this worker, by id."""
        return self._running

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Run the loops that every attempt needs: renewing leases, writing events. If one fails, its error ends the
        block."""
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
            await cancel_all(loops)
        await self._flush()

    def claim(
        self,
        *,
        limit: int = 1,
        ticket_id: str | None = None,
        room: Room | None = None,
        idle: bool | None = None,
        drain: bool = True,
    ) -> Coroutine[Any, Any, list[Claim]]:
        """See `swarm.store.store.Store.claim`. ``idle`` None: if no attempt has begun and not ended."""
        request = self._store.claim(
            self.name,
            limit=limit,
            lease_seconds=self._lease_seconds,
            ticket_id=ticket_id,
            room=room,
            held=self._running.keys(),
            idle=not self._running if idle is None else idle,
            drain=drain,
            # A ticket that is claimed by its id is run however long it waited.
            queue_timeout_seconds=None if ticket_id else self._queue_timeout_seconds,
        )

        async def claimed() -> list[Claim]:
            if claims := await request:
                crash_points.reach("claimed")
            return claims

        return claimed()

    async def attempt(self, claim: Claim, *, outcome_queued: Callable[[], None] = lambda: None) -> Ended:
        """Execute one claim and write its outcome.

        Cancelling this call stops the agent; the step goes back and the attempt is not counted. The same happens for an
        error that is neither the agent's fault nor the ticket's; it is then raised, as the next ticket would fail too.

        ``outcome_queued`` is called when the VM is gone and the outcome is queued to be written: a claim that is
        requested from then on runs after that write, or in the same transaction.
        """
        attempt = self._running[claim.attempt_id] = Attempt(claim, outcome_queued)
        try:
            try:
                outcome = await self._execute(attempt)
            except asyncio.CancelledError:
                await finish_uninterrupted(self._finish(attempt, Interrupted()))
                raise
            except Exception as error:
                interrupted = Interrupted(message=f"the engine can't go on: {error}")
                await finish_uninterrupted(self._finish(attempt, interrupted))
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
                self._unwritten.set()

    async def _execute(self, attempt: Attempt) -> Outcome | None:
        """When this returns, the VM is gone: a "cancelled" in the row means that nothing runs any more."""
        claim = attempt.claim
        outcome: Outcome | None = None
        try:
            if claim.in_workflow:
                try:
                    claim = replace(claim, inputs=await self._store.resolve_references(claim.inputs))
                except StoreError as error:
                    outcome = Failed(reason=FailureReason.HOST_ERROR, message=str(error), retryable=True)
                except SwarmError as error:
                    outcome = Failed(reason=FailureReason.INPUT_INVALID, message=f"its inputs: {error}")
            if outcome is None:
                outcome = await self._engine.execute(claim, _AttemptWatcher(self, attempt), attempt.timeline)
        except LeaseLost:
            outcome = None
        except asyncio.CancelledError:
            if not attempt.ended:
                raise
        finally:
            attempt.stop_executing()
        crash_points.reach("executed")
        if attempt.ended:
            return attempt.forced_outcome
        if self.stopping and isinstance(outcome, Failed) and _by_stopping(outcome):
            return Interrupted(message=f"the engine was being stopped: {outcome.message}")
        return outcome

    async def _finish(self, attempt: Attempt, outcome: Outcome) -> Outcome | None:
        claim, timings = attempt.claim, attempt.timeline.phases()
        vm_time_ms = attempt.timeline.since_ms("slot")
        put_back = isinstance(outcome, Interrupted)
        patience = min(_PUT_BACK_SECONDS, self._lease_seconds) if put_back else self._lease_seconds
        deadline, said = time.monotonic() + patience, ""
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
                    queued=attempt.outcome_queued,
                    again=bool(said),
                )
            except TicketWithdrawn:
                log.info("ticket ended", ticket=claim.ticket.id, outcome="cancelled", attempt=claim.attempt_number)
                return Cancelled()
            except LeaseLost as error:
                log.warning("outcome refused by the fence", ticket=claim.ticket.id, why=str(error))
                data = {"outcome": type(outcome).__name__.lower(), "why": str(error)}
                attempt.events = [*events, _event(claim, "refused", data)]
                return None
            except StoreError as error:
                # Locked or full: keep trying to save the result for as long as the lease can still be ours.
                attempt.events = [*events, *attempt.events]
                if time.monotonic() > deadline and self._store.is_file:
                    raise  # to be started again, and not to wait beside a full disk
                if time.monotonic() > deadline:  # of a server that is away, others wait too: then it runs again
                    log.error("an outcome is lost, since its lease is", ticket=claim.ticket.id, error=str(error))
                    return None
                if str(error) != said:
                    said = str(error)
                    log.warning("can't write an outcome yet", ticket=claim.ticket.id, error=said)
                await asyncio.sleep(_STORE_RETRY_SECONDS)
            else:
                crash_points.reach("finished")
                log.info(
                    "ticket put back" if put_back else "ticket ended",
                    ticket=claim.ticket.id,
                    outcome=type(outcome).__name__.lower(),
                    attempt=claim.attempt_number,
                    vm=attempt.vm_id,
                    **timings,
                )
                return outcome

    async def _renewing(self) -> None:
        def lost() -> None:
            for attempt in self._running.values():
                attempt.end(None)

        await leases.keep(lambda: list(self._running), self._renew, lost, lease_seconds=self._lease_seconds)

    async def _renew(self, ids: Collection[str]) -> None:
        renewal = await self._store.renew(list(ids), lease_seconds=self._lease_seconds)
        crash_points.reach("renewed")
        for ids_, outcome in ((renewal.lost, None), (renewal.cancelled, Cancelled())):
            for attempt_id in ids_ & self._running.keys():
                self._running[attempt_id].end(outcome)

    def emit(self, event: Event) -> None:
        """Write an event with the next batch."""
        attempt = self._running.get(event.attempt_id or "")
        (attempt.events if attempt is not None else self._events).append(event)
        self._unwritten.set()

    def placed(self, attempt: Attempt, vm_id: int) -> None:
        attempt.vm_id = vm_id
        self._unwritten.set()

    async def _flushing(self) -> None:
        said = ""
        while True:
            await self._unwritten.wait()
            await asyncio.sleep(FLUSH_EVERY_SECONDS)
            try:
                await finish_uninterrupted(self._flush())  # else a stop would lose what is being written
                said = ""
            except StoreError as error:  # events are kept for the next try
                if str(error) != said:
                    said = str(error)
                    log.warning("can't write events yet", error=said)
                await asyncio.sleep(_STORE_RETRY_SECONDS)

    async def _flush(self) -> None:
        """Request all writes at once: the store makes few transactions of them."""
        self._unwritten.clear()
        unrecorded = [a for a in self._running.values() if a.executing and a.vm_id is not None and not a.vm_recorded]
        writes = [self._append_events(), *(self._record_vm(attempt) for attempt in unrecorded)]
        for result in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(result, BaseException):
                self._unwritten.set()
                raise result
        crash_points.reach("flushed")

    async def _append_events(self) -> None:
        if self._unsure is not None:
            await self._store.append(self._unsure)  # a connection may have broken behind the COMMIT
        batch, self._events = self._events, []
        # Also those whose events could not be written before: they wait for it.
        taken = [attempt for attempt in self._running.values() if attempt.events or attempt.unwritten_bytes]
        sizes = [attempt.unwritten_bytes for attempt in taken]
        for attempt in taken:
            batch += attempt.events
            attempt.events = []
        self._unsure = AppendRequest(events=batch)
        await self._store.append(self._unsure)
        self._unsure = None
        for attempt, size in zip(taken, sizes, strict=True):
            attempt.unwritten_bytes -= size
            attempt.written.set()

    async def _record_vm(self, attempt: Attempt) -> None:
        assert attempt.vm_id is not None
        try:
            await self._store.running(attempt.claim.attempt_id, attempt.vm_id)
        except LeaseLost as error:
            attempt.end(Cancelled() if isinstance(error, TicketWithdrawn) else None)
        attempt.vm_recorded = True


def _by_stopping(failed: Failed) -> bool:
    by_signal = failed.reason == FailureReason.AGENT_FAILED and failed.exit_code is None
    return by_signal or failed.reason in _CAUSED_BY_STOPPING


def _event(claim: Claim, kind: str, data: Mapping[str, object]) -> Event:
    return Event(ticket_id=claim.ticket.id, step_id=claim.step_id, attempt_id=claim.attempt_id, kind=kind, data=data)


class _AttemptWatcher(Watcher):
    """Hands what happens in an attempt to its worker, which writes it as events."""

    def __init__(self, worker: Worker, attempt: Attempt) -> None:
        self._worker = worker
        self._attempt = attempt
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}  # a character may be split between two reads
        self._printed = 0  # events
        self._stored = 0  # bytes
        self._full = False

    async def placed(self, vm_id: int) -> None:
        crash_points.reach("placed")
        self._worker.placed(self._attempt, vm_id)

    def record(self, kind: str, data: Mapping[str, object]) -> None:
        self._worker.emit(_event(self._attempt.claim, kind, data))

    def output(self, stream: str, data: bytes) -> None:
        if stream not in self._decoders:
            self._decoders[stream] = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for at in range(0, len(data), CHUNK_BYTES):
            text = self._decoders[stream].decode(data[at : at + CHUNK_BYTES])
            # A lone surrogate, which would make an escape of every other character, never comes out of a decoder.
            size = len(dump(text).encode())
            self._stored += size
            if self._stored > STORED_BYTES:
                if not self._full:
                    self._full = True
                    said = f"output truncated: stored, it takes more than {STORED_BYTES >> 20} MiB\n"
                    self.record("output", {"stream": "swarm", "text": said})
                return
            self._attempt.unwritten_bytes += size
            self._add(stream, text)

    async def ready(self) -> None:
        attempt = self._attempt
        while attempt.unwritten_bytes > UNWRITTEN_BYTES:
            attempt.written.clear()
            await attempt.written.wait()

    def _add(self, stream: str, text: str) -> None:
        """Add a new event, or extend the last one of this stream: an agent that prints byte by byte must not cost an
        event for each byte; nor, in the long run, one that alternates between two streams."""
        unwritten = self._attempt.events
        for back in range(1, min(len(unwritten), 1 if self._printed < _IN_ORDER else _STREAMS) + 1):
            last = unwritten[-back]
            if last.kind == "output" and last.data["stream"] == stream:
                before = str(last.data["text"])
                if len(before) + len(text) <= CHUNK_BYTES:
                    unwritten[-back] = replace(last, data={"stream": stream, "text": before + text})
                    return
                break
        self._printed += 1
        self._stored += _EVENT_BYTES
        self.record("output", {"stream": stream, "text": text})
