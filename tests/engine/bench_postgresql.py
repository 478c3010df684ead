"""PostgreSQL beside SQLite, for `tests.engine.bench`: name `postgresql`. Figures are for people; nothing is asserted.

Both take turns, so that a busy moment of the machine hits both. The server is the machine's own, with its own settings:
a commit is on the disk before it is told. Beside them, what the tables allow: bare loops of psycopg that claim with
SKIP LOCKED and write the same rows, and of Procrastinate and DBOS those that are installed (`pip install procrastinate
dbos`): their own queues, each from one program that enqueues and runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg

from swarm.model import ECHO_AGENT_ID, Succeeded
from swarm.store.store import Store
from swarm.workflow import validate
from swarm.workflow.pinning import Registry
from tests.engine import bench, bench_flows
from tests.store.bench_queue import HISTORY, ROWS, out
from tests.store.databases import ECHO, LEASE, Backend, Outside, PostgresBackend, SqliteBackend

AS_IT_IS: Final = {"fsync": "on", "full_page_writes": "on", "wal_level": "replica", "autovacuum": "on"}
NAMES: Final = {"SQLite": "sqlite", "PostgreSQL": "postgresql"}
AT_ONCE: Final = 128
_INSERT: Final = "INSERT INTO tickets (id, title, state, agent_id) VALUES (?, 'bench', 'ready', ?)"
_DONE: Final = "SELECT count(*) FROM tickets WHERE state = 'done'"


def enqueue(outside: Outside, name: str, count: int) -> None:
    columns = f"'{name}-' || i, 'bench', 'ready', '{ECHO_AGENT_ID}'"
    outside.execute(HISTORY.format(table="tickets (id, title, state, agent_id)", columns=columns, count=count))


def wait_until_done(outside: Outside, count: int) -> None:
    while outside.execute(_DONE)[0][0] < count:
        time.sleep(0.02)


def served(backend: Backend, tickets: int, engines: int) -> float:
    """No-op tickets a second."""
    url = backend.new()
    outside = backend.outside(url)
    with bench.engines(url, engines, AT_ONCE, []):
        began = time.perf_counter()
        enqueue(outside, "new", tickets)
        wait_until_done(outside, tickets)
        seconds = time.perf_counter() - began
    outside.close()
    return tickets / seconds


def bare_loops(backend: Backend, tickets: int, loops: int) -> float:
    url = backend.new()
    outside = backend.outside(url)
    argv = [sys.executable, "-m", "tests.engine.bench_postgresql", "--bare", url]
    running = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(loops)]
    for one in running:
        assert one.stdout is not None
        one.stdout.readline()
    began = time.perf_counter()
    enqueue(outside, "new", tickets)
    wait_until_done(outside, tickets)
    seconds = time.perf_counter() - began
    for one in running:
        one.communicate()
    outside.close()
    return tickets / seconds


def peer(backend: Backend, name: str, tickets: int) -> float:
    argv = [sys.executable, "-m", "tests.engine.bench_postgresql", "--peer", name, backend.empty()]
    argv += ["--tickets", str(tickets)]
    result = subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(result.stdout.splitlines()[-1])


def wake(backend: Backend, count: int) -> list[float]:
    """ms from the outside COMMIT's being asked for to the claim."""
    url, times = backend.new(), dict[str, int]()
    outside, results = backend.outside(url), list[dict[str, Any]]()
    with bench.engines(url, 1, 8, results):
        for number in range(count):
            time.sleep(random.uniform(0.015, 0.06))
            outside.execute("BEGIN")
            outside.execute(_INSERT, (f"wake-{number}", ECHO_AGENT_ID))
            times[f"wake-{number}"] = time.monotonic_ns()
            outside.execute("COMMIT")
        wait_until_done(outside, count)
    outside.close()
    return [(results[0]["asked"][name] - at) / 1e6 for name, at in times.items()]


async def _workflow(url: str) -> str:
    async with Store.open(url) as store:
        registry = Registry(agent=lambda _: ECHO, workflow=bench_flows.no_workflow)
        return (await store.put_workflow(validate.checked(bench_flows.CHAIN, registry))).id


def chain(backend: Backend, count: int) -> list[float]:
    """ms from the INSERT until the third step begins."""
    url, times = backend.new(), dict[str, int]()
    workflow = asyncio.run(_workflow(url))
    outside, results = backend.outside(url), list[dict[str, Any]]()
    insert = "INSERT INTO tickets (id, state, execution_mode, workflow_id) VALUES (?, 'ready', 'workflow', ?)"
    with bench.engines(url, 1, 64, results):
        for number in range(count):
            time.sleep(random.uniform(0.01, 0.03))
            times[f"flow-{number}"] = time.monotonic_ns()
            outside.execute(insert, (f"flow-{number}", workflow))
            wait_until_done(outside, number + 1)
    outside.close()
    return [(results[0]["asked"][f"{name}/three"] - at) / 1e6 for name, at in list(times.items())[3:]]


async def flat(backends: dict[str, Backend], finished: int, rounds: int) -> None:
    """A claim and an end, with so many finished tickets and with none."""
    async with contextlib.AsyncExitStack() as stack:
        stores, times = dict[tuple[str, int], Store](), dict[tuple[str, int], list[float]]()
        for name, backend in backends.items():
            for count in (0, finished):
                url = backend.new()
                outside = backend.outside(url)
                for table, columns in ROWS.items() if count else ():
                    outside.execute(HISTORY.format(table=table, columns=columns, count=count))
                outside.execute("ANALYZE")
                enqueue(outside, "new", rounds + 50)
                outside.close()
                stores[name, count] = await stack.enter_async_context(Store.open(url))
        for _ in range(rounds):
            for key, store in stores.items():
                began = time.perf_counter()
                (claim,) = await store.claim("bench", lease_seconds=LEASE)
                times.setdefault(key, []).append((time.perf_counter() - began) * 1e3)
                await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
    for name in backends:
        empty, full = (statistics.median(times[name, count]) for count in (0, finished))
        out(f"{name:<19} claim {empty:.2f} ms, with {finished:,} finished {full:.2f} ms (× {full / empty:.2f})")


def idle(backend: PostgresBackend, directory: Path, seconds: float) -> None:
    url = backend.new()
    with bench.real_engine(directory, url) as (pid, _), psycopg.connect(url, autocommit=True) as admin:
        time.sleep(3)

        def used() -> tuple[float, int]:
            admin.execute("SELECT pg_stat_force_next_flush()" if admin.info.server_version >= 150000 else "SELECT 1")
            asked = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
            [[count]] = admin.execute(asked).fetchall()
            return bench.cpu_seconds(pid), int(count)

        cpu, count = used()
        time.sleep(seconds)
        cpu_after, count_after = used()
        out(
            f"PostgreSQL          idle engine: {(cpu_after - cpu) / seconds:.2%} of a core, "
            f"{(count_after - count) / seconds:.1f} transactions a second (heartbeats; an idle engine looks every 30 s)"
        )


# The kernel's own figure, `ru_maxrss`, begins with the memory of whoever starts a process.
_WITH_PEAK: Final = """
import atexit, re, runpy, sys
status = "/proc/self/status"
atexit.register(lambda: sys.stderr.write(re.search(r"VmHWM:\\s*(\\d+)", open(status).read())[1] + "\\n"))
runpy.run_module("swarm.cli.main", run_name="__main__")
"""


def start_up(directory: Path, urls: dict[str, str | None], rounds: int = 5) -> None:
    """Of an engine and of a command, in turn: memory, CPU and time. The CPU says more on a busy machine."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in urls}
    for _ in range(rounds):
        for name, url in urls.items():
            own = directory / f"start-{name}"
            own.mkdir(exist_ok=True)
            with bench.real_engine(own, url) as (pid, _):
                engine = psutil.Process(pid)
                serves, cpu = time.time() - engine.create_time(), bench.cpu_seconds(pid)
                time.sleep(3)
                engine_mb = engine.memory_info().rss / 1e6
            env = os.environ | ({"SWARM_DATABASE_URL": url} if url else {})
            argv = [sys.executable, "-c", _WITH_PEAK, "ticket", "list", "--home", str(own / "home")]
            began = time.perf_counter()
            command = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            assert command.stderr is not None
            list_kb = float(command.stderr.readlines()[-1])
            used = os.wait4(command.pid, 0)[2]
            took = time.perf_counter() - began
            found[name].append((engine_mb, serves, cpu, list_kb / 1e3, took, used.ru_utime + used.ru_stime))
    for name, rows in found.items():
        engine_mb, serves, cpu, list_mb, took, list_cpu = (statistics.median(one) for one in zip(*rows, strict=True))
        engine_said = f"engine {engine_mb:.0f} MB, serves after {serves:.2f} s ({cpu:.2f} s CPU)"
        out(f"{name:<19} {engine_said}; `swarm ticket list` {list_mb:.0f} MB, {took:.2f} s ({list_cpu:.2f} s CPU)")


def _told(name: str, late: list[float], what: str) -> None:
    late.sort()
    p50, p95 = (late[int(len(late) * share)] for share in (0.5, 0.95))
    out(f"{name:<19} {what}: p50 {p50:.2f} ms, p95 {p95:.2f} ms")


def measure(directory: Path, *, tickets: int, finished: int, rounds: int = 3) -> None:
    with contextlib.ExitStack() as stack:
        postgresql = PostgresBackend(directory / "server", **AS_IT_IS)
        stack.callback(postgresql.close)
        (directory / "beside").mkdir()
        backends: dict[str, Backend] = {"SQLite": SqliteBackend(directory / "beside"), "PostgreSQL": postgresql}
        sides: dict[str, Callable[[], float]] = {}
        for name, backend in backends.items():
            for engines in (1, 4):
                sides[f"{name}, {engines} engine{'s' * (engines > 1)}"] = (
                    lambda backend=backend, engines=engines: served(backend, tickets, engines)  # type: ignore[misc]
                )
        for loops in (1, 4):
            sides[f"bare psycopg loop × {loops}"] = lambda loops=loops: bare_loops(postgresql, tickets, loops)  # type: ignore[misc]
        for name, module in PEERS.items():
            if importlib.util.find_spec(module) is not None:
                sides[name] = lambda name=name: peer(postgresql, name, tickets)  # type: ignore[misc]
        found: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, run in sides.items():
                found[name].append(run())
        base = statistics.median(found["SQLite, 1 engine"])
        for name, rates in found.items():
            rate = statistics.median(rates)
            shown = f"{rate:,.0f}/s (× {rate / base:.2f}; {min(rates):,.0f} to {max(rates):,.0f})"
            out(f"no-op tickets       {name:<22} {shown}, load {os.getloadavg()[0]:.1f}")
        for name, backend in backends.items():
            _told(name, wake(backend, 150), "COMMIT asked → claimed")
        for name, backend in backends.items():
            _told(name, chain(backend, 60), "INSERT → third step begun")
        asyncio.run(flat(backends, finished, 200))
        idle(postgresql, directory, 20.0)
        start_up(directory, {"SQLite": None, "PostgreSQL": postgresql.new()})


# --- in processes of their own ----------------------------------------------------------------------------------------


def bare(url: str) -> None:
    """The least that claims and ends tickets in these tables: two transactions for up to 128 of them."""
    connection = psycopg.connect(url)
    event = "INSERT INTO events (ticket_id, step_id, attempt_id, kind, data) VALUES (%s, 'main', %s, 'transition', %s)"
    claim = (
        "SELECT id FROM tickets WHERE state = 'ready' ORDER BY priority DESC, created_at "
        f"LIMIT {AT_ONCE} FOR NO KEY UPDATE SKIP LOCKED"
    )
    begin = (
        "UPDATE tickets SET state = 'in_progress', run_id = 'r-' || id WHERE id = %s",
        "INSERT INTO workflow_runs (id, ticket_id, status) SELECT 'r-' || id, id, 'running' FROM tickets WHERE id = %s",
        "INSERT INTO step_executions (id, run_id, step_id, status, attempt_id) "
        "SELECT 's-' || id, 'r-' || id, 'main', 'running', 'a-' || id FROM tickets WHERE id = %s",
        "INSERT INTO attempts (id, step_execution_id, number, worker, lease_until) "
        "SELECT 'a-' || id, 's-' || id, 1, 'w', 0 FROM tickets WHERE id = %s",
    )
    end = (
        "UPDATE attempts SET outcome = 'succeeded', timings = '{}' WHERE id = 'a-' || %s",
        "UPDATE step_executions SET status = 'completed' WHERE id = 's-' || %s",
        "UPDATE workflow_runs SET status = 'completed' WHERE id = 'r-' || %s",
        "UPDATE tickets SET state = 'done', outputs = '{}' WHERE id = %s",
    )
    out("ready")
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        cursor = connection.cursor()
        ids = cursor.execute(claim).fetchall()
        for statements, to in ((begin, "in_progress"), (end, "done")):
            with connection.pipeline():
                for statement in statements:
                    cursor.executemany(statement, ids)
                cursor.executemany(event, [(id_, f"a-{id_}", f'{{"of": "ticket", "to": "{to}"}}') for (id_,) in ids])
                cursor.executemany(event, [(id_, f"a-{id_}", f'{{"of": "step", "to": "{to}"}}') for (id_,) in ids])
            connection.commit()


async def procrastinate(url: str, tickets: int) -> float:
    from procrastinate import App, PsycopgConnector  # type: ignore[import-not-found,unused-ignore]

    connections = 20  # and as many jobs at once: faster than 128 jobs, or 5
    app = App(connector=PsycopgConnector(conninfo=url, max_size=connections))

    @app.task(name="nothing")  # type: ignore[untyped-decorator,unused-ignore]
    async def nothing() -> None:
        pass

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        began = time.perf_counter()
        for _ in range(0, tickets, 500):
            await nothing.batch_defer_async(*[{}] * 500)
        await app.run_worker_async(concurrency=connections, wait=False, install_signal_handlers=False)
        return tickets / (time.perf_counter() - began)


async def dbos(url: str, tickets: int) -> float:
    from dbos import DBOS  # type: ignore[import-not-found,unused-ignore]

    settings = {"name": "bench", "system_database_url": url.replace("postgresql:", "postgresql+psycopg:")}
    DBOS(config=settings | {"log_level": "ERROR"})  # type: ignore[arg-type,unused-ignore]

    @DBOS.workflow()  # type: ignore[untyped-decorator,unused-ignore]
    async def nothing() -> None:
        pass

    at_once = asyncio.Semaphore(AT_ONCE)

    async def enqueued() -> Any:
        async with at_once:
            return await DBOS.enqueue_workflow_async("bench", nothing)

    DBOS.launch()
    await DBOS.register_queue_async("bench", polling_interval_sec=0.05)  # 1 s is its own
    began = time.perf_counter()
    handles = await asyncio.gather(*[enqueued() for _ in range(tickets)])
    await asyncio.gather(*[handle.get_result() for handle in handles])
    return tickets / (time.perf_counter() - began)


PEERS: Final = {"Procrastinate": "procrastinate", "DBOS": "dbos"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bare", metavar="URL")
    parser.add_argument("--peer", nargs=2, metavar=("NAME", "URL"))
    parser.add_argument("--tickets", type=int, default=0)
    options = parser.parse_args()
    if options.bare:
        bare(options.bare)
    elif options.peer:
        name, url = options.peer
        run = {"Procrastinate": procrastinate, "DBOS": dbos}[name]
        out(str(asyncio.run(run(url, options.tickets))))
        os._exit(0)  # their threads go on


if __name__ == "__main__":
    main()
