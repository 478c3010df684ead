"""The channel's wire format on the host's side. The guest is hostile.

A frame is ``>II`` (length of the header, length of the payload), a JSON object, and raw bytes. A guest can't make the
host allocate more than these limits. agentd.py repeats them, as it can't import this module. Nor can it keep the host
busy: a header is parsed only if it has few brackets and commas, whatever they mean, since the time and memory that
parsing takes grow with them (64 KiB of `[]` take 15 ms, a single text 0.1 ms).
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from swarm.errors import ChannelError, UsageError

MAX_HEADER_BYTES: Final = 64 << 10
MAX_PAYLOAD_BYTES: Final = 1 << 20
# In what a guest sends. The longest honest header names the modules of a preload that failed, or quotes an error.
MAX_BRACKETS: Final = 256
MAX_COMMAS: Final = 1024
MAX_WORD_BYTES: Final = (128 << 10) - 1  # of an argument, or a variable with its name; Linux's MAX_ARG_STRLEN
MAX_WORDS_BYTES: Final = 2 << 20  # of all; Linux takes a quarter of the stack's limit, which is 8 MiB
MAX_PACKED_BYTES: Final = 16 << 20  # of those in JSON, with a first input
_LARGE: Final = ("argv", "env")
_HEADER_ROOM_BYTES: Final = 32 << 10  # for large fields in a header
_PREFIX: Final = struct.Struct(">II")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame from a guest. The accessors raise ChannelError if a field has the wrong type or is out of range."""

    head: Mapping[str, object]
    payload: bytes
    head_bytes: int = 0  # as it was sent

    def text(self, key: str, *, limit: int = 4096) -> str:
        value = self.head.get(key)
        if not isinstance(value, str) or len(value) > limit:
            raise self._wrong(key, "a text")
        return value

    def flag(self, key: str) -> bool:
        value = self.head.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def number(self, key: str) -> int:
        """An integer from 0 to 2**63 - 1."""
        value = self.head.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
            raise self._wrong(key, "a number")
        return value

    def optional_number(self, key: str) -> int | None:
        return None if self.head.get(key) is None else self.number(key)

    def optional_text(self, key: str) -> str | None:
        return None if self.head.get(key) is None else self.text(key)

    def mapping(self, key: str) -> Mapping[str, str]:
        value = self.head.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return {printable(name): printable(text) for name, text in value.items()}

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.head.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of texts")
        return tuple(value)

    def _wrong(self, key: str, wanted: str) -> ChannelError:
        return ChannelError(f"the guest's reply has {key}={printable(self.head.get(key))} where {wanted} is expected")


def encode(head: Mapping[str, object], payload: bytes = b"") -> bytes:
    """Raises ValueError when header or payload is larger than the limits."""
    data = json.dumps(head, separators=(",", ":")).encode()
    if len(data) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(
            f"a frame of {len(data)} + {len(payload)} bytes; the limits are {MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}"
        )
    return _PREFIX.pack(len(data), len(payload)) + data + payload


def fit(fields: Mapping[str, object], payload: bytes) -> tuple[Mapping[str, object], bytes]:
    """A request's fields and payload as they are sent: an ``argv`` and ``env`` that no header holds go before the
    payload, as JSON. ``packed``: how many bytes that takes, and all together. What one frame does not hold follows in
    others. Raises UsageError for what Linux would not take."""
    large = {name: fields[name] for name in _LARGE if name in fields}
    argv, env = large.get("argv"), large.get("env")
    words = [str(word) for word in argv] if isinstance(argv, list | tuple) else []
    words += [f"{name}={value}" for name, value in env.items()] if isinstance(env, dict) else []
    if sum(map(len, words)) + 8 * len(words) < _HEADER_ROOM_BYTES // 6:  # a character takes up to 6 bytes in JSON
        return fields, payload
    sizes = [len(word.encode(errors="surrogatepass")) for word in words]
    if (most := max(sizes)) > MAX_WORD_BYTES:
        raise UsageError(
            f"an argument or variable has {most:,} bytes: Linux takes {MAX_WORD_BYTES:,} in one: send a file"
        )
    if (most := sum(sizes) + 9 * len(sizes)) > MAX_WORDS_BYTES:  # each has an end, and a pointer to it
        raise UsageError(
            f"arguments and environment take {most:,} bytes: Linux takes {MAX_WORDS_BYTES:,} together: send a file"
        )
    data = json.dumps(large, separators=(",", ":")).encode()
    if len(data) <= _HEADER_ROOM_BYTES:
        return fields, payload
    rest = {name: value for name, value in fields.items() if name not in large}
    return {**rest, "packed": [len(data), len(data) + len(payload)]}, data + payload


def unfit(fields: Mapping[str, object], payload: bytes) -> tuple[Mapping[str, object], bytes]:
    """What `fit` was given. Raises UsageError."""
    size, total = packed(fields)
    if not size:
        return fields, payload
    try:
        if len(payload) != total:
            raise ValueError
        large = json.loads(payload[:size])
        if not isinstance(large, dict) or set(large) - set(_LARGE):
            raise ValueError
    except (ValueError, RecursionError):
        raise UsageError("the arguments of a request make no sense") from None
    return {**{name: value for name, value in fields.items() if name != "packed"}, **large}, payload[size:]


def packed(fields: Mapping[str, object]) -> tuple[int, int]:
    """How large the JSON of `fit` is, and it with the payload; 0 if there is none. Raises UsageError."""
    said = fields.get("packed", [0, 0])
    match said:
        case [int(size), int(total)] if 0 <= size <= total <= MAX_PACKED_BYTES:
            return size, total
    raise UsageError("the arguments of a request make no sense")


async def read(reader: asyncio.StreamReader, *, who: str = "guest") -> Frame:
    """The next frame. Raises ChannelError for anything else; the caller limits the time. ``who``: that sends it; only a
    guest's header must be cheap to parse."""
    try:
        header_bytes, payload_bytes = _PREFIX.unpack(await reader.readexactly(_PREFIX.size))
        if not 2 <= header_bytes <= MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
            raise ChannelError(f"the {who} announced a frame of {header_bytes} + {payload_bytes} bytes")
        text = await reader.readexactly(header_bytes)
        costly = sum(map(text.count, (b"[", b"{"))) > MAX_BRACKETS or text.count(b",") > MAX_COMMAS
        if costly and who == "guest":
            raise ChannelError("the guest sent a header of too many values")
        head = json.loads(text)
        payload = await reader.readexactly(payload_bytes)
    except asyncio.IncompleteReadError:
        raise ChannelError(f"the {who} closed the connection") from None
    except OSError as error:
        raise ChannelError(f"the connection to the {who} broke: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"the {who} sent a header that is not JSON ({type(error).__name__})") from None
    if not isinstance(head, dict):
        raise ChannelError(f"the {who} sent a header that is not a JSON object")
    return Frame(head=head, payload=payload, head_bytes=header_bytes)


def printable(value: object, *, limit: int = 300) -> str:
    """Text from a guest, safe for a message: one short line without control characters."""
    text = value if isinstance(value, str) else repr(value)[: limit + 1]
    clean = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[:limit] + "…"
