"""A ticket: how it goes, where its time went, what it printed, what it cost; and what can be done with it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute

from swarm.api.auth import may
from swarm.api.endpoint import Context
from swarm.dashboard import output, waterfall
from swarm.dashboard.render import drawn, form, html, own_ticket, page
from swarm.dashboard.text import duration, pretty
from swarm.dashboard.visible import visible
from swarm.errors import NotFound
from swarm.model import TERMINAL_TICKET_STATES, Event, ExecutionMode, Role, Ticket, TicketState
from swarm.store import kept_vms, ticket_files
from swarm.store.registry.tokens import Actor
from swarm.store.registry.workers import is_alive
from swarm.store.sql.rows import QueueStatus, TicketSummary

_ATTEMPTS: Final = 60
_CALLS: Final = 200
_EVENTS: Final = 200
_FILES: Final = 200
_NEEDED: Final = 20
_JSON: Final = ("inputs", "outputs")
# What a ticket can be told to do, in which states, and by words for people.
ACTIONS: Final[Mapping[str, tuple[frozenset[TicketState], str]]] = {
    "ready": (frozenset({TicketState.DRAFT}), "Make ready"),
    "cancel": (frozenset(TicketState) - TERMINAL_TICKET_STATES, "Cancel"),
    "retry": (TERMINAL_TICKET_STATES, "Retry"),
    "delete": (frozenset(TicketState) - {TicketState.IN_PROGRESS, TicketState.WAITING}, "Delete"),
}


def routes(context: Context) -> list[BaseRoute]:
    of = "/tickets/{id}"
    return [
        page(context, of, _show),
        page(context, f"{of}/output", output.show),
        page(context, f"{of}/text/{{name}}", _download),
        *(page(context, f"{of}/{name}", partial(_confirm, name), role=Role.OPERATOR) for name in ACTIONS),
        *(page(context, f"{of}/{name}", partial(_act, name), role=Role.OPERATOR, method="POST") for name in ACTIONS),
    ]


async def _show(context: Context, request: Request, actor: Actor) -> Response:
    """With ?part=state, all but the output, which grows by itself."""
    ticket = await context.store.ticket((await own_ticket(context, request, actor)).id)
    part = request.query_params.get("part") == "state"
    values = await _state(context, actor, ticket)
    if not part:
        at, before = output.number(request, "at"), output.number(request, "before")
        if before is not None:
            at = max(0, before - 1)
        values["output"] = await output.last(context, ticket, at=at)
        values["at"] = at
    template = "ticket_state.html" if part else "ticket.html"
    return await drawn(template, actor=actor, ticket=ticket, part=part, can=_can(actor, ticket), **values)


def _can(actor: Actor, ticket: Ticket | TicketSummary) -> list[tuple[str, str]]:
    """What this actor may tell this ticket to do."""
    if not may(actor, Role.OPERATOR):
        return []
    of_workflow = ticket.execution_mode == ExecutionMode.WORKFLOW
    return [
        (name, words)
        for name, (states, words) in ACTIONS.items()
        if ticket.state in states and not (name == "retry" and ticket.state == TicketState.DONE and not of_workflow)
    ]


async def _state(context: Context, actor: Actor, ticket: Ticket) -> dict[str, Any]:
    store = context.store
    attempts = await store.last_attempts(ticket.id, limit=_ATTEMPTS)
    calls = await store.model_calls(ticket.id, limit=_CALLS)
    events = await store.history(ticket.id, limit=_EVENTS)
    first = await store.events(ticket.id, limit=1)
    names = await store.names((ticket.agent_id, ticket.assignee_id, ticket.workflow_id))
    texts = {name: await asyncio.to_thread(pretty, getattr(ticket, name)) for name in _JSON}
    return {
        "attempts": attempts,
        "chart": waterfall.chart(attempts, calls, events),
        "calls": calls,
        "events": events,
        "more_events": len(events) == _EVENTS,
        "by": _made_by(ticket, first),
        "runs": _runs(ticket, names),
        "texts": texts,
        "kept": await kept_vms.kept(store, ticket.id) if ticket.started_at is not None else [],
        "files": await _listed(context, ticket),
        "artifacts": (await store.artifacts(ticket_id=ticket.id))[:_FILES],
        "questions": await store.questions(ticket.id) if ticket.state == TicketState.WAITING else [],
        "why": await _why(context, actor, ticket),
        "needs": await _needs(context, actor, ticket) if ticket.state == TicketState.BLOCKED else [],
        "ended": ticket.state in TERMINAL_TICKET_STATES,
        "of_workflow": ticket.execution_mode == ExecutionMode.WORKFLOW,
        "spent": sum(call.cost_usd or 0.0 for call in calls),
    }


def _made_by(ticket: Ticket, first: Sequence[Event]) -> str:
    if first and first[0].kind == "change" and first[0].data.get("did") == "ticket.add":
        return str(first[0].data.get("by", ""))
    return {"schedule": "a schedule", "webhook": "a webhook", "manual": "hand"}.get(ticket.trigger_type or "", "")


def _runs(ticket: Ticket, names: Mapping[str, str]) -> tuple[str, str, str]:
    """What it runs: 'agent' or 'workflow', its id, its name."""
    workflow = ticket.execution_mode == ExecutionMode.WORKFLOW and ticket.workflow_id
    ref = ticket.workflow_id if workflow else ticket.agent_id or ticket.assignee_id
    return "workflow" if workflow else "agent", ref or "", names.get(ref or "", ref or "")


async def _why(context: Context, actor: Actor, ticket: Ticket) -> str:
    """Why it doesn't run, in a sentence. Engines and the queue are of all projects."""
    if ticket.state == TicketState.DRAFT:
        return "It is a draft: it runs once somebody makes it ready."
    if ticket.state not in (TicketState.READY, TicketState.IN_PROGRESS, TicketState.BLOCKED):
        return ""
    if ticket.state == TicketState.READY and actor.project_id is not None:
        return "It is in the queue."
    engines = [one for one in await context.store.workers() if is_alive(one)]
    if not engines and actor.project_id is None:
        return "No engine runs, so it stays as it is. Start one: swarm-engine start"
    if elsewhere := await context.store.elsewhere(ticket.id):
        return f"{'. '.join(map(str, elsewhere)).capitalize()}."
    if ticket.state == TicketState.READY:
        return _in_queue(await context.store.queue(), [str(one.info.get("waits_for") or "") for one in engines])
    waiting = await context.store.next_steps(ticket.id)
    return " ".join(
        step.waits_for_host
        or f"{step.step_id} is "
        + ("ready, and waits for a VM." if step.in_ms is None else f"tried again in {duration(step.in_ms)}.")
        for step in waiting
    )


def _in_queue(queue: QueueStatus, waits_for: Sequence[str]) -> str:
    reasons = sorted({one for one in waits_for if one})
    why = f" The engine waits for {', '.join(reasons)}." if reasons else ""
    return f"It is in the queue: {queue.running} run, {queue.ready} are ready.{why}"


async def _needs(context: Context, actor: Actor, ticket: Ticket) -> list[tuple[str, str]]:
    """The tickets that it waits for, with their states. For who is bound to a project, those of it."""
    ids, project = await context.store.depends_on(ticket.id), actor.project_id
    states = await context.store.ticket_states(ids[:1000], project_id=project)
    seen = ids if project is None else [id for id in ids if id in states]
    return [(id, states.get(id, "missing")) for id in seen if states.get(id) != TicketState.DONE][:_NEEDED]


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Not ``complete``: there were more, or some were not kept."""

    files: list[tuple[str, int]]
    left_out: list[tuple[str, int]]
    complete: bool


async def _listed(context: Context, ticket: Ticket) -> Listed:
    files, complete = list[tuple[str, int]](), True
    try:
        async with aclosing(ticket_files.entries(context.store, ticket.id)) as entries:
            async for entry, _, _ in entries:
                if len(files) == _FILES:
                    complete = False
                    break
                if not entry.is_dir and not entry.is_link:
                    files.append((entry.name, entry.size))
    except NotFound:  # deleted at this moment
        complete = False
    left = await context.store.files(ticket.id)
    left_out = [(f"{one.prefix}{name}", size) for one in left for name, size in one.left_out]
    return Listed(files=files, left_out=left_out[:_FILES], complete=complete and all(one.complete for one in left))


async def _download(context: Context, request: Request, actor: Actor) -> Response:
    ticket = await context.store.ticket((await own_ticket(context, request, actor)).id)
    name = request.path_params["name"]
    text = getattr(ticket, name) if name in (*_JSON, "title", "description", "error") else None
    if text is None:
        raise NotFound(f"the ticket has no {visible(name, limit=40)}")
    ending = "json" if name in _JSON else "txt"
    headers = {"content-disposition": f'attachment; filename="{name}.{ending}"', "cache-control": "no-store"}
    return Response(text.encode(errors="replace"), media_type="application/octet-stream", headers=headers)


# --- changes ----------------------------------------------------------------------------------------------------------


async def _confirm(action: str, context: Context, request: Request, actor: Actor) -> Response:
    ticket = await own_ticket(context, request, actor)
    steps: list[str] = []
    if action == "retry" and ticket.execution_mode == ExecutionMode.WORKFLOW and ticket.run_id is not None:
        steps = await context.store.step_names(ticket.run_id)
    allowed = action in dict(_can(actor, ticket))
    return html(
        "confirm.html",
        actor=actor,
        ticket=ticket,
        action=action,
        words=ACTIONS[action][1],
        steps=steps,
        allowed=allowed,
    )


async def _act(action: str, context: Context, request: Request, actor: Actor) -> Response:
    ticket = await own_ticket(context, request, actor)
    store, given = context.store, await form(request)
    if action == "cancel":
        await store.cancel(ticket.id, actor.name)
    elif action == "ready":
        await store.make_ready(ticket.id, by=actor.name)
    elif action == "retry":
        await store.retry(ticket.id, step=str(given.get("step") or "") or None, by=actor.name)
    else:
        await store.remove_tickets([ticket.id], by=actor.name, project_id=actor.project_id)
        return RedirectResponse("/tickets", status_code=303)
    return RedirectResponse(f"/tickets/{quote(ticket.id, safe='')}", status_code=303)
