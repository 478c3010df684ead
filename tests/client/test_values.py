"""The SDK's values name what the server's do: a field renamed on one side would have its default for ever."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from swarm import client, model
from swarm.api.v1 import tickets
from swarm.base import manifest
from swarm.client.values import Filters, TicketFields, read
from swarm.store import comparison, spending, ticket_files
from swarm.store.registry.workflows import WorkflowRow
from swarm.store.sql import rows


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (TicketFields, model.Ticket),
        (client.Run, rows.RunRow),
        (client.Step, rows.StepRow),
        (client.Attempt, rows.AttemptRow),
        (client.Event, model.Event),
        (client.File, ticket_files.TicketFile),
        (client.Comparison, comparison.Comparison),
        (client.FileChange, comparison.Change),
        (client.Agent, model.Agent),
        (client.Workflow, WorkflowRow),
        (client.Problem, manifest.Problem),
        (client.Costs, spending.Costs),
    ],
)
def test_fields(ours: Any, theirs: Any) -> None:
    named = [{one.name for one in dataclasses.fields(kind)} for kind in (ours, theirs)]
    assert named[0] <= named[1]
    required = [
        one.name for one in dataclasses.fields(ours) if one.default is one.default_factory is dataclasses.MISSING
    ]
    assert len(required) <= 1, "an older server may not send it"


def test_what_is_sent() -> None:
    made_here = {"prompt", "key", "files"}
    assert client.Submission.__annotations__.keys() - made_here | {"agent"} == tickets.Submission.model_fields.keys()
    assert Filters.__annotations__.keys() == tickets.Filters.model_fields.keys()


def test_other_versions_of_the_server() -> None:
    newer = {"id": "t", "state": "done", "colour": "red", "title": None, "outputs": [1], "_swarm": "x"}
    assert read(TicketFields, newer) == TicketFields(id="t", state="done", outputs=[1])
    assert read(client.Costs, {"name": "x"}).cost_usd == 0.0
    assert client.Details.of({}) == client.Details()
