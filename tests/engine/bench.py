"""How fast is the engine, and what does it cost? `make bench-engine`, or `python -m tests.engine.bench [NAME …]`.

The engine here is all of Swarm's but the VM: dispatcher, worker, store, and a null agent that succeeds at once. Every
transition is recorded, and on the disk before anybody is told. Engines, and the programs that insert, are processes of
their own. Nothing is asserted: figures are for people.

    wake         commit of an outside INSERT → claim committed
    throughput   no-op tickets per second, 1 and 2 engines, from the first INSERT's begin to the last row done
    flat         claim and finish with 0, 10⁵ and 10⁶ finished tickets in the file
    chain, fan   workflows: see bench_flows
    idle         CPU and memory of the real `swarm-engine start` while nothing happens
    postgresql   PostgreSQL beside SQLite: see bench_postgresql
    neighbour    a small ticket's time beside a tenant who does his worst: see bench_neighbour (many minutes)
    locked       share of INSERTs by a `sqlite3` shell, which does not wait, that meet a lock; also beside the real
                 engine. Whose lock it is: the engine's, or that of whoever inserts the tickets
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import random
import resource
import select
import signal
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import structlog

from swarm.base.clock import Timeline
from swarm.base.priority import ahead_of_others
from swarm.engine.dispatch import Dispatcher
from swarm.engine.engine import Watcher
from swarm.engine.worker import Worker
from swarm.model import ECHO_AGENT_ID, Claim, Outcome, Succeeded
from swarm.store.hosts import Machine
from swarm.store.store import Store
from tests.engine import bench_flows
from tests.postgres_here import programs
from tests.store.bench_queue import ECHO, insert, insert_history, out

NAMES = ["wake", "throughput", "flat", "chain", "fan", "idle", "postgresql", "neighbour", "locked"]
LEASE_SECONDS = 30.0


class NullAgent:
    """Succeeds at once; remembers when it was asked."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}

    async def execute(self, claim: Claim, watcher: Watcher, timeline: Timeline) -> Outcome:
        name = claim.ticket.id if claim.step_id == "main" else f"{claim.ticket.id}/{claim.step_id}"
        self.asked[name] = time.monotonic_ns()
        await watcher.placed(1000)
        timeline.mark("slot")
        timeline.mark("stopped")
        return Succeeded(outputs="{}")


async def serve(database: str, max_vms: int, say: Callable[[str], object] = out) -> None:
    """An engine: says a line when it is ready, and one of JSON when SIGTERM has ended it."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    agent = NullAgent()
    url = database if "://" in database else f"sqlite:///{database}"
    async with Store.open(url) as store, store.watching(events=False) as wake:
        await store.register_host(_machine())
        worker = Worker(store=store, engine=agent, name=f"bench:{os.getpid()}", lease_seconds=LEASE_SECONDS)
        dispatcher = Dispatcher(store=store, worker=worker, wake=wake, max_vms=max_vms, memory=None, grace_seconds=10.0)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, dispatcher.stop)
        asyncio.get_running_loop().call_later(0.3, say, "ready")
        await dispatcher.run()
        store_use = store.use()
    used = resource.getrusage(resource.RUSAGE_SELF)
    told = {"asked": agent.asked, "cpu": used.ru_utime + used.ru_stime, "rss_mb": used.ru_maxrss >> 10}
    say(json.dumps(told | {"store": store_use}))


def _machine() -> Machine:
    """Each engine is a host of its own, as where there are many."""
    name, none = f"bench-{os.getpid()}", dict[str, object]()
    return Machine(id=name, name=name, machine_id=name, boot_id=name, labels=none, capacity=none, versions=none)


@contextlib.contextmanager
def engines(file: Path | str, count: int, max_vms: int, results: list[dict[str, object]]) -> Iterator[list[int]]:
    dies = ("setpriv", "--pdeathsig=KILL")  # with this process, however it ends
    argv = [*dies, sys.executable, "-m", "tests.engine.bench", "--serve", str(file), "--max-vms", str(max_vms)]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    try:
        for one in running:
            assert one.stdout is not None
            one.stdout.readline()
        yield [one.pid for one in running]
    finally:
        for one in running:
            one.terminate()
        for one in running:
            results.append(json.loads(one.communicate()[0].splitlines()[-1]))


async def database(directory: Path, name: str) -> Path:
    file = directory / f"{name}.db"
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        await store.put_agent(ECHO)
    return file


def committed(file: Path, count: int, seed: int) -> dict[str, tuple[int, int]]:
    """Insert one by one at random moments; when each COMMIT was asked for, and when it returned (an fsync later)."""
    random.seed(seed)
    times: dict[str, tuple[int, int]] = {}
    connection = sqlite3.connect(file, isolation_level=None, timeout=60)
    for number in range(count):
        time.sleep(random.uniform(0.015, 0.06))
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT INTO tickets (id, title, state, agent_id) VALUES (?, 'wake', 'ready', ?)",
            (f"wake-{number}", ECHO_AGENT_ID),
        )
        asked = time.monotonic_ns()
        connection.execute("COMMIT")
        times[f"wake-{number}"] = (asked, time.monotonic_ns())
    connection.close()
    return times


def wait_until_done(file: Path, count: int) -> None:
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    while connection.execute("SELECT count(*) FROM tickets WHERE state = 'done'").fetchone()[0] < count:
        time.sleep(0.02)
    connection.close()


async def wake(directory: Path, count: int) -> None:
    file = await database(directory, "wake")
    results: list[dict[str, object]] = []
    with engines(file, 1, 8, results):
        times = committed(file, count, 1)
        wait_until_done(file, count)
    asked = results[0]["asked"]
    assert isinstance(asked, dict)
    for what, number in (("COMMIT returned", 1), ("COMMIT asked   ", 0)):
        late = sorted((asked[name] - at[number]) / 1e6 for name, at in times.items())
        p50, p95, p99 = (late[int(len(late) * share)] for share in (0.5, 0.95, 0.99))
        out(f"wake-up             {what} → claimed: p50 {p50:.2f} ms, p95 {p95:.2f} ms, p99 {p99:.2f} ms")


async def throughput(directory: Path, count: int, engines_: int, how: str, max_vms: int) -> None:
    file = await database(directory, f"throughput-{engines_}-{how}")
    results: list[dict[str, object]] = []
    with engines(file, engines_, max_vms, results):
        began = time.perf_counter()
        if how == "batch":
            insert(file, "new", count)
        else:
            single(file, count)
        enqueued = time.perf_counter() - began
        wait_until_done(file, count)
        seconds = time.perf_counter() - began
    cpu = sum(float(str(r["cpu"])) for r in results)
    out(
        f"throughput          {engines_} engine{'s' if engines_ > 1 else ' '}, enqueued by {how:6}: "
        f"{count / seconds:6,.0f}/s ({count} in {seconds:.2f} s; enqueued in {enqueued:.2f} s; "
        f"{cpu / count * 1e6:.0f} µs CPU a ticket, {results[0]['rss_mb']} MB)"
    )


def single(file: Path, count: int) -> None:
    connection = sqlite3.connect(file, isolation_level=None, timeout=60)
    for number in range(count):
        connection.execute(
            "INSERT INTO tickets (id, title, state, agent_id) VALUES (?, 'null', 'ready', ?)",
            (f"one-{number}", ECHO_AGENT_ID),
        )
    connection.close()


async def flat(directory: Path, sizes: list[int], rounds: int) -> None:
    """In turn on each file, so that a busy moment of the machine hits all of them."""
    async with contextlib.AsyncExitStack() as stack:
        stores = []
        for size in sizes:
            file = await database(directory, f"flat-{size}")
            if size:
                insert_history(file, size)
            insert(file, "new", rounds + 50)
            stores.append(await stack.enter_async_context(Store.open(f"sqlite:///{file}")))
        times: list[tuple[list[float], list[float]]] = [([], []) for _ in sizes]
        for _ in range(rounds):
            for store, (claims, finishes) in zip(stores, times, strict=True):
                began = time.perf_counter()
                (claim,) = await store.claim("bench", lease_seconds=LEASE_SECONDS)
                claimed = time.perf_counter()
                await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
                claims.append(claimed - began)
                finishes.append(time.perf_counter() - claimed)
    first = statistics.median(times[0][0])
    for size, (claims, finishes) in zip(sizes, times, strict=True):
        claim_ms, finish_ms = statistics.median(claims) * 1e3, statistics.median(finishes) * 1e3
        out(f"{size:>9,} finished  claim {claim_ms:.3f} ms (× {claim_ms / first / 1e3:.2f}), finish {finish_ms:.3f} ms")


@contextlib.contextmanager
def real_engine(directory: Path, url: str | None = None) -> Iterator[tuple[int, Path]]:
    """`swarm-engine start` on plain processes: its pid, and its database."""
    home = directory / "home"
    env = {**os.environ, "SWARM_STATE_DIR": str(directory / "state")} | ({"SWARM_DATABASE_URL": url} if url else {})
    swarm = [sys.executable, "-m", "swarm.cli.main", "init", "--no-image", "--home", str(home)]
    subprocess.run(swarm, env=env, check=True, stdout=subprocess.DEVNULL)
    argv = [sys.executable, "-m", "swarm.cli.engine", "start", "--foreground", "--driver=process", "--home", str(home)]
    with (directory / "engine.log").open("wb") as log:
        running = subprocess.Popen(argv, env=env, stderr=log)
    try:
        while b"engine serves" not in (directory / "engine.log").read_bytes():
            assert running.poll() is None, (directory / "engine.log").read_text()
            time.sleep(0.05)
        yield running.pid, home / "data" / "swarm.db"
    finally:
        running.terminate()
        running.wait()


def idle(directory: Path, seconds: float) -> None:
    with real_engine(directory) as (pid, _):
        time.sleep(2)
        before = cpu_seconds(pid)
        time.sleep(seconds)
        share = (cpu_seconds(pid) - before) / seconds
        memory = next(
            int(line.split()[1]) >> 10
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
        out(f"idle engine         {share:.2%} of a core, {memory} MB resident")


def bare(file: str, how: str) -> None:
    """What any engine must write for a ticket: a process that looks each millisecond, and for each ready ticket runs
    two transactions of a few prepared statements, with the tables and indexes as they are. ``how``: the rows that Swarm
    writes ("rows"), or the ticket's alone ("ticket"), which nobody can do without."""
    connection = sqlite3.connect(file, isolation_level=None, timeout=60)
    for pragma in ("synchronous = NORMAL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
    out("ready")
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        for (id_,) in connection.execute("SELECT id FROM tickets WHERE state = 'ready' LIMIT 8").fetchall():
            for statements in (_BEGINS, _ENDS):
                connection.execute("BEGIN IMMEDIATE")
                for statement in statements[: None if how == "rows" else 1]:
                    connection.execute(statement, {"id": id_})
                connection.execute("COMMIT")


_EVENT: Final = (
    "INSERT INTO events (ticket_id, step_id, attempt_id, kind, data) VALUES (:id, 'main', 'a-' || :id, 'transition', "
)
_BEGINS: Final = (
    "UPDATE tickets SET state = 'in_progress', run_id = 'r-' || :id WHERE id = :id",
    "INSERT INTO workflow_runs (id, ticket_id, status) VALUES ('r-' || :id, :id, 'running')",
    "INSERT INTO step_executions (id, run_id, step_id, status, attempt_id) "
    "VALUES ('s-' || :id, 'r-' || :id, 'main', 'running', 'a-' || :id)",
    "INSERT INTO attempts (id, step_execution_id, number, worker, lease_until) "
    "VALUES ('a-' || :id, 's-' || :id, 1, 'w', 0)",
    _EVENT + """'{"of": "ticket", "to": "in_progress"}')""",
)
_ENDS: Final = (
    "UPDATE tickets SET state = 'done', outputs = '{}' WHERE id = :id",
    "UPDATE attempts SET outcome = 'succeeded', timings = '{}' WHERE id = 'a-' || :id",
    "UPDATE step_executions SET status = 'completed' WHERE id = 's-' || :id",
    "UPDATE workflow_runs SET status = 'completed' WHERE id = 'r-' || :id",
    _EVENT + """'{"of": "ticket", "to": "done"}')""",
)


@contextlib.contextmanager
def bare_engine(file: Path, how: str) -> Iterator[int]:
    argv = [sys.executable, "-m", "tests.engine.bench", "--bare", str(file), "--how", how]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None and running.stdout is not None
        running.stdout.readline()
        yield running.pid
        running.stdin.close()


async def locked(directory: Path, shells: int) -> None:
    def refused(file: Path, engine: int) -> str:
        argv = [sys.executable, "-m", "tests.engine.bench", "--whose-lock", str(file), "--pid", str(engine)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as looking:
            count = sum(not _typed(file, f"shell-{number}") for number in range(shells))
            held = looking.communicate()[0].strip()
        return f"{count / shells:6.1%} of {shells} INSERTs refused; lock held {held}"

    for per_second in (0, 20, 100, None):
        name = "as many as it can" if per_second is None else f"{per_second} a second"
        file = await database(directory, f"locked-{per_second}")
        if per_second is None:
            insert(file, "new", 60_000)
        with engines(file, 1, 64, []) as (engine,), _paced(file, per_second or 0):
            out(f"locked              {name + ' no-op tickets:':44} {refused(file, engine)}")
    for per_second, how in itertools.product((20, 100), ("rows", "ticket")):
        file = await database(directory, f"bare-{how}-{per_second}")
        with bare_engine(file, how) as engine, _paced(file, per_second):
            name = f"{per_second} a second, bare, {'the same rows' if how == 'rows' else 'the ticket alone'}:"
            out(f"locked              {name:44} {refused(file, engine)}")
    real = directory / "locked"
    real.mkdir()
    with real_engine(real) as (engine, file), _paced(file, 10):
        out(f"locked              {'10 tickets a second on processes:':44} {refused(file, engine)}")
        done = sqlite3.connect(file).execute("SELECT count(*) FROM tickets WHERE state = 'done'").fetchone()[0]
        out(f"                    ({done} of them done meanwhile)")


def whose_lock(file: str, engine: int) -> None:
    """Until stdin is closed, look at random moments who holds the write lock, and first if real-time threads hold it:
    else those moments would not be seen."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
    held, looks = Counter[int](), 0
    with open(f"{file}-shm", "rb+") as shm:
        while not select.select([sys.stdin], [], [], random.uniform(0.0002, 0.001))[0]:
            # struct flock; 120 is WAL_WRITE_LOCK (sqlite.org/walformat.html, 2.3.1).
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 120, 1, 0)
            kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(shm, fcntl.F_GETLK, asked))
            looks += 1
            if kind != fcntl.F_UNLCK:
                held[pid] += 1
    engines, others = held[engine] / max(looks, 1), held[os.getppid()] / max(looks, 1)
    out(f"by the engine {engines:.2%} of the time, to insert the tickets {others:.2%}")


def _typed(file: Path, id_: str) -> bool:
    statement = f"INSERT INTO tickets (id, title, state) VALUES ('{id_}', 'typed', 'draft')"
    return (
        subprocess.run(["sqlite3", file, statement], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE).returncode == 0
    )


@contextlib.contextmanager
def _paced(file: Path, per_second: int) -> Iterator[None]:
    """Tickets of other programs, inserted during the block."""
    over = threading.Event()

    def insert_paced() -> None:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as connection:
            # Shells meet its locks too; they are printed. It lets nobody in: tickets would come when no shell writes.
            connection.execute("PRAGMA synchronous = OFF")
            for number in itertools.count():
                if over.wait(1 / per_second):
                    return
                with ahead_of_others():
                    connection.execute(
                        "INSERT INTO tickets (id, title, state, agent_id) VALUES (?, 'paced', 'ready', ?)",
                        (f"paced-{number}", ECHO_AGENT_ID),
                    )

    thread = threading.Thread(target=insert_paced)
    if per_second:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if per_second:
            thread.join()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        default=["wake", "throughput", "flat", "chain", "fan", "idle", "postgresql", "neighbour", "locked"],
    )
    parser.add_argument("--tickets", type=int, default=5000)
    parser.add_argument("--finished", type=int, nargs="*", default=[0, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="*", help="of neighbours; without it: all")
    parser.add_argument("--max-vms", type=int, default=128)
    parser.add_argument("--serve", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--whose-lock", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--bare", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--how", default="rows", help=argparse.SUPPRESS)
    parser.add_argument("--shells", type=int, default=1000, help="of `locked`, for each line")
    parser.add_argument("--pid", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(options.bare, options.how)
        return
    if options.whose_lock:
        whose_lock(options.whose_lock, options.pid)
        return
    if options.serve:
        await serve(options.serve, options.max_vms)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        out(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start; SQLite {sqlite3.sqlite_version}")
        if "wake" in options.names:
            await wake(directory, 200)
        if "throughput" in options.names:
            for count in (1, 2):
                for how in ("batch", "single"):
                    await throughput(directory, options.tickets, count, how, options.max_vms)
        if "flat" in options.names:
            await flat(directory, options.finished, 400)
        if "chain" in options.names:
            await bench_flows.measure(directory, engines, "chain", bench_flows.CHAIN, 200)
        if "fan" in options.names:
            await bench_flows.measure(directory, engines, "fan", bench_flows.FAN, 40)
        if "idle" in options.names:
            idle(directory, 10.0)
        if "postgresql" in options.names and programs() is not None:
            from tests.engine import bench_postgresql  # not above: see below

            await asyncio.to_thread(
                bench_postgresql.measure, directory, tickets=options.tickets, finished=max(options.finished)
            )
        if "neighbour" in options.names:
            from tests.engine import bench_neighbour  # not above: engines that are measured import this module

            await bench_neighbour.measure(directory, options.kinds or list(bench_neighbour.KINDS))
        if "locked" in options.names:
            await locked(directory, options.shells)


if __name__ == "__main__":
    asyncio.run(main())
