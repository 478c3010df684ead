"""Tickets by state and filter, a page at a time, with what can be done to many of them at once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import pydantic
from starlette.datastructures import MultiDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from swarm.api.endpoint import Call, Context
from swarm.api.problem import Refused, of
from swarm.api.v1 import actions
from swarm.api.v1.actions import Bulk, BulkAction, BulkDone
from swarm.api.v1.tickets import Filters, cursor_for, filter_of, read_cursor
from swarm.dashboard.render import form, here, html, page
from swarm.dashboard.visible import visible
from swarm.errors import SwarmError, UsageError
from swarm.fields import sentence
from swarm.model import ExecutionMode, Role, TicketState
from swarm.store.registry.tokens import Actor
from swarm.store.sql.rows import TicketSummary
from swarm.store.tickets.pages import Count, TicketFilter, TicketPage

_ROWS: Final = 50
_OLD_SECONDS: Final = 5.0
_FILTERS: Final = 100
_PARTS: Final = 100  # of one filter: each becomes a link that has all others
_PAGES_BACK: Final = 20  # cursors of newer pages in an address
_MANY: Final = ("state", "agent", "workflow")
_ONE: Final = ("project", "text", "since", "before")
Pairs = Sequence[tuple[str, str]]


class Counts:
    """Of each state, for all that look at the same filter. An open page that asks again gets some that are up to
    `_OLD_SECONDS` old: counting costs more than the page."""

    def __init__(self) -> None:
        self._kept: OrderedDict[TicketFilter, tuple[asyncio.Event, float, dict[str, Count]]] = OrderedDict()

    async def of(self, context: Context, which: TicketFilter, *, patient: bool) -> dict[str, Count]:
        if (kept := self._kept.get(which)) is not None:
            seen, at, counts = kept
            if not seen.is_set() or (patient and time.monotonic() - at < _OLD_SECONDS):
                return counts
        since, now = context.feed.now(), time.monotonic()
        counts = await context.store.ticket_counts(which)
        self._kept[which] = since, now, counts
        if len(self._kept) > _FILTERS:
            self._kept.popitem(last=False)
        return counts


def routes(context: Context) -> list[BaseRoute]:
    return [
        page(context, "/tickets", partial(_list, Counts())),
        page(context, "/tickets/bulk", _ask, role=Role.OPERATOR),
        page(context, "/tickets/bulk", _change, role=Role.OPERATOR, method="POST"),
    ]


def _given(items: Iterable[tuple[str, str]]) -> Pairs:
    """The filters of an address, without what a form left empty. Raises UsageError."""
    found = [(name, value) for name, value in items if name in (*_MANY, *_ONE) and value]
    if len(found) > _PARTS:
        raise UsageError("the filter has too many parts")
    return found


def _filters(given: Pairs) -> Filters:
    """Raises UsageError."""
    values: dict[str, Any] = {name: value for name, value in given if name in _ONE}
    for name in _MANY:
        values[name] = [value for one, value in given if one == name]
    try:
        return Filters.model_validate(values)
    except pydantic.ValidationError as error:
        raise UsageError(f"the filter: {sentence(error, Filters)}") from None


def _call(context: Context, request: Request, actor: Actor, body: Bulk | None = None) -> Call:
    return Call(context=context, request=request, actor=actor, path=request.path_params, query=None, body=body)


async def _list(counted: Counts, context: Context, request: Request, actor: Actor) -> Response:
    query = request.query_params
    given = _given(query.multi_items())
    problem = ""
    counts: dict[str, Count] = {}
    found = TicketPage(tickets=[], after=None)
    try:
        call = _call(context, request, actor)
        which, after = await filter_of(call, _filters(given)), await read_cursor(call, query.get("after"))
        found = await context.store.ticket_page(which, after=after, limit=_ROWS)
        found = replace(found, after=await cursor_for(call, found.after))
        counts = await counted.of(context, replace(which, states=()), patient="hx-request" in request.headers)
    except SwarmError as error:  # such as an agent that is not registered: the filter can be mended on the page
        problem = of(error).detail
    via = query.getlist("via")[-_PAGES_BACK:]
    return html(
        "tickets.html",
        actor=actor,
        here=here(request),
        tickets=found.tickets,
        runs=await _runs(context, found.tickets),
        counts=counts,
        states=[(state, _to(given, state)) for state in TicketState],
        everything=_to(given, None),
        chosen=[value for name, value in given if name == "state"],
        chips=[(name, value, _query([one for one in given if one != (name, value)])) for name, value in given],
        given=given,
        filter=urlencode(given),
        problem=problem,
        newer=_newer(given, query.get("after"), via),
        older=_query([*given, ("after", found.after), *_via(query.get("after"), via)]) if found.after else None,
    )


def _query(pairs: Iterable[tuple[str, str]]) -> str:
    query = urlencode(list(pairs))
    return f"/tickets?{query}" if query else "/tickets"


def _to(given: Pairs, state: str | None) -> str:
    rest = [one for one in given if one[0] != "state"]
    return _query([*rest, ("state", state)] if state else rest)


def _via(after: str | None, via: Sequence[str]) -> Pairs:
    """The way back to newer pages: there is no order to read them in from an older one."""
    return [("via", one) for one in [*via, after or "-"][-_PAGES_BACK:]]


def _newer(given: Pairs, after: str | None, via: Sequence[str]) -> str | None:
    if after is None:
        return None
    back = via[-1] if via else "-"
    return _query([*given, *([("after", back)] if back != "-" else []), *(("via", one) for one in via[:-1])])


async def _runs(context: Context, tickets: Sequence[TicketSummary]) -> dict[str, str]:
    """The name of what each runs."""
    ids = {one.id: _ref(one) for one in tickets}
    names = await context.store.names(set(ids.values()))
    return {id: names.get(ref, ref).partition("@")[0] if ref in names else ref for id, ref in ids.items()}


def _ref(ticket: TicketSummary) -> str:
    agent = ticket.agent_id or (ticket.assignee_id if ticket.assignee_type in (None, "agent") else None)
    of_workflow = ticket.workflow_id and (not agent or ticket.execution_mode == ExecutionMode.WORKFLOW)
    return (ticket.workflow_id if of_workflow else agent) or ""


# --- many at once -----------------------------------------------------------------------------------------------------


async def _ask(context: Context, request: Request, actor: Actor) -> Response:
    """How many it would be, for a whole filter, at an address."""
    return await _bulk(context, request, actor, MultiDict(request.query_params.multi_items()), sure=False)


async def _change(context: Context, request: Request, actor: Actor) -> Response:
    """Without `sure`, how many it would be."""
    given = MultiDict([(name, str(value)) for name, value in (await form(request)).multi_items()])
    return await _bulk(context, request, actor, given, sure=given.get("sure") == "yes")


async def _bulk(context: Context, request: Request, actor: Actor, given: MultiDict, *, sure: bool) -> Response:
    if given.get("do") not in list(BulkAction):
        raise Refused(400, f"there is nothing to do that is named {visible(given.get('do'), limit=40)!r}")
    whole = bool(given.get("all"))
    try:
        pairs = _given(parse_qsl(given.get("filter", ""), max_num_fields=_PARTS) or given.multi_items())
    except ValueError:
        raise UsageError("the filter has too many parts") from None
    ids = tuple(given.getlist("id"))
    if not whole and not ids:
        raise UsageError("no ticket is selected: select some, or take all that the filter finds")
    try:
        body = Bulk(
            action=BulkAction(given["do"]),
            ids=None if whole else ids,
            filter=_filters(pairs) if whole else None,
            confirm=sure,
            count=max(1, int(given["count"][:12])) if given.get("count", "").isdecimal() else actions.MAX_AT_ONCE,
            after=given.get("after") or None,
        )
    except pydantic.ValidationError as error:
        raise UsageError(sentence(error, Bulk)) from None
    done: BulkDone = await actions.change_tickets(_call(context, request, actor, body))
    left = max(0, body.count - done.done - done.skipped) if sure and done.after is not None else 0
    return html(
        "bulk.html",
        actor=actor,
        action=body.action,
        sure=sure,
        whole=whole,
        done=done,
        ids=ids,
        filter=urlencode(pairs),
        chips=pairs,
        back=_query(pairs),
        left=min(left, done.left.number),
    )
