"""What a request that costs tokens asks for, at most: read so that no service could read more into it.

Whoever wrote it may want it to look cheaper than it is. So what can be read in two ways is refused, and what is dearer
than usual counts as such: `MeteredRequest` holds for any service that takes the request as JSON is meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from swarm.gateway.upstreams import Upstream
from swarm.gateway.usage import dig, first, prompt_counts

# A text as long as any model takes has fewer; a few megabytes of "{},{}," would be a gigabyte of memory.
_MOST_VALUES: Final = 1_000_000
_MOST_TOKENS: Final = 10**9
_MOST_ANSWERS: Final = 1000


class Unclear(Exception):
    """The message is for the one who asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeteredRequest:
    """``prompt``: its tokens by kind, estimated. ``longest``: tokens that may be answered, in all answers together.
    ``dearer``: what of it costs more than the list price, as it stands behind the model's name in a price list."""

    model: str
    streams: bool
    prompt: Mapping[str, int]
    longest: int
    surcharge: str = ""


def read(body: bytes, upstream: Upstream) -> tuple[MeteredRequest, bytes]:
    """And the body as it is to be sent. Raises Unclear."""
    if sum(map(body.count, (b"{", b"[", b","))) > _MOST_VALUES:
        raise Unclear("the request has too many values")
    try:
        given = json.loads(body, object_pairs_hook=_object)
        model = given["model"]
        if not isinstance(model, str):
            raise TypeError
    except (ValueError, RecursionError, TypeError, KeyError):
        raise Unclear("the request must be a JSON object that names a model, and each name once") from None
    streams = given.get("stream") is True
    if streams and upstream.stream_body:
        body = json.dumps({**given, **upstream.stream_body}).encode()
    limits = [_number(given, path, _MOST_TOKENS) for path in upstream.output_limit]
    answers = [_number(given, path, _MOST_ANSWERS) for path in upstream.answers]
    longest = max((limit for limit in limits if limit), default=upstream.output_default)
    surcharges = [one for one in upstream.surcharges if _is(given, one)]
    return MeteredRequest(
        model=model[:200],
        streams=streams,
        prompt=prompt_counts(len(body), given),
        longest=longest * max((count for count in answers if count), default=1),
        surcharge="".join(f" {one}" for one in surcharges),
    ), body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # some take the first, some the last
        raise ValueError
    return found


def _number(given: Mapping[str, Any], path: str, most: int) -> int | None:
    value = first(given, (path,))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most):
        raise Unclear(f"{path} must be a whole number from 0 to {most}")
    return value


def _is(given: Mapping[str, Any], surcharge: str) -> bool:
    path, _, value = surcharge.partition("=")
    return bool(dig(given, path) == value)
