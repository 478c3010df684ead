"""How a long operation reports how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with the current step ("downloading") and the share of the whole operation that is done, 0.0 to 1.0.
Progress = Callable[[str, float], None]


def silent(step: str, share: float) -> None:
    """A `Progress` that reports nothing. ``step`` is the current step, ``share`` how much is done (0.0 to 1.0)."""
