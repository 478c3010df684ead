"""An agent that means harm to the host's money or its memory, by requests that look almost right."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import threading
from collections import Counter
from typing import Any

import aiohttp
import psutil
import pytest

from swarm.gateway.attempt_listener import MAX_CONNECTIONS, MAX_FAILED_CALLS, AttemptListener
from swarm.gateway.policy import Policy
from swarm.gateway.process import Server
from swarm.ledger import Order
from tests.conftest import PATIENCE_SECONDS
from tests.gateway.conftest import KEY, Harness, ask
from tests.gateway.test_bills import PACKED, Service, whole
from tests.gateway.test_http import exchange

OUTPUT_USD = 5 / 1e6  # a token of claude-haiku-4-5


async def send(listener: AttemptListener | Server, body: bytes, *, path: str = "/v1/messages") -> asyncio.StreamWriter:
    """A request of which no answer is awaited."""
    host, _, port = listener.env["ANTHROPIC_BASE_URL"].removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {listener.token}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode(errors="surrogateescape") + body)
    return writer


async def post(listener: AttemptListener | Server, body: bytes, *, path: str = "/v1/messages") -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            listener.env["ANTHROPIC_BASE_URL"] + path, data=io.BytesIO(body), headers={"x-api-key": listener.token}
        ) as answer,
    ):
        return answer.status, await answer.text()


@pytest.mark.parametrize("scenario", ["hold", "half"])
async def test_who_hangs_up_on_an_answer_in_one_piece_pays_for_it(harness: Harness, scenario: str) -> None:
    """The service has done, or will do, its work. The amount is unknown, so the whole reservation counts."""
    async with harness.listener(await harness.claim()) as listener:
        writer = await send(listener, json.dumps(ask(f"scenario={scenario}", max_tokens=1000)).encode())
        await asyncio.wait_for(harness.api.held.wait(), 60)
        writer.transport.abort()
        [(_, tokens, cost, note)] = await harness.booked(1)
        harness.api.release.set()
    assert tokens > 1000
    assert cost > 1000 * OUTPUT_USD
    assert note == "estimated: the answer was not seen to its end: counted with all that it may have cost"
    [event] = [e for e in await harness.store.events("t") if e.kind == "model_call"]
    assert event.data["estimated"] is True


async def test_who_hangs_up_on_a_stream_pays_for_the_prompt(harness: Harness) -> None:
    """Also where the service tells what that was at the end only."""
    async with harness.listener(await harness.claim(), Policy(upstreams=("anthropic", "openai"))) as listener:
        body = {
            "model": "m",
            "stream": True,
            "messages": [{"role": "user", "content": "scenario=hold " + "x" * 30_000}],
        }
        writer = await send(listener, json.dumps(body).encode(), path="/openai/v1/chat/completions")
        await asyncio.wait_for(harness.api.held.wait(), 60)
        writer.transport.abort()
        [(status, tokens, _, _)] = await harness.booked(1)
        harness.api.release.set()
    assert status == 200
    assert tokens >= 10_000


async def test_who_hangs_up_on_a_stream_pays_for_what_may_have_been_thought(harness: Harness) -> None:
    """Nothing of it is seen: 300 tokens a second are counted, up to the request's limit."""
    async with harness.listener(await harness.claim()) as listener:
        for limit in (10_000, 100):
            harness.api.held.clear()
            body = json.dumps({**ask("scenario=hold", max_tokens=limit), "stream": True}).encode()
            writer = await send(listener, body)
            await asyncio.wait_for(harness.api.held.wait(), 60)
            await asyncio.sleep(1)  # it thinks for a second at least
            writer.transport.abort()
        (_, _, cost, _), (_, _, little, _) = await harness.booked(2)
        harness.api.release.set()
    assert cost > 300 * OUTPUT_USD
    assert 100 * OUTPUT_USD < little < 300 * OUTPUT_USD


async def test_a_service_that_falls_silent_may_have_worked(harness: Harness) -> None:
    async with harness.listener(await harness.claim(), idle_seconds=0.2) as listener:
        status, _ = await post(listener, json.dumps(ask("scenario=silent", max_tokens=1000)).encode())
        [(_, _, cost, note)] = await harness.booked(1)
    assert status == 504
    assert cost > 1000 * OUTPUT_USD
    assert "silent for too long" in note


@pytest.mark.parametrize(
    "twist",
    [
        '"max_tokens": 100000, "max_tokens": 1', '"model": "claude-opus-5", "max_tokens": 1', '"max_tokens": "100000"',
        '"max_tokens": 1.5', '"max_tokens": true', '"max_tokens": [1]', '"max_tokens": 1' + "0" * 400,
        '"max_tokens": 1e300', '"max_tokens": 9223372036854775807', '"max_tokens": 1, "MAX_TOKENS": 100000',
        '"Stream": true', '"Model": "claude-opus-5"', r'"max_tokens": 1, "max_to\u212aens": 100000',
        '"max_tokens": 1, "tool\u017f": []',
    ],
)  # fmt: skip
async def test_what_the_service_might_read_in_another_way(harness: Harness, twist: str) -> None:
    """A duplicate name, one that only some parsers tell from another, or a limit that is no plain number is refused."""
    async with harness.listener(await harness.claim(budget_usd=0.01)) as listener:
        status, said = await post(listener, f'{{"model": "claude-haiku-4-5", "messages": [], {twist}}}'.encode())
    assert status == 400, said
    assert "invalid_request_error" in said
    assert harness.api.seen == []
    assert harness.sql("SELECT 1 FROM model_calls") == []


async def test_a_limit_that_is_a_whole_number_with_a_point_counts_as_that_number(harness: Harness) -> None:
    async with harness.listener(await harness.claim(budget_usd=0.01)) as listener:
        status, said = await post(listener, b'{"model": "claude-haiku-4-5", "messages": [], "max_tokens": 100000.0}')
    assert status == 200, said
    assert 1900 < harness.seen()[0]["body"]["max_tokens"] < 2000


@pytest.mark.parametrize(
    "dearer", [{"n": 100}, {"max_completion_tokens": 10, "max_tokens": 50_000}, {"max_completion_tokens": 50_000}]
)
async def test_many_answers_and_other_ways_to_ask_for_more(harness: Harness, dearer: dict[str, Any]) -> None:
    async with harness.listener(
        await harness.claim(budget_tokens=20_000), Policy(upstreams=("anthropic", "openai"))
    ) as listener:
        body = {"model": "m", "messages": [], "max_tokens": 500}
        path = "/openai/v1/chat/completions"
        assert (await post(listener, json.dumps(body).encode(), path=path))[0] == 200
        status, said = await post(listener, json.dumps({**body, **dearer}).encode(), path=path)
        assert status == 200, said
        status, _ = await post(listener, json.dumps({**body, "n": "100"}).encode(), path=path)
        assert status == 400
    _, sent = (one["body"] for one in harness.seen())
    limits = [sent[name] for name in ("max_tokens", "max_completion_tokens") if name in sent]
    assert 19_000 < max(limits) * sent.get("n", 1) < 20_000


async def test_what_is_written_to_the_cache_is_reserved_at_its_price(harness: Harness) -> None:
    """300,000 bytes are about 100,000 tokens: $0.1 as plain input, $0.125 for five minutes, $0.2 for an hour."""
    async with harness.listener(await harness.claim(budget_usd=0.15)) as listener:
        for kept, expected in (({"type": "ephemeral", "ttl": "1h"}, 402), ({"type": "ephemeral"}, 200)):
            block = {"type": "text", "text": "x" * 300_000, "cache_control": kept}
            status, said = await post(listener, json.dumps({**ask(), "system": [block]}).encode())
            assert status == expected, said


async def test_a_surcharge_is_no_list_price(harness: Harness) -> None:
    """What costs more than the list says has no price: tokens are counted, and a budget in money refuses it."""
    body = json.dumps({**ask(), "speed": "fast"}).encode()
    async with harness.listener(await harness.claim("free")) as listener:
        assert (await post(listener, body))[0] == 200
        [(_, tokens, cost, note)] = await harness.booked(1)
        assert (tokens > 0, cost) == (True, None)
        assert note.startswith("no price for claude-haiku-4-5 speed=fast in the list of 20")
    async with harness.listener(await harness.claim("poor", budget_usd=1)) as listener:
        status, said = await post(listener, body)
        assert status == 402
        assert "the price of model 'claude-haiku-4-5 speed=fast' is unknown" in said


async def test_a_request_that_would_fill_the_hosts_memory(harness: Harness) -> None:
    """A few megabytes of JSON can be a gigabyte of objects: it is counted before it is parsed."""
    async with harness.listener(await harness.claim()) as listener:
        body = b'{"model": "m", "messages": [' + b"{}," * 600_000 + b"{}]}"
        status, said = await post(listener, body)
        assert status == 400
        assert "too many values" in said
        text = json.dumps(ask("a, [b], {c}, " * 20_000)).encode()  # as a person writes
        assert (await post(listener, text))[0] == 200
    assert len(harness.api.seen) == 1


async def test_a_service_that_shows_what_it_was_sent(harness: Harness) -> None:
    """In headers and bodies, wherever it is cut: the key does not come back."""
    async with harness.listener(await harness.claim()) as listener, aiohttp.ClientSession() as session:
        for part in (0, 1, 7, len(KEY) - 1):
            async with session.post(
                listener.env["ANTHROPIC_BASE_URL"] + "/v1/messages",
                json=ask(f"scenario=echo cut={part}"),
                headers={"x-api-key": listener.token},
            ) as answer:
                said = await answer.text()
                assert answer.status == 400
                assert KEY not in said + str(answer.headers)
                assert said == f"you sent {'*' * len(KEY)} and {KEY[:5]}"
                assert answer.headers["x-seen"] == "*" * len(KEY)


SEEN = f"you sent {KEY}".encode()
SHOWN = {
    "in its reason": b"HTTP/1.1 400 %b\r\ncontent-length: 0\r\n\r\n" % SEEN,
    "as a header's name": b"HTTP/1.1 400 no\r\n%b: x\r\ncontent-length: 0\r\n\r\n" % KEY.encode(),
    "in a trailer": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-seen: %b\r\n\r\n" % SEEN,
    "in a header that is none": b"HTTP/1.1 400 no\r\n%b\r\ncontent-length: 0\r\n\r\n" % SEEN,
    "in a length": b"HTTP/1.1 400 no\r\ncontent-length: %b\r\n\r\n" % SEEN,
    **{
        packed: whole(gzip.compress(gzip.compress(SEEN) if "gzip, gzip" in packed else SEEN), headers=f"{packed}\r\n")
        for packed in PACKED
    },
    "transfer-encoding: gzip": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
    % (len(gzip.compress(SEEN)), gzip.compress(SEEN)),
}


@pytest.mark.parametrize("name", SHOWN)
async def test_a_service_that_shows_its_key_where_nobody_looks(harness: Harness, name: str) -> None:
    async with (
        Service().serving() as service,
        harness.listener(await harness.claim(), base_url=service.url) as listener,
    ):
        service.answers["x"] = SHOWN[name]
        body = json.dumps(ask()).encode()
        head = b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-case: x\r\nTOKEN\r\ncontent-length: %d\r\n\r\n" % len(body)
        said = await exchange(listener, head + body)
    packed = said.partition(b"\r\n\r\n")[2]
    while packed.startswith(b"\x1f\x8b"):
        said += (packed := gzip.decompress(packed))
    assert said.startswith(b"HTTP/1.1 ") and KEY.encode() not in said
    assert KEY not in str(harness.events) + str(harness.sql("SELECT * FROM model_calls"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-le"])
async def test_a_request_in_another_encoding_is_refused_in_words(harness: Harness, encoding: str) -> None:
    """Python would read it, with a codec that the gateway's process can't load any more."""
    async with harness.listener(await harness.claim()) as listener:
        status, said = await post(listener, json.dumps(ask()).encode(encoding))
    assert status == 400 and "a JSON object in UTF-8" in said
    assert harness.api.seen == []


async def test_who_hangs_up_before_the_call_was_sent_holds_no_money(harness: Harness) -> None:
    """Its reservation must not reduce what others may spend on this day."""
    reserved, go_on = asyncio.Event(), asyncio.Event()

    async def wait(_: Order) -> None:
        reserved.set()
        await go_on.wait()

    harness.ledger.reserved = wait
    async with harness.listener_here(await harness.claim()) as listener:
        writer = await send(listener, json.dumps(ask(max_tokens=1000)).encode())
        await asyncio.wait_for(reserved.wait(), 60)
        [call] = listener.calls
        writer.transport.abort()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                if call.cancelling():
                    break
                await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.wait({call}, timeout=60)
        assert harness.sql("SELECT status, cost_usd, note FROM model_calls") == [
            (0, 0, "the client disconnected before the call was sent")
        ]
        assert listener.failed_calls == 1
    assert harness.api.seen == []


async def test_a_guest_that_reads_nothing_holds_no_descriptor(harness: Harness) -> None:
    """Its VM is gone: what was not sent by then never will be."""
    async with harness.listener_here(await harness.claim()) as listener:
        port = int(listener.env["ANTHROPIC_BASE_URL"].rpartition(":")[2])
        writer = await send(listener, json.dumps(ask("words=3000000", max_tokens=10**9)).encode())  # 15 MB
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                if any(h.transport and h.transport.get_write_buffer_size() for h in listener._server.connections):
                    break
                await asyncio.sleep(0.01)
    found = psutil.Process().net_connections("tcp")
    assert [one for one in found if one.laddr.port == port and one.fd > 0] == []
    writer.transport.abort()


async def test_calls_that_fail_do_not_fill_the_books(harness: Harness) -> None:
    """A refusal costs nothing, but a row and an event for ever, and each call adds up the rows of its day."""
    async with harness.listener_here(await harness.claim()) as listener:
        listener.failed_calls = MAX_FAILED_CALLS - 5
        body = json.dumps(ask("scenario=429")).encode()
        said = []
        for count in range(8):
            said.append(await post(listener, body))
            async with asyncio.timeout(PATIENCE_SECONDS):  # it is counted when it is booked, after its answer was sent
                while listener.failed_calls < MAX_FAILED_CALLS - 5 + min(count + 1, 5):  # noqa: ASYNC110 - a number
                    await asyncio.sleep(0.01)
        assert [status for status, _ in said] == [429] * 8
        assert "slow down" in said[4][1]
        assert "too many calls of this attempt have failed" in said[5][1]
        assert (await post(listener, json.dumps(ask()).encode()))[0] == 429  # also one that would not
    assert len(harness.sql("SELECT 1 FROM model_calls")) == len(harness.api.seen) == 5
    assert [data["refused"] for _, data in harness.events] == ["failures"] * 4


BAD = {
    "no JSON": b'{"model": "m", "messages": [',
    "no object": b"[1, 2, 3]",
    "no model": b"{}",
    "two models": b'{"model": "m", "model": "n"}',
    "too deep": b"[" * 5000,
    "no text": b'{"model": "\xff"}',
    "a wrong limit": b'{"model": "m", "max_tokens": -1}',
    "half of a character": b'{"model": "\\ud800", "max_tokens": 5, "messages": []}',
    "lines": b'{"model": "m\\nn", "max_tokens": 5, "messages": []}',
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
async def test_requests_that_are_no_good_are_counted(harness: Harness, body: bytes) -> None:
    """Each is work for the gateway, and costs the guest nothing."""
    async with harness.listener_here(await harness.claim()) as listener:
        listener.failed_calls = MAX_FAILED_CALLS - 3
        said = [await post(listener, body) for _ in range(5)]
        assert [status for status, _ in said] == [400] * 3 + [429] * 2
        assert "too many calls of this attempt have failed" in said[3][1]
        assert (await post(listener, json.dumps(ask()).encode()))[0] == 429
    assert (harness.api.seen, harness.sql("SELECT 1 FROM model_calls")) == ([], [])
    assert [data["refused"] for _, data in harness.events] == ["request"] * 3 + ["failures"] * 3


async def test_large_requests_that_are_no_good_are_counted_by_their_bytes(harness: Harness) -> None:
    """Parsing goes by bytes: after as many as two of the largest requests have, nothing of this attempt is parsed."""
    async with harness.listener_here(await harness.claim()) as listener:
        body = b'{"model": "m", "messages": "' + b"x" * 21_333_333 + b'", "model": "n"}'
        assert [(await post(listener, body))[0] for _ in range(5)] == [400, 400, 400, 429, 429]
        assert listener.failed_calls == 3
    assert [data["bytes"] for _, data in harness.events if data["refused"] == "request"] == [len(body)] * 3


async def test_calls_that_wait_for_budget_do_not_crowd_the_database(harness: Harness) -> None:
    """Only one call of a listener retries, the others wait their turn: tickets are claimed in the same database."""
    asked: Counter[str] = Counter()
    enough = asyncio.Event()

    async def count(order: Order) -> None:
        asked[order.id] += 1
        if asked.total() >= 50:
            enough.set()

    async with harness.listener(await harness.claim(budget_tokens=1500)) as listener:
        held = asyncio.create_task(post(listener, json.dumps(ask("scenario=hold", max_tokens=1000)).encode()))
        await asyncio.wait_for(harness.api.held.wait(), 60)
        body = json.dumps(ask(max_tokens=1000)).encode()
        harness.ledger.reserved = count
        others = [asyncio.create_task(post(listener, body)) for _ in range(20)]
        await asyncio.wait_for(enough.wait(), 30)
        assert len(asked) == 20
        # Each is asked for as it is, and with less.
        assert sum(1 for times in asked.values() if times > 2) == 1
        harness.api.release.set()
        assert (await held)[0] == 200
        statuses = [(await task)[0] for task in others]
    assert set(statuses) <= {200, 402}


async def test_what_is_no_text_breaks_nobodys_calls(harness: Harness) -> None:
    """Also in what is recorded of a refusal: the engine takes only text."""
    async with harness.listener(await harness.claim()) as listener:
        pid = harness.gateway.pid
        assert (await post(listener, BAD["half of a character"]))[0] == 400
        writer = await send(listener, b"", path="/\udcff")
        await writer.drain()
        assert (await post(listener, json.dumps(ask()).encode()))[0] == 200
        assert harness.gateway.pid == pid
        writer.transport.abort()


@pytest.mark.parametrize("given", [{"max_tokens": None}, {}])
async def test_no_limit_under_a_budget(harness: Harness, given: dict[str, Any]) -> None:
    asked = {name: value for name, value in ask().items() if name != "max_tokens"} | given
    async with harness.listener(await harness.claim(budget_usd=1.0)) as listener:
        assert (await post(listener, json.dumps(asked).encode()))[0] == 200
    [seen] = harness.seen()
    assert seen["body"]["max_tokens"] > 64


async def test_a_call_of_nobody_holds_its_bytes_until_its_thread_has_ended(harness: Harness) -> None:
    """Who asks and hangs up, again and again, has no more threads at work than others."""
    go_on, at_work = threading.Event(), threading.Event()

    def work() -> None:
        at_work.set()
        go_on.wait(600)
        raise ValueError("dropped")

    async with harness.listener_here(await harness.claim()) as listener:
        call = asyncio.create_task(harness.here._parsed(listener, b"x" * 100_000, work))
        await asyncio.to_thread(at_work.wait, 60)
        for _ in range(3):
            call.cancel()
            assert not (await asyncio.wait({call}, timeout=0.05))[0]
        assert listener.parse_lock.locked()
        go_on.set()
        await asyncio.wait({call}, timeout=60)
        assert call.cancelled() and not listener.parse_lock.locked()


async def test_calls_that_linger_are_bounded(harness: Harness) -> None:
    async with harness.listener_here(await harness.claim()) as listener:
        lingering = {asyncio.create_task(asyncio.Event().wait()) for _ in range(2 * MAX_CONNECTIONS)}
        listener.calls |= lingering
        status, text = await post(listener, json.dumps(ask()).encode())
        assert (status, "too many calls at once" in text) == (429, True)
        lingering.pop().cancel()
        listener.calls &= lingering
        assert (await post(listener, json.dumps(ask()).encode()))[0] == 200
        listener.stop()


async def test_a_fault_of_ours_does_not_fill_the_log(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    async with harness.listener_here(await harness.claim()) as listener:
        for _ in range(50):
            listener._server_error(ZeroDivisionError("a fault"))
    assert capsys.readouterr().out.count("the gateway failed") == 10
