"""Draws a workflow: as text for a terminal, as Mermaid, as data, and as SVG with a small layered layout.

Everything from a file is escaped. ``status`` (step id -> status) shows the states of a run's steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from swarm.workflow.definition import Step, Workflow

_MARKS: Final = {
    "completed": "✔", "failed": "✘", "running": "▶", "ready": "▷", "waiting": "?", "skipped": "–", "cancelled": "■",
    "pending": "·",
}  # fmt: skip
_COLOURS: Final = {
    "completed": "#2e7d32", "failed": "#c62828", "running": "#1565c0", "ready": "#1565c0", "waiting": "#ef6c00",
    "skipped": "#757575", "cancelled": "#757575",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """``layers``: ids, each layer from left to right. ``routes``: for each need, the ids from it to the step.

    Where a need skips layers, its route has a placeholder in each of them: an id that isn't a step's.
    """

    steps: Mapping[str, Step]
    layers: tuple[tuple[str, ...], ...]
    routes: tuple[tuple[str, ...], ...]


def layout(steps: Sequence[Step]) -> Layout:
    """Each step in the layer after the last of its needs; within a layer, near the steps it is connected with."""
    by_id = {step.id: step for step in steps}
    rank = _ranks(by_id)
    layers: list[list[str]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for one, r in rank.items():
        layers[r].append(one)
    routes = []
    for step in steps:
        for need in step.needs:
            between = [f"{need}>{step.id}>{r}" for r in range(rank[need] + 1, rank[step.id])]
            for r, placeholder in enumerate(between, rank[need] + 1):
                layers[r].append(placeholder)
            routes.append((need, *between, step.id))
    beside: dict[str, list[str]] = {one: [] for layer in layers for one in layer}
    for route in routes:
        for one, other in pairwise(route):
            beside[one].append(other)
            beside[other].append(one)
    for _ in range(4):  # barycentres, down and up
        for order in (range(1, len(layers)), range(len(layers) - 2, -1, -1)):
            for r in order:
                near = layers[r - 1] if order.step > 0 else layers[r + 1]
                at = {one: i / max(len(near) - 1, 1) for i, one in enumerate(near)}
                own = {one: i / max(len(layers[r]) - 1, 1) for i, one in enumerate(layers[r])}
                middle = {one: [at[n] for n in beside[one] if n in at] or [own[one]] for one in layers[r]}
                layers[r].sort(key=lambda one, middle=middle: sum(middle[one]) / len(middle[one]))  # type: ignore[misc]
    return Layout(by_id, tuple(map(tuple, layers)), tuple(routes))


def _ranks(by_id: Mapping[str, Step]) -> dict[str, int]:
    rank: dict[str, int] = {}
    waiting = {one: len(step.needs) for one, step in by_id.items()}
    followers: dict[str, list[str]] = {one: [] for one in by_id}
    for step in by_id.values():
        for need in step.needs:
            followers[need].append(step.id)
    queue = [one for one, count in waiting.items() if count == 0]
    for one in queue:  # grows while it is walked
        rank[one] = 1 + max((rank[need] for need in by_id[one].needs), default=-1)
        for after in followers[one]:
            waiting[after] -= 1
            if waiting[after] == 0:
                queue.append(after)
    return rank


def parts(workflow: Workflow) -> list[tuple[str, tuple[Step, ...]]]:
    named = [("", workflow.steps), ("on_success", workflow.on_success), ("on_error", workflow.on_error)]
    return [(name, steps) for name, steps in named if steps]


def what(step: Step) -> str:
    """What a step runs, in a few words."""
    if step.agent is not None:
        return _short(step.agent)
    if isinstance(step.workflow, Workflow):
        return f"workflow {step.workflow.name}"
    return f"workflow {_short(step.workflow)}" if step.workflow else "approval"


def notes(step: Step) -> list[str]:
    found = [f"from {step.from_step}"] if step.from_step is not None else []
    if step.when is not True:
        found.append(f"when {_short(str(step.when))}")
    if step.for_each is not None:
        items = step.for_each.items
        each = _short(items) if isinstance(items, str) else f"of {len(items)}"
        limit = f", {step.for_each.max_parallel} at once" if step.for_each.max_parallel else ""
        found.append(f"for each {each}{limit}")
        if step.for_each.best is not None:
            found.append(f"best {_short(step.for_each.best)}")
    if step.repeat is not None:
        found.append(f"until {_short(step.repeat.until)}, at most {step.repeat.max_times} times")
    if step.approval is not None and (step.agent or step.workflow):
        found.append("after approval")
    if step.join != "all":
        found.append(f"join {step.join}")
    if step.continue_on_error:
        found.append("may fail")
    return found


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A step. ``part``: 'steps', 'on_success' or 'on_error'; ``layer``: steps of one part with equal numbers may run at
    the same time, 1 first; ``kind``: 'agent', 'workflow' or 'approval'; ``what`` it runs and ``notes``, in a few words;
    ``many``: it may have several executions."""

    id: str
    part: str
    layer: int
    kind: str
    what: str
    notes: list[str]
    many: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """``target`` needs ``source``."""

    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    name: str
    version: str
    nodes: list[Node]
    edges: list[Edge]


def data(workflow: Workflow) -> Graph:
    nodes, edges = [], []
    for name, steps in parts(workflow):
        ranks = _ranks({step.id: step for step in steps})
        for step in steps:
            nodes.append(
                Node(
                    id=step.id,
                    part=name or "steps",
                    layer=ranks[step.id] + 1,
                    kind="agent" if step.agent is not None else "workflow" if step.workflow else "approval",
                    what=what(step),
                    notes=notes(step),
                    many=step.for_each is not None or step.repeat is not None,
                )
            )
            edges += [Edge(source=need, target=step.id) for need in step.needs]
    return Graph(name=workflow.name, version=workflow.version, nodes=nodes, edges=edges)


# --- text -----------------------------------------------------------------------------------------------------------


def text(workflow: Workflow, status: Mapping[str, str] | None = None) -> str:
    """One line per step, in the order in which they can run; steps with the same number (the layer) run together."""
    rows: list[tuple[str, str, str, str]] = []
    for name, steps in parts(workflow):
        if name:
            rows.append(("", f"{name}:", "", ""))
        drawn = layout(steps)
        for i, layer in enumerate(drawn.layers, 1):
            for step in (drawn.steps[one] for one in layer if one in drawn.steps):
                mark = f"{_MARKS.get(status.get(step.id, 'pending'), '·')} " if status is not None else ""
                after = [f"after {', '.join(step.needs)}"] if step.needs else []
                rows.append((str(i), mark + step.id, what(step), " · ".join([*after, *notes(step)])))
    widths = [max(len(row[i]) for row in rows if row[2]) for i in range(3)]
    lines = [f"{workflow.name} {workflow.version}"]
    for row in rows:
        lines.append("  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())
    return "\n".join(lines) + "\n"


# --- Mermaid --------------------------------------------------------------------------------------------------------


def mermaid(workflow: Workflow, status: Mapping[str, str] | None = None) -> str:
    lines = ["flowchart TD"]
    number = 0
    for name, steps in parts(workflow):
        ids = {}
        if name:
            lines.append(f"  subgraph {name}")
        for step in steps:
            ids[step.id], number = f"s{number}", number + 1
            label = "<br/>".join(_mermaid(line) for line in (step.id, what(step), *notes(step)))
            left, right = (
                ("{{", "}}") if step.approval else ("[[", "]]") if step.for_each or step.repeat else ("[", "]")
            )
            lines.append(f'  {ids[step.id]}{left}"{label}"{right}')
            colour = _COLOURS.get((status or {}).get(step.id, ""))
            if colour:
                lines.append(f"  style {ids[step.id]} stroke:{colour},stroke-width:3px")
        lines += [f"  {ids[need]} --> {ids[step.id]}" for step in steps for need in step.needs]
        if name:
            lines.append("  end")
    return "\n".join(lines) + "\n"


def _mermaid(line: str) -> str:
    return "".join(c if c.isalnum() or c in " .,@-_:/" else f"#{ord(c)};" for c in line)


# --- SVG ------------------------------------------------------------------------------------------------------------

_CHAR, _LINE, _PAD = 7.2, 16, 10  # px, of a 12 px monospace font
_GAP_X, _GAP_Y = 28, 44


def svg(workflow: Workflow, status: Mapping[str, str] | None = None) -> str:
    body: list[str] = []
    y, widest = 34.0, 240.0
    for name, steps in parts(workflow):
        if name:
            body.append(f'<text x="16" y="{y:g}" class="part">{escape(name)}</text>')
            y += 14
        drawn, width, y = _draw(layout(steps), y, status or {})
        body += drawn
        widest = max(widest, width)
        y += 20
    title = f"{workflow.name} {workflow.version}"
    widest = max(widest, len(title) * 9 + 32)
    style = (
        "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#222}.id{font-weight:bold}.note{fill:#666}"
        ".part{font-weight:bold;fill:#666}.title{font-size:15px;font-weight:bold}"
        ".box{fill:#fff;stroke:#555;stroke-width:1.5}.edge{fill:none;stroke:#888;stroke-width:1.5}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {widest:g} {y:g}" width="{widest:g}" height="{y:g}"'
            f" role=\"img\" aria-label={quoteattr('workflow ' + title)}>",
            f"<style>{style}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7"'
            ' orient="auto"><path d="M0 0L8 4L0 8z" fill="#888"/></marker></defs>',
            f'<rect width="{widest:g}" height="{y:g}" fill="#fafafa"/>',
            f'<text x="16" y="22" class="title">{escape(title)}</text>',
            *body,
            "</svg>",
        ]
    ) + "\n"  # fmt: skip


def _draw(plan: Layout, top: float, status: Mapping[str, str]) -> tuple[list[str], float, float]:
    lines = {one: [one, what(step), *notes(step)] for one, step in plan.steps.items()}
    size = {one: (8.0, 0.0) for layer in plan.layers for one in layer}
    for one, said in lines.items():
        size[one] = (max(map(len, said)) * _CHAR + 2 * _PAD, len(said) * _LINE + 2 * _PAD - 4)
    widths = [sum(size[one][0] for one in layer) + _GAP_X * (len(layer) - 1) for layer in plan.layers]
    whole = max(widths, default=0.0)
    place: dict[str, tuple[float, float]] = {}
    y = top
    for layer, width in zip(plan.layers, widths, strict=True):
        x = 16 + (whole - width) / 2
        height = max(size[one][1] for one in layer)
        for one in layer:
            place[one] = (x, y)
            if one not in plan.steps:
                size[one] = (8.0, height)
            x += size[one][0] + _GAP_X
        y += height + _GAP_Y
    drawn = []
    for route in plan.routes:
        path, at = "", (0.0, 0.0)
        for one in route:
            (x, above), (width, height) = place[one], size[one]
            x += width / 2
            if path:
                bend = (above - at[1]) / 2
                path += f"C{at[0]:g} {at[1] + bend:g} {x:g} {above - bend:g} {x:g} {above:g}"
            at = (x, above + height)
            path += "" if one == route[-1] else f"M{x:g} {at[1]:g}" if not path else f"L{x:g} {at[1]:g}"
        drawn.append(f'<path class="edge" marker-end="url(#tip)" d="{path}"/>')
    for one, step in plan.steps.items():
        drawn += _box(step, place[one], size[one], lines[one], status.get(one, ""))
    return drawn, whole + 32, y - _GAP_Y + 10


def _box(
    step: Step, at: tuple[float, float], size: tuple[float, float], lines: Sequence[str], status: str
) -> list[str]:
    (x, y), (width, height) = at, size
    colour = f' style="stroke:{_COLOURS[status]};stroke-width:3"' if status in _COLOURS else ""
    drawn = []
    if step.for_each or step.repeat:  # a second sheet behind the first
        drawn.append(f'<rect class="box" x="{x + 4:g}" y="{y + 4:g}" width="{width:g}" height="{height:g}" rx="6"/>')
    round_ = height / 2 if step.approval and not step.agent and not step.workflow else 6
    drawn.append(
        f'<rect class="box"{colour} x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_:g}"/>'
    )
    for i, line in enumerate(lines):
        kind = "id" if i == 0 else "note" if i > 1 else "what"
        drawn.append(
            f'<text class="{kind}" x="{x + _PAD:g}" y="{y + _PAD + 8 + i * _LINE:g}">{escape(_printable(line))}</text>'
        )
    return drawn


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in line)


def _short(source: str) -> str:
    line = _printable(" ".join(source.split()))
    return line if len(line) <= 40 else line[:39] + "…"
