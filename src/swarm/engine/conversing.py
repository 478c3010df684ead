"""What may be said to the guest of a sandbox, and what of it becomes an event.

The engine passes conversations on and knows no details of agentd's ops: only which of them a client may use, which of
their fields name what was done, and how a program ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from swarm.channel.conversation import Conversation
from swarm.channel.frames import Frame, printable
from swarm.errors import UsageError

Record = Callable[[str, Mapping[str, object]], None]  # kind and data of an event of the sandbox

_MAX_WORDS, _MAX_WORD = 64, 500  # of a command line, in its event
# Of the report with which agentd ends a program: what is told, if it is what it should be.
_EXIT: Final = ("code", "signal", "timed_out", "oom", "cpu_ms", "max_rss_kb", "dropped_bytes")


@dataclass(frozen=True, slots=True)
class _Op:
    """``kind``: of the event; '' for what is not told. ``told``: the fields that it quotes. ``once``: only the first
    time that one person does it, while this engine holds the sandbox."""

    kind: str = ""
    told: tuple[str, ...] = ()
    once: bool = False


OPS: Final[Mapping[str, _Op]] = {
    "exec": _Op("exec", ("process", "argv", "cwd", "user", "background", "timeout")),
    "attach": _Op(),
    "processes": _Op(),
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
    "dial": _Op("port", ("port",), once=True),
}


def check(op: str) -> _Op:
    """Raises UsageError for an op that is not for clients."""
    found = OPS.get(op)
    if found is None:
        raise UsageError(f"{printable(op)} can't be asked of a sandbox: it can {', '.join(OPS)}")
    return found


class Told:
    """A conversation, of which the sandbox's history tells. ``record`` must not block."""

    def __init__(self, inner: Conversation, op: str, fields: Mapping[str, object], record: Record) -> None:
        self._inner = inner
        self._op, self._rule, self._record = op, check(op), record
        self._fields = {name: _short(fields[name]) for name in self._rule.told if fields.get(name) is not None}
        self._sent = self._received = 0
        self._began = time.monotonic()
        self._last: Mapping[str, object] | None = None
        if op == "exec":  # at once: it may run for days
            record("exec", self._fields)

    async def send(self, head: Mapping[str, object], payload: bytes = b"") -> None:
        self._sent += len(payload)
        await self._inner.send(head, payload)

    async def receive(self) -> Frame:
        frame = await self._inner.receive()
        self._received += len(frame.payload)
        if frame.head.get("ok"):
            self._last = frame.head
        return frame

    async def close(self) -> None:
        await self._inner.close()

    def ended(self, error: BaseException | None) -> None:
        """It is over: with its reply, or broken off (``error`` says how, if it is known)."""
        if not self._rule.kind:
            return
        said: dict[str, object] = {} if self._last is not None else {"error": _why(error)}
        if self._op == "exec":
            if self._last is None and self._fields.get("background"):
                return  # it runs on
            said |= _exit(self._last or {})
            name = {"process": self._fields["process"]} if "process" in self._fields else {}
            return self._record("exit", name | said | {"ms": round((time.monotonic() - self._began) * 1000, 1)})
        if self._rule.kind == "files":
            said |= {"op": self._op}
            if moved := self._received if self._op in ("read", "pack") else self._sent:
                said |= {"bytes": moved}
        self._record(self._rule.kind, self._fields | said)


def exit_of(report: Mapping[str, object]) -> dict[str, object]:
    """How a program ended, of what a guest says about it."""
    return _exit(report)


def _exit(report: Mapping[str, object]) -> dict[str, object]:
    """The guest is hostile: only small numbers and flags are kept."""
    found = {name: report.get(name) for name in _EXIT}
    return {name: one for name, one in found.items() if isinstance(one, int) and 0 <= one < 1 << 53 and one is not False}


def _why(error: BaseException | None) -> str:
    text = printable(str(error)) if error is not None and str(error) else ""
    return text or "the client went away"


def _short(value: object) -> object:
    if isinstance(value, list | tuple):
        words = [str(word)[:_MAX_WORD] for word in value[:_MAX_WORDS]]
        return words + ["…"] * (len(value) > _MAX_WORDS)
    return value if isinstance(value, bool | int | float) else str(value)[:_MAX_WORD]
