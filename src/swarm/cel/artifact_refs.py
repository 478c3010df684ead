"""References to artifacts: large values that are stored elsewhere, by digest.

An expression that only passes such a value on (`${steps.a.outputs.log}`) passes the small reference, however large the
value is; one that looks into it (`${size(steps.a.outputs.log)}`, `${steps.a.outputs.log.lines[0]}`) gets the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from swarm.cel.expression import ExpressionError

KEY: Final = "$artifact"


class ArtifactRef(dict[str, Any]):
    """A reference in its JSON form: ``{"$artifact": {"digest": …, "bytes": …}}``. ``load`` returns the value of a
    digest, or raises ExpressionError."""

    def __init__(self, digest: str, size_bytes: int, load: Callable[[str], Any]) -> None:
        super().__init__({KEY: {"digest": digest, "bytes": size_bytes}})
        self.digest = digest
        self.size_bytes = size_bytes
        self._load = load
        self._loaded: tuple[Any] | None = None

    def value(self) -> Any:
        """The value, loaded once; it may contain further references."""
        if self._loaded is None:
            self._loaded = (self._load(self.digest),)
        return self._loaded[0]


def dereference(value: Any) -> Any:
    """The value that a reference stands for, and any other value as it is. References inside it stay."""
    while isinstance(value, ArtifactRef):
        value = value.value()
    return value


def resolve_references(value: Any, *, limit_bytes: int) -> Any:
    """The value with every reference replaced by its value. Raises ExpressionError, before loading, when the loaded
    values would exceed ``limit_bytes`` of JSON."""
    if not has_any(value):
        return value
    left = limit_bytes

    def one(value: Any) -> Any:
        nonlocal left
        if isinstance(value, ArtifactRef):
            left -= value.size_bytes
            if left < 0:
                size = f"{limit_bytes >> 20} MiB; one has {value.size_bytes:,} bytes"
                raise ExpressionError(f"needs artifacts of more than {size}")
            return one(value.value())
        if isinstance(value, dict):
            made = {}
            for key, inner in value.items():  # not a comprehension: one frame per level, as values may be deep
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
        if isinstance(one, ArtifactRef):
            return True
        if isinstance(one, dict):
            queue += one.values()
        elif isinstance(one, list):
            queue += one
    return False
