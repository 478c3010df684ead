"""All pages, by address."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from swarm.api.endpoint import Context
from swarm.dashboard import approvals, costs, hosts, login, registry, run
from swarm.dashboard.live import live
from swarm.dashboard.render import here, html, page, static
from swarm.model import Role
from swarm.store.registry.tokens import Actor


def routes(context: Context) -> list[BaseRoute]:
    return [
        Route("/static/{digest}/{name}", static, methods=["GET"]),
        *login.routes(context),
        live(context),
        page(context, "/", _now),
        *_runs(context),
        *_registry(context),
    ]


def _runs(context: Context) -> list[BaseRoute]:
    return [
        page(context, "/tickets/{id}/graph", run.show),
        page(context, "/tickets/{id}/graph/step", run.show_step),
        page(context, "/tickets/{id}/graph/retry", run.retry_from, role=Role.OPERATOR, method="POST"),
        page(context, "/tickets/{id}/answer", run.answer, role=Role.OPERATOR, method="POST"),
        page(context, "/approvals", approvals.show),
    ]


def _registry(context: Context) -> list[BaseRoute]:
    return [
        page(context, "/agents", registry.show_agents),
        page(context, "/agents/{id}", registry.show_agent),
        page(context, "/workflows", registry.show_workflows),
        page(context, "/workflows/{id}", registry.show_workflow),
        page(context, "/workflows/{id}/start", registry.start, role=Role.OPERATOR, method="POST"),
        page(context, "/workflows/{id}/enable", registry.enable, role=Role.ADMIN, method="POST"),
        page(context, "/schedules", registry.show_schedules),
        page(context, "/costs", costs.show),
        page(context, "/hosts", hosts.show),
    ]


async def _now(context: Context, request: Request, actor: Actor) -> Response:
    return html("now.html", actor=actor, here=here(request), queue=await context.store.queue())
