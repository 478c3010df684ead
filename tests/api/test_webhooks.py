"""Webhooks over real HTTP: a signed request makes one ticket, any other makes none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from swarm import config
from swarm.api import webhooks
from swarm.api.body import Strangers
from swarm.api.server import serving
from swarm.app import serve, wiring
from swarm.config import Settings
from swarm.errors import Conflict, HostError, UsageError
from swarm.model import Ticket
from swarm.store.store import Store
from swarm.workflow.definition import Step, Webhook, Workflow
from tests.cel.local import Local
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.needs("netns")

SCHEMA = {"type": "object", "properties": {"branch": {"type": "string"}}, "required": ["branch"]}
INPUTS = {"branch": "${trigger.body.branch}"}
STEPS = (Step(id="a", agent="echo@1"),)
FLOW = Workflow(
    name="nightly", version="1.0.0", steps=STEPS, inputs_schema=SCHEMA, webhook=Webhook(secret="KEY", inputs=INPUTS)
)
# As a well-known forge sends them: the body alone is signed, and each event has a number.
FORGE = Workflow(
    name="forge",
    version="1.0.0",
    steps=STEPS,
    webhook=Webhook(
        secret="FORGE",
        header="X-Hub-Signature-256",
        timestamp=False,
        idempotency="X-GitHub-Delivery",
        inputs={"event": '${trigger.headers["x-github-event"]}'},
    ),
)
BODY = b'{"branch": "main"}'


@dataclass(frozen=True, kw_only=True)
class Server:
    settings: Settings
    store: Store
    client: httpx.AsyncClient
    keys: Mapping[str, bytes]

    def signed(self, body: bytes, *, at: float | None = None, key: bytes | None = None) -> dict[str, str]:
        timestamp = str(int(time.time() if at is None else at))
        signature = webhooks.sign(key or self.keys["KEY"], body, timestamp)
        return {"X-Swarm-Timestamp": timestamp, "X-Swarm-Signature": signature}

    async def post(self, body: bytes = BODY, name: str = "nightly", **headers: str) -> httpx.Response:
        given = self.signed(body) | {name.replace("_", "-"): text for name, text in headers.items()}
        return await self.client.post(f"/hooks/{name}", content=body, headers=given)

    async def tickets(self) -> list[Ticket]:
        return await self.store.tickets(limit=1000)


@asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serve.served(settings, host="127.0.0.1", port=0, remote=False) as (url, _),
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    settings = config.load(home=tmp_path / "home")
    settings.data_dir.mkdir(parents=True)
    async with wiring.store(settings) as store:
        await store.migrate()
        for flow in (FLOW, FORGE):
            await store.put_workflow(flow)
        names = {"KEY": "nightly", "FORGE": "forge"}
        keys = {k: (await serve.new_secret(settings, k, name, replace=False)).encode() for k, name in names.items()}
        async with served(settings) as client:
            yield Server(settings=settings, store=store, client=client, keys=keys)


def refused(answer: httpx.Response, status: int, said: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json" and answer.json()["status"] == status
    assert said in answer.json()["detail"] and "\n" not in answer.json()["detail"]


@pytest.mark.parametrize("body", ["SELECT RAISE(ABORT, 'not before noon')", "INSERT INTO nowhere SELECT 1"])
async def test_a_trigger_that_refuses_the_ticket(server: Server, body: str) -> None:
    with sqlite3.connect(server.settings.data_dir / "swarm.db", timeout=60) as db:
        db.execute(f"CREATE TRIGGER no AFTER INSERT ON tickets BEGIN {body}; END")
    answer = await server.post()
    refused(answer, 503, "can't take it now")  # what the database says is in the log, not for senders
    with sqlite3.connect(server.settings.data_dir / "swarm.db", timeout=60) as db:
        db.execute("DROP TRIGGER no")
    assert (await server.post()).status_code == 202


async def test_a_request_becomes_a_ticket(server: Server) -> None:
    answer = await server.post(User_Agent="bot", Authorization="Bearer secret", X_Api_Key="k", X_Event="push")
    assert answer.status_code == 202, answer.text
    told = answer.json()
    assert told == {"ticket_id": told["ticket_id"], "workflow": "nightly@1.0.0", "repeated": False}
    (ticket,) = await server.tickets()
    row = await server.store.workflow("nightly")
    assert (ticket.id, ticket.state, ticket.execution_mode, ticket.workflow_id) == (
        told["ticket_id"],
        "ready",
        "workflow",
        row.id,
    )
    assert json.loads(ticket.inputs or "") == {"branch": "main"} and ticket.trigger_type == "webhook"
    trigger = json.loads(ticket.trigger_data or "")
    assert (trigger["body"], trigger["key"], trigger["headers"]["user-agent"]) == ({"branch": "main"}, None, "bot")
    assert trigger["headers"].keys() & {"x-event", "authorization", "x-swarm-signature", "x-api-key"} == {"x-event"}


async def test_the_same_again_is_the_same_ticket(server: Server) -> None:
    first = (await server.post(Idempotency_Key="e-1")).json()
    again = server.signed(BODY, at=time.time() - 7)  # a second try: another time, so another signature
    second = await server.client.post("/hooks/nightly", content=BODY, headers=again | {"Idempotency-Key": "e-1"})
    replayed = await server.client.post("/hooks/nightly", content=BODY, headers=again | {"Idempotency-Key": "e-2"})
    for answer in (second, replayed):
        assert answer.status_code == 202
        assert answer.json() == first | {"repeated": True}
    refused(await server.post(b'{"branch": "other"}', Idempotency_Key="e-1"), 409, "another body")
    assert (await server.post(b'{"branch": "other"}', Idempotency_Key="e-3")).json()["repeated"] is False
    assert len(await server.tickets()) == 2


async def test_many_at_once_make_one(server: Server) -> None:
    answers = await asyncio.gather(*(server.post(Idempotency_Key="x") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["ticket_id"] for answer in answers}) == len(await server.tickets()) == 1


async def test_a_forges_way_of_signing(server: Server) -> None:
    async def post(body: bytes, **headers: str) -> httpx.Response:
        named = {"X-Hub-Signature-256": webhooks.sign(server.keys["FORGE"], body), "X-GitHub-Event": "push"} | headers
        return await server.client.post("/hooks/forge", content=body, headers=named)

    # The signature of their documentation: key "It's a Secret to Everybody", body "Hello, World!".
    known = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert webhooks.sign(b"It's a Secret to Everybody", b"Hello, World!") == known
    first = await post(b"{}")
    assert first.status_code == 202
    assert (await post(b"{}")).json() == first.json() | {"repeated": True}  # nothing tells them apart
    assert (await post(b"{ }", **{"X-GitHub-Delivery": "1"})).json()["repeated"] is False
    assert {ticket.inputs for ticket in await server.tickets()} == {'{"event":"push"}'}


async def test_what_is_not_signed_makes_nothing(server: Server) -> None:
    bad = server.signed(BODY, key=b"another key, as long as it is")
    for change, said in (
        ({"X-Swarm-Signature": bad["X-Swarm-Signature"]}, "with this hook's secret"),
        ({"X-Swarm-Signature": "sha256="}, "with this hook's secret"),
        ({"X-Swarm-Signature": webhooks.sign(server.keys["KEY"], BODY)}, "a dot and the body"),
        (server.signed(BODY, key=server.keys["FORGE"]), "with this hook's secret"),
        (server.signed(b'{"branch": "evil"}'), "with this hook's secret"),
        (server.signed(BODY, at=time.time() - 301), "clock"),
        (server.signed(BODY, at=time.time() + 600), "clock"),
    ):
        headers = server.signed(BODY) | change
        refused(await server.client.post("/hooks/nightly", content=BODY, headers=headers), 401, said)
    for missing in ("X-Swarm-Signature", "X-Swarm-Timestamp"):
        headers = {name: text for name, text in server.signed(BODY).items() if name != missing}
        refused(await server.client.post("/hooks/nightly", content=BODY, headers=headers), 401, missing)
    timestamp = "1e9"
    named = {"X-Swarm-Timestamp": timestamp, "X-Swarm-Signature": webhooks.sign(server.keys["KEY"], BODY, timestamp)}
    refused(await server.client.post("/hooks/nightly", content=BODY, headers=named), 401, "whole number")
    assert await server.tickets() == []


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not JSON"),
        (b"branch=main", 400, "not JSON"),
        (b'{"branch": "\xff"}', 400, "UTF-8"),
        (b'{"branch": NaN}', 400, "NaN"),
        (b'{"branch": "main", "n": 1e999}', 400, "the number 1e999 is too large"),
        (DEEP, 400, "nested too deeply"),
        (b"1" * 10_000, 400, "not JSON"),
        (b"{}", 422, "trigger.body has no 'branch'"),
        (b"[1]", 422, "trigger.body has no 'branch'"),
        (b'{"branch": 3}', 422, "$.branch"),
        (b'{"branch": "' + b"x" * (1 << 20) + b'"}', 413, "1,048,576"),
    ],
)
async def test_bodies_that_are_wrong(server: Server, body: bytes, status: int, said: str) -> None:
    refused(await server.post(body), status, said)
    assert await server.tickets() == []


async def test_a_form_is_told_what_is_wanted(server: Server) -> None:
    answer = await server.post(b"payload=%7B%7D", Content_Type="application/x-www-form-urlencoded")
    refused(answer, 400, "but application/x-www-form-urlencoded: send it with Content-Type: application/json")


async def test_odd_texts_are_kept(server: Server) -> None:
    for branch in ("\u0000", "\ud800", "\U0001f41d", "${trigger.body}", "'; DROP TABLE tickets; --"):
        assert (await server.post(json.dumps({"branch": branch}).encode())).status_code == 202
    found = {json.loads(ticket.inputs or "")["branch"] for ticket in await server.tickets()}
    assert found == {"\u0000", "\ud800", "\U0001f41d", "${trigger.body}", "'; DROP TABLE tickets; --"}


async def test_a_body_that_never_ends_is_cut_off(server: Server) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    with contextlib.suppress(httpx.TransportError):  # the answer may be lost in what is still coming
        answer = await server.client.post("/hooks/nightly", content=endless(), headers=server.signed(b""))
        refused(answer, 413, "1,048,576")
    assert (await server.post()).status_code == 202


async def test_a_body_that_does_not_come(server: Server) -> None:
    async def secret(name: str, workflow: str) -> str | None:
        return None

    strangers = Strangers(seconds=0.2)
    hooks = webhooks.Hooks(store=server.store, secret=secret, evaluator=Local(), strangers=strangers)
    served_ = Starlette(routes=[hooks.route()])
    async with serving(served_, host="127.0.0.1", port=0) as (url, _), asyncio.timeout(PATIENCE_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        signed = "".join(f"{name}: {text}\r\n" for name, text in server.signed(b"").items())
        head = f"POST /hooks/nightly HTTP/1.1\r\nHost: x\r\n{signed}Content-Length: 10\r\n\r\n"
        writer.write(f"{head}abc".encode())
        answer = await reader.read()  # to its end: the server closes
        assert b" 408 " in answer.partition(b"\r\n")[0] and b"did not arrive within 0.2 s" in answer
        writer.close()


@pytest.mark.parametrize(
    "path", ["/hooks/nobody", "/hooks/nightly", "/hooks/nightly?signed", "/login", "/logout", "/v1/tickets", "/healthz"]
)
async def test_bodies_that_never_come_keep_no_place(server: Server, path: str) -> None:
    """More than the server takes connections: the oldest have made room, those that were answered too."""
    headers = {"Host": "x", "Origin": "http://x", "Content-Length": "10"}
    headers |= server.signed(b"") if "signed" in path else {}
    head = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    method = "GET" if path == "/healthz" else "POST"
    port, writers = server.client.base_url.port, []
    for _ in range(300):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\na".encode())
        writers.append(writer)
        await asyncio.sleep(0)
    assert (await server.post()).status_code == 202
    for writer in writers:
        writer.close()


async def test_a_workflow_is_read_once_for_all_unsigned_requests(server: Server) -> None:
    """A large one takes a second, and nobody knows who asks; a changed one is read again."""

    async def secret(name: str, workflow: str) -> str | None:
        return None

    hooks = webhooks.Hooks(store=server.store, secret=secret, evaluator=Local(), strangers=Strangers())
    row = await server.store.workflow("nightly")
    first = await hooks.flow(row)
    assert first.webhook is not None and first.webhook.secret == "KEY"
    assert await hooks.flow(await server.store.workflow("nightly")) is first
    changed = replace(row, definition=row.definition.replace('"KEY"', '"OTHER"'))
    again = (await hooks.flow(changed)).webhook
    assert again is not None and again.secret == "OTHER"


async def test_one_connection_too_many_is_told_by_a_problem() -> None:
    begun = asyncio.Semaphore(0)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        begun.release()
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving(slow, host="127.0.0.1", port=0) as (url, _), asyncio.timeout(PATIENCE_SECONDS):
        writers, port = [], int(url.rsplit(":", 1)[1])
        for _ in range(256):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            writers.append(writer)
            await begun.acquire()
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            answer = await client.get("/")
        refused(answer, 503, "connections already")
        assert (answer.headers["retry-after"], answer.headers["connection"]) == ("2", "close")
        for writer in writers:
            writer.close()


async def test_heads_that_never_come_are_cut_off(server: Server) -> None:
    async def secret(name: str, workflow: str) -> str | None:
        return None

    hooks = webhooks.Hooks(store=server.store, secret=secret, evaluator=Local(), strangers=Strangers())
    app = Starlette(routes=[hooks.route()])
    async with serving(app, host="127.0.0.1", port=0, head_seconds=0.2) as (url, _), asyncio.timeout(PATIENCE_SECONDS):
        for sent in (b"", b"POST /hooks/x HTTP/1.1\r\nHost: ", b"POST /hooks/x HTTP/1.1\r\nHost: x\r\n\r\nPOST /"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            writer.write(sent)
            await reader.read()  # to its end: the server closes
            writer.close()


async def test_connections_without_a_head_make_room(server: Server) -> None:
    """More than the server takes at once."""
    writers = [(await asyncio.open_connection("127.0.0.1", server.client.base_url.port))[1] for _ in range(300)]
    assert (await server.post()).status_code == 202
    for writer in writers:
        writer.close()


async def test_who_takes_no_webhooks(server: Server) -> None:
    await server.store.put_workflow(Workflow(name="plain", version="1.0.0", steps=STEPS))
    for name in ("plain", "nobody", "Bad Name", "nightly@1.0.0"):
        refused(await server.post(name=name), 404, "takes webhooks")
    refused(await server.post(name="..%2f..%2fetc"), 404, "nothing at this address")
    refused(await server.client.post("/hooks/nightly/x"), 404, "nothing at this address")
    refused(await server.client.get("/hooks/nightly"), 405, "no such method")
    await server.store.enable_workflow("nightly", enabled=False, by="test")
    refused(await server.client.post("/hooks/nightly", content=BODY), 401, "X-Swarm-Signature")  # not told to anybody
    refused(await server.post(), 409, "disabled")
    assert await server.tickets() == []


async def test_a_newer_version_is_the_one(server: Server) -> None:
    flow = Workflow(name="nightly", version="2.0.0", steps=STEPS, webhook=Webhook(secret="KEY"))
    await server.store.put_workflow(flow)
    assert (await server.post(b"{}")).json()["workflow"] == "nightly@2.0.0"


async def test_a_database_that_is_locked(server: Server) -> None:
    connection = sqlite3.connect(server.settings.data_dir / "swarm.db", isolation_level=None, timeout=60)
    connection.execute("BEGIN IMMEDIATE")

    def waiting(seconds: float) -> Settings:
        return server.settings.model_copy(update={"busy_timeout_seconds": seconds})

    for seconds in (1.0, 5.0, 30.0):  # a busy machine takes its time for 60 requests
        async with served(waiting(seconds)) as client:
            signed = server.signed(BODY)
            answers = await asyncio.gather(
                *(client.post("/hooks/nightly", content=BODY, headers=signed) for _ in range(60))
            )
        assert {one.status_code for one in answers} == {503}
        told = {one.json()["detail"].partition(":")[0] for one in answers}
        if len(told) > 1:
            break
    assert told == {"the database can't take it now", "too many requests at once"}
    async with served(waiting(1.0)) as client:
        answer = await client.post("/hooks/nightly", content=BODY, headers=server.signed(BODY))
        refused(answer, 503, "try again in 2 s")
        assert answer.headers["retry-after"] == "2"
        answers = await asyncio.gather(*(client.post("/hooks/nightly", content=BODY) for _ in range(40)))
        assert 401 in {one.status_code for one in answers}  # unsigned requests wait for no lock
        others = [one for one in answers if one.status_code != 401]
        assert {one.json()["detail"].partition(":")[0] for one in others} <= {"too many requests at once"}
        connection.execute("ROLLBACK")
        connection.close()
        answer = await client.post("/hooks/nightly", content=BODY, headers=server.signed(BODY))
        assert answer.status_code == 202 and len(await server.tickets()) == 1


async def test_secrets(server: Server) -> None:
    vault = wiring.vault(server.settings, server.store)
    assert {row.scope for row in await vault.list()} == {"webhook:nightly", "webhook:forge"}  # no agent is given these
    with pytest.raises(Conflict, match="--new"):
        await serve.new_secret(server.settings, "KEY", "nightly", replace=False)
    await vault.set("KEY", "chosen by the sender", scope="webhook:nightly")
    refused(await server.post(), 401, "with this hook's secret")
    headers = server.signed(BODY, key=b"chosen by the sender")
    assert (await server.client.post("/hooks/nightly", content=BODY, headers=headers)).status_code == 202
    await vault.set("KEY", "guessable", scope="webhook:nightly")
    headers = server.signed(BODY, key=b"guessable")
    refused(await server.client.post("/hooks/nightly", content=BODY, headers=headers), 500, "its owner must")
    await vault.remove("KEY", scope="webhook:nightly")
    refused(await server.post(), 500, "its owner must")
    unsigned = await server.client.post("/hooks/nightly", content=BODY)
    refused(unsigned, 401, "X-Swarm-Signature")  # no secret is looked for
    (server.settings.data_dir / "secret.key").chmod(0o640)
    refused(await server.post(name="forge", X_Hub_Signature_256="sha256=00"), 500, "its owner must")


async def test_addresses(server: Server) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        with pytest.raises(UsageError, match="--allow-remote"):
            async with serve.served(server.settings, host=host, port=0, remote=False):
                raise AssertionError
    port = int(str(server.client.base_url).rsplit(":", 1)[1].strip("/"))
    with pytest.raises(HostError, match="in use"):
        async with serve.served(server.settings, host="127.0.0.1", port=port, remote=False):
            raise AssertionError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_command_serves_until_it_is_told_to_stop(server: Server, number: signal.Signals) -> None:
    argv = ["-m", "swarm.cli.main", "serve", "--port", "0", "--home", str(server.settings.home)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *argv, env=os.environ, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        url = (await process.stdout.readline()).decode().split()[1].rstrip(";")
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            assert (await client.post("/hooks/nightly", content=BODY, headers=server.signed(BODY))).status_code == 202
            # A request that is on its way when the end comes is answered.
            port = int(url.rsplit(":", 1)[1])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            headers = {"Host": "x", "Content-Length": str(len(BODY)), "Idempotency-Key": "1", "Expect": "100-continue"}
            headers |= server.signed(BODY)
            head = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
            writer.write(f"POST /hooks/nightly HTTP/1.1\r\n{head}\r\n".encode())
            await writer.drain()
            assert b" 100 " in await reader.readuntil(b"\r\n\r\n")  # now the server waits for the body
            process.send_signal(number)
            writer.write(BODY)
            assert b" 202 " in await reader.readline()
            writer.close()
        out, err = await process.communicate()
    assert process.returncode == 0 and b"Traceback" not in err and out == b"", err
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


async def test_a_log_that_takes_no_lines_changes_no_answer(server: Server) -> None:
    argv = ["-m", "swarm.cli.main", "serve", "--port", "0", "--home", str(server.settings.home)]
    full = os.open("/dev/full", os.O_WRONLY)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=full
    )
    os.close(full)
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        url = (await process.stdout.readline()).decode().split()[1].rstrip(";")
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            assert (await client.post("/hooks/nightly", content=BODY, headers=server.signed(BODY))).status_code == 202
        process.terminate()
        assert await process.wait() == 0
    assert len(await server.tickets()) == 1


async def test_the_command_says_what_is_wrong(tmp_path: Path, server: Server) -> None:
    async def run(*argv: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "swarm.cli.main", *argv, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 300)
        assert b"Traceback" not in err
        return process.returncode or 0, (out + err).decode()

    status, said = await run("serve", "--home", str(tmp_path / "nowhere"))
    assert status == 1 and "swarm init" in said
    home = ("--home", str(server.settings.home))
    status, said = await run("serve", "--host", "0.0.0.0", *home)
    assert status == 2 and "--allow-remote" in said
    status, said = await run("workflow", "webhook", "nightly", *home)
    assert status == 2 and "--new" in said
    status, said = await run("workflow", "webhook", "nightly", "--new", "--json", *home)
    made: dict[str, Any] = json.loads(said)
    assert status == 0 and made["path"] == "/hooks/nightly" and made["header"] == "X-Swarm-Signature"
    refused(await server.post(), 401, "with this hook's secret")  # the old one is worth nothing
    headers = server.signed(BODY, key=made["secret"].encode())
    assert (await server.client.post("/hooks/nightly", content=BODY, headers=headers)).status_code == 202


async def test_the_command_lines_in_the_docs(server: Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "workflows.md").read_text(encoding="utf-8")
    (lines,) = (
        block for block in re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "curl" in block
    )
    lines = lines.replace("http://127.0.0.1:8420/hooks/on-push", f"{server.client.base_url}/hooks/nightly")
    process = await asyncio.create_subprocess_exec(
        "bash", "-euc", lines, env=os.environ | {"SECRET": server.keys["KEY"].decode()},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0, err
    (ticket,) = await server.tickets()
    assert json.loads(out)["ticket_id"] == ticket.id
