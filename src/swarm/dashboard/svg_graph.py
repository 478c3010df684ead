"""A workflow as a picture, with the states of a run's steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

from markupsafe import Markup

from swarm.dashboard.collapse import Box, Picture
from swarm.dashboard.svg import MARKS, ORDER, label, n, picture, rect, share_bar, short, state, text
from swarm.workflow import graph
from swarm.workflow.definition import Step, Workflow

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _PLACEHOLDER, _MARGIN = 190.0, 46.0, 46.0, 14.0, 6.0, 8.0
_COLUMNS: Final = 5
_CELLS: Final = 20  # executions of one step that are drawn one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What a picture shows of a step's definition."""

    id: str
    needs: tuple[str, ...]
    what: str
    notes: str
    part: str  # 'steps', 'on_error', 'on_success'
    fans_out: bool
    nested: bool
    approval: bool


def outlines(workflow: Workflow) -> tuple[Outline, ...]:
    return tuple(
        Outline(
            id=step.id,
            needs=step.needs,
            what=graph.what(step),
            notes=" · ".join(graph.notes(step)),
            part=name or "steps",
            fans_out=step.for_each is not None or step.repeat is not None,
            nested=step.workflow is not None,
            approval=step.approval is not None,
        )
        for name, steps in graph.parts(workflow)
        for step in steps
    )


def worst(counts: Mapping[str, int]) -> str:
    """The state that a person must see first; '' if there is none."""
    return next((name for name in ORDER if counts.get(name)), next(iter(counts), ""))


def draw(
    shown: Picture,
    steps: Mapping[str, Outline],
    *,
    name: str,
    status: Mapping[str, str],
    copies: Mapping[str, Sequence[str]],
    link: Callable[[Box], str],
) -> Markup:
    """``status``: of each step that has one; ``copies``: states of the executions of a step with several. ``link``:
    where a box leads, an address of this server."""
    layers, routes = _layout(tuple((box.key, box.needs) for box in shown.boxes))
    boxes = {box.key: box for box in shown.boxes}
    if not routes:  # nothing depends on anything: side by side, in rows
        layers = [list(boxes)[number::_COLUMNS] for number in range(min(_COLUMNS, len(boxes)))]
    at: dict[str, tuple[float, float]] = {}
    tall = {
        number: sum(_HEIGHT if one in boxes else _PLACEHOLDER for one in layer) + _GAP_Y * (len(layer) - 1)
        for number, layer in enumerate(layers)
    }
    height = max(tall.values(), default=0.0)
    for number, layer in enumerate(layers):
        y = _MARGIN + ((height - tall[number]) / 2 if routes else 0)
        for one in layer:
            at[one] = (_MARGIN + number * (_WIDTH + _GAP_X), y)
            y += (_HEIGHT if one in boxes else _PLACEHOLDER) + _GAP_Y
    parts = [_edge(route, at, boxes) for route in routes]
    for key, box in boxes.items():
        parts += _box(box, steps, at[key], status, copies, link(box))
    width = len(layers) * (_WIDTH + _GAP_X) - _GAP_X + 2 * _MARGIN
    return picture(parts, width=max(width, 100), height=height + 2 * _MARGIN, name=name, kind="graph")


@lru_cache(maxsize=32)
def _layout(needs: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[list[list[str]], list[list[str]]]:
    """Layers and routes, by the names of boxes and of placeholders. A graph is drawn many times while its run lasts."""
    keys = {key: f"b{number}" for number, (key, _) in enumerate(needs)}
    names = {short_: key for key, short_ in keys.items()}
    drawn = graph.layout([Step(id=keys[key], needs=tuple(keys[one] for one in some)) for key, some in needs])
    return (
        [[names.get(one, one) for one in layer] for layer in drawn.layers],
        [[names.get(one, one) for one in route] for route in drawn.routes],
    )


def _edge(route: Sequence[str], at: Mapping[str, tuple[float, float]], boxes: Mapping[str, Box]) -> str:
    path = ""
    for one, other in pairwise(route):
        (x, y), (to_x, to_y) = at[one], at[other]
        y += (_HEIGHT if one in boxes else _PLACEHOLDER) / 2
        to_y += (_HEIGHT if other in boxes else _PLACEHOLDER) / 2
        x += _WIDTH
        middle = (x + to_x) / 2
        path += "" if path else f"M{n(x)} {n(y)}"
        path += f"C{n(middle)} {n(y)} {n(middle)} {n(to_y)} {n(to_x)} {n(to_y)}"
        if other not in boxes:
            path += f"H{n(to_x + _WIDTH)}"
    return f'<path class="edge" d="{path}"/>'


def _box(
    box: Box,
    steps: Mapping[str, Outline],
    at: tuple[float, float],
    status: Mapping[str, str],
    copies: Mapping[str, Sequence[str]],
    link: str,
) -> list[str]:
    x, y = at
    counts = Counter(status[one] for one in box.members if one in status)
    first = steps[box.key]
    inside = list(copies.get(box.key, ())) if not box.is_group else []
    said = worst(counts)
    if box.is_group:
        counts["pending"] += len(box.members) - sum(counts.values())
        said = worst(counts) if status else ""
        title = f"{len(box.members)} steps, {box.members[0]} to {box.members[-1]}"
        line = f"{len(box.members)} steps"
    else:
        title = f"{box.key}: {first.what}" + (f" ({first.notes})" if first.notes else "")
        line = short(first.what, 25)
    if said:
        told = said if not box.is_group else ", ".join(f"{counts[one]} {one}" for one in ORDER if counts[one])
        title += f"; {told}"
    mark = f"{MARKS.get(said, '')} " if said else ""
    kind = f"box {state(said)}" if said else "box"
    round_ = _HEIGHT / 2 if first.approval and first.what == "approval" and not box.is_group else 6
    parts = [f'<a href="{text(link, 2000)}" aria-label="{text(title)}">', f"<title>{text(title)}</title>"]
    if box.is_group or first.fans_out or first.nested:  # a second sheet behind the first
        parts.append(rect(x + 4, y + 4, _WIDTH - 4, _HEIGHT - 4, kind, rx=round_))
        parts.append(rect(x, y, _WIDTH - 4, _HEIGHT - 4, kind, rx=round_))
    else:
        parts.append(rect(x, y, _WIDTH, _HEIGHT, kind, rx=round_))
    parts.append(label(x + 10, y + 17, mark + short(box.key, 22), "t strong"))
    bar = box.is_group and bool(status)
    parts.append(label(x + 10, y + 32, line, "t dim small"))
    if bar:
        parts += share_bar(x + 10, y + 35, _WIDTH - 24, 5, counts, title="")
    elif len(inside) > _CELLS:
        parts += share_bar(x + 10, y + 35, _WIDTH - 24, 5, Counter(inside), title="")
    elif inside:
        room = (_WIDTH - 24) / max(len(inside), 8)
        for number, one in enumerate(inside):
            what = f"{box.key}[{number}]: {one}"
            parts.append(rect(x + 10 + number * room, y + 35, room - 1.5, 5, f"fill {state(one)}", title=what))
    parts.append("</a>")
    return parts
