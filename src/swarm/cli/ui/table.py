"""Tables for people: which columns a terminal has room for, and how wide each is. Names, ids and states stay whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

_GAP: Final = 2
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)")
_UNITS: Final = ((86400, "day", "days"), (3600, "h", "h"), (60, "min", "min"), (1, "s", "s"))
_OLD_SECONDS: Final = 60 * 86400  # from here on a date says more


@dataclass(frozen=True, slots=True)
class Column:
    """``drop``: its place in the order in which columns leave a terminal that is too narrow; 0: it never leaves.
    ``least``: it may be shortened to this many characters; 0: it is shown whole. ``digest``: on a terminal, only its
    first 12 characters, which every command accepts. ``whole``: what doesn't fit goes on in the next line; only for the
    last column.
    """

    name: str
    drop: int = 0
    least: int = 0
    right: bool = False
    digest: bool = False
    whole: bool = False


def width_of(text: str) -> int:
    """Cells on a terminal: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def padded(text: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - width_of(text))
    return space + text if right else text + space


def shortened(text: str, width: int) -> str:
    if width_of(text) <= width:
        return text
    if text.isascii():
        return f"{text[: width - 1].rstrip()}…"
    from rich.cells import set_cell_size

    return f"{set_cell_size(text, width - 1).rstrip()}…"


def fit(columns: Sequence[Column], natural: Sequence[int], room: int) -> dict[int, int]:
    """The columns that are shown, by index, and the width of each. What can't leave may need more than ``room``."""
    least = [min(n, c.least or n) for c, n in zip(columns, natural, strict=True)]
    shown = dict(enumerate(least))

    def left() -> int:
        return room - sum(shown.values()) - _GAP * (len(shown) - 1)

    leaving = sorted((i for i, c in enumerate(columns) if c.drop), key=lambda i: columns[i].drop)
    gone = []
    while leaving and left() < 0:
        gone.append(leaving.pop(0))
        del shown[gone[-1]]
    for index in reversed(gone):  # the last to leave took more than was needed: is there room for it, or for another?
        if left() >= least[index] + _GAP:
            shown[index] = least[index]
    shared = sorted((i for i in shown if natural[i] > least[i]), key=lambda i: natural[i] - least[i])
    for number, index in enumerate(shared):  # equal shares; what one doesn't need goes to the others
        shown[index] += max(0, min(natural[index] - least[index], left() // (len(shared) - number)))
    return dict(sorted(shown.items()))


def laid_out(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int | None
) -> tuple[list[list[tuple[str, str]]], list[str]]:
    """The lines, of which each is the heading's or a row's cells: the text as it is shown, and as it was given. And the
    names of columns for which there is no room. ``room``: None if there is no end to it.
    """
    heading = [column.name for column in columns]
    natural = [max(map(width_of, texts)) for texts in zip(heading, *rows, strict=True)]
    widths = dict(enumerate(natural)) if room is None else fit(columns, natural, room)

    def cell(text: str, column: Column, width: int) -> str:
        return padded(text if column.whole else shortened(text, width), width, right=column.right)

    lines = [[(cell(row[i], columns[i], width), row[i]) for i, width in widths.items()] for row in (heading, *rows)]
    return lines, [c.name for i, c in enumerate(columns) if i not in widths and any(row[i] for row in rows)]


def ago(text: str, now: datetime) -> str:
    """'3 min ago' or 'in 2 h' for an ISO-8601 time; a date if that is long ago; any other text unchanged."""
    if not _TIME.fullmatch(text):
        return text
    try:
        at = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return text
    seconds = (now - at).total_seconds()
    if abs(seconds) >= _OLD_SECONDS:
        return f"{at:%Y-%m-%d}"
    for size, one, many in _UNITS:
        if (count := int(abs(seconds) // size)) >= 1:
            span = f"{count} {one if count == 1 else many}"
            return f"{span} ago" if seconds > 0 else f"in {span}"
    return "now"
