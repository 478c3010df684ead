"""Parse an expression: what it refers to, and whether it is cheap enough for this process. Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cel_expr_python import cel  # type: ignore[import-untyped]
from cel_expr_python.ext import ext_math, ext_strings  # type: ignore[import-untyped]

MAX_CHARS: Final = 4096

# Every name that an expression may use. Which of them exist depends on where the expression is.
ROOTS: Final = frozenset(
    {"inputs", "steps", "variables", "trigger", "ticket", "item", "index", "previous", "outputs", "error"}
)  # fmt: skip
_MACROS: Final = frozenset({"all", "exists", "exists_one", "map", "filter"})
# Functions whose work and result are bounded by the size of their arguments. Others run in the jail.
_CHEAP: Final = frozenset(
    """size contains startsWith endsWith has string int uint double bool dyn type lowerAscii upperAscii trim charAt
    indexOf lastIndexOf substring duration timestamp getFullYear getMonth getDate getDayOfMonth getDayOfYear
    getDayOfWeek getHours getMinutes getSeconds""".split()  # noqa: SIM905 - thirty quoted words are no easier to read
)
_KEYWORDS: Final = frozenset({"true", "false", "null", "in"})

_TOKEN: Final = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
    | (?P<string>[rRbB]{0,2}(?:'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"
                            |'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"))
    | (?P<number>(?:0x[0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)u?)
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


class ExpressionError(Exception):
    """An expression isn't CEL, or can't be evaluated. ``offset`` counts characters from its start."""

    def __init__(self, message: str, *, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Reference:
    """A name and the constant path selected from it: ``steps.a.outputs["x"][0]`` is steps, (a, outputs, x, 0)."""

    root: str
    path: tuple[str | int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Expression:
    """``plain`` is set when the source is one reference and nothing else: its value is then taken without CEL."""

    source: str
    references: tuple[Reference, ...]
    plain: Reference | None
    cheap: bool


@lru_cache(maxsize=8192)
def parse(source: str) -> Expression:
    """Parse an expression. Raises ExpressionError if it isn't CEL, or uses a name that exists nowhere."""
    if len(source) > MAX_CHARS:
        raise ExpressionError(f"longer than {MAX_CHARS} characters")
    if not source.strip():
        raise ExpressionError("the expression between the braces is empty")
    tokens = list(_tokens(source))
    references, bound, cheap = [], set(), True
    whole = None
    for i, (kind, text, offset) in enumerate(tokens):
        before = tokens[i - 1][1] if i else ""
        called = i + 1 < len(tokens) and tokens[i + 1][1] == "("
        if kind != "name" or text in _KEYWORDS:
            continue
        if called and text in _MACROS and before == "." and i + 2 < len(tokens):
            bound.add(tokens[i + 2][1])
        if called and text not in _CHEAP:
            cheap = False
        if before == "." or called or text not in ROOTS:
            continue
        path, end = _path(tokens, i + 1)
        references.append(Reference(text, path, offset))
        if i == 0 and end == len(tokens):
            whole = references[0]
    clash = bound & ROOTS
    if clash:
        raise ExpressionError(f"{min(clash)!r} is a reserved name: give the macro's variable another one")
    if whole is None:
        program(source)  # a plain reference needs no compiler
    return Expression(source, tuple(references), whole, cheap)


def _path(tokens: list[tuple[str, str, int]], i: int) -> tuple[tuple[str | int, ...], int]:
    path: list[str | int] = []
    while i + 1 < len(tokens):
        kind, text, _ = tokens[i + 1]
        if tokens[i][1] == "." and kind == "name":
            if i + 2 < len(tokens) and tokens[i + 2][1] == "(":
                break
            path.append(text)
            i += 2
        elif (
            tokens[i][1] == "["
            and i + 2 < len(tokens)
            and tokens[i + 2][1] == "]"
            and (key := _key(kind, text)) is not None
        ):
            path.append(key)
            i += 3
        else:
            break
    return tuple(path), i


def _key(kind: str, text: str) -> str | int | None:
    if kind == "number" and text.isdecimal() and len(text) < 10:
        return int(text)
    # Simple texts only: those with a prefix or an escape are left to CEL.
    if kind == "string" and text[0] in "'\"" and not text.startswith(("'''", '"""')) and "\\" not in text:
        return text[1:-1]
    return None


def _tokens(source: str) -> Iterator[tuple[str, str, int]]:
    for match in _TOKEN.finditer(source):
        kind = str(match.lastgroup)
        if kind != "space":
            yield kind, match.group(), match.start()


# --- the compiler -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _environment() -> cel.Env:
    return cel.NewEnv(
        variables=dict.fromkeys(sorted(ROOTS), cel.Type.DYN),
        extensions=[ext_strings.ExtStrings(), ext_math.ExtMath()],
    )


@lru_cache(maxsize=4096)
def program(source: str) -> cel.Expression:
    """Compile. Bounded: cel-cpp refuses nesting deeper than 32, and `MAX_CHARS` characters take about 1 ms."""
    try:
        return _environment().compile(source)
    except RuntimeError as error:
        raise _compile_error(source, str(error)) from None
    except ValueError as error:  # such as lone surrogates
        raise ExpressionError(f"not CEL: {error}") from None


_COMPLAINT: Final = re.compile(r"ERROR: <input>:(-?\d+):(-?\d+): ([^\n]*)")
_UNDECLARED: Final = re.compile(r"undeclared reference to '([^']*)'")


def _compile_error(source: str, said: str) -> ExpressionError:
    found = _COMPLAINT.search(said)
    if found is None:
        deep = "recursion" in said.lower()
        return ExpressionError("nested too deeply" if deep else said.partition(" [")[0].splitlines()[0])
    line, column, what = int(found[1]), int(found[2]), found[3].removesuffix(" [INVALID_ARGUMENT]")
    unknown = _UNDECLARED.search(what)
    if unknown is not None:
        names = ", ".join(sorted(ROOTS - {"item", "index", "previous", "outputs", "error"}))
        what = f"unknown name {unknown[1]!r}; use one of {names}, or in a for_each: item, index"
    if line < 1:
        return ExpressionError("nested too deeply" if "recursion" in what else what)
    starts = [0, *(m.end() for m in re.finditer("\n", source))]
    # cel-cpp counts columns from 1, and for a name with dots gives the position of its last dot.
    offset = min(starts[min(line, len(starts)) - 1] + max(column - 1, 0), len(source))
    if unknown is not None:
        offset = max(source.rfind(unknown[1].partition(".")[0], 0, offset + 1), 0) if "." in unknown[1] else offset
    return ExpressionError(what, offset=offset)
