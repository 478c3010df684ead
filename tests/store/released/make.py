"""Write the database of this version as SQL: ``python -m tests.store.released.make > tests/store/released/X.Y.Z.sql``.

Run once for each release that changes the tables, and never again for that version. It holds tickets in every state
that outlives an engine: done, failed, cancelled, ready, blocked, a workflow half-way, one that waits for an answer.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
from pathlib import Path

from swarm.model import Event
from swarm.store.store import Store
from tests.store import flows
from tests.store.databases import ECHO, RETRY, SqliteOutside, claim_one, failed, insert

APPROVAL = """
steps:
  - {id: build, agent: echo@1, inputs: {n: 1}}
  - {id: ask, needs: build, approval: {message: "Ship it?"}}
  - {id: ship, needs: ask, agent: echo@1, inputs: {built: "${steps.build.outputs.n}"}}
"""
FAN_OUT = """
steps:
  - {id: each, agent: echo@1, for_each: [1, 2, 3], inputs: {n: "${item}"}}
  - {id: sum, needs: each, agent: echo@1, inputs: {all: "${steps.each.outputs}"}}
"""
NIGHTLY = """
schedule: "0 3 * * *"
steps:
  - {id: only, agent: echo@1}
"""


async def fill(file: Path) -> None:
    url = f"sqlite:///{file}"
    async with Store.open(url) as store:
        await store.migrate()
        for agent in (ECHO, RETRY):
            await store.put_agent(agent)
        outside = SqliteOutside(url)
        insert(outside, "done", inputs='{"word": "hello"}')
        claim = await claim_one(store)
        await store.append(
            [
                Event(
                    ticket_id="done",
                    kind="output",
                    data={"stream": "stdout", "text": "hello"},
                    attempt_id=claim.attempt_id,
                )
            ]
        )
        await flows.finish(store, claim)
        insert(outside, "failed")
        claim = await claim_one(store)
        await store.finish(claim.attempt_id, failed(), timings={"agent": 12.5}, vm_time_ms=20.0)
        await flows.ticket(store, outside, APPROVAL, id="waiting")
        await flows.run(store)
        await flows.ticket(store, outside, FAN_OUT, id="half-way")
        (first, *_) = await flows.claims(store)
        await flows.finish(store, first)
        await flows.register(store, NIGHTLY, name="nightly")
        insert(outside, "cancelled")
        await store.cancel("cancelled", by="a person")
        insert(outside, "ready", agent_id=RETRY.id, priority=5)
        insert(outside, "blocked", state="blocked")
        outside.execute("INSERT INTO ticket_dependencies (ticket_id, depends_on) VALUES ('blocked', 'ready')")
        outside.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "swarm.db"
        asyncio.run(fill(file))
        connection = sqlite3.connect(file)
        for line in connection.iterdump():
            sys.stdout.write(f"{line}\n")
        connection.close()


if __name__ == "__main__":
    main()
