"""What comes in pieces: Server-Sent Events, and the lines that agents print. No I/O."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Final

from swarm.client import calls
from swarm.client.errors import ServerError
from swarm.client.values import Event, Executed, Line, Output, read

_MAX_BYTES: Final = 8 << 20  # of one event
_QUIET_SECONDS: Final = 30.0  # more than the server is ever silent
_MAX_CHARS: Final = 64 << 10  # of a line that does not end
_LINE_END: Final = re.compile(r"\r\n|\r|\n")


class Following:
    """A ticket's events as they come, each once, over any number of connections."""

    def __init__(self, id: str, after: int = 0) -> None:
        self._id, self._after = id, after
        self._rest, self._blocks = bytearray(), 0
        self.ended = False

    @property
    def call(self) -> calls.Call:
        """The request that goes on behind the last event."""
        self._rest, self._blocks = bytearray(), 0  # half an event of a connection that broke is sent again
        headers = {"last-event-id": str(self._after), "accept": "text/event-stream"}
        path = calls.ticket(self._id, "events/live")
        return calls.Call(method="GET", path=path, headers=headers, repeatable=True, extra_seconds=_QUIET_SECONDS)

    @property
    def flows(self) -> bool:
        """Whether this connection brought more than its greeting."""
        return self._blocks > 1

    def check(self, kind: str) -> None:
        if not kind.startswith("text/event-stream"):
            raise ServerError(f"the answer is {kind or 'nothing'}, not events: is this Swarm's server?")

    def take(self, data: bytes) -> Iterator[Event]:
        """The events that are whole with these bytes."""
        searched = max(0, len(self._rest) - 1)
        self._rest += data
        whole: list[bytes] = []
        if self._rest.find(b"\n\n", searched) >= 0:
            *whole, rest = bytes(self._rest).split(b"\n\n")
            self._rest = bytearray(rest)
        self._blocks += len(whole)
        if len(self._rest) > _MAX_BYTES:
            raise ServerError(f"an event has more than {_MAX_BYTES:,} bytes: is this Swarm's server?")
        for block in whole:
            fields = dict(self._field(line) for line in block.split(b"\n") if not line.startswith(b":"))
            if fields.get("event") == "end":
                self.ended = True
                return
            if "id" not in fields:
                continue
            try:
                event = read(Event, json.loads(fields["data"]))
            except (ValueError, TypeError, LookupError, AttributeError):
                raise ServerError("an event is not JSON of an event: is this Swarm's server?") from None
            if event.seq > self._after:
                self._after = event.seq
                yield event

    @staticmethod
    def _field(line: bytes) -> tuple[str, str]:
        name, _, text = line.decode(errors="replace").partition(":")
        return name, text.removeprefix(" ")


class Outputs:
    """A command's output as it comes, each piece once, over any number of connections; ``result``: how it ended."""

    def __init__(self, sandbox: str, process: str, after: int) -> None:
        self._path = calls.process(sandbox, process, "output")
        self._rest = bytearray()
        self.after = after
        self.dropped_bytes = 0
        self.result: Executed | None = None
        self.silent_seconds = calls.START_SECONDS  # a sandbox may start; then the connection is made anew
        self._process = process

    @property
    def call(self) -> calls.Call:
        """The request that goes on behind the last piece."""
        self._rest = bytearray()
        query = {"after": self.after, "follow": "true", "lines": "true"}
        seconds = self.silent_seconds
        return calls.Call(method="GET", path=self._path, query=query, repeatable=True, extra_seconds=seconds)

    def take(self, data: bytes) -> Iterator[Output]:
        """The pieces that are whole with these bytes."""
        self._rest += data
        if b"\n" not in data:
            if len(self._rest) > _MAX_BYTES:
                raise ServerError(f"a line has more than {_MAX_BYTES:,} bytes: is this Swarm's server?")
            return
        *whole, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        for line in whole:
            try:
                said = json.loads(line)
                if "exit" in said:
                    ms = (said["exit"]["ended_ns"] - said["exit"]["started_ns"]) / 1e6
                    self.result = read(Executed, {**said["exit"], "process": self._process, "ms": max(0.0, ms)})
                elif "stream" not in said:
                    self.dropped_bytes += said["dropped_bytes"]
                elif said["offset"] > self.after:
                    self.after = said["offset"]
                    yield Output(stream=said["stream"], data=base64.b64decode(said["data"]))
            except (ValueError, TypeError, LookupError):
                raise ServerError("a line is not JSON of output: is this Swarm's server?") from None


class Lines:
    """Puts the pieces of output in events together to lines: those of several steps, or of stdout and stderr, don't
    mix."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, str, str], str] = {}

    def take(self, event: Event) -> Iterator[Line]:
        step = event.step_id or ""
        if event.kind == "output":
            stream = str(event.data.get("stream", ""))
            key = (step, event.attempt_id or "", stream)
            text = self._begun.pop(key, "") + str(event.data.get("text", ""))
            held = "\r" if text.endswith("\r") else ""  # the line end may be "\r\n"
            *lines, rest = _LINE_END.split(text.removesuffix(held))
            for line in lines:
                yield Line(text=line, step=step, stream=stream, at=event.at)
            if len(rest) > _MAX_CHARS:
                yield Line(text=rest, step=step, stream=stream, at=event.at)
            elif rest or held:
                self._begun[key] = rest + held
        elif event.kind == "transition" and event.data.get("of") == "step":
            yield from self._finish([key for key in self._begun if key[0] == step], event.at)

    def end(self) -> Iterator[Line]:
        """What has no line end."""
        yield from self._finish(list(self._begun), "")

    def _finish(self, keys: list[tuple[str, str, str]], at: str) -> Iterator[Line]:
        for key in keys:
            yield Line(text=self._begun.pop(key).removesuffix("\r"), step=key[0], stream=key[2], at=at)
