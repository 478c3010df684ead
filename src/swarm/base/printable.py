"""Text that is safe for a terminal. Outsiders and guests write most of what is printed: no character of theirs may move
the cursor, turn the direction of writing (bidi), or begin a line that looks like one of ours (U+0085, U+2028).

What counts is `str.isprintable`, so a new kind of control character needs no list here.
"""

from __future__ import annotations

import json
import re
from typing import Final

LINE_END: Final = re.compile(r"\r\n|\r|\n")


def escaped(text: str, *, keep: str = "") -> str:
    r"""The text with each unprintable character as JSON escapes it (``\u202e``), except those in ``keep``.

    JSON text stays the same value: outside of its strings, there is nothing to escape but line ends.
    """
    if text.isprintable():
        return text
    odd = {ord(c): json.dumps(c)[1:-1] for c in set(text) if not c.isprintable() and c not in keep}
    # The only unprintable character of ASCII that JSON leaves alone.
    return text.translate({number: r"\u007f" if number == 0x7F else escape for number, escape in odd.items()})


def clean(text: object, *, one_line: bool = True) -> str:
    """Text without control characters, so that a hostile title can't move the cursor or fake a line. Line ends (of
    Unix, Windows and progress bars) are kept as they are meant; on one line, each is a space."""
    if isinstance(text, str) and text.isprintable():
        return str(text)
    keep = "" if one_line else "\n\t"
    text = LINE_END.sub(" " if one_line else "\n", str(text))
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)
