"""A run as a graph, on a time line and as a table: what ran, what waits, what failed and why."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from swarm.api.endpoint import Context
from swarm.api.problem import Refused
from swarm.dashboard import collapse, svg_gantt, svg_graph, text
from swarm.dashboard.collapse import Box, Picture
from swarm.dashboard.render import form, here, html, own_address, own_ticket
from swarm.dashboard.svg import ORDER
from swarm.dashboard.svg_gantt import Row, Span
from swarm.dashboard.svg_graph import Outline
from swarm.ledger import Limit
from swarm.model import TERMINAL_TICKET_STATES
from swarm.store.registry.tokens import Actor
from swarm.store.runs.views import RunStates, StepDetails, StepState, TryView
from swarm.store.sql.rows import milliseconds
from swarm.store.tickets.validation import shown
from swarm.workflow import definition

_ROWS: Final = 50  # of the table, at a time
_WITHIN: Final = 20  # spans within one row of the time line
_OPEN_LEVELS: Final = 20
_SHOWN_BYTES: Final = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What a page of a run shows, as in its address."""

    ticket: str
    run: str | None
    path: str
    open: tuple[str, ...] = ()
    step: str = ""  # only executions of this step
    state: str = ""  # only steps in this state

    def to(self, **changed: Any) -> str:
        """The address with something changed; from another graph or step, the rest starts anew."""
        given = {"run": self.run, "path": self.path, "open": self.open, "step": self.step, "state": self.state}
        if "path" in changed:
            given |= {"open": (), "step": "", "state": ""}
        query = [
            (name, one)
            for name, value in (given | changed).items()
            if value
            for one in (value if isinstance(value, tuple) else (value,))
        ]
        return f"/tickets/{quote(self.ticket, safe='')}/graph" + (f"?{urlencode(query)}" if query else "")

    def of_step(self, step_id: str) -> str:
        query = [(name, one) for name, one in (("run", self.run), ("path", self.path), ("step", step_id)) if one]
        return f"/tickets/{quote(self.ticket, safe='')}/graph/step?{urlencode(query)}"


@dataclass(slots=True, kw_only=True)
class States:
    """Of a run's steps, by the id in its definition."""

    own: dict[str, str]
    copies: dict[str, list[str]]
    rows: dict[str, list[StepState]]  # its own row first


@lru_cache(maxsize=16)
def outline(digest: str, frozen: str) -> tuple[Mapping[str, Outline], str]:
    """Of a frozen workflow, which never changes: its steps, and its name. Raises ValueError for what is none."""
    try:
        workflow = definition.from_json(json.loads(frozen))
        return {one.id: one for one in svg_graph.outlines(workflow)}, f"{workflow.name}@{workflow.version}"
    except (TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(str(error)) from None


@lru_cache(maxsize=64)
def picture(digest: str, part: str, frozen: str, keys: tuple[str, ...]) -> Picture:
    steps, _ = outline(digest, frozen)
    return collapse.opened({one.id: one.needs for one in steps.values() if one.part == part}, keys)


def states_of(run: RunStates) -> States:
    prefix = len(run.run.path)
    found = States(own={}, copies={}, rows={})
    for step in run.steps:
        name, copy, _ = step.step_id[prefix:].partition("[")
        if not copy:
            found.own[name] = step.status
            found.rows.setdefault(name, []).insert(0, step)
        else:
            found.rows.setdefault(name, []).append(step)
    for name, rows in found.rows.items():
        several = [one for one in rows if one.step_id.endswith("]")]
        if several:
            several.sort(key=_number)
            found.copies[name] = [one.status for one in several]
            found.rows[name] = [one for one in rows if not one.step_id.endswith("]")] + several
    return found


def _number(step: StepState) -> int:
    number = step.step_id.rpartition("[")[2].removesuffix("]")
    return int(number) if number.isascii() and number.isdigit() and len(number) < 12 else 0


async def show(context: Context, request: Request, actor: Actor) -> Response:
    ticket = await own_ticket(context, request, actor)
    query = request.query_params
    where = Where(
        ticket=ticket.id,
        run=query.get("run"),
        path=query.get("path", "")[:500],
        open=tuple(query.getlist("open")[:_OPEN_LEVELS]),
        step=query.get("step", "")[:500],
        state=query.get("state", "")[:40],
    )
    run = await context.store.run_states(ticket.id, run_id=where.run, path=where.path)
    digest = run.run.definition
    frozen = await context.store.frozen_workflow(digest) if digest is not None else ""
    states = states_of(run)
    listed = _listed(run, states, where)
    page = max(int(number) - 1, 0) if (number := query.get("page", "1")).isdecimal() and len(number) < 8 else 0
    ids = [one.id for one in listed[page * _ROWS : (page + 1) * _ROWS]]
    wanted, tries = await context.store.step_details(ids)
    drawn = await asyncio.to_thread(_pictures, where, run, states, digest, frozen)
    single = [one for one in drawn.rows if one is not None]
    _, attempts = await context.store.step_details(single) if single else ([], [])
    gantt = await asyncio.to_thread(_gantt, run, states, drawn, attempts)
    ended = ticket.state in TERMINAL_TICKET_STATES
    by_state = Counter([step.status for step in run.steps])
    return html(
        "run.html",
        actor=actor,
        ticket=ticket,
        where=where,
        here=here(request),
        run=run.run,
        runs=run.runs,
        more=run.more,
        name=drawn.name,
        crumbs=_crumbs(where),
        graphs=drawn.graphs,
        problem=drawn.problem,
        gantt=gantt,
        counts={one: by_state[one] for one in ORDER if by_state[one]},
        steps=wanted,
        tries=_by_step(tries),
        outlines=drawn.steps,
        took=lambda step: _took(step, run.now),
        again=ended and not run.run.path and run.run.id == ticket.run_id and digest is not None,
        answerable=not ended,
        before=here(request, page=str(page)) if page else None,
        after=here(request, page=str(page + 2)) if len(listed) > (page + 1) * _ROWS else None,
        listed=len(listed),
    )


def _listed(run: RunStates, states: States, where: Where) -> list[StepState]:
    """What the table shows: what needs attention first."""
    steps: Sequence[StepState] = states.rows.get(where.step, []) if where.step else run.steps
    if where.state:
        return [one for one in steps if one.status == where.state]
    if where.step:
        return list(steps)
    place = {name: number for number, name in enumerate(ORDER)}
    return sorted(steps, key=lambda one: place.get(one.status, -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    name: str
    steps: Mapping[str, Outline]
    graphs: Sequence[tuple[str, Any, int]]  # a heading, the picture, needs that are not drawn
    boxes: Sequence[Box]
    rows: Sequence[str | None]  # for each box, the id of the step's row if it is one with attempts
    problem: str = ""


def _pictures(where: Where, run: RunStates, states: States, digest: str | None, frozen: str) -> _Drawn:
    steps: Mapping[str, Outline] = {}
    name = problem = ""
    if digest is not None:
        try:
            steps, name = outline(digest, frozen)
        except ValueError as error:
            problem = f"this version of Swarm can't read the run's workflow: {error}"
    if not steps:
        names = list(states.rows)[: collapse.MOST_BOXES]
        steps = {
            one: Outline(
                id=one, needs=(), what="", notes="", part="steps", fans_out=False, nested=False, approval=False
            )
            for one in names
        }

    def link(box: Box) -> str:
        if box.is_group:
            return where.to(open=(*where.open, box.key), step="", state="")
        one = steps[box.key]
        if box.key in states.copies:
            return where.to(step=box.key, state="") + "#steps"
        if one.nested and states.own.get(box.key) not in (None, "pending", "waiting", "skipped"):
            return where.to(path=f"{where.path}{box.key}/")
        return where.of_step(f"{where.path}{box.key}") if box.key in states.own else where.to(step=box.key) + "#steps"

    graphs, boxes = [], list[Box]()
    for part in dict.fromkeys(one.part for one in steps.values()):
        if digest is not None and not problem:
            shown_ = picture(digest, part, frozen, where.open if part == "steps" else ())
        else:
            shown_ = collapse.opened(dict.fromkeys(steps, ()), ())
        boxes += shown_.boxes
        heading = "" if part == "steps" else part
        drawing = svg_graph.draw(
            shown_,
            steps,
            name=f"Graph of {name or 'the run'} {heading}".strip(),
            status=states.own,
            copies=states.copies,
            link=link,
        )
        graphs.append((heading, drawing, shown_.hidden))
    rows = [
        found[0].id if not box.is_group and len(found := states.rows.get(box.key, [])) == 1 else None for box in boxes
    ]
    return _Drawn(name=name, steps=steps, graphs=graphs, boxes=boxes, rows=rows, problem=problem)


def _gantt(run: RunStates, states: States, drawn: _Drawn, attempts: Sequence[TryView]) -> Any:
    now = milliseconds(run.now) or 0
    start = milliseconds(run.run.started_at) or now
    tries = _by_step(attempts)
    rows = []
    for box, id in zip(drawn.boxes, drawn.rows, strict=True):
        spans = [span for one in box.members for step in states.rows.get(one, []) if (span := _span(step))]
        if not spans:
            continue
        open_ = any(span.end is None for span in spans)
        ends = [span.end for span in spans if span.end is not None]
        worst = svg_graph.worst(Counter(span.state for span in spans))
        said = f"{box.key}: {worst}" if not box.is_group else f"{len(box.members)} steps from {box.key}: {worst}"
        first = min(span.start for span in spans)
        last = None if open_ else max(ends)
        within = [span for one in tries.get(id or "", [])[:_WITHIN] if (span := _of_try(one)) is not None]
        if len(spans) > 1:
            within = spans[:_WITHIN]
        took = svg_gantt.seconds(((last or now) - first) / 1000)
        whole = Span(start=first, end=last, state=worst, title=f"{said}, {took}")
        rows.append(Row(name=box.key, whole=whole, spans=within))
    rows.sort(key=lambda row: row.whole.start)
    ended = milliseconds(run.run.completed_at)
    if not rows:
        return None
    return svg_gantt.draw(rows, start=min(start, rows[0].whole.start), now=ended or now, name="Time line of the steps")


def _span(step: StepState) -> Span | None:
    start, end = milliseconds(step.started_at), milliseconds(step.completed_at)
    if start is None:
        return None
    end = end if end is not None or step.status in ("running", "waiting", "ready") else start
    return Span(start=start, end=end, state=step.status, title=f"{step.step_id}: {step.status}")


def _of_try(one: TryView) -> Span | None:
    start, end = milliseconds(one.started_at), milliseconds(one.ended_at)
    if start is None:
        return None
    state = {"succeeded": "completed", "failed": "failed", "lost": "failed", None: "running"}.get(one.outcome)
    return Span(
        start=start, end=end, state=state or "cancelled", title=f"attempt {one.number}: {one.outcome or 'running'}"
    )


def _took(step: StepDetails, now: str) -> float | None:
    """How long a step has run, in ms."""
    start, end = milliseconds(step.started_at), milliseconds(step.completed_at)
    if start is None or (end is None and step.status not in ("running", "waiting")):
        return None
    return float((end if end is not None else milliseconds(now) or start) - start)


def _by_step(tries: Sequence[TryView]) -> dict[str, list[TryView]]:
    found: dict[str, list[TryView]] = {}
    for one in tries:
        found.setdefault(one.step_execution_id, []).append(one)
    return found


def _crumbs(where: Where) -> list[tuple[str, str]]:
    """From the whole run to what is shown: names and addresses."""
    found = [("Run", where.to(path=""))] if where.path or where.open else []
    parts = where.path.rstrip("/").split("/") if where.path else []
    found += [(name, where.to(path="/".join(parts[: i + 1]) + "/")) for i, name in enumerate(parts)]
    found += [(f"from {key}", where.to(open=where.open[: i + 1])) for i, key in enumerate(where.open)]
    return found


async def show_step(context: Context, request: Request, actor: Actor) -> Response:
    """One step: its inputs, its outputs, its attempts."""
    ticket = await own_ticket(context, request, actor)
    query = request.query_params
    where = Where(ticket=ticket.id, run=query.get("run"), path=query.get("path", "")[:500])
    run = await context.store.run_states(ticket.id, run_id=where.run, path=where.path, steps=False)
    id, inputs, outputs = await context.store.step_texts(
        ticket.id, run_id=run.run.id, step_id=query.get("step", "")[:1000]
    )
    [step], tries = await context.store.step_details([id])
    given, left = await asyncio.gather(
        asyncio.to_thread(text.pretty, inputs, limit=_SHOWN_BYTES),
        asyncio.to_thread(text.pretty, outputs, limit=_SHOWN_BYTES),
    )
    return html(
        "step.html",
        actor=actor,
        ticket=ticket,
        where=where,
        here=here(request),
        step=step,
        tries=tries,
        inputs=given,
        outputs=left,
        answerable=ticket.state not in TERMINAL_TICKET_STATES,
    )


async def retry_from(context: Context, request: Request, actor: Actor) -> Response:
    ticket = await own_ticket(context, request, actor)
    step = str((await form(request, limit=8192, fields=4)).get("step", ""))
    if not step:
        raise Refused(400, "the form names no step")
    await context.store.retry(ticket.id, step=step, by=actor.name)
    return RedirectResponse(f"/tickets/{quote(ticket.id, safe='')}/graph", status_code=303)


async def answer(context: Context, request: Request, actor: Actor) -> Response:
    """Approve or reject a step, and go back to where the form was."""
    ticket = await own_ticket(context, request, actor)
    given = await form(request, limit=64 << 10, fields=8)
    verdict, step = given.get("verdict"), str(given.get("step", ""))
    if verdict not in ("approve", "reject"):
        raise Refused(400, "the form must say 'approve' or 'reject'")
    await context.store.answer(
        ticket.id,
        approved=verdict == "approve",
        by=actor.name,
        why=str(given.get("why", "")).strip()[:4000],
        step=step or None,
        budget=Limit(usd=_budget(given.get("budget_usd"))),
    )
    return RedirectResponse(own_address(given.get("back"), default="/approvals"), status_code=303)


def _budget(given: object) -> float | None:
    said = str(given or "").strip()
    if not said:
        return None
    try:
        return float(said)
    except ValueError:
        raise Refused(400, f"the new budget must be a number, not {shown(said)}") from None
