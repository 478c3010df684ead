"""What workflows cost, for `tests.engine.bench`: names `chain` and `fan`. Figures are for people; nothing is asserted.

    chain        three steps, each using what the one before it left: commit of the ticket's INSERT → third step begun
    fan          fifty steps of one for_each at once, and the one that gathers: INSERT → the last of them begun, → done

Beside each, what is left of it without Swarm: as many durable transactions on the same file, with as many rows, by the
sqlite3 module alone. All records are written: runs, steps, attempts, events.
"""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from swarm.errors import NotFound
from swarm.store.store import Store
from swarm.workflow import validate
from swarm.workflow.definition import Workflow
from swarm.workflow.pinning import Registry
from tests.store.bench_queue import ECHO, out

Engines = Callable[[Path, int, int, list[dict[str, object]]], AbstractContextManager[object]]
CHAIN = """
name: chain
version: 1.0.0
steps:
  - {id: one, agent: echo}
  - {id: two, agent: echo, needs: one, inputs: {n: "${steps.one.outputs}"}}
  - {id: three, agent: echo, needs: two, inputs: {n: "${steps.two.outputs}"}}
"""
FAN = f"""
name: fan
version: 1.0.0
steps:
  - {{id: s, agent: echo, for_each: {list(range(50))}, inputs: {{n: "${{item}}"}}}}
  - {{id: last, agent: echo, needs: s}}
"""
# The transactions between the INSERT and the last start, and about as many rows as each of them writes. (The ends of
# fifty steps share a transaction: group commit.)
_ROWS = {"chain": (14, 8, 8, 8, 8), "fan": (170, 300, 60, 10)}


async def database(directory: Path, name: str, text: str) -> tuple[Path, str]:
    """A fresh one with this workflow; its id."""
    file = directory / f"{name}.db"
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        await store.put_agent(ECHO)
        checked = validate.checked(text, Registry(agent=lambda _: ECHO, workflow=no_workflow))
        return file, (await store.put_workflow(checked)).id


def no_workflow(reference: str) -> Workflow:
    raise NotFound(reference)


async def measure(directory: Path, engines: Engines, name: str, text: str, count: int) -> None:
    file, workflow = await database(directory, name, text)
    results: list[dict[str, object]] = []
    with engines(file, 1, 64, results):
        times = dict(submitted(file, workflow, count))
    asked = results[0]["asked"]
    assert isinstance(asked, dict)
    rows = sqlite3.connect(file)
    last = "three" if name == "chain" else "last"
    # The first ones prepare the workflow, which is done once in an engine's life.
    late = [(asked[f"{id_}/{last}"] - at) / 1e6 for id_, at in list(times.items())[3:]]
    floor = raw(directory, name)
    p50, p95 = statistics.median(late), sorted(late)[int(len(late) * 0.95)]
    what = "third step begun" if name == "chain" else "all 50 ended, the last begun"
    out(
        f"{name:<19} INSERT → {what}: p50 {p50:.2f} ms, p95 {p95:.2f} ms "
        f"(the bare transactions: {floor:.2f} ms, so × {p50 / floor:.1f})"
    )
    spent = rows.execute("SELECT count(*) FROM tickets WHERE state = 'done'").fetchone()[0]
    assert spent == count, "not all of them are done"
    rows.close()


def submitted(file: Path, workflow: str, count: int) -> Iterator[tuple[str, int]]:
    """One by one, each when the one before is done, at random moments; when each COMMIT was asked for."""
    random.seed(1)
    connection = sqlite3.connect(file, isolation_level=None, timeout=60)
    for number in range(count):
        id_ = f"flow-{number}"
        time.sleep(random.uniform(0.01, 0.03))
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT INTO tickets (id, state, execution_mode, workflow_id) VALUES (?, 'ready', 'workflow', ?)",
            (id_, workflow),
        )
        asked = time.monotonic_ns()
        connection.execute("COMMIT")
        yield id_, asked
        while connection.execute("SELECT state FROM tickets WHERE id = ?", (id_,)).fetchone()[0] != "done":
            time.sleep(0.002)
    connection.close()


def raw(directory: Path, name: str) -> float:
    """ms: the same number of transactions with as many rows, in WAL mode with synchronous=NORMAL; the median."""
    connection = sqlite3.connect(directory / f"raw-{name}.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("CREATE TABLE rows (id TEXT PRIMARY KEY, run TEXT, status TEXT, data TEXT)")
    connection.execute("CREATE INDEX rows_run ON rows (run)")
    times, number = [], 0
    for _ in range(50):
        began = time.perf_counter()
        for count in _ROWS[name]:
            connection.execute("BEGIN IMMEDIATE")
            for _ in range(count):
                number += 1
                values = (
                    f"{random.getrandbits(64):x}-{number}",
                    f"run-{number // 40}",
                    "running",
                    json.dumps({"n": 1}),
                )
                connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", values)
            connection.execute("COMMIT")
        times.append((time.perf_counter() - began) * 1e3)
    with contextlib.closing(connection):
        return statistics.median(times)
