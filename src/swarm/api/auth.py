"""Who asks, and what they may do.

A request is one of three: it came through the Unix socket, which only the engine's own user can open, and may do all;
it has a token (`Authorization: Bearer …`); or it has the cookie of a browser's session. A session is begun by a link
that is good for one use (`swarm dashboard` prints it), or by a token that a person types in. Nobody else learns more
than that there is a server.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from swarm.api.problem import Refused
from swarm.model import Role
from swarm.store.registry.tokens import SESSION_SECONDS, Actor, new_token
from swarm.store.store import Store

COOKIE: Final = "swarm_session"
# Of one holder of a token.
PER_SECOND: Final = 200.0
BURST: Final = 400.0
AT_ONCE: Final = 64  # requests, streams included
_LOGINS: Final = (1.0, 30.0)  # a second, and at once
AGAIN_SECONDS: Final = 15.0  # in which a request that takes long may outlive its token
_REFUSED_PER_SECOND: Final = 50.0  # wrong tokens, of all senders
_HOLDERS: Final = 1000
_LOCAL: Final = "swarm.local"
_ASKED: Final = "swarm.asked"
_ROLES: Final = tuple(Role)
_SAFE: Final = ("GET", "HEAD", "OPTIONS")


def local(app: ASGIApp, user: str) -> ASGIApp:
    """The app for the Unix socket: every request is from ``user``, who may do all."""
    actor = Actor(name=user, role=Role.ADMIN)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, _LOCAL: actor}, receive, send)

    return serve


def may(actor: Actor, role: Role) -> bool:
    return _ROLES.index(actor.role) >= _ROLES.index(role)


class _Bucket:
    """At most so many a second, on average."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._left, self._at = burst, time.monotonic()
        self.at_once = 0

    def take(self) -> bool:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Auth:
    """``public_url``: where a proxy serves this server, whatever name the proxy asks by. ``again_seconds``: in which a
    request that takes long is asked once whether it may go on."""

    def __init__(self, store: Store, *, public_url: str = "", again_seconds: float = AGAIN_SECONDS) -> None:
        self._store, self._again_seconds = store, again_seconds
        self._public_url = public_url.lower()
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._refusals = _Bucket(_REFUSED_PER_SECOND, _REFUSED_PER_SECOND)

    async def actor(self, request: HTTPConnection, role: Role) -> Actor:
        """Who asks for something that ``role`` may do. Raises Refused (401, 403, 429)."""
        actor = await self.known(request)
        if actor is None:
            hint = "`swarm token create` makes one; a browser gets in by the link of `swarm dashboard`"
            raise Refused(401, f"a valid token is needed: {hint}", headers={"www-authenticate": "Bearer"})
        if not may(actor, role):
            raise Refused(403, f"{actor.name} is {actor.role}: this needs {role}")
        return actor

    async def known(self, request: HTTPConnection) -> Actor | None:
        """Who asks, if that is known. Raises Refused for another site's request with the cookie of a session."""
        if (actor := request.scope.get(_LOCAL)) is not None:
            return actor  # type: ignore[no-any-return]
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if token:
            return await self._holder(token.strip()) if scheme.lower() == "bearer" else None
        if not (session := request.cookies.get(COOKIE)):
            return None
        if request.scope.get("method") not in _SAFE or request.scope["type"] == "websocket":
            self.check_origin(request)
        return await self._holder(session)

    async def check_again(self, request: HTTPConnection, actor: Actor, role: Role) -> None:
        """For a request that takes long, at each thing it sends or looks at. Raises Refused (401) if its token or
        session has been revoked or has expired; the database is asked now and then only."""
        now = time.monotonic()
        if now - request.scope.setdefault(_ASKED, now) < self._again_seconds:
            return
        request.scope[_ASKED] = now
        found = await self.known(request)
        if found is None or not may(found, role) or found.project_id != actor.project_id:
            raise Refused(401, f"the token or session of {actor.name} is no longer valid")

    async def _holder(self, token: str) -> Actor | None:
        found = await self._store.token_holder(token[:200])
        if found is None:
            self._count_wrong()
        return found

    def _count_wrong(self) -> None:
        """Raises Refused (429) when there were too many wrong tokens."""
        if not self._refusals.take():
            raise Refused(429, "too many wrong tokens: try again later", headers={"retry-after": "2"})

    async def log_in(self, given: str, response: Response, *, secure: bool) -> bool:
        """Begin a browser's session with a link's code or a token. False if it is worth none. Raises Refused."""
        session, given = new_token(), given[:200]
        holder = await self._store.may_log_in(given)
        if holder is not None and not self._bucket(f"login of {holder.name}", *_LOGINS).take():
            raise Refused(429, f"{holder.name} logs in too often: try again later", headers={"retry-after": "2"})
        if holder is None or await self._store.open_session(given, session) is None:
            self._count_wrong()
            return False
        response.set_cookie(
            COOKIE, session, max_age=SESSION_SECONDS, httponly=True, samesite="lax", secure=secure, path="/"
        )
        return True

    async def log_out(self, request: HTTPConnection, response: Response) -> None:
        if session := request.cookies.get(COOKIE):
            self.check_origin(request)
            await self._store.close_session(session[:200])
        response.delete_cookie(COOKIE, path="/")

    @contextmanager
    def turn(self, actor: Actor) -> Iterator[None]:
        """While a request of this holder is served. Raises Refused (429) if it sends too many."""
        bucket = self._bucket(actor.name, PER_SECOND, BURST)
        if bucket.at_once >= AT_ONCE or not bucket.take():
            raise Refused(429, f"too many requests of {actor.name}: slow down", headers={"retry-after": "1"})
        bucket.at_once += 1
        try:
            yield
        finally:
            bucket.at_once -= 1

    def _bucket(self, name: str, per_second: float, burst: float) -> _Bucket:
        bucket = self._buckets.pop(name, None) or _Bucket(per_second, burst)
        self._buckets[name] = bucket
        if len(self._buckets) > _HOLDERS:
            self._buckets.popitem(last=False)
        return bucket

    def check_origin(self, request: HTTPConnection) -> bool:
        """A browser says which site a form or a script came from; a cookie alone proves nothing. True if that site has
        TLS. Raises Refused (403)."""
        given = request.headers.get("origin", "")
        scheme, _, host = given.partition("://")
        if not host or (host != request.headers.get("host") and given != self._public_url):
            raise Refused(403, "this request came from another site (behind a proxy: `swarm serve --public-url`)")
        return scheme == "https"
