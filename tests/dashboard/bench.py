"""How long do pages take, and what does it cost an engine to be seen? `python -m tests.dashboard.bench [pages|seen]`.

    pages   the first request for each page, p50 and p95 of 30 more, as a client on loopback has them, and the server's
            CPU time a request: over 10⁶ ended tickets, 10⁶ model calls and a run of 2,000 steps
    seen    no-op tickets per second of an engine, alone and while a server has ten open pages, in turn; then CPU and
            memory of an idle server

Nothing is asserted: figures are for people (docs/dashboard.md).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from swarm import config
from swarm.app import wiring
from swarm.config import Settings
from swarm.model import ECHO_AGENT_ID, Role
from swarm.store.registry.tokens import Actor, new_token
from tests.api.served import ECHO
from tests.dashboard import flows
from tests.engine.bench import committed, engines, real_engine, wait_until_done
from tests.store.bench_queue import insert, out

_SERIES = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) "
_AT = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-' || (i * 2.5) || ' seconds')"
_ROWS = {
    "tickets (id, title, state, agent_id, project_id, run_id, outputs, error, created_at, completed_at)": (
        "'old-' || i, 'Ticket number ' || i, CASE WHEN i % 12 = 0 THEN 'failed' WHEN i % 50 = 0 THEN 'cancelled' "
        f"ELSE 'done' END, CASE WHEN i % 3 = 0 THEN '{ECHO_AGENT_ID}' ELSE 'gone' END, 'p' || (i % 5), 'run-' || i, "
        f"'{{}}', CASE WHEN i % 12 = 0 THEN 'agent_failed: it broke' END, {_AT}, {_AT}"
    ),
    "workflow_runs (id, ticket_id, status)": "'run-' || i, 'old-' || i, 'completed'",
    "step_executions (id, run_id, step_id, status, attempt_id)": (
        "'step-' || i, 'run-' || i, 'main', 'completed', 'attempt-' || i"
    ),
    "attempts (id, step_execution_id, number, worker, lease_until, outcome)": (
        "'attempt-' || i, 'step-' || i, 1, 'w', 1000, 'succeeded'"
    ),
    "events (ticket_id, kind, data)": "'old-' || i, 'transition', '{}'",
    "model_calls (id, at, agent, workflow, model, status, tokens, cost_usd)": (
        f"'call-' || i, {_AT}, 'agent-' || (i % 5), CASE i % 3 WHEN 0 THEN 'flow' END, 'model-' || (i % 4), 200, 100, "
        "0.001"
    ),
}


async def prepared(home: Path, tickets: int) -> tuple[Settings, str]:
    """A database with history, and the token of an admin."""
    settings = config.load(home=home)
    settings.data_dir.mkdir(parents=True)
    token = new_token()
    async with wiring.store(settings) as store:
        await store.migrate()
        await store.put_agent(ECHO)
        await store.add_token(token, Actor(name="bench", role=Role.ADMIN), by="bench")
        if tickets:
            with sqlite3.connect(home / "data" / "swarm.db") as connection:
                for table, columns in _ROWS.items():
                    series = _SERIES.format(count=tickets)
                    connection.execute(f"{series} INSERT INTO {table} SELECT {columns} FROM n")
                series = _SERIES.format(count=10_000)
                connection.execute(
                    f"{series} INSERT INTO tickets (id, title, state, agent_id) "
                    f"SELECT 'new-' || i, 'new', 'ready', 'gone' FROM n"
                )
            connection.close()
            await flows.start(store, flows.large("large", 2000), "large", priority=9)
            for n in range(200):
                ask = flows.workflow(f"ask-{n % 5}", {"id": "ask", "approval": {"message": "Well?"}})
                await flows.start(store, ask, f"ask-{n}", priority=9)
            only = ("a", *(f"s{i}" for i in range(800)))
            while claims := [
                one
                for ticket in ("large",)
                for one in await store.claim("b", limit=50, lease_seconds=600, ticket_id=ticket)
            ]:
                await flows.finish_all(store, claims, only=only)
            for n in range(200):
                await store.claim("b", limit=1, lease_seconds=600, ticket_id=f"ask-{n}")
            await store.decided()
    return settings, token


@contextlib.contextmanager
def server(settings: Settings) -> Iterator[tuple[int, int]]:
    """`swarm serve`: its pid and its port."""
    argv = [sys.executable, "-m", "swarm.cli.main", "serve", "--port", "0", "--home", str(settings.home)]
    running = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert running.stdout is not None
        found = re.search(r"http://[\d.]+:(\d+)", running.stdout.readline())
        assert found is not None
        yield running.pid, int(found[1])
    finally:
        running.terminate()
        running.wait()


def get(connection: http.client.HTTPConnection, path: str, token: str) -> tuple[float, int, int]:
    began = time.perf_counter()
    connection.request("GET", path, headers={"authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    size = len(answer.read())
    return time.perf_counter() - began, answer.status, size


async def pages(directory: Path, tickets: int) -> None:
    settings, token = await prepared(directory / "home", tickets)
    async with wiring.store(settings) as store:
        flow = (await store.workflow("large")).id
    paths = [
        "/", "/tickets", "/tickets?state=failed", "/tickets?state=done&project=p1", "/tickets?text=broke",
        "/tickets?text=nothing", "/tickets/old-77", "/tickets/large", "/tickets/large/graph",
        "/tickets/large/graph?open=s0", "/tickets/large/graph?page=30", "/tickets/large/graph/step?step=a",
        "/approvals", "/agents", f"/agents/{ECHO_AGENT_ID}", "/workflows", f"/workflows/{flow}", "/schedules",
        "/costs?range=24h", "/costs?range=30d", "/hosts",
    ]  # fmt: skip
    with server(settings) as (pid, port):
        out("| page | first ms | p50 ms | p95 ms | CPU ms | KB |\n|---|---|---|---|---|---|")
        for path in paths:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            first = get(connection, path, token)[0] * 1e3
            before = cpu_seconds(pid)
            got = [get(connection, path, token) for _ in range(30)]
            cpu = (cpu_seconds(pid) - before) / len(got) * 1e3
            times = sorted(one[0] * 1e3 for one in got)
            p95 = times[int(len(times) * 0.95)]
            said = path.replace(ECHO_AGENT_ID, "ID").replace(flow, "ID")
            failed = "" if got[-1][1] == 200 else f" (status {got[-1][1]})"
            figures = f"{first:.0f} | {statistics.median(times):.1f} | {p95:.1f} | {cpu:.0f} | {got[-1][2] >> 10}"
            out(f"| `{said}`{failed} | {figures} |")
            connection.close()


# --- the cost of being seen -----------------------------------------------------------------------------------------

OPEN = ("/", "/", "/tickets", "/tickets", "/approvals", "/hosts", "/schedules", "/", "/tickets", "/hosts")


def follow(port: int, token: str, path: str, stop: threading.Event, fetched: list[int]) -> None:
    """One open page: it holds a stream, and fetches itself again when that says so."""
    pages_ = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    get(pages_, path, token)
    live = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    live.request("GET", "/live", headers={"authorization": f"Bearer {token}"})
    answer = live.getresponse()
    while not stop.is_set():
        line = answer.readline()
        if not line:
            return
        if line.startswith(b"event: update"):
            get(pages_, path, token)
            fetched.append(1)


@contextlib.contextmanager
def looked_at(settings: Settings, token: str, shares: list[float]) -> Iterator[list[int]]:
    """``shares`` gets the server's share of a core."""
    fetched: list[int] = []
    stop = threading.Event()
    with server(settings) as (pid, port):
        open_ = [threading.Thread(target=follow, args=(port, token, path, stop, fetched), daemon=True) for path in OPEN]
        for one in open_:
            one.start()
        time.sleep(1)
        began, cpu = time.perf_counter(), cpu_seconds(pid)
        yield fetched
        shares.append((cpu_seconds(pid) - cpu) / (time.perf_counter() - began))
        stop.set()
    for one in open_:
        one.join()


async def seen(directory: Path, tickets: int, rounds: int) -> None:
    rates: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    refetched, shares = 0, list[float]()
    for number in range(rounds):
        for watched in (False, True):
            settings, token = await prepared(directory / f"home-{number}-{watched}", 0)
            file = settings.home / "data" / "swarm.db"
            results: list[dict[str, object]] = []
            with contextlib.ExitStack() as stack:
                fetched = stack.enter_context(looked_at(settings, token, shares)) if watched else []
                stack.enter_context(engines(file, 1, 64, results))
                began = time.perf_counter()
                insert(file, "new", tickets)
                wait_until_done(file, tickets)
                rates[watched].append(tickets / (time.perf_counter() - began))
                refetched += len(fetched)
            cpu[watched].append(float(str(results[0]["cpu"])) / tickets * 1e6)
    for watched, name in ((False, "alone"), (True, "ten open pages")):
        out(
            f"throughput  {name:15} {statistics.median(rates[watched]):6,.0f}/s (of {rounds} rounds; "
            f"{statistics.median(cpu[watched]):.0f} µs CPU of the engine a ticket)"
        )
    share = statistics.median(rates[True]) / statistics.median(rates[False])
    out(f"            {share:.1%} of the throughput; {refetched} pages were fetched again,")
    out(f"            by {statistics.median(shares):.0%} of a core")


async def woken(directory: Path, tickets: int, rounds: int) -> None:
    """From the COMMIT of another program's INSERT to the claim, without and with the open pages."""
    late: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for watched in (False, True):
            settings, token = await prepared(directory / f"wake-{number}-{watched}", 0)
            file = settings.home / "data" / "swarm.db"
            results: list[dict[str, object]] = []
            with contextlib.ExitStack() as stack:
                if watched:
                    stack.enter_context(looked_at(settings, token, []))
                stack.enter_context(engines(file, 1, 8, results))
                times = committed(file, tickets, number)
                wait_until_done(file, tickets)
            asked = results[0]["asked"]
            assert isinstance(asked, dict)
            late[watched] += [(asked[name] - at[1]) / 1e6 for name, at in times.items()]
    for watched, name in ((False, "alone"), (True, "ten open pages")):
        p50, p95 = (statistics.quantiles(late[watched], n=100)[share] for share in (49, 94))
        out(f"wake-up     {name:15} p50 {p50:.2f} ms, p95 {p95:.2f} ms (of {rounds} rounds)")


async def idle(directory: Path, seconds: float) -> None:
    """Beside an engine, with which it shares libraries."""
    with real_engine(directory) as (engine, file):
        settings, token = config.load(home=file.parent.parent), new_token()
        async with wiring.store(settings) as store:
            await store.add_token(token, Actor(name="bench", role=Role.ADMIN), by="bench")
        await asyncio.sleep(2)
        alone = pss_mb(engine)
        with server(settings) as (pid, port):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for path in OPEN:
                get(connection, path, token)
            await asyncio.sleep(3)
            before = cpu_seconds(pid)
            await asyncio.sleep(seconds)
            share, more = (cpu_seconds(pid) - before) / seconds, pss_mb(engine) + pss_mb(pid) - alone
    out(f"idle server {share:.2%} of a core, {more} MB more than the engine's {alone} MB (PSS)")


def cpu_seconds(pid: int) -> float:
    """Of a process and its children."""
    pids = [pid, *children(pid)]
    ticks = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:13] for one in pids]
    return sum(int(user) + int(system) for user, system in ticks) / os.sysconf("SC_CLK_TCK")


def pss_mb(pid: int) -> int:
    rollups = [Path(f"/proc/{one}/smaps_rollup").read_text() for one in (pid, *children(pid))]
    return sum(int(re.findall(r"^Pss:\s+(\d+)", one, re.MULTILINE)[0]) for one in rollups) >> 10


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["pages", "seen"], choices=["pages", "seen", "wake", "idle"])
    parser.add_argument("--tickets", type=int, default=1_000_000, help="that have ended, for `pages`")
    parser.add_argument("--new", type=int, default=20_000, help="that an engine runs, for `seen`")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as directory:
        if "pages" in given.what:
            await pages(Path(directory), given.tickets)
        if "seen" in given.what:
            await seen(Path(directory), given.new, given.rounds)
        if "seen" in given.what or "wake" in given.what:
            await woken(Path(directory), 200, given.rounds)
        if "seen" in given.what or "idle" in given.what:
            await idle(Path(directory), 20)


if __name__ == "__main__":
    asyncio.run(main())
