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
import fcntl
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
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from swarm import config
from swarm.admin.prove import Report
from swarm.app import manual_vm, setup, wiring
from swarm.cli.prove import prove
from swarm.config import Settings
from swarm.model import TERMINAL_TICKET_STATES, FailureReason, RetryPolicy
from swarm.store.claims import suspects
from swarm.vm.slots.inventory import VmRecord
from tests.agents.write import registered

LEASE_SECONDS = 3.0
ENGINES = 2
WAITING = 40  # tickets that have not ended; no more are added meanwhile
# What agents do, and how often (WEIGHTS). They are idempotent, so they may be retried after their VM was killed.
CODE = {
    "quick": "out({'n': 1})",
    "talks": "for i in range(50): print('line', i, flush=True)\nout({'n': 50})",
    "slow": "time.sleep(random.uniform(0.2, 1.5))\nout({'slow': True})",
    "fails": "print('I fail')\nsys.exit(3)",
    "flaky": "out({})\nsys.exit(random.random() < 0.5)",
    "hangs": "time.sleep(600)",
    "silent": "pass",
    # Not drawn: as many as --guilty says. It kills the engine that runs it.
    "guilty": "pid = os.getpid()\n"
    "while b'swarm.cli.engine' not in open(f'/proc/{pid}/cmdline', 'rb').read():\n"
    "    pid = int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n"
    "os.kill(pid, 9)",
}
WEIGHTS = {"quick": 40, "talks": 15, "slow": 25, "fails": 5, "flaky": 8, "hangs": 4, "silent": 3}
INNOCENT = ("quick", "talks", "slow")  # they end as done, whatever happens around them
HEAD = "import json, os, random, sys, time\ndef out(v): json.dump(v, open('output.json', 'w'))\n"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(kw_only=True)
class Campaign:
    settings: Settings
    seed: int
    tickets: int
    kills: int  # at least, of engines
    guilty: int
    max_vms: int
    until: float = math.inf  # of the monotonic clock: no more tickets are added after it
    opened: AsyncExitStack = field(default_factory=AsyncExitStack)
    engines: dict[int, asyncio.subprocess.Process] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    stalled: dict[int, int] = field(default_factory=dict)  # by engine: the end of its log that nobody reads

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.database = self.settings.data_dir / "swarm.db"
        # Even a short campaign does each of these, unless it is over before.
        self.once = [self.change_database, self.signal_all, self.change_log, self.freeze, self.kill_engine]
        self.random.shuffle(self.once)
        self.options: tuple[str, ...] = ()
        self.pace = 1 if self.settings.driver == "process" else 5  # VMs take longer, so strikes are rarer

    async def open(self) -> None:
        self.store = await self.opened.enter_async_context(wiring.store(self.settings))

    async def close(self) -> None:
        await self.opened.aclose()

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
        connection = sqlite3.connect(self.database, timeout=60, isolation_level=None)
        for number in numbers:
            (agent,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            if number > 0 and self.guilty and number % (self.tickets // (self.guilty + 1) + 1) == 0:
                agent = "guilty"
            connection.execute(
                "INSERT INTO tickets (id, title, state, agent_id, priority) VALUES (?, 'chaos', 'ready', ?, ?)",
                (f"c{number:04}", agent, self.random.choice((0, 0, 0, 1, -1))),
            )
        connection.close()

    async def run(self) -> None:
        await self.prepare()
        limit = 300 + self.tickets * (4.0 if self.settings.driver != "process" else 2.0) + 10 * self.kills
        deadline = time.monotonic() + limit + 600 * self.guilty
        for number in range(ENGINES):
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
                await self.serves(number := self.random.randrange(ENGINES))
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
                right = self.guilty and engine.returncode == -signal.SIGKILL
                assert right, f"seed {self.seed}: engine {number} ended with status {engine.returncode}"
                self.done["killed by a ticket"] += 1
                await self.start(number)
        moves: dict[Callable[[], Awaitable[None]], int] = {
            self.kill_engine: 6, self.freeze: 6, self.kill_vm: 10, self.cancel: 3, self.delete: 2, self.signal_all: 4,
            self.change_log: 3, self.change_database: 1, self.nothing: 20,
        }  # fmt: skip
        if calm:
            moves = {self.nothing: 1}
        (move,) = self.random.choices(list(moves), list(moves.values()))
        if self.once and not calm and self.random.random() < 0.5:
            move = self.once.pop(0)
        self.done[move.__name__] += 1
        await move()

    async def nothing(self) -> None: ...

    async def kill_engine(self, number: int | None = None) -> None:
        number = self.random.randrange(ENGINES) if number is None else number
        with contextlib.suppress(ProcessLookupError):
            self.engines[number].kill()
        await self.engines[number].wait()
        self.frozen.discard(number)
        await self.start(number)

    async def signal_all(self) -> None:
        """What a service manager's stop, a reboot, or Ctrl+C in a pipeline does: the VMs get the signal as well. The
        engine ends in good order."""
        number = self.random.randrange(ENGINES)
        engine = self.engines[number]
        self.thaw(number)
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
        (log := self.log(self.random.randrange(ENGINES))).unlink(missing_ok=True)
        if self.random.random() < 0.5:
            log.write_text("not what it was\n")

    async def change_database(self) -> None:
        """Remove -wal and -shm underneath the engines, when all that is committed is in the database: they must end by
        themselves, before they write anything that nobody would ever see."""
        if not all([await self.serves(number) for number in range(ENGINES)]):
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

    async def serves(self, number: int) -> bool:
        """Wait until this engine serves. False if it doesn't within minutes, or dies."""
        self.thaw(number)
        engine, until = self.engines[number], time.monotonic() + 300
        while engine.returncode is None and time.monotonic() < until:
            if any(row.pid == engine.pid for row in await self.store.workers()):
                return True
            await asyncio.sleep(0.05)
        return False

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
        number = self.random.randrange(ENGINES)
        if not self.frozen and self.engines[number].returncode is None:
            self.engines[number].send_signal(signal.SIGSTOP)
            self.frozen.add(number)
            seconds = self.random.uniform(0.5, 2.5) * LEASE_SECONDS
            asyncio.get_running_loop().call_later(seconds, self.thaw, number)

    def thaw(self, number: int) -> None:
        if number in self.frozen and self.engines[number].returncode is None:
            self.engines[number].send_signal(signal.SIGCONT)
        self.frozen.discard(number)

    async def kill_vm(self) -> None:
        if live := [record for record in self.vms() if record.alive]:
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

        def change(id_: str) -> None:
            connection = sqlite3.connect(self.database, timeout=60, isolation_level=None)
            connection.execute(statement, (id_,))
            connection.close()

        await asyncio.to_thread(change, self.random.choice(rows).id)

    # --- engines ------------------------------------------------------------------------------------------------------

    async def start(self, number: int) -> None:
        (log,) = self.random.choices((self.log_in_file, self.log_that_stalls, self.log_that_ends), (6, 1, 1))
        output = log(number)
        settings = {
            "SWARM_STATE_DIR": self.settings.state_dir, "SWARM_IMAGES_DIR": self.settings.images,
            "SWARM_TEMPLATES_DIR": self.settings.templates, "SWARM_LEASE_SECONDS": LEASE_SECONDS,
            "SWARM_DRIVER": self.settings.driver,
        }  # fmt: skip
        try:
            self.engines[number] = await asyncio.create_subprocess_exec(
                "env", "--default-signal", sys.executable,  # SIGHUP under nohup
                "-m", "swarm.cli.engine", "start", "--foreground", f"--max-vms={self.max_vms}",
                "--log-format=json", "--grace=5", *self.options, "--home", str(self.settings.home),
                env=os.environ | {name: str(value) for name, value in settings.items()},
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        finally:
            os.close(output)

    def log(self, number: int) -> Path:
        return self.settings.home / f"engine-{number}.log"

    def log_in_file(self, number: int) -> int:
        return os.open(self.log(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def log_that_stalls(self, number: int) -> int:
        """A pipe that nobody reads, and that is full soon."""
        self.forget_log(number)
        self.stalled[number], ours = os.pipe()
        fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, 4096)
        return ours

    def log_that_ends(self, number: int) -> int:
        """A pipe whose reader goes away, before or after the engine serves."""
        ours = self.log_that_stalls(number)
        asyncio.get_running_loop().call_later(self.random.uniform(0, 5), self.forget_log, number)
        return ours

    def forget_log(self, number: int) -> None:
        if (reader := self.stalled.pop(number, None)) is not None:
            os.close(reader)

    async def stop(self) -> list[int | None]:
        """Send SIGTERM to all engines. Returns their exit statuses."""
        for number in sorted(self.frozen):
            self.thaw(number)
        for engine in self.engines.values():
            if engine.returncode is None:
                engine.terminate()
        return [await asyncio.wait_for(engine.wait(), 60) for engine in self.engines.values()]

    async def kill(self) -> None:
        for engine in self.engines.values():
            if engine.returncode is None:
                engine.kill()
                await engine.wait()
        for number in range(ENGINES):
            self.forget_log(number)

    def vms(self) -> list[VmRecord]:
        return wiring.inventory(self.settings).records()

    # --- the verdict --------------------------------------------------------------------------------------------------

    async def verdict(self) -> Report:
        """Check the result. Raises AssertionError if a promise was broken."""
        await wiring.sweep(self.settings)  # remove what the last killed engines left, as the next start would
        report = await prove(self.settings)
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
        state = self.settings.state_dir
        left = [*state.glob("vms/*"), *state.glob("locks/vm*")]
        assert not left, f"seed {self.seed}: files are left: {left}"
        return report


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
    say(f"chaos: seed {seed}, {tickets} tickets, driver {settings.driver}")
    began = time.monotonic()
    one = Campaign(settings=settings, seed=seed, tickets=tickets, kills=kills, guilty=guilty, max_vms=max_vms)
    one.until = began + 60 * minutes
    await one.open()
    try:
        try:
            await one.run()
            statuses = await one.stop()
            assert set(statuses) == {0}, f"seed {seed}: engines ended with {statuses}"
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
