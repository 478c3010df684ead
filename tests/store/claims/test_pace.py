"""Large tickets begin one by one, with small ones between them."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

from swarm.store.claims import pace
from swarm.store.sql.rows import milliseconds
from swarm.store.store import Store
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import LEASE, Outside, claim_one, insert


async def test_small_tickets_go_between_large_ones(store: Store, outside: Outside) -> None:
    """However many large ones there are, and whether they are refused; these keep their order."""
    long = json.dumps({"x": "y" * 3_000_000})
    insert(outside, "first")
    await claim_one(store)
    for number in range(3):
        insert(outside, f"long{number}", inputs=long, priority=9 - number)
    insert(outside, "bad", description=long)
    insert(outside, "small")
    began = list[str]()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(began) < 4:
            began += [claim.ticket.id for claim in await store.claim("w", limit=9, lease_seconds=LEASE)]
            due = await store.due()
            assert not due.ready or due.next_ms is not None  # an engine comes back for those that were put off
            await asyncio.sleep(0.005)
        while (bad := await store.ticket("bad")).state != "failed":
            await store.claim("w", lease_seconds=LEASE)
            await asyncio.sleep(0.005)
    assert "2,097,152" in str(bad.error)
    assert [id for id in began if id != "small"] == ["long0", "long1", "long2"]
    times = [milliseconds((await store.ticket(f"long{number}")).started_at) or 0 for number in range(3)]
    pause_ms = len(long) / pace.BYTES_PER_SECOND * 1000
    assert all(later - earlier > 0.9 * pause_ms for earlier, later in pairwise(times))
    assert times[0] <= (milliseconds((await store.ticket("small")).started_at) or 0)


async def test_without_small_ones_no_pause(store: Store, outside: Outside) -> None:
    for number in range(3):
        insert(outside, f"long{number}", inputs=json.dumps({"x": "y" * 12_000_000}), priority=9 - number)
    began = [(await claim_one(store)).ticket.id for _ in range(3)]
    assert began == ["long0", "long1", "long2"]
