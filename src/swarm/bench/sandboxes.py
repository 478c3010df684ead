"""What sandboxes cost: pause, resume, fork, a command in a guest, beside what QEMU alone needs for the same."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Final

from swarm.base.aio import undoing
from swarm.base.clock import Timeline
from swarm.base.progress import Progress
from swarm.bench import baselines
from swarm.bench.report import Figure
from swarm.channel import Channel, processes
from swarm.channel.guest import Guest
from swarm.channel.processes import Order
from swarm.errors import HostError
from swarm.vm.driver import Snapshot, VmSpec
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.slots.slot_pool import VmSlot
from swarm.vm.snapshots import Snapshots

FORKS: Final = 16
_REPEATS: Final = 5
_EXECS: Final = 15
_SECONDS: Final = 60.0
_TRUE: Final = ("/bin/true",)


class Sandboxes:
    """Measures in VMs of ``launcher``."""

    def __init__(self, *, launcher: Launcher, snapshots: Snapshots, spec: VmSpec) -> None:
        self._launcher = launcher
        self._snapshots = snapshots
        self._spec = spec
        self._accelerator = launcher.choice.probe.accelerator
        self._found: list[Figure] = []

    async def figures(self, progress: Progress) -> list[Figure]:
        """Raises HostError, if the driver is not QEMU: only beside it does a bare VMM say something."""
        if self._launcher.choice.driver.name != "qemu":
            raise HostError("sandboxes are measured beside a bare QEMU: set SWARM_DRIVER=qemu")
        await self._launcher.template(self._spec)
        async with self._launcher.keeping(FORKS + 1, ahead=2), AsyncExitStack() as stack:
            progress("a sandbox", 0.0)
            parent = await stack.enter_async_context(self._launcher.vm(self._spec, Assignment(), Timeline()))
            await self._exec(parent)
            progress("snapshots of it", 0.1)
            saved = await self._standstill(parent)
            progress("pause and resume", 0.3)
            await self._pause_and_resume(saved)
            progress(f"{FORKS} forks", 0.7)
            await self._forks(saved)
            await self._snapshots.remove(saved.id)
            progress("commands in it", 0.9)
            await self._round_trips(parent)
        return self._found

    def _add(
        self, name: str, ours: float, bare: float | None, *, n: int, unit: str = "ms", target: str = "<= 1.3 x"
    ) -> None:
        baseline = None if bare is None else round(bare, 2)
        self._found.append(Figure(name=name, ours=round(ours, 2), baseline=baseline, unit=unit, n=n, target=target))

    async def _round_trips(self, live: LiveVm) -> None:
        guest = Guest(live.vm.endpoint, live.identity.token)
        ours, floor = [], []
        try:
            for _ in range(_EXECS):
                began = time.perf_counter()
                await processes.run(guest.open, Order(argv=_TRUE))
                ours.append(_ms(began))
                began = time.perf_counter()
                await live.channel.run(_TRUE, timeout_seconds=_SECONDS)
                floor.append(_ms(began))
        finally:
            await guest.close()
        self._add("a command in a sandbox (bare: a ticket's)", median(ours), median(floor), n=_EXECS)

    async def _standstill(self, live: LiveVm) -> Snapshot:
        """Returns the last snapshot."""
        standstill, whole = [], []
        for last in (False,) * (_REPEATS - 1) + (True,):
            frozen_at = 0.0

            async def freeze() -> None:
                nonlocal frozen_at
                frozen_at = time.perf_counter()
                await live.freeze()

            if not last:  # with its parts apart
                async with self._snapshots.stage() as stage:
                    await live.vm.save(stage.dir, freeze=freeze)
                    await live.thaw()
                    standstill.append(_ms(frozen_at))
            began = time.perf_counter()
            async with self._snapshots.stage() as stage:
                saved = await self._launcher.save(live, stage)
            whole.append(_ms(began))
            if not last:
                await self._snapshots.remove(saved.id)
        self._add("standstill while it is saved", median(standstill), None, n=len(standstill), target="<= 100 ms")
        self._add("a snapshot, sealed", median(whole), None, n=len(whole), target="")
        self._add("a snapshot on disk", saved.size_bytes / (1 << 20), None, n=1, unit="MB", target="")
        return saved

    async def _pause_and_resume(self, saved: Snapshot) -> None:
        pauses: list[float] = []
        bare_pauses: list[float] = []
        resumes: list[float] = []
        bare_resumes: list[float] = []
        private: list[int] = []
        bare_private: list[int] = []
        for _ in range(_REPEATS):  # alternately, so that both see the same load
            async with self._bare(saved) as (bare, place):
                bare_resumes.append(_ms(bare.began))
                if place.slot:  # so that its memory compares with that of a VM of Swarm's
                    await baselines.renew(place.slot, saved.identity.token)
                bare_private.append(baselines.memory_of(bare.pid)[0])
                bare_pauses.append(await baselines.pause(bare, place.lease.dir / "vm"))
            async with self._launcher.restored(saved, Assignment(), Timeline(), fork=True) as fork:
                await self._exec(fork)
                private.append(baselines.memory_of(fork.vm.pid)[0])
                async with self._snapshots.stage() as stage:
                    paused = await self._launcher.pause(fork, stage)
            began = time.perf_counter()
            async with self._launcher.restored(paused, Assignment(), Timeline(), fork=False) as again:
                await self._exec(again)
                resumes.append(_ms(began))
                await self._snapshots.remove(paused.id)
                began = time.perf_counter()
                async with self._snapshots.stage() as stage:
                    paused = await self._launcher.pause(again, stage)
                pauses.append(_ms(began))
            await self._snapshots.remove(paused.id)
        self._add("pause (bare: stop, migrate to a file, quit)", median(pauses), median(bare_pauses), n=_REPEATS)
        self._add("resume to the first command's end", median(resumes), median(bare_resumes), n=_REPEATS)
        memory = median(private) / 1024, median(bare_private) / 1024
        self._add("memory private to an idle fork", *memory, n=_REPEATS, unit="MB", target="<= 1.2 x")

    async def _forks(self, saved: Snapshot) -> None:
        async with AsyncExitStack() as stack:

            async def bare() -> float:
                vmm, _ = await stack.enter_async_context(self._bare(saved))
                return baselines.cpu_ms_of(vmm.pid)

            began = time.perf_counter()
            bare_cpu = sum(await asyncio.gather(*(bare() for _ in range(FORKS))))
            bare_wall = _ms(began)
        await self._launcher.slots.idle()  # those of the bare ones are reset
        async with AsyncExitStack() as stack:

            async def fork() -> float:
                context = self._launcher.restored(saved, Assignment(), Timeline(), fork=True)
                live = await stack.enter_async_context(context)
                await self._exec(live)
                return baselines.cpu_ms_of(live.vm.pid)

            before, began = _own_cpu_ms(), time.perf_counter()
            cpu = sum(await asyncio.gather(*(fork() for _ in range(FORKS))))
            wall, cpu = _ms(began), cpu + _own_cpu_ms() - before
        self._add(f"CPU until {FORKS} forks at once have answered", cpu, bare_cpu, n=1)
        self._add(f"time until {FORKS} forks at once have answered", wall, bare_wall, n=1)

    @asynccontextmanager
    async def _bare(self, saved: Snapshot) -> AsyncIterator[tuple[baselines.Bare, VmSlot]]:
        """A bare VMM with a fork in which a command has just run, as in ours; and its slot."""
        async with undoing() as undo:
            place = await self._launcher.slots.take(undo)
            assert place.slot, "QEMU's VMs have a network"
            dir, slot = place.lease.dir, place.slot
            context = baselines.restored(saved.dir, saved.spec, slot, dir, accelerator=self._accelerator)
            bare = await undo.enter_async_context(context)
            token = saved.identity.token
            async with Channel.connect(slot.agentd, token=token, timeout_seconds=_SECONDS, listening=True) as channel:
                await processes.thaw(channel.converse)
                await processes.run(channel.converse, Order(argv=_TRUE))
            yield bare, place

    async def _exec(self, live: LiveVm) -> None:
        await processes.run(live.channel.converse, Order(argv=_TRUE))


def _own_cpu_ms() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_utime + usage.ru_stime) * 1000


def _ms(began: float) -> float:
    return (time.perf_counter() - began) * 1000
