"""How long do lists and counts of tickets take with 10⁶ of them? `python -m tests.api.bench_pages [--write-docs]`.

The requests go through the real server, one after the other; each combination of filters is asked for 20 times, most of
them pages further on. Times are of the CPU, the client's 2 to 3 ms included, so that they don't depend on what else the
machine does. Nothing is asserted: figures are for people.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sqlite3
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx

from swarm.model import ECHO_AGENT_ID
from tests.api.served import ECHO, Served, serving

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- pages: made by `python -m tests.api.bench_pages --write-docs` -->\n", "<!-- pages end -->\n"
FILTERS = {
    "state": ("", "state=done", "state=failed&state=done&state=cancelled", "state=waiting", "state=ready",
              "state=ready&state=in_progress&state=failed", "state=draft"),
    "project": ("", "project=p3", "project=rare"),
    "agent": ("", "agent=echo", "agent=rare"),
    "text": ("", "text=report%2077", "text=nowhere"),
    "time": ("", "since=2025-06-01&before=2025-07-01"),
}  # fmt: skip
FILL = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :number)
INSERT INTO tickets (id, project_id, title, state, agent_id, execution_mode, inputs, outputs, error, created_at)
SELECT lower(hex(randomblob(16))), CASE WHEN i % 200000 = 7 THEN 'rare' ELSE 'p' || (i % 20) END,
  'Report ' || i || ' of the month, with a title as people write them',
  CASE WHEN i % 100 < 90 THEN 'done' WHEN i % 100 < 95 THEN 'failed' WHEN i % 100 < 98 THEN 'cancelled'
    WHEN i % 10000 = 98 THEN 'draft' WHEN i % 2000 = 99 THEN 'waiting' WHEN i % 1000 = 199 THEN 'in_progress'
    WHEN i % 5000 = 399 THEN 'blocked' ELSE 'ready' END,
  CASE WHEN i % 100000 = 5 THEN 'rare-agent' ELSE :agent END, 'agent', json_object('text', hex(randomblob(100))),
  CASE WHEN i % 100 < 90 THEN json_object('text', hex(randomblob(100))) END,
  CASE WHEN i % 100 BETWEEN 90 AND 94 THEN 'the agent ended with status 1: ' || hex(randomblob(40)) END,
  strftime('%Y-%m-%dT%H:%M:%fZ', 1735689600 + i * 31.5, 'unixepoch') FROM n
"""


def fill(served: Served, number: int) -> None:
    with sqlite3.connect(served.settings.data_dir / "swarm.db") as connection:
        connection.execute(FILL, {"number": number, "agent": ECHO_AGENT_ID})
    connection.close()


async def timed(client: httpx.AsyncClient, path: str, times: list[float]) -> httpx.Response:
    while True:
        began = time.process_time()
        answer = await client.get(path)
        took = (time.process_time() - began) * 1000
        if answer.status_code == 200:
            times.append(took)
            return answer
        assert answer.status_code == 429, answer.text  # faster than one token may ask
        await asyncio.sleep(1)


async def measure(client: httpx.AsyncClient, query: str) -> tuple[list[float], list[float]]:
    listed, counted = list[float](), list[float]()
    for _ in range(2):
        after = ""
        for _ in range(10):
            page = (await timed(client, f"/v1/tickets?{query}{after}", listed)).json()
            after = f"&after={page['after']}" if page["after"] else ""
    for _ in range(5):
        await timed(client, f"/v1/tickets/counts?{query}", counted)
    return listed, counted


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1] if len(times) > 1 else times[0]


async def main(number: int, *, write: bool) -> None:
    results = list[tuple[str, list[float], list[float]]]()
    with tempfile.TemporaryDirectory() as directory:
        async with serving(Path(directory) / "home") as served:
            await served.store.put_agent(replace(ECHO, id="rare-agent", name="rare"))
            await asyncio.to_thread(fill, served, number)
            for path in ("/v1/tickets", "/v1/tickets/counts"):
                await served.viewer.get(path)  # the first reads the file
            for parts in itertools.product(*FILTERS.values()):
                query = "&".join(part for part in parts if part)
                results.append((query or "none", *await measure(served.viewer, query)))
    results.sort(key=lambda one: max(p95(one[1]), p95(one[2])), reverse=True)
    lines = [f"{number:,} tickets, {len(results)} combinations of filters; ms of CPU, server and client.", ""]
    lines += ["| | p50 of all | p95 of all | worst p95 of one combination |", "|---|--:|--:|--:|"]
    pages, counts = [one[1] for one in results], [one[2] for one in results]
    for name, found in (("page of 50", pages), ("counts of all states", counts)):
        every = list(itertools.chain(*found))
        lines.append(f"| {name} | {statistics.median(every):.0f} | {p95(every):.0f} | {max(map(p95, found)):.0f} |")
    print("\n".join(lines))  # noqa: T201
    for query, listed, counted in results[:12]:
        print(f"{p95(listed):6.0f} {p95(counted):6.0f}  {query}")  # noqa: T201
    if write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tickets", type=int, default=1_000_000)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    asyncio.run(main(options.tickets, write=options.write_docs))
