"""A large value passed from one agent to another, through real rows and files; and the commands that show it."""

from __future__ import annotations

import json

from swarm.engine.run_once import run_ticket
from swarm.workflow.definition import Step, Workflow
from tests.engine.conftest import Bench
from tests.engine.test_service import command

MAKE = """
import json
like = {"$artifact": {"digest": "0", "bytes": 1}}
json.dump({"log": "x" * 1_000_000, "code": 3, "like": like}, open("output.json", "w"))
"""
TAKE = """
import json
inputs = json.load(open("input.json"))["inputs"]
json.dump({"size": len(inputs["log"]), "like": inputs["all"]["like"], "log": inputs["log"]}, open("output.json", "w"))
"""


async def test_from_agent_to_agent(plain: Bench) -> None:
    await plain.agent(MAKE, "make")
    await plain.agent(TAKE, "take")
    inputs = {"log": "${steps.make.outputs.log}", "all": "${steps.make.outputs}"}
    steps = (Step(id="make", agent="make@1.0.0"), Step(id="take", agent="take@1.0.0", needs=("make",), inputs=inputs))
    made = {"size": "${steps.take.outputs.size}", "like": "${steps.take.outputs.like}"}
    flow = Workflow(name="large", version="1.0.0", steps=steps, outputs=made)
    row = await plain.store.put_workflow(flow)
    plain.insert("t", None, execution_mode="workflow", workflow_id=row.id)  # type: ignore[arg-type]
    ticket = await run_ticket(plain.store, plain.worker, "t")
    assert ticket.state == "done", ticket.error
    assert json.loads(ticket.outputs or "") == {"size": 1_000_000, "like": {"$artifact": {"digest": "0", "bytes": 1}}}
    assert max(len(step.inputs or "") + len(step.outputs or "") for step in await plain.store.steps("t")) < 2000

    _, out, _ = await command(plain, "swarm", "artifact", "list", "--ticket", "t", "--json")
    (artifact,) = json.loads(out)  # the same value, left by both
    assert artifact["bytes"] == 1_000_002
    status, out, _ = await command(plain, "swarm", "artifact", "show", artifact["digest"][:10])
    assert status == 0 and json.loads(out) == "x" * 1_000_000
    status, _, err = await command(plain, "swarm", "artifact", "show", "zz")
    assert status == 2 and err.startswith("error: no artifact begins with 'zz'")
