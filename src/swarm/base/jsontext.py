"""JSON from outside: strictly RFC 8259, and with a limit on nesting.

Python's own reader accepts values that other programs can't read back. And if it accepted deeper nesting than later
code can handle, a guest could choose where the engine fails.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final, NoReturn

# Python fails somewhere below 1,000 levels, depending on the caller. This leaves room for levels that expressions add.
MAX_NESTING: Final = 256
# Objects and lists in one value: each takes up to 80 bytes of memory, but may take only three in the text.
MAX_CONTAINERS: Final = 1_000_000


class TooDeep(ValueError):
    def __init__(self) -> None:
        super().__init__(f"nested too deeply: more than {MAX_NESTING} levels")


def loads(text: str) -> Any:
    """Parse. Raises ValueError, also for NaN, Infinity and numbers too large for a double, and TooDeep."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise TooDeep from None
    check_nesting(value, text)
    return value


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, but raises TooDeep, a ValueError, in place of RecursionError."""
    try:
        return json.dumps(value, **options)
    except RecursionError:
        raise TooDeep from None


def check_nesting(value: Any, text: str) -> None:
    """Raises TooDeep. ``text`` is the value as JSON: most texts have too few brackets to be deep."""
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
