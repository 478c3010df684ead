"""What is done to tickets: cancel, retry, answer, delete, one or many of them; and wait for their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.api.v1.tickets import MAX_CURSOR_CHARS, Filters, cursor_for, filter_of, own_ticket_id, read_cursor
from swarm.errors import ChangeRefused
from swarm.ledger import Limit
from swarm.model import TERMINAL_TICKET_STATES, Role, Ticket, TicketState
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import tickets
from swarm.store.tickets.pages import Count, TicketFilter

MAX_AT_ONCE: Final = 1000  # tickets of one bulk request
_IN_ONE_TRANSACTION: Final = 100
_REASONS: Final = 10
MAX_WAIT_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 5.0  # for a client that has gone, and a change without an event


class Retry(Fields):
    step: str | None = Field(
        default=None, max_length=300, description="in a workflow, only this step and those that depend on it"
    )


class Answer(Fields):
    step: str | None = Field(default=None, max_length=300, description="the step, if several wait")
    by: str | None = Field(
        default=None, min_length=1, max_length=200, description="on whose behalf; the token's name is kept beside it"
    )


class Approval(Answer):
    why: str = Field(default="", max_length=16_000)
    budget_usd: float | None = Field(default=None, ge=0, description="raise the budget to this, if it is used up")
    budget_tokens: int | None = Field(default=None, ge=0)


class Rejection(Answer):
    why: str = Field(min_length=1, max_length=16_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    ticket: Ticket
    step: str


class DeleteQuery(Fields):
    force: bool = Field(
        default=False, description="also one that runs (it is cancelled) or that others depend on (they fail)"
    )


class WaitQuery(Fields):
    timeout_seconds: float = Field(default=30.0, ge=0, le=MAX_WAIT_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """Not ``ended``: the time was over first; ask again."""

    ticket: Ticket
    ended: bool


class BulkAction(StrEnum):
    CANCEL = "cancel"
    RETRY = "retry"
    DELETE = "delete"


class Bulk(Fields):
    """Which tickets: those with these ids, or all that the filter finds. Without ``confirm`` they are only counted."""

    action: BulkAction
    ids: Annotated[tuple[str, ...], Field(max_length=MAX_AT_ONCE)] | None = None
    filter: Filters | None = None
    confirm: bool = False
    count: int = Field(default=MAX_AT_ONCE, ge=1, description="act on at most this many: such as were confirmed")
    after: str | None = Field(default=None, max_length=MAX_CURSOR_CHARS, description="`after` of the answer before")
    force: bool = Field(default=False, description="delete tickets that run or that others depend on, too")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("give either `ids` or `filter`")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkDone:
    """``matched``: how many there were, before anything was done. ``reasons``: of the first skipped ones. ``left``: how
    many were not looked at; a request with ``after`` goes on with these."""

    matched: Count
    done: int
    skipped: int
    reasons: list[Skipped]
    left: Count
    after: str | None


async def cancel_ticket(call: Call) -> Ticket:
    id = await own_ticket_id(call)
    await call.store.cancel(id, call.actor.name)
    return await call.store.ticket(id)


async def make_ticket_ready(call: Call) -> Ticket:
    id = await own_ticket_id(call)
    await call.store.make_ready(id, by=call.actor.name)
    return await call.store.ticket(id)


async def retry_ticket(call: Call) -> Ticket:
    id = await own_ticket_id(call)
    await call.store.retry(id, step=call.body.step, by=call.actor.name)
    return await call.store.ticket(id)


async def approve_ticket(call: Call) -> Answered:
    body: Approval = call.body
    return await _answer(call, body, why=body.why, budget=Limit(usd=body.budget_usd, tokens=body.budget_tokens))


async def reject_ticket(call: Call) -> Answered:
    body: Rejection = call.body
    return await _answer(call, body, why=body.why)


async def _answer(call: Call, body: Answer, *, why: str, budget: Limit | None = None) -> Answered:
    id = await own_ticket_id(call)
    by = call.actor.name if body.by is None else f"{body.by} ({call.actor.name})"
    step = await call.store.answer(
        id, approved=isinstance(body, Approval), by=by, why=why, step=body.step, budget=budget
    )
    return Answered(ticket=await call.store.ticket(id), step=step)


async def delete_ticket(call: Call) -> None:
    id = await own_ticket_id(call)
    await call.store.remove_tickets([id], by=call.actor.name, force=call.query.force, project_id=call.actor.project_id)


async def wait_for_ticket(call: Call) -> Waited:
    """The whole ticket is read at the end: it may have many megabytes, and many wait."""
    id, feed = await own_ticket_id(call), call.context.feed
    loop = asyncio.get_running_loop()
    end = loop.time() + call.query.timeout_seconds
    while True:
        since = feed.now(id)
        state, left = (await call.store.ticket_states([id])).get(id), end - loop.time()
        over = state is None or state in TERMINAL_TICKET_STATES
        if over or left <= 0 or feed.closed or await call.request.is_disconnected():
            ticket = await call.store.ticket(id)
            return Waited(ticket=ticket, ended=ticket.state in TERMINAL_TICKET_STATES)
        await call.check_again(Role.VIEWER)
        await feed.changed(since, timeout_seconds=min(left, _LOOK_SECONDS))


# --- many -------------------------------------------------------------------------------------------------------------


async def change_tickets(call: Call) -> BulkDone:
    body: Bulk = call.body
    which = await _which(call, body)
    after = await read_cursor(call, body.after)
    matched = await call.store.count_tickets(which, after=after)
    if not body.confirm:
        return BulkDone(matched=matched, done=0, skipped=0, reasons=[], left=matched, after=body.after)
    act = _act(body, by=call.actor.name, project_id=call.actor.project_id)
    refused: dict[str, str] = {}
    ids: list[str] = []
    while True:
        limit = min(body.count, MAX_AT_ONCE) - len(ids)
        some, after = await call.store.filtered_ids(which, after=after, limit=min(limit, _IN_ONE_TRANSACTION))
        ids += some
        refused |= await _for_each(call, some, act)
        if after is None or len(ids) >= min(body.count, MAX_AT_ONCE):
            break
    unknown = [id for id in dict.fromkeys(body.ids or ()) if id not in set(ids)] if after is None else []
    refused |= dict.fromkeys(unknown, "there is no such ticket")
    return BulkDone(
        matched=matched,
        done=len(ids) + len(unknown) - len(refused),
        skipped=len(refused),
        reasons=[Skipped(id=id, reason=reason) for id, reason in list(refused.items())[:_REASONS]],
        left=await call.store.count_tickets(which, after=after) if after is not None else Count(number=0),
        after=await cursor_for(call, after),
    )


async def _which(call: Call, body: Bulk) -> TicketFilter:
    """With a filter, only tickets in states of which the action can be."""
    if body.filter is None:
        return replace(await filter_of(call, Filters()), ids=tuple(dict.fromkeys(body.ids or ())))
    which = await filter_of(call, body.filter)
    possible: Mapping[BulkAction, Sequence[TicketState]] = {
        BulkAction.CANCEL: [state for state in TicketState if state not in TERMINAL_TICKET_STATES],
        BulkAction.RETRY: [TicketState.FAILED, TicketState.CANCELLED],
        BulkAction.DELETE: list(TicketState),
    }
    states = [state for state in possible[body.action] if not which.states or state in which.states]
    return replace(which, states=tuple(states) or ("",))


def _act(body: Bulk, *, by: str, project_id: str | None) -> Callable[[Tx, str], None]:
    if body.action == BulkAction.DELETE:
        return lambda tx, id: tickets.remove(tx, [id], force=body.force, by=by, project_id=project_id)
    return partial(tickets.cancel if body.action == BulkAction.CANCEL else tickets.retry, by=by)


async def _for_each(call: Call, ids: Sequence[str], act: Callable[[Tx, str], None]) -> dict[str, str]:
    try:
        return await call.store.for_each(ids, act)
    except ChangeRefused as error:  # by a trigger, of one of them
        if len(ids) == 1:
            return {ids[0]: str(error)}
    refused: dict[str, str] = {}
    for id in ids:
        refused |= await _for_each(call, [id], act)
    return refused


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="POST",
        path="/v1/tickets/bulk",
        role=Role.OPERATOR,
        summary="Cancel, retry or delete many tickets; without `confirm`, count them",
        handler=change_tickets,
        body=Bulk,
        answer=BulkDone,
        errors={404: "no such agent or workflow"},
    ),
    Endpoint(
        method="DELETE",
        path="/v1/tickets/{id}",
        role=Role.OPERATOR,
        summary="Delete a ticket with its runs, outputs and files",
        handler=delete_ticket,
        query=DeleteQuery,
    ),
    Endpoint(
        method="POST",
        path="/v1/tickets/{id}/cancel",
        role=Role.OPERATOR,
        summary="Cancel a ticket that has not ended",
        handler=cancel_ticket,
        answer=Ticket,
    ),
    Endpoint(
        method="POST",
        path="/v1/tickets/{id}/ready",
        role=Role.OPERATOR,
        summary="Let a draft run",
        handler=make_ticket_ready,
        answer=Ticket,
    ),
    Endpoint(
        method="POST",
        path="/v1/tickets/{id}/retry",
        role=Role.OPERATOR,
        summary="Run a failed or cancelled ticket again, from its start or from a step",
        handler=retry_ticket,
        body=Retry,
        answer=Ticket,
    ),
    Endpoint(
        method="POST",
        path="/v1/tickets/{id}/approve",
        role=Role.OPERATOR,
        summary="Approve the step that waits for a person",
        handler=approve_ticket,
        body=Approval,
        answer=Answered,
    ),
    Endpoint(
        method="POST",
        path="/v1/tickets/{id}/reject",
        role=Role.OPERATOR,
        summary="Reject the step that waits for a person: it fails",
        handler=reject_ticket,
        body=Rejection,
        answer=Answered,
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}/wait",
        role=Role.VIEWER,
        summary="Wait until a ticket has ended, at most a minute",
        handler=wait_for_ticket,
        query=WaitQuery,
        answer=Waited,
    ),
)
