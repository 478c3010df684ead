"""A Messages API that answers by a script, request by request, faults included. Real HTTP, no model.

Each answer of the script is a dict: ``text`` and ``calls`` ({name, input} of tools) make a message, ``stop`` its stop
reason, ``input_tokens`` what it says that it read; ``status`` (with ``type``, ``message``, ``headers``) makes an error
instead. ``fault`` spoils a streamed message:

    overloaded   an error event in its middle
    torn         the connection breaks in its middle
    cut          the last tool call's input ends in its middle, as when max_tokens is reached
    held         it never ends

The last answer is given again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.serving import serving

Answer = dict[str, Any]
INPUT_TOKENS, OUTPUT_TOKENS = 1000, 100  # of every answer


@dataclass
class ScriptedApi:
    """``seen``: the parsed body of every request. ``url`` is set while it serves."""

    script: Sequence[Answer]
    key: str = "token"
    seen: list[dict[str, Any]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # what else was asked for
    url: str = ""
    held: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[ScriptedApi]:
        async with serving(self._serve, handler_cancellation=True) as self.url:
            yield self

    @property
    def last_result(self) -> str:
        """What the last request says of a tool."""
        return json.dumps(self.seen[-1]["messages"][-1])

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/v1/messages":
            self.others.append(f"{request.method} {request.path}")
            return _error({"status": 404, "type": "not_found_error", "message": "no such path"})
        if self.key not in (request.headers.get("x-api-key"), request.headers.get("authorization", "")[7:]):
            return _error({"status": 401, "type": "authentication_error", "message": "invalid x-api-key"})
        number = len(self.seen)
        self.seen.append(json.loads(await request.read()))
        answer = self.script[min(number, len(self.script) - 1)]
        return _error(answer) if "status" in answer else await self._message(request, number, answer)

    async def _message(self, request: web.Request, number: int, answer: Answer) -> web.StreamResponse:
        asked = self.seen[number]
        calls = [
            {"type": "tool_use", "id": f"toolu_{number}_{i}", **one} for i, one in enumerate(answer.get("calls", ()))
        ]
        blocks = [*([{"type": "text", "text": answer["text"]}] if "text" in answer else []), *calls]
        stop = answer.get("stop", "tool_use" if calls else "end_turn")
        usage = {"input_tokens": answer.get("input_tokens", INPUT_TOKENS), "output_tokens": OUTPUT_TOKENS}
        message = {
            "id": f"msg_{number}", "type": "message", "role": "assistant", "model": asked["model"], "content": blocks,
            "stop_reason": stop, "stop_sequence": None, "usage": usage,
        }  # fmt: skip
        if not asked.get("stream"):
            return web.json_response(message)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def send(kind: str, **fields: Any) -> None:
            await response.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode())

        fault = answer.get("fault")
        begun = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
        await send("message_start", message=begun)
        for index, block in enumerate(blocks):
            if block["type"] == "text":
                await send("content_block_start", index=index, content_block={"type": "text", "text": ""})
                delta = {"type": "text_delta", "text": block["text"]}
            else:
                await send("content_block_start", index=index, content_block={**block, "input": {}})
                given = json.dumps(block["input"])
                given = given[: len(given) // 2] if fault == "cut" and block is blocks[-1] else given
                delta = {"type": "input_json_delta", "partial_json": given}
            await send("content_block_delta", index=index, delta=delta)
            if fault == "overloaded":
                await send("error", error={"type": "overloaded_error", "message": "Overloaded"})
                return response
            if fault == "torn":
                assert request.transport is not None
                request.transport.abort()
                return response
            if fault == "held":
                self.held.set()
                await asyncio.Event().wait()
            await send("content_block_stop", index=index)
        await send(
            "message_delta", delta={"stop_reason": stop, "stop_sequence": None}, usage={"output_tokens": OUTPUT_TOKENS}
        )
        await send("message_stop")
        return response


def _error(answer: Answer) -> web.Response:
    error = {"type": answer.get("type", "api_error"), "message": answer.get("message", "a fault")}
    return web.json_response(
        {"type": "error", "error": error}, status=answer["status"], headers=answer.get("headers", {})
    )
