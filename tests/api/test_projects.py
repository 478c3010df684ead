"""What a token of one project sees: its own tickets, what all may read, and nothing that tells of other projects."""

from __future__ import annotations

import asyncio
import base64
import html
import re
import sqlite3
from typing import Any, Final

import httpx

from swarm.api.app import ENDPOINTS
from swarm.api.endpoint import Endpoint
from swarm.api.v1.files import TAR
from swarm.model import Role, Sandbox, Snapshot, Ticket
from swarm.store.registry.tokens import Actor, new_token
from tests.api.served import ECHO, Served
from tests.api.test_agents import archive
from tests.conftest import PATIENCE_SECONDS

OWN: Final = "own"  # the project's own; another project's does not exist
SHARED: Final = "shared"  # it tells of all projects, or changes what they share: refused, to its admins too
READ: Final = "read"  # of no project, and tells of none

TABLE: Final[dict[tuple[str, str], str]] = {
    ("GET", "/v1/tickets"): OWN,
    ("POST", "/v1/tickets"): OWN,
    ("GET", "/v1/tickets/counts"): OWN,
    ("POST", "/v1/tickets/bulk"): OWN,
    ("GET", "/v1/tickets/{id}"): OWN,
    ("DELETE", "/v1/tickets/{id}"): OWN,
    ("GET", "/v1/tickets/{id}/wait"): OWN,
    ("POST", "/v1/tickets/{id}/ready"): OWN,
    ("POST", "/v1/tickets/{id}/retry"): OWN,
    ("POST", "/v1/tickets/{id}/approve"): OWN,
    ("POST", "/v1/tickets/{id}/reject"): OWN,
    ("POST", "/v1/tickets/{id}/cancel"): OWN,
    ("GET", "/v1/tickets/{id}/events"): OWN,
    ("GET", "/v1/tickets/{id}/events/live"): OWN,
    ("GET", "/v1/tickets/{id}/output"): OWN,
    ("GET", "/v1/tickets/{id}/diff"): OWN,
    ("GET", "/v1/tickets/{id}/files"): OWN,
    ("GET", "/v1/tickets/{id}/files/{name:path}"): OWN,
    ("GET", "/v1/tickets/{id}/archive"): OWN,
    ("POST", "/v1/files"): OWN,
    ("GET", "/v1/artifacts"): OWN,
    ("GET", "/v1/artifacts/{digest}"): OWN,
    ("GET", "/v1/events"): OWN,
    ("GET", "/v1/events/live"): OWN,
    ("GET", "/v1/runs/{id}/graph"): OWN,
    ("GET", "/v1/workflows"): READ,
    ("POST", "/v1/workflows"): SHARED,
    ("POST", "/v1/workflows/validate"): READ,
    ("GET", "/v1/workflows/{ref}"): READ,
    ("DELETE", "/v1/workflows/{ref}"): SHARED,
    ("POST", "/v1/workflows/{ref}/enable"): SHARED,
    ("POST", "/v1/workflows/{ref}/disable"): SHARED,
    ("POST", "/v1/workflows/{ref}/runs"): READ,
    ("GET", "/v1/workflows/{ref}/graph"): READ,
    ("GET", "/v1/workflows/{ref}/schedules"): SHARED,
    ("GET", "/v1/workflows/{ref}/webhook"): READ,
    ("GET", "/v1/webhooks"): READ,
    ("GET", "/v1/schedules"): SHARED,
    ("GET", "/v1/agents"): READ,
    ("POST", "/v1/agents"): SHARED,
    ("POST", "/v1/agents/validate"): SHARED,
    ("GET", "/v1/agents/{ref}"): READ,
    ("GET", "/v1/agents/{ref}/package"): READ,
    ("GET", "/v1/agents/{ref}/check"): READ,
    ("DELETE", "/v1/agents/{ref}"): SHARED,
    ("GET", "/v1/secrets"): SHARED,
    ("PUT", "/v1/secrets/{name}"): SHARED,
    ("DELETE", "/v1/secrets/{name}"): SHARED,
    ("GET", "/metrics"): SHARED,
    ("GET", "/v1/notices"): SHARED,
    ("POST", "/v1/notices"): SHARED,
    ("DELETE", "/v1/notices/{id}"): SHARED,
    ("POST", "/v1/notices/{id}/test"): SHARED,
    ("GET", "/v1/status"): SHARED,
    ("GET", "/v1/engines"): SHARED,
    ("GET", "/v1/hosts"): SHARED,
    ("GET", "/v1/hosts/{name}"): SHARED,
    ("POST", "/v1/hosts/{name}/drain"): SHARED,
    ("POST", "/v1/hosts/{name}/undrain"): SHARED,
    ("DELETE", "/v1/hosts/{name}"): SHARED,
    ("GET", "/v1/costs"): SHARED,
    ("GET", "/v1/images"): SHARED,
    ("DELETE", "/v1/images/{digest}"): SHARED,
    ("GET", "/v1/templates"): SHARED,
    ("DELETE", "/v1/templates/{key}"): SHARED,
    ("GET", "/v1/sandboxes"): READ,
    ("POST", "/v1/sandboxes"): READ,
    ("GET", "/v1/snapshots"): READ,
    **{
        (method, f"/v1/sandboxes/{{id}}{verb}"): OWN
        for method, verbs in {
            "GET": (
                *("", "/wait", "/events", "/processes", "/processes/{process}/output", "/files", "/files/info"),
                *("/files/content", "/files/uploaded", "/files/archive", "/files/watch"),
            ),
            "POST": (
                *("/pause", "/resume", "/fork", "/snapshot", "/exec", "/processes/{process}/signal", "/files/move"),
                "/files/directory",
            ),
            "PUT": ("/files/content", "/files/archive"),
            "DELETE": ("", "/files"),
        }.items()
        for verb in verbs
    },
    ("GET", "/v1/snapshots/{id}"): OWN,
    ("DELETE", "/v1/snapshots/{id}"): OWN,
    ("GET", "/v1/whoami"): READ,
    ("GET", "/v1/tokens"): SHARED,
    ("POST", "/v1/tokens"): SHARED,
    ("DELETE", "/v1/tokens/{name}"): SHARED,
}

WORKFLOW: Final = b"""
name: ours
version: 1.0.0
webhook: {secret: hook}
steps: [{id: one, agent: echo}]
"""


def test_every_route_is_in_the_table() -> None:
    """A new route needs a decision: what does a project's token get?"""
    routes = {(one.method, one.path) for one in ENDPOINTS}
    assert routes - set(TABLE) == set(), "add them to TABLE"
    assert set(TABLE) - routes == set(), "they are gone"
    shared = {(one.method, one.path) for one in ENDPOINTS if one.shared}
    assert shared == {route for route, kind in TABLE.items() if kind == SHARED}


BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/tickets": {"title": "x", "agent": "echo"},
    "/v1/tickets/bulk": {"action": "cancel", "filter": {}, "confirm": True},
    "/v1/tickets/{id}/reject": {"why": "no"},
    "/v1/sandboxes/{id}/exec": {"argv": ["true"]},
    "/v1/sandboxes/{id}/files/move": {"path": "a", "to": "b"},
    "/v1/sandboxes/{id}/files/directory": {"path": "a"},
}
QUERIES: Final = {
    "/v1/tickets/{id}/wait": "?timeout_seconds=0",
    "/v1/tickets/{id}/diff": "?other={id}",
    "/v1/artifacts": "?ticket={id}",
    "/v1/sandboxes/{id}/files": "?path=x",
    **{f"/v1/sandboxes/{{id}}/files/{what}": "?path=x" for what in ("info", "content", "archive", "watch")},
    "/v1/sandboxes/{id}/files/uploaded": "?path=x&upload=u",
}
DIGESTS: Final = {"mine": "a" * 64, "theirs": "b" * 64}


async def test_what_a_projects_token_gets(served: Served) -> None:
    """Even an admin's. What is of another project does not exist, also not in what is of no project."""
    await served.admin.post("/v1/workflows", content=WORKFLOW, headers={"content-type": "application/yaml"})
    runs = {project: await _run_of(served, project) for project in ("mine", "theirs")}
    for project in ("mine", "theirs", None):
        await served.add(f"ticket-{project}", project_id=project, title=f"title of {project or 'theirs'}")
        await _sandbox(served, f"ticket-{project}", project)
    for project, digest in DIGESTS.items():
        await served.store.keep_artifacts(f"ticket-{project}", {digest: f'"title of {project}"'})
    async with await _holder(served, "mine") as mine:
        for number, endpoint in enumerate(ENDPOINTS):
            kind = TABLE[endpoint.method, endpoint.path]
            await served.add(f"ticket-{number}", project_id="mine")
            await _sandbox(served, f"ticket-{number}", "mine")
            own = await _called(mine, endpoint, "mine", runs["mine"] if _is_run(endpoint) else f"ticket-{number}")
            where = f"{endpoint.method} {endpoint.path}: {own.text}"
            if kind == SHARED:
                assert own.status_code == 403 and "of all projects" in own.text, where
                continue
            none = {"{name:path}": "left no file", "/diff": "no attempt yet"}
            there = 404 if any(endpoint.path.endswith(end) and why in own.text for end, why in none.items()) else 200
            assert own.status_code in (there, 201, 204, 409), where
            assert "theirs" not in own.text, where
            if kind == OWN and "{" in endpoint.path + QUERIES.get(endpoint.path, ""):
                for other in [runs["theirs"]] if _is_run(endpoint) else ["ticket-theirs", "ticket-None"]:
                    answer = await _called(mine, endpoint, "theirs", other)
                    assert answer.status_code == 404 and "title of" not in answer.text, where
    for id in ("ticket-theirs", "ticket-None"):
        assert (await served.store.ticket(id)).state == "ready"


HERS: Final = "3f2b8c1e-1111-4222-8333-abcdefabcdef"
HERS_TOO: Final = "3f2b8c1e-2222-4222-8333-abcdefabcdef"


async def test_another_projects_ticket_is_as_none(served: Served) -> None:
    """No answer differs from the one about an id that nobody has: not by a hint, a list, or a word."""
    for id in (HERS, HERS_TOO, "release-secret-customer"):
        await served.add(id, project_id="theirs")
    pages = ("/tickets/{}", "/tickets/{}/graph", "/tickets/{}/output", "/live?ticket={}", "/v1/artifacts?ticket={}")
    async with await _holder(served, "mine") as mine:
        for ref in (HERS, "3f2b8c1e", "3f2b8c1e-11", "release-secret-customer", "release-secrt-customer"):
            answers = [await mine.get(one.format(ref)) for one in ("/v1/tickets/{}", "/v1/tickets/{}/wait", *pages)]
            sent = {"title": "x", "agent": "echo", "after": [ref]}
            answers.append(await mine.post("/v1/tickets", json=sent))
            nothing = ref[:-1] + ("0" if ref[-1] != "0" else "1")
            for answer in answers:
                assert answer.status_code == 404, answer.text
                assert "release-secret" not in answer.text.replace(ref, "") and HERS not in answer.text.replace(ref, "")
            plain = await mine.get(f"/v1/tickets/{nothing}")
            assert plain.json()["detail"].replace(nothing, ref) == answers[0].json()["detail"] == f"no ticket '{ref}'"
        await served.add("3f2b8c1e-3333-4222-8333-abcdefabcdef", project_id="mine")
        assert (await mine.get("/v1/tickets/3f2b8c1e")).status_code == 200  # one alone of its own begins so
    refused = await served.viewer.get("/v1/tickets/3f2b8c1e")
    assert refused.status_code == 409 and HERS in refused.text


async def test_what_depends_on_a_ticket_from_another_project(served: Served) -> None:
    await served.add("own", project_id="mine")
    await served.add("needed", project_id="theirs")
    add = served.store.add_ticket
    fields: dict[str, Any] = {"title": "x", "state": "ready", "agent_id": ECHO.id}
    await add(Ticket(id="hers", project_id="theirs", **fields), depends_on=["own"])
    await add(Ticket(id="waits", project_id="mine", **fields), depends_on=["needed", "own"])
    async with await _holder(served, "mine") as mine:
        for force in ("", "?force=true"):
            refused = await mine.delete(f"/v1/tickets/own{force}")
            assert refused.status_code == 409 and "hers" not in refused.text, refused.text
        many = {"action": "delete", "ids": ["own"], "confirm": True, "force": True}
        done = (await mine.post("/v1/tickets/bulk", json=many)).json()
        assert (done["done"], done["skipped"]) == (0, 1) and "hers" not in str(done)
        page = await mine.post("/tickets/own/delete", data={"x": ""})
        assert page.status_code == 409 and "hers" not in page.text
        assert (await mine.get("/v1/tickets/waits")).json()["depends_on"] == ["own"]
        assert (await served.store.ticket("hers")).state == "ready"
        assert (await served.store.ticket("hers")).error is None
        await add(Ticket(id="own-too", project_id="mine", **fields))
        await add(Ticket(id="needs-it", project_id="mine", **fields), depends_on=["own-too"])
        refused = await mine.delete("/v1/tickets/own-too")
        assert refused.status_code == 409 and "needs-it" in refused.text
        assert (await mine.delete("/v1/tickets/own-too?force=true")).status_code == 204
    assert (await served.viewer.get("/v1/tickets/waits")).json()["depends_on"] == ["needed", "own"]


async def test_a_list_goes_on_behind_others_tickets_without_naming_them(served: Served) -> None:
    """What a page looks at is bounded, so it may end at a ticket of another project."""
    await served.add("oldest", project_id="mine")
    connection = sqlite3.connect(served.settings.home / "data" / "swarm.db", timeout=60)
    with connection:
        connection.execute(
            "INSERT INTO tickets (id, title, state, project_id, created_at, updated_at) WITH RECURSIVE n(i) AS "
            "(SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10050) SELECT 'hers-' || i, 'x', 'done', 'theirs', "
            "'2999-01-01T00:00:00.000Z', '2999-01-01T00:00:00.000Z' FROM n"
        )
    connection.close()
    async with await _holder(served, "mine") as mine, await _holder(served, "ours") as ours:
        first = (await mine.get("/v1/tickets")).json()
        assert first["tickets"] == [] and first["after"]
        for bytes_ in (first["after"].encode(), base64.urlsafe_b64decode(first["after"])):
            assert b"hers" not in bytes_ and b"2999" not in bytes_
        second = (await mine.get("/v1/tickets", params={"after": first["after"]})).json()
        assert [one["id"] for one in second["tickets"]] == ["oldest"] and second["after"] is None
        page = await mine.get("/tickets")
        older = re.search(r'href="([^"]+)" rel="next"', page.text)
        assert older is not None and "oldest" not in page.text
        assert "oldest" in (await mine.get(html.unescape(older[1]))).text
        many = {"action": "cancel", "filter": {}, "confirm": True}
        done = (await mine.post("/v1/tickets/bulk", json=many)).json()
        assert done["done"] == 1 and done["after"] is None
        theirs = (await served.viewer.get("/v1/tickets?limit=1")).json()["after"]
        for client, wrong in ((ours, first["after"]), (mine, theirs), (mine, "x"), (mine, "\u00fc")):
            refused = await client.get("/v1/tickets", params={"after": wrong})
            assert refused.status_code == 400 and "`after` must be" in refused.text, wrong
            refused = await client.post("/v1/tickets/bulk", json={**many, "after": wrong})
            assert refused.status_code == 400, wrong


async def test_files_are_of_the_project_that_sent_them(served: Served) -> None:
    """Not of whoever takes the id that they were sent for, before or afterwards."""
    tar: dict[str, Any] = {"content": archive({"file": "x"}, mode="w"), "headers": {"content-type": TAR}}
    async with await _holder(served, "theirs") as theirs, await _holder(served, "mine") as mine:
        sent = (await theirs.post("/v1/files?ticket=shared", **tar)).json()
        files = {"title": "x", "agent": "echo", "id": "shared", "inputs": {"$files": {"f": sent["digest"]}}}
        for other in (mine, served.operator):
            refused = await other.post("/v1/tickets", json=files)
            assert refused.status_code == 404 and "no files" in refused.text
        assert (await mine.post("/v1/tickets", json={**files, "inputs": {}})).status_code == 201
        assert (await mine.get("/v1/artifacts?ticket=shared")).json() == []
        assert (await mine.get(f"/v1/artifacts/{sent['digest']}")).status_code == 404
        assert (await theirs.post("/v1/tickets", json=files)).status_code == 409
        await served.store.keep_artifacts("by-hand", {"c" * 64: '"secret"'})  # `swarm ticket add --file` under way
        assert (await mine.post("/v1/tickets", json={**files, "id": "by-hand", "inputs": {}})).status_code == 201
        assert (await mine.get("/v1/artifacts?ticket=by-hand")).json() == []
        late = (await theirs.post("/v1/files", **tar)).json()
        assert (await theirs.post("/v1/tickets", json={**files, "id": late["id"]})).status_code == 201
        assert (await theirs.get(f"/v1/artifacts/{late['digest']}")).status_code == 200
        assert len((await theirs.get(f"/v1/artifacts?ticket={late['id']}")).json()) == 2
        await theirs.delete(f"/v1/tickets/{late['id']}")
    await served.store.prune(0)
    assert await served.store.artifacts() == []


async def test_a_name_that_goes_to_another_project_takes_no_keys_along(served: Served) -> None:
    made = []
    for project in ("theirs", "mine", None):
        token = new_token()
        await served.store.add_token(token, Actor(name="ci", role=Role.OPERATOR, project_id=project), by="test")
        headers = {"authorization": f"Bearer {token}", "idempotency-key": "nightly"}
        sent = {"title": "x", "agent": "echo"}
        answers = [await served.nobody.post("/v1/tickets", json=sent, headers=headers) for _ in range(2)]
        assert answers[0].json() == answers[1].json()
        assert answers[0].json()["project_id"] == project
        made.append(answers[0].json()["id"])
        await served.admin.delete("/v1/tokens/ci")
    assert len(set(made)) == 3


async def _sandbox(served: Served, id: str, project: str | None) -> None:
    """One that has ended, so that nothing waits for an engine; and a snapshot of it."""
    made = Sandbox(id=id, name=f"of-{project or 'theirs'}", state="starting", project_id=project)
    await served.store.add_sandbox(made, by="test")
    await served.store.want_sandbox(id, "ended", by="test")
    await served.store.add_snapshot(Snapshot(id=id, kind="named", host="h", project_id=project, sandbox_id=id))


def _is_run(endpoint: Endpoint) -> bool:
    return endpoint.path.startswith("/v1/runs/")


async def _holder(served: Served, project: str) -> httpx.AsyncClient:
    token = new_token()
    name = f"team-{len(await served.store.tokens())}"
    await served.store.add_token(token, Actor(name=name, role=Role.ADMIN, project_id=project), by="test")
    return httpx.AsyncClient(base_url=served.url, headers={"authorization": f"Bearer {token}"}, timeout=60)


async def _run_of(served: Served, project: str) -> str:
    """A run of the workflow, once a worker has claimed its first step."""
    made = await served.operator.post("/v1/workflows/ours/runs", json={"project": project})
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            for claim in await served.store.claim("worker", lease_seconds=600, ticket_id=made.json()["id"]):
                return claim.run_id
            await served.store.decided()


async def _called(client: httpx.AsyncClient, endpoint: Endpoint, project: str, id: str) -> httpx.Response:
    ref = "ours" if "/workflows/" in endpoint.path else "echo"
    path = endpoint.path + QUERIES.get(endpoint.path, "")
    names = {"{id}": id, "{ref}": ref, "{digest}": DIGESTS[project], "{name:path}": "x", "{process}": "p"}
    for name, given in names.items():
        path = path.replace(name, given)
    sent: dict[str, Any] = {}
    if endpoint.upload:
        content = archive({"file": "x"}, mode="w") if endpoint.upload[0] == TAR else WORKFLOW
        sent = {"content": content, "headers": {"content-type": endpoint.upload[0]}}
    elif endpoint.body is not None:
        sent = {"json": BODIES.get(endpoint.path, {})}
    if endpoint.media_type == "text/event-stream":
        async with client.stream(endpoint.method, path, **sent) as stream:
            if stream.status_code == 200:
                line = await anext(stream.aiter_lines())  # it goes on for as long as the ticket does
                return httpx.Response(200, text=line)
            await stream.aread()
            return httpx.Response(stream.status_code, text=stream.text)
    return await client.request(endpoint.method, path, **sent)
