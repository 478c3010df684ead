"""A database, a worker on real VMs, and agents written on the spot."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from swarm import config
from swarm.admin.prove import Report
from swarm.app import setup, wiring
from swarm.cli.prove import prove
from swarm.config import Settings
from swarm.engine.dispatch import Dispatcher
from swarm.engine.run_once import run_ticket
from swarm.engine.worker import Worker
from swarm.model import TERMINAL_TICKET_STATES, Agent, Ticket
from swarm.store.sql.rows import AttemptRow
from swarm.store.sql.wake import FileWake
from swarm.store.store import Store
from swarm.vm.driver import Image
from swarm.vm.slots.inventory import VmRecord
from tests.agents.write import registered
from tests.conftest import PATIENCE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A database, a worker and a directory for one test."""

    settings: Settings
    store: Store
    worker: Worker
    dir: Path

    @property
    def database(self) -> Path:
        return self.settings.data_dir / "swarm.db"

    async def agent(self, code: str, name: str = "agent", *, files: Sequence[Path] = (), **manifest: object) -> Agent:
        """Register a Python agent with this program, under the id ``name``, as `swarm agent add` would."""
        return await registered(self.store, self.settings, self.dir / name, code, name, files=files, **manifest)

    def insert(self, id: str, agent_id: str, **columns: object) -> None:
        """As any tool would: plain SQL, another connection."""
        row = {"id": id, "title": id, "state": "ready", "agent_id": agent_id, **columns}
        with sqlite3.connect(self.database, timeout=60) as connection:
            names = ", ".join(row)
            slots = ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO tickets ({names}) VALUES ({slots})", tuple(row.values()))
        connection.close()

    def sql(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        with sqlite3.connect(self.database, timeout=60) as connection:
            rows = connection.execute(statement, values).fetchall()
        connection.close()
        return rows

    async def run(self, code: str, *, inputs: object = None, **manifest: object) -> Ticket:
        """Register an agent, insert a ticket for it, run that to its end."""
        agent = await self.agent(code, "agent", **manifest)  # type: ignore[arg-type]
        self.insert("t", agent.id, inputs=json.dumps(inputs or {}))
        return await run_ticket(self.store, self.worker, "t")

    async def until(self, holds: Callable[[], Awaitable[bool]], *, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Return when ``holds``, which is asked again after every commit, and now and then."""
        async with FileWake.watching(self.database) as wake, asyncio.timeout(timeout_seconds):
            while not await holds():
                await wake.changed(timeout_seconds=0.2)

    async def until_it_prints(self, id: str = "t") -> None:
        async def printed() -> bool:
            return any(e.kind == "output" for e in await self.store.events(id))

        await self.until(printed)

    async def attempts(self, id: str = "t") -> list[AttemptRow]:
        return await self.store.attempts(id)

    def vms(self) -> list[VmRecord]:
        """All there are; free slots that an engine keeps have no process."""
        return [record for record in wiring.inventory(self.settings).records() if record.pid]

    def live_vms(self) -> list[int]:
        return [record.n for record in self.vms()]


@pytest.fixture
async def bench(settings: Settings, image: Image, tmp_path: Path) -> AsyncIterator[Bench]:
    """On real VMs (clones of one template)."""
    own = config.load(**{**settings.model_dump(), "home": tmp_path / "home", "templates_dir": settings.templates})
    await setup.init(own, image=False)
    async with wiring.store(own) as store, wiring.worker(own, store) as worker:
        yield Bench(settings=own, store=store, worker=worker, dir=tmp_path)
        assert worker.running == {}


@pytest.fixture
async def plain(settings: Settings, tmp_path: Path) -> AsyncIterator[Bench]:
    """The same on the `process` driver: for volume, and for what no VM is needed for."""
    own = config.load(**{**settings.model_dump(), "home": tmp_path / "home", "driver": "process"})
    await setup.init(own, image=False)
    async with wiring.store(own) as store, wiring.worker(own, store) as worker:
        yield Bench(settings=own, store=store, worker=worker, dir=tmp_path)


class HasSettings(Protocol):
    @property
    def settings(self) -> Settings: ...


@asynccontextmanager
async def engine_process(
    bench: HasSettings,
    *options: str,
    driver: str = "process",
    stderr: int = asyncio.subprocess.PIPE,
    **environment: str,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`swarm-engine start --foreground` as a process of its own, its log on stderr; killed when the block ends."""
    argv = ["-m", "swarm.cli.engine", "start", "--foreground", "--max-vms=2", f"--driver={driver}", "--log-format=json"]
    ours = {"SWARM_STATE_DIR": bench.settings.state_dir, "SWARM_IMAGES_DIR": bench.settings.images}
    env = os.environ | {name: str(value) for name, value in ours.items()} | environment
    process = await asyncio.create_subprocess_exec(
        "env", "--default-signal",  # also under `nohup`, which ignores SIGHUP
        sys.executable, *argv, "--home", str(bench.settings.home), *options,
        env=env, stdin=asyncio.subprocess.DEVNULL, stderr=stderr,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def log_until(process: asyncio.subprocess.Process, event: str) -> dict[str, object]:
    """Read an engine's log up to a line with this event, or with ``error`` in it when the engine ends."""
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        while line := await process.stderr.readline():
            said: dict[str, object] = json.loads(line) if line.startswith(b"{") else {"event": line.decode().strip()}
            if event in str(said["event"]):
                return said
    raise AssertionError(f"the engine ended (status {await process.wait()}) and never said {event!r}")


@asynccontextmanager
async def running(bench: Bench, **options: object) -> AsyncIterator[tuple[Dispatcher, asyncio.Task[None]]]:
    """An engine in this process, and the task that runs it; its error, if it had one, is raised at the block's end."""
    given = {"max_vms": 4, "grace_seconds": 0.0, "memory": None, **options}
    async with bench.store.watching() as wake:
        dispatcher = Dispatcher(store=bench.store, worker=bench.worker, wake=wake, **given)  # type: ignore[arg-type]
        task = asyncio.create_task(dispatcher.run())
        try:
            yield dispatcher, task
        finally:
            dispatcher.stop()
            dispatcher.stop()
            await task


@asynccontextmanager
async def serving(bench: Bench, **options: object) -> AsyncIterator[Dispatcher]:
    async with running(bench, **options) as (dispatcher, _):
        yield dispatcher


async def ended(bench: Bench, *ids: str, timeout_seconds: float = PATIENCE_SECONDS) -> list[str]:
    """The states of these tickets once all of them have ended."""

    async def all_ended() -> bool:
        return all([(await bench.store.ticket(id_)).state in TERMINAL_TICKET_STATES for id_ in ids])

    await bench.until(all_ended, timeout_seconds=timeout_seconds)
    return [(await bench.store.ticket(id_)).state for id_ in ids]


async def proved(bench: Bench) -> Report:
    """What `swarm prove` says: nothing broken."""
    report = await prove(bench.settings)
    assert report.kept, report.violations
    return report
