"""PostgreSQL numbers events before they are committed: whoever follows them misses none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from swarm.model import Event
from swarm.store.store import Store
from swarm.store.tickets.settled import PATIENCE_SECONDS

pytestmark = [pytest.mark.needs("postgres"), pytest.mark.slow]  # starts a server

Other = psycopg.AsyncConnection[tuple[object, ...]]
WRITE = "INSERT INTO events (ticket_id, kind, data) VALUES ('t', 'output', '{\"text\": \"first\"}')"


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[Store]:
    async with Store.open(postgresql_url) as store:
        yield store


@pytest.fixture
async def other(postgresql_url: str) -> AsyncIterator[Other]:
    async with await psycopg.AsyncConnection.connect(postgresql_url, autocommit=True) as other:
        await other.execute("INSERT INTO tickets (id, title) VALUES ('t', 't')")
        yield other


async def texts(store: Store, after: int = 0) -> list[object]:
    return [event.data["text"] for event in await store.events("t", after=after)]


async def second(store: Store) -> None:
    await store.append([Event(ticket_id="t", kind="output", data={"text": "second"})])


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_an_earlier_one_that_is_committed_later(store: Store, other: Other, end: str) -> None:
    await other.execute("BEGIN")
    await other.execute(WRITE)
    await second(store)
    reads: list[asyncio.Task[Any]] = [
        asyncio.create_task(read)
        for read in (
            texts(store),
            store.newest_event(),
            store.last_event("t"),
            store.all_events(after=0, limit=10),
            store.tickets_with_events(0, limit=10),
            store.facts(after=0, limit=10),
        )
    ]
    done, _ = await asyncio.wait(reads, timeout=0.3)  # time enough to be wrong
    assert not done
    await other.execute(end)
    found, newest, last, (every, after), (upto, _), facts = await asyncio.gather(*reads)
    assert found == (["first", "second"] if end == "COMMIT" else ["second"])
    assert [event.data["text"] for event in every] == found
    assert {newest, last, after, upto, facts.after} == {2}


async def test_a_long_transaction_of_somebody_else(store: Store, other: Other) -> None:
    """It wrote no event."""
    await other.execute("CREATE TABLE theirs (x INTEGER)")
    await other.execute("BEGIN")
    await other.execute("INSERT INTO theirs VALUES (1)")
    await second(store)
    assert await texts(store) == ["second"]
    await other.execute("ROLLBACK")


async def test_one_that_never_ends(store: Store, other: Other) -> None:
    await other.execute("BEGIN")
    await other.execute(WRITE)
    await second(store)
    assert await texts(store) == ["second"]  # after some seconds
    async with asyncio.timeout(9 * PATIENCE_SECONDS):
        for _ in range(10):  # but only once
            assert await texts(store) == ["second"]
    await other.execute("ROLLBACK")
