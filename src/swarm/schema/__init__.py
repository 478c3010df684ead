"""JSON Schemas for the inputs and outputs of agents and workflows: the short form, bounded checks, comparison.

Schemas are hostile. Nothing is fetched (`$ref` works within the schema only), patterns run in RE2 (linear time, through
CEL's `matches`), and every check has a budget of steps, so that no schema can keep an engine busy. `validator` does
that part. It is imported when first needed, because jsonschema is slow to import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from swarm.base import jsontext
from swarm.schema.values import Issue, SchemaError

__all__ = [
    "TYPES",
    "Issue",
    "SchemaError",
    "at",
    "check_schema",
    "expand",
    "issues",
    "mismatch",
    "of_value",
    "parsed",
    "text",
    "type_name",
    "with_defaults",
]

TYPES: Final = ("string", "integer", "number", "boolean", "object", "array", "null", "any")


# --- the short form -------------------------------------------------------------------------------------------------


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Schema for a short form; a full one (`type: object`, or `properties`, `$ref` …) is returned as it is.

    In the short form each key is a name and each value a type (`string`, `integer?` for an optional one, `[string]` for
    a list) or a schema, which may have a `default`. Raises SchemaError.
    """
    if given.get("type") == "object" or any(k in given for k in ("$schema", "$ref", "allOf", "anyOf", "oneOf")):
        return dict(given)
    if isinstance(given.get("properties"), Mapping):
        return {"type": "object", **given}
    properties, required = {}, []
    for name, one in given.items():
        schema, optional = _short(one, (name,))
        properties[name] = schema
        if not optional and "default" not in schema:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _short(one: Any, path: tuple[str | int, ...]) -> tuple[dict[str, Any], bool]:
    if isinstance(one, str):
        word = one.removesuffix("?")
        if word not in TYPES:
            names = ", ".join(TYPES)
            raise SchemaError(f"unknown type {one!r}; use one of {names}, optionally followed by '?'", path)
        return ({} if word == "any" else {"type": word}), one.endswith("?")
    if isinstance(one, list):
        if len(one) != 1:
            raise SchemaError("a list must have one type for all its items, such as [string]", path)
        return {"type": "array", "items": _short(one[0], (*path, 0))[0]}, False
    if isinstance(one, Mapping):
        named = one.get("type")
        if isinstance(named, str) and named.removesuffix("?") in TYPES:
            rest = {k: v for k, v in one.items() if k != "type"}
            return {**_short(named, path)[0], **rest}, named.endswith("?")
        if any(k in one for k in ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "default")):
            return dict(one), False
        return expand(one), False
    raise SchemaError("must be the name of a type, or a schema", path)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_schema(schema: Any) -> None:
    """Raises SchemaError, with the path, for anything that isn't a JSON Schema (2020-12), or is refused."""
    from swarm.schema import validator

    validator.check_schema(schema)


def issues(value: Any, schema: str) -> list[Issue]:
    """Why a value doesn't fit a schema (JSON text): at most `validator.MAX_ISSUES` issues, none when it fits.

    Raises SchemaError when the schema itself can't be used.
    """
    from swarm.schema import validator

    return validator.issues(value, schema)


def with_defaults(value: Any, schema: Any) -> Any:
    """The value with the schema's defaults for missing properties, in nested objects too."""
    if not isinstance(value, Mapping) or not isinstance(schema, Mapping):
        return value
    filled = dict(value)
    for name, inner in (schema.get("properties") or {}).items():
        if name in filled:
            filled[name] = with_defaults(filled[name], inner)
        elif isinstance(inner, Mapping) and "default" in inner:
            filled[name] = inner["default"]
    return filled


# --- do a step's outputs fit the next one's inputs? -------------------------------------------------------------------


def at(schema: Any, path: tuple[str | int, ...]) -> Any:
    """The schema of the value at ``path``; {} (anything) if it isn't known, False if no value can be there."""
    for part in path:
        if not isinstance(schema, Mapping):
            return schema
        kind = _types(schema)
        if any(k in schema for k in ("$ref", "allOf", "anyOf", "oneOf", "if", "not", "patternProperties")):
            return {}
        if kind and kind <= ({"string", "integer", "number", "boolean", "null"}):
            return False
        if isinstance(part, str) and (not kind or "object" in kind):
            if kind == {"object"} and part not in (schema.get("properties") or {}):
                rest = schema.get("additionalProperties", True)
                schema = {} if rest is True else rest
            else:
                schema = (schema.get("properties") or {}).get(part, {})
        elif isinstance(part, int) and (not kind or "array" in kind):
            schema = {} if "prefixItems" in schema else schema.get("items", {})
        else:
            return False if kind else {}
    return schema


def mismatch(given: Any, wanted: Any) -> str:
    """Why no value of schema ``given`` can fit ``wanted``; '' if one might. Reports only certain mismatches."""
    if given is False or wanted is True or not isinstance(given, Mapping) or not isinstance(wanted, Mapping):
        return ""
    have, want = _types(given), _types(wanted)
    if have and want and not any(_fits(one, other) for one in have for other in want):
        return f"it is {_names(have)}, but must be {_names(want)}"
    for key in ("enum", "const"):
        allowed = wanted.get("enum") if key == "enum" else [wanted["const"]] if "const" in wanted else None
        offered = given.get("enum") if "enum" in given else [given["const"]] if "const" in given else None
        if allowed is not None and offered is not None and not any(value in allowed for value in offered):
            return f"it is one of {json.dumps(offered)[:80]}, but must be one of {json.dumps(allowed)[:80]}"
    if have == {"object"} == want:
        for name in wanted.get("required") or ():
            inner = at(given, (name,))
            if inner is False:
                return f"it has no {name!r}, which is required"
            if why := mismatch(inner, (wanted.get("properties") or {}).get(name, {})):
                return f"at {name!r}: {why}"
    filled = have == {"array"} == want and given.get("minItems", 0) > 0  # an empty list fits any item type
    if filled and (why := mismatch(given.get("items", {}), wanted.get("items", {}))):
        return f"in its items: {why}"
    return ""


def text(schema: Any) -> str:
    """A schema as text for `issues`; equal schemas give equal texts."""
    return json.dumps(schema, sort_keys=True)


def parsed(source: str) -> Any:
    """The schema in an agent's row; {} if it is broken."""
    try:
        value = jsontext.loads(source)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def of_value(value: Any) -> dict[str, Any]:
    """The schema that only this JSON value fits."""
    return {"const": value, "type": type_name(value)}


def type_name(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object"


def _types(schema: Mapping[str, Any]) -> set[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {one for one in kind if isinstance(one, str)}
    if isinstance(schema.get("enum"), list):
        return {type_name(value) for value in schema["enum"]}
    return {type_name(schema["const"])} if "const" in schema else set()


def _fits(one: str, other: str) -> bool:
    return one == other or {one, other} == {"integer", "number"}


def _names(types: set[str]) -> str:
    article = {"integer": "an integer", "array": "an array", "object": "an object", "null": "null"}
    return " or ".join(article.get(one, f"a {one}") for one in sorted(types))
