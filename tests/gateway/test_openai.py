"""OpenAI's two dialects through the gateway: what is asked, what is answered, what is booked, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from swarm.errors import UsageError
from swarm.gateway import upstreams
from swarm.gateway.metering_request import AmbiguousRequest, read
from swarm.gateway.policy import Policy
from swarm.gateway.process import Server
from swarm.gateway.upstreams import Upstream
from swarm.gateway.usage import without_usage
from tests.gateway.conftest import KEY, Harness
from tests.gateway.messages_api import HAIKU
from tests.gateway.openai_api import CACHED_TOKENS, INPUT_TOKENS, OpenAiApi

MODEL = "claude-haiku-4-5"  # prices are by model, whatever dialect it is called in
OPENAI = Policy(upstreams=("openai",))


@pytest.fixture
async def openai_api() -> AsyncIterator[OpenAiApi]:
    async with OpenAiApi(key=KEY).serving() as serving:
        yield serving


async def post(listener: Server, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
    url, headers = listener.env["OPENAI_BASE_URL"], {"authorization": f"Bearer {listener.env['OPENAI_API_KEY']}"}
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body, headers=headers) as answer:
        return answer.status, await answer.text()


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "A haiku"}], "max_tokens": 100, **fields}


def response(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "A haiku", "max_output_tokens": 100, **fields}


# --- Chat Completions -------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {"include_usage": True}, False),
    ({"stream_options": None}, {"include_usage": True}, False),
    ({"stream_options": {}}, {"include_usage": True}, False),
    ({"stream_options": {"include_usage": False}}, {"include_usage": True}, False),
    ({"stream_options": {"include_obfuscation": False}}, {"include_usage": True, "include_obfuscation": False}, False),
    ({"stream_options": {"include_usage": True, "x": 1}}, {"include_usage": True, "x": 1}, True),
]


async def test_a_stream_is_what_its_client_asked_for_and_is_counted(harness: Harness, openai_api: OpenAiApi) -> None:
    """A client that did not ask for the usage takes ``choices[0]`` of every event."""
    async with harness.listener(await harness.claim(), OPENAI, base_url=openai_api.url) as listener:
        for given, sent, shown in OPTIONS:
            status, text = await post(listener, "/chat/completions", chat(stream=True, **given))
            assert (status, openai_api.seen[-1]["body"]["stream_options"]) == (200, sent)
            events = events_of(text)
            assert [e["usage"]["prompt_tokens"] for e in events if e.get("usage")] == [INPUT_TOKENS] * shown
            assert all(event["choices"] for event in events) is not shown
            assert "".join(c["delta"].get("content", "") for e in events for c in e["choices"]).strip() == HAIKU
            assert text.endswith("data: [DONE]\n\n")
        await harness.booked(len(OPTIONS))
    rows = harness.sql("SELECT DISTINCT input_tokens, cache_read_tokens, output_tokens > 0, note FROM model_calls")
    assert rows == [(INPUT_TOKENS - CACHED_TOKENS, CACHED_TOKENS, 1, None)]


def test_only_the_event_of_the_usage_is_taken_out() -> None:
    usage = b'data: {"choices": [ ], "usage": {"prompt_tokens": 1}}'
    kept = [
        b'data: {"choices":[],"prompt_filter_results":[{}]}',
        b'data: {"choices":[],"usage":null}',
        b'data: {"choices":[{"delta":{"content":"\\"choices\\":[]"}}],"usage":{"prompt_tokens":1}}',
        b'data: {"choices":[], "usage": {',
        b': a comment with "choices":[]',
        b"data: [DONE]",
    ]
    for end in (b"\n\n", b"\r\n\r\n"):
        for at in range(len(kept) + 1):
            events = [*kept[:at], usage, *kept[at:]]
            assert without_usage(b"".join(e + end for e in events)) == b"".join(e + end for e in kept)
        assert without_usage(b"event: x\n" + usage.replace(b", ", b",\ndata: ") + end) == b""
        assert without_usage(usage) == b""  # the last one, without its end


# --- Responses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["completed", "incomplete", "failed"])
async def test_a_response_is_counted_by_its_last_event(harness: Harness, openai_api: OpenAiApi, ends: str) -> None:
    openai_api.ends = ends
    async with harness.listener(await harness.claim(), OPENAI, base_url=openai_api.url) as listener:
        for stream in (False, True):
            body = response(stream=stream)
            status, text = await post(listener, "/responses", body)
            assert (status, openai_api.seen[-1]["body"]) == (200, body)
            said = events_of(text)[-1]["response"] if stream else json.loads(text)
            used = said["usage"]
            rows = await harness.booked(1 + stream)
            assert rows[-1][1] == used["input_tokens"] + used["output_tokens"]
            plain = used["input_tokens"] - CACHED_TOKENS
            assert rows[-1][2] == pytest.approx((plain + CACHED_TOKENS * 0.1 + used["output_tokens"] * 5) / 1e6)
    calls = [event.data for event in await harness.store.events("t") if event.kind == "model_call"]
    assert [call.get("estimated", False) for call in calls] == [False, False]


def test_the_two_dialects_limit_their_answers_by_fields_of_their_own() -> None:
    """A small limit of the other dialect, which the service ignores, does not make a call look cheap."""
    openai = upstreams.load(None, {})["openai"]
    for path, own, other in (
        ("/v1/chat/completions", "max_tokens", "max_output_tokens"),
        ("/v1/responses", "max_output_tokens", "max_tokens"),
    ):
        upstream = openai.dialect("POST", path)
        limits = [
            read(json.dumps({"model": "m", "input": "x", "messages": [], **fields}).encode(), upstream)[0].max_output
            for fields in ({own: 7}, {other: 7}, {own: 9, other: 7})
        ]
        assert limits == [7, openai.output_default, 9]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"conversation": {"id": "conv_1"}}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"background": True}, "background"),
    ({"background": "yes"}, "background"),
    ({"tools": [{"type": "web_search"}]}, "'web_search'"),
    ({"tools": [{"type": "function", "name": "f"}, {"type": "web_search_preview_2025_03_11"}]}, "'web_search_preview"),
    ({"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}, "'file_search'"),
    ({"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}, "'code_interpreter'"),
    ({"tools": [{"type": "image_generation"}]}, "'image_generation'"),
    ({"tools": [{"type": "mcp", "server_url": "https://example.com"}]}, "'mcp'"),
    ({"tools": [{"type": "shell", "environment": {"type": "container_auto"}}]}, "'shell'"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "web_search"}]}]}, "'web_search'"),
    ({"tools": [{"type": "from_the_future"}]}, "'from_the_future'"),
    ({"tools": [{"name": "no type"}]}, "'None'"),
    ({"tools": ["web_search"]}, "'web_search'"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
    ({"input": [{"type": "message", "content": "a"}, {"id": "msg_1"}]}, "item_reference"),
    ({"input": [{"type": None, "id": "msg_1", "content": None}]}, "item_reference"),
    ({"input": [{"type": "tool_search_output", "tools": [{"type": "mcp"}]}]}, "'mcp'"),
]
ALLOWED: list[dict[str, Any]] = [
    {"previous_response_id": None, "conversation": None, "background": False, "store": True},
    {"tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "c"}, {"type": "apply_patch"}]},
    {"tools": [{"type": "shell", "environment": {"type": "local"}}, {"type": "local_shell"}], "store": False},
    {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]}]},
    {"input": [{"type": "message", "role": "user", "content": "tools"}], "tools": None},
    {"input": [{"id": "msg_1", "role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
    {"input": [{"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"}]},
]


def test_what_a_response_may_not_ask_for() -> None:
    upstream = upstreams.load(None, {})["openai"].dialect("POST", "/v1/responses")
    for fields, named in REFUSED:
        with pytest.raises(AmbiguousRequest, match="is not allowed: ") as caught:
            read(json.dumps(response(**fields)).encode(), upstream)
        assert named in str(caught.value), fields
    for fields in ALLOWED:
        metered, body = read(json.dumps(response(**fields)).encode(), upstream)
        assert (metered.max_output, json.loads(body)) == (100, response(**fields))


async def test_a_refusal_is_a_sentence_and_reaches_nobody(harness: Harness, openai_api: OpenAiApi) -> None:
    async with harness.listener(await harness.claim(), OPENAI, base_url=openai_api.url) as listener:
        status, text = await post(listener, "/responses", response(previous_response_id="resp_1"))
        assert status == 400
        assert json.loads(text)["error"]["message"].startswith("gateway: previous_response_id is not allowed: ")
        for path in ("/responses/resp_1", "/responses/resp_1/cancel", "/responses/compact"):
            assert (await post(listener, path, {}))[0] == 404
    assert openai_api.seen == []
    assert harness.sql("SELECT 1 FROM model_calls") == []


# --- tables -----------------------------------------------------------------------------------------------------------


def service(name: str, **env: str) -> tuple[Upstream, str]:
    fields = {"name": name, "base_url": "http://127.0.0.1:1", "key": "k", "header": {"a": "{key}"}, "env": env}
    return Upstream.model_validate(fields), "the key"


def test_services_with_the_same_variables_do_not_overwrite_each_other() -> None:
    same = {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "{token}"}
    services = {
        "openai": service("openai", **same),
        "other": service("other", OTHER_URL="{url}"),
        "my-vllm": service("my-vllm", **same),
    }
    assert upstreams.environment(services, url="http://gw", token="t") == {
        "OPENAI_BASE_URL": "http://gw/v1",
        "OPENAI_API_KEY": "t",
        "OTHER_URL": "http://gw/other",
        "MY_VLLM_OPENAI_BASE_URL": "http://gw/my-vllm/v1",
        "MY_VLLM_OPENAI_API_KEY": "t",
    }


def test_a_service_like_another(tmp_path: Path) -> None:
    own = tmp_path / "upstreams.toml"
    own.write_text('[vllm]\nlike = "openai"\nbase_url = "http://10.1.2.3:8000"\nkey = "vllm_key"\nbase_url_env = ""\n')
    vllm = upstreams.load(own, {})["vllm"]
    openai = upstreams.load(None, {})["openai"]
    own.write_text('[openai.differs."POST /v1/responses"]\nbody_mb = "5"\n')
    assert upstreams.load(own, {})["openai"].dialect("POST", "/v1/responses").body_mb == 5.0, "a number"
    assert (vllm.name, vllm.base_url, vllm.key, vllm.usage) == (
        "vllm",
        "http://10.1.2.3:8000",
        "vllm_key",
        openai.usage,
    )
    assert vllm.dialect("POST", "/v1/responses").usage == openai.dialect("POST", "/v1/responses").usage
    for text, says in (
        ('[x]\nlike = "nobody"\n', r"\[x\] is to be like 'nobody', which is not above it"),
        ('[openai.differs."POST /v1/other"]\nbody_mb = 1\n', "which is not in metered"),
        ('[openai.differs."POST /v1/responses"]\nbody_mb = -1\n', "must be more than 0, but is -1"),
        ('[openai.differs."POST /v1/responses"]\nbodymb = 1\n', "bodymb"),
    ):
        own.write_text(text)
        with pytest.raises(UsageError, match=says):
            upstreams.load(own, {})
