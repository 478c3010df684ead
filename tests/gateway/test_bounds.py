"""What a request may cost at most: no answer that the service could bill is dearer, whatever the request looks like."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.gateway import prices, upstreams
from swarm.gateway.forward import _fits, _spend
from swarm.gateway.metering_request import AmbiguousRequest, MeteredRequest, _surcharge, countable, lowered, read
from swarm.gateway.prices import Price
from swarm.gateway.upstreams import Upstream
from swarm.gateway.usage import dig
from swarm.ledger import Granted

TABLE = upstreams.load(None, {})
ANTHROPIC, OPENAI = TABLE["anthropic"], TABLE["openai"]
PRICES = prices.load(None)
HAIKU = PRICES.models["claude-haiku-4-5"]
PNG = base64.b64encode(b"\x89PNG\r\n" + bytes(750_000)).decode()  # a megabyte


def measured(request: Mapping[str, Any], upstream: Upstream = ANTHROPIC) -> MeteredRequest:
    return read(json.dumps(request).encode(), upstream)[0]


# --- a small model of what the service bills --------------------------------------------------------------------------


def tokens_of(value: Any) -> int:
    """Of text in the worst case: each byte is a token. What surrounds the texts is some, too."""
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))
    if isinstance(value, list):
        return sum(map(tokens_of, value)) + len(value)
    if isinstance(value, dict):
        return sum(tokens_of(key) + tokens_of(one) for key, one in value.items()) + len(value)
    return 1


def blocks_billed(content: Any) -> int:
    if not isinstance(content, list):
        return tokens_of(content)
    total = 0
    for block in content:
        source = block.get("source") if isinstance(block, dict) else None
        if isinstance(source, dict) and block.get("type") == "image":
            total += 4_784  # scaled down to this by the service
        elif isinstance(source, dict) and block.get("type") == "document" and source.get("type") != "text":
            total += 400_000
        elif isinstance(block, dict) and block.get("type") == "tool_result":
            total += blocks_billed(block.get("content")) + 20
        else:
            total += tokens_of(block)
    return total


def billed(sent: Mapping[str, Any], most: bool) -> dict[str, int]:
    """By kind, for an answer that uses ``most`` of what the request allows: all output, hidden or not, all searches,
    each in a pass that reads the prompt and the results so far again."""
    prompt = sum(blocks_billed(message.get("content")) for message in sent["messages"])
    prompt += tokens_of(sent.get("system", "")) + tokens_of(sent.get("tools", []))
    uses = sum(tool.get("max_uses", 10) for tool in sent.get("tools", ()) if "web" in tool.get("type", "")) * most
    each = 125_000 if "web_fetch" in json.dumps(sent.get("tools", "")) else 25_000
    passes = [min(1_000_000, prompt + number * each) for number in range(uses + 1)]
    rounds = 1 + ("compact_" in json.dumps(sent.get("context_management", "")))
    output = sent["max_tokens"] if most else 1
    written = '"ttl": "1h"' in json.dumps(sent), "cache_control" in json.dumps(sent)
    kind = {(True, True): "cache_write_1h", (False, True): "cache_write"}.get(written, "input")
    counts = {kind: sum(passes) * rounds, "output": output * rounds, "web_search": uses}
    return counts | ({"cache_write": counts[kind]} if kind == "cache_write_1h" else {})


# --- requests of a hostile agent --------------------------------------------------------------------------------------

texts = st.text(max_size=60) | st.sampled_from(["\\\\u0041" * 9, "\u4e2d" * 20, "\U0001f600" * 9, "a, [b], {c}"])
sources = st.one_of(
    st.fixed_dictionaries({"type": st.just("base64"), "media_type": st.just("image/png"), "data": texts}),
    st.fixed_dictionaries({"type": st.sampled_from(["url", "file"]), "url": texts}),
)
disguised = st.fixed_dictionaries({"type": st.sampled_from(["base64", "image", "tool_use"]), "data": texts, "a": texts})
leaves = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts}),
    st.fixed_dictionaries({"type": st.just("image"), "source": sources}),
    st.fixed_dictionaries({"type": st.just("document"), "source": sources}),
    st.fixed_dictionaries({"type": st.just("tool_use"), "input": disguised, "source": disguised}),
    st.fixed_dictionaries({"type": st.just("text"), "text": texts, "cache_control": st.just({"type": "ephemeral"})}),
    st.fixed_dictionaries({"type": st.just("text"), "text": texts, "cache_control": st.just({"ttl": "1h"})}),
    disguised,
)
results = st.fixed_dictionaries({"type": st.just("tool_result"), "content": st.lists(leaves, max_size=3)})
contents = texts | st.lists(leaves | results, max_size=4)
tools = st.one_of(
    st.fixed_dictionaries({"name": texts, "input_schema": disguised}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["web_search_20260209", "web_fetch_20250910"])},
        optional={"max_uses": st.integers(1, 3000)},
    ),
)
hostile = st.fixed_dictionaries(
    {
        "model": st.just("claude-haiku-4-5"),
        "messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": contents}), max_size=3),
        "max_tokens": st.integers(1, 200_000),
    },
    optional={
        "stream": st.booleans(),
        "system": texts,
        "tools": st.lists(tools, max_size=3),
        "thinking": st.fixed_dictionaries({"type": st.just("enabled"), "budget_tokens": st.integers(1024, 200_000)}),
        "context_management": st.just({"edits": [{"type": "compact_20260112"}]}),
    },
)


@settings(max_examples=100, deadline=None)
@given(st.lists(hostile, min_size=1, max_size=4), st.floats(0.0001, 30), st.lists(st.booleans(), min_size=4))
def test_calls_at_once_never_cost_more_than_their_budget(
    requests: list[dict[str, Any]], budget: float, answers: list[bool]
) -> None:
    """The books' arithmetic: each call reserves what it may cost at most, or what is left."""
    left, spent = budget, 0.0
    for request, most in zip(requests, answers, strict=False):
        body = json.dumps(request).encode()
        metered, body = read(body, ANTHROPIC)
        if _spend(metered.least, HAIKU).usd > left:  # type: ignore[operator]
            continue  # refused
        whole, granted = _spend(metered.counts(), HAIKU), Granted(usd=left, tokens=None)
        fitted = metered.fitted(lambda counts: _fits(_spend(counts, HAIKU), whole, granted))  # noqa: B023
        assert fitted == metered or _spend(metered.counts(), HAIKU).usd > left  # type: ignore[operator]
        sent = json.loads(lowered(body, ANTHROPIC, fitted))
        assert {**sent, "max_tokens": 0, "tools": 0, "thinking": 0} == {
            **request, "max_tokens": 0, "tools": 0, "thinking": 0
        }  # fmt: skip
        if "thinking" in request and request["thinking"]["budget_tokens"] < request["max_tokens"]:
            assert 1024 <= sent["thinking"]["budget_tokens"] < sent["max_tokens"]
        spent += HAIKU.usd(billed(sent, most))
        left -= min(left, whole.usd or 0)
    assert spent <= budget


# --- what is dear must not look cheap ---------------------------------------------------------------------------------


def message(*content: dict[str, Any], **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": list(content)}]
    return {"model": "claude-haiku-4-5", "max_tokens": 1000, "messages": messages, **more}


def use(**given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": "t", "name": "n", "input": given}


SOURCE = {"type": "base64", "media_type": "application/pdf", "data": "x" * 300_000}
URL = {"type": "url", "url": "https://example.org/a"}
DEAR: dict[str, tuple[dict[str, Any], int]] = {
    "text as an attachment in tool input": (message(use(**SOURCE)), 300_000),
    "an attachment's place in tool input": (message(use(content=[{"type": "image", "source": SOURCE}])), 300_000),
    "an attachment among tools": (message(tools=[{"name": "n", "input_schema": {"source": SOURCE}}]), 300_000),
    "an attachment in the system prompt": (message(system=[{"type": "image", "source": SOURCE}]), 300_000),
    "a document": (message({"type": "document", "source": SOURCE}), 1_000_000),
    "a document by its address": (message({"type": "document", "source": URL}), 1_000_000),
    "a stored document": (message({"type": "document", "source": {"type": "file", "file_id": "f"}}), 1_000_000),
    "an image by its address": (message({"type": "image", "source": URL}), 5_000),
    "in a tool's result": (
        message({"type": "tool_result", "content": [{"type": "document", "source": URL}]}), 1_000_000
    ),
    "dense text": (message({"type": "text", "text": "\u4e2d" * 10_000}), 30_000),
    "web search": (message(tools=[{"type": "web_search_20250305", "max_uses": 1000}]), 900_000_000),
    "web search without a limit": (message(tools=[{"type": "web_search_20250305"}]), 1_000_000),
    "code execution": (message(tools=[{"type": "code_execution_20250825"}]), 1_000_000),
    "a remote tool": (message(mcp_servers=[{"url": "https://example.org"}]), 11_000_000),
    "compaction": (
        message({"type": "text", "text": "x" * 90_000}, context_management={"edits": [{"type": "compact_20260112"}]}),
        180_000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEAR)
def test_what_is_dear_is_counted(name: str) -> None:
    request, tokens = DEAR[name]
    assert measured(request).counts()["input"] >= tokens


@pytest.mark.parametrize(
    ("more", "surcharge"),
    [
        ({"speed": "fast"}, " speed=fast"),
        ({"speed": "faster"}, " speed=faster"),
        ({"inference_geo": "eu"}, " inference_geo=eu"),
        ({"service_tier": "priority"}, " service_tier=priority"),
        ({"fallbacks": [{"model": "claude-opus-5"}]}, " fallbacks=given"),
        ({"a new field": 1}, " other=unknown"),
        ({"tools": [{"type": "advisor_20260301", "model": "claude-opus-5"}]}, " tools=advisor_20260301"),
        ({"tools": [{"type": ["web_search"]}]}, " other=unknown"),
        ({"a": 1, "b": 1, "c": 1, "d": 1}, " surcharges=many"),
        ({"speed": None, "service_tier": "auto", "inference_geo": "global", "metadata": {}}, ""),
        ({"tools": [{"type": "custom"}, {"type": "bash_20250124"}, {"name": "plain"}]}, ""),
    ],
)
def test_what_is_not_known_to_cost_the_list_price_has_no_price(more: dict[str, Any], surcharge: str) -> None:
    found = measured(message(**more)).surcharge
    assert found == surcharge
    assert (PRICES.of("claude-haiku-4-5", found) is None) == bool(surcharge)


class Counted(dict[str, Any]):
    """How many of its items were looked at."""

    looked_at = 0

    def items(self) -> Any:
        for item in super().items():
            self.looked_at += 1
            yield item


def test_many_unknown_fields_are_not_all_compared() -> None:
    given = Counted({f"{number:x}": 0 for number in range(9000)})
    assert _surcharge(given, ANTHROPIC, []) == " surcharges=many"
    assert given.looked_at < 10


@pytest.mark.parametrize("limits", [("max_tokens",), ("max_completion_tokens", "max_tokens"), ("a.b.limit", "limit")])
def test_a_limit_of_null_is_none(limits: tuple[str, ...]) -> None:
    upstream = ANTHROPIC.model_copy(update={"output_limit": limits})
    *parents, name = limits[0].split(".")
    for depth in range(len(parents) + 1):
        given: Any = None
        for parent in reversed([*parents, name][: depth + 1]):
            given = {parent: given}
        body = json.dumps({"model": "m", "messages": [], **given}).encode()
        metered = replace(read(body, upstream)[0], max_output=77)
        assert dig(json.loads(lowered(body, upstream, metered)), limits[0]) == 77


def test_other_dialects_multipliers() -> None:
    request = {"model": "m", "messages": [], "n": 5, "max_tokens": 10, "max_completion_tokens": 100}
    assert measured(request, OPENAI).counts()["output"] == 500
    for field in ("best_of", "prediction", "web_search_options", "audio", "modalities"):
        assert measured({**request, field: {"a": 1}}, OPENAI).surcharge == f" {field}=given"
    assert measured({**request, "service_tier": "priority"}, OPENAI).surcharge == " service_tier=priority"


@pytest.mark.parametrize("wrong", [{"max_uses": "9"}, {"max_uses": -1}, {"max_uses": 1.5}, {"max_uses": True}])
def test_a_tools_limit_that_can_be_read_in_two_ways(wrong: dict[str, Any]) -> None:
    with pytest.raises(AmbiguousRequest):
        measured(message(tools=[{"type": "web_search_20250305", **wrong}]))


def test_no_number_is_too_large_for_the_books() -> None:
    asked = message(tools=[{"type": "web_search_20250305", "max_uses": 10**9}], max_tokens=10**9)
    assert sum(measured(asked).counts().values()) < 10**12


# --- honest requests at small budgets ---------------------------------------------------------------------------------

SONNET = PRICES.models["claude-sonnet-4-6"]
CODE_TOOLS = [{"name": f"Tool{n}", "description": "What it does. " * 100, "input_schema": {}} for n in range(16)]
CLAUDE_CODE: dict[str, Any] = {
    "model": "claude-sonnet-4-6", "max_tokens": 32_000, "stream": True, "metadata": {"user_id": "u"},
    "system": [{"type": "text", "text": "You are " * 1500, "cache_control": {"type": "ephemeral"}}],
    "tools": CODE_TOOLS, "thinking": {"type": "enabled", "budget_tokens": 31_999},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"}, "betas": ["x"],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Fix it."}]}],
}  # fmt: skip
CHAT = {"role": "user", "content": "Fix it."}
PART = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
PDF = {"type": "document", "source": {**SOURCE, "data": PNG}}
# A request, its service, price, what the service counts (None: it counts nothing), and a budget in USD.
HONEST: dict[str, tuple[dict[str, Any], Upstream, Price, int | None, float]] = {
    "Claude Code": (CLAUDE_CODE, ANTHROPIC, SONNET, 9_000, 0.15),
    "LiteLLM, 128,000 tokens in one piece": (
        {"model": "m", "messages": [CHAT], "max_tokens": 128_000}, ANTHROPIC, SONNET, None, 0.07,
    ),
    "LiteLLM, the other dialect": (
        {"model": "m", "messages": [CHAT], "max_tokens": 128_000}, OPENAI, SONNET, None, 0.07,
    ),
    "no limit": ({"model": "m", "messages": [CHAT], "stream": True}, OPENAI, SONNET, None, 0.07),
    "a megabyte of an image": (
        message({"type": "image", "source": {**SOURCE, "media_type": "image/png", "data": PNG}}),
        ANTHROPIC, HAIKU, None, 0.02,
    ),
    "a data URL of a megabyte": (
        {"model": "m", "messages": [{"role": "user", "content": [PART]}], "max_tokens": 1000},
        OPENAI, HAIKU, None, 0.06,
    ),
    "a PDF": (message(PDF), ANTHROPIC, HAIKU, 4_000, 0.02),
    "a web search": (message(tools=[{"type": "web_search_20250305", "max_uses": 8}]), ANTHROPIC, HAIKU, None, 0.06),
    "cache warming": ({**message(), "max_tokens": 0}, ANTHROPIC, HAIKU, None, 0.01),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_request_is_sent_on_a_small_budget(name: str) -> None:
    request, upstream, price, counted, budget = HONEST[name]
    metered = measured(request, upstream)
    assert not metered.surcharge
    if counted is not None:
        assert set(json.loads(countable(json.dumps(request).encode(), upstream))) <= set(upstream.count_fields)
        metered = metered.counted(counted)
    least = _spend(metered.enough if budget >= 0.05 else metered.least, price).usd
    assert least is not None and least <= budget
    whole, granted = _spend(metered.counts(), price), Granted(usd=budget, tokens=None)
    fitted = metered.fitted(lambda counts: _fits(_spend(counts, price), whole, granted))
    sent = json.loads(lowered(json.dumps(request).encode(), upstream, fitted))
    if request.get("max_tokens") == 0:
        assert sent == request
    else:
        limit = sent.get("max_tokens") or sent["max_completion_tokens"]
        assert min(1000, 64 if budget < 0.05 else 1000) <= limit <= request.get("max_tokens", limit)
    if "thinking" in sent:
        assert 1024 <= sent["thinking"]["budget_tokens"] < sent["max_tokens"]
    others = {"max_tokens", "max_completion_tokens", "thinking", "tools"}
    assert {k: v for k, v in sent.items() if k not in others} == {k: v for k, v in request.items() if k not in others}


def test_a_limit_is_lowered_by_no_more_than_needed() -> None:
    metered = measured(message(tools=[{"type": "web_search_20250305", "max_uses": 8}, {"type": "web_fetch_20250910"}]))
    fitted = metered.fitted(lambda counts: HAIKU.usd(counts) <= 1)
    assert HAIKU.usd(fitted.counts()) <= 1 < HAIKU.usd(metered.counts(1000, fitted.uses + 1))
    sent = json.loads(lowered(json.dumps(message(
        tools=[{"type": "web_search_20250305", "max_uses": 8}, {"type": "web_fetch_20250910"}]
    )).encode(), ANTHROPIC, fitted))  # fmt: skip
    uses = [tool["max_uses"] for tool in sent["tools"]]
    assert min(uses) >= 1 and fitted.uses - 1 <= sum(uses) <= fitted.uses
