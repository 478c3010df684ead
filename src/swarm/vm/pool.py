"""VMs kept ready: cloned, renewed, and warmed up by a program of ours that does what an agent will do.

Without KVM a clone starts with none of its code translated, and most of a first ticket's time is translation. So a VM
counts as ready only after it has run such a program. It has its identity by then: an identity belongs to the VM, so it
can be given early. Its clock ages (the guest's clock is the host's counter, without the host's corrections). So a VM is
not used if it is older than MAX_AGE_SECONDS or its clock is off, and each must answer before it is used.

VMs are made in the background, at the lowest priority until they are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

from swarm.base import priority
from swarm.base.aio import finish_uninterrupted, quietly, undoing
from swarm.base.log import logger
from swarm.errors import HostError, SwarmError
from swarm.vm.driver import Template, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.warmup import told_to_guest, warm_image, warm_vm

log = logger(__name__)

MAX_AGE_SECONDS: Final = 600.0
CLOCK_ERROR_SECONDS: Final = 0.5
ANSWER_SECONDS: Final = 2.0
# `auto`: the requests in this window predict the next ones.
WINDOW_SECONDS: Final = 30.0
# No VMs are kept of a template that was not requested for this long.
FORGET_SECONDS: Final = 600.0
AUTO_MAX: Final = 8
_HOPELESS: Final = 3  # failures in a row after which `filled` gives up


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyVm:
    n: int
    pid: int
    age_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """For one template: its ready VMs, oldest first; how many are being made, and are wanted; ``failures`` in a row to
    make one, and the last failure's message."""

    key: str
    ready: tuple[ReadyVm, ...]
    making: int
    wanted: int
    failures: int
    trouble: str


@dataclass(slots=True, kw_only=True, eq=False)
class _Ready:
    """A ready VM. ``undo`` ends it; ``exited`` is done when it has ended."""

    live: LiveVm
    undo: AsyncExitStack
    made_at: float
    exited: asyncio.Future[str]

    def expired(self, now: float) -> bool:
        return self.exited.done() or now - self.made_at > MAX_AGE_SECONDS


@dataclass(slots=True, kw_only=True, eq=False)
class _Stock:
    """The VMs of one template with the same limits of disk and network."""

    template: Template
    last_request: float
    pinned: bool = False  # requested at the start: never forgotten
    ready: deque[_Ready] = field(default_factory=deque)
    making: int = 0
    requests: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    make_seconds: float = 1.0
    retry_at: float = 0.0
    failures: int = 0  # in a row
    trouble: str = ""  # the last failure


class Pool:
    """``async with Pool(launcher, warm=2):`` for the length of the block, `Launcher.vm` takes VMs from here.

    ``warm``: how many VMs are kept ready of each template in use; None to follow the demand. VMs of ``specs`` are made
    from the start. ``hits`` and ``misses`` count requests. One pool per launcher at a time; leave it after every VM was
    given back: it ends the ready ones. ``makers`` work at the same time, and look every ``look_seconds`` for something
    to do. ``clock`` is read for ages and arrivals.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        warm: int | None,
        specs: Sequence[VmSpec] = (),
        makers: int = 2,
        back_off_seconds: float = 5.0,
        look_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._launcher = launcher
        self._warm = warm
        self._specs = specs
        self._makers = makers
        self._back_off_seconds = back_off_seconds
        self._look_seconds = look_seconds
        self._clock = clock
        self._stocks: dict[tuple[object, ...], _Stock] = {}
        self._unbuilt: SwarmError | OSError | None = None
        self._work = asyncio.Event()  # there may be something to make or to end
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self.hits = self.misses = 0

    async def __aenter__(self) -> Pool:
        self._opening = asyncio.create_task(self._open(), name="pool-open")
        self._tasks = [asyncio.create_task(self._make_vms(), name=f"pool-{i}") for i in range(self._makers)]
        self._tasks.append(self._opening)
        self._launcher.attach(self)
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await finish_uninterrupted(self._close())

    async def _open(self) -> None:
        """In the background, since templates may have to be built first."""
        for spec in self._specs:
            try:
                template = await self._launcher.template(spec)
            except (SwarmError, OSError) as error:
                self._unbuilt = error
                log.warning("no template for the pool", error=str(error))
                continue
            if template is not None:
                self._stock(template).pinned = True
                self._work.set()

    async def filled(self) -> None:
        """Return when as many VMs are ready as are wanted. Raises HostError if none can be made of some template, or if
        the pool is left meanwhile."""
        await asyncio.wait([self._opening])

        def decided() -> bool:
            if self._unbuilt or self._hopeless() or all(task.done() for task in self._tasks):
                return True
            return all(len(s.ready) >= self._wanted(s) and not s.making for s in self._stocks.values())

        async with self._changed:
            await self._changed.wait_for(decided)
        if self._unbuilt:
            raise HostError(f"no warm VM can be made: {self._unbuilt}") from self._unbuilt
        if all(task.done() for task in self._tasks):
            raise HostError("no warm VM is made any more: the pool was left")
        if hopeless := self._hopeless():
            raise HostError(f"no warm VM can be made, after {hopeless[0].failures} tries: {hopeless[0].trouble}")

    def _hopeless(self) -> list[_Stock]:
        return [stock for stock in self._stocks.values() if stock.failures >= _HOPELESS]

    def inspect(self) -> list[PoolStatus]:
        """What the pool holds now, one entry per template (and limits). For operators and tests."""
        now = self._clock()
        return [
            PoolStatus(
                key=stock.template.key,
                ready=tuple(ReadyVm(n=r.live.n, pid=r.live.vm.pid, age_seconds=now - r.made_at) for r in stock.ready),
                making=stock.making,
                wanted=self._wanted(stock),
                failures=stock.failures,
                trouble=stock.trouble,
            )
            for stock in self._stocks.values()
        ]

    async def take(self, template: Template, assignment: Assignment, undo: AsyncExitStack) -> LiveVm | None:
        """A VM that answers now, or None. ``undo`` ends it."""
        stock, now = self._stock(template), self._clock()
        stock.last_request = now
        stock.requests.append(now)
        try:
            while stock.ready:
                ready = stock.ready.popleft()
                await undo.enter_async_context(ready.undo)
                if ready.expired(now) or not await self._answers(ready):
                    log.warning("a warm VM was not used", vm=ready.live.n, age_seconds=round(now - ready.made_at))
                    await finish_uninterrupted(quietly(ready.undo.aclose()))
                    continue
                ready.exited.cancel()
                priority.lower(ready.live.vm.pid, priority.BELOW_ENGINE)
                self._launcher.assign(ready.live, assignment)
                self.hits += 1
                return ready.live
            self.misses += 1
            return None
        finally:
            self._work.set()

    # --- making -----------------------------------------------------------------------------------------------------

    def _wanted(self, stock: _Stock) -> int:
        """How many VMs should be ready: as many as are requested while one is made, and one more."""
        now = self._clock()
        if not stock.pinned and now - stock.last_request > FORGET_SECONDS:
            return 0
        if self._warm is not None:
            return self._warm
        while stock.requests and now - stock.requests[0] > WINDOW_SECONDS:
            stock.requests.popleft()
        return min(AUTO_MAX, 1 + math.ceil(len(stock.requests) / WINDOW_SECONDS * stock.make_seconds))

    def _stock(self, template: Template) -> _Stock:
        # The template's key does not cover the limits: each clone gets its own. Here a VM is made with them.
        kind = (template.key, template.spec.disk_mb_per_second, template.spec.network_mb_per_second)
        if kind not in self._stocks:
            self._stocks[kind] = _Stock(template=template, last_request=self._clock())
        return self._stocks[kind]

    async def _make_vms(self) -> None:
        while True:
            await self._remove_surplus()
            async with self._changed:  # less may be wanted than before
                self._changed.notify_all()
            stock = self._neediest()
            if stock is None:
                self._work.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._look_seconds):
                        await self._work.wait()
                continue
            stock.making += 1
            try:
                await self._make(stock)
                stock.failures = 0
            except Exception as error:  # any (a full disk, no more threads): tickets run without the pool
                stock.failures, stock.trouble = stock.failures + 1, str(error) or repr(error)
                stock.retry_at = self._clock() + self._back_off_seconds
                log.warning("no warm VM could be made", template=stock.template.key[:12], error=stock.trouble)
                log.debug("where", exc_info=True)
            finally:
                stock.making -= 1
                async with self._changed:
                    self._changed.notify_all()

    def _neediest(self) -> _Stock | None:
        now = self._clock()
        lacking = [(self._wanted(s) - len(s.ready) - s.making, s) for s in self._stocks.values() if now >= s.retry_at]
        lack, stock = max(lacking, key=lambda pair: pair[0], default=(0, None))
        return stock if lack > 0 else None

    async def _make(self, stock: _Stock) -> None:
        # Looked up each time, as for a ticket: it may have been damaged, removed, or rebuilt with another token. And
        # a template that is looked up counts as used, so it is not collected.
        stock.template = await self._launcher.template(stock.template.spec) or stock.template
        began = self._clock()
        async with undoing() as undo:
            live = await self._launcher.clone(stock.template, undo)
            priority.lower(live.vm.pid, priority.LOWEST)  # the rest yields to VMs in use
            own_root = told_to_guest(stock.template.spec) is None
            await live.while_alive(warm_vm(live.channel) if own_root else warm_image(live.channel))
            await self._launcher.renew(live)
            exited = asyncio.ensure_future(live.vm.wait())
            exited.add_done_callback(lambda _: self._work.set())
            undo.callback(exited.cancel)
            stock.ready.append(_Ready(live=live, undo=undo.pop_all(), made_at=self._clock(), exited=exited))
        stock.make_seconds = 0.7 * stock.make_seconds + 0.3 * (self._clock() - began)

    async def _remove_surplus(self) -> None:
        """End VMs that are dead, too old, or more than are wanted."""
        now = self._clock()
        for kind, stock in list(self._stocks.items()):
            wanted = self._wanted(stock)
            surplus = [ready for ready in stock.ready if ready.expired(now)]
            for ready in surplus:
                stock.ready.remove(ready)
            # Demand varies: one VM too many costs less than one too few.
            while len(stock.ready) > (max(wanted + 1, wanted * 2) if wanted else 0):
                surplus.append(stock.ready.popleft())
            # The other maker may have removed it while we ended VMs of the one before.
            if not wanted and not stock.making and not stock.ready and self._stocks.get(kind) is stock:
                del self._stocks[kind]
            await finish_uninterrupted(_end(surplus))

    async def _answers(self, ready: _Ready) -> bool:
        """Is it alive, does it answer, and is its clock right?"""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                hello = await ready.live.channel.hello()
        except (SwarmError, TimeoutError):
            return False
        return abs(hello.clock_ns - time.time_ns()) < CLOCK_ERROR_SECONDS * 1e9

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        await _end([ready for stock in self._stocks.values() for ready in stock.ready])
        self._stocks.clear()
        self._launcher.detach()
        async with self._changed:  # `filled` need not wait any longer
            self._changed.notify_all()
        for error in ended:
            if isinstance(error, Exception):  # a bug of ours: it must not get lost
                raise error


async def _end(vms: list[_Ready]) -> None:
    await asyncio.gather(*(quietly(ready.undo.aclose()) for ready in vms))
