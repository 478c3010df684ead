"""Another process that uses the database, for tests that need a real one: `python -m tests.store.program WHAT URL …`.

It prints 'ready', waits for a line on stdin, does its job, and prints the result as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from swarm.base import crash_points
from swarm.base.log import configure
from swarm.errors import SwarmError
from swarm.model import Succeeded, Ticket
from swarm.store.store import Store
from swarm.triggers.schedules import Scheduler
from tests.cel.local import Local


def gate() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


async def migrate(url: str) -> Any:
    gate()
    async with Store.open(url) as store:
        await store.migrate()
        return await store.revision()


async def work(url: str, name: str) -> Any:
    """Claim and finish until nothing is left. Returns the ids of the tickets."""
    done = []
    async with Store.open(url) as store:
        gate()
        while claims := await store.claim(name, limit=3, lease_seconds=60):
            finishes = (
                store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1) for claim in claims
            )
            await asyncio.gather(*finishes)
            done += [claim.ticket.id for claim in claims]
    return done


async def hold_lock(url: str) -> Any:
    """Hold the write lock from before 'ready' until the line on stdin."""
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=60)
    connection.execute("BEGIN IMMEDIATE")
    gate()
    connection.execute("ROLLBACK")
    connection.close()
    return None


async def fill(url: str, title: str) -> Any:
    """Add tickets until the disk is full."""
    gate()
    async with Store.open(url) as store:
        await store.migrate()
        added = 0
        try:
            while added < 10_000:
                await store.add_ticket(Ticket(id=f"t{added}", title="t", description=title * 1000, state="draft"))
                added += 1
        except SwarmError as error:
            return {"added": added, "error": str(error), "there": len(await store.tickets(limit=10_000))}
    return {"added": added}


async def starve(url: str) -> Any:
    """Claim and add with less and less memory for SQLite, which can be lowered but never raised. Counts the answers."""
    answers: dict[str, int] = {}
    with contextlib.closing(sqlite3.connect(":memory:")) as any_connection:
        async with Store.open(url) as store:
            gate()
            for limit in range(4_000_000, 200_000, -20_000):
                try:
                    any_connection.execute(f"PRAGMA hard_heap_limit = {limit}")
                except MemoryError:  # not even enough for that
                    break
                big = Ticket(id=f"t{limit}", title="t", description="x" * 500_000, state="draft")
                for request in (store.add_ticket(big), store.ticket("big1"), store.claim("w", lease_seconds=60)):
                    try:
                        await request
                        answer = "served"
                    except Exception as error:
                        answer = f"{type(error).__name__}: {error}"
                    answers[answer] = answers.get(answer, 0) + 1
    return answers


async def fire(url: str, rounds: str, point: str = "") -> Any:
    """Run due schedules for this many rounds; die at a crash point."""
    configure()
    if point:
        crash_points.arm(point)
    async with Store.open(url) as store:
        gate()
        scheduler = Scheduler(store=store, evaluator=Local())
        for _ in range(int(rounds)):
            await scheduler.fire()
        return None


WHAT: dict[str, Callable[..., Awaitable[Any]]] = {
    "migrate": migrate,
    "work": work,
    "hold-lock": hold_lock,
    "fill": fill,
    "starve": starve,
    "fire": fire,
}


async def main(what: str, *arguments: str) -> Any:
    return await WHAT[what](*arguments)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(main(*sys.argv[1:]))) + "\n")
