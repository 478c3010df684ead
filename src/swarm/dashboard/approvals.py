"""All steps that wait for a person, with what they ask, in one place."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from swarm.api.endpoint import Context
from swarm.base.clock import iso
from swarm.dashboard.render import here, html
from swarm.store.registry.tokens import Actor


async def show(context: Context, request: Request, actor: Actor) -> Response:
    waiting, more = await context.store.waiting_steps(project_id=actor.project_id)
    names = await context.store.names({one.workflow_id for one in waiting})
    rows = [(one, iso(one.answer_at) if one.answer_at else None) for one in waiting]
    return html("approvals.html", actor=actor, here=here(request), waiting=rows, more=more, names=names)
