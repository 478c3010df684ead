"""One forwarded call: what is known about it, when it must be cut, and its bill."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import aiohttp
import structlog

from swarm.errors import NotFound, StoreError
from swarm.gateway.metering_request import MeteredRequest
from swarm.gateway.prices import Price, Prices
from swarm.gateway.upstreams import Upstream
from swarm.gateway.usage import COUNTS, Meter, text_tokens, total
from swarm.ledger import Bill, Granted, Ledger, Order

log = structlog.get_logger(__name__)

# A call that streams is made only if the budget allows an answer of this length.
LEAST_OUTPUT_TOKENS: Final = 64
_BOOK_TRIES, _BOOK_AGAIN_SECONDS = 20, 0.5


class Call:
    """``order`` and ``metered`` are None for calls that cost nothing."""

    def __init__(
        self,
        order: Order | None,
        metered: MeteredRequest | None,
        ledger: Ledger,
        upstream: Upstream,
        *,
        granted: Granted | None = None,
        price: Price | None = None,
    ) -> None:
        self._order = order
        self._metered = metered
        self._ledger = ledger
        self._upstream = upstream
        self._granted = granted
        self._price = price
        self._began = time.monotonic()
        self._first_byte_ms: float | None = None
        self._status = 0
        self._meter: Meter | None = None
        self._bytes = 0
        self._complete = False
        self.sse = False
        self.sent = True  # the service may have received it
        self.note = ""

    def answer_started(self, answer: aiohttp.ClientResponse) -> None:
        self._status = answer.status
        self.sse = answer.content_type == "text/event-stream"
        if self._metered is not None and answer.status < 300:
            estimate = total(self._metered.prompt)
            self._meter = Meter(self._upstream, model=self._metered.model, sse=self.sse, estimated_input=estimate)

    def feed(self, chunk: bytes) -> bytes:
        if self._first_byte_ms is None:
            self._first_byte_ms = (time.monotonic() - self._began) * 1000
        self._bytes += len(chunk)
        return self._meter.feed(chunk) if self._meter is not None else chunk

    def cut_reason(self) -> str | None:
        """Why a stream must be cut now; None while it is within its budget."""
        if not self.sse or self._meter is None or self._granted is None:
            return None
        counts = self._meter.counts_so_far()
        usd = self._price.usd(counts) if self._price is not None else None
        too_expensive = usd is not None and self._granted.usd is not None and usd > self._granted.usd
        too_long = self._granted.tokens is not None and total(counts) > self._granted.tokens
        if not too_expensive and not too_long:
            return None
        spent = f"${usd:.6f}" if too_expensive else f"{total(counts):,} tokens"
        left = f"${self._granted.usd:.6f}" if too_expensive else f"{self._granted.tokens:,} tokens"
        self.note = f"cut by the budget: the answer has cost about {spent}, of {left} that were left"
        return f"over budget: an answer of {self._meter.model} was cut when it had cost about {spent}, of {left} left"

    def end(self) -> bytes:
        self._complete = True
        return self._meter.end() if self._meter is not None else b""

    def _counts(self, metered: MeteredRequest) -> tuple[dict[str, int], bool]:
        """Tokens by kind, and whether they are an estimate."""
        meter = self._meter
        if meter is None and (self._status or not self.sent):  # refused, or never sent
            return {}, False
        if meter is None or not (self.sse or self._complete):
            # The service works on a request even when its client has disconnected.
            self.note = self.note or "the answer was not seen to its end: counted with all that it may have cost"
            output = min(metered.max_output, LEAST_OUTPUT_TOKENS) if metered.streams else metered.max_output
            return {**metered.prompt, "output": output}, True
        if self._complete and meter.usage_reported:
            return meter.counts(complete=True), False
        counts = meter.counts(complete=False)
        if self._complete:
            self.note = self.note or "the answer did not say what it used"
            counts |= {"input": meter.estimated_input, "output": text_tokens(self._bytes)}
        return counts, True

    @property
    def failed(self) -> bool:
        return not 200 <= self._status < 300

    def abandon(self) -> None:
        """The client disconnected before the call was sent."""
        self.sent = False
        self.note = "the client disconnected before the call was sent"

    async def book(self, prices: Prices) -> None:
        assert self._order is not None
        assert self._metered is not None
        order, meter, surcharge = self._order, self._meter, self._metered.surcharge
        counts, estimated = self._counts(self._metered)
        name = meter.model if meter is not None else self._metered.model
        model, price = name + surcharge, prices.of(name, surcharge) or self._price
        cost = price.usd(counts) if price is not None else None if total(counts) else 0.0
        if cost is None:
            self.note = self.note or f"no price for {model} in the list of {prices.date}"
        counts = {kind: count for kind, count in counts.items() if kind in COUNTS}
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
        for attempt in range(1, _BOOK_TRIES + 1):
            try:
                await self._ledger.book(bill)
                return
            except NotFound:  # its listener is closed: the engine has booked what it might have cost
                return
            except StoreError as problem:
                if attempt == _BOOK_TRIES:
                    # The reservation stays and counts in full.
                    log.error("a model call could not be booked", call=bill.id, tokens=bill.tokens, error=str(problem))
                    return
                await asyncio.sleep(_BOOK_AGAIN_SECONDS)
