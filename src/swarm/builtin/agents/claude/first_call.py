"""Preloaded (agent.yaml): makes a first API call in the template, so that clones don't pay for it.

The call makes the SDK build what it then keeps, mainly the schemas of its models. It doesn't leave the process, since
its transport answers directly: it leaves no socket, key or thread behind. The client is closed, and the SDK creates
random values (idempotency keys) anew for each request.
"""

import json
from typing import Any

import anthropic
import httpx2

_FAKE_KEY = "no key: a first call that goes nowhere"
_USAGE = {"input_tokens": 1, "output_tokens": 1, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
_MESSAGE: dict[str, Any] = {
    "id": "msg", "type": "message", "role": "assistant", "model": "none", "content": [], "stop_reason": None,
    "stop_sequence": None, "usage": _USAGE,
}  # fmt: skip
_TEXT = {"type": "text", "text": ""}
_TOOL = {"type": "tool_use", "id": "toolu", "name": "wait", "input": {}}
_EVENTS = (
    {"type": "message_start", "message": _MESSAGE},
    {"type": "ping"},
    {"type": "content_block_start", "index": 0, "content_block": _TEXT},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": _TOOL},
    {
        "type": "content_block_delta",
        "index": 1,
        "delta": {"type": "input_json_delta", "partial_json": '{"seconds": 1}'},
    },
    {"type": "content_block_stop", "index": 1},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"output_tokens": 2},
    },
    {"type": "message_stop"},
)


def _answer(request: httpx2.Request) -> httpx2.Response:
    body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in _EVENTS)
    return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body.encode())


def _call() -> None:
    http = anthropic.DefaultHttpxClient(verify=False, transport=httpx2.MockTransport(_answer))
    anthropic.DefaultHttpxClient(verify=False).close()  # also build what a real transport needs
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
    tool = {"name": "wait", "description": "waits", "input_schema": {"type": "object", "properties": {}}}
    call: dict[str, Any] = {"model": "none", "max_tokens": 1, "system": "none", "messages": messages, "tools": [tool]}
    with anthropic.Anthropic(api_key=_FAKE_KEY, base_url="http://127.0.0.1", http_client=http) as client:
        for _ in range(2):  # the second call sends the answer back, as in a conversation
            with client.messages.stream(**call) as stream:
                for _ in stream.text_stream:
                    pass
                message = stream.get_final_message()
            message.usage.model_dump(mode="json", exclude_none=True)
            result = {"type": "tool_result", "tool_use_id": "toolu", "content": "waited"}
            messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]


_call()
