"""Values that are kept elsewhere, by digest, and are here as a small reference: artifacts.

An expression that only hands such a value on (`${steps.a.outputs.log}`) hands on the reference, however large the value
is; one that looks into it (`${size(steps.a.outputs.log)}`, `${steps.a.outputs.log.lines[0]}`) gets the value itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from swarm.cel.expression import ExpressionError

KEY: Final = "$artifact"


class Stored(dict[str, Any]):
    """The reference, as JSON has it: ``{"$artifact": {"digest": …, "bytes": …}}``. ``load`` gets the value; it may
    raise ExpressionError."""

    def __init__(self, digest: str, size_bytes: int, load: Callable[[str], Any]) -> None:
        super().__init__({KEY: {"digest": digest, "bytes": size_bytes}})
        self.digest = digest
        self.size_bytes = size_bytes
        self._load = load
        self._loaded: tuple[Any] | None = None

    def value(self) -> Any:
        """May have other references within."""
        if self._loaded is None:
            self._loaded = (self._load(self.digest),)
        return self._loaded[0]


def opened(value: Any) -> Any:
    """The value, should it be a reference; references within stay."""
    while isinstance(value, Stored):
        value = value.value()
    return value


def resolve_references(value: Any, *, limit_bytes: int) -> Any:
    """The value with every reference replaced by what it stands for. Raises ExpressionError when these are more than
    ``limit_bytes`` of JSON, before they are loaded."""
    left = limit_bytes

    def one(value: Any) -> Any:
        nonlocal left
        if isinstance(value, Stored):
            left -= value.size_bytes
            if left < 0:
                size = f"{limit_bytes >> 20} MiB; one has {value.size_bytes:,} bytes"
                raise ExpressionError(f"needs artifacts that together have more than {size}")
            return one(value.value())
        if isinstance(value, dict):
            made = {}
            for key, inner in value.items():  # no comprehension: one frame for each level, it may be nested deeply
                made[key] = one(inner)
            return made
        if isinstance(value, list):
            items = []
            for inner in value:
                items.append(one(inner))
            return items
        return value

    return one(value)


def has_any(value: Any) -> bool:
    queue = [value]
    for one in queue:  # grows while it is walked
        if isinstance(one, Stored):
            return True
        if isinstance(one, dict):
            queue += one.values()
        elif isinstance(one, list):
            queue += one
    return False
