"""What is wrong, as values."""

from __future__ import annotations

from dataclasses import dataclass


class SchemaError(ValueError):
    """It is no schema, or one that Swarm refuses. ``path`` leads to the place in it."""

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True)
class Issue:
    """What is wrong with a value; ``path`` is a JSON path such as `$.files[3].name`."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"
