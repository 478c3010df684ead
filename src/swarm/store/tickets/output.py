"""What agents print, as lines: those of several steps, or of stdout and stderr, don't mix within one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from swarm.base.printable import LINE_END, clean
from swarm.model import Event

# A line is shown when it ends, or is this long.
_LINE_CHARS: Final = 4096


class OutputLines:
    """Takes a ticket's events, in order; gives step and line."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, str, str], str] = {}  # lines that have not ended, by step, attempt and stream

    def add(self, event: Event) -> Iterator[tuple[str, str]]:
        if event.kind == "output":
            key = (event.step_id or "", event.attempt_id or "", str(event.data.get("stream")))
            text = self._begun.pop(key, "") + str(event.data.get("text", ""))
            held = "\r" if text.endswith("\r") else ""  # the line end may be "\r\n"
            *lines, rest = LINE_END.split(text.removesuffix(held))
            yield from ((key[0], line) for line in lines)
            if len(rest) > _LINE_CHARS:
                yield key[0], rest
            elif rest or held:
                self._begun[key] = rest + held
        elif event.kind == "transition" and event.data.get("of") == "step":
            for key in [key for key in self._begun if key[0] == event.step_id]:
                yield key[0], self._begun.pop(key)

    def end(self) -> Iterator[tuple[str, str]]:
        """What has no line end yet."""
        begun, self._begun = self._begun, {}
        yield from ((key[0], rest) for key, rest in begun.items())


def shown(step: str, line: str, *, named: bool) -> str:
    """A line for people. ``named``: several steps print."""
    return f"{f'{clean(step)} | ' if named else ''}{clean(line.removesuffix(chr(13)), one_line=False)}\n"
