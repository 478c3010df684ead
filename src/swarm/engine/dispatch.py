"""The serving loop: claims attempts when slots become free and when work appears, and stops in an orderly way. It wakes
the holder of sandboxes too.

No timer decides how soon a ticket starts: a commit to the database, the end of an attempt and the end of a back-off
each wake the loop. A slow or stuck VM holds only its own slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from swarm.base.aio import cancel_all, finish_uninterrupted, first
from swarm.base.log import logger
from swarm.engine.room import Disk, Memory, VmInUse, of_attempts, room_for_one
from swarm.engine.sandboxes import Sandboxes
from swarm.engine.worker import Attempt, Ended, Worker
from swarm.errors import Conflict, NoSpace, StoreError
from swarm.model import Claim, Interrupted
from swarm.store.hosts import HostState
from swarm.store.sql.rows import Due
from swarm.store.sql.wake import Wake
from swarm.store.store import Store
from swarm.store.tickets.room import Room
from swarm.triggers.schedules import Scheduler

log = logger(__name__)

HEARTBEAT_SECONDS = 2.0
# The loop looks at least this often. (Leases and back-offs have exact end times, and are waited for.)
LOOK_SECONDS = 30.0
# After a commit that made nothing ready, a claim checks the tables again, this long after the last claim. (Without one,
# after LOOK_SECONDS: another program's trigger changes rows in our own commits.)
UPKEEP_SECONDS = 1.0
# While attempts run, most commits are our own: don't look again so soon after a claim, which saw everything.
_QUIET_SECONDS = 0.005
# Nothing announces free memory and disk space, so poll for them.
_ROOM_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 0.5
_RATE_SECONDS = 60.0
# After so many claims that found nothing, a commit is looked at before the next one; and if something is said to be due
# all the while, the next ones come less and less often: another program's trigger undoes what they write.
_IN_VAIN = 8
_IN_VAIN_SECONDS = 0.25
_DRAINING = "nothing: this host is being drained, which `swarm host undrain` ends"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClaimRequest:
    """A claim under way. ``disk_shortage``: see `Disk.room`."""

    claims: asyncio.Task[list[Claim]]
    limit: int
    room: Room
    disk_shortage: str


class Dispatcher:
    """Serves tickets with one Worker until `stop`. ``ended`` is called after each attempt.
    ``inputs_fault`` says what is wrong with large inputs; without it, their attempts find out."""

    def __init__(
        self,
        *,
        store: Store,
        worker: Worker,
        wake: Wake,
        max_vms: int,
        memory: Memory | None,
        grace_seconds: float,
        disk: Disk | None = None,
        scheduler: Scheduler | None = None,
        sandboxes: Sandboxes | None = None,
        info: Mapping[str, object] | None = None,
        ended: Callable[[Ended], None] = lambda _: None,
        inputs_fault: Callable[[str], Awaitable[str | None]] | None = None,
    ) -> None:
        self._store = store
        self._worker = worker
        self._wake = wake
        self.max_vms = max_vms
        self._memory = memory
        self._disk = disk
        self._grace_seconds = grace_seconds
        self._scheduler = scheduler
        self.sandboxes = sandboxes
        if sandboxes is not None:
            sandboxes.room = self._room
        self._info = dict(info or {})
        self._ended, self._inputs_fault = ended, inputs_fault
        self._tasks: set[asyncio.Task[None]] = set()
        self._request: _ClaimRequest | None = None
        self._finishing: set[str] = set()  # running tasks' attempts whose VM is gone
        self._alone: str | None = None  # the attempt beside which nothing may run
        self._others_until = 0.0  # after it, others get as much time as it took
        self._ended_at: deque[float] = deque()  # of the attempts of the last minute
        self._look = asyncio.Event()  # something happened: look at the queue
        self._stop_now = asyncio.Event()
        self._fault: BaseException | None = None
        self._store_error = ""  # the last one, logged once
        self._more = True  # the last claim reached its limit, or more work is expected
        self._committed = True  # there was a commit since the last claim
        self._claimed_at = -UPKEEP_SECONDS
        self._empty = self._in_vain = 0  # claims in a row that found nothing; while something was due
        self._room_at = 0.0  # no claims before, since a disk was full
        self._back_off_seconds = _ROOM_LOOK_SECONDS
        self.stopping = False
        self.draining = False  # the host is: nothing more is started here
        self.waits_for = ""  # why ready tickets are not started; shown by status

    @property
    def running(self) -> Mapping[str, Attempt]:
        return self._worker.running

    def _vms(self) -> Iterator[VmInUse]:
        """All that take memory and disk of this host: attempts' and sandboxes'."""
        yield from of_attempts(self.running.values())
        if self.sandboxes is not None:
            yield from self.sandboxes.vms()

    def _room(self) -> tuple[Room, str]:
        """For one more VM, of a ticket or a sandbox."""
        return room_for_one(self._memory, self._disk, self._vms())

    @property
    def per_minute(self) -> int:
        """Attempts that ended in the last minute."""
        while self._ended_at and self._ended_at[0] < time.monotonic() - _RATE_SECONDS:
            self._ended_at.popleft()
        return len(self._ended_at)

    def stop(self) -> None:
        """First call: no new claims; running attempts get the grace period. Second call: stop now."""
        if self.stopping:
            self._stop_now.set()
        self.stopping = self._worker.stopping = True
        if self.sandboxes is not None:
            self.sandboxes.stop()
        self._look.set()

    async def run(self) -> None:
        """Serve until `stop`. Raises the error that ended the engine, once every VM is gone."""
        with contextlib.suppress(StoreError):
            await self._heartbeat()
        loops, until_stop = [self._heartbeats, self._watch_database], [self._scheduler.run] if self._scheduler else []
        if self.sandboxes is not None:
            loops.append(self.sandboxes.collecting)  # tickets leave snapshots too
            if self.sandboxes.most:
                loops.append(self.sandboxes.renewing)
                until_stop.append(self.sandboxes.claiming)
        looking: AbstractAsyncContextManager[None] = contextlib.nullcontext()
        if self._inputs_fault is not None:
            looking = self._store.looking_by(self._inputs_fault, looked=self._claim_again)
        async with self._worker.supervised(), looking:
            tasks = [asyncio.create_task(self._guarded(loop)) for loop in loops]
            # Other engines, or the next one, do what comes due from a stop on.
            claiming = [asyncio.create_task(self._guarded(loop)) for loop in until_stop]
            try:
                wait = await self._fill()
                told = {name: value for name, value in self._info.items() if name != "settings"}
                log.info("engine serves", pid=os.getpid(), max_vms=self.max_vms, **told)
                while not self.stopping and self._fault is None:
                    await self._sleep_until_due(wait)
                    self._look.clear()
                    wait = await self._fill()
            finally:
                for task in claiming:
                    task.cancel()
                await finish_uninterrupted(self._drain())
                await cancel_all([*tasks, *claiming])
        with contextlib.suppress(StoreError):
            await self._store.forget_worker(self._worker.name)
        if self._fault is not None:
            raise self._fault

    async def _guarded(self, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a background loop; if it fails, the engine ends."""
        try:
            await loop()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._fault = self._fault or error
        self._look.set()

    # --- claiming ---------------------------------------------------------------------------------------------------

    async def _fill(self) -> float | None:
        """Claim what fits. Returns how long to wait for the next event; None when only the end of an attempt makes
        room."""
        try:
            if self._request is None and (full_for := self._room_at - time.monotonic()) > 0:
                return full_for
            while self._request is not None or self._has_room():
                if self._request is None:
                    wait = await self._idle_seconds()
                    if wait is not None and self._request is None:  # an ended attempt may have requested a claim
                        return wait
                request = self._request = self._request or self._request_claim()
                try:
                    claims = await request.claims
                finally:
                    self._request, self._claimed_at = None, time.monotonic()
                self._store_error, self._more = "", self._more or len(claims) == request.limit
                for claim in claims:
                    self._begin(claim)
                self._empty = 0 if claims else self._empty + 1
                await asyncio.sleep(0)  # each task registers itself in `running`, which counts for memory
                if claims and not self._more:
                    return LOOK_SECONDS  # our own commit wakes the loop, which then asks what is due
                if not claims and self._others_until:
                    self._others_until, self._more = 0.0, True  # no others are ready
                    continue
                if not claims and not self._more:
                    due = await self._store.due()
                    self._in_vain = self._in_vain + 1 if due.ready or due.next_ms == 0 else 0
                    if due.ready and request.disk_shortage:
                        self._wait_for_room(request.disk_shortage)
                    elif due.ready:
                        self._wait_for_room(request.room.waits_for or request.room.full_disk)
                        if request.room.waits_for and self.sandboxes is not None:
                            self.sandboxes.make_room()
                    return min(self._until(due), _ROOM_LOOK_SECONDS) if due.ready else self._until(due)
        except StoreError as error:
            self._more = False
            if str(error) != self._store_error:
                self._store_error = str(error)
                log.warning("can't claim", error=self._store_error)
            self.waits_for = f"the database: {self._store_error}"[:500]
            return _RETRY_SECONDS
        self.waits_for = _DRAINING if self.draining else f"a VM: all {self.max_vms} are in use"
        return None

    def _claim_again(self) -> None:
        self._more = True
        self._look.set()

    def _has_room(self) -> bool:
        ends = self.stopping or self.draining or self._fault is not None
        return self._free > 0 and not ends and time.monotonic() >= self._room_at

    @property
    def _free(self) -> int:
        return self.max_vms - len(self._tasks) + len(self._finishing) if self._alone is None else 0

    async def _idle_seconds(self) -> float | None:
        """How long to wait before the next claim; None when a claim may find work.

        A claim takes the database's write lock, and the sqlite3 shell does not wait for that lock. So unless work is
        expected, read first whether any is due: reading takes no lock.
        """
        new = self._committed and not self._tasks and self._empty < _IN_VAIN
        if self._more or new:  # while idle, commits come from other programs
            return None
        if self._tasks and (quiet := self._claimed_at + _QUIET_SECONDS - time.monotonic()) > 0:
            return quiet
        due = await self._store.due()
        if due.ready or due.next_ms == 0 or self._upkeep_seconds() <= 0:
            pause = min(_IN_VAIN_SECONDS, 0.001 * 2 ** min(self._in_vain - _IN_VAIN, 10))
            left = self._claimed_at + pause - time.monotonic() if self._in_vain >= _IN_VAIN else 0.0
            return left if left > 0 else None
        self.waits_for = ""
        return self._until(due)

    def _request_claim(self) -> _ClaimRequest:
        """Request as many attempts as there is room for. The claim runs after all earlier requests to the store."""
        room, shortage = self._room()
        # One by one, where each takes its share: the store doesn't know what a VMM needs beside the guest, nor disks.
        shared = self._memory is not None or (self._disk is not None and self._disk.used_bytes is not None)
        limit = 1 if shared else self._free
        self._committed, self._more, self._claimed_at = False, False, time.monotonic()
        idle, drain = len(self._tasks) == len(self._finishing), time.monotonic() >= self._others_until
        claims = self._worker.claim(limit=limit, room=room, idle=idle and drain, drain=drain)
        return _ClaimRequest(claims=asyncio.create_task(claims), limit=limit, room=room, disk_shortage=shortage)

    def _outcome_queued(self, claim: Claim) -> None:
        """The attempt's VM is gone. If its end makes steps ready, claim them right after it, or together with it."""
        if not claim.in_workflow:
            return
        self._finishing.add(claim.attempt_id)
        if self._request is None and self._has_room():
            self._request = self._request_claim()
        else:
            self._more = True
        self._look.set()

    def _wait_for_room(self, shortage: str) -> None:
        if shortage.startswith("disk") and not self.waits_for.startswith("disk"):
            log.warning("no VM is started", waits_for=shortage)
        self.waits_for = shortage

    def _upkeep_seconds(self) -> float:
        """Until the next claim for what only claims find: bad rows, tickets that wait for each other."""
        pause = UPKEEP_SECONDS if self._committed else LOOK_SECONDS
        return max(0.0, self._claimed_at + pause - time.monotonic())

    def _until(self, due: Due) -> float:
        next_seconds = LOOK_SECONDS if due.next_ms is None else due.next_ms / 1000 + 0.001
        return min(next_seconds, self._upkeep_seconds(), LOOK_SECONDS)

    def _begin(self, claim: Claim) -> None:
        log.info("ticket started", ticket=claim.ticket.id, attempt=claim.attempt_number, agent=claim.agent.name)
        if claim.alone:
            self._alone = claim.attempt_id
            log.warning("runs alone: engines died or froze while they ran it", ticket=claim.ticket.id)
        task = asyncio.create_task(self._attempt(claim))
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._in_vain = 0
        self._look.set()

    async def _attempt(self, claim: Claim) -> None:
        began = time.monotonic()
        try:
            queued = functools.partial(self._outcome_queued, claim)
            ended = await self._worker.attempt(claim, outcome_queued=queued)
            if not isinstance(ended.outcome, Interrupted):
                self._ended_at.append(time.monotonic())
                self._back_off_seconds = _ROOM_LOOK_SECONDS
            self._ended(ended)
        except NoSpace as error:  # its step went back
            self._back_off(error)
        except Exception as error:  # the database is gone for good, or a bug: `run` raises it
            self._fail(error)
        finally:
            self._finishing.discard(claim.attempt_id)
            if claim.attempt_id == self._alone:
                self._alone, self._others_until = None, 2 * time.monotonic() - began

    def _back_off(self, error: NoSpace) -> None:
        """A disk is full, perhaps not the one that `Disk` looks at: try again later, and less and less often."""
        if self._room_at <= time.monotonic():
            self._room_at = time.monotonic() + self._back_off_seconds
            self._back_off_seconds = min(self._back_off_seconds * 2, LOOK_SECONDS)
            self._wait_for_room(f"disk: {error}")

    async def _sleep_until_due(self, seconds: float | None) -> None:
        """Sleep until it is worth looking again. While all slots are taken, only a free one is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._look.is_set() or (seconds is None and self._is_full()):
                    self._look.clear()
                    await self._look.wait()

    def _is_full(self) -> bool:
        return not self.stopping and self._fault is None and self._free <= 0

    async def _watch_database(self) -> None:
        while True:
            if await self._wake.changed(timeout_seconds=LOOK_SECONDS):
                self._committed = True
                self._look.set()
                if self._scheduler is not None:
                    self._scheduler.look()
                if self.sandboxes is not None:
                    self.sandboxes.look()

    # --- ending -----------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Pause the sandboxes. Give running attempts the grace period, then put them back."""
        paused = asyncio.create_task(self.sandboxes.drained()) if self.sandboxes is not None else None
        if self._request is not None:
            with contextlib.suppress(StoreError):
                for claim in await self._request.claims:
                    self._begin(claim)
            await asyncio.sleep(0)  # a task can put its step back only once it has started
        if self._tasks and self._fault is None:
            log.info("stopping", running=len(self._tasks), grace_seconds=self._grace_seconds)
            all_ended: Coroutine[Any, Any, object] = asyncio.wait(set(self._tasks))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._grace_seconds):
                    await first(all_ended, self._stop_now.wait())
        await cancel_all(self._tasks)
        if paused is not None:
            await paused

    # --- status -----------------------------------------------------------------------------------------------------

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            with contextlib.suppress(StoreError):
                await self._heartbeat()
                if dead := await self._store.bury_dead_workers():
                    log.warning("engines of this host are dead; their steps are taken over now", workers=dead)

    async def _heartbeat(self) -> None:
        info: dict[str, object] = {
            **self._info,
            "max_vms": self.max_vms,
            "running": len(self._tasks),
            "per_minute": self.per_minute,
            "stopping": self.stopping,
            "draining": self.draining,
            "waits_for": self.waits_for,
            "skipped": dict(self._store.isolation.skipped),
            "kept_ready": self._worker.kept_ready(),
            "store": self._store.use(),
        }
        if self.sandboxes is not None and self.sandboxes.most:
            info |= {"sandboxes": len(self.sandboxes.held), "max_sandboxes": self.sandboxes.most}
            info |= {"sandboxes_wait_for": self.sandboxes.waits_for}
        if self._memory is not None:
            info |= {"memory_mb": self._memory.total_mb, "memory_free_mb": self._memory.available_mb()}
        host = await self._store.this_host()
        self._heard(await self._store.heartbeat(self._worker.name, host=host, pid=os.getpid(), info=info))

    def _heard(self, host: HostState) -> None:
        """What is wanted of this host."""
        if host.other:
            said = f"another machine has taken the id of this host, {host.name}, and is alive"
            self._fail(Conflict(f"{said}: see `swarm host show {host.name}`"))
        if host.draining != self.draining:
            log.info("the host is being drained" if host.draining else "the host is not drained any more")
            self.draining, self._more = host.draining, True
            self._look.set()
        if self.sandboxes is not None and self.sandboxes.draining != self.draining:
            self.sandboxes.draining, self.sandboxes.waits_for = self.draining, _DRAINING if self.draining else ""
            self.sandboxes.look()
        if host.put_back_seconds is not None and host.put_back_seconds <= 0:
            for task in self._tasks:
                task.cancel()  # its step goes back, and does not count as tried
            if self.sandboxes is not None:
                self.sandboxes.put_back()
