"""How answers pass: whole and in order whatever the guest does, and with little work for each piece."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import aiohttp
import psutil
import pytest
from aiohttp import web

import swarm.gateway
from swarm.gateway import prices, upstreams
from swarm.gateway.attempt_listener import AttemptListener
from swarm.gateway.call import Call
from swarm.gateway.metering_request import read
from swarm.ledger import Granted
from tests.gateway.conftest import Harness, ask


def event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def delta(text: str) -> bytes:
    return event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


@asynccontextmanager
async def service(stream: list[bytes], *, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Sends these pieces, as fast as they are taken."""

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in stream:
            await response.write(piece)
        return response

    server = await asyncio.get_running_loop().create_server(web.Server(serve), "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"http{'s' if context else ''}://localhost:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def asked(listener: AttemptListener, **fields: object) -> AsyncIterator[aiohttp.ClientResponse]:
    url, headers = listener.env["ANTHROPIC_BASE_URL"] + "/v1/messages", {"x-api-key": listener.token}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json={**ask(), **fields}, headers=headers) as answer,
    ):
        yield answer


@pytest.mark.parametrize("budget", [None, 1.0])
async def test_a_piece_of_a_stream_takes_few_calls(harness: Harness, budget: float | None) -> None:
    """No task is woken, no timer set, and nothing parsed for each: they would take longer than passing it on."""
    ours, calls, pieces = str(Path(swarm.gateway.__file__).parent), 0, 200

    def count(frame: FrameType, kind: str, _: object) -> None:
        nonlocal calls
        name = frame.f_code.co_filename
        calls += kind == "call" and (name.startswith(ours) or name.endswith(("aiohttp/web_response.py", "timeouts.py")))

    async with harness.listener_here(await harness.claim(budget_usd=budget)) as listener:
        prompt = ask(f"words={pieces} delay=0.005", max_tokens=4000)["messages"]
        sys.setprofile(count)
        try:
            async with asked(listener, messages=prompt, max_tokens=4000, stream=True) as answer:
                seen = before = 0
                while seen < pieces - 20:  # at the end, all of it is parsed for the books
                    seen += (await answer.content.readany()).count(b"text_delta")
                    before = before or calls
                passing = calls - before
                seen += (await answer.read()).count(b"text_delta")
            [(status, tokens, _, note)] = await harness.booked(1)
        finally:
            sys.setprofile(None)
    assert (status, seen, tokens > pieces, note) == (200, pieces, True, None)
    assert passing < 12 * pieces


async def test_a_guest_that_is_slow_gets_all_and_the_service_waits_for_it(harness: Harness) -> None:
    """While it reads nothing, little is held, and that time is not the service's silence."""
    stream = [delta(f"{number} " + "x" * 1000) for number in range(30_000)]
    async with service(stream) as url:
        slow = harness.listener_here(await harness.claim(), base_url=url, idle_seconds=2)
        async with slow as listener, asked(listener, stream=True) as answer:
            first = await answer.content.readany()
            assert answer.connection is not None and answer.connection.transport is not None
            answer.connection.transport.pause_reading()
            await asyncio.sleep(3)  # of the service's silence, this would be too much
            [guest] = listener._server.connections
            assert guest.transport is not None
            assert guest.transport.get_write_buffer_size() < 1_000_000
            answer.connection.transport.resume_reading()
            assert first + await answer.read() == b"".join(stream)


async def test_a_connection_serves_the_next_stream_too(harness: Harness) -> None:
    async with harness.listener_here(await harness.claim()) as listener:
        for _ in range(5):
            async with asked(listener, stream=True) as answer:
                assert b"message_stop" in await answer.read()
        port = int(harness.api.url.rpartition(":")[2])
        found = psutil.Process().net_connections("tcp")
        assert len([one for one in found if one.raddr and one.raddr.port == port and one.status == "ESTABLISHED"]) == 1


async def test_events_pass_when_they_arrive_also_from_a_service_that_speaks_tls(
    harness: Harness, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    argv += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    trust = ssl.create_default_context(cafile=str(certificate))
    stream = [delta(f"{number} " + "ä" * (number % 700)) for number in range(5000)]
    async with service(stream, context=context) as url:
        harness.here._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust))
        async with harness.listener_here(await harness.claim(), base_url=url) as listener:
            for _ in range(2):
                async with asked(listener, stream=True) as answer:
                    assert await answer.read() == b"".join(stream)


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_cuts_at_the_same_piece_as_if_each_were_looked_at(seed: int) -> None:
    """Whatever the pieces are, and wherever they are cut: events are parsed only when they could use the budget up."""
    chance = random.Random(seed)
    upstream = upstreams.load(None, {})["anthropic"]
    usage = {"input_tokens": chance.randrange(200), "output_tokens": 1}
    events = [event("message_start", message={"model": "claude-haiku-4-5", "usage": usage})]
    for _ in range(400):
        events.append(delta(chance.choice('xxxxxxä\u2028\ud800"') * chance.randrange(chance.choice([40, 2000]))))
        if chance.random() < 0.02:  # a report in between: input costs, too
            usage["input_tokens"] += chance.randrange(5000)
            events.append(event("message_delta", usage=usage))
    stream, pieces = b"".join(events), []
    while stream:
        size = chance.choice([10, 117, 1000, 5000])
        pieces.append(stream[:size])
        stream = stream[size:]
    usd = chance.choice([None, chance.uniform(0.0005, 0.3)])
    granted = Granted(usd=usd, tokens=chance.choice([None, chance.randrange(100, 60_000)]))

    def call() -> Call:
        body = json.dumps({**ask(max_tokens=100_000), "stream": True}).encode()
        metered, _ = read(body, upstream)
        price = prices.load(None).of(metered.model)
        made = Call(None, metered, cast(Any, None), upstream, granted=granted, price=price)
        head = SimpleNamespace(status=200, content_type="text/event-stream", content_length=None, headers={})
        made.answer_started(cast(Any, head))
        return made

    quick, thorough = call(), call()
    for piece in pieces:
        assert quick.feed(piece) == thorough.feed(piece)
        thorough._room_bytes = 0
        reason = quick.cut_reason()
        assert reason == thorough.cut_reason()
        if reason is not None:
            return
    assert granted.usd is None or granted.usd > 0.05, "a small budget was not cut"
