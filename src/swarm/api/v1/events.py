"""Events and output: a range at a time, or as they come (Server-Sent Events, which continue after `Last-Event-ID`)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import Field
from starlette.responses import StreamingResponse

from swarm.api.endpoint import Call, Context, Endpoint, Fields
from swarm.api.v1.tickets import own_ticket
from swarm.base.plain import plain
from swarm.errors import NotFound, UsageError
from swarm.model import TERMINAL_TICKET_STATES, Event, Role

KEEP_ALIVE_SECONDS: Final = 15.0
AT_ONCE: Final = 100  # events of one read: each may have 16 KiB


class RangeQuery(Fields):
    after: int = Field(default=0, ge=0, lt=1 << 63, description="only events with a greater `seq`")
    limit: int = Field(default=100, ge=1, le=1000)


class LiveQuery(Fields):
    after: int | None = Field(
        default=None,
        ge=0,
        lt=1 << 63,
        description="only events with a greater `seq`; the header Last-Event-ID counts first",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """``after``: the last one's `seq`, for the next range."""

    events: list[Event]
    after: int


async def list_events(call: Call) -> Events:
    query: RangeQuery = call.query
    ticket = await own_ticket(call)
    found = await call.store.events(ticket.id, after=query.after, limit=query.limit)
    return Events(events=found, after=found[-1].seq if found else query.after)


async def follow_events(call: Call) -> StreamingResponse:
    ticket = await own_ticket(call)
    last = call.request.headers.get("last-event-id")
    if last is not None and not (last.isdecimal() and len(last) < 19):
        raise UsageError("Last-Event-ID must be the id of an event")
    after = int(last) if last is not None else call.query.after or 0
    return StreamingResponse(
        _stream(call.context, ticket.id, after), media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


async def _stream(context: Context, ticket_id: str, after: int) -> AsyncIterator[bytes]:
    """Every event once, in order; 'end' when the ticket has ended and all were sent."""
    yield b": open\n\n"
    while True:
        since = context.feed.now()
        try:
            state = (await context.store.ticket(ticket_id)).state  # before its events, since it has none after its end
        except NotFound:
            yield b"event: end\ndata: {}\n\n"
            return
        while events := await context.store.events(ticket_id, after=after, limit=AT_ONCE):
            after = events[-1].seq
            yield b"".join(map(_sent, events))
        if state in TERMINAL_TICKET_STATES:
            yield b"event: end\ndata: {}\n\n"
            return
        if not await context.feed.changed(since, timeout_seconds=KEEP_ALIVE_SECONDS):
            if context.feed.closed:
                return
            yield b": \n\n"


def _sent(event: Event) -> bytes:
    data = json.dumps(plain(event), ensure_ascii=True, separators=(",", ":"))
    kind = event.kind if event.kind.isidentifier() else "message"  # another program wrote it
    return f"id: {event.seq}\nevent: {kind}\ndata: {data}\n\n".encode()


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/events",
        role=Role.VIEWER,
        summary="A range of a ticket's events, output included",
        handler=list_events,
        query=RangeQuery,
        answer=Events,
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/events/live",
        role=Role.VIEWER,
        summary="A ticket's events as they come, until it has ended (Server-Sent Events)",
        handler=follow_events,
        query=LiveQuery,
        media_type="text/event-stream",
    ),
)
