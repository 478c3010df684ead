"""Starts runs of workflows by hand: what is checked before a ticket is added, since it would fail later."""

from __future__ import annotations

import json
from collections.abc import Mapping

from swarm import schema
from swarm.errors import Conflict, UsageError
from swarm.model import FILES, ExecutionMode, Ticket, TicketState
from swarm.store.registry.workflows import WorkflowRow
from swarm.workflow.definition import Workflow


def check(row: WorkflowRow, inputs: Mapping[str, object]) -> None:
    """Raises Conflict for a disabled workflow, UsageError for inputs that don't fit, StoreError for a broken row."""
    if not row.enabled:
        name = f"{row.name}@{row.version}"
        raise Conflict(f"the workflow {name} is disabled; `swarm workflow enable {name}` enables it")
    _check_inputs(row.parsed(), inputs)


def _check_inputs(workflow: Workflow, given: Mapping[str, object]) -> None:
    if workflow.inputs_schema is not None:
        given = {name: value for name, value in given.items() if name != FILES}
        full = schema.with_defaults(given, workflow.inputs_schema)
        if wrong := schema.issues(full, schema.text(workflow.inputs_schema)):
            raise UsageError(
                f"the inputs don't fit the workflow {workflow.name}@{workflow.version}: {'; '.join(map(str, wrong))}"
            )


def ticket(
    row: WorkflowRow,
    inputs: Mapping[str, object],
    *,
    id: str,
    by: str,
    title: str | None = None,
    priority: int = 0,
    timeout_seconds: float | None = None,
    project: str | None = None,
) -> Ticket:
    return Ticket(
        id=id,
        title=title or row.name,
        state=TicketState.READY,
        project_id=project,
        execution_mode=ExecutionMode.WORKFLOW,
        workflow_id=row.id,
        inputs=json.dumps(inputs, ensure_ascii=False),
        priority=priority,
        timeout_seconds=timeout_seconds,
        trigger_type="manual",
        trigger_data=json.dumps({"by": by}),
    )
