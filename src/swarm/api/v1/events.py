"""Events and output: a range at a time, or as they come (Server-Sent Events, which continue after `Last-Event-ID`).

A stream holds a few events at a time, however slowly they are read: the next are read when these are sent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pydantic import Field
from starlette.responses import StreamingResponse

from swarm.api.endpoint import EVENT_STREAM, Call, Context, Endpoint, Fields
from swarm.api.v1.tickets import own_ticket_id
from swarm.base.plain import plain
from swarm.errors import UsageError
from swarm.model import TERMINAL_TICKET_STATES, Event, Role
from swarm.store.tickets.output import OutputLines, shown

KEEP_ALIVE_SECONDS: Final = 15.0
_AT_ONCE: Final = 16  # events of one read: each may have 16 KiB
_PAUSE_SECONDS: Final = 0.05  # between two looks at a database that changes all the time
_AFTER: Final = "only events with a greater `seq`"


class RangeQuery(Fields):
    after: int = Field(default=0, ge=0, lt=1 << 63, description=_AFTER)
    limit: int = Field(default=100, ge=1, le=1000)


class KindsQuery(RangeQuery):
    kind: tuple[str, ...] = Field(default=(), max_length=20, description="only of these kinds, such as `transition`")


class LiveQuery(Fields):
    after: int | None = Field(
        default=None, ge=0, lt=1 << 63, description=f"{_AFTER}; the header Last-Event-ID counts first"
    )


class LiveKindsQuery(LiveQuery):
    kind: tuple[str, ...] = Field(default=(), max_length=20, description="only of these kinds, such as `transition`")


class Stream(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"


class OutputQuery(Fields):
    after: int = Field(default=0, ge=0, lt=1 << 63, description=_AFTER)
    stream: Stream | None = None
    follow: bool = Field(default=False, description="go on until the ticket has ended")


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """``after``: where the next range begins. At the end, it is what was asked for."""

    events: list[Event]
    after: int


async def list_events(call: Call) -> Events:
    query: RangeQuery = call.query
    found = await call.store.events(await own_ticket_id(call), after=query.after, limit=query.limit)
    return Events(events=found, after=found[-1].seq if found else query.after)


async def list_all_events(call: Call) -> Events:
    query: KindsQuery = call.query
    found, after = await call.store.all_events(
        after=query.after, limit=query.limit, project_id=call.actor.project_id, kinds=query.kind
    )
    return Events(events=found, after=after)


async def follow_events(call: Call) -> StreamingResponse:
    return _sse(_of_ticket(call.context, await own_ticket_id(call), _begin(call) or 0))


async def follow_all_events(call: Call) -> StreamingResponse:
    """From now on, if nothing else is asked for."""
    begin = _begin(call)
    if begin is None:
        begin = await call.store.newest_event()

    async def read(after: int) -> tuple[list[Event], int]:
        return await call.store.all_events(
            after=after, limit=_AT_ONCE, project_id=call.actor.project_id, kinds=call.query.kind
        )

    return _sse(_of_all(call.context, read, begin))


async def show_output(call: Call) -> StreamingResponse:
    query: OutputQuery = call.query
    id = await own_ticket_id(call)
    return StreamingResponse(
        _printed(call.context, id, query), media_type="text/plain", headers={"cache-control": "no-store"}
    )


def _begin(call: Call) -> int | None:
    last = call.request.headers.get("last-event-id")
    if last is None:
        after: int | None = call.query.after
        return after
    if not (last.isascii() and last.isdecimal() and len(last) < 19):
        raise UsageError("Last-Event-ID must be the id of an event")
    return int(last)


def _sse(parts: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(parts, media_type=EVENT_STREAM, headers=headers)


async def _batches(context: Context, ticket_id: str, after: int) -> AsyncIterator[list[Event]]:
    """A ticket's events, a few at a time, until it has ended or is deleted; an empty list now and then."""
    loop = asyncio.get_running_loop()
    while not context.feed.closed:
        since, looked = context.feed.now(ticket_id), loop.time()
        states = await context.store.ticket_states([ticket_id])  # before its events, since it has none after its end
        if ticket_id not in states:
            return
        while events := await context.store.events(ticket_id, after=after, limit=_AT_ONCE):
            after = events[-1].seq
            yield events
        if states[ticket_id] in TERMINAL_TICKET_STATES:
            return
        if not await context.feed.changed(since, timeout_seconds=KEEP_ALIVE_SECONDS):
            yield []
        await asyncio.sleep(looked + _PAUSE_SECONDS - loop.time())


async def _of_ticket(context: Context, ticket_id: str, after: int) -> AsyncIterator[bytes]:
    """Every event once, in order; 'end' when the ticket has ended and all were sent, and when it was deleted."""
    yield b": open\n\n"
    async for events in _batches(context, ticket_id, after):
        yield b"".join(map(_sent, events)) or b": \n\n"
    if not context.feed.closed:
        yield b"event: end\ndata: {}\n\n"


async def _of_all(
    context: Context, read: Callable[[int], Awaitable[tuple[list[Event], int]]], after: int
) -> AsyncIterator[bytes]:
    yield f": open\nid: {after}\n\n".encode()
    loop = asyncio.get_running_loop()
    while not context.feed.closed:
        since, looked = context.feed.now(), loop.time()
        before = None
        while after != before:
            before = after
            events, after = await read(before)
            if events:
                yield b"".join(map(_sent, events))
        if not await context.feed.changed(since, timeout_seconds=KEEP_ALIVE_SECONDS):
            yield f"id: {after}\n\n".encode()  # others than those that are asked for were looked at
        await asyncio.sleep(looked + _PAUSE_SECONDS - loop.time())


def _sent(event: Event) -> bytes:
    data = json.dumps(plain(event), ensure_ascii=True, separators=(",", ":"))
    kind = event.kind if event.kind.isidentifier() else "message"  # another program wrote it
    return f"id: {event.seq}\nevent: {kind}\ndata: {data}\n\n".encode()


async def _printed(context: Context, ticket_id: str, query: OutputQuery) -> AsyncIterator[bytes]:
    lines, steps = OutputLines(), set[str]()
    batches = _batches(context, ticket_id, query.after) if query.follow else _so_far(context, ticket_id, query.after)
    async for events in batches:
        if query.stream is not None:
            events = [one for one in events if one.kind != "output" or one.data.get("stream") == query.stream]
        if len(steps) < 2 and {event.step_id for event in events if event.kind == "output"} - steps:
            steps = {step.step_id for step in await context.store.steps(ticket_id)}
        printed = [shown(*one, named=len(steps) > 1) for event in events for one in lines.add(event)]
        yield "".join(printed).encode(errors="replace")
    yield "".join(shown(*one, named=len(steps) > 1) for one in lines.end()).encode(errors="replace")


async def _so_far(context: Context, ticket_id: str, after: int) -> AsyncIterator[list[Event]]:
    while events := await context.store.events(ticket_id, after=after, limit=_AT_ONCE):
        after = events[-1].seq
        yield events


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/events",
        role=Role.VIEWER,
        summary="A range of all events; with a project's token, of that project's tickets",
        handler=list_all_events,
        query=KindsQuery,
        answer=Events,
        large=True,
    ),
    Endpoint(
        method="GET",
        path="/v1/events/live",
        role=Role.VIEWER,
        summary="All events as they come, from now on (Server-Sent Events)",
        handler=follow_all_events,
        query=LiveKindsQuery,
        media_type=EVENT_STREAM,
        headers={"Last-Event-ID": "the last event that came: go on behind it"},
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/events",
        role=Role.VIEWER,
        summary="A range of a ticket's events, output included",
        handler=list_events,
        query=RangeQuery,
        answer=Events,
        large=True,
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/events/live",
        role=Role.VIEWER,
        summary="A ticket's events as they come, until it has ended (Server-Sent Events)",
        handler=follow_events,
        query=LiveQuery,
        media_type=EVENT_STREAM,
        headers={"Last-Event-ID": "the last event that came: go on behind it"},
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/output",
        role=Role.VIEWER,
        summary="What a ticket's agents printed, as text, like `swarm ticket logs`",
        handler=show_output,
        query=OutputQuery,
        media_type="text/plain",
    ),
)
