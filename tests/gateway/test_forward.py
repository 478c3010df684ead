"""Calls by the official SDK through the gateway to a real server: requests, answers and bills."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import anthropic
import pytest

from swarm.gateway.policy import Policy
from tests.conftest import PATIENCE_SECONDS
from tests.gateway.conftest import KEY, Harness, ask, client_of
from tests.gateway.messages_api import HAIKU


async def test_an_answer_in_one_piece(harness: Harness) -> None:
    claim = await harness.claim()
    async with harness.listener(claim) as listener, client_of(listener) as client:
        raw = await client.messages.with_raw_response.create(**ask())
        message = await raw.parse()
        assert message.content[0].text == HAIKU
        assert raw.headers["anthropic-ratelimit-requests-remaining"] == "49"
        assert raw.headers["request-id"] == "req_test"
        [seen] = harness.api.seen
        headers = {name.lower(): value for name, value in seen["headers"].items()}
        assert headers["x-api-key"] == KEY
        assert headers["anthropic-version"]
        assert listener.token not in json.dumps(seen)
        assert headers["host"] == harness.api.url.removeprefix("http://")
        assert headers["accept-encoding"] == "identity"
        [(status, tokens, cost, note)] = await harness.booked(1)
    used = message.usage
    assert (status, tokens, note) == (200, used.input_tokens + used.output_tokens, None)
    assert cost == pytest.approx((used.input_tokens * 1 + used.output_tokens * 5) / 1e6)


async def test_the_sums_stand_where_people_look_and_once(harness: Harness) -> None:
    claim = await harness.claim()
    async with harness.listener(claim) as listener, client_of(listener) as client:
        for _ in range(3):
            await client.messages.create(**ask("read=1000 written=100"))
        rows = await harness.booked(3)
    tokens, cost = sum(row[1] for row in rows), sum(row[2] for row in rows)
    assert harness.sql("SELECT api_tokens_used, round(cost_usd, 9) FROM attempts") == [(tokens, round(cost, 9))]
    assert harness.sql("SELECT api_tokens_used FROM step_executions") == [(tokens,)]
    assert harness.sql("SELECT total_api_tokens, round(total_cost_usd, 9) FROM workflow_runs") == [
        (tokens, round(cost, 9))
    ]
    events = [e for e in await harness.store.events("t") if e.kind == "model_call"]
    assert len(events) == 3
    assert events[0].data["cache_read_tokens"] == 1000
    assert events[0].data["cache_write_tokens"] == 100
    assert events[0].data["model"] == "claude-haiku-4-5"
    assert events[0].attempt_id == claim.attempt_id
    [by_agent] = await harness.store.costs("agent")
    assert (by_agent.name, by_agent.calls) == ("a", 3)
    assert by_agent.cost_usd == pytest.approx(cost)


async def test_an_answer_streams_unbuffered(harness: Harness) -> None:
    claim = await harness.claim()
    async with harness.listener(claim) as listener, client_of(listener) as client:
        heard = 0
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            client.messages.stream(**ask("scenario=stepwise words=10")) as stream,
        ):
            async for _ in stream.text_stream:
                heard += 1
                harness.api.step.release()  # the next word is sent when this one has arrived
            message = await stream.get_final_message()
        assert heard == 10
        [(status, tokens, cost, _)] = await harness.booked(1)
        assert (status, tokens) == (200, message.usage.input_tokens + message.usage.output_tokens)
        assert cost > 0
    [event] = [e for e in await harness.store.events("t") if e.kind == "model_call"]
    assert event.data["streamed"] is True
    assert float(str(event.data["first_byte_ms"])) < float(str(event.data["latency_ms"]))


async def test_tools(harness: Harness) -> None:
    tool = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        first = await client.messages.create(**ask('scenario=tool input={"a": 1}'), tools=[tool])  # type: ignore[list-item]
        assert first.stop_reason == "tool_use"
        async with client.messages.stream(**ask('scenario=tool input={"a": 1}'), tools=[tool]) as stream:  # type: ignore[list-item]
            message = await stream.get_final_message()
        assert message.content[0].input == {"a": 1}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("scenario", "kind", "status"),
    [
        ("429", anthropic.RateLimitError, 429),
        ("529", anthropic.InternalServerError, 529),
        ("500", anthropic.InternalServerError, 500),
    ],
)
async def test_errors_come_through_as_they_are(
    harness: Harness, scenario: str, kind: type[anthropic.APIStatusError], status: int
) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        with pytest.raises(kind) as caught:
            await client.messages.create(**ask(f"scenario={scenario}"))
        assert caught.value.response.status_code == status
        assert caught.value.body["request_id"] == "req_test"  # type: ignore[index]
        if scenario == "429":
            assert caught.value.response.headers["retry-after"] == "1"
            assert caught.value.response.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert await harness.booked(1) == [(status, 0, 0.0, None)]


async def test_the_sdk_tries_again_as_it_would_without_us(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener, retries=2) as client:
        message = await client.messages.create(**ask("scenario=429 times=1"))
        assert message.content[0].text == HAIKU
        assert [row[0] for row in await harness.booked(2)] == [429, 200]


async def test_a_stream_that_breaks_off_is_seen_and_paid_for(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        with pytest.raises(Exception, match=r"(?i)peer closed|incomplete|connection|payload"):
            async with client.messages.stream(**ask("scenario=cut words=40")) as stream:
                async for _ in stream.text_stream:
                    pass
        [(status, tokens, cost, note)] = await harness.booked(1)
        assert (status, tokens > 20) == (200, True)
        assert cost > 0
        assert "can't be reached" in note
    [event] = [e for e in await harness.store.events("t") if e.kind == "model_call"]
    assert event.data["estimated"] is True


async def test_an_answer_that_is_no_json_comes_through_and_is_counted(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener, aiohttp.ClientSession() as session:
        headers = {"x-api-key": listener.token}
        async with session.post(
            f"{listener.env['ANTHROPIC_BASE_URL']}/v1/messages", json=ask("scenario=malformed"), headers=headers
        ) as answer:
            assert answer.status == 200
            assert await answer.read() == b'{"type": "message", "content": ['
        [(_, tokens, _, note)] = await harness.booked(1)
        assert tokens > 0
        assert note == "estimated: the answer did not say what it used"


async def test_a_guest_that_hangs_up_ends_the_call_and_pays_for_what_came(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        async with client.messages.stream(**ask("words=1000 delay=0.02", max_tokens=5000)) as stream:
            async for _ in stream.text_stream:
                break
        [(status, tokens, _, _)] = await harness.booked(1)
        assert status == 200
        assert 0 < tokens < 500


async def test_an_attempt_that_ends_takes_its_calls_along_and_they_are_booked(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener:
        async with client_of(listener) as client, client.messages.stream(**ask("words=500 delay=0.02")) as stream:
            async for _ in stream.text_stream:
                break
            await listener.close()
        assert len(harness.sql("SELECT 1 FROM model_calls WHERE status = 200")) == 1
        assert harness.sql("SELECT 1 FROM model_calls WHERE status IS NULL") == []


async def test_a_service_that_is_away(harness: Harness) -> None:
    away = harness.listener(await harness.claim(), base_url="http://127.0.0.1:9")
    async with away as listener, client_of(listener) as client:
        with pytest.raises(anthropic.InternalServerError, match="can't be reached"):
            await client.messages.create(**ask())
        assert [row[0] for row in await harness.booked(1)] == [0]


async def test_a_service_that_is_silent(harness: Harness) -> None:
    impatient = harness.listener(await harness.claim(), idle_seconds=0.2)
    async with impatient as listener, client_of(listener) as client:
        with pytest.raises(anthropic.InternalServerError, match="silent for too long") as caught:
            await client.messages.create(**ask("scenario=silent"))
        assert caught.value.response.status_code == 504


async def test_a_stream_may_take_long_but_not_fall_silent(harness: Harness) -> None:
    claim = await harness.claim()
    for idle in (1.5, 15):  # a busy machine may be silent for a second, too
        async with harness.listener(claim, idle_seconds=idle) as patient, client_of(patient) as client:
            try:
                async with client.messages.stream(**ask(f"words=8 delay={idle / 6}")) as stream:
                    assert await stream.get_final_text() == "word " * 8
                break
            except anthropic.APIStatusError:
                if idle > 10:
                    raise
    async with harness.listener(claim, idle_seconds=0.5) as impatient, client_of(impatient) as client:
        with pytest.raises(anthropic.APIStatusError, match="silent for too long"):
            async with client.messages.stream(**ask("words=8 delay=30")) as stream:
                await stream.get_final_text()
    notes = harness.sql("SELECT note FROM model_calls ORDER BY at DESC LIMIT 1")
    assert notes == [("estimated: anthropic was silent for too long: TimeoutError",)]


async def test_paths_that_cost_nothing_are_not_booked(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        counted = await client.messages.count_tokens(model="claude-haiku-4-5", messages=ask()["messages"])
        assert counted.input_tokens > 0
        assert [model.id async for model in client.models.list()] == ["claude-haiku-4-5"]
    assert harness.sql("SELECT 1 FROM model_calls") == []


@pytest.mark.parametrize("streams", [False, True])
async def test_what_a_service_does_beside_tokens_costs_too(harness: Harness, streams: bool) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        if streams:
            async with client.messages.stream(**ask("searches=3")) as stream:
                message = await stream.get_final_message()
        else:
            message = await client.messages.create(**ask("searches=3"))
        [(_, tokens, cost, _)] = await harness.booked(1)
    used = message.usage
    assert tokens == used.input_tokens + used.output_tokens
    assert cost == pytest.approx((used.input_tokens * 1 + used.output_tokens * 5) / 1e6 + 3 * 0.01)


async def test_a_model_without_a_price_is_counted_and_it_says_so(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:
        await client.messages.create(**ask(model="claude-from-the-future"))
        [(status, tokens, cost, note)] = await harness.booked(1)
    assert (status, tokens > 0, cost) == (200, True, None)
    assert note.startswith("no price for claude-from-the-future in the list of 20")
    assert [c.unpriced_calls for c in await harness.store.costs("ticket")] == [1]


async def test_another_dialect_is_a_table_entry(harness: Harness) -> None:
    """Two services at one listener: the second's paths begin with its name. Its streams must report their usage."""
    policy = Policy(upstreams=("anthropic", "openai"))
    async with harness.listener(await harness.claim(), policy) as listener, aiohttp.ClientSession() as session:
        url, headers = listener.env["OPENAI_BASE_URL"], {"authorization": f"Bearer {listener.token}"}
        for stream in (False, True):
            body: dict[str, object] = {"model": "m", "messages": [], "stream": stream}
            async with session.post(f"{url}/chat/completions", json=body, headers=headers) as answer:
                assert answer.status == 200
                await answer.read()
        await harness.booked(2)
    assert harness.sql("SELECT input_tokens, output_tokens, cache_read_tokens FROM model_calls") == [(15, 10, 5)] * 2


async def test_many_at_once(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener, client_of(listener) as client:

        async def one(number: int) -> str:
            async with client.messages.stream(**ask(f"number {number} words=20 delay=0.01")) as stream:
                return await stream.get_final_text()

        answers = await asyncio.gather(*(one(number) for number in range(100)))
        assert {len(answer.split()) for answer in answers} == {20}
        rows = await harness.booked(100)
    assert harness.sql("SELECT api_tokens_used FROM attempts") == [(sum(row[1] for row in rows),)]
