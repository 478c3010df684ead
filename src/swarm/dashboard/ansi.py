"""What programs print to a terminal, as lines of coloured parts. Of their escape sequences, only colours and weights
are understood; all others are dropped, and nothing of the text can become anything else than text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from swarm.dashboard.visible import visible

# CSI; OSC up to BEL or ST; the other strings up to ST; any other pair (ECMA-48). Each alternative reads forward only.
_ESCAPE: Final = re.compile(
    r"\x1b(?:\[(?P<values>[0-?]*)[ -/]*(?P<final>[@-~])?|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|.?)",
    re.DOTALL,
)
_LINE_END: Final = re.compile(r"\r*\n|\r+")
_COLOURS: Final = frozenset((*range(30, 38), *range(90, 98)))
_WEIGHTS: Final = frozenset((1, 2, 3, 4))
_ENDS: Final = {22: (1, 2), 23: (3,), 24: (4,)}
_PARTS: Final = 500  # of one line: the rest has the last one's colour
COLOURED: Final = 1000  # parts of one text: the rest is plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """``classes``: 'a31 a1', from a fixed set. ``text`` is not escaped for HTML."""

    classes: str
    text: str


def lines(text: str) -> list[list[Part]]:
    """Colours go on from line to line."""
    found: list[list[Part]] = [[]]
    codes: frozenset[int] = frozenset()
    at, coloured = 0, 0
    for escape in _ESCAPE.finditer(text):
        _add(found, text[at : escape.start()], codes)
        if escape["final"] == "m":
            coloured += 1
            codes = _after(codes, escape["values"]) if coloured < COLOURED else frozenset()
        at = escape.end()
    _add(found, text[at:], codes)
    if not found[-1]:
        found.pop()
    return found


def _add(found: list[list[Part]], text: str, codes: Iterable[int]) -> None:
    classes = " ".join(f"a{code}" for code in sorted(codes))
    for number, piece in enumerate(_LINE_END.split(text)):
        if number:
            found.append([])
        if piece:
            shown = visible(piece, limit=len(piece), lines=True)
            line = found[-1]
            if line and (line[-1].classes == classes or len(line) >= _PARTS):
                line[-1] = Part(classes=line[-1].classes, text=line[-1].text + shown)
            else:
                line.append(Part(classes=classes, text=shown))


def _after(codes: frozenset[int], values: str) -> frozenset[int]:
    """The codes in force after a sequence 'SGR'."""
    given = [int(one) if one.isdecimal() and len(one) < 4 else 0 for one in values.split(";")[:32]]
    at = 0
    while at < len(given):
        code = given[at]
        at += 1
        if code == 0:
            codes = frozenset()
        elif code in (38, 48):  # of 256 colours, or of all: not shown
            at += 2 if given[at : at + 1] == [5] else 4
        elif code in _COLOURS:
            codes = codes - _COLOURS | {code}
        elif code in _WEIGHTS:
            codes |= {code}
        elif code == 39:
            codes -= _COLOURS
        elif code in _ENDS:
            codes -= frozenset(_ENDS[code])
    return codes
