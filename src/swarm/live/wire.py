"""What goes over an engine's live socket. A connection is for one request, whose first frame names a sandbox:

::

    {"ask": "fork", "sandbox": …, "by": …, "fields": {…}}        answered by {"answer": {…}} or {"fault": {…}}
    {"open": "exec", "sandbox": …, "by": …, "fields": {…}} + payload      answered by {"opened": true}, or a fault;
        then the frames of the conversation go both ways as agentd says and hears them, up to its "ok" or "error", or a
        fault of the engine.

The frames are the channel's (`swarm.channel.frames`), all with the same id. Only the engine's own user can open the
socket.
"""

from __future__ import annotations

from asyncio import StreamReader
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from swarm.channel import frames
from swarm.channel.frames import Frame, printable, unfit
from swarm.errors import (
    BootFailed,
    ChannelError,
    Conflict,
    HostError,
    ImageError,
    LeaseLost,
    NoImage,
    NoSpace,
    NotConfigured,
    NotFound,
    OutcomeUnknown,
    OverBudget,
    StepError,
    StoreError,
    SwarmError,
    UsageError,
)

ID: Final = 1
READ_BYTES: Final = 1 << 20  # of a connection's buffer
FIRST_SECONDS: Final = 10.0  # for the first frame
_MAX_SAID: Final = 4000


class NotHeld(Conflict):
    """The engine does not hold the sandbox, or no longer: it pauses it, or stops. Another try finds who does."""


# An error keeps its kind on the way, or becomes the nearest of these.
_KINDS: Final[Mapping[str, type[SwarmError]]] = {
    kind.__name__: kind
    for kind in (
        SwarmError, UsageError, NotFound, Conflict, NotHeld, LeaseLost, StoreError, HostError, NoSpace, ImageError,
        NoImage, StepError, BootFailed, ChannelError, NotConfigured, OverBudget, OutcomeUnknown,
    )
}  # fmt: skip


def fault(error: SwarmError) -> Mapping[str, object]:
    kind = next(one.__name__ for one in type(error).__mro__ if _KINDS.get(one.__name__) is one)
    return {"ok": True, "fault": {"kind": kind, "message": str(error)[:_MAX_SAID]}}


def raise_fault(frame: Frame) -> None:
    """If the frame is one: as the engine raised it."""
    said = frame.head.get("fault")
    if said is None:
        return
    if not isinstance(said, dict) or not isinstance(message := said.get("message"), str):
        raise ChannelError("the engine sent a frame that makes no sense")
    raise _KINDS.get(str(said.get("kind")), SwarmError)(message)


async def asked(reader: StreamReader) -> Request:
    """The request of a new connection. Raises UsageError, ChannelError; the caller limits the time."""
    first = await frames.read(reader, who="client")
    fields = first.head.get("fields")
    _, total = frames.packed(fields) if isinstance(fields, dict) else (0, 0)
    payload = bytearray(first.payload)
    while len(payload) < total:
        more = await frames.read(reader, who="client")
        if not more.payload:
            raise UsageError("a request ended before it was whole")
        payload += more.payload
    return Request(replace(first, payload=bytes(payload)))


class Request:
    """The first frame of a connection. Raises UsageError for one that makes no sense."""

    def __init__(self, frame: Frame) -> None:
        head = frame.head
        verbs = [(name, head[name]) for name in ("ask", "open") if name in head]
        fields = head.get("fields", {})
        if len(verbs) != 1 or not isinstance(fields, dict):
            raise UsageError("a connection begins with one `ask` or `open`, and its fields")
        self.asks = verbs[0][0] == "ask"
        self.verb, self.sandbox, self.by = (_text(text) for text in (verbs[0][1], head.get("sandbox"), head.get("by")))
        self.fields, self.payload = unfit(fields, frame.payload)

    def text(self, name: str) -> str | None:
        """One of the fields. Raises UsageError."""
        return _text(given) if (given := self.fields.get(name)) is not None else None

    def number(self, name: str) -> float | None:
        given = self.fields.get(name)
        if given is None:
            return None
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1e12:
            raise UsageError(f"{name} must be a number above 0, not {printable(given)}")
        return given


def _text(given: object) -> str:
    if not isinstance(given, str) or not 0 < len(given) <= 300:
        raise UsageError(f"a name must be a text of 1 to 300 characters, not {printable(given)}")
    return given
