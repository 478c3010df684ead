"""Budgets: what they refuse, what they cut, and that together nothing goes over them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import anthropic
import pytest

from swarm.engine.egress import account_of
from swarm.errors import LeaseLost
from swarm.ledger import Busy, Granted, Limit, Order, Refused, Spend
from swarm.store.store import Store
from tests.gateway.conftest import Harness, ask, client_of, open_harness
from tests.gateway.messages_api import MessagesApi


def spent(harness: Harness) -> float:
    [(usd,)] = harness.sql("SELECT COALESCE(SUM(cost_usd), 0) FROM model_calls")
    return float(usd)


async def until_refused(client: anthropic.AsyncAnthropic, **asked: object) -> anthropic.APIStatusError:
    while True:
        try:
            await client.messages.create(**ask(**asked))  # type: ignore[arg-type]
        except anthropic.APIStatusError as error:
            return error


async def test_a_call_that_does_not_fit_is_refused_with_the_sums(harness: Harness) -> None:
    claim = await harness.claim(budget_usd=0.001)
    async with harness.listener(claim) as listener, client_of(listener, retries=2) as client:
        error = await until_refused(client, max_tokens=100)
        assert "over budget" in str(error)
        assert error.response.status_code == 402
        assert error.body["error"]["type"] == "billing_error"  # type: ignore[index]
        seen = len(harness.seen())
        await until_refused(client, max_tokens=100)
        assert len(harness.seen()) == seen  # refused here, and not tried again by the SDK
        said = await asyncio.wait_for(listener.exceeded, 60)
    assert "the ticket's budget is $0.001" in said
    assert "needs at least $0.0003" in said
    assert {data["refused"] for _, data in harness.events} == {"budget"}


async def test_a_budget_in_tokens(harness: Harness) -> None:
    async with harness.listener(await harness.claim(budget_tokens=250)) as listener, client_of(listener) as client:
        error = await until_refused(client, max_tokens=60)
        assert re.search(r"budget is 250 tokens, \d+ of them are spent", str(error))


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_is_as_long_as_the_budget_affords(harness: Harness, stream: bool) -> None:
    """Its limit is lowered before it is sent, so it needs no cutting, and what is hidden of it is bounded too."""
    budget = 0.002
    async with harness.listener(await harness.claim(budget_usd=budget)) as listener, client_of(listener) as client:
        asked = ask("words=5000", max_tokens=128_000)
        if stream:
            async with client.messages.stream(**asked) as streaming:
                message = await streaming.get_final_message()
        else:
            message = await client.messages.create(**asked, timeout=60)
        [(_, _, cost, note)] = await harness.booked(1)
        said = await asyncio.wait_for(listener.exceeded, 60)
    [sent] = harness.seen()
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == sent["body"]["max_tokens"]
    assert budget * 0.9 < cost <= budget
    assert re.search(r"ended at \d+ tokens, of 128,000 asked for", note)
    assert re.match(
        r"over budget: an answer of .* ended at \d+ tokens, because the ticket's budget is \$0.002, and", said
    )


async def test_an_answer_that_has_ended_is_whole(harness: Harness) -> None:
    """Its last event may say that it was dearer than all that was left: that is spent, and cutting would lose it."""
    async with harness.listener(await harness.claim(budget_usd=0.002)) as listener, client_of(listener) as client:
        async with client.messages.stream(**ask("searches=10")) as stream:
            message = await stream.get_final_message()
        assert (message.stop_reason, message.usage.server_tool_use) != ("end_turn", None)
        [(_, _, cost, note)] = await harness.booked(1)
    assert (cost > 0.1, note) == (True, None)


async def test_a_service_without_a_limit_is_cut_when_its_money_is_at_an_end(harness: Harness) -> None:
    """It is begun when its least fits; what it costs is seen as it comes."""
    budget = 0.002
    claim = await harness.claim(budget_usd=budget)
    async with harness.listener(claim, output_limit=(), count="") as listener, client_of(listener) as client:
        asked = ask("words=5000 delay=0.0005", max_tokens=8000)
        with pytest.raises(anthropic.APIError, match="over budget: an answer of claude-haiku-4-5 was cut") as caught:
            async with client.messages.stream(**asked) as stream:
                async for _ in stream.text_stream:
                    pass
        assert "billing_error" in str(caught.value.body)
        [(_, _, cost, note)] = await harness.booked(1)
    assert cost > budget
    assert note.startswith("estimated: cut by the budget")


@pytest.mark.parametrize("budget", [None, 1.0])
async def test_a_stream_that_comes_dearer_than_it_was_guessed(harness: Harness, budget: float | None) -> None:
    """Such as by a document that the service fetches itself: no budget is short, so nothing is cut."""
    async with harness.listener(await harness.claim(budget_usd=budget)) as listener, client_of(listener) as client:
        async with client.messages.stream(**ask("read=200000", max_tokens=100)) as stream:
            message = await stream.get_final_message()
        assert message.stop_reason == "end_turn"
        [(_, _, cost, note)] = await harness.booked(1)
        assert (cost > 0.02, note) == (True, None)
        assert not listener.exceeded.done()


async def test_twenty_tickets_on_one_budget(api: MessagesApi, tmp_path: Path) -> None:
    """The budget of a day: together they never exceed it, and the rest would not have paid for another call."""
    day = 0.0100
    async with open_harness(api, tmp_path, day=Limit(usd=day)) as harness, AsyncExitStack() as stack:
        claims = [await harness.claim(f"t{number}") for number in range(20)]
        listeners = [await stack.enter_async_context(harness.listener(claim)) for claim in claims]

        async def work(listener: object) -> int:
            done = 0
            async with client_of(listener) as client:  # type: ignore[arg-type]
                while True:
                    try:
                        await client.messages.create(**ask(f"words=70 delay=0.02 {done}", max_tokens=100))
                        done += 1
                    except anthropic.APIStatusError as error:
                        assert error.response.status_code == 402, error
                        return done

        done = await asyncio.wait_for(asyncio.gather(*(work(listener) for listener in listeners)), 300)
        await harness.booked(sum(done))
        total = spent(harness)
        assert total <= day
        assert total > day - 0.0007  # the worst case of one more: 100 tokens of output, and the prompt
        await asyncio.wait_for(asyncio.gather(*(listener.exceeded for listener in listeners)), 300)
        assert sum(1 for one in done if one) > 3  # they shared it


async def test_twenty_streams_on_one_budget(api: MessagesApi, tmp_path: Path) -> None:
    """Streams are begun when their least fits, and cut: over by no more than the last event of each that was."""
    day = 0.0100
    async with open_harness(api, tmp_path, day=Limit(usd=day)) as harness, AsyncExitStack() as stack:
        listeners = [await stack.enter_async_context(harness.listener(await harness.claim(f"t{n}"))) for n in range(20)]

        async def work(listener: object) -> None:
            async with client_of(listener) as client:  # type: ignore[arg-type]
                while True:
                    try:
                        async with client.messages.stream(**ask("words=80 delay=0.001", max_tokens=400)) as stream:
                            await stream.get_final_message()
                    except anthropic.APIError as error:
                        assert "over budget" in str(error)
                        return

        await asyncio.wait_for(asyncio.gather(*(work(listener) for listener in listeners)), 300)
        assert harness.sql("SELECT 1 FROM model_calls WHERE status IS NULL") == []
        assert day * 0.9 < spent(harness) <= day * 1.02


async def test_retries_and_runs_share_a_tickets_budget(harness: Harness) -> None:
    claim = await harness.claim(budget_usd=0.002, max_attempts=5)
    async with harness.listener(claim) as listener, client_of(listener) as client:
        await client.messages.create(**ask("words=300", max_tokens=380))
        await harness.booked(1)
    await harness.store.shift_clock(700_000)  # the worker is given up; another takes over
    [again] = await harness.store.claim("other", lease_seconds=600, ticket_id="t")
    async with harness.listener(again) as listener, client_of(listener) as client:
        with pytest.raises(anthropic.APIStatusError, match=r"over budget.*\$0\.0019"):
            await client.messages.create(**ask("words=300", max_tokens=380))


async def test_an_attempt_that_was_lost_spends_nothing_more(harness: Harness) -> None:
    """Its worker may be frozen, and its VM not."""
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        await client.messages.create(**ask())
        await harness.store.shift_clock(700_000)
        await harness.store.claim("other", lease_seconds=600, ticket_id="t")
        with pytest.raises(anthropic.PermissionDeniedError, match=r"this attempt has ended \(lost\)"):
            await client.messages.create(**ask())
    assert len(harness.api.seen) == 1


async def test_an_agents_and_a_workflows_budget(harness: Harness) -> None:
    claim = await harness.claim(agent={"budget_usd": 0.0001})
    async with harness.listener(claim) as listener, client_of(listener) as client:
        with pytest.raises(anthropic.APIStatusError, match=r"the budget of agent a for a step is \$0\.0001"):
            await client.messages.create(**ask())
    other = await harness.claim("u", agent={"id": "b", "name": "b"})
    harness.sql("INSERT INTO workflows (id, name, version, budget_tokens) VALUES ('w', 'flow', '1.0.0', 5)")
    harness.sql("UPDATE workflow_runs SET workflow_id = 'w' WHERE id = ?", other.run_id)
    async with harness.listener(other) as listener, client_of(listener) as client:
        with pytest.raises(anthropic.APIStatusError, match="the budget of workflow flow for a run is 5 tokens"):
            await client.messages.create(**ask())


async def test_a_budget_that_was_raised_holds_at_once(harness: Harness) -> None:
    async with harness.listener(await harness.claim(budget_usd=0.0001)) as listener, client_of(listener) as client:
        with pytest.raises(anthropic.APIStatusError):
            await client.messages.create(**ask())
        harness.sql("UPDATE tickets SET budget_usd = 1 WHERE id = 't'")
        await client.messages.create(**ask())


async def test_a_model_without_a_price_can_have_no_budget_in_money(harness: Harness) -> None:
    async with harness.listener(await harness.claim(budget_usd=1)) as listener, client_of(listener) as client:
        with pytest.raises(anthropic.APIStatusError, match=r"price of model 'unheard-of' is unknown.*in tokens"):
            await client.messages.create(**ask(model="unheard-of"))
    assert harness.seen() == []


async def test_a_budget_that_is_no_number_is_no_money(harness: Harness) -> None:
    claim = await harness.claim()
    harness.sql("UPDATE tickets SET budget_usd = 'a lot' WHERE id = 't'")
    async with harness.listener(claim) as listener, client_of(listener) as client:
        with pytest.raises(anthropic.APIStatusError, match=r"budget is \$0"):
            await client.messages.create(**ask())


async def test_a_deleted_tickets_agent_spends_nothing_more(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        await client.messages.create(**ask())
        await harness.booked(1)
        harness.sql("DELETE FROM tickets")
        with pytest.raises(anthropic.PermissionDeniedError, match="was deleted"):
            await client.messages.create(**ask())
    [cost] = await harness.store.costs("ticket")
    assert (cost.name, cost.calls, cost.cost_usd > 0) == ("t", 1, True)  # what was spent was spent
    async with harness.listener(await harness.claim(budget_usd=0.002)) as listener, client_of(listener) as client:
        await client.messages.create(**ask())  # a namesake begins with nothing spent


@pytest.fixture
async def order(harness: Harness) -> AsyncIterator[Order]:
    claim = await harness.claim(budget_usd=1.0)
    yield Order(
        id="one",
        account=account_of(claim),
        upstream="anthropic",
        model="m",
        most=Spend(tokens=10, usd=0.8),
        least=Spend(tokens=10, usd=0.8),
    )


async def test_calls_under_way_make_others_wait_and_dead_ones_count_in_full(harness: Harness, order: Order) -> None:
    """An engine dies during a call: the call is never booked, and its cost stays unknown."""
    store = harness.store
    assert await store.reserve(order) == Granted(usd=1.0, tokens=None)
    assert isinstance(await store.reserve(replace(order, id="two")), Busy)
    await store.shift_clock(700_000)
    [again] = await store.claim("other", lease_seconds=600, ticket_id="t")  # its lease has run out
    with pytest.raises(LeaseLost):
        await store.reserve(replace(order, id="three"))
    verdict = await store.reserve(replace(order, id="four", account=account_of(again)))
    assert isinstance(verdict, Refused)
    assert "$0.8 of it is spent" in verdict.message
    assert again.attempt_number == 2
    assert [c.open_calls for c in await store.costs("day")] == [1]


async def test_a_one_off_runs_call_holds_its_share_for_an_hour(harness: Harness, order: Order) -> None:
    """It has no attempt, so nothing says that its process died but time."""
    day = replace(order, day=Limit(usd=1.0), account=replace(order.account, agent_budget=Limit(usd=1.0)))
    nowhere = {"ticket_id": None, "run_id": "r", "step_execution_id": "r", "attempt_id": "r"}
    one_off = replace(day, account=replace(day.account, **nowhere))  # type: ignore[arg-type]
    assert await harness.store.reserve(one_off) == Granted(usd=1.0, tokens=None)
    assert isinstance(await harness.store.reserve(replace(one_off, id="two")), Busy)
    assert isinstance(await harness.store.reserve(replace(day, id="three")), Busy)
    harness.sql("UPDATE model_calls SET at = strftime('%Y-%m-%dT%H:%M:%fZ', at, '-61 minutes')")
    verdict = await harness.store.reserve(replace(one_off, id="four"))
    assert isinstance(verdict, Refused) and "$0.8 of it is spent" in verdict.message


async def test_reservations_of_many_engines_at_once_fit(harness: Harness, order: Order) -> None:
    """Stores of their own, as processes have them."""
    small = replace(order, most=Spend(tokens=1, usd=0.09), least=Spend(tokens=1, usd=0.09))
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(Store.open(f"sqlite:///{harness.database}")) for _ in range(5)]
        asked = [store.reserve(replace(small, id=f"{n}-{k}")) for n, store in enumerate(stores) for k in range(6)]
        verdicts = await asyncio.gather(*asked)
    assert sum(isinstance(v, Granted) for v in verdicts) == 11  # 11 × 0.09 < 1 < 12 × 0.09
    assert sum(isinstance(v, Busy) for v in verdicts) == 19
