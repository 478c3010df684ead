"""What runs, what waits, what failed in the last hour, and what it costs: for somebody who has five seconds."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from swarm.admin.engines import Engine, engines
from swarm.api.endpoint import Context
from swarm.dashboard.render import Page, here, html
from swarm.dashboard.spent import Hours
from swarm.store.registry.tokens import Actor
from swarm.store.sql.rows import QueueStatus
from swarm.store.tickets.display import RunningAttempt

_SHOWN: Final = 50
_HOUR_SECONDS: Final = 3600.0
_TOGETHER_SECONDS: Final = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    queue: QueueStatus
    running: list[RunningAttempt]
    hour: dict[str, int]
    engines: list[Engine]
    spent_usd: float
    unpriced_calls: int
    spent_is_all: bool


class Now:
    """Many open pages cost no more than one: what was read a moment ago is shown to all of them."""

    def __init__(self, hours: Hours) -> None:
        self._hours = hours
        self._seen: asyncio.Event | None = None  # set when what was read is no longer so
        self._read_at = 0.0
        self._overview: Overview | None = None
        self._reading = asyncio.Lock()

    def page(self) -> Page:
        async def show(context: Context, request: Request, actor: Actor) -> Response:
            if actor.project_id is not None:  # all else tells of other projects
                running = await context.store.running_attempts(project_id=actor.project_id, limit=_SHOWN)
                return html("now.html", actor=actor, here=here(request), whole=None, running=running, served=True)
            whole = await self._whole(context, patient="hx-request" in request.headers)
            served = any(engine.alive for engine in whole.engines)
            return html("now.html", actor=actor, here=here(request), whole=whole, running=whole.running, served=served)

        return show

    async def _whole(self, context: Context, *, patient: bool) -> Overview:
        """``patient``: an open page asks again, and what was read is read again once a second for all of them."""
        asked = time.monotonic()
        if patient and (left := self._read_at + _TOGETHER_SECONDS - asked) > 0 and not self._is_current():
            await asyncio.sleep(left)
        async with self._reading:
            if self._overview is None or not (self._is_current() or self._read_at >= asked):
                seen, read_at = context.feed.now(), time.monotonic()
                self._overview = await _overview(context, self._hours)
                self._seen, self._read_at = seen, read_at
            return self._overview

    def _is_current(self) -> bool:
        return self._seen is not None and not self._seen.is_set()


async def _overview(context: Context, hours: Hours) -> Overview:
    store = context.store
    today = await hours.since(store, datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0))
    spent = [row for row in today.rows if row.hour[:10] == f"{datetime.now(UTC):%Y-%m-%d}"]
    return Overview(
        queue=await store.queue(),
        running=await store.running_attempts(limit=_SHOWN),
        hour=await store.attempts_since(_HOUR_SECONDS),
        engines=await engines(store),
        spent_usd=sum(row.cost_usd for row in spent),
        unpriced_calls=sum(row.unpriced for row in spent),
        spent_is_all=today.complete,
    )
