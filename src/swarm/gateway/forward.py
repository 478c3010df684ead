"""The gateway: adds the key to an agent's calls, passes them on, streams the answers back, counts and books them.

A call's budget is reserved before it leaves and settled when its answer has ended, however that was. What the guest
sends is bounded and checked; what the service answers comes through as it is, errors and rate limits included.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import structlog
import yarl
from aiohttp import web

from swarm.aio import settle
from swarm.errors import NotFound, StoreError, UsageError
from swarm.gateway.door import Door, Record, error
from swarm.gateway.policy import Policy
from swarm.gateway.prices import Price, Prices
from swarm.gateway.upstreams import Keys, Upstream
from swarm.gateway.usage import Meter, first, input_tokens, text_tokens, total
from swarm.ledger import Account, Bill, Busy, Granted, Ledger, Limit, Order, Refused, Spend

log = structlog.get_logger(__name__)

# RFC 9110 7.6.1, and what is between us and either side only.
_HOP_BY_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
# The key is ours to add, the length ours to count; and an answer that is compressed could not be read.
_NOT_FORWARDED: Final = _HOP_BY_HOP | {
    "host", "content-length", "content-encoding", "accept-encoding", "authorization", "x-api-key", "cookie", "expect",
    "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip",
}  # fmt: skip
_NOT_RETURNED: Final = _HOP_BY_HOP | {"content-encoding", "set-cookie", "alt-svc"}
# Of an answer that streams, so much must be affordable for it to be begun.
_LEAST_OUTPUT_TOKENS: Final = 64
_CONNECT_SECONDS: Final = 10.0
_BODY_SECONDS: Final = 120.0  # in which a guest must have sent its request
# How long a call waits for others to let go of what they hold of a budget.
_BUSY_SECONDS: Final = 60.0
_LOOK_AGAIN_SECONDS: Final = 0.25
_BOOK_TRIES, _BOOK_AGAIN_SECONDS = 20, 0.5


class Gateway:
    """``async with`` it; `door` is an attempt's way in. ``day``: what all calls of a day may cost together."""

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

    async def __aenter__(self) -> Gateway:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
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

    @asynccontextmanager
    async def door(
        self,
        account: Account,
        services: Mapping[str, tuple[Upstream, str]],
        *,
        listener: socket.socket,
        url: str,
        record: Record,
    ) -> AsyncIterator[Door]:
        """An attempt's way to these services, for the length of the block. ``listener`` listens where only its VM can
        connect, and is closed here; ``url`` is how the VM sees it."""
        door = Door(
            account=account, services=services, listener=listener, url=url, record=record, forward=self._forward
        )
        try:
            yield door
        finally:
            await settle(door.close())

    # --- one call -----------------------------------------------------------------------------------------------------

    async def _forward(
        self, door: Door, request: web.BaseRequest, upstream: Upstream, key: str, target: str
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
        self, door: Door, request: web.BaseRequest, upstream: Upstream, key: str, target: str, body: bytes
    ) -> web.StreamResponse:
        """A call that costs nothing."""
        call = _Call(None, self._ledger, door, upstream)
        return await self._pass_on(call, door, request, upstream, key, target, body)

    async def _metered(
        self, door: Door, request: web.BaseRequest, upstream: Upstream, key: str, target: str, body: bytes
    ) -> web.StreamResponse:
        try:
            asked = json.loads(body)
            model = asked["model"]
            if not isinstance(model, str):
                raise TypeError
        except (ValueError, RecursionError, TypeError, KeyError):
            return error(400, "invalid_request_error", "the request must be a JSON object that names a model")
        streams = asked.get("stream") is True
        if streams and upstream.stream_body:
            body = json.dumps({**asked, **upstream.stream_body}).encode()
        order = self._order(door, upstream, asked, model[:200], len(body), streams=streams)
        try:
            granted = await self._reserve(order)
        except NotFound as gone:
            return error(403, "permission_error", str(gone), **{"x-should-retry": "false"})
        except StoreError as problem:
            log.warning("a model call can't be booked", error=str(problem), attempt=door.account.attempt_id)
            return error(503, "api_error", "the gateway can't reach its books; try again", **{"retry-after": "2"})
        if isinstance(granted, Refused):
            door.refuse("budget", model=model[:200], why=granted.message)
            door.exceed(granted.message)
            return error(402, "billing_error", granted.message, **{"x-should-retry": "false"})
        if isinstance(granted, Busy):
            return error(429, "rate_limit_error", granted.message, **{"retry-after": "5"})
        call = _Call(order, self._ledger, door, upstream, granted=granted, price=self._prices.of(order.model))
        try:
            return await self._pass_on(call, door, request, upstream, key, target, body)
        finally:
            await settle(call.book(self._prices))
            self._settled.set()

    def _order(
        self, door: Door, upstream: Upstream, asked: Mapping[str, Any], model: str, size: int, *, streams: bool
    ) -> Order:
        price = self._prices.of(model)
        given = first(asked, upstream.output_limit)
        longest = given if isinstance(given, int) and given > 0 else upstream.output_default
        prompt = input_tokens(size, asked)

        def spend(output: int) -> Spend:
            usd = None if price is None else price.usd({"input": prompt, "output": output})
            return Spend(tokens=prompt + output, usd=usd)

        most = spend(longest)
        # What streams can be cut when its money is at an end; what doesn't is paid for in full once it has left.
        least = spend(min(longest, _LEAST_OUTPUT_TOKENS)) if streams else most
        return Order(
            id=uuid.uuid4().hex,
            account=door.account,
            upstream=upstream.name,
            model=model,
            most=most,
            least=least,
            day=self._day,
        )

    async def _reserve(self, order: Order) -> Granted | Busy | Refused:
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            self._settled.clear()
            verdict = await settle(self._ledger.reserve(order))
            if not isinstance(verdict, Busy) or time.monotonic() > deadline:
                return verdict
            try:  # another process settles without our hearing of it
                async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                    await self._settled.wait()
            except TimeoutError:
                pass

    async def _pass_on(
        self,
        call: _Call,
        door: Door,
        request: web.BaseRequest,
        upstream: Upstream,
        key: str,
        target: str,
        body: bytes,
    ) -> web.StreamResponse:
        headers = _forwarded(request, upstream, key)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, connect=_CONNECT_SECONDS, sock_read=upstream.idle_seconds
        )
        url = yarl.URL(upstream.base_url + target, encoded=True)
        response: web.StreamResponse | None = None
        try:
            async with self._client().request(
                request.method,
                url,
                headers=headers,
                data=body or None,
                allow_redirects=False,  # a key goes to the service that it is for, and nowhere else
                timeout=timeout,
                proxy=_proxy_of(upstream.base_url),
            ) as answer:
                call.answered(answer)
                response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_returned(answer))
                if answer.content_length is not None and "content-encoding" not in answer.headers:
                    response.content_length = answer.content_length
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    if out := call.feed(chunk):
                        await response.write(out)
                    if (cut := call.over()) is not None:
                        door.exceed(cut)
                        await response.write(_event("billing_error", cut))
                        break
                else:
                    if rest := call.end():
                        await response.write(rest)
            await response.write_eof()
            return response
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            late = isinstance(problem, TimeoutError)
            why = f"{upstream.name} was silent for too long" if late else f"{upstream.name} can't be reached"
            call.note = f"{why}: {type(problem).__name__}"
            if response is None:
                return error(504 if late else 502, "timeout_error" if late else "api_error", f"gateway: {call.note}")
            if call.sse and late:
                await response.write(_event("api_error", f"gateway: {call.note}"))
            return await _ended(response, request)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # A connection each: how many there may be is each door's business.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), skip_auto_headers=("User-Agent",)
            )
        return self._session


class _Call:
    """One call that was let through: what is known of it, up to its bill. Without an order it costs nothing."""

    def __init__(
        self,
        order: Order | None,
        ledger: Ledger,
        door: Door,
        upstream: Upstream,
        *,
        granted: Granted | None = None,
        price: Price | None = None,
    ) -> None:
        self._order = order
        self._ledger = ledger
        self._door = door
        self._upstream = upstream
        self._granted = granted
        self._price = price
        self._began = time.monotonic()
        self._first_byte_ms: float | None = None
        self._status = 0
        self._meter: Meter | None = None
        self._bytes = 0
        self._whole = False
        self.sse = False
        self.note = ""

    def answered(self, answer: aiohttp.ClientResponse) -> None:
        self._status = answer.status
        self.sse = answer.content_type == "text/event-stream"
        if self._order is not None and answer.status < 300:
            guessed = self._order.least.tokens - _LEAST_OUTPUT_TOKENS if self.sse else self._order.least.tokens
            self._meter = Meter(self._upstream, model=self._order.model, sse=self.sse, guessed_input=max(0, guessed))

    def feed(self, chunk: bytes) -> bytes:
        if self._first_byte_ms is None:
            self._first_byte_ms = (time.monotonic() - self._began) * 1000
        self._bytes += len(chunk)
        return self._meter.feed(chunk) if self._meter is not None else chunk

    def over(self) -> str | None:
        """Why a stream must be cut now; None while it has money."""
        if not self.sse or self._meter is None or self._granted is None:
            return None
        counts = self._meter.counts_so_far()
        usd = self._price.usd(counts) if self._price is not None else None
        too_dear = usd is not None and self._granted.usd is not None and usd > self._granted.usd
        too_long = self._granted.tokens is not None and total(counts) > self._granted.tokens
        if not too_dear and not too_long:
            return None
        spent = f"${usd:.6f}" if too_dear else f"{total(counts):,} tokens"
        left = f"${self._granted.usd:.6f}" if too_dear else f"{self._granted.tokens:,} tokens"
        self.note = f"cut by the budget: the answer has cost about {spent}, of {left} that were left"
        return f"over budget: an answer of {self._meter.model} was cut when it had cost about {spent}, of {left} left"

    def end(self) -> bytes:
        self._whole = True
        return self._meter.end() if self._meter is not None else b""

    async def book(self, prices: Prices) -> None:
        assert self._order is not None
        order, meter = self._order, self._meter
        estimated = False
        counts: dict[str, int] = {}
        if meter is not None:
            estimated = not (self._whole and meter.told)
            counts = meter.counts(whole=not estimated)
            if self._whole and not meter.told:
                self.note = self.note or "the answer did not say what it used"
                counts |= {"input": meter.guessed_input, "output": text_tokens(self._bytes)}
        model = meter.model if meter is not None else order.model
        price = prices.of(model) or self._price
        cost = price.usd(counts) if price is not None else None if total(counts) else 0.0
        if cost is None:
            self.note = self.note or f"no price for {model} in the list of {prices.date}"
        counts.pop("cache_write_1h", None)
        bill = Bill(
            id=order.id,
            account=order.account,
            upstream=order.upstream,
            model=model,
            status=self._status,
            counts=counts,
            cost_usd=cost,
            latency_ms=(time.monotonic() - self._began) * 1000,
            first_byte_ms=self._first_byte_ms,
            streamed=self.sse,
            estimated=estimated,
            note=self.note,
        )
        for tried in range(1, _BOOK_TRIES + 1):
            try:
                await self._ledger.book(bill)
                return
            except StoreError as problem:
                if tried == _BOOK_TRIES:
                    # The reservation stays, and counts in full.
                    log.error("a model call could not be booked", call=bill.id, tokens=bill.tokens, error=str(problem))
                    return
                await asyncio.sleep(_BOOK_AGAIN_SECONDS)


# --- small parts ------------------------------------------------------------------------------------------------------


class _TooLarge(Exception):
    pass


class _Crowded(Exception):
    pass


async def _read(door: Door, request: web.BaseRequest, limit: int) -> bytes:
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
                if door.held_bytes > 2 * limit:
                    raise _Crowded
    except BaseException:
        door.held_bytes -= len(body)
        raise
    return bytes(body)


def _forwarded(request: web.BaseRequest, upstream: Upstream, key: str) -> dict[str, str]:
    named = {name.strip().lower() for name in request.headers.get("connection", "").split(",")}
    ours = {name.lower() for name in upstream.header}
    headers = {
        name: value
        for name, value in request.headers.items()
        if name.lower() not in _NOT_FORWARDED and name.lower() not in named and name.lower() not in ours
    }
    headers |= {name: text.replace("{key}", key) for name, text in upstream.header.items()}
    return headers | {"Accept-Encoding": "identity"}


def _returned(answer: aiohttp.ClientResponse) -> dict[str, str]:
    named = {name.strip().lower() for name in answer.headers.get("connection", "").split(",")}
    return {
        name: value
        for name, value in answer.headers.items()
        if name.lower() not in _NOT_RETURNED and name.lower() not in named and name.lower() != "content-length"
    }


def _event(kind: str, message: str) -> bytes:
    """An error within a stream, as the Messages API sends them."""
    body = {"type": "error", "error": {"type": kind, "message": message}}
    return f"event: error\ndata: {json.dumps(body)}\n\n".encode()


async def _ended(response: web.StreamResponse, request: web.BaseRequest) -> web.StreamResponse:
    """An answer that breaks off must be seen to: its connection ends without the last chunk."""
    if request.transport is not None:
        request.transport.close()
    return response


def _proxy_of(base_url: str) -> str | None:
    """The host's own proxy for this address, if the host's environment names one."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies_environment().get(parts.scheme)
