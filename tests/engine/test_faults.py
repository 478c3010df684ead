"""What the host may do to an engine: a full disk, a read-only file, no descriptors left. It is survived, or ends the
engine with one clear line; either way no ticket is lost, and nothing of a VM stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.errors import HostError, StoreError
from swarm.model import RetryPolicy, Ticket
from swarm.vm.driver import Image
from tests.conftest import PATIENCE_SECONDS
from tests.engine.conftest import Bench, ended, engine_process, log_until, proved, running, serving

DONE = "import json; json.dump({}, open('output.json', 'w'))"
pytestmark = pytest.mark.needs("netns")  # mounts of our own


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


@asynccontextmanager
async def bench_at(settings: Settings, home: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    own = config.load(
        **{
            **settings.model_dump(),
            "home": home,
            "driver": "process",
            "lease_seconds": 3.0,
            "busy_timeout_seconds": 2.0,
        }
    )
    await setup.init(own, image=False)
    async with wiring.store(own) as store, wiring.worker(own, store) as worker:
        yield Bench(settings=own, store=store, worker=worker, dir=tmp_path)


def fill(disk: Path) -> Path:
    """Not a byte is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass
    return ballast


async def test_a_full_disk_is_waited_for(settings: Settings, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4096) as disk:
        async with bench_at(settings, disk / "home", tmp_path) as bench:
            agent = await bench.agent(DONE)
            async with serving(bench):
                bench.insert("first", agent.id)
                assert await ended(bench, "first") == ["done"]
                bench.insert("second", agent.id, state="draft")
                ballast = fill(disk)
                # The log has a few bytes of free pages, perhaps: so a big one, that surely needs new ones.
                with pytest.raises(sqlite3.OperationalError, match=r"full|I/O"):
                    bench.sql("UPDATE tickets SET description = hex(zeroblob(400000)) WHERE id = 'second'")
                ballast.unlink()
                bench.sql("UPDATE tickets SET state = 'ready' WHERE id = 'second'")
                fill(disk)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended(bench, "second"), 1.5)
                ballast.unlink()
                with contextlib.suppress(StoreError):
                    assert await ended(bench, "second") == ["done"]
            await proved(bench)


async def test_an_outcome_that_cannot_be_written_ends_the_engine(settings: Settings, tmp_path: Path) -> None:
    """The disk fills up while an agent runs, and stays full for longer than a lease."""
    with small_disk(tmp_path / "disk", 4096) as disk:
        async with bench_at(settings, disk / "home", tmp_path) as bench:
            gate = tmp_path / "gate"
            os.mkfifo(gate)
            big = "import json; json.dump('x' * 200000, open('output.json', 'w'))"
            agent = await bench.agent(f"print('up', flush=True)\nopen({str(gate)!r}).read()\n{big}")
            bench.insert("t", agent.id)
            with pytest.raises(StoreError, match="full"):
                async with running(bench) as (_, engine), asyncio.timeout(PATIENCE_SECONDS):
                    await bench.until_it_prints()
                    ballast = fill(disk)
                    await asyncio.to_thread(gate.write_text, "go")
                    await asyncio.wait({engine})
                    ballast.unlink()
            assert bench.live_vms() == []
            await bench.store.shift_clock(60_000)
            async with serving(bench):
                await asyncio.to_thread(gate.write_text, "go")
                assert await ended(bench, "t") == ["done"]
            *before, last = [attempt.outcome for attempt in await bench.attempts()]
            assert last == "succeeded" and before and set(before) <= {"lost", "interrupted"}
            await proved(bench)


async def test_a_read_only_file_system_is_waited_for(settings: Settings, tmp_path: Path) -> None:
    """As after a disk fault: nothing can be written until it is fixed, and then everything continues."""
    with small_disk(tmp_path / "disk", 16384) as disk:
        async with bench_at(settings, disk / "home", tmp_path) as bench:
            agent = await bench.agent(DONE)
            bench.insert("t", agent.id, state="draft")
        remount(disk, "ro")
        own = bench.settings.model_copy(update={"home": disk / "home"})
        with pytest.raises(StoreError, match=r"read-only|can't open the database"):
            async with wiring.store(own) as store:
                await store.claim("w", lease_seconds=3)
        remount(disk, "rw")
        async with wiring.store(own) as store, wiring.worker(own, store) as worker:
            again = Bench(settings=own, store=store, worker=worker, dir=tmp_path)
            again.sql("UPDATE tickets SET state = 'ready' WHERE id = 't'")
            async with serving(again):
                assert await ended(again, "t") == ["done"]


@pytest.mark.parametrize("left", [0, 1, 2, 3])
async def test_out_of_file_descriptors(plain: Bench, left: int) -> None:
    """One clear line, every VM gone, the tickets go back; with descriptors again, all are done."""
    agent = await plain.agent(DONE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(HostError, match="Too many open files"):
        async with running(plain) as (_, engine):
            await plain.store.add_ticket(Ticket(id="first", title="t", state="ready", agent_id=agent.id))
            assert await ended(plain, "first") == ["done"]  # all that is imported late has been
            used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
            free = next(number for number in range(len(used) + 1) if number not in used)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + left, before[1]))  # the limit is one of numbers
            try:
                await plain.store.add_ticket(Ticket(id="t", title="t", state="ready", agent_id=agent.id))
                await asyncio.wait({engine}, timeout=60)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            assert engine.done()
    assert plain.live_vms() == []
    (step,) = await plain.store.steps("t")
    assert (step.status, step.retry_count) == ("ready", 0)
    async with serving(plain):
        assert await ended(plain, "t") == ["done"]


async def test_no_vm_is_started_on_a_disk_that_is_nearly_full(settings: Settings, tmp_path: Path) -> None:
    """The one with the VMs' files: the ticket waits, status says why, and it starts when there is room."""
    with small_disk(tmp_path / "vms", 65536) as disk:
        ours = settings.model_copy(update={"state_dir": disk})
        async with bench_at(ours, tmp_path / "home", tmp_path) as bench:
            agent = await bench.agent(DONE)
            ballast = disk / "ballast"
            ballast.write_bytes(b"\0" * (62 << 20))
            async with engine_process(bench) as engine:
                await log_until(engine, "engine serves")
                bench.insert("t", agent.id)
                said = await log_until(engine, "no VM is started")
                assert re.match(rf"disk: [012] MB are free in {disk}, of which 3 MB are kept", str(said["waits_for"]))
                await bench.until(lambda: _told(bench, "disk: "))
                assert [await bench.store.attempts("t"), bench.live_vms()] == [[], []]
                ballast.unlink()
                assert await ended(bench, "t") == ["done"]
                engine.terminate()
                await log_until(engine, "engine stopped")


async def _told(bench: Bench, why: str) -> bool:
    return any(str(row.info.get("waits_for")).startswith(why) for row in await bench.store.workers())


def allow_memory(pid: int, headroom_mb: int | None) -> None:
    """So much more than the process has now; None: whatever it wants."""
    (line,) = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmData")]
    limit = resource.RLIM_INFINITY if headroom_mb is None else (int(line.split()[1]) << 10) + (headroom_mb << 20)
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


async def test_an_output_that_does_not_fit_into_memory(plain: Bench) -> None:
    """It fails its own ticket and no other: it is read in a process that gets no more memory than the engine."""
    huge = """open('output.json', 'w').write('[' + '"ab",' * 3_000_000 + '0]')"""  # 15 MB, and 180 MB once it is parsed
    glutton = await plain.agent(huge, "glutton", retry=RetryPolicy(delay_seconds=0.05))
    modest = await plain.agent(DONE, "modest")
    async with engine_process(plain) as engine:
        await log_until(engine, "engine serves")
        allow_memory(engine.pid, 128)
        plain.insert("big", glutton.id)
        plain.insert("small", modest.id)
        assert await ended(plain, "big", "small") == ["failed", "done"]
        assert "of memory when it is read" in str((await plain.store.ticket("big")).error)
        engine.terminate()
        await log_until(engine, "engine stopped")
    await proved(plain)


@pytest.mark.parametrize(("headroom_mb", "row_bytes"), [(2, 2_000_000), (4, 10)], ids=["for rows", "for threads"])
async def test_out_of_memory(plain: Bench, headroom_mb: int, row_bytes: int) -> None:
    """Hardly more than at its start, but for what Python itself needs: with not a page to spare it loses errors. The
    engine waits for memory, or ends with one clear line."""
    agent = await plain.agent(DONE)
    ids = [f"t-{n}" for n in range(6)]
    async with engine_process(plain, SWARM_LEASE_SECONDS="2") as engine:
        await log_until(engine, "engine serves")
        allow_memory(engine.pid, headroom_mb)
        for id_ in ids:
            plain.insert(id_, agent.id, description="x" * row_bytes)
        ending = asyncio.create_task(engine.communicate())
        await asyncio.wait({ending}, timeout=3)
        if not ending.done():
            allow_memory(engine.pid, None)
            served = asyncio.create_task(ended(plain, *ids))
            # It may be about to end already: what it could not do before is known to it only now.
            await asyncio.wait({ending, served}, return_when=asyncio.FIRST_COMPLETED)
            if served.done():
                await served
                engine.terminate()
            else:
                served.cancel()
        said = (await ending)[1].decode().strip()
    assert "Traceback" not in said
    if engine.returncode:
        assert said.splitlines()[-1].startswith("error: ") and ("memory" in said or "thread" in said)
    async with engine_process(plain, SWARM_LEASE_SECONDS="2") as engine:
        await log_until(engine, "engine serves")
        assert await ended(plain, *ids) == ["done"] * len(ids)
        engine.terminate()
        await log_until(engine, "engine stopped")
    await proved(plain)


async def test_a_vm_is_started_while_there_is_no_memory(plain: Bench) -> None:
    """Python waits for ever for a thread that found none at its start, so none is started for each child."""
    agent = await plain.agent(DONE)
    async with engine_process(plain) as engine:
        plain.insert("before", agent.id)  # the stacks of its threads are kept: starting another one succeeds
        assert await ended(plain, "before") == ["done"]
        resource.prlimit(engine.pid, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
        plain.insert("meanwhile", agent.id)
        with contextlib.suppress(TimeoutError):
            await ended(plain, "meanwhile", timeout_seconds=5)
        resource.prlimit(engine.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        plain.insert("after", agent.id)
        assert await ended(plain, "after") == ["done"]
        engine.terminate()
        assert await asyncio.wait_for(engine.wait(), PATIENCE_SECONDS) == 0
    await proved(plain)


async def test_the_database_locked_for_longer_than_it_waits(plain: Bench) -> None:
    """By a program that forgot its transaction: one warning, and then the engine continues."""
    agent = await plain.agent(DONE)
    async with engine_process(plain, SWARM_BUSY_TIMEOUT_SECONDS="0.5", SWARM_LEASE_SECONDS="30") as engine:
        await log_until(engine, "engine serves")
        locker = sqlite3.connect(plain.database, isolation_level=None, timeout=60)
        locker.execute("BEGIN IMMEDIATE")
        locker.execute("INSERT INTO tickets (id, title, state, agent_id) VALUES ('t', 't', 'ready', ?)", (agent.id,))
        locker.execute("COMMIT")
        locker.execute("BEGIN IMMEDIATE")  # once more, before the engine has the lock
        said = await log_until(engine, "can't claim")
        assert "is locked: another program" in str(said["error"])
        locker.execute("COMMIT")
        locker.close()
        assert await ended(plain, "t") == ["done"]
        engine.terminate()
        await log_until(engine, "engine stopped")
    await proved(plain)


@pytest.mark.needs("qemu", "root")
async def test_an_engine_goes_on_when_the_tun_device_is_back(plain: Bench, settings: Settings, image: Image) -> None:
    """Also with a slot that it keeps, whose tap is opened again for each VM."""
    agent = await plain.agent(DONE)
    templates = str(settings.templates)
    async with engine_process(plain, driver="qemu", SWARM_TEMPLATES_DIR=templates, stderr=subprocess.DEVNULL) as engine:
        plain.insert("before", agent.id)
        assert await ended(plain, "before", timeout_seconds=120) == ["done"]
        with small_disk(Path("/dev/net"), 4):
            plain.insert("without", agent.id)
            assert await ended(plain, "without", timeout_seconds=120) == ["failed"]
        plain.insert("after", agent.id)
        assert await ended(plain, "after", timeout_seconds=120) == ["done"]
        assert engine.returncode is None
    ((error,),) = plain.sql("SELECT error FROM tickets WHERE id = 'without'")
    assert "/dev/net/tun can't be opened" in str(error) and "modprobe tun" in str(error)
