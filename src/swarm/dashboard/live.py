"""Tells an open page that what it shows has changed, at most once a second: it then fetches its parts again. What is
sent tells nothing about what has changed, so all that may read a page may follow it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from pydantic import Field
from starlette.responses import StreamingResponse
from starlette.routing import Route

from swarm.api.endpoint import EVENT_STREAM, Call, Context, Endpoint, Fields, route
from swarm.api.v1.events import KEEP_ALIVE_SECONDS
from swarm.api.v1.tickets import ticket_id_of
from swarm.model import Role

LEAST_SECONDS: Final = 1.0
_AT_FULL_PACE: Final = 4  # pages


class _Query(Fields):
    ticket: str | None = Field(default=None, max_length=200, description="only changes of this one")


class Live:
    """All open pages. The more there are, the rarer each is told: together they ask for about as much."""

    def __init__(self) -> None:
        self._open = 0

    async def follow(self, call: Call) -> StreamingResponse:
        ticket = call.query.ticket
        if ticket is not None:
            ticket = await ticket_id_of(call, ticket)
        return StreamingResponse(
            self._stream(call.context, ticket),
            media_type=EVENT_STREAM,
            headers={"cache-control": "no-store"},
        )

    async def _stream(self, context: Context, ticket_id: str | None) -> AsyncIterator[bytes]:
        """Once at the beginning: something may have changed since the page was made."""
        seen: object = None
        self._open += 1
        try:
            while not context.feed.closed:
                since = context.feed.now(ticket_id)
                state = object() if ticket_id is None else await _state(context, ticket_id)
                if state != seen:
                    seen = state
                    yield b"event: update\ndata: 1\n\n"
                    await context.feed.pause(LEAST_SECONDS * max(1.0, self._open / _AT_FULL_PACE))
                if (
                    not await context.feed.changed(since, timeout_seconds=KEEP_ALIVE_SECONDS)
                    and not context.feed.closed
                ):
                    yield b": \n\n"
        finally:
            self._open -= 1


async def _state(context: Context, ticket_id: str) -> tuple[str, int]:
    states = await context.store.ticket_states([ticket_id])  # none: it was deleted
    return states.get(ticket_id, ""), await context.store.last_event(ticket_id)


def live(context: Context) -> Route:
    endpoint = Endpoint(
        method="GET",
        path="/live",
        role=Role.VIEWER,
        summary="Tells a page of changes (Server-Sent Events)",
        handler=Live().follow,
        query=_Query,
        media_type=EVENT_STREAM,
    )
    return route(endpoint, context)
