"""Run an expression over data: in this process if its cost is bounded beforehand. `jail.Jail` runs the others."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

from cel_expr_python import cel  # type: ignore[import-untyped]

from swarm.base import jsontext
from swarm.cel import artifact_refs
from swarm.cel.expression import Expression, ExpressionError, Reference, program

MAX_RESULT_BYTES: Final = 1 << 20  # JSON, of one expression
MAX_DATA_BYTES: Final = 4 << 20  # JSON, of what one expression refers to
CHEAP_BYTES: Final = 256 << 10  # references x data: up to this, an expression without loops runs in this process

_MISSING: Final = object()


class Evaluator(Protocol):
    """Runs expressions. Raises ExpressionError; never hangs."""

    def evaluate(self, expression: Expression, names: Mapping[str, Any]) -> Any: ...


def attempt(expression: Expression, names: Mapping[str, Any]) -> tuple[bool, Any, Mapping[str, Any]]:
    """Run an expression if it is cheap. Returns (did it run?, its value, the part of ``names`` that it refers to)."""
    if expression.plain is not None:
        return True, select(names, expression.plain), {}
    data = referred(names, expression.references)
    size = measure(data)
    if not expression.cheap or size * (len(expression.references) + 1) > CHEAP_BYTES:
        return False, None, data
    return True, run(expression.source, data), data


def select(names: Mapping[str, Any], reference: Reference) -> Any:
    """The value that a plain reference names, unchanged: numbers of any size keep their type."""
    value = names.get(reference.root, _MISSING)
    done = reference.root
    if value is _MISSING:
        raise ExpressionError(f"{done!r} is not available here", offset=reference.offset)
    for part in reference.path:
        value = _pick(value, part)
        if value is _MISSING:
            raise ExpressionError(f"{done} has no {part!r}", offset=reference.offset)
        done += f".{part}" if isinstance(part, str) else f"[{part}]"
    return value


def _pick(value: Any, part: str | int) -> Any:
    value = artifact_refs.dereference(value)
    if isinstance(value, Mapping):
        return value.get(part, _MISSING) if isinstance(part, str) else _MISSING
    if isinstance(value, list) and isinstance(part, int):
        return value[part] if part < len(value) else _MISSING
    return _MISSING


def referred(names: Mapping[str, Any], references: tuple[Reference, ...]) -> dict[str, Any]:
    """The data that an expression can reach: objects are reduced to the keys that its references name."""
    found: dict[str, Any] = {}
    for root in {reference.root for reference in references}:
        if root in names:
            found[root] = _cut(names[root], [r.path for r in references if r.root == root])
    return found


def _cut(value: Any, paths: list[tuple[str | int, ...]]) -> Any:
    looks_inside = all(path and isinstance(path[0], str) for path in paths)
    if looks_inside:
        value = artifact_refs.dereference(value)
    if not isinstance(value, Mapping) or not looks_inside:
        return artifact_refs.resolve_references(value, limit_bytes=MAX_DATA_BYTES)
    kept: dict[str, Any] = {}
    for key in {path[0] for path in paths}:
        inner = value.get(str(key), _MISSING)
        if inner is not _MISSING:
            kept[str(key)] = _cut(inner, [path[1:] for path in paths if path[0] == key])
    return kept


def measure(data: Any) -> int:
    """Size as JSON. Raises ExpressionError for values that CEL can't hold: texts with NUL, anything that isn't JSON."""
    try:
        text = jsontext.dumps(data, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExpressionError(f"can't be used in an expression: {error}") from None
    if len(text) > MAX_DATA_BYTES:
        raise ExpressionError(f"refers to {len(text) >> 20} MiB of data; {MAX_DATA_BYTES >> 20} MiB are allowed")
    if "\\u0000" in text and _has_nul(data):
        # cel-expr-python 0.1.3 would silently cut the text there.
        raise ExpressionError("a text with a NUL in it can only be passed on unchanged: write ${…} with its name alone")
    return len(text)


def _has_nul(value: Any) -> bool:
    queue = [value]
    for one in queue:  # grows while it is walked
        if isinstance(one, str):
            if "\0" in one:
                return True
        elif isinstance(one, Mapping):
            queue += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            queue += one
    return False


def run(source: str, data: Mapping[str, Any]) -> Any:
    """Evaluate in this process and return a JSON value. The caller has bounded the cost."""
    try:
        result = program(source).eval(data=dict(data))
    except (RuntimeError, ValueError) as error:
        raise ExpressionError(_sentence(str(error))) from None
    if result.type() == cel.Type.ERROR:
        raise ExpressionError(_sentence(str(result.value())))
    try:
        value = to_json(result.plain_value())
        size = len(json.dumps(value))
    except RecursionError:  # the expression adds levels to the data's own
        raise ExpressionError("its value is nested too deeply") from None
    if size > MAX_RESULT_BYTES:
        raise ExpressionError(f"its value is larger than {MAX_RESULT_BYTES >> 20} MiB")
    return value


def to_json(value: Any) -> Any:
    """A CEL value as a JSON value, by protobuf's JSON mapping: times as RFC 3339, durations as '1.5s', bytes in
    base64."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ExpressionError(f"its value is {value}, which JSON can't express")
        return value
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else json.dumps(to_json(k)): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, datetime.timedelta):
        return f"{value.total_seconds():g}s"
    if isinstance(value, cel.Type):
        return value.name()
    raise ExpressionError(f"its value is a {type(value).__name__}, which JSON can't express")


def _sentence(said: str) -> str:
    """cel-cpp's message, without its status codes."""
    text = said.partition(" [")[0] if said.endswith("]") and " [" in said else said
    code, _, rest = text.partition(": ")
    text = (rest if code.isupper() and rest else text).splitlines()[0]
    if "No matching overloads" in text:
        return f"{text}: CEL doesn't mix types; convert with int(…), double(…) or string(…)"
    if "Iteration budget" in text:
        return "loops more than 10000 times"
    if "bad_alloc" in text:
        return "needs too much memory"
    return text
