"""The kill campaign: `make chaos`, or `python -m tests.chaos.campaign [--seed N] [--tickets N] [--driver qemu]`.

Two engines on one database file serve tickets, of which some fail, hang, or die with their VM. Meanwhile engines are
killed (SIGKILL), frozen (SIGSTOP … SIGCONT, beyond the lease) and restarted, VMs are killed, and tickets are cancelled
and deleted: what happens when comes from the seed, which is printed first. Afterwards every ticket must have ended,
`swarm prove` must be clean, no row may be missing, and no VM, lock or file may be left. Only how the operating system
schedules all this is not repeatable.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
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

from swarm import config
from swarm.admin.prove import Report
from swarm.app import manual_vm, setup, wiring
from swarm.cli.prove import prove
from swarm.config import Settings
from swarm.model import TERMINAL_TICKET_STATES, FailureReason, RetryPolicy
from swarm.store.sql.wake import Wake
from swarm.store.store import Store
from swarm.vm.slots.inventory import VmRecord
from tests.agents.write import registered

LEASE_SECONDS = 3.0
ENGINES = 2
# What agents do, and how often (WEIGHTS). They are idempotent, so they may be retried after their VM was killed.
CODE = {
    "quick": "out({'n': 1})",
    "talks": "for i in range(50): print('line', i, flush=True)\nout({'n': 50})",
    "slow": "time.sleep(random.uniform(0.2, 1.5))\nout({'slow': True})",
    "fails": "print('I fail')\nsys.exit(3)",
    "flaky": "out({})\nsys.exit(random.random() < 0.5)",
    "hangs": "time.sleep(600)",
    "silent": "pass",
}
WEIGHTS = {"quick": 40, "talks": 15, "slow": 25, "fails": 5, "flaky": 8, "hangs": 4, "silent": 3}
HEAD = "import json, os, random, sys, time\ndef out(v): json.dump(v, open('output.json', 'w'))\n"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(kw_only=True)
class Campaign:
    settings: Settings
    store: Store
    seed: int
    tickets: int
    max_vms: int
    engines: dict[int, asyncio.subprocess.Process] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.database = self.settings.data_dir / "swarm.db"
        self.pace = 1 if self.settings.driver == "process" else 5  # VMs take longer, so strikes are rarer

    # --- the plan -----------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        for name, code in CODE.items():
            retry = RetryPolicy(max_attempts=6, delay_seconds=0.1, max_delay_seconds=1.0, on=frozenset(FailureReason))
            await registered(
                self.store, self.settings, self.settings.home / "chaos" / name, HEAD + code, name, idempotent=True,
                retry=retry if name not in ("fails", "hangs", "silent") else RetryPolicy(max_attempts=2),
                timeout_seconds=3.0 if name == "hangs" else 60.0,
            )  # fmt: skip

    def insert(self, numbers: range) -> None:
        """With plain SQL, as any tool can, and a commit for each ticket."""
        connection = sqlite3.connect(self.database, timeout=30, isolation_level=None)
        for number in numbers:
            (agent,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            connection.execute(
                "INSERT INTO tickets (id, title, state, agent_id, priority) VALUES (?, 'chaos', 'ready', ?, ?)",
                (f"c{number:04}", agent, self.random.choice((0, 0, 0, 1, -1))),
            )
        connection.close()

    async def run(self) -> None:
        await self.prepare()
        deadline = time.monotonic() + 60 + self.tickets * (4.0 if self.settings.driver != "process" else 1.0)
        async with self.store.watching() as wake:
            for number in range(ENGINES):
                await self.start(number)
            at = 0
            while at < self.tickets or await self.open_tickets():
                if time.monotonic() > deadline:
                    raise AssertionError(f"not all tickets ended in time; seed {self.seed}")
                step = min(self.tickets - at, self.random.randrange(1, 6 if self.pace == 1 else 3))
                await asyncio.to_thread(self.insert, range(at, at + step))
                at += step
                await self.strike(calm=at >= self.tickets)
                await self.pause(wake, self.pace * self.random.uniform(0.1, 0.8))

    async def pause(self, wake: Wake, seconds: float) -> None:
        """Wait this long; meanwhile others commit."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await wake.changed(timeout_seconds=left)

    async def open_tickets(self) -> int:
        queue = await self.store.queue()
        return queue.ready + queue.running + queue.delayed + queue.blocked + queue.waiting

    # --- strikes ------------------------------------------------------------------------------------------------------

    async def strike(self, *, calm: bool) -> None:
        """Restart dead engines, then do one random thing; nothing if ``calm``, so that the last tickets can end."""
        for number, engine in self.engines.items():
            if engine.returncode is not None:
                await self.start(number)
        moves: dict[Callable[[], Awaitable[None]], int] = {
            self.kill_engine: 6, self.freeze: 6, self.kill_vm: 10, self.cancel: 3, self.delete: 2,
            self.nothing: 20,
        }  # fmt: skip
        if calm:
            moves = {self.nothing: 1}
        (move,) = self.random.choices(list(moves), list(moves.values()))
        self.done[move.__name__] += 1
        await move()

    async def nothing(self) -> None:
        return

    async def kill_engine(self) -> None:
        number = self.random.randrange(ENGINES)
        self.engines[number].kill()
        await self.engines[number].wait()
        self.frozen.discard(number)
        await self.start(number)

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
            connection = sqlite3.connect(self.database, timeout=30, isolation_level=None)
            connection.execute(statement, (id_,))
            connection.close()

        await asyncio.to_thread(change, self.random.choice(rows).id)

    # --- engines ------------------------------------------------------------------------------------------------------

    async def start(self, number: int) -> None:
        log = (self.settings.home / f"engine-{number}.log").open("ab")
        settings = {
            "SWARM_STATE_DIR": self.settings.state_dir, "SWARM_IMAGES_DIR": self.settings.images,
            "SWARM_TEMPLATES_DIR": self.settings.templates, "SWARM_LEASE_SECONDS": LEASE_SECONDS,
            "SWARM_DRIVER": self.settings.driver,
        }  # fmt: skip
        with log:
            self.engines[number] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "swarm.cli.engine", "start", "--foreground", f"--max-vms={self.max_vms}",
                "--log-format=json", "--grace=5", "--home", str(self.settings.home),
                env=os.environ | {name: str(value) for name, value in settings.items()},
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

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
        assert not self.vms(), f"seed {self.seed}: VMs are left: {self.vms()}"
        state = self.settings.state_dir
        left = [*state.glob("vms/*"), *state.glob("locks/vm*")]
        assert not left, f"seed {self.seed}: files are left: {left}"
        return report


async def campaign(settings: Settings, *, seed: int, tickets: int, max_vms: int) -> tuple[Report, Counter[str]]:
    say(f"chaos: seed {seed}, {tickets} tickets, driver {settings.driver}")
    began = time.monotonic()
    async with wiring.store(settings) as store:
        one = Campaign(settings=settings, store=store, seed=seed, tickets=tickets, max_vms=max_vms)
        try:
            await one.run()
            statuses = await one.stop()
            assert set(statuses) == {0}, f"seed {seed}: engines ended with {statuses}"
        finally:
            await one.kill()
        report = await one.verdict()
    say(
        f"chaos: {report.done} done, {report.failed} failed, {report.cancelled} cancelled, {report.deleted} deleted; "
        f"{report.attempts} attempts (at most {report.most_attempts} of one ticket), {report.lost_leases} leases lost, "
        f"{report.refused} writes refused; {time.monotonic() - began:.0f} s; {json.dumps(one.done)}"
    )
    return report, one.done


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--tickets", type=int, default=300)
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
            await campaign(settings, seed=options.seed, tickets=options.tickets, max_vms=options.max_vms)
        finally:
            await manual_vm.cleanup(settings, force=True)


if __name__ == "__main__":
    asyncio.run(main())
