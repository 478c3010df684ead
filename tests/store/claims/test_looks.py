"""Large inputs are looked at before their ticket is claimed, while others go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from swarm.store.store import Store
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import LEASE, Outside, insert

LARGE = json.dumps({"x": "y" * 3_000_000})


class Looker:
    """Says ``fault`` of all inputs, once ``may_answer``."""

    def __init__(self, fault: str | None = None) -> None:
        self.fault = fault
        self.asked = list[str]()
        self.begun, self.may_answer, self.answered = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.may_answer.set()

    async def __call__(self, inputs: str) -> str | None:
        self.asked.append(inputs)
        self.begun.set()
        await self.may_answer.wait()
        self.answered.set()
        return self.fault


async def claimed(store: Store) -> list[str]:
    return [claim.ticket.id for claim in await store.claim("w", limit=9, lease_seconds=LEASE)]


async def until_claimed(store: Store, id: str) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while id not in await claimed(store):
            pass


async def until_failed(store: Store, id: str) -> str:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (ticket := await store.ticket(id)).state != "failed":
            assert await claimed(store) == []
    return str(ticket.error)


async def test_refused_ones_never_begin(store: Store, outside: Outside) -> None:
    look = Looker("inputs are bad: set others")
    insert(outside, "t", inputs=LARGE)
    async with store.looking_by(look):
        assert await until_failed(store, "t") == "inputs are bad: set others"
    assert look.asked == [LARGE]
    assert outside.execute("SELECT count(*) FROM workflow_runs") == [(0,)]
    assert [event.data.get("to") for event in await store.events("t")] == ["failed"]


async def test_others_are_claimed_whole_after_one_look(store: Store, outside: Outside) -> None:
    look = Looker()
    insert(outside, "t", inputs=LARGE)
    async with store.looking_by(look), asyncio.timeout(PATIENCE_SECONDS):
        assert await claimed(store) == []
        await look.answered.wait()
        [claim] = await store.claim("w", lease_seconds=LEASE)
    assert (claim.inputs, look.asked) == (LARGE, [LARGE])


async def test_small_ones_go_on_meanwhile(store: Store, outside: Outside) -> None:
    look = Looker()
    look.may_answer.clear()
    insert(outside, "large", inputs=LARGE, priority=9)
    async with store.looking_by(look):
        for number in range(5):
            insert(outside, f"small{number}")
            assert await claimed(store) == [f"small{number}"]
        await look.begun.wait()
        look.may_answer.set()
        await until_claimed(store, "large")
    assert len(look.asked) == 1


def changed(outside: Outside) -> None:
    outside.execute("UPDATE tickets SET inputs = replace(inputs, 'y', 'z') WHERE id = 't'")


def withdrawn(outside: Outside) -> None:
    outside.execute("UPDATE tickets SET state = 'cancelled' WHERE id = 't'")


def deleted(outside: Outside) -> None:
    outside.execute("DELETE FROM tickets WHERE id = 't'")


@pytest.mark.parametrize("change", [changed, withdrawn, deleted])
async def test_what_was_changed_since_the_look_is_not_judged_by_it(
    store: Store, outside: Outside, change: Callable[[Outside], None]
) -> None:
    look = Looker("inputs are bad")
    look.may_answer.clear()
    insert(outside, "t", inputs=LARGE)
    async with store.looking_by(look), asyncio.timeout(PATIENCE_SECONDS):
        assert await claimed(store) == []
        await look.begun.wait()
        change(outside)
        look.may_answer.set()
        await look.answered.wait()
        if change is changed:
            await until_claimed(store, "t")
        else:
            insert(outside, "next")
            assert await claimed(store) == ["next"]
    assert outside.execute("SELECT state FROM tickets WHERE state = 'failed'") == []


async def test_a_look_that_fails_or_ends_early_keeps_no_ticket(store: Store, outside: Outside) -> None:
    async def fails(inputs: str) -> str | None:
        raise OSError("no process can be started")

    insert(outside, "t", inputs=LARGE)
    async with store.looking_by(fails):
        await until_claimed(store, "t")
    look = Looker("inputs are bad")
    look.may_answer.clear()
    insert(outside, "next", inputs=LARGE)
    async with store.looking_by(look), asyncio.timeout(PATIENCE_SECONDS):
        while not look.begun.is_set():
            assert await claimed(store) == []
    await until_claimed(store, "next")


async def test_nobody_looks_at_what_is_small_or_no_text(store: Store, outside: Outside) -> None:
    look = Looker("inputs are bad")
    insert(outside, "long-description", description="y" * 1_500_000, inputs='{"x": 1}')
    async with store.looking_by(look):
        await until_claimed(store, "long-description")
        assert look.asked == []
        if not outside.typed:  # a BLOB, as by the shell's readfile(): its attempt reads it
            insert(outside, "blob", inputs=LARGE.encode())
            await until_claimed(store, "blob")
    assert look.asked == []
