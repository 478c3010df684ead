"""Ready machines, made ahead: cloned, renewed, and with every path that an agent will take walked once.

Without KVM a clone starts with none of its code translated, and most of a first ticket's time is translation. So a
machine is not put on the shelf before it has run a small program of ours the way it will run an agent. It is renewed by
then, and nobody else's: identity belongs to the VM, so it can be given early. What ages is its clock, so no machine is
handed out that is older than MAX_AGE_SECONDS or whose clock is off (the guest's clock is the host's counter, without
the host's corrections), and each has to answer before it is handed out.

Filling is background work: a machine being made runs at the lowest priority until somebody takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

import structlog

from swarm.base.aio import finish_uninterrupted, quietly, undoing
from swarm.errors import HostError, SwarmError
from swarm.vm.driver import Template, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.warmup import warm_vm

log = structlog.get_logger(__name__)

MAX_AGE_SECONDS: Final = 600.0
CLOCK_ERROR_SECONDS: Final = 0.5
ANSWER_SECONDS: Final = 2.0
# `auto`: arrivals of this long say how many will come; a template that nobody asked for in so long is let go.
WINDOW_SECONDS: Final = 30.0
FORGET_SECONDS: Final = 600.0
AUTO_MAX: Final = 8
_LOOK_SECONDS: Final = 5.0
_HOPELESS: Final = 3  # failures in a row after which nobody waits for the pool to be full
_LOWEST: Final = 19


@dataclass(slots=True, kw_only=True, eq=False)
class Ready:
    """A machine on the shelf. ``undo`` ends it."""

    live: LiveVm
    undo: AsyncExitStack
    born: float
    death: asyncio.Future[str]

    def close_to_death(self, now: float) -> bool:
        return self.death.done() or now - self.born > MAX_AGE_SECONDS


@dataclass(slots=True, kw_only=True, eq=False)
class Shelf:
    """What is ready, and being made, of one template with the same limits of disk and network."""

    template: Template
    pinned: bool  # asked for at the start: never forgotten
    ready: deque[Ready] = field(default_factory=deque)
    making: int = 0
    arrivals: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    last_asked: float = 0.0
    make_seconds: float = 1.0
    retry_at: float = 0.0
    failures: int = 0  # in a row
    trouble: str = ""  # the last of them


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """For one template: how many are ready, being made, and wanted."""

    key: str
    ready: int
    making: int
    wanted: int


class Pool:
    """``async with Pool(launcher, warm=2):`` while the block lasts, `Launcher.vm` takes from here.

    ``warm``: how many machines are kept ready of each template in use, or None to follow the demand; from the start,
    of those of ``specs``. ``hits`` and ``misses`` count what was asked for. One pool at a time; leave it when every
    machine was given back: it ends those on the shelf.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        warm: int | None,
        specs: Sequence[VmSpec] = (),
        makers: int = 2,
        back_off_seconds: float = 5.0,
    ) -> None:
        self._launcher = launcher
        self._warm = warm
        self._specs = specs
        self._makers = makers
        self._back_off_seconds = back_off_seconds
        self._shelves: dict[tuple[object, ...], Shelf] = {}
        self._unbuilt: SwarmError | OSError | None = None
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self.hits = self.misses = 0

    async def __aenter__(self) -> Pool:
        self._opening = asyncio.create_task(self._open(), name="pool-open")
        self._tasks = [asyncio.create_task(self._filling(), name=f"pool-{i}") for i in range(self._makers)]
        self._tasks.append(self._opening)
        self._launcher.attach(self)
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await finish_uninterrupted(self._drain())

    async def _open(self) -> None:
        """Templates may have to be built first: nobody waits for that."""
        for spec in self._specs:
            try:
                template = await self._launcher.template(spec)
            except (SwarmError, OSError) as error:
                self._unbuilt = error
                log.warning("no template for the pool", error=str(error))
                continue
            if template is not None:
                self._shelf(template).pinned = True
                self._news.set()

    async def filled(self) -> None:
        """Return when everything that is wanted is ready. Raises HostError when none of a kind can be made, or when
        the pool is left meanwhile."""
        await asyncio.wait([self._opening])

        def is_settled() -> bool:
            if self._unbuilt or self._hopeless() or all(task.done() for task in self._tasks):
                return True
            return all(len(s.ready) >= self.wanted(s) and not s.making for s in self._shelves.values())

        async with self._changed:
            await self._changed.wait_for(is_settled)
        if self._unbuilt:
            raise HostError(f"no warm VM can be made: {self._unbuilt}") from self._unbuilt
        if all(task.done() for task in self._tasks):
            raise HostError("no warm VM is made any more: the pool was left")
        if hopeless := self._hopeless():
            raise HostError(f"no warm VM can be made, after {hopeless[0].failures} tries: {hopeless[0].trouble}")

    def _hopeless(self) -> list[Shelf]:
        return [shelf for shelf in self._shelves.values() if shelf.failures >= _HOPELESS]

    def status(self) -> list[PoolStatus]:
        return [
            PoolStatus(key=s.template.key, ready=len(s.ready), making=s.making, wanted=self.wanted(s))
            for s in self._shelves.values()
        ]

    async def take(self, template: Template, assignment: Assignment, undo: AsyncExitStack) -> LiveVm | None:
        """A machine that answers now, or None when there is none. ``undo`` ends it."""
        shelf, now = self._shelf(template), time.monotonic()
        shelf.last_asked = now
        shelf.arrivals.append(now)
        try:
            while shelf.ready:
                ready = shelf.ready.popleft()
                await undo.enter_async_context(ready.undo)
                if ready.close_to_death(now) or not await self._answers(ready):
                    log.warning("a warm VM was not used", vm=ready.live.n, age_seconds=round(now - ready.born))
                    await finish_uninterrupted(quietly(ready.undo.aclose()))
                    continue
                ready.death.cancel()
                _set_priority(ready.live.vm.pid, 0)
                self._launcher.assignment(ready.live, assignment)
                self.hits += 1
                return ready.live
            self.misses += 1
            return None
        finally:
            self._news.set()

    def wanted(self, shelf: Shelf) -> int:
        """How many of these should be ready: as many as arrive while one is made, and one more."""
        now = time.monotonic()
        if not shelf.pinned and now - shelf.last_asked > FORGET_SECONDS:
            return 0
        if self._warm is not None:
            return self._warm
        while shelf.arrivals and now - shelf.arrivals[0] > WINDOW_SECONDS:
            shelf.arrivals.popleft()
        return min(AUTO_MAX, 1 + math.ceil(len(shelf.arrivals) / WINDOW_SECONDS * shelf.make_seconds))

    # --- filling ----------------------------------------------------------------------------------------------------

    def _shelf(self, template: Template) -> Shelf:
        # Limits are each clone's own, and not in the template's key; a machine is made with them.
        kind = (template.key, template.spec.disk_mb_per_second, template.spec.network_mb_per_second)
        if kind not in self._shelves:
            self._shelves[kind] = Shelf(template=template, pinned=False, last_asked=time.monotonic())
        return self._shelves[kind]

    async def _filling(self) -> None:
        while True:
            await self._retire()
            async with self._changed:  # less may be wanted than was
                self._changed.notify_all()
            shelf = self._neediest()
            if shelf is None:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_SECONDS):
                        await self._news.wait()
                continue
            shelf.making += 1
            try:
                await self._make(shelf)
                shelf.failures = 0
            except Exception as error:  # whatever it was (a full disk, no more threads): tickets run without the pool
                shelf.failures, shelf.trouble = shelf.failures + 1, str(error) or repr(error)
                shelf.retry_at = time.monotonic() + self._back_off_seconds
                log.warning("no warm VM could be made", template=shelf.template.key[:12], error=shelf.trouble)
                log.debug("where", exc_info=True)
            finally:
                shelf.making -= 1
                async with self._changed:
                    self._changed.notify_all()

    def _neediest(self) -> Shelf | None:
        now = time.monotonic()
        lacking = [(self.wanted(s) - len(s.ready) - s.making, s) for s in self._shelves.values() if now >= s.retry_at]
        lack, shelf = max(lacking, key=lambda pair: pair[0], default=(0, None))
        return shelf if lack > 0 else None

    async def _make(self, shelf: Shelf) -> None:
        # Asked for each time, as for a ticket: it may have been harmed, removed, or built again with another token. And
        # what is used is not collected.
        shelf.template = await self._launcher.template(shelf.template.spec) or shelf.template
        began = time.monotonic()
        async with undoing() as undo:
            live = await self._launcher.prepare(shelf.template, undo)
            _set_priority(live.vm.pid, _LOWEST)  # what is left to do waits for those who work
            await live.unless_it_dies(warm_vm(live.channel))
            await self._launcher.freshen(live)
            death = asyncio.ensure_future(live.vm.wait())
            death.add_done_callback(lambda _: self._news.set())
            undo.callback(death.cancel)
            shelf.ready.append(Ready(live=live, undo=undo.pop_all(), born=time.monotonic(), death=death))
        shelf.make_seconds = 0.7 * shelf.make_seconds + 0.3 * (time.monotonic() - began)

    async def _retire(self) -> None:
        """End what is dead, too old, or more than is wanted."""
        now = time.monotonic()
        for key, shelf in list(self._shelves.items()):
            wanted = self.wanted(shelf)
            gone = [r for r in shelf.ready if r.close_to_death(now)]
            for ready in gone:
                shelf.ready.remove(ready)
            # Demand comes and goes: one too many is cheaper than one too few.
            while len(shelf.ready) > (max(wanted + 1, wanted * 2) if wanted else 0):
                gone.append(shelf.ready.popleft())
            # The other maker may have let go of it while we closed what was on the one before.
            if not wanted and not shelf.making and not shelf.ready and self._shelves.get(key) is shelf:
                del self._shelves[key]
            await finish_uninterrupted(_close(gone))

    async def _answers(self, ready: Ready) -> bool:
        """It lives, talks, and knows what time it is."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                hello = await ready.live.channel.hello()
        except (SwarmError, TimeoutError):
            return False
        return abs(hello.clock_ns - time.time_ns()) < CLOCK_ERROR_SECONDS * 1e9

    async def _drain(self) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        await _close([ready for shelf in self._shelves.values() for ready in shelf.ready])
        self._shelves.clear()
        self._launcher.detach()
        async with self._changed:  # who waits for a full pool waits no longer
            self._changed.notify_all()
        for error in ended:
            if isinstance(error, Exception):  # our own mistake: not to be lost
                raise error


def _set_priority(pid: int, nice: int) -> None:
    """Of every thread of a VMM: on Linux a priority belongs to a thread."""
    with contextlib.suppress(OSError):  # it is dying; whoever uses it will see
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)


async def _close(lives: list[Ready]) -> None:
    await asyncio.gather(*(quietly(ready.undo.aclose()) for ready in lives))
