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


async def test_each_in_its_turn_with_one_look(store: Store, outside: Outside) -> None:
    """Also while the engine is full for longer than a look takes, and whatever is put behind them meanwhile."""
    look = Looker()
    for number in range(6):
        insert(outside, f"t{number}", inputs=LARGE.replace("y", str(number)), priority=9 - number)
    began = list[str]()
    async with asyncio.timeout(PATIENCE_SECONDS):
        looked = asyncio.Event()
        async with store.looking_by(look, looked=looked.set):
            while len(began) < 6:
                found = [claim.ticket.id for claim in await store.claim("w", lease_seconds=LEASE)]
                began += found
                if not found:
                    await looked.wait()
                    looked.clear()
    assert began == [f"t{number}" for number in range(6)]
    assert len(look.asked) == 6


async def test_one_at_a_time_however_many(store: Store, outside: Outside) -> None:
    look = Looker("inputs are bad")
    look.may_answer.clear()
    for number in range(5):
        insert(outside, f"t{number}", inputs=LARGE)
    async with store.looking_by(look):
        for _ in range(5):
            assert await claimed(store) == []
        await look.begun.wait()
        assert len(look.asked) == 1
        look.may_answer.set()
        for number in range(5):
            await until_failed(store, f"t{number}")
    assert len(look.asked) == 5


async def test_those_that_were_withdrawn_keep_nobody_waiting(store: Store, outside: Outside) -> None:
    look, looked = Looker(), asyncio.Event()
    look.may_answer.clear()
    for number in range(30):
        insert(outside, f"t{number}", inputs=LARGE, priority=9)
    async with store.looking_by(look, looked=looked.set), asyncio.timeout(PATIENCE_SECONDS):
        assert await claimed(store) == []  # the first is looked at, the others are put off
        outside.execute("UPDATE tickets SET state = 'cancelled'")
        look.may_answer.set()
        await looked.wait()
        insert(outside, "next", inputs=LARGE)
        looked.clear()
        assert await claimed(store) == []
        await looked.wait()
        assert await claimed(store) == ["next"]
    assert len(look.asked) == 2


async def test_inputs_that_no_claim_would_take_are_not_read(store: Store, outside: Outside) -> None:
    look = Looker()
    insert(outside, "t", inputs='{"x": "' + "y" * (16 << 20) + '"}')
    async with store.looking_by(look):
        assert "the limit is 16,777,216" in await until_failed(store, "t")
    assert look.asked == []


@pytest.mark.parametrize("inputs", [None, '{"x": 1}'])
async def test_long_texts_with_small_inputs_begin_at_once(store: Store, outside: Outside, inputs: str | None) -> None:
    look = Looker("inputs are bad")
    insert(outside, "t", description="y" * 1_500_000, inputs=inputs)
    async with store.looking_by(look):
        assert await claimed(store) == ["t"]
    assert look.asked == []


async def test_a_blob_is_left_to_its_attempt(store: Store, outside: Outside) -> None:
    """As the shell's readfile() gives one."""
    if outside.typed:
        pytest.skip("the column takes texts only")
    look, looked = Looker("inputs are bad"), asyncio.Event()
    insert(outside, "t", inputs=LARGE.encode())
    async with store.looking_by(look, looked=looked.set), asyncio.timeout(PATIENCE_SECONDS):
        assert await claimed(store) == []
        await looked.wait()
        assert await claimed(store) == ["t"]
    assert look.asked == []
