"""The speed of the queue, with and without history: `python -m tests.store.bench_queue [--tickets N] [--finished N …]`.

Prints claims + finishes per second of one process (every transition durable and recorded), and the time of one claim
and one finish with a history of finished tickets in the file. Nothing is asserted: the figures are for people.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path

from swarm.model import ECHO_AGENT_ID, Agent, Claim, Succeeded
from swarm.store.store import Store

ECHO = Agent(id=ECHO_AGENT_ID, name="echo", version="1.0.0", path=Path("/nowhere"), entry=("main.py",))
HISTORY = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
INSERT INTO {table} SELECT {columns} FROM n
"""

ROWS = {  # of finished tickets, with all rows of a run
    "tickets (id, title, state, agent_id, run_id, outputs)": (
        f"'old-' || i, 'old', 'done', '{ECHO_AGENT_ID}', 'run-' || i, '{{}}'"
    ),
    "workflow_runs (id, ticket_id, status)": "'run-' || i, 'old-' || i, 'completed'",
    "step_executions (id, run_id, step_id, status, attempt_id)": (
        "'step-' || i, 'run-' || i, 'main', 'completed', 'attempt-' || i"
    ),
    "attempts (id, step_execution_id, number, worker, lease_until, outcome)": (
        "'attempt-' || i, 'step-' || i, 1, 'w', 1000, 'succeeded'"
    ),
    "events (ticket_id, kind, data)": "'old-' || i, 'transition', '{}'",
}


def out(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def insert(file: Path, prefix: str, count: int) -> None:
    """Like an outside program."""
    with sqlite3.connect(file) as connection:
        connection.executemany(
            "INSERT INTO tickets (id, title, state, agent_id) VALUES (?, 'null', 'ready', ?)",
            [(f"{prefix}-{number}", ECHO_AGENT_ID) for number in range(count)],
        )
    connection.close()


def insert_history(file: Path, count: int) -> None:
    """Generated inside the database."""
    with sqlite3.connect(file) as connection:
        for table, columns in ROWS.items():
            connection.execute(HISTORY.format(table=table, columns=columns, count=count))
    connection.close()


async def drain(store: Store, worker: str, limit: int) -> int:
    """Claim and finish until nothing is left; finishes overlap with the next claim."""
    done, finishing = 0, set[asyncio.Task[None]]()

    async def finish(claim: Claim) -> None:
        await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={"agent": 0.1}, vm_time_ms=0.1)

    while claims := await store.claim(worker, limit=limit, lease_seconds=30):
        done += len(claims)
        if finishing:
            await asyncio.wait(finishing)
        finishing = {asyncio.create_task(finish(claim)) for claim in claims}
    await asyncio.gather(*finishing)
    return done


async def throughput(tickets: int, limit: int, directory: Path) -> None:
    file = directory / f"throughput-{limit}.db"
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        await store.put_agent(ECHO)
        insert(file, "new", tickets)
        began, cpu = time.perf_counter(), time.process_time()
        done = await drain(store, "bench", limit)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        out(
            f"claim({limit}) + finish: {done} tickets in {seconds:.2f} s: {done / seconds:,.0f}/s, "
            f"{cpu / done * 1e6:.0f} µs CPU each"
        )


async def flatness(finished: int, directory: Path) -> None:
    file = directory / f"flat-{finished}.db"
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        await store.put_agent(ECHO)
        if finished:
            insert_history(file, finished)
        insert(file, "new", 600)
        claiming, finishing, idle = [], [], []
        for number in range(600):
            began = time.perf_counter()
            (claim,) = await store.claim("bench", lease_seconds=30)
            claimed = time.perf_counter()
            await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
            if number >= 100:
                claiming.append(claimed - began)
                finishing.append(time.perf_counter() - claimed)
        for _ in range(200):
            began = time.perf_counter()
            await store.claim("bench", lease_seconds=30)
            idle.append(time.perf_counter() - began)
        figures = [f"{statistics.median(times) * 1e3:.2f}" for times in (claiming, finishing, idle)]
        out(
            f"{finished:>9,} finished tickets: claim {figures[0]} ms, finish {figures[1]} ms, "
            f"empty claim {figures[2]} ms"
        )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tickets", type=int, default=5000)
    parser.add_argument("--limits", type=int, nargs="*", default=[1, 10, 32, 50])
    parser.add_argument("--finished", type=int, nargs="*", default=[0, 100_000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for limit in options.limits:
            await throughput(options.tickets, limit, Path(name))
        for finished in options.finished:
            await flatness(finished, Path(name))


if __name__ == "__main__":
    asyncio.run(main())
