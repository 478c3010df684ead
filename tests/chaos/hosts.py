"""The kill campaign across three hosts: `python -m tests.chaos.hosts [--seed N] [--tickets N] [--minutes M]
[--real-vms]`, inside tools/sandbox.py.

Three hosts (see machines.py) with an engine, a home and a state directory each; one has real VMs with --real-vms, one a
clock that is wrong by an hour. All they share is a PostgreSQL with a standby, without which no commit ends; agents come
by its table `packages`. Beside what campaign.py does, hosts crash and boot again, are frozen with all that runs there,
cut off from the database, drained; and PostgreSQL is restarted, in order and as after a crash, and lost: then its
standby takes its place, and gets a standby of its own.

Afterwards what campaign.py asks for must hold, with `swarm prove` on each host; and no ticket that anybody saw ended
may have another end, or none, after a fail-over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg

from swarm import agents, config
from swarm.admin.prove import Report
from swarm.app import setup
from swarm.base.log import configure
from swarm.cli.prove import prove
from swarm.config import Settings
from swarm.vm.slots.inventory import VmRecord
from tests import postgres_here
from tests.chaos import machines
from tests.chaos.campaign import Campaign, go
from tests.chaos.machines import NET, Host

HOSTS: Final = 3
ADDRESSES: Final = (f"{NET}.1", f"{NET}.2")  # of PostgreSQL's two servers
URL: Final = f"postgresql://swarm@{','.join(ADDRESSES)}/swarm?target_session_attrs=read-write"
REAL_VMS, WRONG_CLOCK, HOUR = 2, 1, 3600
_ENDED: Final = "SELECT id, state, outputs, error FROM tickets WHERE state IN ('done', 'failed', 'cancelled')"


class Pair:
    """PostgreSQL's primary and its standby. Servers are started in the thread that makes it, which they end with."""

    def __init__(self, place: Path) -> None:
        self._place, self._made, self._opened = place, 0, ExitStack()
        settings = postgres_here.REPLICATED | {"listen_addresses": ADDRESSES[0]}
        self.primary = self._opened.enter_context(postgres_here.running(place / "p0", **settings))
        with (self.primary.data / "pg_hba.conf").open("a") as file:
            file.write(f"host all all {NET}.0/24 trust\n")
        with self.primary.admin() as admin:
            admin.execute("SELECT pg_reload_conf()")
            admin.execute("CREATE ROLE swarm LOGIN")
            admin.execute("CREATE DATABASE swarm OWNER swarm TEMPLATE template0")
        self.follow(ADDRESSES[1])

    def follow(self, address: str) -> None:
        """The primary gets a standby, for which commits wait from now on."""
        self._made += 1
        directory = self._place / f"p{self._made}"
        server = postgres_here.following(self.primary, directory, listen_addresses=address)
        self.standby = self._opened.enter_context(server)
        self.primary.wait_for_standby()

    async def fail_over(self, *, silent: bool) -> None:
        """The primary is gone, its standby takes its place, and gets a standby. ``silent``: as if its machine were gone
        as well, nobody hears of that."""
        await asyncio.to_thread(self.primary.wait_for_standby)  # it may have been restarted
        address = self.primary.settings["listen_addresses"]
        if silent:
            await machines.remove_address(address)
        self.primary.kill()
        self.primary = self.standby
        await asyncio.to_thread(self.primary.promote)
        if silent:
            await machines.add_address(address)
        self.follow(address)

    def close(self) -> None:
        self._opened.close()


@dataclass(kw_only=True)
class HostsCampaign(Campaign):
    place: Path
    pair: Pair
    hosts: list[Host]
    each: list[Settings]  # of the hosts
    ended: dict[str, tuple[object, ...]] = field(default_factory=dict)  # tickets, as they were when somebody saw it
    served: set[int] = field(default_factory=set)  # pids of engines
    deleted: set[str] = field(default_factory=set)
    due: list[tuple[float, int, Callable[[], Awaitable[None]]]] = field(default_factory=list)  # what ends a strike
    next_strike: int = 0  # when so many tickets have ended
    watching: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lease_seconds = 6.0
        self.once = [
            self.kill_engine, self.freeze, self.cut, self.drain, self.crash, self.restart, self.fail_over,
            self.turn_clock,
        ]  # fmt: skip
        self.random.shuffle(self.once)

    # --- the plan -----------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        await super().prepare()
        for agent in await self.store.agents():
            with await asyncio.to_thread(agents.packed, agent.path) as package:
                await self.store.keep_package(agent.path.name, package)
        self.settings.agents.rename(self.place / "nowhere")  # on no host, that is
        for host in self.hosts:
            if host.number == WRONG_CLOCK:
                await host.wrong_clock()
                host.set_clock(self.random.choice((-HOUR, HOUR)))
            await host.boot()
        self.watching = asyncio.create_task(self.watch())

    def execute(self, statement: str, *values: object) -> None:
        if statement.startswith("DELETE"):
            self.deleted.update(map(str, values))
        with self.pair.primary.admin("swarm") as connection:
            connection.execute(statement.replace("?", "%s"), values)

    def columns(self) -> dict[str, object]:
        """Some run on one host only, whatever that goes through."""
        where = self.random.choice((None,) * 9 + (self.pick(),))
        return super().columns() | ({} if where is None else {"requires": json.dumps({"number": where})})

    async def watch(self) -> None:
        """Whoever asks a primary sees which tickets have ended. So nobody may take that back."""
        while True:
            server, seen = self.pair.primary, self.ended
            with contextlib.suppress(psycopg.OperationalError, OSError):
                async with await psycopg.AsyncConnection.connect(server.url("swarm"), autocommit=True) as connection:
                    while server is self.pair.primary:
                        found = await connection.execute(f"{_ENDED} AND id <> ALL(%s)", [list(seen)])
                        seen |= {str(id_): tuple(row) for id_, *row in await found.fetchall()}
                        found = await connection.execute("SELECT pid FROM workers")
                        self.served |= {pid for (pid,) in await found.fetchall()}
                        await asyncio.sleep(0.1)
            await asyncio.sleep(0.1)

    def check_ended(self) -> None:
        with self.pair.primary.admin("swarm") as connection:
            now = {id_: tuple(row) for id_, *row in connection.execute(_ENDED).fetchall()}
        changed = [(id_, row, now.get(id_)) for id_, row in self.ended.items() if now.get(id_) != row]
        changed = [one for one in changed if one[0] not in self.deleted]
        assert not changed, f"seed {self.seed}: ended otherwise: {changed}"

    # --- strikes ------------------------------------------------------------------------------------------------------

    def strikes(self) -> dict[Callable[[], Awaitable[None]], int]:
        return {
            self.kill_engine: 6, self.freeze: 6, self.kill_vm: 8, self.cancel: 3, self.delete: 1, self.signal_all: 2,
            self.change_log: 1, self.cut: 6, self.drain: 4, self.crash: 2, self.turn_clock: 2, self.restart: 2,
            self.fail_over: 1, self.nothing: 20,
        }  # fmt: skip

    def why_ended(self, number: int) -> str:
        """A service manager starts those again that found no database."""
        engine = self.engines[number]
        return "found no database" if engine.returncode == 1 and engine.pid not in self.served else ""

    async def strike(self, *, calm: bool) -> None:
        now = time.monotonic()
        over = [one for one in self.due if one[0] < now]
        self.due = [one for one in self.due if one not in over]
        for _, _, end in over:
            await end()
        assert self.watching is not None
        if self.watching.done():
            self.watching.result()
        # On a slow machine as on a fast one, so much is done between two strikes.
        if len(self.ended) < self.next_strike and not self.once:
            calm = True
        elif not calm:
            self.next_strike = len(self.ended) + self.random.randrange(1, 9)
        await super().strike(calm=calm)

    async def heal(self, number: int) -> None:
        await super().heal(number)
        for one in [one for one in self.due if one[1] == number]:
            self.due.remove(one)
            await one[2]()

    def end_later(self, number: int, leases: float, end: Callable[[], Awaitable[None]]) -> None:
        self.due.append((time.monotonic() + leases * self.lease_seconds, number, end))

    def signal(self, number: int, name: signal.Signals) -> None:
        self.hosts[number].signal(name)

    async def cut(self) -> None:
        """One host's way to all others, for more than half a lease; rarely for so long that the kernel gives up."""
        host = self.hosts[self.pick()]
        if not any(one.cut_off for one in self.hosts):
            await host.cut(self.random.choice(("down", "drop")))
            self.end_later(host.number, self.random.choice((0.7, 1.2, 1.2, 2.0, 4.0)), host.mend)

    async def drain(self) -> None:
        if not await self.serves(number := self.pick()):
            return
        within = self.random.choice((None, 0.0, 2.0))
        await self.store.drain_host(self.hosts[number].name, by="chaos", within_seconds=within)

        async def undrain() -> None:
            await self.store.undrain_host(self.hosts[number].name, by="chaos")

        self.end_later(number, self.random.uniform(0.5, 2), undrain)

    async def crash(self) -> None:
        """The whole machine, which boots again."""
        number = self.pick()
        await self.heal(number)
        await self.hosts[number].crash()
        await self.engines[number].wait()
        await self.hosts[number].boot()
        await self.start(number)

    async def turn_clock(self) -> None:
        self.hosts[WRONG_CLOCK].set_clock(self.random.choice((-HOUR, 0, HOUR)))

    async def restart(self) -> None:
        """Of PostgreSQL's primary."""
        how = self.random.choice((signal.SIGINT, signal.SIGQUIT))
        self.done[f"restart {how.name}"] += 1
        await self.close()
        await asyncio.to_thread(self.pair.primary.stop, how)
        await asyncio.sleep(self.random.choice((0.0, 1.0, self.lease_seconds)))  # it is away for so long
        self.pair.primary.start()
        await asyncio.to_thread(self.pair.primary.wait_for_standby)
        await self.open()

    async def fail_over(self) -> None:
        silent = self.random.random() < 0.5
        self.done[f"fail_over, {'silent' if silent else 'told'}"] += 1
        await self.close()
        await self.pair.fail_over(silent=silent)
        self.check_ended()
        await self.open()

    # --- engines ------------------------------------------------------------------------------------------------------

    def settings_of(self, number: int) -> Settings:
        return self.each[number]

    def most_vms(self, number: int) -> int:
        return self.max_vms if self.each[number].driver == "process" else 1

    def way_to(self, number: int) -> list[str]:
        return self.hosts[number].way

    def vms(self) -> list[VmRecord]:
        found = [record_of(file) for one in self.each for file in one.state_dir.glob("vms/*/vm.json")]
        return [record for record in found if record is not None]

    async def stop(self) -> dict[int, int]:
        for host in self.hosts:
            await self.heal(host.number)
        return await super().stop()

    # --- the verdict --------------------------------------------------------------------------------------------------

    async def proved(self) -> Report:
        """Engines that were stopped in order have left nothing, not even of those that were killed before them."""
        self.check_ended()
        for host, settings in zip(self.hosts, self.each, strict=True):
            done = await host.swarm("prove", "--json", "--home", str(settings.home), **environment(settings))
            assert done.returncode == 0, f"seed {self.seed}: {host.name}: {done.stdout.decode()}{done.stderr.decode()}"
            left = [(one.pid, one.cmdline()) for one in host.processes()]
            assert not left, f"seed {self.seed}: {host.name}: processes are left: {left}"
        return await prove(self.settings)


def record_of(file: Path) -> VmRecord | None:
    """None if it is gone meanwhile."""
    with contextlib.suppress(OSError):
        return VmRecord(**json.loads(file.read_text()))
    return None


def environment(settings: Settings) -> dict[str, str]:
    return {"SWARM_STATE_DIR": str(settings.state_dir), "SWARM_DATABASE_URL": settings.database_url}


@asynccontextmanager
async def hosts(
    place: Path, *, real_vms: bool, images: Path | None, templates: Path | None
) -> AsyncIterator[tuple[list[Host], list[Settings]]]:
    """They are not booted. Their directories are below ``place``, which must be short."""
    made = [Host(number, place / f"h{number}") for number in range(HOSTS)]
    each = [
        config.load(
            home=host.place / "home",
            state_dir=host.place / "s",
            database_url=URL,
            labels={"number": host.number},
            images_dir=images,
            templates_dir=templates,
            driver="qemu" if real_vms and host.number == REAL_VMS else "process",
        )
        for host in made
    ]
    try:
        yield made, each
    finally:
        for host in made:
            await host.crash()


async def campaign(
    place: Path,
    *,
    seed: int,
    tickets: int,
    minutes: float = 60.0,
    kills: int = 0,
    real_vms: bool = False,
    images: Path | None = None,
    templates: Path | None = None,
) -> tuple[Report, Counter[str]]:
    async with machines.bridge(*ADDRESSES):
        pair = Pair(place / "p")
        try:
            own = config.load(home=place / "home", state_dir=place / "s", database_url=URL, driver="process")
            await setup.init(own, image=False)
            async with hosts(place, real_vms=real_vms, images=images, templates=templates) as (made, each):
                one = HostsCampaign(
                    settings=own, seed=seed, tickets=tickets, kills=kills, guilty=0, max_vms=3,
                    until=time.monotonic() + 60 * minutes, engine_count=HOSTS, place=place, pair=pair, hosts=made,
                    each=each,
                )  # fmt: skip
                try:
                    return await go(one)
                finally:
                    if one.watching is not None:
                        one.watching.cancel()
                        await asyncio.gather(one.watching, return_exceptions=True)
        finally:
            pair.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--tickets", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=0, help="kill engines at least this often")
    parser.add_argument("--minutes", type=float, default=60.0, help="add no more tickets after so many")
    parser.add_argument("--real-vms", action="store_true", help="one host has QEMU, and one VM")
    options = parser.parse_args()
    configure()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "images"
    with tempfile.TemporaryDirectory(prefix="h", dir=os.environ.get("SWARM_SANDBOX")) as name:
        await campaign(Path(name), images=cache, **vars(options))


if __name__ == "__main__":
    asyncio.run(main())
