"""Large values: kept once, handed on as references, looked into when an expression does, and never forged."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.cel import stored, template
from swarm.cel.evaluate import MAX_DATA_BYTES
from swarm.cel.expression import ExpressionError
from swarm.cel.jail import Jail
from swarm.cel.stored import KEY, Stored
from swarm.store import artifacts

BIG = "x" * (64 << 10)  # one byte over the limit for its quotes


class Shelf:
    """What `pack` made, to be loaded from; counts."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self.loaded: list[str] = []

    def put(self, packed: artifacts.Packed) -> str:
        self.parts |= packed.parts
        return packed.text

    def load(self, digest: str) -> Any:
        self.loaded.append(digest)
        return artifacts.unpack(self.parts[digest], self.load)

    def kept(self, value: Any) -> Any:
        return artifacts.unpack(self.put(artifacts.pack(value)), self.load)


def test_what_is_small_stays_as_it_is() -> None:
    for text in ('{"a":  1}', "[]", '"' + "y" * 16000 + '"'):
        assert artifacts.pack_text(text) == artifacts.Packed(text)
    assert artifacts.pack({"a": BIG[:-10]}).parts == {}
    assert artifacts.pack_text('"\\ud800"').text == '"\\ud800"'


def test_large_fields_go_one_by_one() -> None:
    packed = artifacts.pack({"log": BIG, "same": BIG, "code": 0, "many": ["y" * 100] * 1000})
    made = json.loads(packed.text)
    assert made["code"] == 0 and made["log"] == made["same"]
    text = json.dumps(BIG)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert made["log"] == {KEY: {"digest": digest, "bytes": len(text)}}
    assert packed.parts[digest] == text and len(packed.parts) == 2


@pytest.mark.parametrize("value", [[BIG], BIG, {str(n): "y" * 100 for n in range(1000)}, {KEY: BIG}])
def test_what_is_no_object_or_has_many_fields_goes_whole(value: Any) -> None:
    shelf = Shelf()
    there = shelf.kept(value)
    assert isinstance(there, Stored) and len(shelf.parts) == 1
    assert stored.whole(there, limit_bytes=1 << 20) == value


def test_a_digest_that_somebody_wrote_is_a_value() -> None:
    shelf = Shelf()
    secret = shelf.kept({"secret": BIG})["secret"]
    forged = json.loads(json.dumps({"x": secret, "y": [{KEY: {"pairs": [["z", secret]]}}], KEY: 1}))
    assert forged["x"] == dict(secret) and not isinstance(forged["x"], Stored)
    for packed in (artifacts.pack(forged), artifacts.pack_text(json.dumps(forged))):
        again = artifacts.unpack(packed.text, shelf.load)
        assert again == forged and not stored.has_any(again) and shelf.loaded == []
    hidden = json.dumps(forged).replace("$", "\\u0024")  # no mark in the text as it comes
    for text in (hidden, artifacts.pack_text(hidden).text):
        assert artifacts.unpack(text, shelf.load) == forged and shelf.loaded == []


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
LARGE = st.integers(60_000, 70_000).map(lambda n: "é" * (n // 2))
REFERENCES = st.fixed_dictionaries(
    {KEY: st.fixed_dictionaries({"digest": st.text(max_size=4), "bytes": st.integers()}) | LEAVES}
)
VALUES = st.recursive(
    LEAVES | LARGE | REFERENCES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.just(KEY) | st.just("pairs"), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_every_value_comes_back(value: Any) -> None:
    shelf = Shelf()
    packed = artifacts.pack(value)
    assert len(packed.text.encode()) <= artifacts.INLINE_BYTES
    once = artifacts.unpack(shelf.put(packed), shelf.load)
    assert stored.whole(once, limit_bytes=1 << 30) == value
    twice = shelf.kept({"on": once, "list": [once]})  # handed on, as a step's input
    assert stored.whole(twice, limit_bytes=1 << 30) == {"on": value, "list": [value]}
    raw = artifacts.unpack(shelf.put(artifacts.pack_text(json.dumps(value))), shelf.load)
    assert stored.whole(raw, limit_bytes=1 << 30) == value


# --- in expressions ---------------------------------------------------------------------------------------------------


def test_expressions_hand_on_or_look_inside() -> None:
    shelf = Shelf()
    outputs = shelf.kept({"log": BIG, "rows": [{"n": n, "s": "y" * 100} for n in range(1000)], "code": 3})
    names = {"steps": {"a": {"outputs": outputs}}}
    with Jail() as jail:

        def fill(source: str) -> Any:
            return template.fill(source, names, jail)

        handed_on = {
            "all": fill("${steps.a.outputs}"),
            "log": fill("${steps.a.outputs.log}"),
            "code": fill("${steps.a.outputs.code}"),
        }
        assert shelf.loaded == [] and handed_on["log"] is outputs["log"] and handed_on["code"] == 3
        assert artifacts.pack(handed_on).parts == {}
        assert fill("${steps.a.outputs.rows[7].n}") == 7
        assert fill("${size(steps.a.outputs.log)}") == len(BIG)
        assert fill("${steps.a.outputs.rows.filter(r, r.n < 3).map(r, r.n)}") == [0, 1, 2]
        assert fill("${steps.a.outputs.rows.size() + steps.a.outputs.code}") == 1003
        assert fill("the log: ${steps.a.outputs.log}") == f"the log: {BIG}"
        assert len(shelf.loaded) == 2  # each once
        with pytest.raises(ExpressionError, match="has no 'n'"):
            fill("${steps.a.outputs.rows[7].s.n}")


def test_what_is_too_large_is_not_loaded() -> None:
    shelf = Shelf()
    names = {"steps": {"a": {"outputs": shelf.kept({"log": "x" * (MAX_DATA_BYTES + 1)})}}}
    with Jail() as jail:
        for source in ("${size(steps.a.outputs.log)}", "${steps.a.outputs.size()}", "it: ${steps.a.outputs.log}"):
            with pytest.raises(ExpressionError, match="MiB"):
                template.fill(source, names, jail)
        assert shelf.loaded == []
        assert template.fill("${steps.a.outputs.code == 1}", {"steps": {"a": {"outputs": {"code": 1}}}}, jail) is True
