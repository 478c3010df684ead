"""Run a benchmark: real tickets in a separate database, the real engine, real VMs."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import socket
import sqlite3
import tempfile
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import psutil

from swarm.app import setup, wiring
from swarm.base import cgroup, process
from swarm.base.clock import Timeline
from swarm.base.progress import Progress, silent
from swarm.bench import baselines
from swarm.bench.report import Cell, Figure, Report, percentiles
from swarm.bench.sandboxes import Sandboxes
from swarm.config import Settings, load
from swarm.engine.dispatch import Dispatcher
from swarm.engine.values import Values
from swarm.engine.worker import Ended, Worker
from swarm.errors import HostError, SwarmError
from swarm.model import Succeeded
from swarm.store.store import Store
from swarm.vm.choose import PROBE_PREFIX, Choice
from swarm.vm.driver import Image, VmSpec
from swarm.vm.image.staging import used
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.pool import Pool
from swarm.vm.slots.sweep import take

MODES: Final = ("cold", "restored", "pool")
ECHO: Final = "0d72b1b5-a98e-4356-bf52-f654d0509dc4"
SINGLES: Final = 7  # runs of a single ticket, since one run says little
_REPEATS: Final = 5  # of each baseline
# Forks inside the guest, and prints the milliseconds of the first.
_FORKS = b"""import os, time
took = []
for _ in range(6):
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    took.append((time.monotonic() - began) * 1000)
print(took[0])
"""


@dataclass(kw_only=True)
class _Context:
    settings: Settings
    choice: Choice
    image: Image
    max_vms: int
    dir: Path

    @property
    def spec(self) -> VmSpec:
        """The VM that the echo agent's manifest describes."""
        return VmSpec(image=self.image)


async def bench(
    settings: Settings,
    *,
    tickets: Sequence[int] = (1, 5, 25),
    modes: Sequence[str] = MODES,
    max_vms: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Run everything. Tickets are put into a separate database, which is removed afterwards; images, templates and the
    network are the host's. Raises HostError if this host can't run VMs."""
    load_before = _load()
    async with _context(settings, max_vms) as context:
        async with wiring.store(context.settings) as store:
            todo = [(mode, count) for mode in modes for count in tickets if mode != "cold" or count == min(tickets)]
            cells = []
            for done, (mode, count) in enumerate(todo):
                progress(f"{mode} x {count}", done / (len(todo) + 2))
                cells.append(await _cell(context, store, mode, count))
            progress("baselines", len(todo) / (len(todo) + 2))
            async with _slot(context):
                figures = await _figures(context, cells)
        return Report(host={**_host(context), "load_before": load_before}, cells=tuple(cells), figures=tuple(figures))


async def bench_sandboxes(settings: Settings, *, progress: Progress = silent) -> Report:
    """Measure pause, resume and fork. Raises HostError if this host can't run VMs with QEMU."""
    load_before = _load()
    async with _context(settings, None) as context:
        sandboxes = Sandboxes(
            launcher=wiring.launcher(context.settings, context.choice),
            snapshots=wiring.snapshots(context.settings),
            spec=context.spec,
        )
        figures = await sandboxes.figures(progress)
        return Report(host={**_host(context), "load_before": load_before}, cells=(), figures=tuple(figures))


@asynccontextmanager
async def _context(settings: Settings, max_vms: int | None) -> AsyncIterator[_Context]:
    with _on_disk(settings) as place, used(Path(place)):
        shared = {"images_dir": settings.images, "templates_dir": settings.templates, "snapshots_dir": None}
        own = load(**{**settings.model_dump(), **shared, "home": Path(place) / "home", "database_url": ""})
        await setup.init(own, image=False)
        await wiring.sweep(own)
        image, chosen = await setup.ensure_image(own), await wiring.choice(own)
        vms = max_vms or max(2, int(cgroup.cpus()))
        yield _Context(settings=own, choice=chosen, image=image, max_vms=vms, dir=Path(place))


@asynccontextmanager
async def _slot(context: _Context) -> AsyncIterator[None]:
    """For the length of the block, nobody else uses the slot of bare VMMs."""
    lease = await take(wiring.inventory(context.settings), wiring.network(context.settings), _SLOT, replace=False)
    try:
        yield
    finally:
        lease.release()


# --- cells ------------------------------------------------------------------------------------------------------------


async def _cell(context: _Context, store: Store, mode: str, count: int) -> Cell:
    launcher = wiring.launcher(context.settings, context.choice, clones=mode != "cold")
    if mode != "cold":
        await launcher.template(context.spec)  # not measured: it is made once, and kept
    done: dict[str, tuple[float, Ended]] = {}
    another_ended = asyncio.Event()

    def ended(end: Ended) -> None:
        done[end.claim.ticket.id] = (time.perf_counter(), end)
        another_ended.set()

    async with launcher.keeping(context.max_vms, ahead=min(2, context.max_vms)), AsyncExitStack() as stack:
        pool = None
        if mode == "pool":
            warm = min(count, context.max_vms)
            pool = await stack.enter_async_context(Pool(launcher, warm=warm, specs=[context.spec]))
        serving = await stack.enter_async_context(_serving(context, store, launcher, ended))
        cpu, began = _cpu(), 0.0
        inserted: dict[str, float] = {}
        seconds = 0.0
        for batch in range(SINGLES if count == 1 else 1):
            if pool:
                await pool.filled()
            ids = [f"bench-{mode}-{count}-{batch}-{n}" for n in range(count)]
            began = time.perf_counter()
            await asyncio.to_thread(_insert, context.settings.data_dir / "swarm.db", ids)
            inserted.update(dict.fromkeys(ids, began))
            while not set(ids) <= done.keys():
                another_ended.clear()
                waiting = asyncio.ensure_future(another_ended.wait())
                await asyncio.wait({serving, waiting}, return_when=FIRST_COMPLETED)  # the engine may fail, too
                waiting.cancel()
                if serving.done():
                    await serving
                    raise HostError("the engine of the benchmark has ended before its tickets")
            seconds += time.perf_counter() - began
        used = [after - before for before, after in zip(cpu, _cpu(), strict=True)]
    ends = [end for _, end in done.values()]
    phases = {name for end in ends for name in end.timings}
    return Cell(
        mode=mode,
        tickets=count,
        n=len(ends),
        insert_to_done=percentiles([(at - inserted[id]) * 1000 for id, (at, _) in done.items()]),
        phases={name: percentiles([end.timings.get(name, 0.0) for end in ends]) for name in phases},
        per_second=round(len(ends) / seconds, 2),
        engine_cpu_ms=round(used[0] * 1000 / len(ends), 1),
        vmm_cpu_ms=round(used[1] * 1000 / len(ends), 1),
        failed=sum(not isinstance(end.outcome, Succeeded) for end in ends),
    )


@asynccontextmanager
async def _serving(
    context: _Context, store: Store, launcher: Launcher, ended: Callable[[Ended], None]
) -> AsyncIterator[asyncio.Task[None]]:
    settings = context.settings
    async with wiring.egress(settings, store) as egress, Values() as values, store.watching() as wake:
        worker = Worker(
            store=store,
            engine=wiring.engine(settings, launcher, egress, values, files=store),
            name=f"{socket.gethostname()}:{os.getpid()}:bench",
            lease_seconds=settings.lease_seconds,
        )
        dispatcher = Dispatcher(
            store=store,
            worker=worker,
            wake=wake,
            max_vms=context.max_vms,
            memory=None,
            grace_seconds=60,
            ended=ended,
            inputs_fault=values.fault,
        )
        serving = asyncio.create_task(dispatcher.run())
        try:
            yield serving
        finally:
            dispatcher.stop()
            await serving


def _insert(database: Path, ids: Sequence[str]) -> None:
    """With plain SQL, as any tool can."""
    statement = (
        "INSERT INTO tickets"
        " (id, project_id, title, state, agent_id, assignee_id, assignee_type, execution_mode, inputs)"
        " VALUES (?, 'bench', 'bench', 'ready', ?, ?, 'agent', 'agent', '{\"n\": 1}')"
    )
    connection = sqlite3.connect(database, timeout=30)
    with connection:
        connection.executemany(statement, [(id, ECHO, ECHO) for id in ids])
    connection.close()


def _cpu() -> tuple[float, float]:
    """CPU seconds of this process, and of its children that have ended (VMMs and their helpers)."""
    return tuple(  # type: ignore[return-value]
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


# --- figures beside baselines -----------------------------------------------------------------------------------------


async def _figures(context: _Context, cells: Sequence[Cell]) -> list[Figure]:
    launcher = wiring.launcher(context.settings, context.choice)
    template = await launcher.template(context.spec)
    accelerator = context.choice.probe.accelerator
    single = {cell.mode: cell for cell in cells if cell.tickets == min(c.tickets for c in cells)}
    found: list[Figure] = []

    def add(name: str, ours: float, baseline: float | None, *, n: int, unit: str = "ms", target: str = "") -> None:
        rounded = None if baseline is None else round(baseline, 2)
        found.append(Figure(name=name, ours=round(ours, 2), baseline=rounded, unit=unit, n=n, target=target))

    if context.choice.driver.name == "qemu":
        colds = [
            await baselines.cold_boot(context.image, _fresh(context), memory_mb=256, accelerator=accelerator)
            for _ in range(3)
        ]
        phases = single["cold"].phases if "cold" in single else {}
        if {"vmm", "boot"} <= phases.keys():  # absent if every ticket failed before
            booted_ms = phases["vmm"]["p50"] + phases["boot"]["p50"]
            add("cold boot to userspace", booted_ms, median(colds), n=len(colds))
    if template is not None and context.choice.driver.name == "qemu":
        network = wiring.network(context.settings)
        await network.ensure_host()
        ours: list[baselines.Clone] = []
        bare: list[baselines.Clone] = []
        forks: list[tuple[float, float]] = []
        for _ in range(_REPEATS):  # alternately, so that both see the same load
            slot = await network.create(_SLOT)
            try:
                bare.append(await baselines.clone(template, slot, _fresh(context), accelerator=accelerator))
            finally:
                await network.destroy(_SLOT)
            timeline = Timeline()
            async with launcher.vm(context.spec, Assignment(), timeline) as live:
                ours.append(_clone(live, timeline))
                forks.append(await _fork(live))

        def compare(name: str, of: Callable[[baselines.Clone], float], *, unit: str = "ms", target: str = "") -> None:
            add(name, median(map(of, ours)), median(map(of, bare)), n=_REPEATS, unit=unit, target=target)

        compare("restore to the VM running", lambda c: c.running_ms)
        compare("restore to agentd answering", lambda c: c.answered_ms, target="<= 1.3 x")
        compare("CPU of a clone until it has its identity", lambda c: c.cpu_ms, target="<= 1.3 x")
        add("TCP connect to a fresh clone", median(c.connect_ms for c in bare), None, n=_REPEATS)
        start_ms, fork_ms = (median(times) for times in zip(*forks, strict=True))
        add("agent's start in a fresh clone (bare: a fork)", start_ms, fork_ms, n=_REPEATS)
        compare("memory private to a clone", lambda c: c.private_kb / 1024, unit="MB", target="<= 1.1 x")
        compare("memory of a clone, proportional (PSS)", lambda c: c.pss_kb / 1024, unit="MB")
    took = []
    network = wiring.network(context.settings)
    await network.create(_SLOT)
    try:
        for _ in range(_REPEATS):
            began = time.perf_counter()
            await network.recycle(_SLOT)
            took.append((time.perf_counter() - began) * 1000)
    finally:
        await network.destroy(_SLOT)
    add("network slot, used again", median(took), None, n=len(took), target="<= 5 ms")
    busiest = max(cells, key=lambda cell: cell.tickets)
    add(
        f"engine's CPU for a ticket, {busiest.mode} x {busiest.tickets} (bare: its VMM's)",
        busiest.engine_cpu_ms,
        busiest.vmm_cpu_ms,
        n=busiest.n,
        target="<= 0.15 x",
    )
    ssh = await _cold_ssh(context)
    for mode, target in (("restored", "<= 250 ms"), ("pool", "<= 100 ms")):
        if (cell := single.get(mode)) and cell.tickets == 1:
            add(
                f"INSERT to done, {mode} (bare: cold boot + ssh)",
                cell.insert_to_done["p50"],
                ssh,
                n=cell.n,
                target=f"{target}, <= 0.033 x",
            )
    return found


def _clone(live: LiveVm, timeline: Timeline) -> baselines.Clone:
    phases, cpu_ms = timeline.phases(), baselines.cpu_ms_of(live.vm.pid)
    private_kb, pss_kb = baselines.memory_of(live.vm.pid)
    return baselines.Clone(
        running_ms=phases["vmm"],
        answered_ms=phases["vmm"] + phases["boot"],
        cpu_ms=cpu_ms,
        private_kb=private_kb,
        pss_kb=pss_kb,
    )


async def _fork(live: LiveVm) -> tuple[float, float]:
    """Milliseconds in a new clone: from the order to start an agent to its first instruction; a bare fork by it."""
    printed = bytearray()
    await live.channel.put({"fork.py": _FORKS}, dest="/agent", owner="root")
    ended = await live.channel.run(
        ["/agent/fork.py"], warm=True, timeout_seconds=60, on_output=lambda _, data: printed.extend(data)
    )
    return (ended.started_ns - ended.received_ns) / 1e6, float(printed)


async def _cold_ssh(context: _Context) -> float | None:
    """Milliseconds to boot a VM and run one command in it by ssh, as one would without Swarm; None if it failed."""
    launcher = wiring.launcher(context.settings, context.choice, clones=False)
    key = wiring.ssh_dir(context.settings).key
    began = time.perf_counter()
    try:
        async with launcher.vm(context.spec, Assignment(), Timeline()) as live:
            options = ("BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ConnectTimeout=30")
            flags = [word for option in options for word in ("-o", option)]
            await process.run(
                ["ssh", "-F", "none", "-i", str(key), *flags, f"root@{live.vm.endpoint.host}", "true"],
                timeout_seconds=60,
            )
            return (time.perf_counter() - began) * 1000
    except SwarmError:
        return None


_SLOT: Final = 65_432


def _fresh(context: _Context) -> Path:
    return Path(tempfile.mkdtemp(dir=context.dir))


def _on_disk(settings: Settings) -> tempfile.TemporaryDirectory[str]:
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        # By this name, and a lock that ends with this process, a sweep finds what a killed benchmark leaves.
        return tempfile.TemporaryDirectory(prefix=f"{PROBE_PREFIX}bench-", dir=settings.state_dir)
    except OSError as error:
        raise HostError(f"can't write to {settings.state_dir}: {error.strerror}: run this as root") from error


def _load() -> float:
    """Load of the last minute."""
    return round(os.getloadavg()[0], 2)


def _host(context: _Context) -> dict[str, object]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "driver": context.choice.describe().partition(", because")[0],
        "kvm": context.choice.probe.accelerator == "kvm",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_mb": psutil.virtual_memory().total >> 20,
        "load": _load(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "image": context.image.digest[:12],
        "max_vms": context.max_vms,
    }
