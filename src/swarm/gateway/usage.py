"""The tokens that a call used, read from its answer."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from swarm.gateway.upstreams import Upstream

# English has about four bytes per token, code and other languages fewer: three overestimates English.
BYTES_PER_TOKEN: Final = 3
# More tokens than any answer has; and small enough that its price, at the highest that a price list may have, is one
# that the engine accepts.
_MAX_COUNT: Final = 10**8
_MAX_ITERATIONS: Final = 1000
# A call is made only if the budget allows an answer of this length.
LEAST_OUTPUT_TOKENS: Final = 64
# Larger answers and events are passed on without being parsed.
_MAX_PARSED_BYTES: Final = 64 << 20
_MAX_EVENT_BYTES: Final = 4 << 20
_MAX_UNPARSED_BYTES: Final = 64 * 1024  # of events, kept until someone asks what they say: a millisecond or two

_MAX_REPORT_BYTES: Final = 64 * 1024
_NO_CHOICES: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_EVENT_END: Final = re.compile(rb"(?<=\n\n)|(?<=\r\n\r\n)")

COUNTS: Final = ("input", "output", "cache_read", "cache_write")
# What answers say in words, not in numbers, besides the model: how the call was served.
_WORDS: Final = ("speed", "inference_geo", "service_tier")


def json_of(data: bytes) -> Any:
    """Always as UTF-8: by itself, Python would guess, and look for a codec that this process can't load any more.
    Raises ValueError, RecursionError."""
    return json.loads(data.removeprefix(codecs.BOM_UTF8).decode(errors="replace"))


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


def text_tokens(size: int) -> int:
    return -(-size // BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Tokens by kind, how many of ``cache_write`` are for an hour, and searches; of one model ('': the answer's)."""

    model: str
    counts: Mapping[str, int]


def without_usage(events: bytes) -> bytes:
    """Whole events of a stream of Chat Completions, without one that has nothing but the usage: clients that did not
    ask for it take the first of its choices, which it doesn't have."""
    if not _NO_CHOICES.search(events):
        return events
    return b"".join(event for event in _EVENT_END.split(events) if not _is_usage(event))


def _is_usage(event: bytes) -> bool:
    data = b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
    try:
        said = json_of(data) if len(data) <= _MAX_REPORT_BYTES else None
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("choices") == [] and isinstance(said.get("usage"), dict)


class Meter:
    """Reads one answer while it passes. ``feed`` returns what may be passed on: of a stream only whole events, so that
    the gateway can append one. Events are parsed lazily, so forwarding never waits for parsing.

    What a service says is not believed blindly: a number that can't be right is no report, and makes the bill an
    estimate (`doubted`)."""

    def __init__(
        self,
        upstream: Upstream,
        *,
        model: str,
        prompt: Mapping[str, int],
        max_output: int,
        streams: bool,
        sse: bool,
    ) -> None:
        """``prompt``: what it has, by kind, as long as the answer doesn't say; ``max_output``: of all answers together;
        ``streams``: was a stream asked for; ``sse``: is the answer one?"""
        self._upstream = upstream
        self._prompt = prompt
        self._max_output = max_output
        self._streams = streams
        self._sse = sse
        self._buffer = bytearray()
        self._unparsed: list[bytes] = []
        self._unparsed_bytes = 0
        self._too_large = False
        self._bytes = 0
        self._text_bytes = 0
        paths = itertools.chain(*upstream.usage.values(), upstream.iterations, ["error"])
        self._usage_fields = {path.partition(".")[0] for path in paths}
        self._searched = [condition.split("=", 1) for condition in upstream.searched]
        self._counts: dict[str, int] = {}
        self._words: dict[str, str] = {}
        self._iterations: list[dict[str, int | str]] = []
        self._searches = 0
        self._model = model
        self._finished = False
        self._final = False  # the usage was reported when, or after, the answer had ended
        self._error = ""
        self._doubted = False

    @property
    def model(self) -> str:
        """The name that the service reported, or the requested one until then."""
        self._parse_events()
        return self._model

    @property
    def words(self) -> Mapping[str, str]:
        """How the service says that it served the call: `speed`, `inference_geo`, `service_tier`."""
        self._parse_events()
        return self._words

    @property
    def doubted(self) -> bool:
        """Did the service report something that can't be right?"""
        self._parse_events()
        return self._doubted

    def usage_reported(self, *, ended: bool) -> bool:
        """Has the service reported what it bills for the whole answer? ``ended``: was the answer seen to its end?"""
        self._parse_events()
        return self._final if self._sse and self._upstream.finished else ended and self._reported

    @property
    def ended(self) -> bool:
        """Has a stream said that its answer is complete?"""
        self._parse_events()
        return self._finished

    @property
    def prompt_reported(self) -> bool:
        counts = self.counts_so_far()
        return any(counts[kind] for kind in ("input", "cache_read", "cache_write"))

    @property
    def _reported(self) -> bool:
        return "input" in self._counts and ("output" in self._counts or "total" in self._counts)

    @property
    def error(self) -> str:
        """The error that the service answered with instead of an answer; '' when there was some answer before it."""
        self._parse_events()
        return "" if self._counts or self._text_bytes else self._error

    @property
    def failure(self) -> str:
        """The error that the answer broke off with, whatever came before it."""
        return self._error

    def feed(self, data: bytes) -> bytes:
        self._bytes += len(data)
        if not self._sse:
            if len(self._buffer) + len(data) <= _MAX_PARSED_BYTES:
                self._buffer += data
            else:
                self._too_large = True
            return data
        if not self._buffer and data.endswith((b"\n\n", b"\r\n\r\n")):  # whole events, as services usually send
            self._keep(data)
            return data
        self._buffer += data
        end = max(self._buffer.rfind(b"\n\n") + 2, self._buffer.rfind(b"\r\n\r\n") + 4)
        if end < 4:
            if len(self._buffer) <= _MAX_EVENT_BYTES:
                return b""
            end = len(self._buffer)
        events = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._keep(events)
        return events

    def _keep(self, events: bytes) -> None:
        self._unparsed.append(events)
        self._unparsed_bytes += len(events)
        if self._unparsed_bytes > _MAX_UNPARSED_BYTES:
            self._parse_events()

    def end(self) -> bytes:
        """The answer has ended. Returns what is left to pass on."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        if self._sse:
            self._unparsed.append(rest)  # the last event, of a service that ends it with the stream
            return rest
        if not self._too_large:
            self._parse(rest)
        return b""

    def _parse_events(self) -> None:
        unparsed, self._unparsed, self._unparsed_bytes = self._unparsed, [], 0
        for events in unparsed:
            data: list[bytes] = []
            for line in (*events.removeprefix(codecs.BOM_UTF8).splitlines(), b""):
                if line.startswith(b"data:"):
                    data.append(line[5:])
                elif not line and data:  # the end of an event
                    if sum(map(len, data)) <= _MAX_EVENT_BYTES:
                        self._parse(b"\n".join(data))
                    data = []

    def _parse(self, text: bytes) -> None:
        try:
            event = json_of(text)
        except (ValueError, RecursionError):
            if text.strip() == b"[DONE]":  # of one dialect, at the end of its streams
                self._finished, self._final = True, self._reported
            return
        if not isinstance(event, dict):
            return
        # A fast check first: most of a stream's many events have only text.
        if self._usage_fields & event.keys():
            self._read(event)
        self._finished = self._finished or first(event, self._upstream.finished) is not None
        self._final = self._finished and self._reported
        self._searches += sum(dig(event, path) == word for path, word in self._searched)
        for path in self._upstream.text:
            if isinstance(found := dig(event, path), str):
                self._text_bytes += len(found.encode(errors="replace"))

    def _read(self, event: dict[str, Any]) -> None:
        for kind, value in self._values(event).items():
            if kind == "model":
                self._model = str(value)
            elif isinstance(value, str):
                self._words[kind] = value
            # Counts are sums so far, so an input of 0 after another one says nothing.
            elif value or kind == "output" or kind not in self._counts:
                self._counts[kind] = value
        if (iterations := first(event, self._upstream.iterations)) is not None:
            self._iterations = self._read_iterations(iterations)
        if not self._error and (error := event.get("error")) is not None:
            self._error = str(dig(error, "type") or dig(error, "code") or dig(error, "message") or error)[:200]

    def _values(self, event: dict[str, Any]) -> dict[str, int | str]:
        """What an event reports. A value that can't be right is left out, and makes the rest doubtful."""
        values: dict[str, int | str] = {}
        for kind, paths in self._upstream.usage.items():
            found = first(event, paths)
            if found is None:
                continue
            if kind == "model" or kind in _WORDS:
                if isinstance(found, str) and found:
                    values[kind] = found[:200]
                continue
            if isinstance(found, float) and found.is_integer():
                found = int(found)
            if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= _MAX_COUNT:
                values[kind] = found
            else:
                self._doubted = True
        return values

    def _read_iterations(self, given: Any) -> list[dict[str, int | str]]:
        if not isinstance(given, list) or len(given) > _MAX_ITERATIONS:
            self._doubted = True
            return []
        found = []
        for one in given:
            values = self._values({"usage": one, "model": dig(one, "model")})
            self._doubted = self._doubted or not {"input", "output"} <= values.keys()
            found.append(values)
        return found

    def counts_so_far(self) -> dict[str, int]:
        """For a running stream: output is counted from the text so far, as services report it only at the end."""
        self._parse_events()
        return self._normal(self._counts) | {"output": text_tokens(self._text_bytes)}

    def reported(self) -> list[Share]:
        """What the service bills, by its own word: `usage_reported`. An answer that was made in several runs of a model
        (compaction, advisor, fallback) is billed by run, and its usage alone leaves some of them out."""
        whole = self._normal(self._counts)
        if not self._iterations:
            return [Share(model="", counts=whole)]
        shares = [Share(model=str(one.get("model", "")), counts=self._normal(one)) for one in self._iterations]
        for kind in COUNTS:
            missing = whole[kind] - sum(share.counts.get(kind, 0) for share in shares)
            if missing > 0:
                self._doubted = True
                shares.append(Share(model="", counts={kind: missing}))
        return [*shares, Share(model="", counts={"web_search": whole["web_search"]})]

    def estimated(self, *, ended: bool) -> dict[str, int]:
        """What an answer may have cost that did not report it, or not all of it. Has it ``ended``?"""
        self._parse_events()
        if not ended and self._sse and self._buffer:
            self._unparsed.append(bytes(self._buffer))
            self._parse_events()
        counts, most = self._normal(self._counts), self._max_output
        came = text_tokens(self._text_bytes if self._sse else self._bytes if ended else 0)
        if not ended and not came:
            # The service works on a request even when its client has disconnected; a stream it ends soon. The length
            # of an answer in one piece says little: it may have thought unseen.
            came = min(most, LEAST_OUTPUT_TOKENS) if self._streams else most
        counts["output"] = max(counts["output"], min(came, most))
        counts["web_search"] = max(counts["web_search"], self._searches)
        if not self.prompt_reported:
            counts |= self._prompt
        return counts

    def _normal(self, reported: Mapping[str, Any]) -> dict[str, int]:
        """Each token once: services count parts of a kind again, or leave some out."""
        counts = {kind: int(reported.get(kind, 0)) for kind in (*COUNTS, "cache_write_1h", "web_search")}
        unexplained = int(reported.get("total", 0)) - counts["input"] - counts["output"]
        if unexplained > 0:  # some services leave the hidden reasoning out of the output, and bill it
            self._doubted = self._doubted or ("output" in reported and unexplained != reported.get("reasoning"))
            counts["output"] += unexplained
        counts["cache_write"] = max(counts["cache_write"], counts["cache_write_1h"])
        if self._upstream.cache_in_input:
            if counts["cache_read"] > counts["input"]:
                self._doubted = True
                counts["cache_read"] = counts["input"]
            counts["input"] -= counts["cache_read"]
        return counts


def total(counts: Mapping[str, int]) -> int:
    return sum(counts.get(kind, 0) for kind in COUNTS)
