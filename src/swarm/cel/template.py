"""JSON values with `${…}` in their texts: parsed once, filled as often as needed.

A text that consists of one `${…}` becomes the expression's value and keeps its type. In any other text the value is
inserted: texts as they are, other values as JSON. `$${` stands for a literal `${`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from swarm.base import jsontext
from swarm.cel import artifact_refs
from swarm.cel.evaluate import MAX_RESULT_BYTES, Evaluator
from swarm.cel.expression import Expression, ExpressionError, parse

KeyPath = tuple[str | int, ...]

_OPEN: Final = re.compile(r"\$?\$\{")
# Between the braces: texts, in which braces don't count, and the braces of objects.
_INNER: Final = re.compile(
    r"""'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[{}]""", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Text:
    """A parsed text: plain pieces, and expressions with the offset of their first character."""

    parts: tuple[str | tuple[Expression, int], ...]

    @property
    def only(self) -> Expression | None:
        """The expression, if the text has nothing else."""
        return self.parts[0][0] if len(self.parts) == 1 and not isinstance(self.parts[0], str) else None

    @property
    def expressions(self) -> Iterator[tuple[Expression, int]]:
        return (part for part in self.parts if not isinstance(part, str))


@lru_cache(maxsize=8192)
def text(source: str) -> Text:
    """Parse a text. Raises ExpressionError with the offset in this text."""
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
    raise ExpressionError("'${' has no closing '}'; write '$${' for a literal '${'", offset=start - 2)


def texts(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Every text in a JSON value that contains `${`, with its path."""
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
    """Limits on filling: bytes of JSON produced and expressions run. Several fills may share one."""

    def __init__(self, size_bytes: int = 4 * MAX_RESULT_BYTES, expressions: int = 20_000) -> None:
        self._bytes = size_bytes
        self._expressions = expressions

    def spend(self, value: Any, expressions: int) -> None:
        """Raises ExpressionError when the budget is used up."""
        self._expressions -= expressions
        if self._expressions < 0:
            raise ExpressionError("too many expressions at once")
        # A reference copies existing data, but may be written many times.
        self._bytes -= len(value) if isinstance(value, str) else _size(value) if isinstance(value, dict | list) else 8
        if self._bytes < 0:
            raise ExpressionError("the values of all these expressions together are too large")


def _size(value: Any) -> int:
    try:
        text = jsontext.dumps(value)
        jsontext.check_nesting(value, text)
    except jsontext.TooDeep as error:
        raise ExpressionError(f"its value is {error}") from None
    except (TypeError, ValueError) as error:
        raise ExpressionError(f"its value can't be written as JSON: {error}") from None
    return len(text)


def fill(value: Any, names: Mapping[str, Any], evaluator: Evaluator, budget: Budget | None = None) -> Any:
    """The value with every expression replaced by its result. Raises ExpressionError with the place in ``value``."""
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
        if not isinstance(part, str):
            value = evaluator.evaluate(part[0], names)
            part = as_text(artifact_refs.resolve_references(value, limit_bytes=MAX_RESULT_BYTES))
        pieces.append(part)
        length += len(pieces[-1])
        if length > MAX_RESULT_BYTES:
            raise ExpressionError(f"the filled text is larger than {MAX_RESULT_BYTES >> 20} MiB")
    return "".join(pieces)


def as_text(value: Any) -> str:
    """How a value is inserted into a text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def shorten(source: str) -> str:
    return source if len(source) <= 80 else source[:77] + "…"
