"""Text that is safe for a terminal. Outsiders and guests write most of what is printed: no character of theirs may move
the cursor, turn the direction of writing (bidi), or begin a line that looks like one of ours (U+0085, U+2028).

What counts is `str.isprintable`, so a new kind of control character needs no list here.
"""

from __future__ import annotations

import json


def escaped(text: str, *, keep: str = "") -> str:
    r"""The text with each unprintable character as JSON escapes it (``\u202e``), except those in ``keep``.

    JSON text stays the same value: outside of its strings, there is nothing to escape but line ends.
    """
    if text.isprintable():
        return text
    odd = {ord(c): json.dumps(c)[1:-1] for c in set(text) if not c.isprintable() and c not in keep}
    # The only unprintable character of ASCII that JSON leaves alone.
    return text.translate({number: r"\u007f" if number == 0x7F else escape for number, escape in odd.items()})
