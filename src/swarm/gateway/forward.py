"""The gateway: adds the key to an agent's calls, forwards them, streams the answers back, counts and books them.

A call's budget is reserved before it is sent, and booked when its answer has ended, for whatever reason. The guest's
request is bounded, checked, and lowered to what a budget affords. The service's answer is passed on, errors and rate
limits included, without the key and without a report of usage that only the gateway asked for; a budget may cut it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Final, TypeVar

import aiohttp
import yarl
from aiohttp import web

from swarm.base.aio import finish_uninterrupted
from swarm.base.log import logger
from swarm.errors import LeaseLost, NotFound, StoreError
from swarm.gateway import wire
from swarm.gateway.attempt_listener import AllowedRequest, AttemptListener, Record
from swarm.gateway.call import Call
from swarm.gateway.metering_request import AmbiguousRequest, MeteredRequest, countable, lowered, read
from swarm.gateway.passage import GuestGone, Passage, to_guest
from swarm.gateway.prices import Price, Prices
from swarm.gateway.upstreams import Upstream
from swarm.gateway.usage import COUNTS, json_of, total
from swarm.gateway.wire import error
from swarm.ledger import Account, Busy, Granted, Ledger, Limit, Order, Refused, Reservation, Spend

log = logger(__name__)

_CONNECT_SECONDS: Final = 10.0
_BODY_SECONDS: Final = 120.0  # in which a guest must have sent its request
# How long a call waits until others release what they reserved of a budget.
_BUSY_SECONDS: Final = 60.0
_LOOK_AGAIN_SECONDS: Final = 0.25
_COUNT_SECONDS: Final = 15.0  # in which a service must have counted a prompt
_COUNT_BYTES: Final = 64 * 1024
_MOST_USD: Final = 1e9  # of one call: what the books take
# Larger bodies are parsed in a thread, which takes longer to start than parsing a small one takes.
_SMALL_BYTES: Final = 64 * 1024

T = TypeVar("T")


class Gateway:
    """`open_listener` opens it for one attempt. ``day``: what all calls of a day may cost together. Close all listeners
    before the gateway."""

    def __init__(self, *, prices: Prices, ledger: Ledger, day: Limit) -> None:
        self._prices = prices
        self._ledger = ledger
        self._day = day
        self._session: aiohttp.ClientSession | None = None
        self._budget_freed = asyncio.Event()  # a call has released its reservation

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def open_listener(
        self,
        account: Account,
        services: Mapping[str, tuple[Upstream, str]],
        *,
        sock: socket.socket,
        url: str,
        token: str,
        record: Record,
    ) -> AttemptListener:
        """Serve one attempt's calls of these services until the caller closes the listener. ``sock`` listens where only
        the attempt's VM can connect, and is closed with the listener; ``url`` is its address as the VM sees it."""
        return AttemptListener(
            account=account,
            services=services,
            sock=sock,
            url=url,
            token=token,
            record=record,
            forward=self._forward,
        )

    # --- one call -----------------------------------------------------------------------------------------------------

    async def _forward(self, request: AllowedRequest) -> web.StreamResponse:
        listener, limit = request.listener, int(request.upstream.body_mb * 1e6)
        if request.metered and listener.too_many_failed:  # its body is not even read
            listener.refuse("failures", path=request.target[:200])
            why = f"gateway: too many calls of this attempt have failed ({listener.failed_calls})"
            return error(429, "rate_limit_error", why, **{"x-should-retry": "false"})
        try:
            body = await _read_body(request, limit)
        except _BodyTooLarge:
            listener.refuse("body", path=request.target[:200], limit_bytes=limit)
            return error(413, "request_too_large", f"a request may have at most {limit} bytes")
        except _TooManyBytesHeld:
            return error(429, "rate_limit_error", "too many large requests at once", **{"retry-after": "1"})
        except wire.UnreadableBody as problem:
            listener.refuse("encoding", path=request.target[:200], why=str(problem))
            return error(415, "invalid_request_error", f"gateway: {problem}")
        except TimeoutError:
            return error(408, "invalid_request_error", "the request did not arrive completely in time")
        try:
            if request.metered:
                return await self._forward_metered(request, body)
            return await self._send(Call(None, None, self._ledger, request.upstream), request, body)
        finally:
            listener.held_bytes -= len(body)

    async def _forward_metered(self, request: AllowedRequest, body: bytes) -> web.StreamResponse:
        listener, upstream = request.listener, request.upstream
        try:
            metered, body = await self._parsed(listener, body, functools.partial(read, body, upstream))
        except asyncio.CancelledError:
            listener.failed_calls += 1
            listener.invalid_bytes += len(body)
            raise
        except AmbiguousRequest as problem:
            listener.failed_calls += 1
            listener.invalid_bytes += len(body)
            listener.refuse("request", why=str(problem), bytes=len(body))
            return error(400, "invalid_request_error", f"gateway: {problem}")
        price = self._prices.of(metered.model, metered.surcharge)
        order = self._order(listener.account, upstream, metered, price)
        try:
            metered, order, granted = await self._afford(request, body, metered, price, order)
        except asyncio.CancelledError:
            listener.failed_calls += 1
            call = Call(order, metered, self._ledger, upstream)
            call.abandon()
            await finish_uninterrupted(call.book(self._prices))
            raise
        except (NotFound, LeaseLost) as gone:
            return error(403, "permission_error", str(gone), **{"x-should-retry": "false"})
        except StoreError as problem:
            log.warning("a model call can't be booked", error=str(problem), attempt=listener.account.attempt_id)
            return error(503, "api_error", "the gateway can't reach its database; try again", **{"retry-after": "2"})
        if isinstance(granted, Refused):
            listener.refuse("budget", model=order.model, why=granted.message)
            listener.exceed(granted.message)
            return error(402, "billing_error", granted.message, **{"x-should-retry": "false"})
        if isinstance(granted, Busy):
            return error(429, "rate_limit_error", granted.message, **{"retry-after": "5"})
        asked = metered
        call = Call(order, metered, self._ledger, upstream)
        call.abandon()  # until it is sent
        try:
            metered = metered.fitted(lambda counts: _fits(_spend(counts, price), order.most, granted))
            if not upstream.output_limit:  # nothing says where
                metered = replace(metered, max_output=asked.max_output)
            limited = granted.usd is not None or granted.tokens is not None
            if limited and (metered != asked or metered.open_ended):
                body = await self._parsed(listener, body, functools.partial(lowered, body, upstream, metered))
            less = asked.max_output if metered.max_output < asked.max_output else 0
            call = Call(order, metered, self._ledger, upstream, granted=granted, price=price, asked_output=less)
            response = await self._send(call, request, body)
            if (reason := call.limit_reached()) is not None:
                listener.exceed(reason)
            return response
        finally:
            try:
                await finish_uninterrupted(call.book(self._prices))
            finally:  # only now is it known whether the call cost anything
                listener.failed_calls += call.failed
                self._budget_freed.set()

    async def _parsed(self, listener: AttemptListener, body: bytes, work: Callable[[], T]) -> T:
        async with listener.parse_lock:  # one body of an attempt at a time: others have calls, too
            return await _in_thread(work) if len(body) > _SMALL_BYTES else work()

    def _order(self, account: Account, upstream: Upstream, metered: MeteredRequest, price: Price | None) -> Order:
        worst = metered.counts()
        most = _spend(worst, price)
        return Order(
            id=uuid.uuid4().hex,
            account=account,
            upstream=upstream.name,
            model=metered.model + metered.surcharge,
            counts={kind: count for kind, count in worst.items() if kind in COUNTS},
            most=most,
            least=most,
            day=self._day,
        )

    async def _afford(
        self, request: AllowedRequest, body: bytes, metered: MeteredRequest, price: Price | None, order: Order
    ) -> tuple[MeteredRequest, Order, Reservation]:
        """Reserve the call as it is, or else with less output and fewer uses of tools than it asks for."""
        granted = await finish_uninterrupted(self._ledger.reserve(order))
        if isinstance(granted, Granted):
            return metered, order, granted
        if (tokens := await self._counted(request, body)) is not None:
            metered = metered.counted(tokens)
            exact = self._order(order.account, request.upstream, metered, price)
            order = replace(exact, id=order.id)
        for least in (metered.enough, metered.least):
            order = replace(order, least=_spend(least, price))
            granted = await self._reserve(request.listener, order)
            if not isinstance(granted, Refused):
                break
        return metered, order, granted

    async def _counted(self, request: AllowedRequest, body: bytes) -> int | None:
        """The tokens of the prompt, as the service counts them; None if it doesn't."""
        upstream = request.upstream
        if not upstream.count:
            return None
        asked = await self._parsed(request.listener, body, functools.partial(countable, body, upstream))
        query = request.target.partition("?")[2]
        url = yarl.URL(upstream.base_url + upstream.count + (f"?{query}" if query else ""), encoded=True)
        try:
            async with self._client().post(
                url,
                headers=wire.forwarded(request.http, upstream, request.key, decompressed=True),
                data=io.BytesIO(asked),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=_COUNT_SECONDS, sock_connect=_CONNECT_SECONDS),
                proxy=wire.proxy_of(upstream.base_url),
                trace_request_ctx=(Call(None, None, self._ledger, upstream), len(asked)),
            ) as answer:
                said = json_of(await answer.content.read(_COUNT_BYTES)) if answer.status == 200 else {}
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError):
            return None
        tokens = said.get("input_tokens") if isinstance(said, dict) else None
        return tokens if isinstance(tokens, int) and 0 < tokens <= upstream.context_tokens else None

    async def _reserve(self, listener: AttemptListener, order: Order) -> Reservation:
        deadline = time.monotonic() + _BUSY_SECONDS
        reservation = await finish_uninterrupted(self._ledger.reserve(order))
        if not isinstance(reservation, Busy):
            return reservation
        # Only one call of each listener may retry at a time: more would keep others from the database.
        async with listener.reserve_lock:
            while isinstance(reservation, Busy) and time.monotonic() < deadline:
                self._budget_freed.clear()
                reservation = await finish_uninterrupted(self._ledger.reserve(order))
                if isinstance(reservation, Busy):
                    with contextlib.suppress(TimeoutError):  # calls of other processes don't set the event
                        async with asyncio.timeout(_LOOK_AGAIN_SECONDS):
                            await self._budget_freed.wait()
        return reservation

    async def _send(self, call: Call, request: AllowedRequest, body: bytes) -> web.StreamResponse:
        upstream = request.upstream
        headers = wire.forwarded(request.http, upstream, request.key, decompressed=request.metered)
        masker = wire.KeyMasker(request.key)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, connect=_CONNECT_SECONDS)
        url = yarl.URL(upstream.base_url + request.target, encoded=True)
        response: web.StreamResponse | None = None
        try:
            async with (
                asyncio.timeout(upstream.idle_seconds) as idle_timeout,
                self._client().request(
                    request.http.method,
                    url,
                    headers=headers,
                    data=io.BytesIO(body) if body else None,  # a large body is sent in pieces
                    allow_redirects=False,  # a key goes only to the service that it is for
                    timeout=timeout,
                    proxy=wire.proxy_of(upstream.base_url),
                    trace_request_ctx=(call, len(body)),
                ) as answer,
            ):
                call.answer_started(answer)
                if packed := wire.unreadable(answer):
                    call.note = f"{upstream.name} answered with {packed}, and was asked for none"
                    return error(502, "api_error", f"gateway: {call.note}")
                response = web.StreamResponse(
                    status=answer.status,
                    reason=masker.text(answer.reason or ""),
                    headers=wire.returned(answer, masker),
                )
                if answer.content_length is not None and not (call.changes_answer or wire.is_decompressed(answer)):
                    response.content_length = answer.content_length
                idle_timeout.reschedule(None)  # from here on, `Passage` has an eye on it
                await to_guest(response.prepare(request.http))
                chunked = response.headers.get("transfer-encoding") == "chunked"
                passage = Passage(call, masker, answer, guest=request.http, chunked=chunked)
                reason = await passage.run(idle_seconds=upstream.idle_seconds)
                if reason is not None:
                    request.listener.exceed(reason)
                    passage.write(wire.event("billing_error", reason))
                elif rest := masker.feed(call.end()) + masker.end():
                    passage.write(rest)
            await to_guest(response.write_eof())
            return response
        except GuestGone:  # before this call was cancelled for it; the service is not to blame
            return response or web.Response()
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            if response is None and isinstance(problem, aiohttp.ServerDisconnectedError | ConnectionError):
                call.connection_lost()
            late = isinstance(problem, TimeoutError)
            why = f"{upstream.name} was silent for too long" if late else f"{upstream.name} can't be reached"
            if isinstance(problem, aiohttp.ClientResponseError):
                why = f"the answer of {upstream.name} can't be read"
            call.note = f"{why}: {type(problem).__name__}"
            if response is None:
                return error(504 if late else 502, "timeout_error" if late else "api_error", f"gateway: {call.note}")
            if call.sse and late:
                await response.write(wire.event("api_error", f"gateway: {call.note}"))
            if request.http.transport is not None:  # the guest must see that the answer is incomplete: no last chunk
                request.http.transport.close()
            return response

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit here: each listener limits the connections of its VM.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent",),
                trace_configs=[_watch()],
            )
        return self._session


def _watch() -> aiohttp.TraceConfig:
    """Tells calls how far their requests have come: which of them are billed depends on it."""

    async def reused(_: object, context: SimpleNamespace, params: object) -> None:
        call, size = context.trace_request_ctx
        call.sending(size, kept=True)

    async def headers_sent(_: object, context: SimpleNamespace, params: object) -> None:
        call, size = context.trace_request_ctx
        call.sending(size)

    async def chunk_sent(_: object, context: SimpleNamespace, params: aiohttp.TraceRequestChunkSentParams) -> None:
        call, _ = context.trace_request_ctx
        call.body_sent(len(params.chunk))

    watch = aiohttp.TraceConfig()
    watch.on_connection_reuseconn.append(reused)
    watch.on_request_headers_sent.append(headers_sent)
    watch.on_request_chunk_sent.append(chunk_sent)
    return watch


def _spend(counts: Mapping[str, int], price: Price | None) -> Spend:
    return Spend(tokens=total(counts), usd=None if price is None else min(price.usd(counts), _MOST_USD))


def _fits(spend: Spend, most: Spend, granted: Granted) -> bool:
    """Is it within what was reserved, of ``most``, when that much was granted?"""
    fits = granted.tokens is None or spend.tokens <= min(most.tokens, granted.tokens)
    if granted.usd is None or spend.usd is None or most.usd is None:
        return fits
    return fits and spend.usd <= min(most.usd, granted.usd)


async def _in_thread(work: Callable[[], T]) -> T:
    """Also if it is cancelled, it ends when the thread has: what that works on counts as held until then."""

    def outcome() -> tuple[T, None] | tuple[None, Exception]:
        try:
            return work(), None
        except Exception as problem:
            return None, problem

    done = await finish_uninterrupted(asyncio.to_thread(outcome))
    if done[1] is not None:
        raise done[1]
    return done[0]


class _BodyTooLarge(Exception):
    pass


class _TooManyBytesHeld(Exception):
    """The request bodies of this VM take too much memory together."""


async def _read_body(request: AllowedRequest, limit: int) -> bytes:
    """The whole body, of metered calls decompressed, and counted in ``held_bytes``. Raises _BodyTooLarge,
    _TooManyBytesHeld, UnreadableBody, TimeoutError."""
    listener, held = request.listener, 0

    def hold(size: int) -> None:
        nonlocal held
        held += size
        listener.held_bytes += size
        if held > limit:
            raise _BodyTooLarge
        if listener.held_bytes > 4 * limit:
            raise _TooManyBytesHeld

    if (request.http.content_length or 0) > limit:
        raise _BodyTooLarge
    await wire.answer_expectation(request.http)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.http.content.iter_any():
                body += chunk
                hold(len(chunk))
        encoding = request.http.headers.get("content-encoding", "identity")
        if not request.metered or encoding.lower() == "identity":
            return bytes(body)
        async with listener.parse_lock:
            try:
                plain = await _in_thread(functools.partial(wire.decompressed, bytes(body), encoding, limit + 1))
                hold(len(plain) - held)
            except (wire.UnreadableBody, _BodyTooLarge):
                listener.failed_calls += 1  # it was work, and few bytes make much of it
                raise
        return plain
    except BaseException:
        listener.held_bytes -= held
        raise
