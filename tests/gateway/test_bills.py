"""What is booked is what the service bills, or is marked as estimated: a table of answers, byte by byte.

Each row is what a service sends. The service is a plain socket, so that answers can break off anywhere; the gateway is
the real one, in its process, with a real database.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from swarm.gateway.policy import Policy
from tests.conftest import PATIENCE_SECONDS
from tests.gateway.conftest import Harness

HAIKU, OPUS = "claude-haiku-4-5", "claude-opus-5"  # $1 and $5, $5 and $25 for 10^6 tokens in and out
PROMPT = "Write a haiku. " * 20
WORDS = ["Clocks drift far apart, ", "one node waits, ", "another writes; ", "the log heals them all."]
GEO = 1.1


def usd(model: str = HAIKU, factor: float = 1, searches: int = 0, **tokens: int) -> float:
    """By the published list: reads from the cache cost a tenth of input, writes 1.25 times, for an hour twice."""
    plain, made = {HAIKU: (1, 5), OPUS: (5, 25)}[model]
    per = {"input": plain, "output": made, "read": plain / 10, "write": plain * 1.25, "write_1h": plain * 2}
    return sum(count * per[kind] for kind, count in tokens.items()) * factor / 1e6 + searches * 0.01


# --- what services send -----------------------------------------------------------------------------------------------


def usage(prompt: Any = 40, output: Any = 30, **more: Any) -> dict[str, Any]:
    return {"input_tokens": prompt, "output_tokens": output, **more}


def message(usage: Any, **more: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "".join(WORDS)}]
    found = {
        "id": "m",
        "type": "message",
        "model": HAIKU,
        "content": content,
        "stop_reason": "end_turn",
        "usage": usage,
    }
    return {name: value for name, value in {**found, **more}.items() if value is not None}


def whole(body: Any, status: int = 200, *, cut: int = 0, headers: str = "") -> bytes:
    """``cut``: so many bytes are missing at its end."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Status\r\ncontent-type: application/json\r\n{headers}content-length: {len(data)}\r\n\r\n"
    return head.encode() + data[: len(data) - cut]


def sse(*events: Any, ended: bool = True, line_end: str = "\n") -> bytes:
    """``ended``: does the answer end in order?"""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    data = b""
    for event in events:
        text = event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".replace("\n", line_end).encode()
        data += b"%x\r\n%s\r\n" % (len(text), text)
    return head + data + (b"0\r\n\r\n" if ended else b"")


def start(usage: Any = None) -> dict[str, Any]:
    begun = {"input_tokens": 40, "output_tokens": 1} if usage is None else usage
    return {"type": "message_start", "message": {**message(begun), "content": [], "stop_reason": None}}


def said(text: str, kind: str = "text") -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": f"{kind}_delta", kind: text}}


def delta(usage: Any, stop: str | None = "end_turn") -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": usage}


TEXT = [said(word) for word in WORDS]
STOP = {"type": "message_stop"}
ERROR = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
SEARCH = {"type": "content_block_start", "content_block": {"type": "web_search_tool_result", "content": []}}
BLOCKED = {"type": "message", "error": {"type": "api_error", "message": "no"}}


def iteration(kind: str, model: str | None = None, **tokens: int) -> dict[str, Any]:
    zero = {"cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    return {"type": kind, **zero, **usage(tokens["input"], tokens["output"]), **({"model": model} if model else {})}


COMPACTED = usage(
    23_000,
    1_000,
    iterations=[iteration("compaction", input=180_000, output=3_500), iteration("message", input=23_000, output=1_000)],
)
ADVISED = usage(
    500,
    100,
    iterations=[
        iteration("message", HAIKU, input=500, output=100),
        iteration("advisor_message", OPUS, input=9_000, output=700),
    ],
)


def chat(usage: Any = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop"}
    return {"id": "c", "model": HAIKU, "choices": [choice], **({} if usage is None else {"usage": usage}), **more}


def chunk(text: str | None = None, *, finish: str | None = None, usage: Any = None, **more: Any) -> dict[str, Any]:
    choices = [] if usage is not None else [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    return {"id": "c", "model": HAIKU, "choices": choices, "usage": usage, **more}


def tokens(prompt: int = 40, output: int = 30, cached: int = 0, **more: Any) -> dict[str, Any]:
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output, **details, **more}


DONE = b"data: [DONE]\n\n"
CHAT_TEXT = [chunk(word) for word in WORDS]


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """``bill``: what the service bills (None: nobody can know), and what is booked unless ``estimated``. An estimate is
    between ``least`` and ``most`` USD."""

    answer: bytes
    bill: float | None = None
    estimated: bool = False
    least: float = 0.0
    most: float = 0.0
    stream: bool = False
    dialect: str = "anthropic"
    request: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 2000
    note: str = ""


def exact(answer: bytes, bill: float, **more: Any) -> Case:
    return Case(answer=answer, bill=bill, **more)


def guess(answer: bytes, least: float, most: float, **more: Any) -> Case:
    return Case(answer=answer, estimated=True, least=least, most=most, **more)


def streamed(*events: Any, ended: bool = True) -> dict[str, Any]:
    return {"answer": sse(*events, ended=ended), "stream": True}


COST = usd(input=40, output=30)
# The prompt by its bytes (about 130 tokens, at most 400), and what came: each in the middle of a wide range.
ASKED = {"least": usd(input=100), "most": usd(input=500)}
# A prompt of 40 tokens that was reported, and the words that came, or at least 64 tokens.
BROKEN = {"least": usd(input=40, output=4), "most": usd(input=40, output=70)}
ALL = {"least": usd(output=2000), "most": usd(input=500, output=2000)}

# What the gateway asks nobody for, and doesn't undo: it sees neither a usage nor its key in it.
PACKED = (
    "content-encoding: x-gzip",
    "content-encoding: compress",
    "content-encoding: gzip, gzip",
    "content-encoding: gzip , identity",
    "content-encoding: identity\r\ncontent-encoding: gzip",
)

CASES: dict[str, Case] = {
    # whole
    "whole": exact(whole(message(usage())), COST),
    "whole, of a dated model": exact(whole(message(usage(), model=f"{HAIKU}-20251001")), COST),
    "whole, of a model without a price": exact(whole(message(usage(), model="my-alias")), COST),
    "whole, by another model than asked": exact(whole(message(usage(), model=OPUS)), usd(OPUS, input=40, output=30)),
    "gzip": exact(
        whole(gzip.compress(json.dumps(message(usage())).encode()), headers="content-encoding: gzip\r\n"), COST
    ),
    "whole, behind a byte order mark": exact(whole(b"\xef\xbb\xbf" + json.dumps(message(usage())).encode()), COST),
    "whole, not quite UTF-8": exact(whole(json.dumps(message(usage())).encode().replace(b"Clocks", b"\xff")), COST),
    "control characters in its head": exact(whole(message(usage()), headers="x-a: a\x01\x7fb\r\n"), COST),
    **{
        f"packed as {packed.strip()!r}": guess(
            whole(gzip.compress(json.dumps(message(usage())).encode()), headers=f"{packed}\r\n"), note="none", **ALL
        )
        for packed in PACKED
    },
    "no output": exact(whole(message(usage(output=0), content=[])), usd(input=40)),
    "cache read": exact(whole(message(usage(cache_read_input_tokens=900))), COST + usd(read=900)),
    "cache write": exact(whole(message(usage(cache_creation_input_tokens=800))), COST + usd(write=800)),
    "cache writes of both kinds": exact(
        whole(
            message(
                usage(
                    cache_creation_input_tokens=800,
                    cache_creation={"ephemeral_5m_input_tokens": 300, "ephemeral_1h_input_tokens": 500},
                )
            )
        ),
        COST + usd(write=300, write_1h=500),
    ),
    "cache write told by kind only": exact(
        whole(message(usage(cache_creation={"ephemeral_1h_input_tokens": 500}))), COST + usd(write_1h=500)
    ),
    "thinking": exact(
        whole(message(usage(output=900, output_tokens_details={"thinking_tokens": 870}))), usd(input=40, output=900)
    ),
    "web searches": exact(whole(message(usage(server_tool_use={"web_search_requests": 3}))), COST + 0.03),
    "web fetches cost tokens only": exact(whole(message(usage(server_tool_use={"web_fetch_requests": 3}))), COST),
    "compaction": exact(whole(message(COMPACTED)), usd(input=203_000, output=4_500)),
    "advisor": exact(whole(message(ADVISED)), usd(input=500, output=100) + usd(OPUS, input=9_000, output=700)),
    "fallback": exact(
        whole(
            message(
                usage(
                    70,
                    30,
                    iterations=[
                        iteration("message", HAIKU, input=40, output=5),
                        iteration("fallback_message", OPUS, input=70, output=30),
                    ],
                ),
                model=OPUS,
            )
        ),
        usd(input=40, output=5) + usd(OPUS, input=70, output=30),
    ),
    "no iterations": exact(whole(message(usage(iterations=[]))), COST),
    "iterations null": exact(whole(message(usage(iterations=None))), COST),
    "inference_geo of the answer": exact(
        whole(
            message(usage(inference_geo="us", cache_read_input_tokens=900, server_tool_use={"web_search_requests": 1}))
        ),
        usd(input=40, output=30, read=900, factor=GEO, searches=1),
    ),
    "inference_geo of request and answer": exact(
        whole(message(usage(inference_geo="us"))), usd(input=40, output=30, factor=GEO), request={"inference_geo": "us"}
    ),
    "inference_geo not told": exact(
        whole(message(usage())), usd(input=40, output=30, factor=GEO), request={"inference_geo": "us"}
    ),
    "inference_geo global": exact(
        whole(message(usage(inference_geo="global", service_tier="standard", speed="standard"))), COST
    ),
    "asked for more than it got": exact(whole(message(usage(speed="standard"))), COST, request={"speed": "fast"}),
    "speed of the answer": guess(whole(message(usage(speed="fast"))), COST, COST, note="speed=fast"),
    "service_tier of the answer": guess(
        whole(message(usage(service_tier="priority"))), COST, COST, note="service_tier=priority"
    ),
    "speed and inference_geo": guess(
        whole(message(usage(speed="fast", inference_geo="us"))),
        usd(input=40, output=30, factor=GEO),
        usd(input=40, output=30, factor=GEO),
    ),
    # streamed
    "streamed": exact(bill=COST, **streamed(start(), *TEXT, delta(usage()), STOP)),
    "streamed with pings": exact(bill=COST, **streamed(start(), {"type": "ping"}, *TEXT, delta(usage()), STOP)),
    "streamed, only output at the end": exact(
        bill=COST, **streamed(start(), *TEXT, delta({"output_tokens": 30}), STOP)
    ),
    "streamed, input of 0 at the end": exact(bill=COST, **streamed(start(), *TEXT, delta(usage(0, 30)), STOP)),
    "streamed, all at the end": exact(bill=COST, **streamed(start({}), *TEXT, delta(usage()), STOP)),
    "streamed, usage told twice": exact(
        bill=COST, **streamed(start(), *TEXT, delta(usage(40, 9), None), delta(usage()), STOP)
    ),
    "streamed, less than its text": exact(
        bill=usd(input=40, output=2), **streamed(start(), *TEXT, delta(usage(40, 2)), STOP)
    ),
    "streamed, CRLF": exact(sse(start(), *TEXT, delta(usage()), STOP, line_end="\r\n"), COST, stream=True),
    "streamed, behind a byte order mark": exact(
        bill=usd(input=40, output=30, read=7),
        **streamed(
            b"\xef\xbb\xbfdata: %b\n\n" % json.dumps(start(usage(40, 1, cache_read_input_tokens=7))).encode(),
            *TEXT,
            delta({"output_tokens": 30}),
            STOP,
        ),
    ),
    "streamed, one event over several lines": exact(
        bill=COST,
        **streamed(
            start(),
            *TEXT,
            b"data: " + json.dumps(delta(usage()), indent=1).replace("\n", "\ndata: ").encode() + b"\n\n",
            STOP,
        ),
    ),
    "streamed, last event without its end": exact(
        bill=COST, **streamed(start(), *TEXT, f"data: {json.dumps(delta(usage()))}".encode())
    ),
    "streamed searches": exact(
        bill=COST + 0.02,
        **streamed(start(), SEARCH, SEARCH, *TEXT, delta(usage(server_tool_use={"web_search_requests": 2})), STOP),
    ),
    "streamed thinking": exact(
        bill=usd(input=40, output=500), **streamed(start(), said("hm", "thinking"), *TEXT, delta(usage(40, 500)), STOP)
    ),
    "streamed compaction": exact(
        bill=usd(input=203_000, output=4_500), **streamed(start(), *TEXT, delta(COMPACTED), STOP)
    ),
    "streamed caches": exact(
        bill=usd(input=40, output=30, read=7, write=5),
        **streamed(
            start(usage(40, 1, cache_read_input_tokens=7, cache_creation_input_tokens=5)),
            *TEXT,
            delta({"output_tokens": 30}),
            STOP,
        ),
    ),
    "streamed, us": exact(
        bill=usd(input=40, output=30, factor=GEO),
        **streamed(start(usage(40, 1, inference_geo="us")), *TEXT, delta({"output_tokens": 30}), STOP),
    ),
    # cut
    "closed without an answer": guess(b"", **ALL),
    "cut in the head": guess(b"HTTP/1.1 200 OK\r\ncontent-ty", **ALL),
    "cut in a stream's head": guess(
        b"HTTP/1.1 200 OK\r\ncontent-ty", usd(input=100, output=64), usd(input=500, output=64), stream=True
    ),
    "cut behind the head": guess(whole(message(usage()), cut=len(json.dumps(message(usage())))), **ALL),
    "cut in its text": guess(whole(message(usage()), cut=100), **ALL),
    "cut without a length": guess(
        b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"id"\r\n', **ALL
    ),
    "cut before message_start": guess(
        sse(ended=False), usd(input=100, output=64), usd(input=500, output=64), stream=True
    ),
    "cut after message_start": guess(sse(start(), ended=False), **BROKEN, stream=True),
    "cut between events": guess(sse(start(), *TEXT[:2], ended=False), **BROKEN, stream=True),
    "cut in an event": guess(
        sse(start(), *TEXT[:2], b'data: {"type": "content_bl', ended=False), **BROKEN, stream=True
    ),
    "cut after a cached prompt": guess(
        sse(start(usage(40, 1, cache_read_input_tokens=10_000)), *TEXT, ended=False),
        usd(input=40, read=10_000, output=4),
        usd(input=40, read=10_000, output=70),
        stream=True,
    ),
    "cut, and the prompt was not told": guess(
        sse(*TEXT, ended=False),
        usd(write=100),
        usd(write=500, output=70),
        stream=True,
        request={"system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]},
    ),
    "cut after two searches": guess(
        sse(start(), SEARCH, SEARCH, *TEXT[:1], ended=False), BROKEN["least"] + 0.02, BROKEN["most"] + 0.02, stream=True
    ),
    "cut after message_delta": exact(sse(start(), *TEXT, delta(usage()), ended=False), COST, stream=True),
    "cut after message_stop": exact(sse(start(), *TEXT, delta(usage()), STOP, ended=False), COST, stream=True),
    "cut after a message_delta that is not the last": guess(
        sse(start(), *TEXT, delta(usage(40, 9), None), ended=False), **BROKEN, stream=True
    ),
    "ended in order, in the middle": guess(**{**streamed(start(), *TEXT), **BROKEN}),
    "ended in order, without an event": guess(**{**streamed(), **ASKED}),
    # errors
    **{f"{status}": exact(whole(ERROR, status), 0) for status in (400, 401, 403, 404, 413, 429, 500, 502, 503, 529)},
    "400 that is no JSON": exact(whole(b"<html>", 400), 0),
    "500 cut": exact(whole(ERROR, 500, cut=9), 0),
    "400 with a usage": exact(whole({**ERROR, "usage": usage()}, 400), COST),
    "500 with a usage of 0": exact(whole({**ERROR, "usage": usage(0, 0)}, 500), 0),
    "a redirect": exact(whole(b"", 307, headers="location: http://127.0.0.1:9/\r\n"), 0),
    "200 with an error": exact(whole(BLOCKED), 0, note="the service answered with an error: api_error"),
    "200 with an error in text": exact(whole({"error": "rate limited"}), 0, note="rate limited"),
    "200 with an error and a usage": exact(whole({**BLOCKED, "usage": usage()}), COST),
    "a stream that is an error": exact(bill=0, **streamed(ERROR), note="overloaded_error"),
    "an error after 10,000 bytes": guess(
        sse(start(), *[said("word " * 100) for _ in range(20)], ERROR),
        usd(input=40, output=2000),
        usd(input=40, output=4000),
        stream=True,
        max_tokens=8000,
        note="overloaded_error",
    ),
    "an error behind the end": exact(bill=COST, **streamed(start(), *TEXT, delta(usage()), STOP, ERROR)),
    # usage that lies, or is missing
    "no usage": guess(whole(message(None)), usd(input=100, output=20), usd(input=300, output=200)),
    "no JSON": guess(whole(b'{"type": "message", "con'), usd(input=100), usd(input=300, output=50)),
    "usage without an input": guess(
        whole(message({"output_tokens": 30})), usd(input=100, output=30), usd(input=300, output=200)
    ),
    "usage without an output": guess(
        whole(message({"input_tokens": 40})), usd(input=40, output=20), usd(input=40, output=200)
    ),
    **{
        f"an output of {lie!r}": guess(
            whole(message(usage(output=lie))), usd(input=40, output=20), usd(input=40, output=200)
        )
        for lie in (-5, 10**30, "30", 30.5, float("nan"), float("inf"), True, [30], {"a": 1})
    },
    **{
        f"an input of {lie!r}": guess(
            whole(message(usage(prompt=lie))), usd(input=100, output=30), usd(input=300, output=200)
        )
        for lie in (-5, 10**30, "40", float("nan"), False)
    },
    "an output of 30.0": exact(whole(message(usage(output=30.0))), COST),
    "a negative cache": guess(whole(message(usage(cache_read_input_tokens=-9))), COST, COST, note="can't be right"),
    "iterations that are less than the whole": guess(
        whole(message(usage(900, 80, iterations=[iteration("message", input=40, output=30)]))),
        usd(input=900, output=80),
        usd(input=900, output=80),
    ),
    "iterations that are none": guess(whole(message(usage(iterations="two"))), COST, COST),
    "an iteration that is none": guess(whole(message(usage(iterations=[7]))), COST, COST),
    "a stream that says nothing": guess(
        **{**streamed(start({}), *TEXT, STOP), "least": usd(input=100, output=20), "most": usd(input=500, output=70)}
    ),
    # the other dialect
    "chat": exact(whole(chat(tokens())), COST, dialect="openai"),
    "chat, cached": exact(whole(chat(tokens(1_040, 30, cached=1_000))), COST + usd(read=1_000), dialect="openai"),
    "chat, reasoning is part of the output": exact(
        whole(chat(tokens(40, 30, completion_tokens_details={"reasoning_tokens": 25}))), COST, dialect="openai"
    ),
    "chat, reasoning beside the output": exact(
        whole(chat(tokens(40, 30, total_tokens=95, completion_tokens_details={"reasoning_tokens": 25}))),
        usd(input=40, output=55),
        dialect="openai",
    ),
    "chat, a total that nothing explains": guess(
        whole(chat(tokens(40, 30, total_tokens=95))),
        usd(input=40, output=55),
        usd(input=40, output=55),
        dialect="openai",
    ),
    "chat, more cached than there is": guess(
        whole(chat(tokens(40, 30, cached=1_000))), usd(read=40, output=30), usd(read=40, output=30), dialect="openai"
    ),
    "chat, at the usual tier": exact(whole(chat(tokens(), service_tier="default")), COST, dialect="openai"),
    "chat, at another tier": guess(
        whole(chat(tokens(), service_tier="priority")), COST, COST, dialect="openai", note="service_tier=priority"
    ),
    "chat, no usage": guess(whole(chat()), usd(input=100, output=20), usd(input=300, output=200), dialect="openai"),
    "chat, 200 with an error": exact(whole({"error": {"code": 502, "message": "no"}}), 0, dialect="openai"),
    "chat streamed": exact(
        bill=COST, dialect="openai", **streamed(*CHAT_TEXT, chunk(finish="stop"), chunk(usage=tokens()), DONE)
    ),
    "chat streamed, usage in each event": exact(
        bill=COST,
        dialect="openai",
        **streamed(
            *[{**one, "usage": tokens(40, n)} for n, one in enumerate(CHAT_TEXT)],
            {**chunk(finish="stop"), "usage": tokens()},
            DONE,
        ),
    ),
    "chat streamed, no reason for its end": exact(
        bill=COST, dialect="openai", **streamed(*CHAT_TEXT, chunk(usage=tokens()), DONE)
    ),
    "chat streamed, cut": guess(
        sse(*CHAT_TEXT, ended=False), usd(input=100, output=4), usd(input=500, output=70), stream=True, dialect="openai"
    ),
    "chat streamed, cut before its usage": guess(
        sse(*CHAT_TEXT, chunk(finish="stop"), ended=False),
        usd(input=100, output=4),
        usd(input=500, output=70),
        stream=True,
        dialect="openai",
    ),
    "chat streamed, cut after its usage": exact(
        sse(*CHAT_TEXT, chunk(finish="stop"), chunk(usage=tokens()), ended=False), COST, stream=True, dialect="openai"
    ),
    "chat streamed, an error": guess(
        sse(*CHAT_TEXT, {"error": {"message": "no", "code": 502}}, DONE),
        usd(input=100, output=4),
        usd(input=500, output=70),
        stream=True,
        dialect="openai",
    ),
}


# --- the service ------------------------------------------------------------------------------------------------------


class Service:
    """Answers a request with that of ``answers`` which its header `x-case` names, and closes the connection, except
    after `keep`. ``served``: how many requests it has read."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.url = ""
        self.served = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Service]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self
        finally:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                if (first := await reader.readexactly(1)) != b"P":  # TLS, not POST
                    break
                head = (first + await reader.readuntil(b"\r\n\r\n")).decode().lower()
                lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
                await reader.readexactly(int(lines["content-length"]))
                self.served += 1
                writer.write(self.answers[lines["x-case"]])
                await writer.drain()
                if lines["x-case"] != "keep":
                    break
        writer.close()


async def post(session: aiohttp.ClientSession, env: dict[str, str], name: str, case: Case) -> bytes:
    body = {
        "model": HAIKU,
        "max_tokens": case.max_tokens,
        "messages": [{"role": "user", "content": PROMPT}],
        **case.request,
    }
    body |= {"stream": True} if case.stream else {}
    anthropic = case.dialect == "anthropic"
    url = f"{env['ANTHROPIC_BASE_URL']}/v1/messages" if anthropic else f"{env['OPENAI_BASE_URL']}/chat/completions"
    headers = {"x-api-key": env["ANTHROPIC_API_KEY"], "x-case": name}
    sent = io.BytesIO(json.dumps(body).encode())
    with contextlib.suppress(aiohttp.ClientError):  # of answers that break off
        async with session.post(url, data=sent, headers=headers, allow_redirects=False) as answer:
            return await answer.read()
    return b""


@asynccontextmanager
async def calling(harness: Harness, service: Service) -> AsyncIterator[Callable[..., Any]]:
    """A function that makes a call; the bookings come in the order of the calls."""
    async with AsyncExitStack() as stack:
        policy = Policy(upstreams=("anthropic", "openai"))
        made = harness.listener(await harness.claim(), policy, base_url=service.url)
        listener = await stack.enter_async_context(made)
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def call(name: str, case: Case) -> bytes:
            before = len(harness.sql("SELECT 1 FROM model_calls"))
            answer = await post(session, listener.env, name, case)
            try:
                await harness.booked(before + 1)
            except TimeoutError:
                raise AssertionError(f"nothing was booked: {case}, answered {answer!r}, {harness.events}") from None
            return answer

        yield call


async def test_what_is_booked_is_what_is_billed_or_is_marked(harness: Harness) -> None:
    wrong = []
    async with Service().serving() as service, calling(harness, service) as call:
        for number, case in enumerate(CASES.values()):
            service.answers[str(number)] = case.answer
            await call(str(number), case)
        events = [event.data for event in await harness.store.events("t") if event.kind == "model_call"]
    rows = harness.sql("SELECT id, cost_usd, note FROM model_calls ORDER BY at, rowid")
    by_id = {str(event["call"]): event for event in events}
    assert len(rows) == len(CASES) >= 60
    for (id, cost, note), (name, case) in zip(rows, CASES.items(), strict=True):
        marked = by_id[id].get("estimated", False)
        thought = usd(output=1) * 0.3 * float(str(by_id[id]["latency_ms"]))  # 300 tokens a second, which nobody sees
        right = (
            case.least * 0.999999 <= cost <= case.most * 1.000001 + thought
            if case.bill is None
            else cost == pytest.approx(case.bill)
        )
        if (
            not right
            or marked != case.estimated
            or case.note not in (note or "")
            or marked != (note or "").startswith("estimated")
        ):
            wrong.append(f"{name}: booked {cost}, {marked=}, {note=}; wanted {case.bill or (case.least, case.most)}")
    assert not wrong, "\n".join(wrong)


async def test_an_answer_that_costs_nothing_counts_as_failed(harness: Harness) -> None:
    """Of failed calls there is a limit, since each makes a row."""
    paid, free = whole(message(usage())), whole(BLOCKED)
    async with (
        Service().serving() as service,
        harness.listener_here(await harness.claim(), base_url=service.url) as listener,
        aiohttp.ClientSession() as session,
    ):
        for number, (answer, failed) in enumerate([(paid, 0), (free, 1), (paid, 1), (free, 2)], 1):
            service.answers[str(number)] = answer
            await post(session, listener.env, str(number), exact(answer, 0))
            await harness.booked(number)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while listener.calls:
                    await asyncio.wait(listener.calls)
            assert listener.failed_calls == failed


# --- calls that never get an answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base_url",
    [
        "http://127.0.0.1:9",  # refused
        "http://no-such-name.invalid",
        "https://{address}",  # no TLS there
    ],
)
async def test_what_was_never_sent_costs_nothing(harness: Harness, base_url: str) -> None:
    async with Service().serving() as service:
        url = base_url.format(address=service.url.removeprefix("http://"))
        made = harness.listener(await harness.claim(), Policy(upstreams=("anthropic", "openai")), base_url=url)
        async with made as listener, aiohttp.ClientSession() as session:
            answer = await post(session, listener.env, "x", CASES["whole"])
            assert b"can't be reached" in answer
            [(status, tokens, cost, note)] = await harness.booked(1)
        assert (status, tokens, cost, service.served) == (0, 0, 0.0, 0)
        assert not note.startswith("estimated")


async def test_a_request_that_was_sent_in_part_costs_nothing(harness: Harness) -> None:
    """The service hangs up before it has read all of it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    made = harness.listener(await harness.claim(), Policy(upstreams=("anthropic", "openai")), base_url=url)
    large = Case(answer=b"", request={"system": "x" * 20_000_000})
    async with server, made as listener, aiohttp.ClientSession() as session:
        assert b"can't be reached" in await post(session, listener.env, "x", large)
        [(status, tokens, cost, _)] = await harness.booked(1)
    assert (status, tokens, cost) == (0, 0, 0.0)


async def test_a_kept_connection_that_the_service_had_closed(harness: Harness) -> None:
    """The service did not get the call; the client's next try is billed, and this one is not, but marked."""
    kept = Case(answer=b"", max_tokens=100_000)
    async with Service().serving() as service, calling(harness, service) as call:
        service.answers |= {"keep": whole(message(usage())), "close": b"", "again": whole(message(usage()))}
        await call("keep", kept)
        assert b"can't be reached" in await call("close", kept)
        await call("again", kept)
        rows = harness.sql("SELECT cost_usd, note FROM model_calls ORDER BY at, rowid")
    assert [cost for cost, _ in rows] == pytest.approx([COST, 0, COST])
    assert rows[1][1].startswith("estimated: the service had closed the connection before the call")


async def test_prices_that_nobody_can_pay_are_booked_too(harness: Harness) -> None:
    """What a service says never breaks the engine's books, or the process of the gateway."""
    most = whole(
        message(
            {**usage(10**8, 10**8), "cache_read_input_tokens": 10**8, "server_tool_use": {"web_search_requests": 10**8}}
        )
    )
    async with Service().serving() as service, calling(harness, service) as call:
        service.answers |= {"0": most, "1": whole(message(usage()))}
        pid = harness.gateway.pid
        await call("0", CASES["whole"])
        await call("1", CASES["whole"])
        assert harness.gateway.pid == pid
    assert harness.sql("SELECT round(cost_usd) FROM model_calls ORDER BY at") == [(1_000_610.0,), (0.0,)]


async def test_an_estimate_is_seen_by_whoever_asks_what_was_spent(harness: Harness) -> None:
    async with Service().serving() as service, calling(harness, service) as call:
        for name in ("whole", "cut after message_start"):
            service.answers[name.split()[0]] = CASES[name].answer
            await call(name.split()[0], CASES[name])
    [(guessed,)] = harness.sql("SELECT cost_usd FROM model_calls WHERE note LIKE 'estimated:%'")

    async def swarm(*words: str) -> str:
        home, database = ("--home", str(harness.dir)), {"SWARM_DATABASE_URL": f"sqlite:///{harness.database}"}
        argv = [sys.executable, "-m", "swarm.cli.main", *words, *home]
        env = {**os.environ, **database}
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=300, env=env)
        return done.stdout + done.stderr

    assert f"estimated: 1 call (${guessed:.4f})" in await swarm("cost")
    assert f"estimated: 1 model call (${guessed:.4f})" in await swarm("ticket", "show", "t")
    [row] = json.loads(await swarm("cost", "--by", "ticket", "--json"))
    assert (row["estimated_calls"], row["estimated_usd"]) == (1, pytest.approx(guessed))
    assert json.loads(await swarm("ticket", "show", "t", "--json"))["estimated"]["calls"] == 1


async def test_no_request_is_too_large_for_the_books(harness: Harness) -> None:
    """A guest asks for as much as a request may. To the engine, that is no reason to end the gateway of all others."""
    async with Service().serving() as service, calling(harness, service) as call:
        service.answers["0"] = whole(chat(tokens()))
        pid = harness.gateway.pid
        most = Case(answer=b"", dialect="openai", request={"n": 1000, "max_completion_tokens": 10**9})
        assert json.loads(await call("0", most))["usage"] == tokens()
        assert harness.gateway.pid == pid
    assert harness.sql("SELECT cost_usd FROM model_calls") == [(pytest.approx(COST),)]
