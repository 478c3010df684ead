"""The serving loop: claims attempts as slots become free and as work appears, and ends in an orderly way.

Nothing here decides by time how soon a ticket starts: a commit to the database, an attempt that ends and a back-off
that is over each wake the loop. A slow or stuck VM holds its own slot and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import structlog

from swarm.base.aio import finish_uninterrupted
from swarm.engine.worker import Attempt, Ended, Worker
from swarm.errors import StoreError
from swarm.model import Claim, Interrupted
from swarm.store.sql.rows import Due
from swarm.store.store import Store
from swarm.triggers.schedules import Scheduler

log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS = 2.0
# Without news, the loop looks this often all the same. (Leases and back-offs that end are waited for exactly.)
LOOK_SECONDS = 30.0
# After somebody's commit that made nothing ready, a claim looks all the same what it did, this long after the last.
UPKEEP_SECONDS = 1.0
# While attempts run, most news are of our own writing; so no look so soon after a claim, which saw all there was.
_QUIET_SECONDS = 0.005
# Memory and disk that others free are announced by nobody.
_ROOM_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 0.5
# Of the file system with the VMs' files, or a twentieth of it.
_DISK_RESERVE_MB, _INODES_RESERVE = 512, 200
_RATE_SECONDS = 60.0


class Wake(Protocol):
    """Tells when the database may have changed: `swarm.store.sql.wake.Wake`."""

    async def changed(self, *, timeout_seconds: float) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What VMs may take of this host. ``available_mb`` reads the host now; ``reserve_mb`` stays for everybody else."""

    total_mb: int
    reserve_mb: int
    available_mb: Callable[[], int]
    overhead_mb: int = 64  # a VMM's own, beside the guest's memory

    @classmethod
    def of_this_host(cls) -> Memory:
        total_mb = psutil.virtual_memory().total >> 20
        return cls(
            total_mb=total_mb,
            reserve_mb=min(1024, total_mb // 8),
            available_mb=lambda: psutil.virtual_memory().available >> 20,
        )

    def left_mb(self, running: Mapping[str, Attempt]) -> int:
        """For one more VM: by what was promised to those that run, and by what the host really has."""
        promised = sum(a.claim.agent.memory_mb + self.overhead_mb for a in running.values() if a.executing)
        free_now = self.available_mb() - self.reserve_mb - self._not_yet_used(running)
        return min(self.total_mb - self.reserve_mb - promised, free_now) - self.overhead_mb

    @property
    def most_mb(self) -> int:
        """For one VM, when nothing else runs."""
        return self.total_mb - self.reserve_mb - self.overhead_mb

    @staticmethod
    def _not_yet_used(running: Mapping[str, Attempt]) -> int:
        """Guests touch their memory as they boot: until one has, what it will take still looks free."""
        return sum(a.claim.agent.memory_mb for a in running.values() if "answered" not in a.timeline)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Where the files of VMs lie. Work disks are sparse: they may grow to far more than is free, so some of it stays
    for those that run. (One that fills the rest up all the same fails by its own agent's writes.)"""

    place: Path

    def lacks(self) -> str:
        """Why no VM may be started now; '' when there is room."""
        try:
            info = os.statvfs(self.place)
        except OSError:  # what makes the VM's directory will say it better
            return ""
        free_mb, total_mb = (blocks * info.f_frsize >> 20 for blocks in (info.f_bavail, info.f_blocks))
        if free_mb < (reserve_mb := min(_DISK_RESERVE_MB, total_mb // 20)):
            return f"disk: {free_mb} MB are free in {self.place}, of which {reserve_mb} MB are kept"
        if info.f_files and info.f_favail < _INODES_RESERVE:
            return f"disk: {info.f_favail} inodes are free in {self.place}, of which {_INODES_RESERVE} are kept"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A claim under way: of how many attempts, in how much memory (None: whatever they need), and what is lacking."""

    claims: asyncio.Task[list[Claim]]
    limit: int
    memory_mb: int | None
    lacks: str


class Dispatcher:
    """Serves tickets with one Worker until told to stop. ``ended`` is called after each attempt."""

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
        info: Mapping[str, object] | None = None,
        ended: Callable[[Ended], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._worker = worker
        self._worker.ending = self._vm_is_free
        self._wake = wake
        self.max_vms = max_vms
        self._memory = memory
        self._disk = disk
        self._grace_seconds = grace_seconds
        self._scheduler = scheduler
        self._info = dict(info or {})
        self._ended = ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: _Asked | None = None
        self._ending: set[str] = set()  # attempts of those tasks whose VM is gone
        self._ends: deque[float] = deque()  # when attempts ended, of the last minute
        self._look = asyncio.Event()  # something happened: look at the queue
        self._now = asyncio.Event()
        self._fault: BaseException | None = None
        self._trouble = ""  # the database's, as last seen
        self._more = True  # the last claim got all that it asked for
        self._news = True  # somebody committed since the last claim
        self._claimed_at = -UPKEEP_SECONDS
        self.stopping = False
        self.waits_for = ""  # why ready tickets are not started, for status

    @property
    def running(self) -> Mapping[str, Attempt]:
        return self._worker.running

    @property
    def per_minute(self) -> int:
        """Attempts that ended in the last minute."""
        while self._ends and self._ends[0] < time.monotonic() - _RATE_SECONDS:
            self._ends.popleft()
        return len(self._ends)

    def stop(self) -> None:
        """First call: no new claims, and what runs gets its grace. Second call: now."""
        if self.stopping:
            self._now.set()
        self.stopping = True
        self._look.set()

    async def run(self) -> None:
        """Serve until `stop`. Raises the fault that ended the engine, with every VM gone."""
        with contextlib.suppress(StoreError):
            await self._beat()
        loops = [self._beating, self._listening]
        async with self._worker.supervised():
            tasks = [asyncio.create_task(self._guarded(loop)) for loop in loops]
            timetable = asyncio.create_task(self._guarded(self._scheduler.run)) if self._scheduler else None
            try:
                wait = await self._fill()
                log.info("engine serves", pid=os.getpid(), max_vms=self.max_vms, **self._info)
                while not self.stopping and self._fault is None:
                    await self._sleep_until_due(wait)
                    self._look.clear()
                    wait = await self._fill()
            finally:
                if timetable is not None:  # what comes due from now on is another engine's, or waits for the next one
                    timetable.cancel()
                    tasks.append(timetable)
                await finish_uninterrupted(self._drain())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(StoreError):
            await self._store.forget_worker(self._worker.name)
        if self._fault is not None:
            raise self._fault

    async def _guarded(self, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """A background loop whose death ends the engine."""
        try:
            await loop()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._fault = self._fault or error
        self._look.set()

    # --- claiming ---------------------------------------------------------------------------------------------------

    async def _fill(self) -> float | None:
        """Claim what fits. How long to wait for news; None when only an end makes room."""
        try:
            while self._asked is not None or self._has_room():
                if self._asked is None and (wait := await self._nothing_to_do()) is not None and self._asked is None:
                    return wait
                asked = self._asked = self._asked or self._ask()
                try:
                    claims = await asked.claims
                finally:
                    self._asked = None
                self._trouble, self._more = "", self._more or len(claims) == asked.limit
                for claim in claims:
                    self._begin(claim)
                await asyncio.sleep(0)  # they are `running` from their first step on, which counts for memory
                if claims and not self._more:
                    return LOOK_SECONDS  # our own commit wakes the loop, which then asks what is due
                if not claims and not self._more:
                    due = await self._store.due()
                    if due.ready and asked.lacks:
                        self._wait_for_disk(asked.lacks)
                    elif due.ready and asked.memory_mb is not None:
                        self.waits_for = f"memory: {max(0, asked.memory_mb)} MB are left for VMs"
                    return min(self._until(due), _ROOM_LOOK_SECONDS) if due.ready else self._until(due)
        except StoreError as error:
            self._more = False
            self._complain(error)
            return _RETRY_SECONDS
        self.waits_for = f"a VM: all {self.max_vms} are in use"
        return None

    def _has_room(self) -> bool:
        return self._free > 0 and not self.stopping and self._fault is None

    @property
    def _free(self) -> int:
        return self.max_vms - len(self._tasks) + len(self._ending)

    async def _nothing_to_do(self) -> float | None:
        """How long to wait before the next claim; None when one may find work.

        A claim takes the database's write lock, and the sqlite3 shell does not wait for that: so where nothing points
        to work, a look comes first, which takes none.
        """
        if self._more or (self._news and not self._tasks):  # news while idle are somebody else's
            return None
        if self._tasks and (rest := self._claimed_at + _QUIET_SECONDS - time.monotonic()) > 0:
            return rest
        due = await self._store.due()
        if due.ready or due.next_ms == 0 or self._upkeep_seconds() <= 0:
            return None
        self.waits_for = ""
        return self._until(due)

    def _ask(self) -> _Asked:
        """Ask for as much as there is room for. The claim stands behind all that was asked of the store before."""
        memory_mb = self._memory.left_mb(self.running) if self._memory else None
        lacks = self._disk.lacks() if self._disk else ""
        if lacks:
            memory_mb = -1  # not even the smallest; what else a claim does is still done
        limit = self._free if self._memory is None else 1  # what a VM takes beside its memory is known to us alone
        most = self._memory.most_mb if self._memory else None
        self._news, self._more, self._claimed_at = False, False, time.monotonic()
        claims = self._worker.claim(limit=limit, memory_mb=memory_mb, most_memory_mb=most)
        return _Asked(claims=asyncio.create_task(claims), limit=limit, memory_mb=memory_mb, lacks=lacks)

    def _vm_is_free(self, claim: Claim) -> None:
        """An end is on its way to the database. What follows from it is claimed right behind it, or with it."""
        if not claim.in_workflow:
            return
        self._ending.add(claim.attempt_id)
        if self._asked is None and self._has_room():
            self._asked = self._ask()
        else:
            self._more = True
        self._look.set()

    def _wait_for_disk(self, lacks: str) -> None:
        if not self.waits_for.startswith("disk"):
            log.warning("no VM is started", waits_for=lacks)
        self.waits_for = lacks

    def _upkeep_seconds(self) -> float:
        """Until a claim is due for what only claims see: bad rows, tickets that wait for each other."""
        return max(0.0, self._claimed_at + UPKEEP_SECONDS - time.monotonic()) if self._news else LOOK_SECONDS

    def _until(self, due: Due) -> float:
        next_seconds = LOOK_SECONDS if due.next_ms is None else due.next_ms / 1000 + 0.001
        return min(next_seconds, self._upkeep_seconds(), LOOK_SECONDS)

    def _begin(self, claim: Claim) -> None:
        log.info("ticket started", ticket=claim.ticket.id, attempt=claim.attempt_number, agent=claim.agent.name)
        task = asyncio.create_task(self._attempt(claim))
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._look.set()

    def _complain(self, error: StoreError) -> None:
        if str(error) != self._trouble:
            self._trouble = str(error)
            log.warning("can't claim", error=self._trouble)

    async def _attempt(self, claim: Claim) -> None:
        try:
            ended = await self._worker.attempt(claim)
            if not isinstance(ended.outcome, Interrupted):
                self._ends.append(time.monotonic())
            self._ended(ended)
        except Exception as error:  # a database that is gone for good, or our own mistake: `run` raises it
            self._fail(error)
        finally:
            self._ending.discard(claim.attempt_id)

    async def _sleep_until_due(self, seconds: float | None) -> None:
        """Return when it is worth looking again: nothing is, while all slots are taken and none was freed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._look.is_set() or (seconds is None and self._is_full()):
                    self._look.clear()
                    await self._look.wait()

    def _is_full(self) -> bool:
        return not self.stopping and self._fault is None and self._free <= 0

    async def _listening(self) -> None:
        while True:
            if await self._wake.changed(timeout_seconds=LOOK_SECONDS):
                self._news = True
                self._look.set()
                if self._scheduler is not None:
                    self._scheduler.look()

    # --- ending -----------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Give what runs its grace, then put it back."""
        if self._asked is not None:
            with contextlib.suppress(StoreError):
                for claim in await self._asked.claims:
                    self._begin(claim)
            await asyncio.sleep(0)  # each puts itself back from its first step on
        if self._tasks and self._fault is None:
            log.info("stopping", running=len(self._tasks), grace_seconds=self._grace_seconds)
            finished = asyncio.ensure_future(asyncio.wait(set(self._tasks)))
            hurry = asyncio.ensure_future(self._now.wait())
            await asyncio.wait({finished, hurry}, timeout=self._grace_seconds, return_when=asyncio.FIRST_COMPLETED)
            for waiting in (finished, hurry):
                waiting.cancel()
        rest = set(self._tasks)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    # --- being seen -------------------------------------------------------------------------------------------------

    async def _beating(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            with contextlib.suppress(StoreError):
                await self._beat()

    async def _beat(self) -> None:
        info = {
            **self._info,
            "max_vms": self.max_vms,
            "running": len(self._tasks),
            "per_minute": self.per_minute,
            "stopping": self.stopping,
            "waits_for": self.waits_for,
        }
        await self._store.heartbeat(self._worker.name, host=socket.gethostname(), pid=os.getpid(), info=info)
