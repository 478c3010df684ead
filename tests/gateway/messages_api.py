"""A server that speaks the Messages API: what the gateway forwards to in tests and benchmarks. Real HTTP, no model.

What it answers is chosen by words in the last message, ``scenario=NAME`` and ``KEY=NUMBER``:

    haiku (default)   a haiku, or ``words=N`` words, ``delay=SECONDS`` between chunks
    tool              asks for the first tool of the request, until a tool_result is among the messages
    script            the tool calls of ``script=JSON``, a list for each turn ([{name, input}, …]), then a haiku; in
                      place of a list ``{"status": N, "times": N, "then": […]}`` is a turn that fails first, or for ever
    429 529 500       an error with its headers; ``times=N``: so often, then a haiku
    cut               a stream that breaks off in its middle
    silent            never answers
    malformed         200, and a body that is no JSON
    hold              a haiku, when `release` is set
    half              the first half of an answer in one piece, and the rest when `release` is set
    echo              an error that shows the key that was sent, in two pieces, the first with ``cut=N`` bytes of it
    stamped           each streamed word is the time when it was sent (ns, CLOCK_MONOTONIC)
    (any)             ``searches=N``, ``read=N``, ``written=N``: what its usage says of these
    long              says that its output is ``output=N`` tokens (if ``max_tokens`` allows it), whatever it sent

``python -m tests.gateway.messages_api --key KEY --port-file FILE`` serves on loopback until killed. ``GET /_seen`` says
what came: for tests in other processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.serving import serving

HAIKU = "Clocks drift far apart\nOne node waits, another writes\nThe log heals them all"
ERRORS = {
    400: ("invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"),
    429: ("rate_limit_error", "slow down"),
    529: ("overloaded_error", "Overloaded"),
}
RATE_LIMITS = {
    "anthropic-ratelimit-requests-limit": "50",
    "anthropic-ratelimit-requests-remaining": "49",
    "anthropic-ratelimit-tokens-remaining": "19000",
}


@dataclass
class MessagesApi:
    """``seen``: path, headers and parsed body of every request. ``url`` is set while it serves."""

    key: str
    seen: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    held: asyncio.Event = field(default_factory=asyncio.Event)  # a request waits for `release`
    release: asyncio.Event = field(default_factory=asyncio.Event)
    step: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))  # the next word of `stepwise`
    _times: Counter[str] = field(default_factory=Counter)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[MessagesApi]:
        async with serving(self._serve, handler_cancellation=True) as self.url:
            yield self

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/_seen":
            return web.json_response(self.seen)
        body = await request.read()
        try:
            asked = json.loads(body) if body else {}
        except ValueError:
            asked = None
        self.seen.append(
            {
                "method": request.method,
                "path": request.path_qs,
                "headers": {n: ", ".join(request.headers.getall(n)) for n in request.headers},
                "body": asked,
            }
        )
        del self.seen[:-5000]
        if (
            request.headers.get("x-api-key") != self.key
            and request.headers.get("authorization") != f"Bearer {self.key}"
        ):
            return _error(401, "authentication_error", "invalid x-api-key")
        if request.path == "/v1/messages/count_tokens":
            return web.json_response({"input_tokens": len(body) // 4})
        if request.path.startswith("/v1/models"):
            return web.json_response({"data": [{"id": "claude-haiku-4-5", "type": "model"}], "has_more": False})
        if request.path == "/v1/chat/completions":
            return await self._chat(request, asked or {})
        if request.path != "/v1/messages" or not isinstance(asked, dict):
            return _error(404, "not_found_error", f"no such path: {request.path}")
        return await self._message(request, asked)

    async def _message(self, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        text = _last_text(asked)
        words = dict(re.findall(r"(\w+)=([\w.]+)", text))
        scenario = words.get("scenario", "haiku")
        if scenario in ("429", "529", "500"):
            self._times[text] += 1
            if self._times[text] <= int(words.get("times", "1000000")):
                return _refusal(scenario)
        if scenario == "hold":
            self.held.set()
            await self.release.wait()
        if scenario == "silent":
            await asyncio.sleep(3600)
        if scenario == "echo":
            return await self._echo(request, int(words["cut"]))
        if scenario == "malformed":
            return web.Response(body=b'{"type": "message", "content": [', content_type="application/json")
        if scenario == "script" and (status := self._fails(asked)):
            return _error(status, *ERRORS.get(status, ("api_error", "Internal server error")))
        blocks, stop = self._answer(asked, words, scenario)
        limit = asked.get("max_tokens", 1 << 30)
        if blocks[0]["type"] == "text" and sum(len(json.dumps(b)) for b in blocks) // 4 > limit:
            blocks, stop = [{**blocks[0], "text": blocks[0]["text"][: 4 * limit]}], "max_tokens"
        said = sum(len(json.dumps(b)) for b in blocks) // 4
        usage = {
            "input_tokens": max(1, len(json.dumps(asked.get("messages", []))) // 4),
            "output_tokens": min(int(words.get("output", said)), limit),
            "cache_creation_input_tokens": int(words.get("written", 0)),
            "cache_read_input_tokens": int(words.get("read", 0)),
            "server_tool_use": {"web_search_requests": int(words.get("searches", 0))},
        }
        message = {
            "id": "msg_test", "type": "message", "role": "assistant", "model": asked.get("model"), "content": blocks,
            "stop_reason": stop, "stop_sequence": None, "usage": usage,
        }  # fmt: skip
        if asked.get("stream") is True:
            return await self._stream(request, message, words, scenario)
        if scenario == "half":
            return await self._halves(request, json.dumps(message).encode())
        await asyncio.sleep(float(words.get("delay", 0)))
        return web.json_response(message, headers={**RATE_LIMITS, "request-id": "req_test"})

    async def _halves(self, request: web.Request, answer: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        response.content_length = len(answer)
        await response.prepare(request)
        await response.write(answer[: len(answer) // 2])
        self.held.set()
        await self.release.wait()
        await response.write(answer[len(answer) // 2 :])
        return response

    async def _echo(self, request: web.Request, cut: int) -> web.StreamResponse:
        said = f"you sent {self.key} and {self.key[:5]}".encode()
        response = web.StreamResponse(status=400, headers={"content-type": "text/plain", "x-seen": self.key})
        response.content_length = len(said)
        await response.prepare(request)
        at = len("you sent ") + cut
        await response.write(said[:at])
        await asyncio.sleep(0.05)  # so that it arrives in two pieces
        await response.write(said[at:])
        return response

    def _answer(self, asked: dict[str, Any], words: dict[str, str], scenario: str) -> tuple[list[dict[str, Any]], str]:
        answered = '"tool_result"' in json.dumps(asked.get("messages"))
        if scenario == "tool" and asked.get("tools") and not answered:
            name = asked["tools"][0]["name"]
            given = json.loads(_last_text(asked).partition("input=")[2] or "{}")
            return [{"type": "tool_use", "id": "toolu_test", "name": name, "input": given}], "tool_use"
        if scenario == "script":
            turn, now = _turn(asked)
            if now:
                calls = now["then"] if isinstance(now, dict) else now
                blocks = [{"type": "tool_use", "id": f"toolu_{turn}_{i}", **call} for i, call in enumerate(calls)]
                return [{"type": "text", "text": f"Turn {turn}."}, *blocks], "tool_use"
        count = int(words.get("words", 0))
        return [{"type": "text", "text": "word " * count if count else HAIKU}], "end_turn"

    def _fails(self, asked: dict[str, Any]) -> int:
        """The status with which this turn of a script fails, or 0."""
        turn, now = _turn(asked)
        if not isinstance(now, dict):
            return 0
        self._times[f"{turn} of {_last_text(asked)}"] += 1
        return 0 if self._times[f"{turn} of {_last_text(asked)}"] > now.get("times", 1_000_000) else int(now["status"])

    async def _stream(
        self, request: web.Request, message: dict[str, Any], words: dict[str, str], scenario: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={**RATE_LIMITS, "request-id": "req_test", "content-type": "text/event-stream"}
        )
        await response.prepare(request)

        async def send(kind: str, **fields: Any) -> None:
            await response.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode())

        usage = message["usage"]
        begun = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
        await send("message_start", message=begun)
        await send("ping")
        for index, block in enumerate(message["content"]):
            if block["type"] == "tool_use":
                await send("content_block_start", index=index, content_block={**block, "input": {}})
                pieces = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
            else:
                await send("content_block_start", index=index, content_block={"type": "text", "text": ""})
                pieces = [{"type": "text_delta", "text": word} for word in re.findall(r"\S+\s*", block["text"])]
            for number, piece in enumerate(pieces):
                if scenario == "stamped":
                    piece = {"type": "text_delta", "text": str(time.monotonic_ns())}
                await send("content_block_delta", index=index, delta=piece)
                if scenario == "cut" and number == len(pieces) // 2:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if scenario == "stepwise":
                    await self.step.acquire()
                if delay := float(words.get("delay", 0)):
                    await asyncio.sleep(delay)
            await send("content_block_stop", index=index)
        delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        await send("message_delta", delta=delta, usage={k: usage[k] for k in ("output_tokens", "server_tool_use")})
        await send("message_stop")
        return response

    async def _chat(self, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        """The other dialect."""
        usage = {"prompt_tokens": 20, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 5}}
        if asked.get("stream") is not True:
            choice = {"index": 0, "message": {"role": "assistant", "content": HAIKU}, "finish_reason": "stop"}
            return web.json_response({"id": "c", "model": asked["model"], "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        role = {"model": asked["model"], "choices": [{"index": 0, "delta": {"role": "assistant"}}]}
        await response.write(f"data: {json.dumps(role)}\n\n".encode())
        if "scenario=hold" in _last_text(asked):
            self.held.set()
            await self.release.wait()
        for word in HAIKU.split():
            chunk = {"model": asked["model"], "choices": [{"index": 0, "delta": {"content": word}}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        if (asked.get("stream_options") or {}).get("include_usage"):
            await response.write(
                f"data: {json.dumps({'model': asked['model'], 'choices': [], 'usage': usage})}\n\n".encode()
            )
        await response.write(b"data: [DONE]\n\n")
        return response


def _last_text(asked: dict[str, Any]) -> str:
    for message in asked.get("messages", []):  # the first of them: a conversation keeps its scenario
        content = message.get("content", "")
        return (
            content if isinstance(content, str) else " ".join(b.get("text", "") for b in content if isinstance(b, dict))
        )
    return ""


def _turn(asked: dict[str, Any]) -> tuple[int, Any]:
    """Which turn of its script a conversation is at, and what is there; None after the last."""
    turns, _ = json.JSONDecoder().raw_decode(_last_text(asked).partition("script=")[2])
    turn = sum(m["role"] == "assistant" for m in asked["messages"])
    return turn, turns[turn] if turn < len(turns) else None


def _refusal(scenario: str) -> web.Response:
    if scenario == "429":
        limits = {**RATE_LIMITS, "retry-after": "1", "anthropic-ratelimit-requests-remaining": "0"}
        return _error(429, "rate_limit_error", "slow down", **limits)
    if scenario == "529":
        return _error(529, "overloaded_error", "Overloaded")
    return _error(500, "api_error", "Internal server error")


def _error(status: int, kind: str, message: str, **headers: str) -> web.Response:
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_test"}
    return web.json_response(body, status=status, headers={"request-id": "req_test", **headers})


async def _main(key: str, port_file: Path) -> None:
    async with MessagesApi(key=key).serving() as api:
        partial = port_file.with_name(f".{port_file.name}")
        partial.write_text(api.url)
        partial.rename(port_file)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--key", required=True)
    parser.add_argument("--port-file", type=Path, required=True)
    given = parser.parse_args()
    asyncio.run(_main(given.key, given.port_file))
