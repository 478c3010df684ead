"""Who may call: tokens, sessions of browsers, the Unix socket; and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import sqlite3
import stat
from pathlib import Path

import httpx
import pytest

from swarm.api.app import ENDPOINTS
from swarm.api.auth import AT_ONCE, BURST, Auth, may
from swarm.api.endpoint import Endpoint
from swarm.api.problem import Refused
from swarm.errors import UsageError
from swarm.model import Event, Role
from swarm.store.registry.tokens import MAX_SESSIONS, Actor, new_token
from tests.api.served import Served, on_the_socket, serving
from tests.conftest import PATIENCE_SECONDS


def refused(answer: httpx.Response, status: int, said: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status and said in body["detail"] and set(body) == {"type", "title", "status", "detail"}


@pytest.mark.parametrize("role", ["nobody", *Role])
async def test_every_route_asks_for_its_role(served: Served, role: str) -> None:
    """Roles that are not enough learn nothing, and change nothing, whatever they send."""
    for endpoint in ENDPOINTS:
        if role != "nobody" and may(Actor(name="x", role=Role(role)), endpoint.role):
            continue
        answer = await _called(served.clients[role], endpoint)
        refused(answer, 401 if role == "nobody" else 403, "a valid token" if role == "nobody" else "this needs")
    assert await served.store.tickets() == []


async def _called(client: httpx.AsyncClient, endpoint: Endpoint) -> httpx.Response:
    path = endpoint.path
    for name in ("id", "digest", "name", "path", "step", "number", "process"):
        path = path.replace(f"{{{name}}}", "x").replace(f"{{{name}:path}}", "x")
    return await client.request(endpoint.method, path, json={} if endpoint.body is not None else None)


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer x"}, {"authorization": "Basic eDp5"}, {"cookie": "swarm_session=x"}],
    ids=str,
)
async def test_no_valid_token(served: Served, headers: dict[str, str]) -> None:
    for path in ("/v1/tickets", "/v1/openapi.json"):
        refused(await served.nobody.get(path, headers=headers), 401, "a valid token is needed")
    assert (await served.nobody.get("/healthz")).json() == {"status": "ok"}
    answer = await served.nobody.get("/", headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2F")


async def test_a_token_expires_and_is_revoked(served: Served) -> None:
    token = new_token()
    headers = {"authorization": f"Bearer {token}"}
    await served.store.add_token(token, Actor(name="ci", role=Role.VIEWER), by="anna", expires_seconds=60)
    assert (await served.nobody.get("/v1/tickets", headers=headers)).status_code == 200
    (row,) = [row for row in await served.store.tokens() if row.name == "ci"]
    assert (row.role, row.created_by) == ("viewer", "anna")
    async with asyncio.timeout(PATIENCE_SECONDS), served.store.watching() as wake:
        while [row.last_used_at for row in await served.store.tokens() if row.name == "ci"] == [None]:
            await wake.changed(timeout_seconds=1)
    await served.store.shift_clock(61_000)
    assert (await served.nobody.get("/v1/tickets", headers=headers)).status_code == 401
    await served.store.shift_clock(-61_000)
    assert (await served.nobody.get("/v1/tickets", headers=headers)).status_code == 200
    await served.store.revoke_token("ci", by="anna")
    assert (await served.nobody.get("/v1/tickets", headers=headers)).status_code == 401
    changes = [event.data for event in await served.store.events(None) if event.kind == "change"]
    assert {"did": "token.revoke", "by": "anna", "name": "ci"} in changes


async def test_reading_needs_no_write_lock(served: Served) -> None:
    with contextlib.closing(
        sqlite3.connect(served.settings.data_dir / "swarm.db", isolation_level=None, timeout=60)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):  # one that waited for the lock would be refused in the end
            assert (await served.viewer.get("/v1/tickets")).status_code == 200
        other.execute("ROLLBACK")


async def test_a_token_is_stored_nowhere(served: Served) -> None:
    data = b"".join(path.read_bytes() for path in served.settings.data_dir.glob("swarm.db*"))
    assert b"the-viewer" in data
    assert not [token for token in served.tokens.values() if token.encode() in data]


async def test_a_link_is_worth_one_session(served: Served) -> None:
    code = new_token()
    await served.store.add_token(
        code, Actor(name="anna", role=Role.OPERATOR), by="anna", kind="link", expires_seconds=300
    )
    bearer = await served.nobody.get("/v1/tickets", headers={"authorization": f"Bearer {code}"})
    assert bearer.status_code == 401  # it is no token
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as browser:
        link = f"/login?code={code}"
        for seen in (await browser.get(link), await browser.head(link)):  # as a preview of the link does
            assert seen.status_code == 200 and "set-cookie" not in seen.headers
        assert f'value="{code}"' in (await browser.get(link)).text
        foreign = await browser.post("/login", data={"code": code}, headers={"origin": "http://evil.example"})
        assert foreign.status_code == 403
        entered = await browser.post("/login", data={"code": code}, headers={"origin": served.url})
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=lax" in cookie and "path=/" in cookie
        assert "max-age=86400;" in cookie and "secure" not in cookie
        assert "anna" in (await browser.get("/")).text
        assert (await browser.get("/v1/tickets")).status_code == 200
        again = await served.nobody.post("/login", data={"code": code}, headers={"origin": served.url})
        assert again.status_code == 401 and "set-cookie" not in again.headers
        left = await browser.post("/logout", headers={"origin": served.url})
        assert left.status_code == 303
        session = entered.cookies["swarm_session"]
    stale = await served.nobody.get("/v1/tickets", headers={"cookie": f"swarm_session={session}"})
    assert stale.status_code == 401


@pytest.mark.parametrize("origin", [None, "http://evil.example", "null", "http://127.0.0.1:1"])
async def test_other_sites_use_no_session(served: Served, origin: str | None) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as browser:
        given = {"token": served.tokens["admin"], "next": "//evil.example"}
        headers = {"origin": origin} if origin else {}
        assert (await browser.post("/login", data=given, headers=headers)).status_code == 403
        entered = await browser.post("/login", data=given, headers={"origin": served.url})
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        answer = await browser.post("/v1/tickets", json={"title": "x", "agent": "echo"}, headers=headers)
        refused(answer, 403, "another site")
        assert (await browser.post("/logout", headers=headers)).status_code == 403
        own = await browser.post("/v1/tickets", json={"title": "x", "agent": "echo"}, headers={"origin": served.url})
        assert own.status_code == 201


async def test_behind_a_proxy_with_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy asks by another name than the browser does."""
    monkeypatch.setenv("SWARM_PUBLIC_URL", "https://swarm.example")
    async with serving(tmp_path / "home") as served, httpx.AsyncClient(base_url=served.url, timeout=60) as browser:
        given = {"token": served.tokens["operator"]}
        for origin in ("https://evil.example", "http://swarm.example", "https://swarm.example.evil.example"):
            answer = await browser.post("/login", data=given, headers={"origin": origin})
            assert answer.status_code == 403 and "--public-url" in answer.text
        own = {"origin": "https://swarm.example"}
        entered = await browser.post("/login", data=given, headers=own)
        assert entered.status_code == 303 and "; secure" in entered.headers["set-cookie"].lower()
        session = {"cookie": f"swarm_session={entered.cookies['swarm_session']}"}
        made = await browser.post("/v1/tickets", json={"title": "x", "agent": "echo"}, headers=own | session)
        assert made.status_code == 201


async def test_a_session_ends_with_its_token(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as browser:
        await browser.post("/login", data={"token": served.tokens["viewer"]}, headers={"origin": served.url})
        assert (await browser.get("/v1/tickets")).status_code == 200
        await served.store.revoke_token("the-viewer", by="anna")
        assert (await browser.get("/v1/tickets")).status_code == 401


async def test_sessions_of_a_link_are_seen_and_ended_by_others(served: Served) -> None:
    own = {"origin": served.url}
    async with (
        httpx.AsyncClient(base_url=served.url, timeout=60) as one,
        httpx.AsyncClient(base_url=served.url, timeout=60) as other,
    ):
        for browser in (one, other):
            code = new_token()
            await served.store.add_token(
                code, Actor(name="anna", role=Role.VIEWER), by="test", kind="link", expires_seconds=300
            )
            assert (await browser.post("/login", data={"code": code}, headers=own)).status_code == 303
        rows = [row for row in (await served.admin.get("/v1/tokens")).json() if row["name"] == "anna"]
        assert [row["kind"] for row in rows] == ["session", "session"]
        ended = await served.admin.delete(f"/v1/tokens/{rows[0]['id']}")
        assert ended.json()["kind"] == "session"
        assert sorted([(await browser.get("/v1/whoami")).status_code for browser in (one, other)]) == [200, 401]
        assert (await served.admin.delete("/v1/tokens/anna")).status_code == 200
        assert [(await browser.get("/v1/whoami")).status_code for browser in (one, other)] == [401, 401]
        assert (await served.admin.delete("/v1/tokens/anna")).status_code == 404


async def test_a_token_has_few_sessions_and_the_oldest_goes(served: Served) -> None:
    given, own = {"token": served.tokens["viewer"]}, {"origin": served.url}
    statuses, first = [], ""
    for _ in range(MAX_SESSIONS):
        answer = await served.nobody.post("/login", data=given, headers=own)
        first = first or answer.cookies["swarm_session"]
        statuses.append(answer.status_code)
    assert set(statuses) == {303}
    cookie = {"cookie": f"swarm_session={first}"}
    served.nobody.cookies.clear()
    assert (await served.nobody.get("/v1/whoami", headers=cookie)).status_code == 200
    more = await asyncio.gather(*(served.nobody.post("/login", data=given, headers=own) for _ in range(60)))
    assert {answer.status_code for answer in more} == {303, 429}
    served.nobody.cookies.clear()
    assert (await served.nobody.get("/v1/whoami", headers=cookie)).status_code == 401
    assert len([row for row in await served.store.tokens() if row.kind == "session"]) == MAX_SESSIONS


async def test_a_locked_database_is_told_without_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_BUSY_TIMEOUT_SECONDS", "0.3")
    async with serving(tmp_path / "home") as served, httpx.AsyncClient(base_url=served.url, timeout=60) as browser:
        own = {"origin": served.url}
        await browser.post("/login", data={"token": served.tokens["operator"]}, headers=own)
        with contextlib.closing(
            sqlite3.connect(served.settings.data_dir / "swarm.db", isolation_level=None, timeout=60)
        ) as other:
            other.execute("BEGIN IMMEDIATE")
            answers = await asyncio.gather(
                served.admin.post("/v1/tickets", json={"title": "x", "agent": "echo"}),
                browser.post("/login", data={"token": served.tokens["operator"]}, headers=own),
                browser.post("/logout", headers=own),
            )
            other.execute("ROLLBACK")
        for answer in answers:
            assert answer.status_code == 503 and html.unescape(answer.text).count("the database is locked: try again")
            assert str(served.settings.home) not in answer.text


async def test_that_a_token_is_used_is_written_after_what_its_request_writes(served: Served) -> None:
    """Or else both wait for a lock, one after the other."""
    assert await served.store.token_holder(served.tokens["admin"])
    await served.store.record("test.write", by="the-admin")
    async with asyncio.timeout(PATIENCE_SECONDS), served.store.watching() as wake:
        while not (used := {row.name: row.last_used_at for row in await served.store.tokens()}["the-admin"]):
            await wake.changed(timeout_seconds=1)
    (wrote,) = [event for event in await served.store.events(None) if event.data.get("did") == "test.write"]
    assert (wrote.at or "") < used


async def test_a_body_of_no_type_says_what_to_add(served: Served) -> None:
    answer = await served.operator.post("/v1/tickets", data={"title": "x"})  # as `curl -d` sends it
    refused(answer, 415, "-H 'Content-Type: application/json'")


async def test_the_socket_is_its_owners(served: Served) -> None:
    mode = served.settings.api_socket.stat()
    assert stat.S_IMODE(mode.st_mode) == 0o600 and mode.st_uid == os.getuid()
    async with on_the_socket(served.settings) as client:
        assert (await client.post("/v1/tickets", json={"title": "x", "agent": "echo"})).status_code == 201
    (ticket,) = await served.store.tickets()
    (event,) = [event for event in await served.store.events(ticket.id) if event.kind == "change"]
    assert event.data["did"] == "ticket.add" and event.data["by"]


async def test_a_project_is_all_that_its_token_sees(served: Served) -> None:
    for id, project in (("a1", "a"), ("b1", "b"), ("none", None)):
        await served.add(id, project_id=project)
    token = new_token()
    await served.store.add_token(token, Actor(name="team", role=Role.OPERATOR, project_id="a"), by="test")
    async with httpx.AsyncClient(base_url=served.url, headers={"authorization": f"Bearer {token}"}, timeout=60) as team:
        assert [one["id"] for one in (await team.get("/v1/tickets")).json()["tickets"]] == ["a1"]
        assert [one["id"] for one in (await team.get("/v1/tickets?project=b")).json()["tickets"]] == ["a1"]
        for other in ("b1", "none"):
            refused(await team.get(f"/v1/tickets/{other}"), 404, "no ticket")
            refused(await team.post(f"/v1/tickets/{other}/cancel"), 404, "no ticket")
        made = (await team.post("/v1/tickets", json={"title": "x", "agent": "echo"})).json()
        assert made["project_id"] == "a"
        refused(await team.post("/v1/tickets", json={"title": "x", "agent": "echo", "project": "b"}), 400, "project")


async def test_rates_are_bounded(served: Served) -> None:
    """Of each holder; counted here and not by requests, which a busy machine may not serve that fast."""
    auth, one, other = Auth(served.store), Actor(name="one", role=Role.VIEWER), Actor(name="other", role=Role.VIEWER)
    with pytest.raises(Refused, match="too many requests of one: slow down") as caught:
        for _ in range(100 * round(BURST)):
            with auth.turn(one):
                pass
    assert (caught.value.status, caught.value.headers) == (429, {"retry-after": "1"})
    with auth.turn(other):
        pass


async def test_requests_of_one_holder_at_once_are_bounded(served: Served) -> None:
    limits = httpx.Limits(max_connections=AT_ONCE)
    headers = {"authorization": f"Bearer {served.tokens['viewer']}"}
    async with contextlib.AsyncExitStack() as stack:
        client = httpx.AsyncClient(base_url=served.url, headers=headers, limits=limits, timeout=60)
        await stack.enter_async_context(client)
        for _ in range(AT_ONCE):
            stream = await stack.enter_async_context(client.stream("GET", "/v1/events/live"))
            assert stream.status_code == 200
        for path in ("/v1/tickets", "/v1/openapi.json", "/hosts"):
            answer = await served.viewer.get(path)
            assert (answer.status_code, "too many requests of the-viewer" in answer.text) == (429, True)
            assert (await served.operator.get(path)).status_code == 200  # others are served


@pytest.mark.parametrize("how", ["revoked", "expired", "logged out"])
async def test_what_takes_long_ends_with_its_token(tmp_path: Path, how: str) -> None:
    async with (
        serving(tmp_path / "home", again_seconds=0.0) as served,
        httpx.AsyncClient(base_url=served.url, timeout=60) as gone,
    ):
        ticket = await served.add("t", state="draft")
        token = new_token()
        await served.store.add_token(token, Actor(name="ci", role=Role.VIEWER), by="anna", expires_seconds=60)
        if how == "logged out":
            await gone.post("/login", data={"token": token}, headers={"origin": served.url})
        else:
            gone.headers["authorization"] = f"Bearer {token}"
        streams = ["/v1/events/live", "/v1/tickets/t/events/live", "/v1/tickets/t/output?follow=true", "/live?ticket=t"]
        async with contextlib.AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(gone.stream("GET", path)) for path in streams]
            waited = asyncio.create_task(gone.get("/v1/tickets/t/wait?timeout_seconds=60"))
            stack.callback(waited.cancel)
            assert [stream.status_code for stream in opened] == [200] * len(streams)
            if how == "revoked":
                await served.store.revoke_token("ci", by="anna")
            elif how == "expired":
                await served.store.shift_clock(61_000)
            else:
                await gone.post("/logout", headers={"origin": served.url})
            said = Event(ticket_id=ticket.id, step_id="a", kind="output", data={"stream": "stdout", "text": "secret"})
            await served.store.append([said])
            async with asyncio.timeout(PATIENCE_SECONDS):  # a long poll looks every 5 s
                for path, stream in zip(streams, opened, strict=True):
                    broken = pytest.raises(httpx.RemoteProtocolError) if "output" in path else contextlib.nullcontext()
                    with broken:
                        assert b"secret" not in b"".join([part async for part in stream.aiter_raw()])
                assert (await waited).status_code == 401


async def test_a_project_has_a_name(served: Served) -> None:
    with pytest.raises(UsageError, match="no name"):
        await served.store.add_token(new_token(), Actor(name="x", role=Role.OPERATOR, project_id=""), by="test")
