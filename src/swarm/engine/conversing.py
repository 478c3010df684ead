"""What may be said to the guest of a sandbox, and what of it becomes an event.

The engine passes conversations on and knows no details of agentd's ops: only which of them a client may use, which of
their fields name what was done, what a program prints, and how it ended. Neither what is told nor what a program prints
has a secret in it that the sandbox was given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from swarm.base.redact import Redactor, Stream
from swarm.channel.conversation import Conversation
from swarm.channel.frames import Frame, printable
from swarm.channel.processes import STREAMS
from swarm.engine.held import Held
from swarm.errors import ChannelError, GuestRefused, UsageError

_MAX_WORDS, _MAX_WORD = 64, 500  # of a command line, in its event
BEGIN_SECONDS: Final = 60.0  # for a guest to begin a program
_GONE: Final = "the client went away"
# Of the report with which agentd ends a program: what is told, if it is what it should be.
_EXIT: Final = ("code", "signal", "timed_out", "oom", "cpu_ms", "max_rss_kb", "dropped_bytes")


@dataclass(frozen=True, slots=True)
class _Op:
    """``kind``: of the event; '' for what is not told. ``told``: the fields that it quotes. ``prints``: what it answers
    is read by people, and not a file's content."""

    kind: str = ""
    told: tuple[str, ...] = ()
    prints: bool = False


OPS: Final[Mapping[str, _Op]] = {
    "exec": _Op("exec", ("process", "argv", "cwd", "user", "background", "timeout"), prints=True),
    "attach": _Op(prints=True),
    "processes": _Op(prints=True),
    "signal": _Op("signal", ("process", "signal", "all")),
    "stat": _Op(),
    "list": _Op(),
    "uploaded": _Op(),
    "watch": _Op(),
    "make_dir": _Op("files", ("path",)),
    "move": _Op("files", ("path", "to")),
    "remove": _Op("files", ("path", "recursive")),
    "read": _Op("files", ("path",)),
    "write": _Op("files", ("path",)),
    "pack": _Op("files", ("path",)),
    "unpack": _Op("files", ("path",)),
    "dial": _Op("port", ("port",)),  # the first time that somebody does it
}


def check(op: str) -> _Op:
    """Raises UsageError for an op that is not for clients."""
    found = OPS.get(op)
    if found is None:
        raise UsageError(f"{printable(op)} can't be asked of a sandbox: it can {', '.join(OPS)}")
    return found


def with_env(op: str, fields: Mapping[str, object], env: Mapping[str, str]) -> Mapping[str, object]:
    """The fields as the guest gets them: a program has the sandbox's variables, and over them its own."""
    own = fields.get("env")
    return fields if op != "exec" else {**fields, "env": {**env, **(own if isinstance(own, dict) else {})}}


class Told:
    """A conversation with the guest of a sandbox, whose history tells of it from `begin` on."""

    def __init__(self, inner: Conversation, op: str, fields: Mapping[str, object], held: Held, *, by: str) -> None:
        self._inner = inner
        self._op, self._rule, self._held = op, check(op), held
        self._said: dict[str, object] = {
            name: _short(fields[name], held.redactor)
            for name in self._rule.told
            if fields.get(name) not in (None, False)
        }
        self._streams: dict[object, tuple[Stream, Frame]] = {}  # of its output, each with its latest frame
        self._ready: list[Frame] = []
        self._process = str(fields.get("process") or "")
        self._background = bool(fields.get("background"))
        self._by = {"by": by}
        self._sent = self._received = 0
        self._began = time.monotonic()
        self._first: Frame | GuestRefused | ChannelError | None = None
        self._last: Mapping[str, object] | None = None
        self._refused: GuestRefused | None = None

    async def begin(self, *, within_seconds: float = BEGIN_SECONDS) -> bool:
        """False if the guest has begun nothing, since it stands still for a snapshot."""
        if self._op == "exec":
            try:
                async with asyncio.timeout(within_seconds):
                    self._first = await self._inner.receive()
            except TimeoutError:
                self._inner.close()
                self._first = ChannelError(f"the guest has not begun the program in {within_seconds:g} s")
            except GuestRefused as error:
                if "frozen" in error.said:
                    return False
                self._first = error
            except ChannelError as error:  # it may have begun: who asked is to hear of it, and not to ask again
                self._first = error
            self._held.record("exec", self._said | self._by)  # at once: it may run for days
            if self._background and self._process and not isinstance(self._first, GuestRefused):
                self._held.background.add(self._process)
        return True

    async def send(self, head: Mapping[str, object], payload: bytes = b"") -> None:
        self._sent += len(payload)
        await self._inner.send(head, payload)

    async def receive(self) -> Frame:
        while not self._ready:
            frame, self._first = self._first, None
            try:
                if isinstance(frame, GuestRefused | ChannelError):
                    raise frame
                frame = frame or await self._inner.receive()
            except GuestRefused as error:
                self._refused = error
                raise
            self._received += len(frame.payload)
            if frame.head.get("ok"):
                self._last = frame.head
            self._ready = self._clean(frame) if self._rule.prints and self._held.redactor else [frame]
        return self._ready.pop(0)

    def _clean(self, frame: Frame) -> list[Frame]:
        """What is passed on of it, without secrets: what could begin one waits for what follows, or for the end."""
        if frame.head.get("ok"):
            rest = [(stream.end(), last) for stream, last in self._streams.values()]
            return [*(replace(last, payload=data) for data, last in rest if data), frame]
        if not frame.payload:
            return [frame]
        if (name := frame.head.get("stream")) not in STREAMS:
            return [replace(frame, payload=self._held.redactor.clean(frame.payload))]
        stream, _ = self._streams.get(name) or (self._held.redactor.stream(), frame)
        self._streams[name] = stream, frame
        data = stream.feed(frame.payload)
        return [replace(frame, payload=data)] if data else []

    def close(self) -> None:
        self._inner.close()

    def ended(self, error: BaseException | None) -> None:
        """It is over: with its reply, refused, or broken off (``error`` says how, if that is known)."""
        kind, said = self._rule.kind, dict(self._said)
        if self._op in ("exec", "attach"):
            self._exited(error)
            return
        if not kind:
            return
        if self._last is None:
            said["error"] = self._why(error)
        if kind == "port" and said.get("error") == _GONE:  # as connections end
            del said["error"]
        if kind == "port":
            key = (kind, *said.items(), *self._by.items())
            if key in self._held.told:
                return
            self._held.told.add(key)
        if kind == "files":
            said["op"] = self._op
            if moved := self._received if self._op in ("read", "pack") else self._sent:
                said["bytes"] = moved
        self._held.record(kind, said | self._by)

    def _exited(self, error: BaseException | None) -> None:
        waits = self._process in self._held.background
        if self._last is None and (waits or self._op == "attach"):
            return  # it runs on, and its end is told later
        if self._op == "attach" and not waits:
            return  # told
        self._held.background.discard(self._process)
        how = exit_of(self._last) if self._last is not None else {"error": self._why(error)}
        ms = {"ms": round((time.monotonic() - self._began) * 1000, 1)} if self._op == "exec" else {}
        self._held.record("exit", {"process": self._process, **how, **ms})

    def _why(self, error: BaseException | None) -> str:
        text = self._refused.said if self._refused else str(error or "")
        return printable(self._held.redactor.beginning(text, _MAX_WORD)) or _GONE


def exit_of(report: Mapping[str, object]) -> dict[str, object]:
    """How a program ended, of what a guest says about it: only numbers and flags are kept, as it is hostile."""
    found = {name: report.get(name) for name in _EXIT}
    return {
        name: one for name, one in found.items() if isinstance(one, int) and 0 <= one < 1 << 53 and one is not False
    }


def _short(value: object, redactor: Redactor) -> object:
    if isinstance(value, list | tuple):
        words = [redactor.beginning(str(word), _MAX_WORD) for word in value[:_MAX_WORDS]]
        return words + ["…"] * (len(value) > _MAX_WORDS)
    return value if isinstance(value, bool | int | float) else redactor.beginning(str(value), _MAX_WORD)
