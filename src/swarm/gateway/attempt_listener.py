"""One attempt's way to the services: a listener that only its VM can reach, and a token that only it was given.

The listener is a socket inside the VM's own network namespace, so whoever speaks on it *is* that VM: there is no
address to spoof, no port that VMs share, and nothing listens on the host. The token is checked all the same, which
keeps a confused or hostile program of the same VM from using what it was not handed, and is worth nothing at any other
door. Both end with the attempt. docs/adr/0016-gateway.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from swarm.gateway.connection_acceptor import ConnectionAcceptor
from swarm.gateway.upstreams import Upstream
from swarm.ledger import Account

log = structlog.get_logger(__name__)

Record = Callable[[str, Mapping[str, object]], None]  # kind and data of an event of the ticket

# What one VM may keep open at once; more wait in the kernel's queue, which holds as many again.
MAX_CONNECTIONS: Final = 128
_MAX_HEADER_BYTES: Final = 32 * 1024
# Calls that failed, of one attempt: each is a row of the books for good, though it cost nothing.
MAX_FAILED_CALLS: Final = 1000
_MAX_REFUSALS: Final = 200  # recorded of one attempt: a hostile one must not fill the database
_CLOSE_SECONDS: Final = 10.0
_IDLE_SECONDS: Final = 0.02  # what is left of a connection when its calls have ended (0 would be for ever)


def error(status: int, kind: str, message: str, **headers: str) -> web.Response:
    """An error in the Messages API's form, which the SDKs of both dialects understand."""
    body = {"type": "error", "error": {"type": kind, "message": message}}
    return web.json_response(body, status=status, headers=headers)


class AttemptListener:
    """Made by `Gateway.door`, which closes it. ``exceeded`` is done when a budget has ended the attempt's work: its
    result says which, with the sums."""

    def __init__(
        self,
        *,
        account: Account,
        services: Mapping[str, tuple[Upstream, str]],
        listener: socket.socket,
        url: str,
        record: Record,
        forward: Callable[[AttemptListener, web.BaseRequest, Upstream, str, str], Any],
    ) -> None:
        self.account = account
        self.token = secrets.token_urlsafe(32)
        self.exceeded: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.held_bytes = 0  # of request bodies, in memory
        self.failed_calls = 0
        self.reserve_lock = asyncio.Lock()  # to ask the books again
        self._services = services  # with their keys
        self._url = url
        self._record = record
        self._refusals = 0
        self._forward = forward
        self._calls: set[asyncio.Task[Any]] = set()
        self._transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._reception = ConnectionAcceptor(listener, most=MAX_CONNECTIONS, welcome=self._welcome)
        self._server = _Server(self._handle, self._reception.left, _logger(self._ill))

    def __repr__(self) -> str:  # no key, no token
        return f"<AttemptListener of attempt {self.account.attempt_id} at {self._url}>"

    @property
    def env(self) -> dict[str, str]:
        """What the agent's programs need to find the services. The first service has the plain address."""
        found = {}
        for number, (name, (upstream, _)) in enumerate(self._services.items()):
            url = self._url if number == 0 else f"{self._url}/{name}"
            for variable, text in upstream.env.items():
                found[variable] = text.replace("{url}", url).replace("{token}", self.token)
        return found

    def refuse(self, what: str, **details: object) -> None:
        """Record that something was not let through."""
        self._refusals += 1
        if self._refusals <= _MAX_REFUSALS:
            more = {"more": "further refusals are not recorded"} if self._refusals == _MAX_REFUSALS else {}
            self._record("egress", {"via": "gateway", "refused": what, **details, **more})
        log.debug("gateway refused", what=what, attempt=self.account.attempt_id)

    def _ill(self, problem: BaseException) -> None:
        """What the server says of a connection: it was no HTTP, or we made a mistake."""
        if isinstance(problem, HttpProcessingError):
            self.refuse("request", why=problem.message.partition("\n")[0][:200])
        else:
            log.error("the gateway failed", attempt=self.account.attempt_id, exc_info=problem)

    def exceed(self, message: str) -> None:
        if not self.exceeded.done():
            self.exceeded.set_result(message)

    def shut(self) -> None:
        """From here on nobody gets in, and calls under way are being cut off. Idempotent; waits for nothing."""
        self._reception.shut()
        for call in self._calls:
            call.cancel()

    async def close(self) -> None:
        """Shut, and wait until what was cut off has been booked. Never raises."""
        self.shut()
        await self._reception.close(seconds=_CLOSE_SECONDS)
        if self._calls:
            await asyncio.wait(set(self._calls), timeout=_CLOSE_SECONDS)
        for transport in list(self._transports):
            transport.abort()  # closed gently, it would wait for a VM that is gone to read the rest
        with contextlib.suppress(Exception):
            await self._server.shutdown(timeout=_IDLE_SECONDS)
        self.exceeded.cancel()

    async def _welcome(self, connection: socket.socket) -> None:
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(self._server, connection)
        self._transports.add(transport)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            return await self._let_in(request)
        finally:
            self._calls.discard(call)

    async def _let_in(self, request: web.BaseRequest) -> web.StreamResponse:
        given = request.headers.get("x-api-key") or ""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if not given and scheme.lower() == "bearer":
            given = bearer.strip()
        path, _, query = request.raw_path.partition("?")
        shown = {"method": request.method[:16], "path": path[:200]}
        if not hmac.compare_digest(given.encode(errors="replace"), self.token.encode()):
            self.refuse("token", **shown)
            return error(401, "authentication_error", "this token is not the one of this attempt")
        name, rest = next(iter(self._services)), path
        head, _, tail = path.removeprefix("/").partition("/")
        if head in self._services:
            name, rest = head, f"/{tail}"
        upstream, key = self._services[name]
        kind = upstream.route(request.method, rest)
        if kind is None or not _is_plain_query(query):
            self.refuse("path", **shown)
            return error(404, "not_found_error", f"the gateway does not forward {request.method} {path[:200]}")
        target = f"{rest}?{query}" if query else rest
        response: web.StreamResponse = await self._forward(self, request, upstream, key, target)
        return response


def _is_plain_query(query: str) -> bool:
    return len(query) <= 2000 and query.isascii() and query.isprintable() and not set(query) & set(" \"'<>#\\^`{|}")


def _logger(tell: Callable[[BaseException], None]) -> logging.Logger:
    """For a server of aiohttp's: a guest must not be able to fill the engine's log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] and record.levelno >= logging.ERROR:
                tell(record.exc_info[1])

    logger = logging.Logger("swarm.gateway.attempt_listener")  # by itself: nothing goes up from here
    logger.addHandler(Handler())
    return logger


class _Server(web.Server):
    """aiohttp's server for connections that somebody else has accepted; each that ends makes room for another."""

    def __init__(
        self, handler: Callable[[web.BaseRequest], Any], left: Callable[[], None], logger: logging.Logger
    ) -> None:
        super().__init__(
            handler,
            logger=logger,
            handler_cancellation=True,  # a guest that hangs up ends its call
            access_log=None,
            keepalive_timeout=30.0,
            max_line_size=8190,
            max_field_size=_MAX_HEADER_BYTES,
            auto_decompress=False,
        )
        self._left = left

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._left()
