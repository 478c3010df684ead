"""Inputs are checked before a VM is started, outputs before a ticket is done; and the errors of a workflow's ticket."""

from __future__ import annotations

import json

import pytest

from swarm.engine.run_once import run_ticket
from tests.engine.conftest import Bench

ECHO = "import json\nv = json.load(open('input.json'))['inputs']\njson.dump(v, open('output.json', 'w'))\n"
SCHEMA = json.dumps(
    {
        "type": "object",
        "required": ["n"],
        "properties": {"n": {"type": "integer"}, "m": {"default": 7}, "deep": {"properties": {"a": {"maximum": 1}}}},
    }
)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [({"n": "1"}, "$.n"), ({}, "'n' is missing"), ({"n": 1, "deep": {"a": 2}}, "$.deep.a")],
    ids=["type", "missing", "deep"],
)
async def test_inputs_that_do_not_fit_start_no_vm(plain: Bench, inputs: object, says: str) -> None:
    ticket = await plain.run(ECHO, inputs=inputs, inputs_schema=SCHEMA)
    (attempt,) = await plain.attempts()
    assert (ticket.state, attempt.reason, attempt.vm_id) == ("failed", "input_invalid", None)
    assert ticket.error and says in ticket.error and "agent@1.0.0" in ticket.error


async def test_the_agent_finds_the_defaults(plain: Bench) -> None:
    ticket = await plain.run(ECHO, inputs={"n": 1}, inputs_schema=SCHEMA, outputs_schema=SCHEMA)
    assert (ticket.state, ticket.outputs) == ("done", '{"n":1,"m":7}')


@pytest.mark.parametrize("says", ["$.n", "can't be used"])
async def test_outputs_that_do_not_fit_fail(plain: Bench, says: str) -> None:
    agent = await plain.agent(ECHO, outputs_schema=SCHEMA)
    if says != "$.n":
        plain.sql('UPDATE agents SET outputs_schema = \'{"type": "nonsense"}\' WHERE id = ?', agent.id)
    plain.insert("t", agent.id, inputs='{"n": "one"}')
    ticket = await run_ticket(plain.store, plain.worker, "t")
    (attempt,) = await plain.attempts()
    assert (ticket.state, ticket.outputs, attempt.reason) == ("failed", None, "output_invalid")
    assert ticket.error and says in ticket.error
    assert plain.live_vms() == []
