"""JSON from outside, by RFC 8259 to the letter and not nested without end: Python's own reader takes more than others
could read again, and one that reads deeper than another writes lets a guest choose where the engine fails."""

from __future__ import annotations

import json
import math
from typing import Any, Final, NoReturn

# Python gives up somewhere below 1,000, depending on who calls. What expressions build upon a value fits on top.
MAX_NESTING: Final = 256


class TooDeep(ValueError):
    def __init__(self) -> None:
        super().__init__(f"nested too deeply: more than {MAX_NESTING} levels")


def loads(text: str) -> Any:
    """The value. Raises ValueError, also for NaN, Infinity and numbers that a double can't hold, and TooDeep."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise TooDeep from None
    check_nesting(value, text)
    return value


def check_nesting(value: Any, text: str) -> None:
    """Raises TooDeep. ``text``: the value as JSON; most have too few brackets to be deep."""
    if text.count("{") + text.count("[") <= MAX_NESTING:
        return
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise TooDeep


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number
