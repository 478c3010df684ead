"""Workflows: what is registered, and runs of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import Field

from swarm.admin import packages, runs
from swarm.admin.vault import scope_of
from swarm.api import body
from swarm.api.endpoint import BODY_SECONDS, Call, Endpoint, Fields
from swarm.api.v1.tickets import add_once, project_for
from swarm.base import manifest, versions
from swarm.base.manifest import Invalid, Problem
from swarm.errors import NotFound, StoreError
from swarm.fields import Labels
from swarm.model import Role, Ticket
from swarm.store.registry.schedules import ScheduleRow
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.runs.overview import RunGraph
from swarm.store.tickets.validation import shown
from swarm.workflow import graph
from swarm.workflow.definition import Webhook

YAML: Final = ("application/yaml", "application/x-yaml", "text/yaml")  # the first one by RFC 9512
MAX_INPUT_BYTES: Final = 20 << 20
_FILE: Final = "the workflow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """As `swarm workflow validate --json` prints it."""

    valid: bool
    problems: list[Problem]


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookInfo:
    """Where senders POST, and how they sign. ``secret`` is a name, and ``is_set`` says if there is a value, which no
    route shows."""

    workflow: str
    path: str
    secret: str
    is_set: bool
    header: str
    timestamp: bool
    idempotency: str


class RunBody(Fields):
    inputs: dict[str, Any] = Field(default_factory=dict)
    title: str | None = Field(default=None, min_length=1, max_length=10_000, description="default: the workflow's name")
    id: str | None = Field(default=None, min_length=1, description="of its ticket; default: a new one")
    project: str | None = None
    priority: int = 0
    timeout_seconds: float | None = None
    requires: Labels = Field(default_factory=dict, description="labels that its host must have")


async def list_workflows(call: Call) -> list[WorkflowRow]:
    return await call.store.workflows()


async def add_workflow(call: Call) -> WorkflowRow:
    text = await _text(call)
    return await call.context.heavy.run(lambda: packages.add_workflow(call.store, text, name=_FILE, by=call.actor.name))


async def validate_workflow(call: Call) -> Validity:
    text = await _text(call)
    try:
        await call.context.heavy.run(lambda: packages.checked_workflow(call.store, text, name=_FILE))
    except Invalid as error:
        return Validity(valid=False, problems=list(error.problems))
    return Validity(valid=True, problems=[])


async def _text(call: Call) -> bytes:
    return await body.read_in_time(call.request, manifest.MAX_BYTES, seconds=BODY_SECONDS)


async def show_workflow(call: Call) -> WorkflowRow:
    return await call.store.workflow(call.path["ref"])


async def remove_workflow(call: Call) -> WorkflowRow:
    return await packages.remove_workflow(call.store, call.path["ref"], by=call.actor.name)


async def enable_workflow(call: Call) -> WorkflowRow:
    return await call.store.enable_workflow(call.path["ref"], enabled=True, by=call.actor.name)


async def disable_workflow(call: Call) -> WorkflowRow:
    return await call.store.enable_workflow(call.path["ref"], enabled=False, by=call.actor.name)


async def run_workflow(call: Call) -> Ticket:
    given: RunBody = call.body
    project = project_for(call, given.project)
    row = await call.store.workflow(call.path["ref"])
    ticket = await asyncio.to_thread(_ticket, call, row, project)
    return await add_once(call, ticket, of=lambda: f"{call.path['ref']} {given.model_dump_json()}")


def _ticket(call: Call, row: WorkflowRow, project_id: str | None) -> Ticket:
    """The checked ticket of a run."""
    given: RunBody = call.body
    runs.check(row, given.inputs)
    return runs.ticket(
        row,
        given.inputs,
        by=call.actor.name,
        id=given.id,
        title=given.title,
        priority=given.priority,
        timeout_seconds=given.timeout_seconds,
        requires=json.dumps(given.requires) if given.requires else None,
        project_id=project_id,
    )


async def show_workflow_graph(call: Call) -> graph.Graph:
    row = await call.store.workflow(call.path["ref"])
    return await call.context.heavy.run(lambda: asyncio.to_thread(lambda: graph.data(row.parsed())))


async def list_workflow_schedules(call: Call) -> list[ScheduleRow]:
    row = await call.store.workflow(call.path["ref"])
    return [one for one in await call.store.schedules() if one.workflow_id == row.id]


async def show_workflow_webhook(call: Call) -> WebhookInfo:
    row = await call.store.workflow(call.path["ref"])
    hook = (await asyncio.to_thread(row.parsed)).webhook
    if hook is None:
        raise NotFound(f"the workflow {row.name}@{row.version} has no `webhook:` in its file")
    return _info(row, hook, await _names(call))


async def list_webhooks(call: Call) -> list[WebhookInfo]:
    names, rows = await _names(call), await call.store.workflows()
    return await asyncio.to_thread(_hooks, rows, names)


def _hooks(rows: Sequence[WorkflowRow], names: set[tuple[str, str]]) -> list[WebhookInfo]:
    """Of the newest version of each workflow that is enabled, as the server takes them."""
    found = []
    for name in sorted({row.name for row in rows}):
        row = versions.pick(name, rows)
        if row is None or not row.enabled:
            continue
        try:
            hook = row.parsed().webhook
        except StoreError:  # another program wrote it
            continue
        if hook is not None:
            found.append(_info(row, hook, names))
    return found


async def _names(call: Call) -> set[tuple[str, str]]:
    return {(row.name, row.scope) for row in await call.context.vault.list()}


def _info(row: WorkflowRow, hook: Webhook, names: set[tuple[str, str]]) -> WebhookInfo:
    return WebhookInfo(
        workflow=row.name,
        path=f"/hooks/{row.name}",
        secret=hook.secret,
        is_set=(hook.secret, scope_of(None, None, row.name)) in names,
        header=hook.header,
        timestamp=hook.timestamp,
        idempotency=hook.idempotency,
    )


async def list_schedules(call: Call) -> list[ScheduleRow]:
    return await call.store.schedules()


async def show_run_graph(call: Call) -> RunGraph:
    ref = call.path["id"]
    found = await call.context.heavy.run(lambda: call.store.run_graph(ref))
    id, project = found.run.ticket_id, call.actor.project_id
    if project is not None and not await call.store.ticket_states([id], project_id=project):
        raise NotFound(f"no run {shown(ref)}; `swarm ticket show` lists a ticket's")
    return found


ENDPOINTS: Final[Sequence[Endpoint]] = (
    Endpoint(
        method="GET",
        path="/v1/workflows",
        role=Role.VIEWER,
        summary="List the registered workflows, each version",
        handler=list_workflows,
        answer=list[WorkflowRow],
    ),
    Endpoint(
        method="POST",
        path="/v1/workflows",
        role=Role.ADMIN,
        summary="Check and register a workflow's file, in YAML",
        handler=add_workflow,
        upload=YAML,
        shared=True,
        max_body_bytes=manifest.MAX_BYTES,
        answer=WorkflowRow,
        status=201,
    ),
    Endpoint(
        method="POST",
        path="/v1/workflows/validate",
        role=Role.VIEWER,
        summary="Check a workflow's file, in YAML, and name every problem; nothing is registered",
        handler=validate_workflow,
        upload=YAML,
        max_body_bytes=manifest.MAX_BYTES,
        answer=Validity,
    ),
    Endpoint(
        method="GET",
        path="/v1/workflows/{ref}",
        role=Role.VIEWER,
        summary="Show a workflow: by name, name@version or id",
        handler=show_workflow,
        answer=WorkflowRow,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/workflows/{ref}",
        role=Role.ADMIN,
        summary="Remove a workflow that nothing needs",
        handler=remove_workflow,
        shared=True,
        answer=WorkflowRow,
    ),
    Endpoint(
        method="POST",
        path="/v1/workflows/{ref}/enable",
        role=Role.ADMIN,
        summary="Enable a workflow: new runs may start",
        handler=enable_workflow,
        shared=True,
        answer=WorkflowRow,
    ),
    Endpoint(
        method="POST",
        path="/v1/workflows/{ref}/disable",
        role=Role.ADMIN,
        summary="Disable a workflow: no new runs start",
        handler=disable_workflow,
        shared=True,
        answer=WorkflowRow,
    ),
    Endpoint(
        method="POST",
        path="/v1/workflows/{ref}/runs",
        role=Role.OPERATOR,
        summary="Start a run: add a ticket for the workflow; with the header Idempotency-Key, once",
        handler=run_workflow,
        body=RunBody,
        max_body_bytes=MAX_INPUT_BYTES,
        answer=Ticket,
        status=201,
    ),
    Endpoint(
        method="GET",
        path="/v1/workflows/{ref}/graph",
        role=Role.VIEWER,
        summary="A workflow's steps and what each needs",
        handler=show_workflow_graph,
        answer=graph.Graph,
    ),
    Endpoint(
        method="GET",
        path="/v1/workflows/{ref}/schedules",
        role=Role.VIEWER,
        summary="The schedules of a workflow; none if it is not the newest version",
        handler=list_workflow_schedules,
        shared=True,
        answer=list[ScheduleRow],
    ),
    Endpoint(
        method="GET",
        path="/v1/workflows/{ref}/webhook",
        role=Role.VIEWER,
        summary="A workflow's webhook, with the name of its secret",
        handler=show_workflow_webhook,
        answer=WebhookInfo,
    ),
    Endpoint(
        method="GET",
        path="/v1/webhooks",
        role=Role.VIEWER,
        summary="List the webhooks that this server takes",
        handler=list_webhooks,
        answer=list[WebhookInfo],
    ),
    Endpoint(
        method="GET",
        path="/v1/schedules",
        role=Role.VIEWER,
        summary="List the schedules of workflows",
        handler=list_schedules,
        shared=True,
        answer=list[ScheduleRow],
    ),
    Endpoint(
        method="GET",
        path="/v1/runs/{id}/graph",
        role=Role.VIEWER,
        summary="A run's steps: what each needs, its state, times and attempts",
        handler=show_run_graph,
        answer=RunGraph,
    ),
)
