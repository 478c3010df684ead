"""When the steps of a run ran, on one time line, with their attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from swarm.dashboard.svg import label, n, picture, rect, short, state, text

_LABELS, _ROW, _HEAD = 150.0, 22.0, 22.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Times in ms. ``end`` None: it still runs."""

    start: int
    end: int | None
    state: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``spans``: attempts or executions within ``whole``."""

    name: str
    whole: Span
    spans: Sequence[Span] = ()


def draw(rows: Sequence[Row], *, start: int, now: int, name: str, width: float = 720) -> Markup:
    last = max([start + 1, *((row.whole.end if row.whole.end is not None else now) for row in rows)])
    room = width - _LABELS - 8
    height = _HEAD + len(rows) * _ROW + 4

    def x(at: int) -> float:
        return _LABELS + room * min(max(at - start, 0), last - start) / (last - start)

    parts = []
    for number in range(5):
        at = start + (last - start) * number // 4
        parts.append(f'<path class="axis" d="M{n(x(at))} {n(_HEAD - 4)}V{n(height)}"/>')
        parts.append(label(x(at), _HEAD - 8, text(seconds((at - start) / 1000)), "t dim small", end=number == 4))
    for number, row in enumerate(rows):
        y = _HEAD + number * _ROW
        parts.append(label(_LABELS - 8, y + 14, short(row.name, 20), "t small", end=True))
        for span, top, high in [(row.whole, 4.0, 14.0), *((one, 7.0, 8.0) for one in row.spans)]:
            until = span.end if span.end is not None else now
            kind = ("span " if span is row.whole and row.spans else "fill ") + state(span.state)
            wide = max(x(until) - x(span.start), 2)
            parts.append(rect(x(span.start), y + top, wide, high, kind, title=span.title, rx=2))
    return picture(parts, width=width, height=height, name=name, kind="gantt", fluid=True)


def seconds(value: float) -> str:
    """A length of time in a few characters."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s".replace(".0 ", " ")
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"
