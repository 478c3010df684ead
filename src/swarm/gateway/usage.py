"""What a call will use, guessed from its request, and what it used, read from its answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from swarm.gateway.upstreams import Upstream

# English has about four bytes to a token, code and other languages fewer: three errs on the dear side for the former.
_BYTES_PER_TOKEN: Final = 3
# What a picture costs at most, whatever its bytes (the service scales it down); documents by their size.
_IMAGE_TOKENS: Final = 2000
_DOCUMENT_BYTES_PER_TOKEN: Final = 20
# One that the service fetches, or has kept, can't be looked at: ten pages of text and picture.
_UNSEEN_DOCUMENT_TOKENS: Final = 30_000
_MOST: Final = 10**12  # a count that no answer has
# Answers and events that are larger are passed on, but not looked into.
_MAX_PARSED_BYTES: Final = 64 << 20
_MAX_EVENT_BYTES: Final = 4 << 20

COUNTS: Final = ("input", "output", "cache_read", "cache_write")


def dig(value: Any, path: str) -> Any:
    """The value at a dotted path ('choices.0.delta'); None when there is none."""
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def first(value: Any, paths: Iterable[str]) -> Any:
    return next((found for path in paths if (found := dig(value, path)) is not None), None)


def prompt_counts(size: int, body: Any) -> dict[str, int]:
    """About how many tokens a request has, by kind, rather too many than too few. ``size``: its bytes. If any of it is
    to be cached, all of it may be, at the price of writing it there."""
    pictures = documents = unseen = attached = 0
    kept: dict[str, int] = {}
    waiting = [body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            if cached := value.get("cache_control"):
                kept["cache_write"] = 1
                if isinstance(cached, dict) and cached.get("ttl") == "1h":
                    kept["cache_write_1h"] = 1
            source = value.get("source")
            if isinstance(source, dict) and source.get("type") in ("url", "file"):
                if value.get("type") == "image":
                    pictures += 1
                else:
                    unseen += 1
            data = value.get("data")
            if value.get("type") == "base64" and isinstance(data, str):
                attached += len(data)
                if str(value.get("media_type", "")).startswith("image/"):
                    pictures += 1
                else:
                    documents += len(data)
            else:
                waiting += value.values()
    text = max(0, size - attached)
    tokens = text // _BYTES_PER_TOKEN + 1 + pictures * _IMAGE_TOKENS + documents // _DOCUMENT_BYTES_PER_TOKEN
    tokens += unseen * _UNSEEN_DOCUMENT_TOKENS
    return dict.fromkeys(kept or ("input",), tokens)


def text_tokens(size: int) -> int:
    return -(-size // _BYTES_PER_TOKEN)


class Meter:
    """Reads one answer as it comes by. ``feed`` gives back what may be passed on: of a stream whole events, so that one
    of ours can be put behind them. What they say is read when somebody asks: whoever waits for them need not wait for
    that."""

    def __init__(self, upstream: Upstream, *, model: str, sse: bool, guessed_input: int) -> None:
        self._upstream = upstream
        self._sse = sse
        self.guessed_input = guessed_input
        self._buffer = bytearray()
        self._unread: list[bytes] = []
        self._too_large = False
        self._text_bytes = 0
        self._told_in = {path.partition(".")[0] for paths in upstream.usage.values() for path in paths}
        self._counts: dict[str, int] = {}
        self._model = model
        self._told = False

    @property
    def model(self) -> str:
        """As the service names it, once it has."""
        self._catch_up()
        return self._model

    @property
    def told(self) -> bool:
        """Has the service said how much it used?"""
        self._catch_up()
        return self._told

    def feed(self, data: bytes) -> bytes:
        if not self._sse:
            if len(self._buffer) + len(data) <= _MAX_PARSED_BYTES:
                self._buffer += data
            else:
                self._too_large = True
            return data
        if not self._buffer and data.endswith((b"\n\n", b"\r\n\r\n")):  # as services write them
            self._unread.append(data)
            return data
        self._buffer += data
        end = max(self._buffer.rfind(b"\n\n") + 2, self._buffer.rfind(b"\r\n\r\n") + 4)
        if end < 4:
            if len(self._buffer) <= _MAX_EVENT_BYTES:
                return b""
            end = len(self._buffer)
        whole = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._unread.append(whole)
        return whole

    def end(self) -> bytes:
        """The answer is over: what is left to pass on."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        if self._sse:
            return rest
        if not self._too_large:
            self._read(rest)
        return b""

    def _catch_up(self) -> None:
        unread, self._unread = self._unread, []
        for events in unread:
            for line in events.splitlines():
                if line.startswith(b"data:") and len(line) <= _MAX_EVENT_BYTES:
                    self._read(line[5:])

    def _read(self, text: bytes) -> None:
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):  # "[DONE]", or no JSON: passed on as it is
            return
        if not isinstance(event, dict):
            return
        # Most events of a stream are text alone, and there are many of them.
        for kind, paths in self._upstream.usage.items() if self._told_in & event.keys() else ():
            found = first(event, paths)
            if kind == "model":
                if isinstance(found, str) and found:
                    self._model = found[:200]
            elif isinstance(found, int) and 0 <= found <= _MOST:
                self._counts[kind] = found
                self._told = self._told or kind == "output"
        for path in self._upstream.text:
            if isinstance(found := dig(event, path), str):
                self._text_bytes += len(found.encode(errors="replace"))

    def counts_so_far(self) -> dict[str, int]:
        """Of a stream that goes on. What the service itself says of the output comes at its end, and is left out."""
        counts = self.counts(whole=True)
        return counts | {"output": text_tokens(self._text_bytes)}

    def counts(self, *, whole: bool) -> dict[str, int]:
        """Tokens by kind, of those written to the cache how many for an hour, and searches. Until the answer is
        ``whole``, its output is what came of it, since a service says how much it was at the end only."""
        self._catch_up()
        counts = {kind: self._counts.get(kind, 0) for kind in (*COUNTS, "cache_write_1h", "web_search")}
        if self._upstream.cache_in_input:
            counts["input"] = max(0, counts["input"] - counts["cache_read"])
        if not whole:
            counts["output"] = max(counts["output"], text_tokens(self._text_bytes))
            if not any(counts[kind] for kind in ("input", "cache_read", "cache_write")):
                counts["input"] = self.guessed_input
        return counts


def total(counts: Mapping[str, int]) -> int:
    return sum(counts.get(kind, 0) for kind in COUNTS)
