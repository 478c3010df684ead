"""Reads from a metered request what it may cost at most, and lowers it to what a budget affords.

A hostile guest may try to make its request look cheaper than it is. So requests that two parsers could read differently
are refused, what isn't known to cost the list price has no price, and everything else is bounded:

- A token has at least one byte. Images have a maximum of their own; documents, and what only the service sees, count as
  the longest prompt that its models take.
- Tools that the service runs itself make it read the prompt again after each use, with what the use brought.
- Output, thinking included, ends at the request's limit, which is sent with the request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from swarm.gateway.upstreams import Upstream
from swarm.gateway.usage import LEAST_OUTPUT_TOKENS, dig, first, text_tokens

# The longest text that any model accepts has fewer; a few megabytes of "{},{}," would take a gigabyte of memory.
_MAX_VALUES: Final = 1_000_000
_MAX_TOKENS: Final = 10**9
_MAX_ANSWERS: Final = 1000
# What an answer is shortened to at least while other calls hold the rest of a budget.
ENOUGH_OUTPUT_TOKENS: Final = 4096
_LEAST_THINKING_TOKENS: Final = 1024  # the Messages API takes no smaller budget_tokens
_TOOLS_TOKENS: Final = 1000  # what a service adds to a prompt with tools, and with each tool that it describes itself
_KNOWN_TOOL_TOKENS: Final = 5000
_USES: Final = 10  # of tools whose number the request doesn't limit: after so many the service ends the turn
_MOST: Final = 10**11  # tokens of one call: what the books take
_SHOWN: Final = re.compile(r"[A-Za-z0-9_.-]{1,40}=[A-Za-z0-9_.-]{1,60}")
_READ: Final = ("model", "stream", "messages", "input", "tools", "thinking", "mcp_servers", "context_management")
_MAX_SURCHARGES: Final = 3  # all their orders are looked up


class AmbiguousRequest(Exception):
    """The message is for the guest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeteredRequest:
    """``prompt_tokens``: the most that it has; ``likely_tokens``: for the books, when nobody says what it had.
    ``kinds``: what they are billed as. ``max_output``: tokens of one of its ``answers``; ``open_ended``: it doesn't
    limit itself. ``uses``: of the service's own tools, as far as the request limits them; ``fixed_uses``: of others;
    each adds up to ``use_tokens``. ``rounds``: 2 if the service may summarize first. ``surcharge``: what the list price
    doesn't cover, written as price lists write it after the model's name. ``unasked_usage``: an event reports the usage
    that only we asked for, so the client must not see it."""

    model: str
    streams: bool
    prompt_tokens: int
    likely_tokens: int
    max_output: int
    kinds: tuple[str, ...] = ("input",)
    answers: int = 1
    least_output: int = LEAST_OUTPUT_TOKENS
    open_ended: bool = False
    uses: int = 0
    least_uses: int = 0
    fixed_uses: int = 0
    use_tokens: int = 0
    searches: bool = False
    rounds: int = 1
    context_tokens: int = 1_000_000
    surcharge: str = ""
    unasked_usage: bool = False

    def counts(self, output: int | None = None, uses: int | None = None) -> dict[str, int]:
        """What it costs at most, by kind; or with this limit of an answer and of the uses of tools."""
        output = self.max_output if output is None else min(output, self.max_output)
        uses = self.fixed_uses + (self.uses if uses is None else min(uses, self.uses))
        most, prompt, each = self.context_tokens, self.prompt_tokens, self.use_tokens
        # The prompt of the service's n-th pass has what n uses brought, up to the longest that there is.
        growing = uses + 1 if not each else min(uses + 1, max(0, -(-(most - prompt) // each)))
        read = growing * prompt + each * growing * (growing - 1) // 2 + (uses + 1 - growing) * most
        read = read * self.rounds + ((uses + 1) * self.rounds - 1) * min(output, most)
        counts = dict.fromkeys(self.kinds, read) | {"output": output * self.answers * self.rounds}
        counts |= {"web_search": uses} if self.searches else {}
        return {kind: min(count, _MOST) for kind, count in counts.items()}

    @property
    def likely_prompt(self) -> dict[str, int]:
        return dict.fromkeys(self.kinds, self.likely_tokens)

    @property
    def least(self) -> dict[str, int]:
        return self.counts(self.least_output, self.least_uses)

    @property
    def enough(self) -> dict[str, int]:
        return self.counts(max(self.least_output, ENOUGH_OUTPUT_TOKENS), self.least_uses)

    def counted(self, tokens: int) -> MeteredRequest:
        """With its prompt's tokens as the service counted them, which it calls an estimate."""
        return replace(self, prompt_tokens=min(self.prompt_tokens, tokens + tokens // 50 + 10))

    def fitted(self, fits: Callable[[Mapping[str, int]], bool]) -> MeteredRequest:
        """The longest answer that fits, and before that as many uses of tools as fit with enough of an answer."""
        enough = min(self.max_output, max(self.least_output, ENOUGH_OUTPUT_TOKENS))
        uses = _most(self.least_uses, self.uses, lambda uses: fits(self.counts(enough, uses)))
        output = _most(min(self.least_output, self.max_output), self.max_output, lambda n: fits(self.counts(n, uses)))
        return replace(self, max_output=output, uses=uses)


def _most(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits; ``least`` is taken to fit."""
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def read(body: bytes, upstream: Upstream) -> tuple[MeteredRequest, bytes]:
    """The request, and the body to send. Raises AmbiguousRequest."""
    if sum(map(body.count, (b"{", b"[", b","))) > _MAX_VALUES:
        raise AmbiguousRequest("the request has too many values")
    try:
        given = json.loads(body.decode(), object_pairs_hook=_object)  # some services take UTF-16, and others don't
        model = given["model"]
        if not isinstance(model, str):
            raise TypeError
    except (ValueError, RecursionError, TypeError, KeyError):
        raise AmbiguousRequest(
            "the request must be a JSON object in UTF-8, with a model, and without duplicate names"
        ) from None
    if not model.isprintable():
        raise AmbiguousRequest("the model's name must be printable")
    if why := _refusal(given, upstream):
        raise AmbiguousRequest(why)
    streams = given.get("stream") is True
    sent = _merged(given, upstream.stream_body) if streams else given
    if sent != given:
        body = json.dumps(sent).encode()
    limits = [n for path in upstream.output_limit if (n := _number(given, path, _MAX_TOKENS)) is not None]
    answers = [_number(given, path, _MAX_ANSWERS) for path in upstream.answers]
    thinking = _number(given, "thinking.budget_tokens", _MAX_TOKENS) or 0
    # To some services, 0 means no limit.
    max_output = max(max(limits, default=0) or upstream.output_default, thinking)
    least = LEAST_OUTPUT_TOKENS + (_LEAST_THINKING_TOKENS if thinking else 0)
    tools = _tools(given, upstream)
    return MeteredRequest(
        model=model[:200],
        streams=streams,
        max_output=max_output,
        answers=max((count for count in answers if count), default=1),
        least_output=min(least, max_output),
        open_ended=tools.open_ended or (not limits and bool(upstream.output_limit)),
        uses=sum(tools.limited.values()),
        least_uses=len(tools.limited),
        fixed_uses=tools.fixed_uses,
        use_tokens=tools.use_tokens,
        searches=tools.searches,
        rounds=2 if _summarizes(given) else 1,
        context_tokens=upstream.context_tokens,
        surcharge=_surcharge(given, upstream, tools.unknown),
        unasked_usage=sent != given,
        **_prompt(body, given, upstream, tools.described),
    ), body


def _merged(given: Any, ours: Any) -> Any:
    """What was given, with ours in it: its other fields are the client's to choose."""
    if not isinstance(ours, dict):
        return ours
    kept = given if isinstance(given, dict) else {}
    return {**kept, **{name: _merged(kept.get(name), value) for name, value in ours.items()}}


def _refusal(given: Mapping[str, Any], upstream: Upstream) -> str:
    """Why this request can't be counted; '' if it can."""
    paths = (*_READ, *upstream.fields, *upstream.output_limit, *upstream.answers, *upstream.stored_prompts)
    known = {path.partition(".")[0].partition("=")[0] for path in (*paths, *upstream.refused)}
    spelled = {name.casefold(): name for name in known}
    for name in given:
        if spelled.get(name.casefold(), name) != name:  # as Go's parser does, which takes the last of both
            return f"{name[:50]} is not allowed: some services read it as {spelled[name.casefold()]}"
    for path in upstream.refused:
        if dig(given, path):
            return f"{path} is not allowed: what the service then reads or bills, the gateway does not see"
    if upstream.client_tools:
        items = given.get("input")
        items = items if isinstance(items, list) else []
        for item in items:
            kind = item.get("type") if isinstance(item, dict) else ""
            if kind == "item_reference" or (kind is None and item.get("id") and item.get("content") is None):
                return "item_reference is not allowed: what the service then reads, the gateway does not see"
        holders = [given, *items]  # a list of tools may also be an item
        while holders:
            holder = holders.pop()
            tools = holder.get("tools") if isinstance(holder, dict) else None
            for tool in tools if isinstance(tools, list) else ():
                kind = tool.get("type") if isinstance(tool, dict) else tool
                at_client = kind in upstream.client_tools and dig(tool, "environment.type") in (None, "local")
                if not at_client:
                    return (
                        f"the tool {str(kind)[:50]!r} is not allowed: the service runs it, and bills it by more than "
                        "tokens; turn it off"
                    )
                holders.append(tool)  # a namespace has tools of its own
    return ""


def lowered(body: bytes, upstream: Upstream, metered: MeteredRequest) -> bytes:
    """The body with the limits of ``metered``."""
    given = json.loads(body)
    limit = metered.max_output
    present = [path for path in upstream.output_limit if first(given, (path,)) is not None]
    for path in present or upstream.output_limit[:1]:
        *parents, name = path.split(".")
        place = given
        for parent in parents:
            if not isinstance(place.get(parent), dict):  # null is as good as absent
                place[parent] = {}
            place = place[parent]
        place[name] = limit if place.get(name) is None else min(int(place[name]), limit)
    thinking = given.get("thinking")
    if isinstance(thinking, dict) and isinstance(budget := thinking.get("budget_tokens"), int | float):
        asked = first(given, upstream.output_limit)
        most = limit - LEAST_OUTPUT_TOKENS if isinstance(asked, int) and asked <= budget else limit
        thinking["budget_tokens"] = max(min(int(budget), most), min(int(budget), _LEAST_THINKING_TOKENS))
    tools = _tools(given, upstream)
    spare, extra = sum(tools.limited.values()) - len(tools.limited), metered.uses - len(tools.limited)
    for index, asked in tools.limited.items():
        given["tools"][index]["max_uses"] = 1 + (asked - 1) * extra // spare if spare else 1
    return json.dumps(given, separators=(",", ":")).encode()


def countable(body: bytes, upstream: Upstream) -> bytes:
    """The body by which the service counts the tokens of this request's prompt."""
    given = json.loads(body)
    return json.dumps({name: given[name] for name in upstream.count_fields if name in given}).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # of duplicate names, some parsers take the first, some the last
        raise ValueError
    return found


def _number(given: Any, path: str, most: int) -> int | None:
    value = first(given, (path,))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most):
        raise AmbiguousRequest(f"{path} must be a whole number from 0 to {most}")
    return value


# --- what costs more than the list price ------------------------------------------------------------------------------


def _surcharge(given: Mapping[str, Any], upstream: Upstream, tools: list[str]) -> str:
    found = [one for one in upstream.surcharges if dig(given, one.partition("=")[0]) == one.partition("=")[2]]
    plain = {*upstream.fields, *upstream.list_price}
    for name, value in given.items() if upstream.fields else ():
        if len(found) > _MAX_SURCHARGES:  # more change nothing, and are looked for in what was found
            break
        shown = f"{name}={value if isinstance(value, str) else 'given'}"
        if value is not None and name not in plain and shown not in plain and shown not in found:
            found.append(shown)
    found += [f"tools={kind}" for kind in tools]
    if len(found) > _MAX_SURCHARGES:
        found = ["surcharges=many"]
    return "".join(f" {one if _SHOWN.fullmatch(one) else 'other=unknown'}" for one in found)


# --- tools that the service runs --------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Tools:
    """``limited``: by index, how often the request lets the service use it. ``unknown``: types that aren't known."""

    limited: dict[int, int]
    unknown: list[str]
    open_ended: bool = False
    fixed_uses: int = 0
    use_tokens: int = 0
    searches: bool = False
    described: int = 0  # tokens of what the service adds to the prompt for them


def _tools(given: Mapping[str, Any], upstream: Upstream) -> _Tools:
    found = _Tools(limited={}, unknown=[])
    tools = given.get("tools")
    if isinstance(tools, list) and tools:
        found.described = _TOOLS_TOKENS
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind in (None, "custom", "function") or not upstream.tools:
            continue
        found.described += _KNOWN_TOOL_TOKENS
        name = next((name for name in upstream.tools if kind == name or str(kind).startswith(f"{name}_")), None)
        if name is None:
            found.unknown.append(str(kind))
        elif tokens := upstream.tools[name]:
            if name in upstream.limited_tools:
                asked = _number(tool, "max_uses", _MAX_TOKENS)
                found.open_ended = found.open_ended or not asked
                found.limited[index] = asked or _USES
                tokens = max(tokens, _number(tool, "max_content_tokens", _MAX_TOKENS) or 0)
            else:
                found.fixed_uses = _USES
            found.use_tokens = max(found.use_tokens, tokens)
            found.searches = found.searches or name == "web_search"
    if given.get("mcp_servers") and upstream.tools:
        found.fixed_uses, found.use_tokens = _USES, max(found.use_tokens, upstream.tools.get("mcp_toolset", 0))
    return found


def _summarizes(given: Mapping[str, Any]) -> bool:
    """May the service first summarize the conversation, in a pass of its own?"""
    edits = dig(given, "context_management.edits")
    kinds = [str(edit.get("type")) for edit in edits if isinstance(edit, dict)] if isinstance(edits, list) else []
    return bool(given.get("compaction")) or any(not kind.startswith("clear_") for kind in kinds)


# --- the prompt -------------------------------------------------------------------------------------------------------


def _prompt(body: bytes, given: Mapping[str, Any], upstream: Upstream, described: int) -> dict[str, Any]:
    attached, tokens, unseen = 0, 0, any(given.get(name) for name in upstream.stored_prompts)
    unseen = unseen or bool(upstream.tools and given.get("mcp_servers"))  # their tools' descriptions are in the prompt
    for block in _blocks(given):
        size, is_image, is_unseen = _attachment(block)
        attached += size
        tokens += upstream.image_tokens if is_image else 0
        unseen = unseen or is_unseen
    # An escape ("\u4e2d") has six bytes, what it stands for at most three. Escaped backslashes must not hide one.
    text = len(body) - attached - 3 * body.replace(rb"\\", b"").count(rb"\u")
    most = upstream.context_tokens
    kinds: list[str] = []
    for cached in _cached(given):
        kinds = ["cache_write", *kinds[1:]]
        if isinstance(cached, dict) and cached.get("ttl") not in (None, "5m"):
            kinds = ["cache_write", "cache_write_1h"]
    return {
        "prompt_tokens": most if unseen else min(most, text + described + tokens),
        "likely_tokens": text_tokens(text) + tokens,
        "kinds": tuple(kinds) or ("input",),
    }


def _blocks(given: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The blocks where services take images and documents. Elsewhere, what looks like one is text."""
    pending: list[Any] = []
    for name in ("messages", "input"):
        messages = given.get(name)
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict):
                pending += [message.get("content"), message.get("output")]
    while pending:
        content = pending.pop()
        for block in content if isinstance(content, list) else ():
            if isinstance(block, dict):
                yield block
                if block.get("type") == "tool_result":
                    pending.append(block.get("content"))
                elif block.get("type") == "document":
                    pending.append(dig(block, "source.content"))


def _attachment(block: Mapping[str, Any]) -> tuple[int, bool, bool]:
    """The bytes of its data, if they are no text; is it an image, and is it something whose size can't be seen?"""
    kind, source = block.get("type"), block.get("source")
    if kind in ("image_url", "input_image"):
        url = block.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        return len(url) if isinstance(url, str) and url.startswith("data:") else 0, True, False
    if kind in ("file", "input_file"):
        return 0, False, True
    if not isinstance(source, dict) or source.get("type") not in ("base64", "url", "file"):
        return 0, False, False
    data = source.get("data")
    is_image = kind == "image"
    return len(data) if source["type"] == "base64" and isinstance(data, str) else 0, is_image, not is_image


def _cached(value: Any) -> Iterator[Any]:
    """What is to be cached. Not by recursion: the text may be nested deeply."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            if cached := value.get("cache_control"):
                yield cached
            pending += value.values()
