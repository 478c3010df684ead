"""A browser's session: begun by a link or a token, ended by a button."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from swarm.api.body import CLOSE
from swarm.api.endpoint import Context
from swarm.api.problem import Refused, of
from swarm.dashboard.render import form, html, own_address
from swarm.errors import SwarmError

_FORM_BYTES: Final = 4096


def routes(context: Context) -> list[BaseRoute]:
    async def show(request: Request) -> Response:
        """With ?code=, the link of `swarm dashboard`, it shows a button; otherwise it asks for a token. A GET uses no
        link up: previews of links do that, too."""
        code = request.query_params.get("code", "")[:200]
        return html("login.html", actor=None, wrong="", next=own_address(request.query_params.get("next")), code=code)

    async def enter(request: Request) -> Response:
        try:
            secure = context.auth.check_origin(request)
            async with context.strangers.place():
                given = await form(request, limit=_FORM_BYTES, fields=4)
        except Refused as error:
            page = html("login.html", actor=None, status=error.status, wrong=error.detail, next="/", code="")
            page.headers.update(CLOSE)  # its body may be on its way yet
            return page
        word = str(given.get("code") or given.get("token", "")).strip()
        return await _enter(context, word, own_address(given.get("next")), secure=secure)

    async def leave(request: Request) -> Response:
        response = RedirectResponse("/login", status_code=303)
        try:
            await context.auth.log_out(request, response)
        except (Refused, SwarmError) as error:
            refused = of(error)
            return html("error.html", actor=None, status=refused.status, detail=refused.detail)
        return response

    return [
        Route("/login", show, methods=["GET"]),
        Route("/login", enter, methods=["POST"]),
        Route("/logout", leave, methods=["POST"]),
    ]


async def _enter(context: Context, given: str, to: str, *, secure: bool) -> Response:
    response = RedirectResponse(to, status_code=303)
    try:
        if await context.auth.log_in(given, response, secure=secure):
            return response
        wrong, status = "this token or link is not valid, or no longer", 401
    except (Refused, SwarmError) as error:
        refused = of(error)
        wrong, status = refused.detail, refused.status
    return html("login.html", actor=None, status=status, wrong=wrong, next=to, code="")
