"""The kill campaign: `make chaos`, or `python -m tests.chaos.campaign [--seed N] [--tickets N] [--kills N] …`.

Two engines on one database file serve tickets, of which some fail, hang, or die with their VM. Meanwhile engines are
killed (SIGKILL), frozen (SIGSTOP … SIGCONT, beyond the lease), stopped by a signal that reaches their VMs too, and
restarted; some have a log whose reader stalls or goes away. VMs are killed, tickets cancelled and deleted, the
database's -wal and -shm removed underneath the engines, and log files removed or replaced: what happens when comes from
the seed, which is printed first. Afterwards every ticket must have ended, `swarm prove` must be clean, no row may be
missing, nobody may have failed because of an engine's death but those who caused it (--guilty), and no VM, lock or file
may be left. Only how the operating system schedules all this is not repeatable.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from swarm import config
from swarm.admin.prove import Report
from swarm.app import manual_vm, setup, wiring
from swarm.base import process
from swarm.cli.prove import prove
from swarm.config import Settings
from swarm.model import TERMINAL_TICKET_STATES, FailureReason, RetryPolicy
from swarm.store.claims import suspects
from tests.agents.write import registered
from tests.chaos.agents import CODE, HEAD, INNOCENT, WEIGHTS
from tests.chaos.engines import Engines

WAITING = 40  # tickets that have not ended; no more are added meanwhile


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(kw_only=True)
class Campaign(Engines):
    tickets: int
    kills: int  # at least, of engines
    guilty: int
    until: float = math.inf  # of the monotonic clock: no more tickets are added after it
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.database = self.settings.data_dir / "swarm.db"
        # Even a short campaign does each of these, unless it is over before.
        self.once = [self.change_database, self.signal_all, self.change_log, self.freeze, self.kill_engine]
        self.random.shuffle(self.once)
        self.pace = 1 if self.settings.driver == "process" else 5  # VMs take longer, so strikes are rarer

    # --- the plan -----------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        for name, code in CODE.items():
            retry = RetryPolicy(max_attempts=6, delay_seconds=0.1, max_delay_seconds=1.0, on=frozenset(FailureReason))
            await registered(
                self.store, self.settings, self.settings.home / "chaos" / name, HEAD + code, name, idempotent=True,
                retry=retry if name not in ("fails", "hangs", "silent", "guilty") else RetryPolicy(max_attempts=2),
                timeout_seconds=3.0 if name == "hangs" else 60.0,
            )  # fmt: skip

    def insert(self, numbers: range) -> None:
        """With plain SQL, as any tool can, and a commit for each ticket."""
        for number in numbers:
            (agent,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            if number > 0 and self.guilty and number % (self.tickets // (self.guilty + 1) + 1) == 0:
                agent = "guilty"
            row = {"id": f"c{number:04}", "title": "chaos", "state": "ready", "agent_id": agent} | self.columns()
            places = ", ".join("?" * len(row))
            self.execute(f"INSERT INTO tickets ({', '.join(row)}) VALUES ({places})", *row.values())

    def columns(self) -> dict[str, object]:
        """Of a new ticket."""
        return {"priority": self.random.choice((0, 0, 0, 1, -1))}

    def execute(self, statement: str, *values: object) -> None:
        connection = sqlite3.connect(self.database, timeout=60, isolation_level=None)
        connection.execute(statement, values)
        connection.close()

    async def run(self) -> None:
        await self.prepare()
        limit = 300 + self.tickets * (4.0 if self.settings.driver != "process" else 2.0) + 10 * self.kills
        deadline = time.monotonic() + limit + 600 * self.guilty
        for number in range(self.engine_count):
            await self.start(number)
        at = said = 0
        while at < self.tickets or await self.open_tickets():
            if time.monotonic() > deadline:
                raise AssertionError(f"not all tickets ended in time; seed {self.seed}")
            if at and time.monotonic() > self.until:
                self.kills, self.tickets = self.kills * at // self.tickets, at
            step = min(self.tickets - at, self.random.randrange(1, 6 if self.pace == 1 else 3))
            if await self.open_tickets() > WAITING:  # strikes are to hit engines that work
                step = 0
            await asyncio.to_thread(self.insert, range(at, at + step))
            at += step
            await self.strike(calm=at >= self.tickets)
            if self.done["kill_engine"] * self.tickets < self.kills * at:
                self.done["kill_engine"] += 1
                await self.serves(number := self.pick())
                await self.kill_engine(number)
            if at - said >= 500:
                said = at
                say(f"chaos: {at} tickets, {self.done['kill_engine']} kills")
            await asyncio.sleep(self.pace * self.random.uniform(0.1, 0.8))  # the campaign's pace; nothing waits for it

    async def open_tickets(self) -> int:
        queue = await self.store.queue()
        return queue.ready + queue.running + queue.delayed + queue.blocked + queue.waiting

    # --- strikes ------------------------------------------------------------------------------------------------------

    async def strike(self, *, calm: bool) -> None:
        """Restart dead engines, then do one random thing; nothing if ``calm``, so that the last tickets can end."""
        for number, engine in self.engines.items():
            if engine.returncode is not None:
                why = self.why_ended(number)
                status, seed = engine.returncode, self.seed
                assert why, f"seed {seed}: engine {number} ended with status {status}: {self.last_lines()}"
                self.done[why] += 1
                await self.start(number)
        moves = {self.nothing: 1} if calm else self.strikes()
        (move,) = self.random.choices(list(moves), list(moves.values()))
        if self.once and not calm and self.random.random() < 0.5:
            move = self.once.pop(0)
        self.done[move.__name__] += 1
        await move()

    def why_ended(self, number: int) -> str:
        return "killed by a ticket" if self.guilty and self.engines[number].returncode == -signal.SIGKILL else ""

    def strikes(self) -> dict[Callable[[], Awaitable[None]], int]:
        """What may happen, and how often."""
        return {
            self.kill_engine: 6, self.freeze: 6, self.kill_vm: 10, self.cancel: 3, self.delete: 2, self.signal_all: 4,
            self.change_log: 3, self.change_database: 1, self.nothing: 20,
        }  # fmt: skip

    async def nothing(self) -> None: ...

    async def kill_engine(self, number: int | None = None) -> None:
        number = self.pick() if number is None else number
        with contextlib.suppress(ProcessLookupError):
            self.engines[number].kill()
        await self.engines[number].wait()
        self.frozen.discard(number)
        await self.start(number)

    async def signal_all(self) -> None:
        """What a service manager's stop, a reboot, or Ctrl+C in a pipeline does: the VMs get the signal as well. The
        engine ends in good order."""
        number = self.pick()
        engine = self.engines[number]
        await self.heal(number)
        if engine.returncode is not None:
            return
        served = any(row.pid == engine.pid for row in await self.store.workers())  # else it may just end
        name = self.random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        with contextlib.suppress(psutil.NoSuchProcess):
            ours = psutil.Process(engine.pid)
            reached = [ours, *ours.children(recursive=True)]
            self.random.shuffle(reached)
            for one in reached:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(name)
        status = await asyncio.wait_for(engine.wait(), 120)
        right = status == 0 or not served or (self.guilty and status == -signal.SIGKILL)
        assert right, f"seed {self.seed}: {name.name}: status {status}"
        await self.start(number)

    async def change_log(self) -> None:
        (log := self.log(self.pick())).unlink(missing_ok=True)
        if self.random.random() < 0.5:
            log.write_text("not what it was\n")

    async def change_database(self) -> None:
        """Remove -wal and -shm underneath the engines, when all that is committed is in the database: they must end by
        themselves, before they write anything that nobody would ever see."""
        if not all([await self.serves(number) for number in range(self.engine_count)]):
            return
        await self.close()
        removed = False
        for _ in range(20):
            removed = removed or await self.frozen_together(self.remove_wal)
        self.done["wal removed"] += removed
        if removed:
            for number, engine in self.engines.items():
                status = await asyncio.wait_for(engine.wait(), 120)
                assert status != 0, f"seed {self.seed}: engine {number} did not see that its database was changed"
        await self.open()
        for number, engine in self.engines.items():
            if engine.returncode is not None:
                await self.start(number)

    async def frozen_together(self, work: Callable[[], bool]) -> bool:
        self.signal_engines(signal.SIGSTOP)
        try:
            return await asyncio.to_thread(work)
        finally:
            self.signal_engines(signal.SIGCONT)

    def signal_engines(self, number: signal.Signals) -> None:
        for engine in self.engines.values():
            with contextlib.suppress(ProcessLookupError):
                engine.send_signal(number)

    def remove_wal(self) -> bool:
        """False if a frozen engine is within a transaction."""
        connection = sqlite3.connect(self.database, timeout=0.5, isolation_level=None)
        try:
            (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if not busy:
                for suffix in ("-wal", "-shm"):
                    Path(f"{self.database}{suffix}").unlink()
            return not busy
        except sqlite3.OperationalError:
            return False
        finally:
            connection.close()

    async def freeze(self) -> None:
        """Freeze one engine, mostly for longer than its lease; never both, so that work continues. (One that is frozen
        inside a transaction keeps SQLite's write lock: then nothing continues until it is thawed.)"""
        number = self.pick()
        if not self.frozen and self.engines[number].returncode is None:
            self.signal(number, signal.SIGSTOP)
            self.frozen.add(number)
            seconds = self.random.uniform(0.5, 2.5) * self.lease_seconds
            asyncio.get_running_loop().call_later(seconds, self.thaw, number)

    async def kill_vm(self) -> None:
        if live := [one for one in self.vms() if one.pid and process.start_time(one.pid) == one.started]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(live).pid, signal.SIGKILL)

    async def cancel(self) -> None:
        await self.sql("UPDATE tickets SET state = 'cancelled' WHERE id = ? AND state IN ('ready', 'in_progress')")

    async def delete(self) -> None:
        await self.sql("DELETE FROM tickets WHERE id = ?")

    async def sql(self, statement: str) -> None:
        rows = await self.store.tickets(states=("ready", "in_progress"), limit=50)
        if not rows:
            return

        await asyncio.to_thread(self.execute, statement, self.random.choice(rows).id)

    # --- the verdict --------------------------------------------------------------------------------------------------

    async def verdict(self) -> Report:
        """Check the result. Raises AssertionError if a promise was broken."""
        report = await self.proved()
        assert report.kept, f"seed {self.seed}: {report.violations}"
        tickets = await self.store.tickets(limit=self.tickets + 10)
        unfinished = [t.id for t in tickets if t.state not in TERMINAL_TICKET_STATES]
        assert not unfinished, f"seed {self.seed}: not ended: {unfinished}"
        assert len(tickets) + report.deleted == self.tickets, f"seed {self.seed}: rows are missing"
        wrong = [t.id for t in tickets if (t.state == "done") != (t.outputs is not None)]
        assert not wrong, f"seed {self.seed}: outputs do not fit the state: {wrong}"
        never_done = [t.id for t in tickets if t.state == "done" and t.agent_id in ("fails", "hangs", "silent")]
        assert not never_done, f"seed {self.seed}: done, though their agents fail: {never_done}"
        innocent = [(t.id, t.error) for t in tickets if t.state == "failed" and t.agent_id in INNOCENT]
        assert not innocent, f"seed {self.seed}: failed, though their agents do not: {innocent}"
        convicted = [t for t in tickets if "engines in a row" in (t.error or "")]
        wrong = [t.id for t in convicted if t.agent_id != "guilty"]
        assert not wrong, f"seed {self.seed}: convicted, though they killed no engine: {wrong}"
        guilty = [t for t in tickets if t.agent_id == "guilty" and t.state != "cancelled"]
        assert [t.id for t in guilty] == [t.id for t in convicted], f"seed {self.seed}: the guilty got away"
        for ticket in guilty:
            lost = [a for a in await self.store.attempts(ticket.id) if a.outcome == "lost"]
            assert len(lost) <= suspects.MOST, f"seed {self.seed}: {ticket.id} killed {len(lost)} engines"
        assert not self.vms(), f"seed {self.seed}: VMs are left: {self.vms()}"
        for state in {self.settings_of(number).state_dir for number in range(self.engine_count)}:
            left = [*state.glob("vms/*"), *state.glob("locks/vm*")]
            assert not left, f"seed {self.seed}: files are left: {left}"
        return report

    async def proved(self) -> Report:
        await wiring.sweep(self.settings)  # remove what the last killed engines left, as the next start would
        return await prove(self.settings)


async def campaign(
    settings: Settings,
    *,
    seed: int,
    tickets: int,
    max_vms: int,
    kills: int = 0,
    guilty: int = 0,
    minutes: float = math.inf,
) -> tuple[Report, Counter[str]]:
    one = Campaign(settings=settings, seed=seed, tickets=tickets, kills=kills, guilty=guilty, max_vms=max_vms)
    one.until = time.monotonic() + 60 * minutes
    return await go(one)


async def go(one: Campaign) -> tuple[Report, Counter[str]]:
    seed, began = one.seed, time.monotonic()
    say(f"chaos: seed {seed}, {one.tickets} tickets, driver {one.settings.driver}")
    await one.open()
    try:
        try:
            await one.run()
            statuses = await one.stop()
            assert not statuses, f"seed {seed}: engines ended with {statuses}: {one.last_lines()}"
        finally:
            await one.kill()
        report = await one.verdict()
    finally:
        await one.close()
    say(
        f"chaos: {report.done} done, {report.failed} failed, {report.cancelled} cancelled, {report.deleted} deleted; "
        f"{report.attempts} attempts (at most {report.most_attempts} of one ticket), {report.lost_leases} leases lost, "
        f"{report.refused} writes refused, {len(report.lost)} lost, {len(report.finished_twice)} twice; "
        f"{time.monotonic() - began:.0f} s; {json.dumps(one.done)}"
    )
    return report, one.done


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--tickets", type=int, default=300)
    parser.add_argument("--kills", type=int, default=0, help="kill engines at least this often")
    parser.add_argument("--guilty", type=int, default=0, help="so many of the tickets kill the engine that runs them")
    parser.add_argument("--minutes", type=float, default=math.inf, help="add no more tickets after so many")
    parser.add_argument("--driver", default="process")
    parser.add_argument("--max-vms", type=int, default=4)
    options = parser.parse_args()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "images"
    with tempfile.TemporaryDirectory(prefix="chaos", dir=os.environ.get("SWARM_SANDBOX")) as name:
        place = Path(name)
        state = Path(os.environ.get("SWARM_STATE_DIR") or place / "s")
        settings = config.load(home=place / "h", state_dir=state, images_dir=cache, driver=options.driver)
        await setup.init(settings, image=False)
        try:
            chosen = {
                name: getattr(options, name) for name in ("seed", "tickets", "max_vms", "kills", "guilty", "minutes")
            }
            await campaign(settings, **chosen)
        finally:
            await manual_vm.cleanup(settings, force=True)


if __name__ == "__main__":
    asyncio.run(main())
