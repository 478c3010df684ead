"""What a token of one project sees on pages: what it gets from the API, and no more."""

from __future__ import annotations

from typing import Any, Final, cast

import httpx
from starlette.routing import Route

from swarm.api.endpoint import Context
from swarm.dashboard import pages
from swarm.model import Role, Sandbox, Ticket
from swarm.store.registry.tokens import Actor, new_token
from tests.api.served import ECHO, Served

OWN: Final = "own"  # the project's own; another project's does not exist
SHARED: Final = "shared"  # it tells of all projects, or changes what they share
READ: Final = "read"  # of no project, and tells of none
OPEN: Final = "open"  # for everybody

TABLE: Final[dict[tuple[str, str], str]] = {
    ("GET", "/static/{digest}/{name}"): OPEN,
    ("GET", "/login"): OPEN,
    ("POST", "/login"): OPEN,
    ("POST", "/logout"): OPEN,
    ("GET", "/live"): OWN,
    ("GET", "/"): READ,
    ("GET", "/tickets"): READ,
    ("GET", "/tickets/bulk"): READ,
    ("POST", "/tickets/bulk"): READ,
    ("GET", "/tickets/{id}"): OWN,
    ("GET", "/tickets/{id}/output"): OWN,
    ("GET", "/tickets/{id}/text/{name}"): OWN,
    **{(method, f"/tickets/{{id}}/{verb}"): OWN for method in ("GET", "POST") for verb in ("ready", "cancel", "retry")},
    ("GET", "/tickets/{id}/delete"): OWN,
    ("POST", "/tickets/{id}/delete"): OWN,
    ("GET", "/tickets/{id}/graph"): OWN,
    ("GET", "/tickets/{id}/graph/step"): OWN,
    ("POST", "/tickets/{id}/graph/retry"): OWN,
    ("POST", "/tickets/{id}/answer"): OWN,
    ("GET", "/sandboxes"): READ,
    ("GET", "/sandboxes/{id}"): OWN,
    ("POST", "/sandboxes/{id}/pause"): OWN,
    ("GET", "/sandboxes/{id}/terminal"): OWN,
    ("GET", "/sandboxes/{id}/end"): OWN,
    ("POST", "/sandboxes/{id}/end"): OWN,
    ("GET", "/approvals"): READ,
    ("GET", "/agents"): READ,
    ("GET", "/agents/{id}"): READ,
    ("GET", "/workflows"): READ,
    ("GET", "/workflows/{id}"): READ,
    ("POST", "/workflows/{id}/start"): READ,
    ("POST", "/workflows/{id}/enable"): SHARED,
    ("GET", "/schedules"): SHARED,
    ("GET", "/costs"): SHARED,
    ("GET", "/hosts"): SHARED,
}
QUERIES: Final = {"/live": "?ticket={id}", "/tickets/bulk": "?do=cancel&all=1"}
FORMS: Final = {"/tickets/bulk": {"do": "cancel", "id": "theirs-1"}}
WORKFLOW: Final = b"""
name: nightly
version: 1.0.0
schedule: [{cron: "17 3 * * *"}]
steps: [{id: one, agent: echo}]
"""


def _routes() -> set[tuple[str, str]]:
    found = [one for one in pages.routes(cast(Context, None)) if isinstance(one, Route)]
    return {(method, one.path) for one in found for method in one.methods or () if method != "HEAD"}


def test_every_page_is_in_the_table() -> None:
    """A new page needs a decision: what does a project's token get?"""
    assert _routes() == set(TABLE)


async def test_what_a_projects_token_gets(served: Served) -> None:
    """Even an admin's, and for another project's ticket no other word than for an id that nobody has."""
    await served.admin.post("/v1/workflows", content=WORKFLOW, headers={"content-type": "application/yaml"})
    (workflow,) = (await served.viewer.get("/v1/workflows")).json()
    await served.add("theirs-1", project_id="theirs", title="title of theirs")
    sandbox = Sandbox(id="theirs-1", state="starting", name="name-of-theirs", project_id="theirs")
    await served.store.add_sandbox(sandbox, by="test")
    refs = {"/agents/{id}": ECHO.id, "/workflows/{id}": workflow["id"]}
    async with await _holder(served, "mine") as mine:
        for (method, path), kind in TABLE.items():
            ref = next((ref for start, ref in refs.items() if path.startswith(start)), "theirs-1")
            answer = await _called(mine, method, path, ref)
            where = f"{method} {path}: {answer.status_code} {answer.text}"
            if kind == SHARED:
                assert answer.status_code == 403 and "of all projects" in answer.text, where
            elif kind == OWN:
                assert answer.status_code == 404, where
                nobody = await _called(mine, method, path, "nobodys1")
                assert nobody.text.replace("nobodys1", "theirs-1") == answer.text, where
            elif kind == READ:
                assert answer.status_code in (200, 303), where
                for told in ("theirs", "<code>17 3", "by schedule", 'href="/hosts"', 'href="/costs"'):
                    assert told not in answer.text or (told == "theirs" and path == "/tickets/bulk"), (told, where)
    assert (await served.store.ticket("theirs-1")).state == "ready"
    assert (await served.store.sandbox("theirs-1")).state == "starting"
    assert "<code>17 3" in (await served.viewer.get("/schedules")).text
    assert "by schedule" in (await served.viewer.get("/workflows")).text


async def test_why_a_ticket_waits_is_told_without_others(served: Served) -> None:
    fields: dict[str, Any] = {"title": "x", "state": "ready", "agent_id": ECHO.id}
    await served.add("needed-by-mine", project_id="theirs")
    await served.add("first", project_id="mine")
    await served.store.add_ticket(
        Ticket(id="second", project_id="mine", **fields), depends_on=["needed-by-mine", "first"]
    )
    assert await served.store.claim("worker", lease_seconds=60, ticket_id="second") == []
    assert (await served.store.ticket("second")).state == "blocked"
    async with await _holder(served, "mine") as mine:
        waits, ready = (await mine.get("/tickets/second")).text, (await mine.get("/tickets/first")).text
    assert "needed-by-mine" not in waits and 'href="/tickets/first"' in waits
    assert "It is in the queue." in ready and "are ready" not in ready and "engine" not in ready.lower()
    assert "needed-by-mine" in (await served.viewer.get("/tickets/second")).text


async def _holder(served: Served, project: str) -> httpx.AsyncClient:
    token = new_token()
    await served.store.add_token(token, Actor(name="team", role=Role.ADMIN, project_id=project), by="test")
    return httpx.AsyncClient(base_url=served.url, headers={"authorization": f"Bearer {token}"}, timeout=60)


async def _called(client: httpx.AsyncClient, method: str, path: str, ref: str) -> httpx.Response:
    address = (path + (QUERIES.get(path, "") if method == "GET" else "")).replace("{id}", ref)
    address = address.replace("{name}", "title").replace("{digest}", "x")
    data = FORMS.get(path, {"x": ""}) if method == "POST" else None
    return await client.request(method, address, data=data)
