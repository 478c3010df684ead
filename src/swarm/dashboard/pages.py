"""All pages, by address."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from swarm.api.endpoint import Context
from swarm.dashboard import login
from swarm.dashboard.live import live
from swarm.dashboard.render import here, html, page, static
from swarm.store.registry.tokens import Actor


def routes(context: Context) -> list[BaseRoute]:
    return [
        Route("/static/{digest}/{name}", static, methods=["GET"]),
        *login.routes(context),
        live(context),
        page(context, "/", _now),
    ]


async def _now(context: Context, request: Request, actor: Actor) -> Response:
    return html("now.html", actor=actor, here=here(request), queue=await context.store.queue())
