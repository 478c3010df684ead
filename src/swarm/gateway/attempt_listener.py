"""One attempt's HTTP server for calls of services. Only its VM can reach the socket, and only its VM knows the token.

The socket is inside the VM's own network namespace, so every client *is* that VM: there is no address to spoof, VMs
share no port, and nothing listens on the host. The token is checked too: it keeps a confused or hostile program of the
same VM from using access that it was not given, and other listeners don't accept it. Both end with the attempt.
docs/adr/0016-gateway.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import socket
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from swarm.base.log import logger
from swarm.gateway.connection_acceptor import ConnectionAcceptor
from swarm.gateway.upstreams import Upstream, environment
from swarm.gateway.wire import error
from swarm.ledger import Account

log = logger(__name__)

Record = Callable[[str, Mapping[str, object]], None]  # kind and data of an event of the ticket

# Open connections of one VM; more wait in the kernel's queue, which holds as many again.
MAX_CONNECTIONS: Final = 128
_MAX_HEADER_BYTES: Final = 32 * 1024
# Failed calls of one attempt: each is work for the host, and most a row in the database for good, although it cost
# nothing.
MAX_FAILED_CALLS: Final = 1000
MAX_INVALID_BYTES: Final = 64_000_000  # of request bodies that were parsed and refused
# A call lingers after its client has gone, until the engine has answered; then its connection is another's.
_MAX_CALLS: Final = 2 * MAX_CONNECTIONS
_MAX_ERRORS: Final = 10  # logged for one attempt
MAX_REFUSALS: Final = 200  # recorded for one attempt: a hostile one must not fill the database
_CLOSE_SECONDS: Final = 10.0
_IDLE_SECONDS: Final = 0.02  # how long an idle connection may stay when the server ends (0 would be for ever)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedRequest:
    """A request that passed the token and path checks. ``target``: path and query, as sent to the service."""

    listener: AttemptListener
    http: web.BaseRequest
    upstream: Upstream
    key: str = field(repr=False)
    target: str
    metered: bool


class AttemptListener:
    """Made by `Gateway.open_listener`; the caller closes it. ``exceeded`` is done once a budget has stopped the
    attempt; its result says which budget, with the amounts. ``calls``: the tasks of calls under way."""

    def __init__(
        self,
        *,
        account: Account,
        services: Mapping[str, tuple[Upstream, str]],
        sock: socket.socket,
        url: str,
        token: str,
        record: Record,
        forward: Callable[[AllowedRequest], Awaitable[web.StreamResponse]],
    ) -> None:
        self.account = account
        self.token = token
        self.exceeded: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.held_bytes = 0  # of request bodies in memory
        self.failed_calls = 0  # including requests that were refused as invalid
        self.invalid_bytes = 0  # of the bodies of those
        self.parse_lock = asyncio.Lock()
        self.reserve_lock = asyncio.Lock()  # held by the one call that retries its reservation
        self.calls: set[asyncio.Task[Any]] = set()
        self._services = services  # with their keys
        self._url = url
        self._record = record
        self._refusals = 0
        self._errors = 0
        self._forward = forward
        self._transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._acceptor = ConnectionAcceptor(sock, max_connections=MAX_CONNECTIONS, handle=self._serve)
        self._server = _Server(self._handle, self._acceptor.connection_ended, _logger(self._server_error))

    def __repr__(self) -> str:  # no key, no token
        return f"<AttemptListener of attempt {self.account.attempt_id} at {self._url}>"

    @property
    def env(self) -> dict[str, str]:
        return environment(self._services, url=self._url, token=self.token)

    @property
    def too_many_failed(self) -> bool:
        return self.failed_calls >= MAX_FAILED_CALLS or self.invalid_bytes >= MAX_INVALID_BYTES

    def refuse(self, what: str, **details: object) -> None:
        """Record a refused request."""
        self._refusals += 1
        if self._refusals <= MAX_REFUSALS:
            more = {"more": "further refusals are not recorded"} if self._refusals == MAX_REFUSALS else {}
            self._record("egress", {"via": "gateway", "refused": what, **details, **more})
        log.debug("gateway refused", what=what, attempt=self.account.attempt_id)

    def _server_error(self, problem: BaseException) -> None:
        """An error that the HTTP server reports: the client didn't send valid HTTP, or there is a bug in Swarm."""
        if isinstance(problem, HttpProcessingError):
            self.refuse("request", why=problem.message.partition("\n")[0][:200])
            return
        self._errors += 1
        if self._errors <= _MAX_ERRORS:
            log.error("the gateway failed", attempt=self.account.attempt_id, exc_info=problem)

    def exceed(self, message: str) -> None:
        if not self.exceeded.done():
            self.exceeded.set_result(message)

    def stop(self) -> None:
        """Accept no more connections, and cancel calls under way. Idempotent; doesn't wait."""
        self._acceptor.stop()
        for call in self.calls:
            call.cancel()

    async def close(self) -> None:
        """Stop, and wait until the cancelled calls are booked. Never raises."""
        self.stop()
        await self._acceptor.close(seconds=_CLOSE_SECONDS)
        if self.calls:
            await asyncio.wait(set(self.calls), timeout=_CLOSE_SECONDS)
        for transport in list(self._transports):
            transport.abort()  # close() would wait for the VM, which is gone, to read the rest
        with contextlib.suppress(Exception):
            await self._server.shutdown(timeout=_IDLE_SECONDS)
        self.exceeded.cancel()

    async def _serve(self, connection: socket.socket) -> None:
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(self._server, connection)
        self._transports.add(transport)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        call = asyncio.current_task()
        assert call is not None
        self.calls.add(call)
        try:
            if len(self.calls) > _MAX_CALLS:
                return error(429, "rate_limit_error", "too many calls at once", **{"retry-after": "1"})
            return await self._authorize_and_forward(request)
        finally:
            self.calls.discard(call)

    async def _authorize_and_forward(self, request: web.BaseRequest) -> web.StreamResponse:
        given = request.headers.get("x-api-key") or ""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if not given and scheme.lower() == "bearer":
            given = bearer.strip()
        path, _, query = request.raw_path.partition("?")
        shown = {"method": request.method[:16], "path": path[:200]}
        if not hmac.compare_digest(given.encode(errors="replace"), self.token.encode()):
            self.refuse("token", **shown)
            return error(401, "authentication_error", "wrong token: use the one in this attempt's environment")
        name, rest = next(iter(self._services)), path
        head, _, tail = path.removeprefix("/").partition("/")
        if head in self._services:
            name, rest = head, f"/{tail}"
        upstream, key = self._services[name]
        kind = upstream.route(request.method, rest)
        if kind is None or not _is_plain_query(query):
            self.refuse("path", **shown)
            return error(404, "not_found_error", f"the gateway does not forward {request.method} {path[:200]}")
        if kind == "metered":
            upstream = upstream.dialect(request.method, rest)
        target = f"{rest}?{query}" if query else rest
        allowed = AllowedRequest(
            listener=self, http=request, upstream=upstream, key=key, target=target, metered=kind == "metered"
        )
        return await self._forward(allowed)


def _is_plain_query(query: str) -> bool:
    return len(query) <= 2000 and query.isascii() and query.isprintable() and not set(query) & set(" \"'<>#\\^`{|}")


def _logger(on_error: Callable[[BaseException], None]) -> logging.Logger:
    """For aiohttp's server: a guest must not be able to fill the engine's log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] and record.levelno >= logging.ERROR:
                on_error(record.exc_info[1])

    logger = logging.Logger("swarm.gateway.attempt_listener")  # has no parent: nothing is propagated
    logger.addHandler(Handler())
    return logger


class _Server(web.Server):
    """aiohttp's server for connections that `ConnectionAcceptor` has accepted."""

    def __init__(
        self, handler: Callable[[web.BaseRequest], Any], connection_ended: Callable[[], None], logger: logging.Logger
    ) -> None:
        super().__init__(
            handler,
            logger=logger,
            handler_cancellation=True,  # a call ends when its client disconnects
            access_log=None,
            keepalive_timeout=30.0,
            max_line_size=8190,
            max_field_size=_MAX_HEADER_BYTES,
            auto_decompress=False,
        )
        self._connection_ended = connection_ended

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._connection_ended()
