"""One forwarded call: what is known about it, when it must be cut, and its bill."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping
from typing import Final

import aiohttp

from swarm.base.log import logger
from swarm.errors import NotFound, StoreError
from swarm.gateway.metering_request import MeteredRequest
from swarm.gateway.prices import Price, Prices
from swarm.gateway.upstreams import Upstream
from swarm.gateway.usage import BYTES_PER_TOKEN, COUNTS, LEAST_OUTPUT_TOKENS, Meter, Share, total, without_usage
from swarm.ledger import Bill, Granted, Ledger, Order

log = logger(__name__)

# A kept connection that the service had closed breaks as soon as it is used: within this time.
_STALE_SECONDS: Final = 5.0
_UNSEEN: Final = "the answer was not seen to its end: counted with all that it may have cost"
_MAX_USD: Final = 1e9  # of one call, for the engine
# How quickly models write, at most: nobody sees how much they have thought when an answer breaks off.
_TOKENS_PER_SECOND: Final = 300
_BOOK_TRIES, _BOOK_AGAIN_SECONDS = 20, 0.5


class Call:
    """``order`` and ``metered`` are None for calls that cost nothing. ``asked_output``: the limit of an answer that
    the request had, if the budget affords only a lower one."""

    def __init__(
        self,
        order: Order | None,
        metered: MeteredRequest | None,
        ledger: Ledger,
        upstream: Upstream,
        *,
        granted: Granted | None = None,
        price: Price | None = None,
        asked_output: int = 0,
    ) -> None:
        self._asked_output = asked_output  # 0: the request's own limit was kept
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
        self._room_bytes = 0.0  # so many may pass before the budget has to be looked at
        self._complete = False
        self._unsent_bytes: int | None = None  # of the request's body; None before its head was sent
        self._sent_at = 0.0
        self._kept = False  # was it sent over a connection that had served another call?
        self._stale = False
        self.sse = False
        self.note = ""
        self.failed = True  # until a bill says otherwise

    def sending(self, body_bytes: int, *, kept: bool = False) -> None:
        self._kept = self._kept or kept
        self._unsent_bytes = body_bytes

    def body_sent(self, size: int) -> None:
        if self._unsent_bytes is not None:
            self._unsent_bytes -= size
            self._sent_at = time.monotonic()

    @property
    def sent(self) -> bool:
        """May the service have received it? No service works on a part of a request."""
        return self._unsent_bytes is not None and self._unsent_bytes <= 0

    def connection_lost(self) -> None:
        """The service has closed the connection without a byte of an answer."""
        self._stale = self._kept and time.monotonic() - self._sent_at < _STALE_SECONDS

    def answer_started(self, answer: aiohttp.ClientResponse) -> None:
        self._status = answer.status
        self.sse = answer.content_type == "text/event-stream"
        if self._metered is not None:
            self._meter = Meter(
                self._upstream,
                model=self._metered.model,
                prompt=self._metered.likely_prompt,
                max_output=self._most_output,
                streams=self._metered.streams,
                sse=self.sse,
            )

    def feed(self, chunk: bytes) -> bytes:
        if self._first_byte_ms is None:
            self._first_byte_ms = (time.monotonic() - self._began) * 1000
        if self._meter is None:
            return chunk
        events = self._meter.feed(chunk)
        # A report of usage can cost more than its bytes.
        self._room_bytes = 0 if b"usage" in events else self._room_bytes - len(events)
        return self._shown(events)

    def _shown(self, events: bytes) -> bytes:
        """What the client asked for."""
        return without_usage(events) if self.changes_answer else events

    @property
    def changes_answer(self) -> bool:
        return self.sse and self._metered is not None and self._metered.unasked_usage

    def cut_reason(self) -> str | None:
        """Why a stream must be cut now; None while it is within its budget, and when it has ended."""
        if not self.sse or self._meter is None or self._granted is None or self._room_bytes > 0:
            return None
        if self._granted.usd is None and self._granted.tokens is None:
            return None
        counts = self._meter.counts_so_far()
        if self._upstream.output_limit:  # the service keeps it, and bytes say less than it does
            counts["output"] = min(counts["output"], self._most_output)
        usd = self._price.usd(counts) if self._price is not None else None
        too_expensive = usd is not None and self._granted.usd is not None and usd > self._granted.usd
        too_long = self._granted.tokens is not None and total(counts) > self._granted.tokens
        if self._meter.ended or (not too_expensive and not too_long):
            self._room_bytes = self._room(counts)
            return None
        spent = f"${usd:.6f}" if too_expensive else f"{total(counts):,} tokens"
        left = f"${self._granted.usd:.6f}" if too_expensive else f"{self._granted.tokens:,} tokens"
        self.note = f"cut by the budget: the answer has cost about {spent}, of {left} that were left"
        return f"over budget: an answer of {self._meter.model} was cut when it had cost about {spent}, of {left} left"

    def _room(self, counts: Mapping[str, int]) -> float:
        """How many bytes of text the budget has room for beside ``counts``: parsing each event as it passes would take
        longer than passing it on."""
        assert self._granted is not None
        tokens = math.inf if self._granted.tokens is None else self._granted.tokens - total(counts)
        if self._price is not None and self._granted.usd is not None:
            usd = self._price.usd(counts)
            thousand = self._price.usd({**counts, "output": counts["output"] + 1000}) - usd
            tokens = min(tokens, (self._granted.usd - usd) / thousand * 1000 - 1 if thousand > 0 else math.inf)
        return tokens * BYTES_PER_TOKEN

    @property
    def _most_output(self) -> int:
        return self._metered.counts()["output"] if self._metered is not None else 0

    def limit_reached(self) -> str | None:
        """Why the budget is used up by a whole answer, which ended at the limit that the budget set."""
        meter, granted = self._meter, self._granted
        if not self._asked_output or meter is None or granted is None or not meter.usage_reported(ended=True):
            return None
        if sum(share.counts["output"] for share in meter.reported() if "output" in share.counts) < self._most_output:
            return None
        limit = "" if self._metered is None else f"{self._metered.max_output:,}"
        self.note = f"the answer ended at {limit} tokens, of {self._asked_output:,} asked for: the budget had no more"
        if not granted.short:  # there is more when the calls under way have ended
            return None
        return f"over budget: an answer of {meter.model} ended at {limit} tokens, because {granted.short}"

    def end(self) -> bytes:
        self._complete = True
        return self._shown(self._meter.end()) if self._meter is not None else b""

    def _used(self, metered: MeteredRequest) -> tuple[list[Share], bool]:
        """What the service bills, and whether that is an estimate."""
        meter = self._meter
        if meter is None and not self.sent:
            self.note = self.note or "it was not sent"
            return [], False
        if meter is None and self._stale:
            self.note = "the service had closed the connection before the call: counted as not received"
            return [], True
        if meter is None:
            # The service works on a request even when its client has disconnected.
            self.note = self.note or _UNSEEN
            most = metered.counts()
            least = max(min(most["output"], LEAST_OUTPUT_TOKENS), self._written) if metered.streams else most["output"]
            return [Share(model="", counts={**most, "output": least})], True
        if meter.usage_reported(ended=self._complete):
            shares = meter.reported()
            if meter.doubted:
                self.note = self.note or "the answer reports numbers that can't be right"
            return shares, meter.doubted
        if self._status >= 300:
            return [], False
        if meter.error and (self.sse or self._complete):
            self.note = self.note or f"the service answered with an error: {meter.error}"
            return [], False
        if self._complete:
            why = f"broke off with an error: {meter.failure}" if meter.failure else "did not say what it used"
            self.note = self.note or f"the answer {why}"
        elif not self.sse:
            self.note = self.note or _UNSEEN
        counts = meter.estimated(ended=self._complete)
        if not self._complete:
            # What came may be less than what was written: thinking is hidden or summarized, and text can be dense.
            counts["output"] = max(counts["output"], self._written)
            if not meter.prompt_reported:
                counts |= {kind: count for kind, count in metered.counts().items() if kind != "output"}
        return [Share(model="", counts=counts)], True

    @property
    def _written(self) -> int:
        """The most that the model can have written by now."""
        return min(self._most_output, round((time.monotonic() - self._began) * _TOKENS_PER_SECOND))

    def abandon(self) -> None:
        """The client disconnected before the call was sent."""
        self.note = "the client disconnected before the call was sent"

    def _surcharge(self, metered: MeteredRequest) -> str:
        """That of the request, as far as the answer doesn't say how the call was served in truth."""
        found = dict(word.split("=", 1) for word in metered.surcharge.split())
        for field, value in (self._meter.words if self._meter is not None else {}).items():
            if f"{field}={value}" in self._upstream.list_price:
                found.pop(field, None)
            elif re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", value):
                found[field] = value
        order = [surcharge.partition("=")[0] for surcharge in self._upstream.surcharges]  # as in price lists
        found = dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
        return "".join(f" {field}={value}" for field, value in found.items())

    def _price_of(
        self, model: str, surcharge: str, metered: MeteredRequest, prices: Prices, *, part: bool
    ) -> tuple[Price | None, str]:
        """The price, and why it is not quite the right one. ``part``: is the model another one than the answer's?"""
        if (price := prices.of(model, surcharge)) is not None:
            return price, ""
        why = f"no price for {model}{surcharge} in the list of {prices.date}: counted at"
        if surcharge != metered.surcharge:  # not asked for, so no budget could refuse it: a lower price is better
            kept = ""
            for word in surcharge.split():
                kept += f" {word}" if prices.of(model, f"{kept} {word}") is not None else ""
            if (price := prices.of(model, kept) or self._price) is not None:
                return price, f"{why} that of {model}{kept}"
        return self._price, f"{why} that of {metered.model}" if part else ""

    async def book(self, prices: Prices) -> None:
        assert self._order is not None
        assert self._metered is not None
        order, metered = self._order, self._metered
        shares, estimated = self._used(metered)
        name = metered.model if self._meter is None else self._meter.model
        surcharge = self._surcharge(metered)
        model, cost = name + surcharge, 0.0
        for share in shares:
            price, why = self._price_of(
                share.model or name, surcharge, metered, prices, part=share.model not in ("", name)
            )
            if why:
                estimated, self.note = True, self.note or why
            if price is not None:
                cost += price.usd(share.counts)
            elif total(share.counts):
                cost = math.nan
        unpriced = math.isnan(cost)
        if unpriced:
            self.note = self.note or f"no price for {model} in the list of {prices.date}"
        counts = {kind: sum(share.counts.get(kind, 0) for share in shares) for kind in COUNTS}
        bill = Bill(
            id=order.id,
            account=order.account,
            upstream=order.upstream,
            model=model,
            status=self._status,
            counts=counts,
            cost_usd=None if unpriced else min(cost, _MAX_USD),
            latency_ms=(time.monotonic() - self._began) * 1000,
            first_byte_ms=self._first_byte_ms,
            streamed=self.sse,
            estimated=estimated,
            note=self.note,
        )
        self.failed = bill.failed
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
