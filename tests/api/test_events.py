"""Events and output as they come: all of them once, to many readers, some of which take nothing or go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from swarm.api import server
from swarm.api.feed import Feed
from swarm.model import Event
from tests.api.served import Served, serving
from tests.api.test_actions import of_project
from tests.api.test_auth import refused
from tests.conftest import PATIENCE_SECONDS


def printed(ticket: str, text: str, *, stream: str = "stdout", step: str = "agent") -> Event:
    return Event(ticket_id=ticket, step_id=step, attempt_id="1", kind="output", data={"stream": stream, "text": text})


async def sse(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str, str, Any]]:
    """Id, kind and data of each event."""
    fields: dict[str, str] = {}
    async for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield fields.get("id", ""), fields["event"], json.loads(fields["data"])
            fields = {}


async def followed(client: httpx.AsyncClient, path: str, *, seed: int | None = None) -> list[Any]:
    """All events until the end. ``seed``: goes away and comes back at random."""
    found: list[Any] = []
    chance = random.Random(seed)
    last = ""
    while True:
        headers: dict[str, str] = {"last-event-id": last} if last else {}
        async with client.stream("GET", path, headers=headers) as stream:
            stay = chance.randrange(1, 40) if seed is not None else None
            async for id, kind, data in sse(stream.aiter_lines()):
                if kind == "end":
                    return found
                last = id
                found.append(data)
                if stay is not None and (stay := stay - 1) == 0:
                    break


async def test_who_comes_and_goes_has_every_line_once(served: Served) -> None:
    await served.add("t")
    readers = [asyncio.create_task(followed(served.viewer, "/v1/tickets/t/events/live", seed=n)) for n in range(4)]
    for number in range(150):
        await served.store.append([printed("t", f"{number} {n}\n") for n in range(4)])
    await served.store.cancel("t", "ann")
    stored = [event.seq for event in await served.store.events("t")]
    async with asyncio.timeout(PATIENCE_SECONDS):
        for found in await asyncio.gather(*readers):
            assert [event["seq"] for event in found] == stored


async def test_a_hundred_at_once(served: Served) -> None:
    await served.add("t")
    limits = httpx.Limits(max_connections=None)
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for role in ("viewer", "operator"):
            headers = {"authorization": f"Bearer {served.tokens[role]}"}
            client = httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60, limits=limits)
            clients += [await stack.enter_async_context(client)] * 50
        readers = [asyncio.create_task(followed(client, "/v1/tickets/t/events/live")) for client in clients]
        for number in range(20):
            await served.store.append([printed("t", f"{number}\n")])
        await served.store.cancel("t", "ann")
        stored = [event.seq for event in await served.store.events("t")]
        for found in await asyncio.gather(*readers):
            assert [event["seq"] for event in found] == stored


async def stalled(url: str, path: str, token: str = "") -> socket.socket:
    """A client that takes nothing of its answer, nor does its kernel."""
    taker = socket.socket()
    taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    taker.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(taker, ("127.0.0.1", int(url.rsplit(":", 1)[1])))
    head = f"Host: x\r\nAuthorization: Bearer {token}\r\n\r\n"
    await loop.sock_sendall(taker, f"GET {path} HTTP/1.1\r\n{head}".encode())
    assert b" 200 " in await loop.sock_recv(taker, 100)
    return taker


async def test_who_reads_nothing_holds_little_and_stops_nobody(tmp_path: Path) -> None:
    """60 × 8 MB would be half a GB."""
    async with contextlib.AsyncExitStack() as clients:
        async with serving(tmp_path / "home") as served:
            await served.add("t")
            for _ in range(8):
                await served.store.append([printed("t", "x" * 16_000 + "\n") for _ in range(64)])
            before = psutil.Process().memory_info().rss
            for what in ("events/live", "output?follow=true", "output"):
                for number in range(20):
                    token = served.tokens["viewer" if number % 2 else "operator"]
                    taker = await stalled(served.url, f"/v1/tickets/t/{what}", token)
                    clients.callback(taker.close)
            await served.add("waits")
            headers = {"authorization": f"Bearer {served.tokens['admin']}"}
            client = await clients.enter_async_context(
                httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60)
            )
            waits = asyncio.create_task(client.get("/v1/tickets/waits/wait?timeout_seconds=60", timeout=60))
            assert (await served.admin.get("/v1/tickets/waits")).status_code == 200
            grown = psutil.Process().memory_info().rss - before
            assert grown < 200 << 20, f"{grown >> 20} MiB"
            ends = time.monotonic()
        assert time.monotonic() - ends < 10  # and not after the ten seconds that a request may take
        assert (await waits).json()["ended"] is False


async def test_who_takes_nothing_for_long_is_left() -> None:
    left = asyncio.Event()

    async def endless(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 65_536
                    await asyncio.sleep(0)
            finally:
                left.set()

        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", endless)])
    async with (
        server.serving(app, host="127.0.0.1", port=0, stalled_seconds=0.2) as (url, _),
        asyncio.timeout(PATIENCE_SECONDS),
    ):
        with contextlib.closing(await stalled(url, "/")):
            await left.wait()


async def test_whose_client_stops_to_read_while_the_server_stops_is_left() -> None:
    begin = asyncio.Event()

    async def endless(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"x"
            await begin.wait()
            while True:
                yield b"x" * 65_536
                await asyncio.sleep(0)

        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", endless)])
    async with contextlib.AsyncExitStack() as clients:
        async with server.serving(app, host="127.0.0.1", port=0) as (url, _):
            clients.callback((await stalled(url, "/")).close)
            asyncio.get_running_loop().call_later(1.5, begin.set)  # by then, those that stood still were left
            ends = time.monotonic()
        assert time.monotonic() - ends < server.GRACE_SECONDS


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "pruned"])
async def test_what_goes_while_it_is_followed(served: Served, deleted: bool) -> None:
    await served.add("t")
    await served.store.append([printed("t", "1\n")])
    seen = asyncio.Event()

    async def follow() -> list[str]:
        kinds = []
        async with served.viewer.stream("GET", "/v1/tickets/t/events/live") as stream:
            async for _, kind, _ in sse(stream.aiter_lines()):
                kinds.append(kind)
                seen.set()
        return kinds

    reader = asyncio.create_task(follow())
    async with asyncio.timeout(PATIENCE_SECONDS):
        await seen.wait()
        if deleted:
            await served.store.remove_tickets(["t"], by="ann", force=True)
            assert (await reader)[-1] == "end"
            refused(await served.viewer.get("/v1/tickets/t/events"), 404, "no ticket")
        else:
            await served.store.cancel("t", "ann")
            assert (await reader)[-1] == "end"
            await served.store.prune(0)
            await served.add("other")  # numbers are not used again
            first = (await served.viewer.get("/v1/events")).json()["events"]
            assert [one["ticket_id"] for one in first] in (["other"], [])
            ended = await followed(served.viewer, "/v1/tickets/t/events/live")
            assert ended == []


async def test_all_events(served: Served) -> None:
    for id, project in (("a", "a"), ("b", "b")):
        await served.add(id, project_id=project)
    for _ in range(5):  # more than one read looks at
        await served.store.append([printed("b", "x\n") for _ in range(500)])
    await served.store.cancel("a", "ann")

    async def every(client: httpx.AsyncClient, query: str = "") -> list[Any]:
        found, after = [], 0
        while True:
            answer = (await client.get(f"/v1/events?limit=1000&after={after}{query}")).json()
            found += answer["events"]
            if answer["after"] == after:
                return found
            after = answer["after"]

    stored = [event.seq for event in await served.store.events(None, limit=10_000)]
    assert [event["seq"] for event in await every(served.viewer)] == stored
    changes = await every(served.viewer, "&kind=transition&kind=none")
    assert {event["kind"] for event in changes} == {"transition"}
    async with of_project(served, "a") as team:
        assert {event["ticket_id"] for event in await every(team)} == {"a"}
        async with (
            team.stream("GET", "/v1/events/live?after=0&kind=transition") as stream,
            asyncio.timeout(PATIENCE_SECONDS),
        ):
            async for _, kind, data in sse(stream.aiter_lines()):
                assert (kind, data["ticket_id"], data["data"]["to"]) == ("transition", "a", "cancelled")
                break
    refused(await served.viewer.get("/v1/events/live", headers={"last-event-id": "x"}), 400, "Last-Event-ID")


async def test_all_events_from_now_on(served: Served) -> None:
    await served.add("t")
    await served.store.append([printed("t", "before\n")])
    async with served.viewer.stream("GET", "/v1/events/live?kind=output") as stream, asyncio.timeout(PATIENCE_SECONDS):
        lines = stream.aiter_lines()
        assert [await anext(lines), (await anext(lines)).partition(":")[0]] == [": open", "id"]
        await served.store.append([printed("t", "after\n")])
        async for _, _, data in sse(lines):
            assert data["data"]["text"] == "after\n"
            break


async def test_output_as_text(served: Served) -> None:
    await served.add("t")
    get = served.viewer.get
    await served.store.append(
        [printed("t", "on"), printed("t", "warn\r", stream="stderr"), printed("t", "e\ntwo\x1b[31m\n<b>"),
         printed("t", "\nnext\n", stream="stderr")]
    )  # fmt: skip
    answer = await get("/v1/tickets/t/output")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text == "one\ntwo\N{REPLACEMENT CHARACTER}[31m\nwarn\nnext\n<b>\n"
    assert (await get("/v1/tickets/t/output?stream=stderr")).text == "warn\nnext\n"
    newest = await served.store.last_event("t")
    assert (await get(f"/v1/tickets/t/output?after={newest}")).text == ""
    follows = asyncio.create_task(get(f"/v1/tickets/t/output?follow=true&after={newest}"))
    await get("/v1/tickets/t")
    await served.store.append([printed("t", "last, without an end")])
    await served.store.cancel("t", "ann")
    assert (await follows).text == "last, without an end\n"
    refused(await get("/v1/tickets/t/output?stream=both"), 400, "stream")


async def test_a_pause_ends_with_the_server(served: Served) -> None:
    feed = Feed(served.store)
    paused = asyncio.create_task(feed.pause(3600))
    await asyncio.sleep(0)
    feed.close()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await paused
        await feed.pause(3600)  # one that begins too late for the news
