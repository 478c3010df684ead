"""Parts of pictures. All text in them is hostile; none has a style of its own (the pages' policy forbids that): classes
say what a part is, and the style sheet how it looks, in both colour schemes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Final

from markupsafe import Markup

from swarm.dashboard.visible import visible

# The states of steps by what a person must see first. A mark stands beside the colour, for who can't tell colours.
MARKS: Final[Mapping[str, str]] = {
    "failed": "✘", "waiting": "?", "running": "▶", "ready": "▷", "pending": "·", "cancelled": "■", "completed": "✔",
    "skipped": "–",
}  # fmt: skip
ORDER: Final = tuple(MARKS)


def text(value: object, limit: int = 200) -> str:
    return escape(visible(value, limit=limit))


def short(value: object, limit: int) -> str:
    """Within ``limit`` characters, escaped; the middle goes, since names often differ at their ends."""
    whole = visible(value, limit=1000)
    if len(whole) > limit:
        ahead = (limit - 1) * 2 // 3
        whole = f"{whole[:ahead]}…{whole[len(whole) - (limit - 1 - ahead) :]}"
    return escape(whole)


def state(value: object) -> str:
    """A state as the name of a class: other programs write states, too."""
    return f"st-{value}" if value in MARKS else "st-unknown"


def n(number: float) -> str:
    """A coordinate."""
    return f"{number:.1f}".removesuffix(".0")


def rect(x: float, y: float, width: float, height: float, kind: str, *, title: str = "", rx: float = 0) -> str:
    """``kind``: classes. ``title``: not yet escaped."""
    rounded = f' rx="{n(rx)}"' if rx else ""
    shape = f'<rect class="{kind}" x="{n(x)}" y="{n(y)}" width="{n(max(width, 0))}" height="{n(height)}"{rounded}'
    return f"{shape}><title>{text(title)}</title></rect>" if title else f"{shape}/>"


def label(x: float, y: float, inner: str, kind: str, *, end: bool = False) -> str:
    """``inner`` is escaped already."""
    anchor = ' text-anchor="end"' if end else ""
    return f'<text class="{kind}" x="{n(x)}" y="{n(y)}"{anchor}>{inner}</text>'


def picture(parts: Iterable[str], *, width: float, height: float, name: str, kind: str, fluid: bool = False) -> Markup:
    """``fluid``: it takes the width that there is. Its links can be reached by keyboard, so it is a group, no image."""
    size = "" if fluid else f' width="{n(width)}" height="{n(height)}"'
    role = "img" if fluid else "group"
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {n(width)} {n(height)}"{size} role="{role}" aria-label="{text(name)}">'
        f"{''.join(parts)}</svg>"
    )


def share_bar(
    x: float, y: float, width: float, height: float, counts: Mapping[str, int], *, title: str = ""
) -> Iterable[str]:
    """One bar, in which each state has its share."""
    whole = sum(counts.values()) or 1
    for name in (*ORDER, *(other for other in counts if other not in MARKS)):
        if count := counts.get(name, 0):
            part = width * count / whole
            yield rect(x, y, part, height, f"fill {state(name)}", title=title or f"{count} {name}")
            x += part


def bars(
    rows: Sequence[tuple[str, float, str]], *, name: str, width: float = 640, labels: float = 170, row: float = 24
) -> Markup:
    """Horizontal bars: name, length, and what stands behind it."""
    most = max((length for _, length, _ in rows), default=0) or 1
    room = width - labels - 110
    parts: list[str] = []
    for number, (what, length, said) in enumerate(rows):
        y = number * row
        bar = max(room * length / most, 1 if length else 0)
        parts += [
            label(labels - 8, y + 16, short(what, 24), "t", end=True),
            rect(labels, y + 4, bar, row - 8, "bar", title=f"{what}: {said}", rx=2),
            label(labels + bar + 6, y + 16, text(said), "t dim"),
        ]
    return picture(parts, width=width, height=max(len(rows) * row, row), name=name, kind="bars", fluid=True)


def columns(days: Sequence[tuple[str, float, str]], *, name: str, width: float = 640, height: float = 150) -> Markup:
    """Vertical bars over time: label, height, and what a pointer is told."""
    most = max((length for _, length, _ in days), default=0) or 1
    step = width / max(len(days), 1)
    every = max(1, -(-len(days) // 8))  # as many labels as fit
    parts = [f'<path class="axis" d="M0 {n(height - 18)}H{n(width)}"/>']
    for number, (what, length, said) in enumerate(days):
        tall = (height - 30) * length / most
        x = number * step
        parts.append(rect(x + step * 0.12, height - 18 - tall, step * 0.76, tall, "bar", title=f"{what}: {said}"))
        if number % every == 0:
            parts.append(label(x + 1, height - 4, text(what[5:] or what), "t dim small"))
    return picture(parts, width=width, height=height, name=name, kind="columns", fluid=True)


def meter(used: float, limit: float, *, name: str, width: float = 240) -> Markup:
    """How much of a budget is used."""
    share = min(used / limit, 1.0) if limit > 0 else 1.0
    kind = "fill st-failed" if share >= 1 else "fill st-waiting" if share >= 0.8 else "fill st-completed"
    parts = [rect(0, 0, width, 12, "rail", rx=3), rect(0, 0, width * share, 12, kind, rx=3)]
    return picture(parts, width=width, height=12, name=name, kind="meter", fluid=True)
