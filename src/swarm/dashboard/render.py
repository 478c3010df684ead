"""Templates, and how a page answers: to whom, with what, and with errors that a person can read."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from functools import cache
from importlib import resources
from typing import Any, Final
from urllib.parse import quote, urlencode

import jinja2
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from swarm.api.auth import may
from swarm.api.endpoint import BODY_SECONDS, Context, NamedRoute, check_shared, until_sent
from swarm.api.problem import Refused, of
from swarm.base.log import logger
from swarm.dashboard import text
from swarm.dashboard.history import told
from swarm.dashboard.visible import slug, visible
from swarm.errors import SwarmError
from swarm.model import Role
from swarm.store.registry.tokens import Actor
from swarm.store.sql.rows import TicketSummary

log = logger(__name__)

# The pages of the top line: name, address, and the key that follows `g`.
SECTIONS: Final = (
    ("Now", "/", "n"), ("Tickets", "/tickets", "t"), ("Sandboxes", "/sandboxes", "b"), ("Approvals", "/approvals", "a"),
    ("Workflows", "/workflows", "w"), ("Agents", "/agents", "e"), ("Schedules", "/schedules", "s"),
    ("Costs", "/costs", "c"), ("Hosts", "/hosts", "h"),
)  # fmt: skip
_SHARED: Final = ("/schedules", "/costs", "/hosts")  # not for one project alone
_FORM_BYTES: Final = 256 << 10
_TYPES: Final[Mapping[str, str]] = {
    "css": "text/css", "js": "text/javascript", "mjs": "text/javascript", "svg": "image/svg+xml",
}  # fmt: skip
_YEAR: Final = "public, max-age=31536000, immutable"

# Tickets that wait for a person, as the top of every page says to who asks for one.
_waiting: Final[ContextVar[int]] = ContextVar("waiting", default=0)

Page = Callable[[Context, Request, Actor], Awaitable[Response]]


@cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("swarm.dashboard", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["visible"] = visible
    made.filters["slug"] = slug
    made.filters["urlencode"] = lambda name: quote(
        str(name), safe="", errors="replace"
    )  # a part of an address: Jinja's keeps slashes
    for name in ("age", "duration", "money", "quoted", "size", "stamp", "words"):
        made.filters[name] = getattr(text, name)
    made.filters["told"] = told
    made.globals["sections"] = SECTIONS
    made.globals["shared_sections"] = _SHARED
    made.globals["static"] = address
    made.globals["Role"] = Role
    made.globals["may"] = may
    return made


def html(template: str, *, actor: Actor | None, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from a template, for whoever is logged in (None: nobody)."""
    made = environment().get_template(template).render(actor=actor, waiting_tickets=_waiting.get(), **values)
    return HTMLResponse(made.encode(errors="replace"), status_code=status, headers={"cache-control": "no-store"})


def error_page(status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> HTMLResponse:
    """For whoever asks, logged in or not."""
    page = html("error.html", actor=None, status=status, detail=detail)
    page.headers.update(headers or {})
    return page


async def drawn(template: str, *, actor: Actor, **values: Any) -> HTMLResponse:
    """`html`, for a page that may be large: others are answered meanwhile."""
    return await asyncio.to_thread(html, template, actor=actor, **values)


def page(
    context: Context, path: str, work: Page, *, role: Role = Role.VIEWER, method: str = "GET", shared: bool = False
) -> Route:
    """A route that ``role`` may use; ``shared``: but not for one project alone, as `Endpoint.shared`. Who is not logged
    in is asked to be, and then comes back."""

    async def serve(request: Request) -> Response:
        actor: Actor | None = None
        try:
            actor = await context.auth.known(request)
            if actor is None and "hx-request" in request.headers:  # a part of a page whose session has ended
                return Response(status_code=401, headers={"hx-refresh": "true"})
            if actor is None:
                path = request.scope["raw_path"].decode("latin-1")
                back = quote(path + (f"?{request.url.query}" if request.url.query else ""), safe="")
                return RedirectResponse(f"/login?next={back}", status_code=303)
            if not may(actor, role):
                raise Refused(403, f"{actor.name} is {actor.role}: this needs {role}")
            if shared:
                check_shared(actor)
            with ExitStack() as turn:
                turn.enter_context(context.auth.turn(actor))
                _waiting.set(await context.store.count_waiting(project_id=actor.project_id))
                return until_sent(context, await work(context, request, actor), turn)
        except SwarmError as error:
            refused = of(error)
        except Refused as error:
            refused = Refused(error.status, error.detail, headers=error.headers)  # without its traceback
        except Exception as error:
            log.error("a page failed by a bug in Swarm", error=f"{type(error).__name__}: {error}")
            refused = Refused(500, "an internal error; the server's log has details")
        answer = html("error.html", actor=actor, status=refused.status, detail=refused.detail)
        answer.headers.update(refused.headers)
        return answer

    return NamedRoute(path, serve, methods=[method])


async def own_ticket(context: Context, request: Request, actor: Actor) -> TicketSummary:
    """The one that the path names, by its id or the beginning of one. One of another project does not exist for whoever
    is bound to one. Raises NotFound."""
    return await context.store.visible_ticket(request.path_params["id"], project_id=actor.project_id)


async def form(request: Request, *, limit: int = _FORM_BYTES, fields: int = 1000) -> FormData:
    """What a page's form sends. Raises Refused."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise Refused(411, "the length of the body must be given")
    if int(length[:12]) > limit:
        raise Refused(413, "the form is too large")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.form(max_files=0, max_fields=fields)
    except (HTTPException, MultiPartException, ClientDisconnect):
        raise Refused(400, "the form can't be read, or has too many fields") from None
    except TimeoutError:
        raise Refused(408, f"the form did not arrive within {BODY_SECONDS:g} s") from None


def own_address(given: object, *, default: str = "/") -> str:
    """One that a form or an address gave, if it is of this server."""
    said = given if isinstance(given, str) else ""
    own = said.startswith("/") and not said.startswith(("//", "/\\")) and said.isprintable()
    return said if own else default


def here(request: Request, **changed: str | None) -> str:
    """The address of a page, with some of its query changed; None leaves one out."""
    query = [(name, value) for name, value in request.query_params.multi_items() if name not in changed]
    query += [(name, value) for name, value in changed.items() if value is not None]
    return request.url.path + (f"?{urlencode(query)}" if query else "")


@cache
def _file(name: str) -> bytes | None:
    """Of the directory static/, whose files don't change while the server runs."""
    found = resources.files("swarm.dashboard").joinpath("static", name)
    return found.read_bytes() if "/" not in name and found.is_file() else None


@cache
def address(name: str) -> str:
    """Of a static file: another one whenever its content is, so that browsers may keep it."""
    data = _file(name)
    assert data is not None, name
    return f"/static/{hashlib.sha256(data).hexdigest()[:12]}/{name}"


async def static(request: Request) -> Response:
    data = _file(request.path_params["name"])
    if data is None:
        return Response(status_code=404)
    kind = _TYPES.get(request.path_params["name"].rpartition(".")[2], "application/octet-stream")
    return Response(data, media_type=kind, headers={"cache-control": _YEAR})
