"""A server that speaks OpenAI's dialects, Chat Completions and Responses, streamed or whole: for their real clients.

It answers with a call that runs the next command of ``script``, by how many the conversation has had, and then with a
haiku. The call is of the first tool of the request that runs commands; without tools, the command is in the text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.gateway.messages_api import HAIKU
from tests.serving import serving

INPUT_TOKENS, CACHED_TOKENS = 30, 10


@dataclass
class OpenAiApi:
    """``seen``: path, headers and parsed body of every request. ``used``: what was said of its tokens. ``ends``: how a
    response ends: completed, incomplete, failed."""

    key: str
    script: list[str] = field(default_factory=list)
    ends: str = "completed"
    seen: list[dict[str, Any]] = field(default_factory=list)
    used: list[dict[str, int]] = field(default_factory=list)
    url: str = ""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[OpenAiApi]:
        async with serving(self._serve) as self.url:
            yield self

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        asked = json.loads(body) if body else {}
        self.seen.append({"path": request.path_qs, "headers": dict(request.headers), "body": asked})
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "wrong key", "code": "invalid_api_key"}}, status=401)
        answer = {"/v1/responses": self._responses, "/v1/chat/completions": self._chat}.get(request.path)
        if answer is None:
            return web.json_response({"error": {"message": f"no such path: {request.path}"}}, status=404)
        return await answer(request, asked)

    def _command(self, items: list[Mapping[str, Any]], answered: str) -> str | None:
        """What this turn runs; None for a haiku."""
        turn = sum(answered in (item.get("type"), item.get("role")) for item in items)
        return self.script[turn] if turn < len(self.script) else None

    # --- Responses ----------------------------------------------------------------------------------------------------

    async def _responses(self, request: web.Request, asked: Mapping[str, Any]) -> web.StreamResponse:
        given = asked.get("input")
        command = self._command(given if isinstance(given, list) else [], "function_call_output")
        if command is None:
            text = {"type": "output_text", "text": HAIKU, "annotations": []}
            item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]}
        else:
            name, arguments = _tool_call(asked.get("tools") or [], command)
            item = {
                "type": "function_call", "id": "fc_1", "call_id": f"call_{len(self.seen)}", "name": name,
                "arguments": json.dumps(arguments), "status": "completed",
            }  # fmt: skip
        output_tokens = len(json.dumps(item)) // 4
        self.used.append({"input": INPUT_TOKENS, "output": output_tokens})
        usage = {
            "input_tokens": INPUT_TOKENS, "input_tokens_details": {"cached_tokens": CACHED_TOKENS},
            "output_tokens": output_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": INPUT_TOKENS + output_tokens,
        }  # fmt: skip
        begun = {
            "id": "resp_1", "object": "response", "created_at": 1, "status": "in_progress", "model": asked["model"],
            "output": [], "usage": None, "error": None, "incomplete_details": None, "instructions": None,
            "metadata": {}, "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto", "tools": [],
            "top_p": 1.0,
        }  # fmt: skip
        done = {**begun, "status": self.ends, "output": [item], "usage": usage}
        if self.ends == "incomplete":
            done["incomplete_details"] = {"reason": "max_output_tokens"}
        if self.ends == "failed":
            done["error"] = {"code": "server_error", "message": "The model failed"}
        if not asked.get("stream"):
            return web.json_response(done)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        number = 0

        async def send(kind: str, **fields: Any) -> None:
            nonlocal number
            event = {"type": f"response.{kind}", "sequence_number": number, **fields}
            number += 1
            await response.write(f"event: response.{kind}\ndata: {json.dumps(event)}\n\n".encode())

        await send("created", response=begun)
        await send("in_progress", response=begun)
        if command is None:
            place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
            await send("output_item.added", output_index=0, item={**item, "status": "in_progress", "content": []})
            await send("content_part.added", **place, part={**text, "text": ""})
            for word in HAIKU.split(" "):
                await send("output_text.delta", **place, delta=word + " ", logprobs=[])
            await send("output_text.done", **place, text=HAIKU, logprobs=[])
            await send("content_part.done", **place, part=text)
        else:
            await send("output_item.added", output_index=0, item={**item, "status": "in_progress", "arguments": ""})
            place = {"item_id": "fc_1", "output_index": 0}
            await send("function_call_arguments.delta", **place, delta=item["arguments"])
            await send("function_call_arguments.done", **place, arguments=item["arguments"], name=item["name"])
        await send("output_item.done", output_index=0, item=item)
        await send(self.ends, response=done)
        return response

    # --- Chat Completions ---------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request, asked: Mapping[str, Any]) -> web.StreamResponse:
        command = self._command(asked["messages"], "assistant")
        message: dict[str, Any] = {"role": "assistant", "content": HAIKU}
        if command is not None and asked.get("tools"):
            name, arguments = _tool_call(asked["tools"], command)
            function = {"name": name, "arguments": json.dumps(arguments)}
            call = {"index": 0, "id": f"call_{len(self.seen)}", "type": "function", "function": function}
            message |= {"content": None, "tool_calls": [call]}
        elif command is not None:
            message["content"] = f"THOUGHT: a command.\n\n```mswea_bash_command\n{command}\n```"
        output_tokens = len(json.dumps(message)) // 4
        self.used.append({"input": INPUT_TOKENS, "output": output_tokens})
        usage = {
            "prompt_tokens": INPUT_TOKENS, "completion_tokens": output_tokens,
            "total_tokens": INPUT_TOKENS + output_tokens, "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
        }  # fmt: skip
        head = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
        reason = "tool_calls" if "tool_calls" in message else "stop"
        if not asked.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": reason}
            return web.json_response({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        options = asked.get("stream_options") or {}

        async def send(choices: list[Any], usage: object = None) -> None:
            reported = {"usage": usage} if options.get("include_usage") else {}
            chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **reported}
            await response.write(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode())

        await send([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for word in (message["content"] or "").split(" ") if message["content"] else []:
            await send([{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}])
        if "tool_calls" in message:
            await send([{"index": 0, "delta": {"tool_calls": message["tool_calls"]}, "finish_reason": None}])
        await send([{"index": 0, "delta": {}, "finish_reason": reason}])
        if options.get("include_usage"):
            await send([], usage)
        await response.write(b"data: [DONE]\n\n")
        return response


def _tool_call(tools: list[Mapping[str, Any]], command: str) -> tuple[str, dict[str, Any]]:
    """A call of the first tool that runs commands, as its schema wants it."""
    for tool in tools:
        function = tool.get("function", tool)
        given = (function.get("parameters") or {}).get("properties", {})
        for name in ("cmd", "command"):
            if name in given:
                return function["name"], {name: ["bash", "-c", command] if given[name]["type"] == "array" else command}
    raise AssertionError(f"no tool runs a command: {tools}")
