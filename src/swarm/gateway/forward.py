"""The gateway: adds the key to an agent's calls, passes them on, streams the answers back, counts and books them.

A call's budget is reserved before it leaves and settled when its answer has ended, however that was. What the guest
sends is bounded and checked; what the service answers comes through as it is, errors and rate limits included.
"""

from __future__ import annotations

import asyncio
import io
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Final

import aiohttp
import structlog
import yarl
from aiohttp import web

from swarm.base.aio import finish_uninterrupted
from swarm.errors import LeaseLost, NotFound, StoreError, UsageError
from swarm.gateway import attempt_listener as doors
from swarm.gateway import wire
from swarm.gateway.attempt_listener import AttemptListener, Record, error
from swarm.gateway.call import LEAST_OUTPUT_TOKENS, Call
from swarm.gateway.metering_request import MeteredRequest, Unclear, read
from swarm.gateway.policy import Policy
from swarm.gateway.prices import Price, Prices
from swarm.gateway.upstreams import Keys, Upstream
from swarm.gateway.usage import total
from swarm.ledger import Account, Busy, Granted, Ledger, Limit, Order, Refused, Spend

log = structlog.get_logger(__name__)

_CONNECT_SECONDS: Final = 10.0
_BODY_SECONDS: Final = 120.0  # in which a guest must have sent its request
# How long a call waits for others to let go of what they hold of a budget.
_BUSY_SECONDS: Final = 60.0
_LOOK_AGAIN_SECONDS: Final = 0.25


class Gateway:
    """`door` is an attempt's way in. ``day``: what all calls of a day may cost together. `close` it when doors are."""

    def __init__(
        self, *, upstreams: Mapping[str, Upstream], prices: Prices, keys: Keys, ledger: Ledger, day: Limit
    ) -> None:
        self._upstreams = upstreams
        self._prices = prices
        self._keys = keys
        self._ledger = ledger
        self._day = day
        self._session: aiohttp.ClientSession | None = None
        self._settled = asyncio.Event()  # a call has let go of what it held

    @property
    def prices_of(self) -> str:
        """The date of the price list."""
        return self._prices.date

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def services(self, policy: Policy) -> dict[str, tuple[Upstream, str]]:
        """The services of a policy, each with its key. Raises UsageError: one sentence on what is missing."""
        found = {}
        for name in policy.upstreams:
            upstream = self._upstreams.get(name)
            if upstream is None:
                known = ", ".join(sorted(self._upstreams))
                raise UsageError(f"the gateway knows no service {name!r}; it knows {known} (docs/claude.md)")
            key = await self._keys.find(upstream)
            if key is None:
                raise UsageError(f"there is no key for {name} on this host: {Keys.how_to_set(upstream)}")
            found[name] = (upstream, key)
        return found

    def door(
        self,
        account: Account,
        services: Mapping[str, tuple[Upstream, str]],
        *,
        listener: socket.socket,
        url: str,
        record: Record,
    ) -> AttemptListener:
        """An attempt's way to these services, open from now on: the caller closes it. ``listener`` listens where only
        its VM can connect, and is the door's from here on; ``url`` is how the VM sees it."""
        return AttemptListener(
            account=account, services=services, listener=listener, url=url, record=record, forward=self._forward
        )

    # --- one call -----------------------------------------------------------------------------------------------------

    async def _forward(
        self, door: AttemptListener, request: web.BaseRequest, upstream: Upstream, key: str, target: str
    ) -> web.StreamResponse:
        limit = int(upstream.body_mb * 1e6)
        try:
            body = await _read(door, request, limit)
        except _TooLarge:
            door.refuse("body", path=target[:200], limit_bytes=limit)
            return error(413, "request_too_large", f"a request may have at most {limit} bytes")
        except _Crowded:
            return error(429, "rate_limit_error", "too many large requests at once", **{"retry-after": "1"})
        except TimeoutError:
            return error(408, "invalid_request_error", "the request did not come to its end in time")
        try:
            path = target.partition("?")[0]
            if upstream.route(request.method, path) == "metered":
                return await self._metered(door, request, upstream, key, target, body)
            return await self._plain(door, request, upstream, key, target, body)
        finally:
            door.held_bytes -= len(body)

    async def _plain(
        self, door: AttemptListener, request: web.BaseRequest, upstream: Upstream, key: str, target: str, body: bytes
    ) -> web.StreamResponse:
        """A call that costs nothing."""
        call = Call(None, None, self._ledger, upstream)
        return await self._pass_on(call, door, request, upstream, key, target, body)

    async def _metered(
        self, door: AttemptListener, request: web.BaseRequest, upstream: Upstream, key: str, target: str, body: bytes
    ) -> web.StreamResponse:
        try:
            asked, body = read(body, upstream)
        except Unclear as problem:
            return error(400, "invalid_request_error", f"gateway: {problem}")
        if door.failed_calls >= doors.MAX_FAILED_CALLS:
            door.refuse("failures", model=asked.model)
            why = f"gateway: too many calls of this attempt have failed ({door.failed_calls})"
            return error(429, "rate_limit_error", why, **{"x-should-retry": "false"})
        price = self._prices.of(asked.model, asked.surcharge)
        order = self._order(door, upstream, asked, price)
        try:
            granted = await self._reserve(door, order)
        except asyncio.CancelledError:
            call = Call(order, asked, self._ledger, upstream)
            call.given_up()
            await finish_uninterrupted(call.book(self._prices))
            raise
        except (NotFound, LeaseLost) as gone:
            return error(403, "permission_error", str(gone), **{"x-should-retry": "false"})
        except StoreError as problem:
            log.warning("a model call can't be booked", error=str(problem), attempt=door.account.attempt_id)
            return error(503, "api_error", "the gateway can't reach its books; try again", **{"retry-after": "2"})
        if isinstance(granted, Refused):
            door.refuse("budget", model=order.model, why=granted.message)
            door.exceed(granted.message)
            return error(402, "billing_error", granted.message, **{"x-should-retry": "false"})
        if isinstance(granted, Busy):
            return error(429, "rate_limit_error", granted.message, **{"retry-after": "5"})
        call = Call(order, asked, self._ledger, upstream, granted=granted, price=price)
        try:
            return await self._pass_on(call, door, request, upstream, key, target, body)
        finally:
            door.failed_calls += call.failed
            await finish_uninterrupted(call.book(self._prices))
            self._settled.set()

    def _order(self, door: AttemptListener, upstream: Upstream, asked: MeteredRequest, price: Price | None) -> Order:
        def spend(output: int) -> Spend:
            counts = {**asked.prompt, "output": output}
            return Spend(tokens=total(counts), usd=None if price is None else price.usd(counts))

        most = spend(asked.longest)
        # What streams can be cut when its money is at an end; what doesn't is paid for in full once it has left.
        least = spend(min(asked.longest, LEAST_OUTPUT_TOKENS)) if asked.streams else most
        return Order(
            id=uuid.uuid4().hex,
            account=door.account,
            upstream=upstream.name,
            model=asked.model + asked.surcharge,
            most=most,
            least=least,
            day=self._day,
        )

    async def _reserve(self, door: AttemptListener, order: Order) -> Granted | Busy | Refused:
        deadline = time.monotonic() + _BUSY_SECONDS
        verdict = await finish_uninterrupted(self._ledger.reserve(order))
        if not isinstance(verdict, Busy):
            return verdict
        # Whoever waits asks again and again: one of each door, or they would keep the database from all others.
        async with door.reserve_lock:
            while isinstance(verdict, Busy) and time.monotonic() < deadline:
                self._settled.clear()
                verdict = await finish_uninterrupted(self._ledger.reserve(order))
                if isinstance(verdict, Busy):
                    try:  # another process settles without our hearing of it
                        async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                            await self._settled.wait()
                    except TimeoutError:
                        pass
        return verdict

    async def _pass_on(
        self,
        call: Call,
        door: AttemptListener,
        request: web.BaseRequest,
        upstream: Upstream,
        key: str,
        target: str,
        body: bytes,
    ) -> web.StreamResponse:
        headers = wire.forwarded(request, upstream, key)
        veil = wire.KeyMasker(key)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, connect=_CONNECT_SECONDS)
        url = yarl.URL(upstream.base_url + target, encoded=True)
        response: web.StreamResponse | None = None
        try:
            # aiohttp's own `sock_read` is set anew for each chunk before it is passed on, which takes longer than that.
            async with (
                asyncio.timeout(upstream.idle_seconds) as silence,
                self._client().request(
                    request.method,
                    url,
                    headers=headers,
                    data=io.BytesIO(body) if body else None,  # a large one is sent piece by piece
                    allow_redirects=False,  # a key goes to the service that it is for, and nowhere else
                    timeout=timeout,
                    proxy=wire.proxy_of(upstream.base_url),
                ) as answer,
            ):
                call.answered(answer)
                response = web.StreamResponse(
                    status=answer.status, reason=answer.reason, headers=wire.returned(answer, veil)
                )
                if answer.content_length is not None and "content-encoding" not in answer.headers:
                    response.content_length = answer.content_length
                await response.prepare(request)
                while chunk := await _heard(answer.content, silence, upstream.idle_seconds):
                    if out := veil.feed(call.feed(chunk)):
                        await response.write(out)
                    if (cut := call.over()) is not None:
                        door.exceed(cut)
                        await response.write(wire.event("billing_error", cut))
                        break
                else:
                    if rest := veil.feed(call.end()) + veil.end():
                        await response.write(rest)
            await response.write_eof()
            return response
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            call.left = not isinstance(
                problem, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.ClientHttpProxyError
            )
            late = isinstance(problem, TimeoutError)
            why = f"{upstream.name} was silent for too long" if late else f"{upstream.name} can't be reached"
            call.note = f"{why}: {type(problem).__name__}"
            if response is None:
                return error(504 if late else 502, "timeout_error" if late else "api_error", f"gateway: {call.note}")
            if call.sse and late:
                await response.write(wire.event("api_error", f"gateway: {call.note}"))
            return await wire.broken_off(response, request)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # A connection each: how many there may be is each door's business.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), skip_auto_headers=("User-Agent",)
            )
        return self._session


async def _heard(content: aiohttp.StreamReader, silence: asyncio.Timeout, seconds: float) -> bytes:
    """What came next; b"" at the end. The time that a guest takes to read it is not the service's silence."""
    silence.reschedule(asyncio.get_running_loop().time() + seconds)
    chunk = await content.readany()
    silence.reschedule(None)
    return chunk


class _TooLarge(Exception):
    pass


class _Crowded(Exception):
    pass


async def _read(door: AttemptListener, request: web.BaseRequest, limit: int) -> bytes:
    """The request's body. Raises _TooLarge, _Crowded (other requests of this VM hold too much), TimeoutError."""
    if (request.content_length or 0) > limit:
        raise _TooLarge
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.content.iter_any():
                body += chunk
                door.held_bytes += len(chunk)
                if len(body) > limit:
                    raise _TooLarge
                if door.held_bytes > 4 * limit:
                    raise _Crowded
    except BaseException:
        door.held_bytes -= len(body)
        raise
    return bytes(body)
