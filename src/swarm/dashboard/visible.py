"""Text of tickets and guests, as a page shows it: nothing in it may deceive whoever reads it."""

from __future__ import annotations

import unicodedata
from typing import Final

# Line ends and tabs are shown by the page itself (`white-space: pre-wrap`) where a text may have several lines.
_KEPT: Final = "\n\t"


def visible(text: object, *, limit: int = 2000, lines: bool = False) -> str:
    """Without what can't be seen or moves other text: control and bidi characters become their code points, such as
    ⟨U+202E⟩. At most ``limit`` characters. Not escaped for HTML: the templates do that."""
    whole = "" if text is None else str(text)
    shown = whole if len(whole) <= limit else f"{whole[:limit]}…"
    if shown.isprintable():
        return shown
    return "".join(c if _is_plain(c, lines) else f"⟨U+{ord(c):04X}⟩" for c in shown)


def slug(name: object) -> str:
    """A name of a state, as a part of a class's name: other programs write states too."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in str(name)[:40].lower())


def _is_plain(c: str, lines: bool) -> bool:
    if c in _KEPT:
        return lines
    return c.isprintable() or unicodedata.category(c) == "Zs"
