"""Many engines on one PostgreSQL: `make simulate`, or `python -m tests.engine.simulate [PART …]`. For docs/scale.md.

    engines      1 to 50 engines with null agents: tickets a second, what they wait for, CPU, connections, bytes
    rows         10⁶ finished tickets: bytes of each table, claim, back-up, prune        (these: see simulate_parts)
    listeners    what a NOTIFY costs with so many that listen
    connections  the server's memory with so many connections

Each engine is a process and a host of its own, with its own three connections; all share this machine's cores with the
server, so rates say little of larger machines, and CPU seconds more. The server has Debian's settings, but more
connections; a commit is on the disk before it is told. Nothing is asserted: figures are for people.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import psycopg
import structlog

from swarm.base import privileges
from swarm.model import ECHO_AGENT_ID
from tests.engine import bench, simulate_parts
from tests.engine.bench_postgresql import AS_IT_IS, enqueue
from tests.engine.server_use import Activity, ServerUse, sampled
from tests.store.bench_queue import out
from tests.store.databases import Outside, PostgresBackend

PAGE: Final = Path(__file__).parents[2] / "docs" / "scale.md"
PARTS: Final = ("engines", "rows", "listeners", "connections")
ENGINES: Final = "1,2,4,8,16,32,50"
# Debian's, in place of the tests' own.
SERVER: Final = AS_IT_IS | {"shared_buffers": "128MB", "max_wal_size": "1GB", "checkpoint_timeout": "5min"}
SERVER_CONNECTIONS: Final = "600"
_LOOK_SECONDS: Final = 0.05
_INSERT: Final = "INSERT INTO tickets (id, title, state, agent_id) VALUES (?, 'paced', 'ready', ?)"
_UNFINISHED: Final = "SELECT EXISTS (SELECT 1 FROM tickets WHERE state IN ('ready', 'in_progress'))"
_SO_FAR: Final = "SELECT pg_current_wal_lsn() - CAST('0/0' AS pg_lsn), pg_database_size(current_database())"


_FLAT_OUT: Final = """\
Flat out, from one INSERT of all tickets to the last one done. CPU of one ticket: of PostgreSQL and of the engines.
Backends, on average: that run, wait for a lock, wait for the log, are idle in a transaction. WAL, and growth of the
tables and indexes, for each ticket.

| engines | tickets | a second | CPU, ms | backends | refused, deadlocks | WAL, table bytes | connections | load |
|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""
_ONE_BY_ONE: Final = """
Tickets one by one, {:g} a second: from the COMMIT to the claim, p50 and p95; CPU of one ticket, and while nothing
happens, of PostgreSQL and of the engines.

| engines | COMMIT → claim, ms | CPU, ms | idle, of a core | memory of PostgreSQL |
|--:|--:|--:|--:|--:|"""


@contextlib.contextmanager
def forked(url: str, count: int, max_vms: int, results: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Engines like `bench.engines`, as forks of this process: each would need a second of CPU to import what it needs.
    No thread runs beside this."""
    pipes, pids = [os.pipe() for _ in range(count)], list[int]()
    try:
        for _, told in pipes:
            pids.append(os.fork())
            if pids[-1] == 0:
                _serve(url, max_vms, told)
        with contextlib.ExitStack() as stack:
            said = [stack.enter_context(os.fdopen(os.dup(read))) for read, _ in pipes]
            for one in said:
                one.readline()
            yield pids
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            results += [json.loads(one.readline()) for one in said]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for end in itertools.chain(*pipes):
            os.close(end)


def _serve(url: str, max_vms: int, told: int) -> NoReturn:
    try:
        privileges.die_with_parent()
        asyncio.run(bench.serve(url, max_vms, say=lambda line: os.write(told, f"{line}\n".encode())))
    finally:
        os._exit(0)  # nothing of the parent's is closed


@dataclass(kw_only=True)
class Used:
    """In one phase. ``server`` and ``engines``: CPU seconds."""

    tickets: int
    seconds: float
    server: float
    engines: float
    wal_bytes: float
    grown_bytes: float


@contextlib.contextmanager
def phase(outside: Outside, server: ServerUse, pids: list[int], tickets: int) -> Iterator[Used]:
    def so_far() -> tuple[float, ...]:
        [(wal, size)] = outside.execute(_SO_FAR)
        return time.perf_counter(), server.cpu(), sum(map(bench.cpu_seconds, pids)), float(wal), size

    used = Used(tickets=tickets, seconds=0.0, server=0.0, engines=0.0, wal_bytes=0, grown_bytes=0)
    before = so_far()
    yield used
    used.seconds, used.server, used.engines, used.wal_bytes, used.grown_bytes = (
        after - first for after, first in zip(so_far(), before, strict=True)
    )


def wait_until_done(outside: Outside) -> None:
    while outside.execute(_UNFINISHED)[0][0]:
        time.sleep(_LOOK_SECONDS)


@dataclass(kw_only=True)
class Found:
    """With one number of engines, in three phases."""

    engines: int
    idle: Used
    paced: Used
    full: Used
    late: list[float]  # ms, sorted: from the COMMIT's being asked for to the claim
    activity: Activity
    repeated: int
    deadlocks: int
    server_mb: float
    load: float


def run(backend: PostgresBackend, engines: int, given: argparse.Namespace) -> Found:
    tickets, paced, per_second = given.tickets, given.paced, given.per_second
    url, server = backend.new(), ServerUse(backend)
    outside, results, times = backend.outside(url), list[dict[str, Any]](), dict[str, int]()
    with forked(url, engines, given.max_vms, results) as pids:
        with phase(outside, server, pids, 0) as idle:
            time.sleep(given.idle)
        with phase(outside, server, pids, paced) as slowly:
            began = time.monotonic()
            for number in range(paced):
                time.sleep(max(0.0, began + number / per_second - time.monotonic()))
                times[f"paced-{number}"] = time.monotonic_ns()
                outside.execute(_INSERT, (f"paced-{number}", ECHO_AGENT_ID))
            wait_until_done(outside)
        with sampled(url) as activity, phase(outside, server, pids, tickets) as full:
            enqueue(outside, "new", tickets)
            wait_until_done(outside)
        memory = server.memory_mb()
    asked = {name: at for one in results for name, at in one["asked"].items()}
    stats = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    [(deadlocks,)] = outside.execute(stats)
    [(missing,)] = outside.execute("SELECT count(*) FROM tickets WHERE state <> 'done'")
    if missing:
        raise RuntimeError(f"{missing} tickets are not done")
    outside.close()
    return Found(
        engines=engines, idle=idle, paced=slowly, full=full, activity=activity,
        late=sorted((asked[name] - at) / 1e6 for name, at in times.items()),
        repeated=sum(one["store"][thread]["repeated"] for one in results for thread in ("write", "read")),
        deadlocks=deadlocks, server_mb=memory, load=os.getloadavg()[0],
    )  # fmt: skip


def tables(found: list[Found], per_second: float) -> Iterator[str]:
    yield _FLAT_OUT
    for one in found:
        full, seen = one.full, one.activity
        each = full.tickets
        waits = seen.mean("Lock"), seen.mean("LWLock") + seen.mean("IO")
        yield (
            f"| {one.engines} | {each:,} | {each / full.seconds:,.0f} "
            f"| {full.server / each * 1e3:.2f}, {full.engines / each * 1e3:.2f} "
            f"| {seen.mean('running'):.1f}, {waits[0]:.1f}, {waits[1]:.1f}, {seen.mean('idle in transaction'):.1f} "
            f"| {one.repeated:.0f}, {one.deadlocks} | {full.wal_bytes / each:,.0f}, {full.grown_bytes / each:,.0f} "
            f"| {seen.most} | {one.load:.1f} |"
        )
    yield _ONE_BY_ONE.format(per_second)
    for one in found:
        p50, p95 = (one.late[int(len(one.late) * share)] for share in (0.5, 0.95))
        server, engines = (value / one.paced.tickets * 1e3 for value in (one.paced.server, one.paced.engines))
        idle = one.idle.server / one.idle.seconds, one.idle.engines / one.idle.seconds
        yield (
            f"| {one.engines} | {p50:.1f}, {p95:.1f} | {server:.1f}, {engines:.1f} "
            f"| {idle[0]:.1%}, {idle[1]:.1%} | {one.server_mb:,.0f} MB |"
        )


def counts(text: str) -> list[int]:
    return [int(count) for count in text.split(",")]


def measure_engines(backend: PostgresBackend, options: argparse.Namespace) -> list[str]:
    found = list[Found]()
    for count in counts(options.engines):
        found.append(run(backend, count, options))
        out(f"{count} engines: {found[-1].activity.seen.most_common(8)}")
        lines = list(tables(found[-1:], options.per_second))
        out(f"{lines[1]}\n{lines[-1]}")
    return list(tables(found, options.per_second))


def write_docs(part: str, lines: list[str]) -> None:
    begin, end = f"<!-- {part}: made by `make simulate` -->\n", f"<!-- {part} ends -->"
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, ends, after = rest.partition(end)
    if not found or not ends:
        raise SystemExit(f"{PAGE} lacks the marks of {part}")
    PAGE.write_text(before + begin + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", default=["engines"], help=", ".join(PARTS))
    parser.add_argument("--engines", default=ENGINES, metavar="N,N,…")
    parser.add_argument("--tickets", type=int, default=14_000, help="flat out, for each number of engines")
    parser.add_argument("--paced", type=int, default=40, help="tickets one by one, for each number of engines")
    parser.add_argument("--per-second", type=float, default=2.0, help="of these")
    parser.add_argument("--max-vms", type=int, default=16, help="of an engine")
    parser.add_argument("--finished", type=int, default=1_000_000, help="tickets, for `rows`")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds in which nothing happens")
    parser.add_argument("--listeners", default="1,50,200,500", metavar="N,N,…")
    parser.add_argument("--stores", default="1,34,100,166", metavar="N,N,…", help="of three connections each")
    parser.add_argument("--write-docs", action="store_true", help="write the tables into docs/scale.md")
    options = parser.parse_args(argv)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    with tempfile.TemporaryDirectory() as name:
        backend = PostgresBackend(Path(name), **SERVER, max_connections=SERVER_CONNECTIONS)
        try:
            for part in options.parts:
                about = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before, PostgreSQL {version(backend)}."
                if part == "engines":
                    lines = measure_engines(backend, options)
                elif part == "rows":
                    lines = list(simulate_parts.measure_rows(backend, Path(name), options.finished))
                elif part == "listeners":
                    lines = list(simulate_parts.measure_listeners(backend, counts(options.listeners)))
                else:
                    lines = list(simulate_parts.measure_connections(backend, counts(options.stores)))
                out("\n".join([about, "", *lines]))
                if options.write_docs:
                    write_docs(part, [about, "", *lines])
        finally:
            backend.close()


def version(backend: PostgresBackend) -> str:
    with psycopg.connect(backend.server.url()) as connection:
        return str(connection.info.server_version // 10000)


if __name__ == "__main__":
    main(sys.argv[1:])
