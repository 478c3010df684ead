"""Replaces secrets in what an agent prints and returns, even if one arrives in two pieces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

# A shorter secret would be found, by chance, all over ordinary text.
SHORTEST: Final = 4
# The same for the lines of a secret that has several (a key in PEM form, say): each is also replaced alone.
_SHORTEST_LINE: Final = 8
_MAX_LINES: Final = 64  # of one secret (an RSA key of 4096 bits has 50): they are searched for at every place
_NO_SECRET: Final = re.compile(r"-----(BEGIN|END) [A-Z0-9 ]+-----")  # what all keys in PEM form have
_FEW: Final = 8


class Redactor:
    """``secrets``: name to value. Only unchanged values are found: a secret that a program has encoded is not."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        given = [(value, f"[{name}]") for name, value in secrets.items() if len(value) >= SHORTEST]
        given += [(line, mark) for value, mark in given for line in _lines(value)]
        # The longest first: one secret may be the beginning of another.
        texts = sorted(given, key=lambda pair: -len(pair[0]))
        self._texts = dict(reversed(texts))
        self._bytes = {value.encode(): mark.encode() for value, mark in self._texts.items()}
        self._in_text = re.compile("|".join(re.escape(value) for value, _ in texts))
        self.pattern = re.compile(b"|".join(re.escape(value.encode()) for value, _ in texts))

    def __bool__(self) -> bool:
        return bool(self._texts)

    def text(self, text: str) -> str:
        return self._in_text.sub(lambda found: self._texts[found[0]], text) if self else text

    def value(self, value: Any) -> Any:
        """The same, in all texts of a JSON value, including keys."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(one) for one in value]
        if isinstance(value, dict):
            return {self.text(key): self.value(one) for key, one in value.items()}
        return value

    def clean(self, data: bytes) -> bytes:
        return self.pattern.sub(self.mark, data) if self else data

    def mark(self, found: re.Match[bytes]) -> bytes:
        return self._bytes[found[0]]

    def beginning(self, text: str, limit: int) -> str:
        """Its first characters, when it is clean: no part of a secret is left where it is cut."""
        some = text[: 8 * limit]
        if len(some) == len(text):
            return self.text(text)[:limit]
        return self.stream().feed(some.encode(errors="replace")).decode(errors="replace")[:limit]

    def stream(self) -> Stream:
        return Stream(self)

    def held(self, data: bytes) -> int:
        """How many bytes at the end could be the beginning of a secret."""
        longest = 0
        for value in self._bytes:
            at = max(0, len(data) - len(value) + 1)
            while (at := data.find(value[:_FEW], at)) >= 0 and not data.endswith(value[: len(data) - at]):
                at += 1
            if at >= 0:
                longest = max(longest, len(data) - at)
            for length in range(min(_FEW - 1, len(value) - 1, len(data)), longest, -1):
                if data.endswith(value[:length]):
                    longest = length
                    break
        return longest


def _lines(value: str) -> list[str]:
    """The lines of a secret that has several, without the space around them."""
    lines = [line.strip() for line in value.splitlines()]
    long = [line for line in lines if len(line) >= _SHORTEST_LINE and line != value and not _NO_SECRET.fullmatch(line)]
    return list(dict.fromkeys(long))[:_MAX_LINES] if len(lines) > 1 else []


class Stream:
    """One stream of output. Bytes that could begin a secret are held back until the next ones decide."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The next clean bytes: in total, the same as `Redactor.clean` of the whole stream."""
        data = self._held + data
        redactor, clean, at = self._redactor, [], 0
        until = len(data) - redactor.held(data)  # a secret that begins before this can't become a longer one
        while found := redactor.pattern.search(data, at) if redactor else None:
            if found.start() >= until:
                break
            clean += [data[at : found.start()], redactor.mark(found)]
            at = found.end()
            if at > until:
                until = len(data) - redactor.held(data[at:])
        self._held = data[until:]
        return b"".join([*clean, data[at:until]])

    def end(self) -> bytes:
        rest, self._held = self._held, b""
        return self._redactor.clean(rest)
