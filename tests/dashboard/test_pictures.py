"""Pictures: small however large what they show is, and safe whatever text is in it."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import pytest

from swarm.dashboard import svg, svg_gantt, svg_graph
from swarm.dashboard.collapse import MOST_BOXES, Picture, opened
from swarm.dashboard.svg_gantt import Row, Span
from swarm.dashboard.svg_graph import Outline
from tests.dashboard.flows import HOSTILE

Needs = Mapping[str, Sequence[str]]
_R = random.Random(1)

GRAPHS: dict[str, Needs] = {
    "diamond": {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]},
    "side by side": {f"s{i}": [] for i in range(2000)},
    "chain": {f"s{i}": [f"s{i - 1}"] if i else [] for i in range(2000)},
    "fan": {"a": [], **{f"s{i}": ["a"] for i in range(1998)}, "z": [f"s{i}" for i in range(1998)]},
    "layers": {f"l{k}s{i}": [f"l{k - 1}s{j}" for j in range(20)] if k else [] for k in range(100) for i in range(20)},
    "random": {
        f"s{i}": sorted({f"s{_R.randrange(max(0, i - 50), i)}" for _ in range(3 if i else 0)}) for i in range(2000)
    },
    "all on all": {f"s{i}": [f"s{j}" for j in range(i)] for i in range(60)},
}  # fmt: skip


def outline(id: str, needs: Sequence[str], what: str = "echo") -> Outline:
    return Outline(
        id=id, needs=tuple(needs), what=what, notes="", part="steps", fans_out=False, nested=False, approval=False
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_of_any_size_is_a_small_picture_of_all_its_steps(name: str) -> None:
    needs = GRAPHS[name]
    picture = opened(needs, ())
    assert len(picture.boxes) <= MOST_BOXES
    assert sorted(one for box in picture.boxes for one in box.members) == sorted(needs)
    place = {box.key: number for number, box in enumerate(picture.boxes)}
    assert all(need in place for box in picture.boxes for need in box.needs)
    drawn = draw(picture, needs)
    assert len(drawn.encode()) < 300_000
    # It can be drawn only if no box needs itself by way of others.
    assert drawn.count('class="box') >= len(picture.boxes)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_step_can_be_reached_by_opening_boxes(name: str) -> None:
    needs, wanted = GRAPHS[name], list(GRAPHS[name])[len(GRAPHS[name]) * 2 // 3]
    keys: list[str] = []
    for _ in range(10):
        [box] = [box for box in opened(needs, keys).boxes if wanted in box.members]
        if not box.is_group:
            return
        keys.append(box.key)
    raise AssertionError(f"{wanted} is still within a box after opening {keys}")


def test_steps_side_by_side_are_drawn_in_rows() -> None:
    needs = GRAPHS["side by side"]
    [_, _, width, height] = re.findall(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', draw(opened(needs, ()), needs))[0]
    assert float(width) < 1300 and float(height) < 900


def test_what_others_imply_is_left_out_and_counted() -> None:
    picture = opened(GRAPHS["all on all"], ())
    assert sum(len(box.needs) for box in picture.boxes) + picture.hidden == 60 * 59 // 2
    assert sum(len(box.needs) for box in picture.boxes) == 59


def test_unknown_boxes_in_an_address_open_nothing() -> None:
    assert opened(GRAPHS["diamond"], ("nowhere", HOSTILE)) == opened(GRAPHS["diamond"], ())


def draw(picture: Picture, needs: Needs) -> str:
    steps = {one: outline(one, some) for one, some in needs.items()}
    status = dict.fromkeys(list(needs)[: len(needs) // 2], "completed")
    return svg_graph.draw(picture, steps, name="a run", status=status, copies={}, link=lambda box: f"/x?open={box.key}")


def test_hostile_text_is_text() -> None:
    steps = {HOSTILE: outline(HOSTILE, (), what=HOSTILE)}
    picture = opened({HOSTILE: ()}, ())
    span = Span(start=0, end=5, state=HOSTILE, title=HOSTILE)
    drawings = [
        svg_graph.draw(
            picture, steps, name=HOSTILE, status={HOSTILE: HOSTILE}, copies={}, link=lambda box: f'/"x{HOSTILE}'
        ),
        svg_gantt.draw([Row(name=HOSTILE, whole=span, spans=[span])], start=0, now=9, name=HOSTILE),
        svg.bars([(HOSTILE, 1.0, HOSTILE)], name=HOSTILE),
        svg.columns([(HOSTILE, 1.0, HOSTILE)], name=HOSTILE),
        svg.meter(1, 2, name=HOSTILE),
    ]
    for drawn in drawings:
        root = ElementTree.fromstring(drawn)  # well-formed, so nothing got out of its place
        assert not [one.tag for one in root.iter() if one.tag not in ("svg", "g", "a", "title", "text", "rect", "path")]
        assert not {name for one in root.iter() for name in one.attrib if name.startswith("on") or name == "style"}
        assert not re.search("[\u202e\u2066\x1b]", drawn)


def test_nothing_is_divided_by_a_zero() -> None:
    assert svg.bars([("a", 0.0, "0")], name="x") and svg.bars([], name="x") and svg.columns([], name="x")
    assert svg.meter(1, 0, name="x") and svg_gantt.draw([], start=5, now=5, name="x")
    span = Span(start=5, end=None, state="running", title="x")
    assert svg_gantt.draw([Row(name="a", whole=span)], start=5, now=5, name="x")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.25, "250 ms"), (4.2, "4.2 s"), (60, "1 min"), (125, "2 min 5 s"), (7260, "2 h 1 min")]
)
def test_lengths_of_time_are_short(seconds: float, said: str) -> None:
    assert svg_gantt.seconds(seconds) == said
