"""The API of workflows and their runs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, Final

import httpx
import pytest
from starlette.routing import Route

from swarm.api import server
from swarm.api.app import application
from swarm.api.endpoint import Heavy
from swarm.api.feed import Feed
from swarm.api.problem import Refused
from swarm.app import serve
from swarm.dashboard import pages
from swarm.dashboard.render import static
from swarm.model import Succeeded
from swarm.workflow.parse import MAX_STEPS
from tests.api.served import Served
from tests.api.test_auth import refused
from tests.conftest import PATIENCE_SECONDS

YAML = {"content-type": "application/yaml"}
FLOW = """
name: release
version: 1.0.0
inputs: {branch: string}
schedule: {cron: "0 3 * * *", inputs: {branch: main}}
webhook: {secret: hook_key, inputs: {branch: main}}
steps:
  - {id: build, agent: echo, inputs: {name: "${inputs.branch}"}}
  - {id: each, agent: echo, needs: [build], for_each: "${[1, 2, 3]}"}
  - {id: sign, needs: [build], approval: {message: "Sign it?"}}
on_error:
  - {id: tell, agent: echo}
"""


async def put(client: httpx.AsyncClient, text: str = FLOW, to: str = "") -> httpx.Response:
    return await client.post(f"/v1/workflows{to}", content=text.encode(), headers=YAML)


async def changes(served: Served) -> list[tuple[str, str, str]]:
    found = [event.data for event in await served.store.events(None) if event.kind == "change"]
    return [(str(one["did"]), str(one["by"]), str(one.get("name"))) for one in found if one["by"] != "test"]


async def test_from_file_to_removal(served: Served) -> None:
    checked = await put(served.viewer, to="/validate")
    assert checked.json() == {"valid": True, "problems": []} and await served.store.workflows() == []
    added = await put(served.admin)
    assert added.status_code == 201, added.text
    row = added.json()
    assert (row["name"], row["enabled"], row["definition"]["steps"][0]["id"]) == ("release", True, "build")
    assert (await put(served.admin)).json() == row  # again: nothing changes
    assert (await served.viewer.get("/v1/workflows")).json() == [row]
    for ref in ("release", "release@1", row["id"], row["id"][:8]):
        assert (await served.viewer.get(f"/v1/workflows/{ref}")).json() == row
    graph = (await served.viewer.get("/v1/workflows/release/graph")).json()
    assert [(node["id"], node["part"], node["layer"], node["kind"], node["many"]) for node in graph["nodes"]] == [
        ("build", "steps", 1, "agent", False),
        ("each", "steps", 2, "agent", True),
        ("sign", "steps", 2, "approval", False),
        ("tell", "on_error", 1, "agent", False),
    ]
    assert graph["edges"] == [{"source": "build", "target": "each"}, {"source": "build", "target": "sign"}]
    (schedule,) = (await served.viewer.get("/v1/workflows/release/schedules")).json()
    assert schedule["cron"] == "0 3 * * *" and (await served.viewer.get("/v1/schedules")).json() == [schedule]
    assert (await served.admin.post("/v1/workflows/release/disable")).json()["enabled"] is False
    assert (await served.viewer.get("/v1/webhooks")).json() == []
    refused(await served.operator.post("/v1/workflows/release/runs", json={}), 409, "is disabled")
    for _ in range(2):  # the second changes nothing
        assert (await served.admin.post("/v1/workflows/release/enable")).json()["enabled"] is True
    hook = (await served.viewer.get("/v1/workflows/release/webhook")).json()
    assert (hook["path"], hook["secret"], hook["is_set"]) == ("/hooks/release", "hook_key", False)
    value = {"value": "a long value that no answer has", "webhook": "release"}
    assert (await served.admin.put("/v1/secrets/hook_key", json=value)).status_code == 204
    (hook,) = (await served.viewer.get("/v1/webhooks")).json()
    assert hook["is_set"] is True and value["value"] not in json.dumps(hook)
    refused(await served.admin.delete("/v1/workflows/release"), 409, "a schedule starts")
    await served.admin.post("/v1/workflows/release/disable")
    assert (await served.admin.delete("/v1/workflows/release")).json()["id"] == row["id"]
    refused(await served.admin.delete("/v1/workflows/release"), 404, "no workflow 'release'")
    name, by = "release@1.0.0", "the-admin"
    assert await changes(served) == [
        ("workflow.add", by, name),
        ("workflow.disable", by, name),
        ("workflow.enable", by, name),
        ("secret.set", by, "hook_key"),
        ("workflow.disable", by, name),
        ("workflow.remove", by, name),
    ]


BAD_FILES: Final[list[Any]] = [
    ("name: release", "steps"),
    ("name: [", "line 1"),
    (FLOW.replace("needs: [build], for", "needs: [biuld], for"), "biuld"),
    (FLOW.replace("agent: echo, inputs", "agent: ecko, inputs"), "ecko"),
    ("\xff\x00", ""),
    ("", ""),
    ("&a [*a, *a]", ""),
]


async def test_bad_files(served: Served) -> None:
    """The sentence that `swarm workflow add` prints, and the problems that `validate --json` does."""
    for text, said in BAD_FILES:
        answer = await put(served.admin, text)
        refused(answer, 400, said)
        checked = (await put(served.viewer, text, "/validate")).json()
        assert not checked["valid"] and all(set(one) == {"line", "column", "message"} for one in checked["problems"])
        assert all(one["message"] in answer.json()["detail"] for one in checked["problems"]) and checked["problems"]
    assert await served.store.workflows() == []


async def test_files_are_bounded(served: Served) -> None:
    refused(await put(served.admin, "#" * (1 << 20) + "\n"), 413, "more than")
    refused(await served.admin.post("/v1/workflows", json={}), 415, "application/yaml")
    steps = "".join(f"  - {{id: s{n}, agent: echo}}\n" for n in range(MAX_STEPS + 1))
    refused(await put(served.admin, f"name: large\nversion: 1.0.0\nsteps:\n{steps}"), 400, "at most")


async def test_heavy_work_has_few_places() -> None:
    heavy, begun, done = Heavy(wait_seconds=0.01), asyncio.Semaphore(0), asyncio.Event()

    async def work() -> str:
        begun.release()
        await done.wait()
        return "done"

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(heavy.run(work)) for _ in range(2)]
        for _ in tasks:
            await begun.acquire()
        with pytest.raises(Refused, match="try again") as caught:
            await heavy.run(work)
        assert (caught.value.status, caught.value.headers) == (503, {"retry-after": "2"})
        done.set()
    assert [task.result() for task in tasks] == ["done", "done"] and await heavy.run(work) == "done"


async def test_what_takes_long_needs_a_place(served: Served) -> None:
    """Of which this server has none."""
    await put(served.admin)
    async with Feed.of(served.store) as feed:
        full = replace(serve.context_of(served.settings, served.store, feed), heavy=Heavy(at_once=0, wait_seconds=0.01))
        app = application(full, hooks=Route("/hooks/{name}", static), pages=pages.routes(full))
        async with server.serving(app, host="127.0.0.1", port=0) as (url, _):
            headers = {"authorization": f"Bearer {served.tokens['admin']}"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
                refused(await put(client), 503, "try again")
                refused(await put(client, to="/validate"), 503, "try again")
                refused(await client.get("/v1/workflows/release/graph"), 503, "try again")
                refused(await client.get("/v1/runs/any/graph"), 503, "try again")
                page = await client.get("/workflows/release")
                assert page.status_code == 503 and page.headers["retry-after"] == "2"
                assert (await client.get("/v1/workflows")).status_code == 200


async def test_other_content_needs_another_version(served: Served) -> None:
    assert (await put(served.admin)).status_code == 201
    refused(await put(served.admin, FLOW.replace("Sign it?", "Sure?")), 409, "give the changed workflow a new version")


async def test_a_run_is_started_once(served: Served) -> None:
    await put(served.admin)
    body = {"inputs": {"branch": "main"}, "priority": 3, "project": "a", "requires": {"zone": "a"}}
    key = {"idempotency-key": "k"}
    first, again = [
        await served.operator.post("/v1/workflows/release@1/runs", json=body, headers=key) for _ in range(2)
    ]
    assert first.status_code == again.status_code == 201 and first.json() == again.json()
    ticket = first.json()
    assert (ticket["title"], ticket["trigger_type"], ticket["trigger_data"]) == (
        "release",
        "manual",
        {"by": "the-operator"},
    )
    assert (ticket["inputs"], ticket["priority"], ticket["project_id"]) == ({"branch": "main"}, 3, "a")
    assert ticket["requires"] == {"zone": "a"}
    other = {**body, "inputs": {"branch": "next"}}
    refused(await served.operator.post("/v1/workflows/release@1/runs", json=other, headers=key), 409, "another request")
    assert len(await served.store.tickets()) == 1
    events = [event.data for event in await served.store.events(ticket["id"]) if event.kind == "change"]
    assert events == [{"did": "ticket.add", "by": "the-operator"}]


BAD_RUNS: Final[list[Any]] = [
    ("relaese", {}, 404, "did you mean 'release'"),
    ("release@2", {}, 404, "no workflow"),
    ("release", {}, 400, "branch"),
    ("release", {"inputs": {"branch": 1}}, 400, "branch"),
    ("release", {"inputs": {"branch": "x"}, "id": ""}, 400, "id"),
    ("release", {"inputs": {"branch": "x"}, "priority": 1 << 40}, 400, "priority"),
    ("release", {"inputs": {"branch": "x"}, "timeout_seconds": -1}, 400, "timeout_seconds"),
    ("release", {"inputs": {"branch": "x"}, "requires": {"zone": 1.5}}, 400, "requires.zone"),
    ("release", {"inputs": []}, 400, "inputs: must be"),
    ("release", {"branch": "x"}, 400, "unknown field"),
]


async def test_bad_runs(served: Served) -> None:
    await put(served.admin)
    for ref, body, status, said in BAD_RUNS:
        refused(await served.operator.post(f"/v1/workflows/{ref}/runs", json=body), status, said)
    assert await served.store.tickets() == []


async def test_the_graph_of_a_run(served: Served) -> None:
    await put(served.admin)
    made = await served.operator.post("/v1/workflows/release/runs", json={"inputs": {"branch": "main"}})
    (claim,) = await _claimed(served, made.json()["id"])
    graph = await _graph(served, claim.run_id)
    assert graph["run"]["status"] == "running" and graph["complete"]
    assert _states(graph) == {"build": "running", "each": "pending", "sign": "pending", "tell": "pending"}
    build = graph["nodes"][0]
    assert (build["attempts"], build["execution"]) == (1, claim.step_execution_id) and build["started_at"]
    assert build["duration_ms"] >= 0 and build["completed_at"] is None
    await served.store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0)
    claims = [*await _claimed(served, made.json()["id"])]
    await served.store.finish(claims[0].attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0)
    graph = await _graph(served, claim.run_id)
    each = graph["nodes"][1]
    assert _states(graph) == {"build": "completed", "each": "running", "sign": "waiting", "tell": "pending"}
    assert each["executions"]["completed"] == 1 and sum(each["executions"].values()) == 3
    assert len(graph["edges"]) == 2
    refused(await served.viewer.get("/v1/runs/nobody/graph"), 404, "no run 'nobody'")


async def test_the_graph_of_a_plain_tickets_run(served: Served) -> None:
    await served.add("t")
    (claim,) = await served.store.claim("worker", lease_seconds=60)
    (node,) = (await _graph(served, claim.run_id))["nodes"]
    assert (node["id"], node["what"], node["status"], node["attempts"]) == ("main", "echo", "running", 1)


async def test_the_graph_of_a_wide_run_is_small(served: Served) -> None:
    """Thousands of executions are counts, not nodes; nested runs are named, at most a hundred of each step."""
    flow = """
name: wide
version: 1.0.0
inputs: {items: any}
steps:
  - id: all
    for_each: ${inputs.items}
    workflow: {steps: [{id: one, agent: echo}, {id: two, agent: echo}]}
"""
    assert (await put(served.admin, flow)).status_code == 201
    made = await served.operator.post("/v1/workflows/wide/runs", json={"inputs": {"items": list(range(1000))}})
    (claim, *_) = await _claimed(served, made.json()["id"])
    runs = await served.store.runs(made.json()["id"])
    top = next(run for run in runs if run.root_run_id is None)
    answer = await served.viewer.get(f"/v1/runs/{top.id}/graph")
    (node,) = answer.json()["nodes"]
    assert sum(node["executions"].values()) == 1000 and len(node["runs"]) == 100 and len(answer.content) < 20_000
    inner = await _graph(served, claim.run_id)
    assert inner["run"]["path"].startswith("all[") and _states(inner) == {"one": "running", "two": "ready"}


async def _claimed(served: Served, ticket_id: str) -> Any:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (claims := await served.store.claim("worker", lease_seconds=60, ticket_id=ticket_id)):
            await served.store.decided()
    return claims


async def _graph(served: Served, run_id: str) -> Any:
    answer = await served.viewer.get(f"/v1/runs/{run_id}/graph")
    assert answer.status_code == 200, answer.text
    return answer.json()


def _states(graph: Any) -> dict[str, str]:
    return {node["id"]: node["status"] for node in graph["nodes"]}
