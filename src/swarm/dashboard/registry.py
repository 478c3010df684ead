"""Agents, workflows and schedules: what there is to run, how it fared lately, and what starts by itself."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from swarm.admin import runs
from swarm.api.endpoint import Context
from swarm.api.problem import Refused, of
from swarm.base import jsontext
from swarm.dashboard import collapse, svg_graph, text
from swarm.dashboard.render import form, here, html
from swarm.errors import NotFound, StoreError, SwarmError
from swarm.model import TERMINAL_TICKET_STATES, Ticket
from swarm.store.registry.schedules import ScheduleRow
from swarm.store.registry.tokens import Actor
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.runs.views import RECENT
from swarm.store.tickets.pages import TicketFilter
from swarm.workflow import schedule
from swarm.workflow.definition import Workflow

_TICKETS: Final = 20
_LOOKED_AT: Final = 100  # tickets of one agent or workflow that say how it fares
_NEXT_TIMES: Final = 3
_TIMETABLES: Final = 100
_SHOWN_CHARS: Final = 40_000  # of a definition
_SHOWN_STEPS: Final = 200
_FORM_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fared:
    """Of some of the newest tickets: how many ended well, of how many that ended."""

    done: int
    ended: int

    @property
    def percent(self) -> int:
        return round(100 * self.done / self.ended) if self.ended else 0


def fared(states: Mapping[str, int]) -> Fared:
    """A cancelled ticket says nothing about what ran it."""
    done, failed = states.get("done", 0), states.get("failed", 0)
    return Fared(done=done, ended=done + failed)


async def show_agents(context: Context, request: Request, actor: Actor) -> Response:
    agents = await context.store.agents(broken=False)
    states = await context.store.recent_states(project_id=actor.project_id)
    rows = [(one, fared(states.get(one.id) or states.get(one.name) or {})) for one in agents]
    return html("agents.html", actor=actor, here=here(request), agents=rows, recent=RECENT)


async def show_agent(context: Context, request: Request, actor: Actor) -> Response:
    agent = await context.store.agent(request.path_params["id"])
    others = [one for one in await context.store.agents(broken=False) if one.name == agent.name]
    which = TicketFilter(agent_ids=(agent.id,), project_id=actor.project_id)
    page = await context.store.ticket_page(which, limit=_LOOKED_AT)
    ended = [one.state for one in page.tickets if one.state in TERMINAL_TICKET_STATES]
    return html(
        "agent.html",
        actor=actor,
        here=here(request),
        agent=agent,
        versions=others,
        schemas=[
            (name, *text.pretty(given))
            for name, given in (("inputs", agent.inputs_schema), ("outputs", agent.outputs_schema))
            if given
        ],
        tickets=page.tickets[:_TICKETS],
        fared_=fared({state: ended.count(state) for state in set(ended)}),
        seen=len(page.tickets),
    )


async def show_workflows(context: Context, request: Request, actor: Actor) -> Response:
    workflows = await context.store.workflows()
    states = await context.store.recent_states(project_id=actor.project_id)
    scheduled = {one.workflow_id for one in await _schedules(context, actor)}
    rows = [(one, fared(states.get(one.id) or states.get(one.name) or {}), one.id in scheduled) for one in workflows]
    return html("workflows.html", actor=actor, here=here(request), workflows=rows, recent=RECENT)


async def _schedules(context: Context, actor: Actor) -> list[ScheduleRow]:
    return [] if actor.project_id is not None else await context.store.schedules()  # they tell of no project's tickets


async def show_workflow(
    context: Context, request: Request, actor: Actor, *, given: Mapping[str, str] | None = None, wrong: str = ""
) -> Response:
    """``wrong``: why what the form gave starts nothing."""
    row = await context.store.workflow(request.path_params["id"])
    others = [one for one in await context.store.workflows() if one.name == row.name]
    which = TicketFilter(workflow_ids=(row.id,), project_id=actor.project_id)
    page = await context.store.ticket_page(which, limit=_TICKETS)
    schedules = [one for one in await _schedules(context, actor) if one.workflow_id == row.id]
    keys = tuple(request.query_params.getlist("open")[:20])
    drawn = await context.heavy.run(lambda: asyncio.to_thread(_drawn, row, keys))
    return html(
        "workflow.html",
        actor=actor,
        status=400 if wrong else 200,
        here=here(request),
        row=row,
        versions=others,
        tickets=page.tickets,
        schedules=await asyncio.to_thread(_timetable, schedules),
        given=given or {},
        wrong=wrong,
        opened=keys,
        **drawn,
    )


@lru_cache(maxsize=32)
def _drawn(row: WorkflowRow, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """What the page shows of a definition, which seldom changes."""
    address = f"/workflows/{quote(row.id, safe='')}"
    definition, whole = text.pretty(row.definition, limit=_SHOWN_CHARS)
    found: dict[str, Any] = {"definition": definition, "whole": whole, "graphs": [], "fields": [], "problem": ""}
    try:
        workflow = row.parsed()
    except StoreError as error:
        return found | {"problem": str(error), "workflow": None}
    steps = {one.id: one for one in svg_graph.outlines(workflow)}
    for part in dict.fromkeys(one.part for one in steps.values()):
        needs = {one.id: one.needs for one in steps.values() if one.part == part}
        picture = collapse.opened(needs, keys if part == "steps" else ())

        def link(box: collapse.Box) -> str:
            return f"{address}?" + "&".join(f"open={quote(k)}" for k in (*keys, box.key)) if box.is_group else "#steps"

        drawing = svg_graph.draw(picture, steps, name=f"Graph of {row.name} {part}", status={}, copies={}, link=link)
        found["graphs"].append(("" if part == "steps" else part, drawing, picture.hidden))
    return found | {
        "workflow": workflow,
        "fields": _fields(workflow),
        "steps": list(steps.values())[:_SHOWN_STEPS],
        "more": max(len(steps) - _SHOWN_STEPS, 0),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One field of the form that starts a workflow. ``kind``: 'text', 'number', 'choice' or 'json'."""

    name: str
    kind: str
    required: bool
    description: str
    default: str
    choices: Sequence[str] = ()


def _fields(workflow: Workflow) -> list[Input]:
    properties = (workflow.inputs_schema or {}).get("properties")
    required = (workflow.inputs_schema or {}).get("required") or ()
    found = []
    for name, one in list(properties.items())[:100] if isinstance(properties, Mapping) else ():
        one = one if isinstance(one, Mapping) else {}
        kind = {"string": "text", "integer": "number", "number": "number"}.get(str(one.get("type")), "json")
        choices = one.get("enum") if kind == "text" and isinstance(one.get("enum"), list) else None
        default = one.get("default")
        found.append(
            Input(
                name=name,
                kind="choice" if choices else kind,
                required=name in required and "default" not in one,
                description=str(one.get("description") or ""),
                default="" if default is None else default if isinstance(default, str) else json.dumps(default),
                choices=[str(choice) for choice in choices or ()][:200],
            )
        )
    return found


async def start(context: Context, request: Request, actor: Actor) -> Response:
    """Add a ticket that runs the workflow. If something is wrong with the inputs, the form comes back with it."""
    row = await context.store.workflow(request.path_params["id"])
    sent = await form(request, limit=_FORM_BYTES, fields=120)
    given = {name: str(value) for name, value in sent.items()}
    try:
        ticket = await asyncio.to_thread(_ticket, row, given, actor)
        ticket = await context.store.add_ticket(ticket, by=actor.name)
    except NotFound:
        raise
    except (SwarmError, Refused) as error:
        return await show_workflow(context, request, actor, given=given, wrong=of(error).detail)
    return RedirectResponse(f"/tickets/{quote(ticket.id, safe='')}", status_code=303)


def _ticket(row: WorkflowRow, given: Mapping[str, str], actor: Actor) -> Ticket:
    inputs = _inputs(row.parsed(), given)
    runs.check(row, inputs)
    title = given.get("title", "").strip()
    return runs.ticket(row, inputs, by=actor.name, title=title, project_id=actor.project_id)


def _inputs(workflow: Workflow, given: Mapping[str, str]) -> dict[str, Any]:
    """From the form. Raises Refused with what is wrong."""
    found: dict[str, Any] = {}
    if whole := given.get("json", "").strip():
        read = _json("the inputs as JSON", whole)
        if not isinstance(read, dict):
            raise Refused(400, "the inputs as JSON must be an object")
        found |= read
    for one in _fields(workflow):
        said = given.get(f"in.{one.name}", "")
        if said.strip() or (one.kind == "text" and one.required and not found.get(one.name)):
            found[one.name] = said if one.kind in ("text", "choice") else _json(one.name, said)
    return found


def _json(name: str, said: str) -> Any:
    try:
        return jsontext.loads(said)
    except ValueError as error:
        raise Refused(400, f"{name}: this is not JSON ({error}); write texts in quotes") from None


async def enable(context: Context, request: Request, actor: Actor) -> Response:
    row = await context.store.workflow(request.path_params["id"])
    wanted = (await form(request, limit=4096, fields=2)).get("enabled")
    if wanted not in ("yes", "no"):
        raise Refused(400, "the form must say 'yes' or 'no'")
    await context.store.enable_workflow(row.id, enabled=wanted == "yes", by=actor.name)
    return RedirectResponse(f"/workflows/{quote(row.id, safe='')}", status_code=303)


async def show_schedules(context: Context, request: Request, actor: Actor) -> Response:
    found = await context.store.schedules()
    states = await context.store.ticket_states([one.last_ticket_id for one in found if one.last_ticket_id])
    rows = await asyncio.to_thread(_timetable, found)
    return html("schedules.html", actor=actor, here=here(request), schedules=rows, states=states)


def _timetable(rows: Sequence[ScheduleRow]) -> list[tuple[ScheduleRow, list[str]]]:
    """Each with its next times, as ISO-8601."""
    found = []
    for number, row in enumerate(rows):
        times = [row.next_at] if row.next_at else []
        if times and number < _TIMETABLES:
            try:
                cron, at = schedule.parse(row.cron, row.time_zone), datetime.datetime.fromisoformat(times[0] or "")
                for _ in range(_NEXT_TIMES - 1):
                    at = cron.after(at)
                    times.append(at.isoformat())
            except (ValueError, OverflowError, schedule.ZoneMissing):
                pass
        found.append((row, [one for one in times if one]))
    return found
