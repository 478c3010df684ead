"""YAML files from users: read as plain JSON values, each with its line and column.

It is YAML 1.2's core schema without tags, so that `on`, `yes` and `12:30` are texts (in 1.1 they are booleans and a
number). Every error is a `Problem` with its place, and all of them are reported together.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from swarm.errors import UsageError

MAX_BYTES: Final = 1 << 20
MAX_NODES: Final = 100_000  # an alias counts each time that it is used
MAX_DEPTH: Final = 64
MAX_PROBLEMS: Final = 100  # of one file: nobody reads more at once, and the search for each takes time

KeyPath = tuple[str | int, ...]

_INT: Final = re.compile(r"[-+]?[0-9]{1,400}|0o[0-7]{1,400}|0x[0-9a-fA-F]{1,400}")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Final = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

# Tags that PyYAML assigns itself. The type of a plain text is decided by `_plain`.
_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge", "value")
)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Problem:
    """One error in a file. ``line`` and ``column`` count from 1; 0 if it has no place."""

    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.message}" if self.line else self.message


class Problems(list[Problem]):
    """Those that are found, until there are enough."""

    def append(self, problem: Problem) -> None:
        """Raises Enough."""
        super().append(problem)
        if len(self) >= MAX_PROBLEMS:
            raise Enough

    def extend(self, problems: Iterable[Problem]) -> None:
        """Raises Enough; then it asks ``problems`` for no more."""
        for one in problems:
            self.append(one)


class Enough(Exception):
    """There are `MAX_PROBLEMS`: whoever looks for more stops."""


class Invalid(UsageError):
    """A file from a user has errors; ``problems`` has all, in the file's order, or those that were found first."""

    def __init__(self, name: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems))[:MAX_PROBLEMS])
        more = "at least " if len(self.problems) >= MAX_PROBLEMS else ""
        count = "1 problem" if len(self.problems) == 1 else f"{more}{len(self.problems)} problems"
        super().__init__("\n".join([f"{name}: {count}", *map(str, self.problems)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a value is in the text. ``style`` is YAML's: '' for plain, '\"', \"'\", '|' or '>'."""

    line: int
    column: int
    style: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    value: Any
    positions: dict[KeyPath, Position]
    keys: dict[KeyPath, Position]
    lines: Sequence[str] = field(repr=False)

    def problem(self, path: Sequence[str | int], message: str, *, at_key: bool = False, offset: int = 0) -> Problem:
        """A problem with the value at ``path``, or its nearest ancestor in the file.

        ``offset`` counts characters into a text. In folded and escaped texts the place is approximate.
        """
        path = tuple(path)
        marks = self.keys if at_key and path in self.keys else self.positions
        while path and path not in marks:
            path, offset = path[:-1], 0
        position = marks.get(path, Position(line=1, column=1))
        line, column = position.line, position.column
        if offset and position.style in ("", "'", '"'):
            column += offset + (1 if position.style else 0)
        elif offset and position.style == "|":
            text = self._text(path)
            row = text[:offset].count("\n")
            start = text.rfind("\n", 0, offset) + 1
            line += 1 + row
            source = self.lines[line - 1] if line <= len(self.lines) else ""
            # The source line is longer than the text by the block's indentation.
            column = 1 + max(len(source) - len(text[start:].partition("\n")[0]), 0) + offset - start
        return Problem(line=line, column=column, message=message)

    def _text(self, path: KeyPath) -> str:
        value = self.value
        for part in path:
            value = value[part]
        return str(value)


def around(paths: Iterable[KeyPath]) -> set[KeyPath]:
    """Of all mappings and lists that the values at these paths are in."""
    return {path[:length] for path in paths for length in range(len(path))}


def load(text: str | bytes, *, name: str) -> Document:
    """Parse one YAML document. Raises Invalid if it isn't YAML, isn't a JSON value, or is too large."""
    if len(text) > MAX_BYTES:
        raise Invalid(name, [Problem(line=0, column=0, message=f"larger than {MAX_BYTES >> 10} KiB")])
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise Invalid(name, [Problem(line=0, column=0, message=f"not UTF-8: {error.reason}")]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        around = str(text).splitlines()[line - 1 : line]
        hint = _hint(str(error.problem), around[0] if around else "")
        message = f"not YAML: {error.problem or error.context}{hint}"
        raise Invalid(name, [Problem(line=line, column=column, message=message)]) from None
    except (yaml.YAMLError, RecursionError) as error:
        message = "nested too deeply" if isinstance(error, RecursionError) else f"not YAML: {error}"
        raise Invalid(name, [Problem(line=0, column=0, message=message.replace("\n", " "))]) from None
    reader, value = _Reader(), None
    with contextlib.suppress(Enough):
        value = reader.read(root, (), 0) if root is not None else None
    if reader.problems:
        raise Invalid(name, reader.problems)
    return Document(value, reader.positions, reader.keys, text.splitlines())


def _hint(said: str, line: str) -> str:
    """Advice for common mistakes."""
    if "character '\\t'" in said:
        return "; indent with spaces, not with tabs"
    if begins := _FIRST.search(said):
        return f"; put a text that begins with {begins[1]} in quotes"
    if ("alphabetic or numeric" in said or "undefined alias" in said) and "*" in line:
        return "; put a text that begins with * in quotes, such as a schedule: '*/5 * * * *'"
    if "got '?'" in said:
        return "; inside {} and [], put a text with '?' in quotes"
    if "${" in line and ("mapping values are not allowed" in said or "but got '{'" in said):
        return "; put an expression with ': ' in quotes" if ": " in line.partition("${")[2] else _QUOTE
    return next((f"; {advice}" for part, advice in _ADVICE.items() if part in said), "")


_FIRST: Final = re.compile(r"found character ('.'|\"'\") that cannot start")
_QUOTE: Final = "; put the expression in quotes"
_ADVICE: Final = {
    "mapping values are not allowed": "put a text with ': ' in quotes, and begin the fields of a mapping in one column",
    "could not find expected ':'": "each line needs a key and a colon, as in `name: my-name`",
    "'<stream end>'": "a [ or { is not closed",
    "unexpected end of stream": "a quote is not closed",
    "another document": "remove what follows the line ---",
    "expected <block end>": "begin the fields of a mapping, and the items of a list, in one column",
    "unknown escape character": "put a text with backslashes in single quotes",
    "alphabetic or numeric": "put a text that begins with & in quotes",
}


class _Reader:
    def __init__(self) -> None:
        self.positions: dict[KeyPath, Position] = {}
        self.keys: dict[KeyPath, Position] = {}
        self.problems = Problems()
        self._nodes = 0

    def read(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            self._bad(node, f"nested deeper than {MAX_DEPTH}" if depth > MAX_DEPTH else f"more than {MAX_NODES} values")
            return None
        if node.tag not in _TAGS:
            self._bad(node, f"the tag {node.tag!r} is not supported here")
        style = (node.style or "") if isinstance(node, yaml.ScalarNode) else ""
        self.positions[path] = _position(node, style)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*path, i), depth + 1) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return dict(self._pairs(node, path, depth))
        return node.value if style else self._plain(node)

    def _pairs(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._bad(key, "a key must be text")
                continue
            if key.value in seen:
                self._bad(key, f"the key {key.value!r} is here twice")
            seen.add(key.value)
            if node.flow_style and isinstance(value, yaml.ScalarNode) and not (value.value or value.style):
                # {description: the first, or 0} is two keys, of which the second is 'or 0'.
                self._bad(key, f"{key.value!r} has no value; put a text with a comma in it in quotes")
            self.keys[(*path, key.value)] = _position(key)
            yield key.value, self.read(value, (*path, key.value), depth + 1)

    def _plain(self, node: yaml.Node) -> Any:
        text: str = node.value
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            return int(text, 8 if text[:2] == "0o" else 16 if text[:2] == "0x" else 10)
        if _FLOAT.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                self._bad(node, f"the number {text} is too large")
            return number
        return text

    def _bad(self, node: yaml.Node, message: str) -> None:
        position = _position(node)
        self.problems.append(Problem(line=position.line, column=position.column, message=message))


def _position(node: yaml.Node, style: str = "") -> Position:
    return Position(line=node.start_mark.line + 1, column=node.start_mark.column + 1, style=style)
