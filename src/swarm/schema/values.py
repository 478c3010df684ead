"""What can be wrong with a schema, or with a value."""

from __future__ import annotations

from dataclasses import dataclass


class SchemaError(ValueError):
    """Not a schema, or one that Swarm refuses. ``path`` is the place in the schema."""

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True)
class Issue:
    """One reason why a value doesn't fit. ``path`` is a JSON path such as `$.files[3].name`."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"
