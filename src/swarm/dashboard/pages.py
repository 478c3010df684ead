"""All pages, by address."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from swarm.api.endpoint import Context
from swarm.dashboard import approvals, costs, hosts, login, registry, run, sandboxes, ticket, tickets
from swarm.dashboard.live import live
from swarm.dashboard.now import Now
from swarm.dashboard.render import page, static
from swarm.dashboard.spent import Hours
from swarm.model import Role


def routes(context: Context) -> list[BaseRoute]:
    hours = Hours()
    return [
        Route("/static/{digest}/{name}", static, methods=["GET"]),
        *login.routes(context),
        live(context),
        page(context, "/", Now(hours).page()),
        *tickets.routes(context),
        *ticket.routes(context),
        *sandboxes.routes(context),
        *_runs(context),
        *_registry(context, hours),
    ]


def _runs(context: Context) -> list[BaseRoute]:
    return [
        page(context, "/tickets/{id}/graph", run.show),
        page(context, "/tickets/{id}/graph/step", run.show_step),
        page(context, "/tickets/{id}/graph/retry", run.retry_from, role=Role.OPERATOR, method="POST"),
        page(context, "/tickets/{id}/answer", run.answer, role=Role.OPERATOR, method="POST"),
        page(context, "/approvals", approvals.show),
    ]


def _registry(context: Context, hours: Hours) -> list[BaseRoute]:
    return [
        page(context, "/agents", registry.show_agents),
        page(context, "/agents/{id}", registry.show_agent),
        page(context, "/workflows", registry.show_workflows),
        page(context, "/workflows/{id}", registry.show_workflow),
        page(context, "/workflows/{id}/start", registry.start, role=Role.OPERATOR, method="POST"),
        page(context, "/workflows/{id}/enable", registry.enable, role=Role.ADMIN, method="POST", shared=True),
        page(context, "/schedules", registry.show_schedules, shared=True),
        page(context, "/costs", costs.page(hours), shared=True),
        page(context, "/hosts", hosts.show, shared=True),
    ]
