"""Starts runs of workflows by hand: what is checked before a ticket is added, since it would fail later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from swarm import schema
from swarm.errors import Conflict, UsageError
from swarm.model import FILES, Ticket
from swarm.store import submission
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
    row: WorkflowRow, inputs: Mapping[str, object], *, by: str, title: str | None = None, **fields: Any
) -> Ticket:
    """``fields``: others of `submission.new_ticket`."""
    trigger = json.dumps({"by": by})
    title = title or row.name
    return submission.new_ticket(
        None, row, inputs=inputs, title=title, trigger_type="manual", trigger_data=trigger, **fields
    )
