"""Checks schemas, and values against them, with a bounded cost for any input."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import jsonschema
from jsonschema.validators import extend

from swarm.base import jsontext
from swarm.cel.expression import program
from swarm.schema.values import Issue, SchemaError

MAX_SCHEMA_BYTES: Final = 64 << 10
MAX_SCHEMA_DEPTH: Final = 24
MAX_PATTERN_CHARS: Final = 512
MAX_MATCHED_CHARS: Final = 64 << 10
MAX_ISSUES: Final = 20
# Keyword checks for one value: this many, this many more for each value inside it, and never more than the last.
_BUDGET: Final = (20_000, 10, 300_000)
# Keywords that point outside the schema, are resolved while checking, or have a hidden cost.
_REFUSED: Final = frozenset(
    {"$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$anchor", "$id", "unevaluatedItems", "unevaluatedProperties"}
)  # fmt: skip
_MAPS: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LISTS: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SINGLE: Final = frozenset(
    {"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "additionalItems"}
)  # fmt: skip


# --- checking schemas -------------------------------------------------------------------------------------------------


def check_schema(schema: Any) -> None:
    """Raises SchemaError, with the path, for anything that isn't a JSON Schema (2020-12), or is refused."""
    try:
        text = jsontext.dumps(schema)
    except (TypeError, ValueError):
        raise SchemaError("not a JSON value") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"larger than {MAX_SCHEMA_BYTES >> 10} KiB")
    _walk(schema, schema, (), 0)
    error = jsonschema.exceptions.best_match(_meta().iter_errors(schema))
    if error is not None:
        path = tuple(error.absolute_path)
        why = f"type must be one of {', '.join(_TYPES)}, or a list of them" if path[-1:] == ("type",) else error.message
        raise SchemaError(f"not a JSON Schema: {why}", path)


_TYPES: Final = ("string", "integer", "number", "boolean", "object", "array", "null")


def _walk(schema: Any, root: Any, path: tuple[str | int, ...], depth: int) -> None:
    if depth > MAX_SCHEMA_DEPTH:
        raise SchemaError(f"nested deeper than {MAX_SCHEMA_DEPTH}", path)
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        here = (*path, key)
        if key in _REFUSED:
            raise SchemaError(f"{key} is not supported", here)
        if key == "$ref" and (not isinstance(value, str) or not _resolves(value, root)):
            raise SchemaError(f"$ref {value!r} must be '#/…', a place in this schema", here)
        patterns = [value] if key == "pattern" else list(value) if key == "patternProperties" and value else []
        for pattern in patterns:
            _check_pattern(pattern, here)
        if key in _MAPS and isinstance(value, Mapping):
            for name, inner in value.items():
                _walk(inner, root, (*here, name), depth + 1)
        elif key in _LISTS and isinstance(value, list):
            for i, inner in enumerate(value):
                _walk(inner, root, (*here, i), depth + 1)
        elif key in _SINGLE:
            _walk(value, root, here, depth + 1)


def _resolves(ref: str, root: Any) -> bool:
    if ref == "#":
        return True
    if not ref.startswith("#/"):
        return False
    found = root
    for escaped in ref[2:].split("/"):
        part = escaped.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, Mapping) and part in found:
            found = found[part]
        else:
            return False
    return isinstance(found, Mapping | bool)


def _check_pattern(pattern: Any, path: tuple[str | int, ...]) -> None:
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN_CHARS or "\0" in pattern:
        raise SchemaError(f"a pattern must be text of at most {MAX_PATTERN_CHARS} characters, without NUL", path)
    result = program(_MATCHES).eval(data={"inputs": {"text": "", "pattern": pattern}})
    if result.type().name() == "ERROR":
        said = str(result.value()).rpartition(": ")[2]
        raise SchemaError(
            f"the pattern {pattern!r} is not valid in RE2 (no look-around, no back-references): {said}", path
        )


# --- checking values ----------------------------------------------------------------------------------------------


def issues(value: Any, schema: str) -> list[Issue]:
    """Why a value doesn't fit a schema (JSON text): at most `MAX_ISSUES` issues, none when it fits.

    Raises SchemaError when the schema itself can't be used.
    """
    validator = _compiled(schema)
    _budget.left = min(_BUDGET[0] + _BUDGET[1] * _count(value, _BUDGET[2] // _BUDGET[1]), _BUDGET[2])
    found = []
    try:
        for error in validator.iter_errors(value):
            found.append(Issue(error.json_path, _message(error)))
            if len(found) == MAX_ISSUES:
                break
    except (_TooMuch, RecursionError):  # a schema that refers to itself takes several frames per level of the value
        found.append(Issue("$", "the check took too many steps and was stopped; simplify the schema or the value"))
    return found


def _count(value: Any, enough: int) -> int:
    queue = [value]
    for one in queue:  # grows while it is walked
        if len(queue) > enough:
            break
        queue += list(one.values()) if isinstance(one, Mapping) else one if isinstance(one, list) else []
    return len(queue)


def _message(error: jsonschema.ValidationError) -> str:
    said = error.message if len(error.message) <= 300 else f"{error.message[:200]}…{error.message[-60:]}"
    return said.replace("\n", " ")


class _TooMuch(Exception):
    pass


_budget = threading.local()


def _spend(amount: int) -> None:
    _budget.left -= amount
    if _budget.left < 0:
        raise _TooMuch


_Keyword = Callable[[Any, Any, Any, Any], Iterator[jsonschema.ValidationError] | None]


def _counted(keyword: _Keyword) -> _Keyword:
    def check(validator: Any, argument: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
        _spend(1)
        yield from keyword(validator, argument, instance, schema) or ()

    return check


def _matches(pattern: str, text: str) -> bool:
    if len(text) > MAX_MATCHED_CHARS:
        _spend(len(text))
    _spend(1 + len(text) * len(pattern) // 1000)
    # CEL cuts a text at a NUL, and can't hold a lone surrogate.
    text = text.replace("\0", "\ufffd").encode(errors="replace").decode()
    return program(_MATCHES).eval(data={"inputs": {"text": text, "pattern": pattern}}).value() is True


_MATCHES: Final = "inputs.text.matches(inputs.pattern)"


def _pattern(validator: Any, pattern: str, text: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(text, str) and not _matches(pattern, text):
        yield jsonschema.ValidationError(f"{text[:80]!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, Mapping):
        for pattern, inner in patterns.items():
            for name, each in value.items():
                if _matches(pattern, name):
                    yield from validator.descend(each, inner, path=name, schema_path=pattern)


def _additional_properties(
    validator: Any, wanted: Any, value: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    if not isinstance(value, Mapping):
        return
    known, patterns = schema.get("properties") or {}, schema.get("patternProperties") or {}
    extra = [name for name in value if name not in known and not any(_matches(p, name) for p in patterns)]
    if wanted is False and extra:
        names = ", ".join(repr(name) for name in extra[:5])
        there = f"; use one of {', '.join(list(known)[:12])}" if known else ""
        yield jsonschema.ValidationError(f"unknown: {names}{there}")
    elif isinstance(wanted, Mapping):
        for name in extra:
            yield from validator.descend(value[name], wanted, path=name)


def _unique_items(validator: Any, wanted: bool, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if wanted and isinstance(value, list):
        _spend(len(value))
        if len({json.dumps(item, sort_keys=True) for item in value}) < len(value):
            yield jsonschema.ValidationError("the items are not all different")


def _required(validator: Any, names: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, Mapping):
        for name in names:
            if name not in value:
                yield jsonschema.ValidationError(f"{name!r} is missing")


_OURS: Final[dict[str, _Keyword]] = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "uniqueItems": _unique_items,
    "required": _required,
}


@lru_cache(maxsize=1)
def _bounded() -> Any:
    stock = jsonschema.Draft202012Validator
    return extend(  # type: ignore[no-untyped-call]
        stock, {name: _counted(check) for name, check in {**stock.VALIDATORS, **_OURS}.items()}
    )


@lru_cache(maxsize=1)
def _meta() -> Any:
    """The validator of schemas themselves: the stock one, as the meta-schema has no untrusted patterns."""
    return jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)


@lru_cache(maxsize=512)
def _compiled(schema: str) -> Any:
    try:
        value = jsontext.loads(schema)
    except ValueError:
        raise SchemaError("not JSON") from None
    check_schema(value)
    return _bounded()(value)
