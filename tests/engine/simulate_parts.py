"""The parts of `tests.engine.simulate` that need no engines: many finished tickets, listeners, connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg

from swarm.model import ECHO_AGENT_ID, Succeeded
from swarm.store.sql import backup
from swarm.store.store import Store
from tests.engine import bench
from tests.engine.server_use import ServerUse
from tests.store.bench_queue import out
from tests.store.databases import LEASE, Outside, PostgresBackend

# A finished ticket's rows again, as of other tickets that ended one after the other up to now: their ids, random or in
# the order of time, and times.
_TABLES = ("tickets", "workflow_runs", "step_executions", "attempts", "events")
_COLUMNS = """SELECT column_name, data_type FROM information_schema.columns
WHERE table_schema = current_schema() AND table_name = ? AND NOT (table_name = 'events' AND column_name = 'seq')"""
_RANDOM = {("tickets", "id"), ("workflow_runs", "ticket_id"), ("events", "ticket_id")}
_IN_ORDER = {"id", "run_id", "step_execution_id", "attempt_id"}
_AT_ONCE = 50_000
_APART_MS = 10
_SIZES = """SELECT relname, pg_table_size(oid), pg_indexes_size(oid) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname = ANY(?)"""
_AGE = """SELECT CAST(extract(epoch FROM clock_timestamp() - CAST(at AS timestamptz)) AS double precision)
FROM events WHERE seq >= (SELECT max(seq) / 10 FROM events) ORDER BY seq LIMIT 1"""  # a tenth is older
_CLAIMS = 200


def _other(table: str, column: str, type_: str, count: int) -> str:
    if (table, column) in _RANDOM:
        return f"md5({column} || i)"
    if column in _IN_ORDER:
        return f"lpad(to_hex(i), 8, '0') || substr({column}, 9)"
    if type_ == "text" and f"_{column}".endswith("_at"):
        moment = f"CAST({column} AS timestamptz) - ({count} - i) * interval '{_APART_MS} ms'"
        return f"""to_char({moment}, 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')"""
    return column


def multiply(outside: Outside, count: int) -> None:
    """The one finished ticket, so many times more."""
    outside.execute("SET session_replication_role = replica")  # no triggers
    for table in _TABLES:
        columns = outside.execute(_COLUMNS, (table,))
        names = ", ".join(name for name, _ in columns)
        others = ", ".join(_other(table, name, type_, count) for name, type_ in columns)
        outside.execute(f"CREATE TEMP TABLE one_{table} AS SELECT * FROM {table}")
        for first in range(1, count + 1, _AT_ONCE):
            some = f"generate_series({first}, {min(first + _AT_ONCE - 1, count)}) AS n(i)"
            outside.execute(f"INSERT INTO {table} ({names}) SELECT {others} FROM {some}, one_{table} ORDER BY i")
    first_of_all = "UPDATE events SET at = '2020-01-01T00:00:00.000Z' WHERE ticket_id = (SELECT id FROM one_tickets)"
    outside.execute(first_of_all)
    outside.execute("SET session_replication_role = origin")


async def _claims(urls: list[str]) -> list[float]:
    """The median of a claim in each database, ms: in turn."""
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(Store.open(url)) for url in urls]
        times: list[list[float]] = [[] for _ in urls]
        for _ in range(_CLAIMS):
            for store, took in zip(stores, times, strict=True):
                began = time.perf_counter()
                [claim] = await store.claim("bench", lease_seconds=LEASE)
                took.append((time.perf_counter() - began) * 1e3)
                await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
        return [statistics.median(took) for took in times]


async def _pruned(url: str, older_than_seconds: float) -> int:
    async with Store.open(url) as store:
        return await store.prune(older_than_seconds)


def measure_rows(backend: PostgresBackend, directory: Path, finished: int) -> Iterator[str]:
    insert = "INSERT INTO tickets (title, state, agent_id) SELECT 'a title of some words', 'ready', ? FROM n"
    insert = insert.replace("FROM n", "FROM generate_series(1, ?)")
    urls = [backend.new(), backend.new()]
    outsides = [backend.outside(url) for url in urls]
    with bench.engines(urls[1], 1, 4, []):
        outsides[1].execute(insert, (ECHO_AGENT_ID, 1))
        while not outsides[1].execute("SELECT FROM tickets WHERE state = 'done'"):
            time.sleep(0.02)
    multiply(outsides[1], finished - 1)
    outsides[1].execute("VACUUM (ANALYZE, FREEZE)")
    sizes = {name: (table, indexes) for name, table, indexes in outsides[1].execute(_SIZES, (list(_TABLES),))}
    yield f"{finished:,} finished tickets of one step that print nothing. Bytes of one:\n"
    yield f"| | {' | '.join(_TABLES)} | in all |"
    yield f"|---|{'--:|' * (len(_TABLES) + 1)}"
    for what, number in (("table", 0), ("indexes", 1)):
        each = [sizes[name][number] / finished for name in _TABLES]
        yield f"| {what} | {' | '.join(f'{size:,.0f}' for size in each)} | {sum(each):,.0f} |"
    for outside in outsides:
        outside.execute(insert, (ECHO_AGENT_ID, _CLAIMS + 10))
    empty, full = asyncio.run(_claims(urls))
    size = outsides[1].execute("SELECT pg_database_size(current_database())")[0][0] / 1e6
    began = time.perf_counter()
    asyncio.run(backup.dump(urls[1], directory / "dump"))
    dumped, dump_mb = time.perf_counter() - began, (directory / "dump").stat().st_size / 1e6
    other = backend.empty()
    began = time.perf_counter()
    asyncio.run(backup.put_dump_back(other, directory / "dump"))
    restored = time.perf_counter() - began
    [(age,)] = outsides[1].execute(_AGE)
    began = time.perf_counter()
    removed = asyncio.run(_pruned(urls[1], age))
    pruned = time.perf_counter() - began
    began = time.perf_counter()
    outsides[1].execute("VACUUM events")
    vacuumed = time.perf_counter() - began
    for outside in outsides:
        outside.close()
    yield "\n| what | took | |"
    yield "|---|--:|---|"
    yield f"| a claim, p50 | {full:.2f} ms | with none finished {empty:.2f} ms: × {full / empty:.2f} |"
    of_it = f"{size:,.0f} MB, {size / dumped:,.0f} MB/s; {dump_mb:,.0f} MB written"
    yield f"| `swarm db backup` | {dumped:.1f} s | {of_it} |"
    yield f"| `swarm db restore` | {restored:.1f} s | {size / restored:,.0f} MB/s |"
    yield f"| `swarm prune` | {pruned:.1f} s | {removed:,} events, {removed / pruned:,.0f} a second |"
    yield f"| `VACUUM events` after it | {vacuumed:.1f} s | |"
    yield f"\nLoad {os.getloadavg()[0]:.1f} at the end."


# --- listeners --------------------------------------------------------------------------------------------------------


def listen(url: str, count: int) -> None:
    """In a process of its own: when the last of them had each notice, by its number."""
    selector, got, last = selectors.DefaultSelector(), Counter[str](), dict[str, int]()
    for _ in range(count):
        connection = psycopg.connect(url, autocommit=True)
        connection.execute("LISTEN swarm")
        selector.register(connection.pgconn.socket, selectors.EVENT_READ, connection)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    out("ready")
    while True:
        for key, _ in selector.select():
            if key.data is None:
                out(json.dumps(last))
                return
            server = key.data.pgconn
            server.consume_input()
            while (notice := server.notifies()) is not None:
                number = notice.extra.decode()
                got[number] += 1
                if got[number] == count:
                    last[number] = time.monotonic_ns()


def measure_listeners(backend: PostgresBackend, counts: Sequence[int]) -> Iterator[str]:
    yield "One NOTIFY at a time, 20 a second; then as many as one connection can:\n"
    yield "| listening connections | COMMIT, p50 | until the last one has it, p50 | CPU of the server | a second |"
    yield "|--:|--:|--:|--:|--:|"
    for count in counts:
        url, server, notices = backend.empty(), ServerUse(backend), 100
        argv = [sys.executable, "-m", "tests.engine.simulate_parts", url, str(count)]
        with (
            subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as listening,
            psycopg.connect(url, autocommit=True) as connection,
        ):
            assert listening.stdout is not None
            listening.stdout.readline()
            sent, took, before = dict[str, int](), list[float](), server.cpu()
            for number in range(notices):
                time.sleep(0.05)
                sent[str(number)] = time.monotonic_ns()
                connection.execute("SELECT pg_notify('swarm', %s)", (str(number),))
                took.append((time.monotonic_ns() - sent[str(number)]) / 1e6)
            cpu = (server.cpu() - before) / notices * 1e3
            began = time.perf_counter()
            for _ in range(500):
                connection.execute("SELECT pg_notify('swarm', 'more')")
            rate = 500 / (time.perf_counter() - began)
            last = json.loads(listening.communicate()[0].splitlines()[-1])
        late = statistics.median((last[name] - at) / 1e6 for name, at in sent.items() if name in last)
        yield f"| {count} | {statistics.median(took):.2f} ms | {late:.1f} ms | {cpu:.2f} ms | {rate:,.0f} |"
    yield f"\nLoad {os.getloadavg()[0]:.1f} at the end."


# --- connections ------------------------------------------------------------------------------------------------------


async def _connections(backend: PostgresBackend, counts: Sequence[int]) -> list[tuple[int, float, float]]:
    """How many there are, and the server's memory: with that of the connections' first use, and after more work."""
    url, server, found = backend.new(), ServerUse(backend), list[tuple[int, float, float]]()
    outside = backend.outside(url)
    async with contextlib.AsyncExitStack() as stack:
        stores = list[Store]()
        for count in counts:
            while len(stores) < count:
                store = await stack.enter_async_context(Store.open(url))
                await stack.enter_async_context(store.watching())
                await store.due()
                await store.claim("bench", lease_seconds=LEASE)
                stores.append(store)
            first = server.memory_mb()
            for store in stores:
                outside.execute(
                    "INSERT INTO tickets (title, state, agent_id) SELECT 'x', 'ready', ? FROM generate_series(1, 4)",
                    (ECHO_AGENT_ID,),
                )
                for claim in await store.claim("bench", limit=4, lease_seconds=LEASE):
                    await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
            found.append((3 * count, first, server.memory_mb()))
    outside.close()
    return found


def measure_connections(backend: PostgresBackend, counts: Sequence[int]) -> Iterator[str]:
    yield "The server's memory (PSS) with the three connections of each of so many engines:\n"
    yield "| engines | connections | idle since their first claim | each has run four tickets | of that, a connection |"
    yield "|--:|--:|--:|--:|--:|"
    base, _, smallest = (found := asyncio.run(_connections(backend, counts)))[0]
    for engines, (count, first, used) in zip(counts, found, strict=True):
        each = f"{(used - smallest) / (count - base):.1f} MB" if count > base else ""
        yield f"| {engines} | {count} | {first:,.0f} MB | {used:,.0f} MB | {each} |"
    yield f"\nLoad {os.getloadavg()[0]:.1f} at the end."


if __name__ == "__main__":
    listen(sys.argv[1], int(sys.argv[2]))
