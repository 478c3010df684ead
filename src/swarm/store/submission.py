"""A new ticket from what a person or a program gives: the command line and the API make it in one way."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from swarm.errors import UsageError
from swarm.model import Agent, ExecutionMode, Ticket, TicketState
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.store import Store


async def runner(store: Store, agent: str | None, workflow: str | None) -> tuple[Agent | None, WorkflowRow | None]:
    """The agent or the workflow that is named: one of the two. Raises UsageError, NotFound."""
    if (agent is None) == (workflow is None):
        raise UsageError("a ticket runs either an agent or a workflow: name one of them")
    if agent is not None:
        return await store.agent(agent), None
    assert workflow is not None
    return None, await store.workflow(workflow)


def new_ticket(
    agent: Agent | None,
    workflow: WorkflowRow | None,
    *,
    inputs: Mapping[str, Any],
    id: str | None = None,
    draft: bool = False,
    **fields: Any,
) -> Ticket:
    """``fields``: others of `Ticket`."""
    return Ticket(
        id=id or str(uuid.uuid4()),
        state=TicketState.DRAFT if draft else TicketState.READY,
        agent_id=agent.id if agent else None,
        assignee_id=agent.id if agent else None,
        assignee_type="agent" if agent else None,
        execution_mode=ExecutionMode.AGENT if agent else ExecutionMode.WORKFLOW,
        workflow_id=workflow.id if workflow else None,
        inputs=json.dumps(inputs, ensure_ascii=False),
        **fields,
    )
