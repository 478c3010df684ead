"""One route of the API as a value: who may call it, what it takes and answers. The server's routes and its OpenAPI
document are made from the same list."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_origin
from urllib.parse import quote, unquote

import pydantic
from pydantic import BaseModel, ConfigDict
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute
from starlette.types import Scope

from swarm.api import body
from swarm.api.auth import Auth
from swarm.api.feed import Feed
from swarm.api.problem import Refused, busy, of, problem
from swarm.base import jsontext
from swarm.base.log import logger
from swarm.base.plain import plain
from swarm.errors import SwarmError
from swarm.fields import sentence
from swarm.model import Role
from swarm.store.registry.tokens import Actor
from swarm.store.store import Store
from swarm.store.tickets.validation import shown

if TYPE_CHECKING:
    from swarm.admin.uploads import Uploads
    from swarm.admin.vault import Vault
    from swarm.api.metrics import Metrics
    from swarm.api.notices import Sender
    from swarm.config import Settings
    from swarm.vm.image.image import Images
    from swarm.vm.slots.inventory import Inventory
    from swarm.vm.template import Templates

log = logger(__name__)
_T = TypeVar("_T")

MAX_BODY_BYTES: Final = 1 << 20
BODY_SECONDS: Final = 30.0
_LARGE_BYTES: Final = 1 << 20  # of an answer; the buffers of a connection have small ones
_SLICE_BYTES: Final = 256 << 10
_MAX_FIELDS: Final = 1000  # each that doesn't exist is an error with words of its own
JSON: Final = "application/json"
_ENCODED_SLASH: Final = re.compile(rb"%2[fF]")
_SLASH: Final = "\ufdd0"  # in its place while a path is matched: no character, and no part of a name
EVENT_STREAM: Final = "text/event-stream"


class Fields(BaseModel):
    """The base of what a request may give, in its body or its query: nothing else is taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Heavy:
    """Work that takes a processor for seconds, such as the check of a large file. It has its own places, so that the
    threads in which answers are made are left to others."""

    def __init__(self, *, at_once: int = 2, wait_seconds: float = 2.0) -> None:
        self._places = asyncio.Semaphore(at_once)
        self._wait_seconds = wait_seconds

    async def run(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Raises Refused (503) when others have the places for too long."""
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._places.acquire()
        except TimeoutError:
            raise busy("others check or draw something large now: try again soon") from None
        try:
            return await work()
        finally:
            self._places.release()


class Outgoing:
    """The bytes of large answers that their clients have not taken yet."""

    def __init__(self, *, most: int = 64 << 20) -> None:
        self._most, self._kept = most, 0

    @contextmanager
    def kept(self, size: int) -> Iterator[None]:
        """Raises Refused (503) if that is too much. One alone is never."""
        if self._kept and self._kept + size > self._most:
            raise busy("other large answers are on their way: try again soon")
        self._kept += size
        try:
            yield
        finally:
            self._kept -= size


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What handlers work with."""

    store: Store
    feed: Feed
    auth: Auth
    settings: Settings
    vault: Vault
    uploads: Uploads
    images: Images
    templates: Templates
    inventory: Inventory
    metrics: Metrics
    notices: Sender
    tree_uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))  # at once
    heavy: Heavy = field(default_factory=Heavy)
    large_made: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))  # at once
    outgoing: Outgoing = field(default_factory=Outgoing)
    strangers: body.Strangers = field(default_factory=body.Strangers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, checked. ``query`` and ``body`` are of the endpoint's models."""

    context: Context
    request: Request
    actor: Actor
    path: Mapping[str, str]
    query: Any
    body: Any

    @property
    def store(self) -> Store:
        return self.context.store

    async def check_again(self, role: Role) -> None:
        """See `Auth.check_again`. Raises Refused."""
        await self.context.auth.check_again(self.request, self.actor, role)


Handler = Callable[[Call], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """``handler`` returns what `answer` describes (dataclasses as they are), or a Response. ``path`` as Starlette
    writes it, such as '/v1/tickets/{id}'. ``errors``: statuses that it may answer besides those of every route.
    ``upload``: the content types of a body that is no JSON, which the handler reads. ``shared``: it tells of all
    projects, or changes what they share, so a token of one project gets 403. ``ranges``: it answers a range of bytes
    too (206). ``large``: its answer may have many megabytes, so that few are made at once. ``headers``: of the
    request, besides those of every one, with what they are for."""

    method: str
    path: str
    role: Role
    summary: str
    handler: Handler
    query: type[Fields] | None = None
    body: type[BaseModel] | None = None
    upload: tuple[str, ...] = ()
    shared: bool = False
    ranges: bool = False
    large: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    max_body_bytes: int = MAX_BODY_BYTES
    answer: Any = None  # a type; None: no content
    status: int = 200
    media_type: str = JSON
    errors: Mapping[int, str] = field(default_factory=dict)


class _Named(BaseRoute):
    """A route with names in its path. Other tools give tickets any id: an encoded slash is part of a name, and
    separates nothing."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        raw = scope.get("raw_path") or b""
        if b"%2f" not in raw.lower():
            return super().matches(scope)
        kept = _ENCODED_SLASH.sub(quote(_SLASH).encode(), raw)
        match, found = super().matches({**scope, "path": unquote(kept.decode("latin-1"))})
        if "path_params" in found:
            found["path_params"] = {name: each.replace(_SLASH, "/") for name, each in found["path_params"].items()}
        return match, found


class NamedRoute(_Named, Route):
    pass


class NamedSocketRoute(_Named, WebSocketRoute):
    pass


def route(endpoint: Endpoint, context: Context) -> Route:
    async def serve(request: Request) -> Response:
        return await guarded(lambda: _serve(endpoint, context, request))

    return NamedRoute(endpoint.path, serve, methods=[endpoint.method])


async def guarded(work: Callable[[], Awaitable[Response]]) -> Response:
    """What is raised becomes a problem: never a traceback, and nothing about this server."""
    try:
        return await work()
    except SwarmError as error:
        refused = of(error)
    except Refused as error:
        # Not itself: with its traceback it would keep what the request has read, until the next collection of garbage.
        return problem(error.status, error.detail, headers=error.headers)
    except Exception as error:
        log.error("a request failed by a bug in Swarm", error=f"{type(error).__name__}: {error}")
        refused = Refused(500, "an internal error; the server's log has details")
    return problem(refused.status, refused.detail, headers=refused.headers)


def check_shared(actor: Actor) -> None:
    """Raises Refused for who is bound to one project."""
    if actor.project_id is not None:
        raise Refused(403, f"{actor.name} is of the project {shown(actor.project_id)}, and this is of all projects")


async def _serve(endpoint: Endpoint, context: Context, request: Request) -> Response:
    actor = await context.auth.actor(request, endpoint.role)
    if endpoint.shared:
        check_shared(actor)
    with ExitStack() as turn:
        turn.enter_context(context.auth.turn(actor))
        if endpoint.upload:
            _check_type(request, endpoint.upload)
        call = Call(
            context=context,
            request=request,
            actor=actor,
            path=request.path_params,
            query=_query(endpoint.query, request) if endpoint.query is not None else None,
            body=await _body(endpoint, request) if endpoint.body is not None else None,
        )
        async with context.large_made if endpoint.large else nullcontext():
            answer = await endpoint.handler(call)
            if isinstance(answer, StreamingResponse):
                answer.body_iterator = _allowed(answer.body_iterator, answer.media_type, call, endpoint.role)
            if not isinstance(answer, Response) and endpoint.answer is None:
                return Response(status_code=204)
            if not isinstance(answer, Response):
                text = await asyncio.to_thread(encode, answer)
                headers = {"cache-control": "no-store"}
                answer = Response(text, status_code=endpoint.status, media_type=JSON, headers=headers)
            return until_sent(context, answer, turn)


def until_sent(context: Context, answer: Response, turn: ExitStack) -> Response:
    """A stream goes on after its handler: so does its turn. A large answer becomes one. Raises Refused (503) when there
    is no room for it."""
    if not isinstance(answer, StreamingResponse) and len(data := bytes(answer.body)) > _LARGE_BYTES:
        turn.enter_context(context.outgoing.kept(len(data)))
        answer = StreamingResponse(_slices(data), status_code=answer.status_code, headers=dict(answer.headers))
    if isinstance(answer, StreamingResponse):
        held = turn.pop_all()
        answer.background = BackgroundTask(held.close)
        answer.body_iterator = _closing(answer.body_iterator, held)
    return answer


async def _slices(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), _SLICE_BYTES):
        yield data[at : at + _SLICE_BYTES]


async def _allowed(parts: Any, kind: str | None, call: Call, role: Role) -> AsyncIterator[Any]:
    """A stream's parts, while the caller may have them; an empty one only says that time has passed."""
    async for part in parts:
        try:
            await call.check_again(role)
        except Refused:
            await parts.aclose()
            if kind == EVENT_STREAM:
                return
            raise  # its reader would take this for the end
        if part:
            yield part


async def _closing(parts: Any, held: ExitStack) -> Any:
    """Also when the client goes away: then no background task runs."""
    try:
        async for part in parts:
            yield part
    finally:
        held.close()


def encode(value: object) -> bytes:
    return json.dumps(plain(value), ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _query(model: type[Fields], request: Request) -> Any:
    given: dict[str, Any] = {}
    for name in request.query_params:
        field_ = model.model_fields.get(name)
        many = field_ is not None and get_origin(field_.annotation) in (tuple, list)
        values = request.query_params.getlist(name)
        if not many and len(values) > 1:
            raise Refused(400, f"{name}: give it once")
        given[name] = values if many else values[0]
    return validated(model, given, "the query")


async def _body(endpoint: Endpoint, request: Request) -> Any:
    assert endpoint.body is not None
    _check_type(request, (JSON,))
    data = await body.read_in_time(request, endpoint.max_body_bytes, seconds=BODY_SECONDS)
    return await asyncio.to_thread(_parsed, endpoint.body, data)


def _check_type(request: Request, accepted: tuple[str, ...]) -> None:
    kind = request.headers.get("content-type", accepted[0]).partition(";")[0].strip().lower()
    if kind not in accepted:
        hint = f"send the header Content-Type: {accepted[0]} (curl: -H 'Content-Type: {accepted[0]}')"
        raise Refused(415, f"the body must be {' or '.join(accepted)}, not {kind[:80]}: {hint}", headers=body.CLOSE)


def _parsed(model: type[BaseModel], data: bytes) -> Any:
    try:
        given = jsontext.loads(data.decode("utf-8")) if data else {}
    except jsontext.TooDeep as error:
        raise Refused(400, f"the body is {error}") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON in UTF-8 ({error})") from None
    return validated(model, given, "the body")


def validated(model: type[BaseModel], given: object, what: str) -> Any:
    if not isinstance(given, dict):
        raise Refused(400, f"{what} must be an object")
    if len(given) > _MAX_FIELDS:
        raise Refused(400, f"{what} has more than {_MAX_FIELDS} fields")
    try:
        return model.model_validate(given)
    except pydantic.ValidationError as error:
        raise Refused(400, f"{what}: {sentence(error, model)}") from None
