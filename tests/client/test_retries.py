"""What is sent again, and what is not: what may have been done is done once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from swarm.client import (
    AsyncSwarm,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    RateLimited,
    ServerError,
    Swarm,
    SwarmError,
    Unauthorized,
    Unreachable,
)
from tests.client.faulty import CUT, DROP, SILENCE, Answer, faulty

TICKET = {"id": "t", "state": "ready", "title": "x", "what a newer server says": {"more": 1}}
BUSY = Answer(503, {"detail": "the database is locked"}, {"Retry-After": "0"})
FULL = Answer(429, {"detail": "too many requests: slow down"}, {"Retry-After": "0"})
FOUND = Answer(200, {"ticket": TICKET})
DONE = Answer(200, TICKET)
GONE = Answer(404, {"detail": "no ticket t"})


async def ask(s: AsyncSwarm) -> Any:
    return (await s.request("GET", "/v1/x", query={"a": [1, 2], "b": None}))["id"]


async def change(s: AsyncSwarm) -> Any:
    return (await s.request("POST", "/v1/x", body={"a": 1}))["id"]


Act = Callable[[AsyncSwarm], Awaitable[Any]]


async def show(s: AsyncSwarm) -> Any:
    return (await s.tickets.get("t")).state


async def submit(s: AsyncSwarm) -> Any:
    return (await s.tickets.submit("echo")).state


async def cancel(s: AsyncSwarm) -> Any:
    return (await (await s.tickets.get("t")).cancel()).state


async def approve(s: AsyncSwarm) -> Any:
    return (await (await s.tickets.get("t")).approve()).state


async def delete(s: AsyncSwarm) -> Any:
    return await (await s.tickets.get("t")).delete()


@pytest.mark.parametrize(
    ("act", "plan", "requests", "outcome"),
    [
        (show, [DROP, CUT, BUSY, FULL, FOUND], 5, "ready"),
        (show, [SILENCE, FOUND], 2, "ready"),
        (submit, [DROP, CUT, BUSY, FULL, Answer(201, TICKET)], 5, "ready"),
        (submit, [SILENCE, Answer(201, TICKET)], 2, "ready"),
        (cancel, [FOUND, DROP, BUSY, DONE], 4, "ready"),
        # The server refused it at once: it wasn't done.
        (approve, [FOUND, FULL, FULL, DONE], 4, "ready"),
        # It may have been done: the caller decides.
        (approve, [FOUND, DROP, DONE], 2, Unreachable),
        (approve, [FOUND, CUT, DONE], 2, Unreachable),
        (approve, [FOUND, SILENCE, DONE], 2, Unreachable),
        (approve, [FOUND, BUSY, DONE], 2, ServerError),
        (delete, [FOUND, Answer(204, b"")], 2, None),
        (delete, [FOUND, DROP, GONE], 3, None),  # the first try did it
        (delete, [FOUND, GONE], 2, NotFound),
        (delete, [FOUND, FULL, GONE], 3, NotFound),
        (ask, [DROP, BUSY, DONE], 3, "t"),
        (change, [FULL, DONE], 2, "t"),
        (change, [DROP, DONE], 1, Unreachable),
        # Nothing becomes better by asking again.
        (show, [Answer(403, {"detail": "ci is viewer"})], 1, Forbidden),
        (show, [GONE], 1, NotFound),
        (show, [Answer(409, {"detail": "it is done"})], 1, Conflict),
        (show, [Answer(413, {"detail": "too large"})], 1, Invalid),
        (show, [Answer(500, {"detail": "an internal error"})], 1, ServerError),
        (show, [Answer(200, b"<html>")], 1, ServerError),
        (show, [Answer(404, b"<html>no such page")], 1, NotFound),
        (show, [Answer(400, [1])], 1, Invalid),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_what_is_sent_again(act: Act, plan: list[Any], requests: int, outcome: Any) -> None:
    try:
        await is_sent_again(act, plan, requests, outcome, seconds=1.0 if SILENCE in plan else 60.0)
    except (AssertionError, pytest.fail.Exception, SwarmError):
        if SILENCE not in plan:
            raise
        await is_sent_again(act, plan, requests, outcome, seconds=20.0)  # a busy machine is silent for a second, too


async def is_sent_again(act: Act, plan: list[Any], requests: int, outcome: Any, *, seconds: float) -> None:
    async with faulty(plan) as server, AsyncSwarm(server.url, timeout_seconds=seconds, retry_seconds=600) as s:
        if isinstance(outcome, type):
            with pytest.raises(outcome) as raised:
                await act(s)
            last = plan[-1]
            if isinstance(last, Answer) and isinstance(last.body, dict) and "detail" in last.body:
                error = raised.value
                assert isinstance(error, SwarmError) and error.status == last.status
                assert str(error) == last.body["detail"]
            if isinstance(raised.value, Unreachable):
                assert raised.value.may_be_done and "nobody knows" in str(raised.value)
        else:
            assert await act(s) == outcome
    assert len(server.requests) == requests
    sent = [headers.get("idempotency-key") for line, headers, _ in server.requests if line == "POST /v1/tickets"]
    assert len(set(sent)) <= 1 and None not in sent, "all tries of a submission have one key"


async def test_each_submission_has_a_key_of_its_own() -> None:
    async with faulty([Answer(201, TICKET)]) as server, AsyncSwarm(server.url) as s:
        await s.tickets.submit("echo")
        await s.tickets.submit("echo")
        await s.tickets.submit("echo", key="mine")
    first, second, third = [headers["idempotency-key"] for _, headers, _ in server.requests]
    assert first != second and third == "mine"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (FULL, RateLimited),
        (BUSY, ServerError),
        (DROP, Unreachable),
        (Answer(503, {"detail": "later"}, {"Retry-After": "9999999999999999999999"}), ServerError),
    ],
    ids=["429", "503", "drop", "never"],
)
async def test_it_ends(answer: Any, kind: type[SwarmError]) -> None:
    async with faulty([answer]) as server, AsyncSwarm(server.url, retry_seconds=0.5) as s:
        with pytest.raises(kind):
            await s.tickets.get("t")
    assert 1 <= len(server.requests) <= 4


async def test_without_a_token() -> None:
    async with faulty([Answer(401, {"detail": "who asks?"})]) as server, AsyncSwarm(server.url) as s:
        with pytest.raises(Unauthorized, match="SWARM_TOKEN"):
            await s.tickets.get("t")
    async with faulty([Answer(401, {"detail": "who asks?"})]) as server, AsyncSwarm(server.url, token="wrong") as s:
        with pytest.raises(Unauthorized, match="who asks"):
            await s.tickets.get("t")


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

    def ask() -> None:
        with Swarm(url, retry_seconds=3600) as s:
            s.tickets.get("t")

    # Long before that: it never answered, so it isn't running.
    with pytest.raises(Unreachable, match="is `swarm serve` running there") as raised:
        await asyncio.to_thread(ask)
    assert not raised.value.may_be_done


async def test_output_goes_on_where_its_connection_broke() -> None:
    """Each piece once, whatever part of a line came; and one that is silent is listened to again."""
    box = Answer(200, {"id": "b", "state": "running"})
    lines = [
        b'{"dropped_bytes":3}\n', b'{"stream":"stdout","offset":5,"data":"aGk="}\n',
        b'{"stream":"stderr","offset":7,"data":"b28="}\n', b'{"exit":{"code":4,"started_ns":1,"ended_ns":2000001}}\n',
    ]  # fmt: skip

    def cut(*parts: bytes) -> bytes:
        return b"HTTP/1.1 200 X\r\nContent-Length: 1000\r\n\r\n" + b"".join(parts)

    plan: list[Answer | str | bytes] = [
        box,
        cut(*lines[:2], lines[2][:20]),
        DROP,
        SILENCE,
        BUSY,
        Answer(200, b"".join(lines[1:])),
    ]
    async with faulty(plan) as server, AsyncSwarm(server.url, retry_seconds=30, timeout_seconds=0.2) as s:
        running = await (await s.sandboxes.get("b")).attach("p")
        running._outputs.silent_seconds = 0.2
        heard = [(piece.stream, piece.text) async for piece in running.output()]
        assert heard == [("stdout", "hi"), ("stderr", "oo")]
        ended = await running.wait()
        assert (ended.process, ended.code, ended.ms, running.dropped_bytes, running.after) == ("p", 4, 2.0, 3, 7)
        assert [first.partition("after=")[2][:1] for first, _, _ in server.requests[1:]] == ["0", "5", "5", "5", "5"]
    async with faulty([box, Answer(200, b'{"stream": 1}\n')]) as server, AsyncSwarm(server.url) as s:
        with pytest.raises(ServerError, match="not JSON of output"):
            await (await (await s.sandboxes.get("b")).attach("p")).wait()
