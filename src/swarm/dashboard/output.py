"""What a ticket's agents printed, a part at a time: the end, what came before it, and what comes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from swarm.api.endpoint import Context
from swarm.dashboard import ansi
from swarm.dashboard.ansi import Part
from swarm.dashboard.render import drawn, own_ticket
from swarm.errors import UsageError
from swarm.model import Event, Ticket
from swarm.store.registry.tokens import Actor

EVENTS: Final = 200
_CHARS: Final = 256 << 10  # of one part: an event may have 16 KiB
_LINES: Final = 2000  # of one part, and as many changes of colour
_EVENT_LINES: Final = 1000  # of one event: of more, the first and the last half of these
_AROUND: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """``name``: of its address. ``step``, ``at``: of the first line of an event only."""

    seq: int
    name: str
    at: str
    step: str
    stream: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """``before``: where earlier lines end; None if there are none. ``after``: where later ones begin, and ``more`` if
    there are some already."""

    lines: list[Line]
    before: int | None
    after: int
    more: bool


async def last(context: Context, ticket: Ticket, *, at: int | None = None) -> Output:
    """The end; or what is around an event, for a link to a line."""
    if at is None:
        found, more = await context.store.output(ticket.id, limit=EVENTS)
        found, cut = _fitting(found[::-1])
        found.reverse()
        return await asyncio.to_thread(_output, found, before=more or cut, later=False)
    earlier, more = await context.store.output(ticket.id, before=at + 1, limit=_AROUND)
    later, further = await context.store.output(ticket.id, after=at, limit=_AROUND)
    later, cut = _fitting(later)
    earlier, cut_before = _fitting(earlier[::-1])
    return await asyncio.to_thread(_output, [*earlier[::-1], *later], before=more or cut_before, later=further or cut)


async def show(context: Context, request: Request, actor: Actor) -> Response:
    """A part of the log: lines after ``after``, or before ``before``."""
    ticket = await own_ticket(context, request, actor)
    before, after = number(request, "before"), number(request, "after")
    if before is not None:
        found, more = await context.store.output(ticket.id, before=before, limit=EVENTS)
        found, cut = _fitting(found[::-1])
        part = await asyncio.to_thread(_output, found[::-1], before=more or cut, later=False)
        return await drawn("lines_before.html", actor=actor, ticket=ticket, output=part)
    if after is None:
        raise UsageError("give `before` or `after`")
    found, more = await context.store.output(ticket.id, after=after, limit=EVENTS)
    found, cut = _fitting(found)
    if not found:
        return Response(status_code=204)  # the page stays as it is, and asks again
    part = await asyncio.to_thread(_output, found, before=False, later=more or cut, after=after)
    return await drawn("lines_after.html", actor=actor, ticket=ticket, output=part)


def number(request: Request, name: str) -> int | None:
    """A `seq` in an address."""
    text = request.query_params.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _fitting(events: Sequence[Event]) -> tuple[list[Event], bool]:
    """The first ones that fit into a part, and whether there are others."""
    chars, lines, colours, found = _CHARS, _LINES, _LINES, list[Event]()
    for event in events:
        text = str(event.data.get("text", ""))
        chars -= len(text)
        lines -= min(text.count("\n") + text.count("\r") + 1, _EVENT_LINES)
        colours -= min(text.count("\x1b"), ansi.COLOURED)
        if min(chars, lines, colours) < 0 and found:
            return found, True
        found.append(event)
    return found, False


def _output(events: Sequence[Event], *, before: bool, later: bool, after: int = 0) -> Output:
    return Output(
        lines=_lines(events),
        before=events[0].seq if before and events else None,
        after=events[-1].seq if events else after,
        more=later,
    )


def _shortened(lines: list[list[Part]]) -> list[tuple[int, list[Part]]]:
    """With their places. Of too many, those in the middle are left out, and one says so."""
    numbered = list(enumerate(lines))
    if len(lines) <= _EVENT_LINES:
        return numbered
    half = _EVENT_LINES // 2
    said = Part(classes="a1", text=f"… {len(lines) - 2 * half:,} lines are left out here; `swarm ticket logs` has them")
    return [*numbered[:half], (half, [said]), *numbered[-half:]]


def _lines(events: Sequence[Event]) -> list[Line]:
    """A line that was printed in pieces is put together again."""
    found: list[Line] = []
    open_at: dict[tuple[str | None, str], int] = {}  # lines without an end, by attempt and stream
    step = None
    for event in events:
        text, stream = str(event.data.get("text", "")), str(event.data.get("stream", ""))
        key = (event.attempt_id, stream)
        last_line = None
        for place, parts in _shortened(ansi.lines(text)):
            begun = open_at.pop(key, None)
            if place == 0 and begun is not None:
                line = found[begun]
                found[begun] = Line(
                    seq=line.seq, name=line.name, at=line.at, step=line.step, stream=stream, parts=[*line.parts, *parts]
                )
                last_line = begun
            else:
                found.append(
                    Line(
                        seq=event.seq,
                        name=f"L{event.seq}-{place + 1}",
                        at=event.at if place == 0 else "",
                        step=(event.step_id or "") if place == 0 and event.step_id != step else "",
                        stream=stream,
                        parts=parts,
                    )
                )
                last_line = len(found) - 1
            if place == 0:
                step = event.step_id
        if last_line is not None and not text.endswith(("\n", "\r")):
            open_at[key] = last_line
    return found
