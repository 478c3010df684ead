"""The application: every route of the server, and what all answers have in common."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarm.api import metrics, openapi, sockets
from swarm.api.body import CLOSE
from swarm.api.endpoint import JSON, Context, Endpoint, encode, guarded, route
from swarm.api.problem import problem
from swarm.api.v1 import (
    actions,
    agents,
    engines,
    events,
    files,
    guest_files,
    guests,
    images,
    notices,
    sandboxes,
    secrets,
    tickets,
    tokens,
    workflows,
)
from swarm.model import Role

ENDPOINTS: Final[Sequence[Endpoint]] = (
    *actions.ENDPOINTS,
    *tickets.ENDPOINTS,
    *events.ENDPOINTS,
    *files.ENDPOINTS,
    *workflows.ENDPOINTS,
    *sandboxes.ENDPOINTS,
    *guests.ENDPOINTS,
    *guest_files.ENDPOINTS,
    *agents.ENDPOINTS,
    *secrets.ENDPOINTS,
    *engines.ENDPOINTS,
    *images.ENDPOINTS,
    *tokens.ENDPOINTS,
    *metrics.ENDPOINTS,
    *notices.ENDPOINTS,
)

_HEADERS: Final[Mapping[str, str]] = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
}


_BOTH: Final = frozenset({b"content-length", b"transfer-encoding"})


@cache
def description() -> bytes:
    """The OpenAPI document. It is made when it is first asked for: that takes a quarter of a second."""
    return encode(openapi.document(ENDPOINTS))


_IS_API: Final = re.compile(r"/(v1|hooks)(/|$)")


class ErrorPage(Protocol):
    def __call__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> Response: ...


def application(
    context: Context, *, hooks: Route, pages: Sequence[BaseRoute] = (), error_page: ErrorPage = problem
) -> ASGIApp:
    """``hooks``: POST /hooks/NAME; ``pages``: routes of the dashboard, which check who asks themselves;
    ``error_page``: what a browser gets for an address that is none."""

    async def described(request: Request) -> Response:
        async def answer() -> Response:
            with context.auth.turn(await context.auth.actor(request, Role.VIEWER)):
                return Response(await asyncio.to_thread(description), media_type=JSON)

        return await guarded(answer)

    async def alive(request: Request) -> Response:
        if await context.feed.well():
            return JSONResponse({"status": "ok"})
        return problem(503, "the database can't be used: the server's log says why")

    async def not_routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: "there is nothing at this address", 405: "this address takes no such method"}
        in_browser = "text/html" in request.headers.get("accept", "") and not _IS_API.match(request.url.path)
        answer = error_page if in_browser else problem
        return answer(error.status_code, said.get(error.status_code, error.detail), headers=error.headers)

    routes: list[BaseRoute] = [
        Route("/healthz", alive),
        Route("/v1/openapi.json", described),
        *(route(endpoint, context) for endpoint in ENDPOINTS),
        *(sockets.route(one, context) for one in sockets.SOCKETS),
        hooks,
        *pages,
    ]
    return _with_headers(Starlette(routes=routes, exception_handlers={HTTPException: not_routed}))


def _with_headers(app: ASGIApp) -> ASGIApp:
    added = [(name.encode(), text.encode()) for name, text in _HEADERS.items()]

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        if {name for name, _ in scope.get("headers", ())} >= _BOTH:  # RFC 9112, 6.1
            why = "content-length beside transfer-encoding: a proxy may have read the one, and this server the other"
            await problem(400, why, headers=CLOSE)(scope, receive, answer)
            return
        await app(scope, receive, answer)

    return serve
