"""Expressions: values, types, names, errors with their place; and that a hostile one harms nobody."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.base import privileges, process
from swarm.cel import template
from swarm.cel.evaluate import referred
from swarm.cel.expression import MAX_CHARS, ExpressionError, parse
from swarm.cel.jail import Jail
from tests.cel.local import Local

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

NAMES: dict[str, Any] = {
    "inputs": {
        "n": 3, "name": "x", "list": [1, 2, 3], "none": None, "big": "a" * 500_000, "many": list(range(10_000)),
        "huge": 2**70, "nul": "a\0b", "deep": {"a b": {"c": [{"d": 4}]}}, "half": "\ud800",
    },
    "steps": {"build-it": {"outputs": {"ok": True}}},
    "variables": {"region": "eu"},
    "ticket": {"id": "t-1"},
    "trigger": {"type": "webhook"},
}  # fmt: skip


@pytest.fixture(scope="module")
def jail() -> Iterator[Jail]:
    with Jail() as jail:
        yield jail


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("${inputs.n}", 3),
        ("${inputs}", NAMES["inputs"]),
        ("${inputs.n + 1}", 4),
        ("${inputs.n > 2 && inputs.name == 'x'}", True),
        ("${inputs.none}", None),
        ("${double(inputs.n) * 1.5}", 4.5),
        ("${inputs.list.map(x, x * 2)}", [2, 4, 6]),
        ("${inputs.list.filter(x, x > 1).size()}", 2),
        ('${inputs.list.map(x, string(x)).join("-")}', "1-2-3"),
        ("${{'a': inputs.n, 'b': [1]}}", {"a": 3, "b": [1]}),
        ('${steps["build-it"].outputs.ok}', True),
        ("${inputs.deep['a b'].c[0].d}", 4),
        ("${has(inputs.nope) ? inputs.nope : 'none'}", "none"),
        ("n is ${inputs.n}, list ${inputs.list}, none ${inputs.none}", "n is 3, list [1,2,3], none null"),
        ("${variables.region}/${ticket.id}/${trigger.type}", "eu/t-1/webhook"),
        ("$${inputs.n} and $5 and {}", "${inputs.n} and $5 and {}"),
        ("${'}'} ${\"{\"}", "} {"),
        ("${inputs.huge}", 2**70),
        ("${inputs.nul}", "a\0b"),
        ("${inputs.half}", "\ud800"),
        ("${timestamp('2026-01-31T12:00:00Z') + duration('90s')}", "2026-01-31T12:01:30Z"),
        ("${duration('90s')}", "90s"),
        ("${b'ab'}", "YWI="),
        ("${'ä€'.size()}", 2),
        ("${3u}", 3),
        ("${size(inputs.list) == 3 ? 'three' : 'other'}", "three"),
        ("${'bc' in ['ab', 'bc']}", True),
        ("${inputs.name.matches('^[a-z]$')}", True),
        ("plain", "plain"),
    ],
)
def test_values(source: str, value: Any, jail: Jail) -> None:
    found = template.fill(source, NAMES, jail)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("source", "said", "offset"),
    [
        ("${1 +* 2}", "Syntax error", 5),
        ("ab ${ nope.x + 1 }", "unknown name 'nope.x'; use one of", 6),
        ("${inputs.n", "has no closing '}'; write", 0),
        ("${}", "empty", 2),
        ("${ }", "empty", 2),
        ("${frob(1)}", "frob", 6),
        ("${" + "(" * 500 + "1" + ")" * 500 + "}", "nested too deeply", 2),
        ("${" + "[" * 500 + "]" * 500 + "}", "nested too deeply", 2),
        ("${" + "1+" * 1500 + "1}", "nested too deeply", 2),
        ("${'" + "a" * MAX_CHARS + "'}", "longer than", 2),
        ("${1.0 + 2}", "no matching overload", 6),
        ("${[1].map(inputs, inputs)}", "'inputs' is a reserved name", 2),
        ("${size(secrets.KEY)}", "unknown name 'secrets.KEY'; use one of", 7),
    ],
)
def test_errors_have_a_place(source: str, said: str, offset: int) -> None:
    with pytest.raises(ExpressionError, match=said) as caught:
        template.text(source)
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("${inputs.nope}", "inputs has no 'nope'"),
        ("${inputs.nope + 1}", "nope"),
        ("${inputs.list[7]}", "inputs.list has no 7"),
        ("${inputs.n / 0}", "divide by zero"),
        ("${9223372036854775807 + inputs.n}", "overflow"),
        ("${inputs.n + 'x'}", "CEL doesn't mix types"),
        ("${0.0 / 0.0}", "nan"),
        ("${inputs.nul + 'x'}", "NUL"),
        ("${inputs.huge + 1}", "out of range"),
        ("${item + 1}", "item"),
        ("${item}", "'item' is not available here"),
    ],
)
def test_no_value_is_an_error_with_a_reason(source: str, said: str, jail: Jail) -> None:
    with pytest.raises(ExpressionError, match=said) as caught:
        template.fill({"a": [source]}, NAMES, jail)
    assert str(caught.value).startswith("a[0]: ${"), "and says where it stands"


DOUBLED = "inputs.big"
for _ in range(7):
    DOUBLED = f"[{DOUBLED}].map(v, v + v + v + v + v)[0]"

HOSTILE = [
    "inputs.many.map(x, inputs.many.map(y, x * y))",
    "inputs.many.all(x, inputs.many.all(y, inputs.many.all(z, x + y + z >= 0)))",
    "inputs.many.map(x, inputs.big + 'b')",
    "size(" + DOUBLED + ")",
    "inputs.many.all(x, inputs.big.matches('(a?){500}(a){500}$'))",
    "'a'.replace('', '" + "x" * 1000 + "').replace('', '" + "y" * 1000 + "').replace('', '" + "z" * 1000 + "')",
    "inputs.big.split('').map(x, inputs.big)",
    "'%s'.format([inputs.many.map(x, inputs.big)])",
    "inputs.big.matches('((a{100}){100}){100}')",
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!'.matches('^(a+)+$')",
]


def resident_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_expression_ends_soon_and_takes_no_memory_here(source: str, jail: Jail) -> None:
    template.fill("${[1].map(x, x)}", NAMES, jail)  # the jail is warm
    before, began = resident_kb(), time.process_time()
    try:
        assert template.fill(f"${{{source}}}", NAMES, jail) in (True, False)
    except ExpressionError as error:
        assert any(w in str(error) for w in ("memory", "CPU time", "10000 times", "larger", "nested", "regular"))
    assert resident_kb() - before < 48 << 10, "KiB in this process"
    assert time.process_time() - began < 1.0, "seconds of CPU in this process"
    assert template.fill("${[1].map(x, x + inputs.n)}", NAMES, jail) == [4], "and the next one is served"


def test_the_time_limit_is_of_processor_time(jail: Jail) -> None:
    with pytest.raises(ExpressionError, match=r"took more than 0\.5 s of CPU time and was stopped"):
        template.fill("${inputs.many.all(x, inputs.big.matches('(a?){500}(a){500}$'))}", NAMES, jail)


def test_cheap_expressions_need_no_process() -> None:
    with Jail() as jail:
        assert template.fill("${inputs.n + 1} ${size(inputs.list)}", NAMES, jail) == "4 3"
        assert jail.pid is None
    with pytest.raises(ExpressionError, match="too costly"):
        template.fill("${[1].map(x, x)}", NAMES, Local())


def test_a_jail_that_was_killed_is_replaced() -> None:
    with Jail() as jail:
        assert template.fill("${[1].map(x, x)}", NAMES, jail) == [1]
        first = jail.pid
        assert first is not None
        os.kill(first, 9)
        assert template.fill("${[1].map(x, x)}", NAMES, jail) == [1]
        assert jail.pid not in (None, first)
        second = jail.pid
    assert second is not None and process.start_time(second) is None, "it ends with the jail"


def test_the_inmate_has_no_powers(jail: Jail) -> None:
    template.fill("${[1].map(x, x)}", NAMES, jail)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{jail.pid}/status").read_text().splitlines() if ":\t" in line
    )
    if os.geteuid() == 0:
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(privileges.UID)}
        assert status["CapEff"].strip("0") == ""
    limits = Path(f"/proc/{jail.pid}/limits").read_text()
    for name in ("Max open files", "Max processes", "Max file size"):
        line = next(line for line in limits.splitlines() if line.startswith(name))
        assert line[len("Max open files            ") :].split()[0] == "0", line
    environ = Path(f"/proc/{jail.pid}/environ")
    if os.geteuid() == 0:
        assert b"SWARM" not in environ.read_bytes()


def test_many_threads_may_ask_at_once(jail: Jail) -> None:
    barrier = threading.Barrier(8)

    def ask(i: int) -> Any:
        barrier.wait()
        return [template.fill(f"${{[{i}].map(x, x + inputs.n)}}", NAMES, jail) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [[[i + 3]] * 5 for i in range(8)]


def test_only_what_is_named_is_handed_over() -> None:
    names = {"inputs": {"a": {"x": 1, "y": 2}, "b": 3}, "steps": {"s": {"outputs": {"o": 1, "p": 2}}}}
    found = parse("inputs.a.x + steps.s.outputs.o + size(ticket)")
    assert referred(names, found.references) == {"inputs": {"a": {"x": 1}}, "steps": {"s": {"outputs": {"o": 1}}}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_a_plain_reference_keeps_any_value(value: Any) -> None:
    found = template.fill({"a": "${inputs.v}"}, {"inputs": {"v": value}}, Local())["a"]
    assert found == value and repr(found) == repr(value)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters() | st.sampled_from(list("${}'\"\\.[]()+inputs n0")), max_size=40))
def test_any_text_is_a_value_or_an_expression_error(source: str) -> None:
    try:
        template.fill(source, NAMES, Local())
    except ExpressionError as error:
        assert str(error)


def test_an_allowance_is_shared(jail: Jail) -> None:
    some = jail.allowance(0.2)
    heavy = "${range1000.map(x, x * 2).size()}".replace("range1000", str(list(range(800))))
    with pytest.raises(ExpressionError, match="used up the CPU time"):
        for _ in range(200):
            template.fill(heavy, NAMES, some)
    assert template.fill("${inputs.n + 1}", NAMES, some) == 4, "what is cheap goes on"


def test_a_budget_is_shared() -> None:
    with pytest.raises(ExpressionError, match="together are too large"):
        template.fill(["${inputs.many}"] * 1000, NAMES, Local())
    with pytest.raises(ExpressionError, match="too many expressions"):
        template.fill(["${inputs.n}"] * 1000, NAMES, Local(), template.Budget(expressions=500))


def test_deep_data_is_an_error_or_a_value(jail: Jail) -> None:
    deep: Any = "\0"
    for _ in range(5000):
        deep = [deep]
    for source in ("${inputs.deep}", "${inputs.deep == inputs.deep}", "${[1].map(x, inputs.deep)}"):
        with pytest.raises(ExpressionError):
            template.fill(source, {"inputs": {"deep": deep}}, jail)
