"""Tickets: submit, list, show, and what people do to them."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import Field

from swarm.api.endpoint import Call, Endpoint, Fields
from swarm.errors import NotFound, UsageError
from swarm.model import BudgetPolicy, ExecutionMode, Role, Ticket, TicketState
from swarm.store.sql.rows import AttemptRow, RunRow, StepRow
from swarm.store.tickets.pages import TicketFilter, TicketPage
from swarm.store.tickets.validation import shown

KEY_HEADER: Final = "idempotency-key"
MAX_KEY_CHARS: Final = 255
MAX_TICKET_BYTES: Final = 20 << 20


class Filters(Fields):
    """Which tickets; of several given ones of a kind, any."""

    state: tuple[TicketState, ...] = ()
    project: str | None = None
    agent: tuple[str, ...] = Field(default=(), description="name, name@version or id")
    workflow: tuple[str, ...] = Field(default=(), description="name, name@version or id")
    text: str = Field(default="", max_length=200, description="in the title or the error, or how the id begins")
    since: str = Field(default="", max_length=40, description="made at or after this time, ISO-8601")
    before: str = Field(default="", max_length=40, description="made before this time, ISO-8601")


class ListQuery(Filters):
    after: str | None = Field(default=None, max_length=1000, description="`after` of the page before")
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
    draft: bool = False
    after: Annotated[tuple[str, ...], Field(max_length=1000)] = Field(
        default=(), description="run it when these tickets are done"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """Model calls of which the service did not say the cost."""

    calls: int
    usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketDetails:
    """As `swarm ticket show --json` prints it."""

    ticket: Ticket
    runs: list[RunRow]
    steps: list[StepRow]
    attempts: list[AttemptRow]
    depends_on: list[str]
    estimated: Estimated


async def filter_of(call: Call, given: Filters) -> TicketFilter:
    """With names resolved, and within the caller's project. Raises NotFound for an unknown agent or workflow."""
    return TicketFilter(
        states=tuple(given.state),
        project_id=call.actor.project_id if call.actor.project_id is not None else given.project,
        agent_ids=tuple([(await call.store.agent(ref)).id for ref in given.agent]),
        workflow_ids=tuple([(await call.store.workflow(ref)).id for ref in given.workflow]),
        text=given.text,
        since=given.since,
        before=given.before,
    )


async def own_ticket(call: Call) -> Ticket:
    """The ticket that the path names, by its id or the beginning of one. One of another project does not exist for a
    caller who is bound to one. Raises NotFound."""
    ref = call.path["id"]
    ticket = await call.store.ticket(await call.store.ticket_id(ref))
    if call.actor.project_id is not None and ticket.project_id != call.actor.project_id:
        raise NotFound(f"no ticket {shown(ref)}")
    return ticket


async def list_tickets(call: Call) -> TicketPage:
    query: ListQuery = call.query
    return await call.store.ticket_page(await filter_of(call, query), after=query.after, limit=query.limit)


async def submit_ticket(call: Call) -> Ticket:
    body: Submission = call.body
    if (body.agent is None) == (body.workflow is None):
        raise UsageError("a ticket runs either an agent or a workflow: give one of `agent` and `workflow`")
    project = call.actor.project_id
    if project is not None and body.project not in (None, project):
        raise UsageError(f"this token is of the project {shown(project)}: leave `project` out")
    agent = await call.store.agent(body.agent) if body.agent is not None else None
    workflow = await call.store.workflow(body.workflow) if body.workflow is not None else None
    ticket = Ticket(
        id=body.id if body.id is not None else str(uuid.uuid4()),
        title=body.title,
        description=body.description,
        state=TicketState.DRAFT if body.draft else TicketState.READY,
        project_id=project or body.project,
        agent_id=agent.id if agent else None,
        assignee_id=agent.id if agent else None,
        assignee_type="agent" if agent else None,
        execution_mode=ExecutionMode.AGENT if agent else ExecutionMode.WORKFLOW,
        workflow_id=workflow.id if workflow else None,
        inputs=json.dumps(body.inputs, ensure_ascii=False),
        priority=body.priority,
        timeout_seconds=body.timeout_seconds,
        max_attempts=body.max_attempts,
        budget_usd=body.budget_usd,
        budget_tokens=body.budget_tokens,
        over_budget=body.over_budget,
    )
    by = call.actor.name
    key = call.request.headers.get(KEY_HEADER)
    if key is None:
        return await call.store.add_ticket(ticket, depends_on=body.after, by=by)
    if not (0 < len(key) <= MAX_KEY_CHARS and key.isprintable()):
        raise UsageError(f"the header Idempotency-Key must have 1 to {MAX_KEY_CHARS} printable characters")
    from swarm.store.registry.webhooks import Once

    digest = hashlib.sha256(body.model_dump_json().encode(errors="replace")).hexdigest()
    once = Once(scope=f"api:{by}", key=key, digest=digest)
    added, _ = await call.store.add_ticket_once(ticket, once, depends_on=body.after, by=by)
    return added


async def show_ticket(call: Call) -> TicketDetails:
    ticket = await own_ticket(call)
    calls, usd = await call.store.estimates(ticket.id)
    return TicketDetails(
        ticket=ticket,
        runs=await call.store.runs(ticket.id),
        steps=await call.store.steps(ticket.id),
        attempts=await call.store.attempts(ticket.id),
        depends_on=await call.store.depends_on(ticket.id),
        estimated=Estimated(calls=calls, usd=usd),
    )


async def cancel_ticket(call: Call) -> Ticket:
    ticket = await own_ticket(call)
    await call.store.cancel(ticket.id, call.actor.name)
    return await call.store.ticket(ticket.id)


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
        body=Submission,
        max_body_bytes=MAX_TICKET_BYTES,
        answer=Ticket,
        status=201,
        errors={404: "no such agent or workflow"},
    ),
    Endpoint(
        method="GET",
        path="/v1/tickets/{id}",
        role=Role.VIEWER,
        summary="Show a ticket with its runs, steps and attempts",
        handler=show_ticket,
        answer=TicketDetails,
    ),
    Endpoint(
        method="POST",
        path="/v1/tickets/{id}/cancel",
        role=Role.OPERATOR,
        summary="Cancel a ticket that has not ended",
        handler=cancel_ticket,
        answer=Ticket,
    ),
)
