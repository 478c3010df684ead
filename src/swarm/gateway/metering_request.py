"""Reads from a metered request what it may cost at most, so that the service can't understand it as more.

A hostile guest may try to make its request look cheaper than it is. So requests that two parsers could read differently
are refused, and surcharges are counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from swarm.gateway.upstreams import Upstream
from swarm.gateway.usage import dig, first, prompt_counts

# The longest text that any model accepts has fewer; a few megabytes of "{},{}," would take a gigabyte of memory.
_MAX_VALUES: Final = 1_000_000
_MAX_TOKENS: Final = 10**9
_MAX_ANSWERS: Final = 1000


class AmbiguousRequest(Exception):
    """The message is for the guest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeteredRequest:
    """``prompt``: its estimated tokens by kind. ``max_output``: tokens of all answers together. ``surcharge``: options
    that cost more than the list price, written as price lists write them after the model's name. ``unasked_usage``: an
    event reports the usage that only we asked for, so the client must not see it."""

    model: str
    streams: bool
    prompt: Mapping[str, int]
    max_output: int
    surcharge: str = ""
    unasked_usage: bool = False


def read(body: bytes, upstream: Upstream) -> tuple[MeteredRequest, bytes]:
    """The request, and the body to send. Raises AmbiguousRequest."""
    if sum(map(body.count, (b"{", b"[", b","))) > _MAX_VALUES:
        raise AmbiguousRequest("the request has too many values")
    try:
        given = json.loads(body, object_pairs_hook=_object)
        model = given["model"]
        if not isinstance(model, str):
            raise TypeError
    except (ValueError, RecursionError, TypeError, KeyError):
        raise AmbiguousRequest("the request must be a JSON object with a model, and without duplicate names") from None
    if why := _refusal(given, upstream):
        raise AmbiguousRequest(why)
    streams = given.get("stream") is True
    sent = _merged(given, upstream.stream_body) if streams else given
    if sent != given:
        body = json.dumps(sent).encode()
    limits = [_number(given, path, _MAX_TOKENS) for path in upstream.output_limit]
    answers = [_number(given, path, _MAX_ANSWERS) for path in upstream.answers]
    per_answer = max((limit for limit in limits if limit), default=upstream.output_default)
    surcharges = [one for one in upstream.surcharges if _has(given, one)]
    return MeteredRequest(
        model=model[:200],
        streams=streams,
        prompt=prompt_counts(len(body), given),
        max_output=per_answer * max((count for count in answers if count), default=1),
        surcharge="".join(f" {one}" for one in surcharges),
        unasked_usage=sent != given,
    ), body


def _merged(given: Any, ours: Any) -> Any:
    """What was given, with ours in it: its other fields are the client's to choose."""
    if not isinstance(ours, dict):
        return ours
    kept = given if isinstance(given, dict) else {}
    return {**kept, **{name: _merged(kept.get(name), value) for name, value in ours.items()}}


def _refusal(given: Mapping[str, Any], upstream: Upstream) -> str:
    """Why this request can't be counted; '' if it can."""
    for path in upstream.refused:
        if dig(given, path):
            return f"{path} is not allowed: what the service then reads or bills, the gateway does not see"
    if upstream.client_tools:
        items = given.get("input")
        holders = [given, *(items if isinstance(items, list) else ())]  # a list of tools may also be an item
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # of duplicate names, some parsers take the first, some the last
        raise ValueError
    return found


def _number(given: Mapping[str, Any], path: str, most: int) -> int | None:
    value = first(given, (path,))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most):
        raise AmbiguousRequest(f"{path} must be a whole number from 0 to {most}")
    return value


def _has(given: Mapping[str, Any], surcharge: str) -> bool:
    path, _, value = surcharge.partition("=")
    return bool(dig(given, path) == value)
