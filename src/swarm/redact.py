"""Secrets out of what an agent prints and returns, also when one comes in two pieces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# Shorter ones would take the text apart that they happen to be in.
SHORTEST: Final = 4


class Redactor:
    """``secrets``: name to value. Whole values as they are: what a program encodes first is not recognised."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        given = ((value, f"[{name}]") for name, value in secrets.items() if len(value) >= SHORTEST)
        # The longest first: one may hold another.
        self._texts = sorted(given, key=lambda pair: -len(pair[0]))
        self._bytes = [(value.encode(), mark.encode()) for value, mark in self._texts]

    def __bool__(self) -> bool:
        return bool(self._texts)

    def text(self, text: str) -> str:
        for value, mark in self._texts:
            text = text.replace(value, mark)
        return text

    def value(self, value: Any) -> Any:
        """The same in all texts of a JSON value, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(one) for one in value]
        if isinstance(value, dict):
            return {self.text(key): self.value(one) for key, one in value.items()}
        return value

    def clean(self, data: bytes) -> bytes:
        for value, mark in self._bytes:
            data = data.replace(value, mark)
        return data

    def stream(self) -> Stream:
        return Stream(self)

    def held(self, data: bytes) -> int:
        """How many bytes at the end may be the beginning of a secret."""
        longest = 0
        for value, _ in self._bytes:
            for length in range(min(len(value) - 1, len(data)), longest, -1):
                if data.endswith(value[:length]):
                    longest = length
                    break
        return longest


class Stream:
    """One stream of output: what could be the beginning of a secret is held back until it is known not to be."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        data = self._redactor.clean(self._held + data)
        held = self._redactor.held(data)
        self._held = data[len(data) - held :]
        return data[: len(data) - held]

    def end(self) -> bytes:
        rest, self._held = self._held, b""
        return rest
