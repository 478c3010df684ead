"""Tickets: submit, list, count, show."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Final

from pydantic import Field

from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.base import trace, trees
from swarm.base.clock import moment
from swarm.errors import NotFound, UsageError
from swarm.fields import Labels
from swarm.model import FILES, BudgetPolicy, KeepVm, Role, Ticket, TicketState
from swarm.store import submission
from swarm.store.details import TicketDetails
from swarm.store.registry.webhooks import Once
from swarm.store.runs.artifacts import sent_as
from swarm.store.tickets.pages import Count, TicketFilter, TicketPage
from swarm.store.tickets.validation import shown

KEY_HEADER: Final = "idempotency-key"
MAX_KEY_CHARS: Final = 255
MAX_TICKET_BYTES: Final = 20 << 20
MAX_CURSOR_CHARS: Final = 4000
_CURSOR: Final = "where a list goes on, in the project "
MAX_OF_A_KIND: Final = 20  # each name is looked up, and each value is a part of the statement
Reference = Annotated[str, Field(max_length=300)]


class Filters(Fields):
    """Which tickets; of several given ones of a kind, any."""

    state: tuple[TicketState, ...] = Field(default=(), max_length=MAX_OF_A_KIND)
    project: str | None = None
    agent: tuple[Reference, ...] = Field(default=(), max_length=MAX_OF_A_KIND, description="name, name@version or id")
    workflow: tuple[Reference, ...] = Field(
        default=(), max_length=MAX_OF_A_KIND, description="name, name@version or id"
    )
    text: str = Field(default="", max_length=200, description="in the title or the error, or how the id begins")
    since: str = Field(default="", max_length=40, description="made at or after: a time, or an age such as 7d")
    before: str = Field(default="", max_length=40, description="made before: a time, or an age such as 7d")


class ListQuery(Filters):
    after: str | None = Field(default=None, max_length=MAX_CURSOR_CHARS, description="`after` of the page before")
    limit: int = Field(default=50, ge=1, le=500)


class Submission(Fields):
    """A new ticket. It runs either an agent or a workflow."""

    title: str = Field(max_length=1 << 20)
    agent: str | None = Field(default=None, description="name, name@version or id")
    workflow: str | None = Field(default=None, description="name, name@version or id")
    description: str | None = None
    inputs: dict[str, Any] = Field(default_factory=dict)
    id: str | None = Field(default=None, description="default: a new one")
    project: str | None = None
    priority: int = 0
    timeout_seconds: float | None = None
    max_attempts: int | None = None
    budget_usd: float | None = None
    budget_tokens: int | None = None
    over_budget: BudgetPolicy | None = None
    keep_vm: KeepVm | None = Field(
        default=None, description="when its VM is kept, to look into: default as the agent says"
    )
    keep_vm_seconds: float | None = Field(default=None, description="for how long; default: a day")
    requires: Labels = Field(default_factory=dict, description="labels that its host must have")
    draft: bool = False
    after: Annotated[tuple[str, ...], Field(max_length=1000)] = Field(
        default=(), description="run it when these tickets are done"
    )


async def filter_of(call: Call, given: Filters) -> TicketFilter:
    """With names resolved, and within the caller's project. Raises NotFound for an unknown agent or workflow."""
    return TicketFilter(
        states=tuple(dict.fromkeys(given.state)),
        project_id=call.actor.project_id if call.actor.project_id is not None else given.project,
        agent_ids=tuple([(await call.store.agent(ref)).id for ref in dict.fromkeys(given.agent)]),
        workflow_ids=tuple([(await call.store.workflow(ref)).id for ref in dict.fromkeys(given.workflow)]),
        text=given.text,
        since=moment(given.since),
        before=moment(given.before),
    )


def project_for(call: Call, asked: str | None) -> str | None:
    """Of a new ticket. Raises UsageError if the caller is bound to another one than is asked for."""
    own = call.actor.project_id
    if own is not None and asked not in (None, own):
        raise UsageError(f"this token is of the project {shown(own)}: leave `project` out")
    return asked if own is None else own


async def own_ticket_id(call: Call) -> str:
    """Of the ticket that the path names, by its id or the beginning of one. Raises NotFound."""
    return await ticket_id_of(call, call.path["id"])


async def ticket_id_of(call: Call, ref: str) -> str:
    """One of another project does not exist for a caller who is bound to one. Raises NotFound."""
    return await call.store.visible_ticket_id(ref, project_id=call.actor.project_id)


async def cursor_for(call: Call, after: str | None) -> str | None:
    """Where a list goes on, for the caller: it may be at a ticket of another project, which is not told."""
    if after is None or call.actor.project_id is None:
        return after
    return await call.context.vault.sealed(after, what=_CURSOR + call.actor.project_id)


async def read_cursor(call: Call, after: str | None) -> str | None:
    """What `cursor_for` gave. Raises UsageError."""
    if after is None or call.actor.project_id is None:
        return after
    found = await call.context.vault.unsealed(after, what=_CURSOR + call.actor.project_id)
    if found is None:
        raise UsageError("`after` must be what the page before gave")
    return found


async def list_tickets(call: Call) -> TicketPage:
    query: ListQuery = call.query
    after = await read_cursor(call, query.after)
    found = await call.store.ticket_page(await filter_of(call, query), after=after, limit=query.limit)
    return replace(found, after=await cursor_for(call, found.after))


async def count_tickets(call: Call) -> Mapping[str, Count]:
    return await call.store.ticket_counts(await filter_of(call, call.query))


async def submit_ticket(call: Call) -> Ticket:
    body: Submission = call.body
    project = project_for(call, body.project)
    runner = await submission.runner(call.store, body.agent, body.workflow)
    needs = [await ticket_id_of(call, ref) for ref in body.after]
    ticket = await asyncio.to_thread(  # its inputs become text, of up to 16 MiB
        submission.new_ticket,
        *runner,
        id=body.id,
        title=body.title,
        description=body.description,
        inputs=body.inputs,
        draft=body.draft,
        project_id=project,
        priority=body.priority,
        timeout_seconds=body.timeout_seconds,
        max_attempts=body.max_attempts,
        budget_usd=body.budget_usd,
        budget_tokens=body.budget_tokens,
        over_budget=body.over_budget,
        keep_vm=body.keep_vm,
        keep_vm_seconds=body.keep_vm_seconds,
        requires=json.dumps(body.requires) if body.requires else None,
    )
    if trace.valid(parent := call.request.headers.get(trace.HEADER)):  # what made it is traced: so is the ticket, in it
        ticket = replace(ticket, trigger_data=json.dumps({trace.HEADER: parent}))
    return await add_once(call, ticket, of=body.model_dump_json, depends_on=needs)


async def add_once(call: Call, ticket: Ticket, *, of: Callable[[], str], depends_on: Sequence[str] = ()) -> Ticket:
    """Add a ticket: only once, if the request has an Idempotency-Key. ``of``: what is asked for; a key that was used
    for something else is a Conflict. It is called in a thread, and only with a key."""
    by, project = call.actor.name, call.actor.project_id
    files = await _files_of(call, ticket)
    given: dict[str, Any] = {"depends_on": depends_on, "by": by, "uses": len(files)}
    given["sent_as"] = sent_as(ticket.id, project)
    key = call.request.headers.get(KEY_HEADER)
    if key is None:
        return await call.store.add_ticket(ticket, **given)
    if not (0 < len(key) <= MAX_KEY_CHARS and key.isprintable()):
        raise UsageError(f"the header Idempotency-Key must have 1 to {MAX_KEY_CHARS} printable characters")
    digest = await asyncio.to_thread(lambda: hashlib.sha256(of().encode(errors="replace")).hexdigest())
    # With the project: the next holder of this name may be of another.
    once = Once(scope=f"api:{by}" if project is None else f"api:{by}:{project}", key=key, digest=digest)
    added, _ = await call.store.add_ticket_once(ticket, once, **given)
    return added


async def _files_of(call: Call, ticket: Ticket) -> set[str]:
    """The artifacts of the files that were sent for it. Raises NotFound for what was not."""
    found = set[str]()
    text = ticket.inputs or ""
    given = (await asyncio.to_thread(json.loads, text)).get(FILES) if FILES in text else None
    for digest in given.values() if isinstance(given, dict) else ():
        try:
            text = await _sent(call, ticket.id, str(digest))
        except NotFound:
            why = f"no files {shown(digest)} were sent for the ticket id {shown(ticket.id)}"
            raise NotFound(f"{why}: POST /v1/files sends them, and says the id to use") from None
        found |= {str(digest), *(await asyncio.to_thread(trees.manifest, text)).parts}
    return found


async def _sent(call: Call, id: str, digest: str) -> str:
    """The list of these files. Raises NotFound."""
    project = call.actor.project_id
    with suppress(NotFound):
        return await call.store.artifact_of(sent_as(id, project), digest)
    if await ticket_id_of(call, id) != id:  # it is there, if this was asked before
        raise NotFound(f"no ticket {shown(id)}")
    return await call.store.artifact_of(id, digest)


async def show_ticket(call: Call) -> TicketDetails:
    found = await call.store.details(await own_ticket_id(call))
    if (project := call.actor.project_id) is None or not found.depends_on:
        return found
    own = await call.store.ticket_states(found.depends_on, project_id=project)
    return replace(found, depends_on=[id for id in found.depends_on if id in own])


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/tickets",
        role=Role.VIEWER,
        summary="List tickets, newest first, a page at a time",
        handler=list_tickets,
        query=ListQuery,
        answer=TicketPage,
        errors={404: "no such agent or workflow"},
    ),
    Endpoint(
        method="POST",
        path="/v1/tickets",
        role=Role.OPERATOR,
        summary="Submit a ticket; with the header Idempotency-Key, once",
        handler=submit_ticket,
        headers={"Idempotency-Key": "of the sender's choice: a second request with it adds nothing"},
        body=Submission,
        max_body_bytes=MAX_TICKET_BYTES,
        answer=Ticket,
        status=201,
        errors={404: "no such agent or workflow"},
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/counts",
        role=Role.VIEWER,
        summary="How many tickets there are in each state, as far as that is told without looking at all",
        handler=count_tickets,
        query=Filters,
        answer=dict[str, Count],
        errors={404: "no such agent or workflow"},
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}",
        role=Role.VIEWER,
        summary="Show a ticket with its runs, steps and attempts",
        handler=show_ticket,
        answer=TicketDetails,
        large=True,
    ),
)
