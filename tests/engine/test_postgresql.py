"""What happens to PostgreSQL while a real engine serves from it: the engine waits, says it once, and goes on by itself.

One engine and one server live through all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from swarm import config
from swarm.admin.prove import judge
from swarm.app import setup, wiring
from swarm.config import Settings
from swarm.errors import StoreError
from swarm.model import Ticket
from tests import pgbouncer_here, postgres_here
from tests.agents.write import registered
from tests.conftest import missing

pytestmark = [pytest.mark.needs("postgres"), pytest.mark.slow]  # a server, and what only time outs end

Harm = Callable[["World"], AbstractContextManager[None]]
LEASE_SECONDS = 4
QUICK = "import json; print('said'); json.dump({}, open('output.json', 'w'))"
# The first try never ends by itself.
SLOW = f"""
import os, time
if not os.path.exists(GATE):
    open(GATE, "w").write(str(os.getpid()))
    time.sleep(3600)
{QUICK}"""
# Ends when the file is there.
WAITS = f"""
import os, time
open(GATE + ".up", "w").close()
while not os.path.exists(GATE):
    time.sleep(0.02)
{QUICK}"""


@dataclass
class World:
    server: postgres_here.Server
    url: str  # the engine's
    settings: Settings
    log: Path
    engine: subprocess.Popen[bytes]
    root: Path
    made: int = 0

    def admin(self) -> psycopg.Connection[Any]:
        return self.server.admin("swarm")

    def insert(self, agent: str = "quick", count: int = 1) -> list[str]:
        ids = [f"t{self.made + number}" for number in range(count)]
        self.made += count
        with self.admin() as admin, admin.cursor() as cursor:
            statement = "INSERT INTO tickets (id, title, state, agent_id) VALUES (%s, 'x', 'ready', %s)"
            cursor.executemany(statement, [(id_, agent) for id_ in ids])
        return ids

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert self.engine.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def done(self, ids: list[str]) -> None:
        def all_done() -> bool:
            with self.admin() as admin:
                return admin.execute(
                    "SELECT count(*) FROM tickets WHERE state = 'done' AND id = ANY(%s)", (ids,)
                ).fetchone() == (len(ids),)

        self.until(all_done)

    def said(self, after: int) -> list[dict[str, Any]]:
        """What the engine's log has since it was so long."""
        lines = self.log.read_bytes()[after:].splitlines()
        return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]

    def cut(self, where: str = "true") -> None:
        """All connections of the engine."""
        with self.admin() as admin:
            admin.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'swarm' AND {where}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with (
        postgres_here.running(root / "server", wal_level="replica", max_connections="20") as server,
        served(root, server, server.url("swarm", user="swarm")) as world,
    ):
        yield world


@contextmanager
def served(root: Path, server: postgres_here.Server, url: str) -> Iterator[World]:
    """A new database of this server, and an engine that is told of it by ``url``."""
    settings = made(root, server, url)
    with engine(root, settings, url) as (running, log):
        yield World(server, url, settings, log, running, root)


def made(root: Path, server: postgres_here.Server, url: str) -> Settings:
    with server.admin() as admin:
        admin.execute("CREATE ROLE swarm LOGIN")
        admin.execute("CREATE DATABASE swarm OWNER swarm TEMPLATE template0")
    settings = config.load(home=root / "home", state_dir=root / "state", driver="process", database_url=url)

    async def prepare() -> None:
        await setup.init(settings, image=False)
        async with wiring.store(settings) as store:
            for name, code in (("quick", QUICK), ("slow", SLOW), ("waits", WAITS)):
                code = code.replace("GATE", repr(str(root / name / "gate")))
                await registered(store, settings, root / name, code, name)

    asyncio.run(prepare())
    return settings


@contextmanager
def engine(root: Path, settings: Settings, url: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    argv = ["-m", "swarm.cli.engine", "start", "--foreground", "--max-vms=4", "--driver=process", "--log-format=json"]
    env = os.environ | {"SWARM_STATE_DIR": str(settings.state_dir), "SWARM_DATABASE_URL": url}
    env |= {"SWARM_LEASE_SECONDS": str(LEASE_SECONDS), "SWARM_BUSY_TIMEOUT_SECONDS": "10"}
    log = root / "log"
    with log.open("wb") as file:
        running = subprocess.Popen(
            [sys.executable, *argv, "--home", str(settings.home)], env=env, stdin=subprocess.DEVNULL, stderr=file
        )
    try:
        while b"engine serves" not in log.read_bytes():
            assert running.poll() is None, log.read_text()
            time.sleep(0.05)
        yield running, log
        running.terminate()
        assert running.wait(60) == 0, log.read_text()[-3000:]
    finally:
        if running.poll() is None:
            running.kill()
            running.wait()


# --- the harm, from which the block's end frees it --------------------------------------------------------------------


@contextmanager
def stopped(world: World) -> Iterator[None]:
    world.server.stop(signal.SIGQUIT)  # as after a crash
    yield
    world.server.start()


@contextmanager
def a_standby(world: World) -> Iterator[None]:
    world.server.stop()
    (world.server.data / "standby.signal").touch()
    world.server.start()
    yield
    with world.admin() as admin:
        admin.execute("SELECT pg_promote()")


@contextmanager
def no_connection_left(world: World) -> Iterator[None]:
    with world.admin() as admin:
        admin.execute("ALTER ROLE swarm CONNECTION LIMIT 0")
        world.cut()
        yield
        admin.execute("ALTER ROLE swarm CONNECTION LIMIT -1")


@contextmanager
def without_rights(world: World) -> Iterator[None]:
    with world.admin() as admin:
        admin.execute("REVOKE INSERT, UPDATE ON tickets, attempts FROM swarm")
        yield
        admin.execute("GRANT INSERT, UPDATE ON tickets, attempts TO swarm")


@contextmanager
def statements_time_out(world: World) -> Iterator[None]:
    """Behind a program that has locked the table and forgotten it."""
    with world.admin() as admin, world.admin() as other:
        admin.execute("ALTER ROLE swarm SET statement_timeout = '300ms'")
        world.cut()
        other.execute("BEGIN; LOCK TABLE attempts IN EXCLUSIVE MODE")
        yield
        other.execute("ROLLBACK")
        admin.execute("ALTER ROLE swarm RESET statement_timeout")
        world.cut()


HARM: list[tuple[Harm, str]] = [
    (stopped, "can't reach the database"),
    (a_standby, "is read-only: is it a standby?"),
    (no_connection_left, "has no connection left for Swarm"),
    (without_rights, "may not do this"),
    (statements_time_out, "ended a statement that took too long (statement_timeout)"),
]


@pytest.mark.parametrize(("harm", "sentence"), HARM, ids=lambda one: getattr(one, "__name__", ""))
def test_an_engine_says_it_once_and_goes_on(world: World, harm: Harm, sentence: str) -> None:
    world.done(world.insert())
    ids = world.insert(count=8)
    before = world.log.stat().st_size
    with harm(world):
        if harm not in (stopped, a_standby):
            ids += world.insert(count=2)
        world.until(lambda: any(sentence in str(line.get("error")) for line in world.said(before)))
    world.done([*ids, *world.insert()])
    times = Counter((line["event"], line.get("error"), line.get("ticket")) for line in world.said(before))
    most = 2 if harm is statements_time_out else 1  # how often it cuts the connection
    assert {said: count for said, count in times.items() if count > most and said[1] is not None} == {}
    proved(world)


def test_connections_cut_at_random_moments(world: World) -> None:
    ids = world.insert(count=40)
    for _ in range(25):
        time.sleep(random.uniform(0.0, 0.1))
        world.cut(f"random() < {random.choice([0.3, 1.0])}")
    world.done([*ids, *world.insert()])
    proved(world)


def test_an_engine_that_can_not_renew_ends_its_vms_itself(world: World) -> None:
    """The server answers no more, and takes no connection: nobody hangs up."""
    [slow] = world.insert("slow")
    gate = world.root / "slow" / "gate"
    world.until(lambda: gate.exists() and gate.read_text() != "")
    pid = int(gate.read_text())
    assert world.server.process is not None
    frozen = [world.server.process.pid, *_children(world.server.process.pid)]
    before = world.log.stat().st_size
    for one in frozen:
        os.kill(one, signal.SIGSTOP)
    try:
        world.until(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        for one in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGCONT)
    renewals = [line for line in world.said(before) if line["event"] == "can't renew leases"]
    assert len(renewals) == 1, renewals
    world.done([slow, *world.insert()])
    assert attempts(world, slow) == ["lost", "succeeded"]
    proved(world)


def test_an_outcome_that_can_not_be_written_for_a_lease_is_lost_and_the_engine_goes_on(world: World) -> None:
    [id_] = world.insert("waits")

    gate = world.root / "waits" / "gate"
    world.until(lambda: gate.with_name("gate.up").exists())
    before = world.log.stat().st_size
    with no_connection_left(world):
        gate.touch()
        world.until(lambda: any("an outcome is lost" in line["event"] for line in world.said(before)))
    world.done([id_, *world.insert()])
    assert attempts(world, id_) == ["lost", "succeeded"]
    proved(world)


def test_what_was_finished_stays_so_when_the_synchronous_standby_takes_over(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("two")

    def ended(world: World) -> set[tuple[Any, ...]]:
        with world.admin() as admin:
            return set(admin.execute("SELECT id, completed_at, outputs FROM tickets WHERE state = 'done'").fetchall())

    with (
        postgres_here.running(root / "a", **postgres_here.REPLICATED) as first,
        postgres_here.following(first, root / "b") as second,
    ):
        first.wait_for_standby()
        both = f"postgresql://swarm@/swarm?host={first.directory},{second.directory}&target_session_attrs=read-write"
        with served(root, first, both) as world:
            ids = world.insert(count=60)
            world.until(lambda: len(ended(world)) > 10)
            seen = ended(world)
            first.kill()
            second.promote()
            world.server = second
            assert seen <= ended(world)
            world.done([*ids, *world.insert()])
            proved(world)


def test_through_pgbouncer_in_session_mode_all_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("session")
    with (
        behind_pgbouncer(root, "session") as (server, url),
        served(root, server, url) as world,
    ):
        world.done(world.insert(count=20))
        world.done(world.insert())
        proved(world)


def test_through_pgbouncer_in_transaction_mode_an_engine_says_what_it_needs(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Commands work, and leave nothing in sessions that are everybody's."""
    root = tmp_path_factory.mktemp("transaction")
    with behind_pgbouncer(root, "transaction") as (server, url):
        settings = made(root, server, url)

        async def use() -> None:
            async with wiring.store(settings) as one, wiring.store(settings) as other:
                for number, store in enumerate([one, other] * 20):
                    await store.add_ticket(Ticket(id=f"t{number}", title="x", state="ready", agent_id="quick"))
                    assert (await other.ticket(f"t{number}")).state == "ready"
                with pytest.raises(StoreError, match="pooler"):
                    await one.watching().__aenter__()

        asyncio.run(use())
        with psycopg.connect(url) as theirs:
            theirs.execute("INSERT INTO tickets (title, state, agent_id) VALUES ('x', 'ready', 'quick')")
        argv = [sys.executable, "-m", "swarm.cli.engine", "start", "--foreground", "--home", str(settings.home)]
        env = os.environ | {"SWARM_DATABASE_URL": url, "SWARM_STATE_DIR": str(settings.state_dir)}
        refused = subprocess.run(argv, env=env | {"SWARM_DRIVER": "process"}, capture_output=True, text=True)
        assert refused.returncode == 1 and "let it have pool_mode = session" in refused.stderr, refused


@contextmanager
def behind_pgbouncer(root: Path, mode: str) -> Iterator[tuple[postgres_here.Server, str]]:
    if reason := pgbouncer_here.lacks():
        missing("postgres", reason)
    with (
        postgres_here.running(root / "server") as server,
        pgbouncer_here.running(server, root / "b", mode) as url,
    ):
        yield server, url


def attempts(world: World, ticket: str) -> list[str]:
    """How they ended."""
    with world.admin() as admin:
        found = admin.execute(
            "SELECT a.outcome FROM attempts a JOIN step_executions s ON s.id = a.step_execution_id "
            "JOIN workflow_runs r ON r.id = s.run_id WHERE r.ticket_id = %s ORDER BY a.number",
            (ticket,),
        ).fetchall()
    return [outcome for (outcome,) in found]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def proved(world: World) -> None:
    """Each ticket was done once."""

    async def audit() -> None:
        async with wiring.store(world.settings) as store:
            report = await store.audit(judge)
            assert report.kept, report.violations

    asyncio.run(audit())
    with world.admin() as admin:
        twice = admin.execute(
            "SELECT ticket_id FROM events WHERE kind = 'transition' AND step_id IS NULL "
            "AND data::json ->> 'to' = 'done' GROUP BY ticket_id HAVING count(*) > 1"
        ).fetchall()
        said = admin.execute(
            "SELECT attempt_id FROM events WHERE kind = 'output' GROUP BY attempt_id HAVING count(*) > 1"
        ).fetchall()
    assert twice == [] and said == []
