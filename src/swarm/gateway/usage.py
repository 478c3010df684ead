"""The tokens that a call will use, estimated from its request, and those it used, read from its answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from swarm.gateway.upstreams import Upstream

# English has about four bytes per token, code and other languages fewer: three overestimates English.
_BYTES_PER_TOKEN: Final = 3
# The most that an image costs, whatever its size (the service scales it down). Documents are counted by their size.
_IMAGE_TOKENS: Final = 2000
_DOCUMENT_BYTES_PER_TOKEN: Final = 20
# For a document that the service fetches or has stored, whose size is unknown: ten pages of text and images.
_UNSEEN_DOCUMENT_TOKENS: Final = 30_000
_MAX_COUNT: Final = 10**12
# Larger answers and events are passed on without being parsed.
_MAX_PARSED_BYTES: Final = 64 << 20
_MAX_EVENT_BYTES: Final = 4 << 20

COUNTS: Final = ("input", "output", "cache_read", "cache_write")


def dig(value: Any, path: str) -> Any:
    """The value at a dotted path ('choices.0.delta'), or None."""
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
    """Estimates the tokens of a request by kind, too many rather than too few. ``size``: its bytes. If any part is to
    be cached, all of it counts as written to the cache."""
    images = document_bytes = unseen_documents = attached_bytes = 0
    kinds: dict[str, int] = {}
    pending = [body]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            if cached := value.get("cache_control"):
                kinds["cache_write"] = 1
                if isinstance(cached, dict) and cached.get("ttl") == "1h":
                    kinds["cache_write_1h"] = 1
            source = value.get("source")
            if isinstance(source, dict) and source.get("type") in ("url", "file"):
                if value.get("type") == "image":
                    images += 1
                else:
                    unseen_documents += 1
            data = value.get("data")
            if value.get("type") == "base64" and isinstance(data, str):
                attached_bytes += len(data)
                if str(value.get("media_type", "")).startswith("image/"):
                    images += 1
                else:
                    document_bytes += len(data)
            else:
                pending += value.values()
    tokens = max(0, size - attached_bytes) // _BYTES_PER_TOKEN + 1 + images * _IMAGE_TOKENS
    tokens += document_bytes // _DOCUMENT_BYTES_PER_TOKEN + unseen_documents * _UNSEEN_DOCUMENT_TOKENS
    return dict.fromkeys(kinds or ("input",), tokens)


def text_tokens(size: int) -> int:
    return -(-size // _BYTES_PER_TOKEN)


class Meter:
    """Reads one answer while it passes. ``feed`` returns what may be passed on: of a stream only whole events, so that
    the gateway can append one. Events are parsed lazily, so forwarding never waits for parsing."""

    def __init__(self, upstream: Upstream, *, model: str, sse: bool, estimated_input: int) -> None:
        self._upstream = upstream
        self._sse = sse
        self.estimated_input = estimated_input
        self._buffer = bytearray()
        self._unparsed: list[bytes] = []
        self._too_large = False
        self._text_bytes = 0
        self._usage_fields = {path.partition(".")[0] for paths in upstream.usage.values() for path in paths}
        self._counts: dict[str, int] = {}
        self._model = model
        self._usage_reported = False

    @property
    def model(self) -> str:
        """The name that the service reported, or the requested one until then."""
        self._parse_events()
        return self._model

    @property
    def usage_reported(self) -> bool:
        """Has the service reported the size of its answer?"""
        self._parse_events()
        return self._usage_reported

    def feed(self, data: bytes) -> bytes:
        if not self._sse:
            if len(self._buffer) + len(data) <= _MAX_PARSED_BYTES:
                self._buffer += data
            else:
                self._too_large = True
            return data
        if not self._buffer and data.endswith((b"\n\n", b"\r\n\r\n")):  # whole events, as services usually send
            self._unparsed.append(data)
            return data
        self._buffer += data
        end = max(self._buffer.rfind(b"\n\n") + 2, self._buffer.rfind(b"\r\n\r\n") + 4)
        if end < 4:
            if len(self._buffer) <= _MAX_EVENT_BYTES:
                return b""
            end = len(self._buffer)
        events = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._unparsed.append(events)
        return events

    def end(self) -> bytes:
        """The answer has ended. Returns what is left to pass on."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        if self._sse:
            return rest
        if not self._too_large:
            self._parse(rest)
        return b""

    def _parse_events(self) -> None:
        unparsed, self._unparsed = self._unparsed, []
        for events in unparsed:
            for line in events.splitlines():
                if line.startswith(b"data:") and len(line) <= _MAX_EVENT_BYTES:
                    self._parse(line[5:])

    def _parse(self, text: bytes) -> None:
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):  # "[DONE]", or not JSON
            return
        if not isinstance(event, dict):
            return
        # A fast check first: most of a stream's many events have only text.
        for kind, paths in self._upstream.usage.items() if self._usage_fields & event.keys() else ():
            found = first(event, paths)
            if kind == "model":
                if isinstance(found, str) and found:
                    self._model = found[:200]
            elif isinstance(found, int) and 0 <= found <= _MAX_COUNT:
                self._counts[kind] = found
                self._usage_reported = self._usage_reported or kind == "output"
        for path in self._upstream.text:
            if isinstance(found := dig(event, path), str):
                self._text_bytes += len(found.encode(errors="replace"))

    def counts_so_far(self) -> dict[str, int]:
        """For a running stream: output is counted from the text so far, as services report it only at the end."""
        return self.counts(complete=True) | {"output": text_tokens(self._text_bytes)}

    def counts(self, *, complete: bool) -> dict[str, int]:
        """Tokens by kind, how many of ``cache_write`` are for an hour, and searches. Unless the answer is ``complete``,
        its output is at least the text that arrived: services report the output only at the end."""
        self._parse_events()
        counts = {kind: self._counts.get(kind, 0) for kind in (*COUNTS, "cache_write_1h", "web_search")}
        if self._upstream.cache_in_input:
            counts["input"] = max(0, counts["input"] - counts["cache_read"])
        if not complete:
            counts["output"] = max(counts["output"], text_tokens(self._text_bytes))
            if not any(counts[kind] for kind in ("input", "cache_read", "cache_write")):
                counts["input"] = self.estimated_input
        return counts


def total(counts: Mapping[str, int]) -> int:
    return sum(counts.get(kind, 0) for kind in COUNTS)
