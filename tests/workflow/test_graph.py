"""Pictures: every step is there, nothing from the file escapes its place, and drawing is quick."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from xml.etree import ElementTree

from hypothesis import given, settings

from swarm.workflow import graph
from swarm.workflow.definition import Approval, ForEach, Repeat, Step
from tests.workflow.runs import flow, step
from tests.workflow.test_plan import workflows

FLOW = flow(
    step("list"),
    step("lint", "list", when="${inputs.lint}"),
    step("build", "list", for_each=ForEach(items="${steps.list.outputs}", max_parallel=4)),
    step("gate", "lint", "build", agent=None, approval=Approval()),
    step("ship", "gate", "list", join=1, continue_on_error=True),
    on_error=(step("tell", repeat=Repeat(until="${true}")),),
)


def test_text() -> None:
    assert graph.text(FLOW, {"list": "completed", "lint": "failed"}) == (
        "test 1.0.0\n"
        "1  ✔ list   echo@1.0.0\n"
        "2  ✘ lint   echo@1.0.0  after list · when ${inputs.lint}\n"
        "2  · build  echo@1.0.0  after list · for each ${steps.list.outputs}, 4 at once\n"
        "3  · gate   approval    after lint, build\n"
        "4  · ship   echo@1.0.0  after gate, list · join 1 · may fail\n"
        "   on_error:\n"
        "1  · tell   echo@1.0.0  until ${true}, at most 3 times\n"
    )


def test_mermaid() -> None:
    lines = graph.mermaid(FLOW).splitlines()
    assert lines[0] == "flowchart TD" and '  s3{{"gate<br/>approval"}}' in lines and "  s3 --> s4" in lines
    assert lines[-3:] == ["  subgraph on_error", *lines[-2:-1], "  end"]


def test_svg_goes_round_boxes() -> None:
    ElementTree.fromstring(graph.svg(FLOW, {"list": "failed"}))
    drawn = graph.layout(FLOW.steps)
    assert ("list", "list>ship>1", "list>ship>2", "ship") in drawn.routes


def test_nothing_gets_out() -> None:
    evil = '</text><script>alert(1)</script>"]\n  click s0 "javascript:alert(1)" \x1b[31m'
    hostile = flow(step("a", when=f"${{{evil}}}"), step("b", agent=evil, approval=Approval()))
    picture = graph.svg(hostile)
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture).iter()}
    assert tags == {"svg", "style", "defs", "marker", "path", "rect", "text"} and "\x1b" not in picture
    for line in graph.mermaid(hostile).splitlines()[1:]:
        assert re.fullmatch(r'  s\d(\["|\{\{"|\[\[")[^"<>\[\]{}]*(<br/>[^"<>\[\]{}]*)*("\]|"\}\}|"\]\])', line), line
    assert "\x1b" not in graph.text(hostile)


@settings(max_examples=100, deadline=None)
@given(workflows())
def test_any_workflow_can_be_drawn(steps: tuple[Step, ...]) -> None:
    one = flow(*steps)
    drawn = graph.layout(steps)
    layer = {name: i for i, names in enumerate(drawn.layers) for name in names}
    assert set(drawn.steps) <= set(layer)
    assert all(layer[b] == layer[a] + 1 for route in drawn.routes for a, b in pairwise(route))
    ElementTree.fromstring(graph.svg(one))
    assert all(step.id in graph.text(one) and step.id in graph.mermaid(one) for step in steps)


def test_a_large_one_is_drawn_quickly() -> None:
    wide = flow(step("a"), *[step(f"b{i}", "a") for i in range(500)], step("c", *[f"b{i}" for i in range(500)]))
    began = time.process_time()
    graph.svg(wide)
    long = flow(step("s0"), *[step(f"s{i}", f"s{i - 1}", *(["s0"] if i > 1 else [])) for i in range(1, 150)])
    graph.svg(long)
    assert time.process_time() - began < 5
