"""Schemas: the short form, values against them, hostile ones, and what certainly does not fit together."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import schema
from swarm.schema import SchemaError


def test_the_short_form() -> None:
    made = schema.expand(
        {"name": "string", "count": "integer?", "tags": ["string"], "any": "any",
             "size": {"type": "integer", "default": 3},
         "kind": {"enum": ["a", "b"]}, "at": {"x": "number", "y": "number?"}}
    )  # fmt: skip
    schema.check_schema(made)
    assert made["required"] == ["name", "tags", "any", "kind", "at"] and made["additionalProperties"] is False
    good: dict[str, Any] = {"name": "n", "tags": [], "any": None, "kind": "a", "at": {"x": 1.5}}
    assert schema.issues(good, schema.text(made)) == []
    assert schema.with_defaults(good, made)["size"] == 3
    bad = {**good, "tags": ["a", 1], "kind": "c", "z": 0}
    assert {str(issue) for issue in schema.issues(bad, schema.text(made))} == {
        "$.tags[1]: 1 is not of type 'string'",
        "$.kind: 'c' is not one of ['a', 'b']",
        "$: unknown: 'z'; use one of any, at, count, kind, name, size, tags",
    }


def test_a_full_schema_is_left_alone() -> None:
    full = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert schema.expand(full) == full and schema.expand({"properties": {}})["type"] == "object"


@pytest.mark.parametrize(
    ("given", "path"),
    [({"a": "strin"}, ("a",)), ({"a": ["string", "string"]}, ("a",)), ({"a": 3}, ("a",)), ({"a": ["x"]}, ("a", 0))],
)
def test_a_bad_short_form_has_a_place(given: Any, path: tuple[str | int, ...]) -> None:
    with pytest.raises(SchemaError) as caught:
        schema.expand(given)
    assert caught.value.path == path


REF_BOMB = {
    "$defs": {**{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}, "a30": {}},
    "$ref": "#/$defs/a0",
}
DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"$ref": "https://example.com/x"}, "must be '#/…', a place in this schema"),
        ({"$ref": "file:///etc/passwd"}, "must be '#/…', a place in this schema"),
        ({"$ref": "#/nowhere"}, "must be '#/…', a place in this schema"),
        ({"properties": {"a": {"$ref": "other.json"}}}, "must be '#/…', a place in this schema"),
        ({"$id": "https://example.com/x"}, "not supported"),
        ({"$dynamicRef": "#x"}, "not supported"),
        ({"unevaluatedProperties": False}, "not supported"),
        ({"pattern": "(?=a)"}, "RE2"),
        ({"pattern": "(a)\\1"}, "RE2"),
        ({"pattern": "a" * 513}, "at most 512"),
        ({"patternProperties": {"(?<!a)b": {}}}, "RE2"),
        ({"type": "nonsense"}, "not a JSON Schema"),
        ({"properties": 3}, "not a JSON Schema"),
        (DEEP, "nested deeper"),
        ({"description": "x" * 70_000}, "larger than"),
        (3, "not a JSON Schema"),
    ],
)
def test_refused(given: Any, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        schema.check_schema(given)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (REF_BOMB, 1),
        ({"$ref": "#"}, 1),
        ({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}, 1),
        ({"type": "string", "pattern": "^(a+)+$"}, "a" * 60_000 + "!"),
        ({"type": "string", "pattern": "(a?){400}(a){400}$"}, "a" * 60_000),
        ({"type": "array", "uniqueItems": True}, [{"a": i} for i in range(20_000)]),
        ({"patternProperties": {"^(x+)+$": {"type": "string"}}}, {"x" * 5000 + "!": 1}),
        ({"type": "array", "items": {"anyOf": [{"const": i} for i in range(500)]}}, list(range(499, -1, -1)) * 20),
    ],
    ids=range(8),
)
def test_a_hostile_schema_ends_soon(given: Any, value: Any) -> None:
    began = time.process_time()
    schema.issues(value, json.dumps(given))
    assert time.process_time() - began < 3.0


def test_a_deep_value_is_refused_or_passed() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    assert schema.issues(deep, json.dumps({"type": "array"})) == []
    assert "too many steps" in str(schema.issues(deep, json.dumps({"items": {"$ref": "#"}}))[0])


small = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "bb", "a\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
schemas = st.recursive(
    st.sampled_from(
        [{}, {"type": "string"}, {"type": "integer"}, {"type": ["null", "boolean"]}, {"enum": [1, "a"]},
         {"const": None},
         {"type": "string", "pattern": "^a"}, {"minItems": 1}, {"uniqueItems": True}, {"minimum": 1}]
    ),
    lambda inner: st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            "required": st.lists(st.sampled_from("abc"), unique=True, max_size=2),
            "additionalProperties": st.booleans() | inner,
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "b|c"]), inner, max_size=1),
        },
    )
    | st.fixed_dictionaries({"type": st.just("array"), "items": inner})
    | st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(schemas, small)
def test_it_agrees_with_jsonschema(given: dict[str, Any], value: Any) -> None:
    expected = jsonschema.Draft202012Validator(given).is_valid(value)
    assert (schema.issues(value, json.dumps(given)) == []) == expected


@settings(max_examples=400, deadline=None)
@given(schemas, schemas, small)
def test_a_mismatch_is_certain(one: dict[str, Any], other: dict[str, Any], value: Any) -> None:
    if schema.mismatch(one, other):
        fits = [jsonschema.Draft202012Validator(each).is_valid(value) for each in (one, other)]
        assert not all(fits), "a value that fits both"


@settings(max_examples=300, deadline=None)
@given(schemas, small, st.lists(st.sampled_from(["a", "b", 0, 1]), max_size=2))
def test_what_a_path_leads_to(given: dict[str, Any], value: Any, path: list[str | int]) -> None:
    if not jsonschema.Draft202012Validator(given).is_valid(value):
        return
    for part in path:
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if not inside:
            return
        value = value[part]
    found = schema.at(given, tuple(path))
    assert found is not False and jsonschema.Draft202012Validator(found).is_valid(value)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"type": "string"}, {"type": "integer"}, "it is a string, but must be an integer"),
        ({"type": "integer"}, {"type": "number"}, ""),
        ({"type": ["string", "null"]}, {"type": "string"}, ""),
        ({}, {"type": "string"}, ""),
        ({"enum": ["a"]}, {"enum": ["b"]}, 'it is one of ["a"], but must be one of ["b"]'),
        ({"type": "array", "items": {"type": "string"}}, {"type": "array", "items": {"type": "integer"}}, ""),
        (schema.expand({"a": "string"}), schema.expand({"a": "integer"}),
         "at 'a': it is a string, but must be an integer"),
        (schema.expand({"a": "string"}), schema.expand({"b": "string"}), "it has no 'b', which is required"),
    ],
)  # fmt: skip
def test_mismatch(one: Any, other: Any, said: str) -> None:
    assert schema.mismatch(one, other) == said


def test_the_cost_of_a_check_does_not_grow_with_the_value() -> None:
    source = schema.text({"type": "array", "items": {"type": "integer"}})
    assert schema.issues([0] * 250_000, source) == []
    (issue,) = schema.issues([0] * 400_000, source)
    assert "took too many steps" in str(issue)
