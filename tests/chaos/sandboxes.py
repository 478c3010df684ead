"""The kill campaign of sandboxes: `python -m tests.chaos.sandboxes [--seed N] [--moves N] [--kills N]`.

Two engines hold sandboxes, which are made, used, paused, resumed, forked, saved and ended, by rows and by the engines'
sockets. Meanwhile engines are killed (SIGKILL), frozen beyond their leases, and stopped by a signal that reaches their
VMs too, and VMs are killed. What happens when comes from the seed, which is printed first.

Afterwards `swarm prove` must be clean (none had two holders), none may have forgotten what it had acknowledged, and
after an orderly stop each that has not ended is paused or new; no VM, lock, half snapshot or file without a row may be
left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from swarm import config
from swarm.admin import sandboxes as ways
from swarm.admin.prove import Report
from swarm.app import manual_vm, setup, wiring
from swarm.channel import processes
from swarm.channel.processes import Order
from swarm.cli.prove import prove
from swarm.config import Settings
from swarm.errors import SwarmError
from swarm.model import Sandbox, SandboxState
from swarm.store.sandboxes.sandboxes import SandboxFilter
from swarm.vm.image.staging import BUILDING
from tests.chaos.campaign import Campaign, say
from tests.chaos.engines import ENGINES
from tests.conftest import PATIENCE_SECONDS

MOST = 4  # live ones; no more are added meanwhile
_PATIENCE_SECONDS = 40.0
# Writes a number at the end of a file that nobody else writes, and says which numbers are there.
_NOTE = "echo {number} >> /work/notes && sync /work/notes && cat /work/notes"


@dataclass(kw_only=True)
class SandboxCampaign(Campaign):
    moves: int
    notes: dict[str, list[int]] = field(default_factory=dict)  # acknowledged, by sandbox
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    told: Counter[str] = field(default_factory=Counter)
    number: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options = ("--max-sandboxes=3",)

    async def run(self) -> None:
        for number in range(ENGINES):
            await self.start(number)
        for number in range(ENGINES):
            assert await self.serves(number)
        self.insert_sandbox()
        await ways.reach(self.store, "s1", by="chaos", wait_seconds=300)  # the template is there
        calm: dict[Callable[[], Awaitable[None]], int] = {
            self.add: 3, self.use: 10, self.pause: 4, self.fork: 3, self.save: 2, self.want: 4, self.end: 2,
        }  # fmt: skip
        strikes: list[Callable[[], Awaitable[None]]] = [self.signal_all, self.freeze, self.kill_one_vm]
        for move in range(self.moves):
            for number, engine in self.engines.items():
                if engine.returncode is not None:
                    raise AssertionError(f"seed {self.seed}: engine {number} ended with status {engine.returncode}")
            (what,) = self.random.choices(list(calm), list(calm.values()))
            if self.done["kill_engine"] * self.moves < self.kills * move:
                self.done["kill_engine"] += 1
                await self.kill_engine()
            elif strikes and self.random.random() < 0.08:
                strike = self.random.choice(strikes)
                self.done[strike.__name__] += 1
                await strike()
            self.done[what.__name__] += 1
            self.begin(what())
            await asyncio.sleep(self.random.uniform(0.05, 0.6))  # the campaign's pace; nothing waits for it
        for number in range(ENGINES):
            assert await self.serves(number), f"seed {self.seed}: engine {number} does not serve"
        if self.tasks:
            await asyncio.wait(self.tasks)
        for task in [task for task in self.tasks if task.done()]:
            task.result()

    def begin(self, move: Awaitable[None]) -> None:
        """Beside the others. That it was refused, or broke off, is no fault: what it did is looked at later."""

        async def moves() -> None:
            try:
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await move
            except (SwarmError, TimeoutError) as error:
                self.told[type(error).__name__] += 1

        task = asyncio.create_task(moves())
        self.tasks.add(task)
        task.add_done_callback(lambda one: self.tasks.discard(one) if one.exception() is None else None)

    # --- moves --------------------------------------------------------------------------------------------------------

    async def rows(self, *states: str) -> list[Sandbox]:
        return (await self.store.sandbox_page(SandboxFilter(states=states), limit=500)).sandboxes

    async def one(self, *states: str) -> Sandbox | None:
        found = await self.rows(*states)
        return self.random.choice(found) if found else None

    async def add(self) -> None:
        if len(await self.rows("starting", "running", "paused")) < MOST:
            await asyncio.to_thread(self.insert_sandbox)

    def insert_sandbox(self) -> None:
        self.number += 1
        self.plain_sql(
            "INSERT INTO sandboxes (id, memory_mb, idle_timeout_seconds) VALUES (?, 128, ?)",
            f"s{self.number}",
            self.random.choice((1.0, 60.0)),
        )

    def plain_sql(self, statement: str, *values: object) -> None:
        connection = sqlite3.connect(self.database, timeout=60, isolation_level=None)
        try:
            connection.execute(statement, values)
        finally:
            connection.close()

    async def use(self) -> None:
        """Write a note into it, whoever holds it; resumes it."""
        row = await self.one("starting", "running", "paused")
        if row is None:
            return
        self.number += 1
        number = self.number
        before = list(self.notes.get(row.id, []))
        live = await ways.reach(self.store, row.id, by="chaos", wait_seconds=20)
        order = Order(argv=("/bin/sh", "-c", _NOTE.format(number=number)), user="root", timeout_seconds=30)
        done = await processes.run(live.open, order)
        if done.ended.code == 0:
            found = {int(line) for line in done.stdout.split()}
            missing = [note for note in before if note not in found]
            assert not missing, f"seed {self.seed}: {row.id} has forgotten {missing}"
            self.notes.setdefault(row.id, []).append(number)
            self.told["notes"] += 1

    async def pause(self) -> None:
        if (row := await self.one("running")) is not None:
            await ways.pause(self.store, row.id, by="chaos")
            self.told["paused"] += 1

    async def fork(self) -> None:
        if (row := await self.one("running", "paused")) is None or len(await self.rows("running", "paused")) >= MOST:
            return
        before = list(self.notes.get(row.id, []))
        live = await ways.reach(self.store, row.id, by="chaos", wait_seconds=20)
        for child in await live.fork(count=self.random.choice((1, 1, 2))):
            self.notes[child] = before + self.notes.get(child, [])
            self.told["forked"] += 1

    async def save(self) -> None:
        if (row := await self.one("running")) is not None:
            live = await ways.reach(self.store, row.id, by="chaos", wait_seconds=20)
            await live.snapshot(keep_seconds=self.random.choice((1, 3600)))
            self.told["saved"] += 1

    async def want(self) -> None:
        if (row := await self.one("running", "paused")) is not None:
            wanted = self.random.choice(("running", "paused"))
            await asyncio.to_thread(self.plain_sql, "UPDATE sandboxes SET wanted = ? WHERE id = ?", wanted, row.id)

    async def end(self) -> None:
        if (row := await self.one("starting", "running", "paused")) is not None:
            await ways.end(self.store, row.id, by="chaos", wait_seconds=20)

    async def kill_one_vm(self) -> None:
        await self.kill_vm()

    # --- the verdict --------------------------------------------------------------------------------------------------

    async def verdict(self) -> Report:
        left = self.vms()
        assert not left, f"seed {self.seed}: VMs are left after an orderly stop: {left}"
        awake = [row for row in await self.rows() if row.hold_id or row.state == SandboxState.RUNNING]
        assert not awake, f"seed {self.seed}: held by nobody that lives: {awake}"
        lost = [row for row in await self.rows("lost") if not row.error]
        assert not lost, f"seed {self.seed}: lost without a sentence: {lost}"
        stopped = [row for row in await self.rows("lost") if "could not pause it" in (row.error or "")]
        assert not [row for row in stopped if "SIGKILL" not in (row.error or "")], f"seed {self.seed}: {stopped}"
        bugs = [row for row in await self.rows() if "unexpected" in (row.error or "")]
        assert not bugs, f"seed {self.seed}: {bugs}"
        report = await prove(self.settings)
        assert report.kept, f"seed {self.seed}: {report.violations}"
        await self.check_files()
        state = self.settings.state_dir
        found = [*state.glob("vms/*"), *state.glob("locks/vm*"), *state.glob("live/*")]
        assert not found, f"seed {self.seed}: files are left: {found}"
        return report

    async def check_files(self) -> None:
        """Each that sleeps has its snapshot, whole; nothing else is on the disk once it was collected."""
        snapshots, host = wiring.snapshots(self.settings), socket.gethostname()
        for one in await self.store.expired_snapshots(host, limit=10_000):
            await snapshots.remove(one.id)
            await self.store.forget_snapshots([one.id])
        known = await self.store.snapshot_ids(host)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                await snapshots.collect(known, new_seconds=0)
                place = self.settings.snapshots
                files = {path.name for path in place.iterdir()} if place.exists() else set()
                # What an engine was about to write when it was killed a moment ago may be somebody's, for some seconds.
                if not any(name.startswith(BUILDING) for name in files):
                    break
                await asyncio.sleep(0.5)
        assert files == known, f"seed {self.seed}: files {files}, rows {known}"
        for id in known:
            await snapshots.find(id)


async def campaign(settings: Settings, *, seed: int, moves: int, kills: int) -> tuple[Report, Counter[str]]:
    say(f"chaos: seed {seed}, {moves} moves of sandboxes, driver {settings.driver}")
    began = time.monotonic()
    one = SandboxCampaign(settings=settings, seed=seed, moves=moves, kills=kills, tickets=0, guilty=0, max_vms=1)
    await one.open()
    try:
        try:
            await one.run()
            statuses = await one.stop()
            assert not statuses, f"seed {seed}: engines ended with {statuses}: {one.last_lines()}"
            states = Counter(row.state for row in await one.rows())
        finally:
            await one.kill()
        report = await one.verdict()
    finally:
        await one.close()
    say(
        f"chaos: {json.dumps(states)}; {json.dumps(one.told)}; {json.dumps(one.done)}; {time.monotonic() - began:.0f} s"
    )
    return report, one.told


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--moves", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "images"
    with tempfile.TemporaryDirectory(prefix="chaos", dir=os.environ.get("SWARM_SANDBOX")) as name:
        place = Path(name)
        state = Path(os.environ.get("SWARM_STATE_DIR") or place / "s")
        settings = config.load(home=place / "h", state_dir=state, images_dir=cache, driver="qemu")
        await setup.init(settings, image=False)
        try:
            await campaign(settings, seed=options.seed, moves=options.moves, kills=options.kills)
        finally:
            await manual_vm.cleanup(settings, force=True)


if __name__ == "__main__":
    asyncio.run(main())
