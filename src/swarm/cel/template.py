"""JSON values with `${…}` in their texts: found once, filled as often as needed.

A text that is one `${…}` and nothing else becomes that expression's value, type and all; elsewhere the value is written
into the text: texts as they are, all else as JSON. `$${` stands for `${`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from swarm.base import jsontext
from swarm.cel import stored
from swarm.cel.evaluate import MAX_RESULT_BYTES, Evaluator
from swarm.cel.expression import Expression, ExpressionError, parse

KeyPath = tuple[str | int, ...]

_OPEN: Final = re.compile(r"\$?\$\{")
# What may stand between the braces without ending them: texts, and braces of objects.
_INNER: Final = re.compile(
    r"""'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[{}]""", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Text:
    """A text cut up: plain pieces, and expressions with the offset of their first character."""

    parts: tuple[str | tuple[Expression, int], ...]

    @property
    def only(self) -> Expression | None:
        """The expression, when there is nothing else."""
        return self.parts[0][0] if len(self.parts) == 1 and not isinstance(self.parts[0], str) else None

    @property
    def expressions(self) -> Iterator[tuple[Expression, int]]:
        return (part for part in self.parts if not isinstance(part, str))


@lru_cache(maxsize=8192)
def text(source: str) -> Text:
    """Cut up a text. Raises ExpressionError, with the offset in this text."""
    parts: list[str | tuple[Expression, int]] = []
    plain, at = "", 0
    while (found := _OPEN.search(source, at)) is not None:
        plain += source[at : found.start()]
        if found.group() == "$${":
            plain, at = plain + "${", found.end()
            continue
        end = _closing(source, found.end())
        if plain:
            parts.append(plain)
            plain = ""
        try:
            parts.append((parse(source[found.end() : end]), found.end()))
        except ExpressionError as error:
            raise ExpressionError(str(error), offset=found.end() + error.offset) from None
        at = end + 1
    plain += source[at:]
    if plain or not parts:
        parts.append(plain)
    return Text(tuple(parts))


def _closing(source: str, start: int) -> int:
    depth = 1
    for match in _INNER.finditer(source, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    raise ExpressionError("'${' has no '}' to end it; write '$${' for a plain '${'", offset=start - 2)


def texts(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every text in a JSON value that has a `${` in it, with where it stands."""
    if isinstance(value, str):
        if "${" in value:
            yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from texts(inner, (*path, i))


class Budget:
    """What filling may cost: bytes of JSON that it makes, expressions that it runs. Shared where many are filled."""

    def __init__(self, size_bytes: int = 4 * MAX_RESULT_BYTES, expressions: int = 20_000) -> None:
        self._bytes = size_bytes
        self._expressions = expressions

    def spend(self, value: Any, expressions: int) -> None:
        """Raises ExpressionError when nothing is left."""
        self._expressions -= expressions
        if self._expressions < 0:
            raise ExpressionError("too many expressions at once")
        # A reference hands on what is there already, but as often as it is written.
        self._bytes -= len(value) if isinstance(value, str) else _size(value) if isinstance(value, dict | list) else 8
        if self._bytes < 0:
            raise ExpressionError("the values of all these expressions together are too large")


def _size(value: Any) -> int:
    try:
        text = json.dumps(value)
        jsontext.check_nesting(value, text)
    except jsontext.TooDeep as error:
        raise ExpressionError(f"its value is {error}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ExpressionError(f"its value can't be written as JSON: {error}") from None
    return len(text)


def fill(value: Any, names: Mapping[str, Any], evaluator: Evaluator, budget: Budget | None = None) -> Any:
    """The value with every expression in its place. Raises ExpressionError that says where in ``value`` it stands."""
    limit = budget or Budget()

    def one(source: str) -> Any:
        cut = text(source)
        made = _fill_text(cut, names, evaluator)
        limit.spend(made, len(cut.parts))
        return made

    return _fill(value, (), one)


def _fill(value: Any, path: KeyPath, fill_text: Callable[[str], Any]) -> Any:
    if isinstance(value, str):
        if "${" not in value:
            return value
        try:
            return fill_text(value)
        except ExpressionError as error:
            where = "".join(f".{p}" if isinstance(p, str) else f"[{p}]" for p in path).lstrip(".")
            raise ExpressionError(
                f"{where}: {shorten(value)}: {error}" if where else f"{shorten(value)}: {error}"
            ) from None
    if isinstance(value, Mapping):
        return {key: _fill(inner, (*path, key), fill_text) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, (*path, i), fill_text) for i, inner in enumerate(value)]
    return value


def _fill_text(cut: Text, names: Mapping[str, Any], evaluator: Evaluator) -> Any:
    if cut.only is not None:
        return evaluator.evaluate(cut.only, names)
    pieces, length = [], 0
    for part in cut.parts:
        pieces.append(part if isinstance(part, str) else written(_resolved(evaluator.evaluate(part[0], names))))
        length += len(pieces[-1])
        if length > MAX_RESULT_BYTES:
            raise ExpressionError(f"the text becomes larger than {MAX_RESULT_BYTES >> 20} MiB")
    return "".join(pieces)


def _resolved(value: Any) -> Any:
    return stored.resolve_references(value, limit_bytes=MAX_RESULT_BYTES) if stored.has_any(value) else value


def written(value: Any) -> str:
    """A value inside a text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def shorten(source: str) -> str:
    return source if len(source) <= 80 else source[:77] + "…"
