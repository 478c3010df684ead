"""The API of what an installation has: secrets, tokens, engines, hosts, costs, images, templates; and that its JSON is
the command line's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

import httpx
import jsonschema

from swarm.admin.status import status
from swarm.api.app import ENDPOINTS
from swarm.api.endpoint import JSON
from swarm.api.v1 import agents, engines, images, secrets, tokens, workflows
from swarm.base import process
from swarm.cli import service
from swarm.ledger import Bill, Limit, Order, Spend
from swarm.model import Agent, Role
from swarm.store.hosts import Machine
from swarm.store.sql.transaction import Tx
from swarm.vm.image import staging
from swarm.vm.slots.inventory import Inventory
from tests.api.served import ECHO, Served
from tests.api.test_auth import refused
from tests.api.test_workflows import changes, put
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import account_of

VALUE = "correct horse battery staple"
PARTS = {"root": {"file": "root.erofs", "sha256": "", "size_bytes": 3}}
DIGEST = staging.digest_of({"parts": {"root": ["root.erofs", "", 3]}, "boot_args": ""})
KEY = "cd" * 16


async def test_secrets_go_in_and_never_come_out(served: Served) -> None:
    admin, said = served.admin, list[str]()
    for body in ({"value": VALUE}, {"value": VALUE + " 2", "agent": "echo"}, {"value": VALUE, "workflow": "release"}):
        answer = await admin.put("/v1/secrets/API_KEY", json=body)
        assert answer.status_code == 204 and answer.content == b""
    listed = await served.operator.get("/v1/secrets")
    assert [(row["name"], row["scope"]) for row in listed.json()] == [
        ("API_KEY", "agent:echo"),
        ("API_KEY", "all"),
        ("API_KEY", "workflow:release"),
    ]
    assert {name for row in listed.json() for name in row} == {"name", "scope", "updated_at"}
    assert (await served.store.sealed_secrets(["API_KEY"]))[0].sealed
    assert (await admin.delete("/v1/secrets/API_KEY?agent=echo")).status_code == 204
    gone = await admin.delete("/v1/secrets/API_KEY?agent=echo")
    refused(gone, 404, "it is set for all, workflow:release")
    for event in await served.store.events(None):
        said.append(json.dumps(dict(event.data)))
    said += [listed.text, gone.text, *[(await admin.get(f"/v1/{path}")).text for path in ("secrets", "openapi.json")]]
    assert VALUE not in "".join(said)
    files = [path for path in served.settings.home.rglob("*") if path.is_file()]
    assert not [path for path in files if VALUE.encode() in path.read_bytes()]
    assert [(did, by) for did, by, _ in await changes(served)] == [("secret.set", "the-admin")] * 3 + [
        ("secret.remove", "the-admin")
    ]


BAD_SECRETS: Final[list[Any]] = [
    ("API_KEY", {"value": "hunter2 and more", "agent": "a", "workflow": "b"}, "one agent, workflow or webhook"),
    ("API-KEY", {"value": "hunter2 and more"}, "not a valid name"),
    ("API_KEY", {"value": "hun"}, "must have"),
    ("API_KEY", {"value": "hunter2" * 10_000}, "must have"),
    ("API_KEY", {"value": "hunter2 and \0"}, "no NUL"),
    ("API_KEY", {"value": "hunter2 and \ud800"}, "UTF-8"),
    ("API_KEY", {"value": ["hunter2 and more"]}, "must be text"),
    ("API_KEY", {"value": 1_000_000_007}, "must be text"),
    ("API_KEY", {"value": "hunter2 and more", "agent": "a b"}, "agent"),
    ("API_KEY", {"valeu": "hunter2 and more"}, "did you mean 'value'"),
    ("API_KEY", {}, "value: is missing"),
]


async def test_bad_secrets_are_not_repeated(served: Served) -> None:
    for name, body, said in BAD_SECRETS:
        headers = {"content-type": "application/json"}
        answer = await served.admin.put(f"/v1/secrets/{name}", content=json.dumps(body), headers=headers)
        refused(answer, 400, said)
        assert "hunter2" not in answer.text and "1000000007" not in answer.text
    assert (await served.operator.get("/v1/secrets")).json() == []


async def test_a_token_is_shown_once(served: Served) -> None:
    given = {"name": "ci", "role": "operator", "project": "a", "expires": "30d"}
    made = await served.admin.post("/v1/tokens", json=given)
    assert made.status_code == 201 and set(made.json()) == {"name", "role", "project", "token"}
    headers = {"authorization": f"Bearer {made.json()['token']}"}
    who = (await served.nobody.get("/v1/whoami", headers=headers)).json()
    assert who == {"name": "ci", "role": "operator", "project_id": "a"}
    listed = await served.admin.get("/v1/tokens")
    (row,) = [row for row in listed.json() if row["name"] == "ci"]
    assert (row["created_by"], row["project_id"], row["expires_at"][:2]) == ("the-admin", "a", "20")
    assert made.json()["token"] not in listed.text
    refused(await served.admin.post("/v1/tokens", json={"name": "ci"}), 409, "there is a token 'ci'")
    assert (await served.admin.delete("/v1/tokens/ci")).json() == row | {"last_used_at": row["last_used_at"]}
    refused(await served.nobody.get("/v1/whoami", headers=headers), 401, "a valid token")
    refused(await served.admin.delete("/v1/tokens/ci"), 404, "no token 'ci'")


BAD_TOKENS: Final[list[Any]] = [
    ({"name": "ci "}, "a token's name"),
    ({"name": "-ci"}, "a token's name"),
    ({"name": "x" * 64}, "a token's name"),
    ({"name": "ci", "role": "root"}, "role: must be 'viewer'"),
    ({"name": "ci", "expires": "soon"}, "expires after a number"),
    ({"name": "ci", "expires": "0d"}, "expires after a number"),
    ({"name": "ci", "project": ""}, "project"),
    ({"name": "ci", "project": "a\0"}, "project"),
    ({"role": "viewer"}, "name: is missing"),
]


async def test_bad_tokens(served: Served) -> None:
    for body, said in BAD_TOKENS:
        refused(await served.admin.post("/v1/tokens", json=body), 400, said)
    assert {row.name for row in await served.store.tokens()} == {f"the-{role}" for role in Role}


MACHINE = Machine(
    id="6f1a6a52-0000-4000-8000-000000000001", name="node/7", machine_id="m", boot_id="b", labels={"zone": "a"},
    capacity={"slots": 2}, versions={},
)  # fmt: skip


async def test_hosts_are_drained_and_removed_by_admins(served: Served) -> None:
    await served.store.register_host(MACHINE)
    (row,) = (await served.viewer.get("/v1/hosts")).json()
    assert (row["host"], row["engines"], row["draining"], row["labels"]) == ("node/7", 0, False, {"zone": "a"})
    assert (await served.viewer.get("/v1/hosts/node%2F7")).json()["id"] == MACHINE.id
    refused(await served.viewer.get("/v1/hosts/nobody"), 404, "no host 'nobody'")
    path = "/v1/hosts/6f1a6a52"
    refused(await served.operator.post(f"{path}/drain", json={}), 403, "admin")
    refused(await served.admin.post(f"{path}/drain", json={"within_seconds": -1}), 400, "within_seconds")
    row = (await served.admin.post(f"{path}/drain", json={"within_seconds": 60})).json()
    assert row["draining"] and 0 < row["put_back_seconds"] <= 60 and row["drained_by"] == "the-admin"
    row = (await served.admin.post(f"{path}/undrain")).json()
    assert not row["draining"] and row["drained_by"] is None
    await served.store.heartbeat("w", host="node/7", pid=1, info={})
    refused(await served.admin.delete(path), 409, "is alive")
    gone = (await served.admin.delete(path, params={"force": True})).json()
    assert (gone["host"], gone["held"]["attempts"]) == ("node/7", 0)
    assert (await served.viewer.get("/v1/hosts")).json() == []
    did = [(did, by) for did, by, _ in await changes(served)]
    assert did == [("host.drain", "the-admin"), ("host.undrain", "the-admin"), ("host.rm", "the-admin")]


async def test_engines_and_hosts(served: Served) -> None:
    """Live and silent ones; and whatever another program wrote."""
    info = {"driver": "qemu", "max_vms": 4, "running": 1, "per_minute": 7, "memory_mb": 8000, "memory_free_mb": 900}
    await served.store.heartbeat("old", host="b", pid=1, info=info)
    await served.store.shift_clock(20_000)
    await served.store.heartbeat("one", host="a", pid=2, info={**info, "waits_for": "memory: 900 MB are free"})
    await served.store.heartbeat("two", host="a", pid=3, info={**info, "driver": "firecracker"})
    await served.store.heartbeat(
        "odd", host="c", pid=4, info={"max_vms": "many", "running": True, "per_minute": -1, "memory_mb": 1e300}
    )
    engines = (await served.viewer.get("/v1/engines")).json()
    assert {(one["id"], one["host"], one["alive"]) for one in engines} == {
        ("old", "b", False),
        ("one", "a", True),
        ("two", "a", True),
        ("odd", "c", True),
    }
    whole = (await served.viewer.get("/v1/status")).json()
    assert set(whole) == {"queue", "vms", "engines", "elsewhere", "settings_differ"} and len(whole["engines"]) == 4
    hosts = {one["host"]: one for one in (await served.viewer.get("/v1/hosts")).json()}
    a = {name: hosts["a"][name] for name in ("engines", "alive", "max_vms", "running", "ended_per_minute", "drivers")}
    assert a == {
        "engines": 2, "alive": 2, "max_vms": 8, "running": 2, "ended_per_minute": 14, "drivers": ["firecracker", "qemu"]
    }  # fmt: skip
    assert (hosts["a"]["memory_mb"], hosts["a"]["waits_for"]) == (8000, ["memory: 900 MB are free"])
    assert (hosts["b"]["alive"], hosts["b"]["max_vms"], hosts["b"]["memory_mb"]) == (0, 0, None)
    assert (hosts["c"]["alive"], hosts["c"]["max_vms"], hosts["c"]["memory_free_mb"]) == (1, 0, None)


async def test_an_engine_that_was_killed_is_no_live_one(served: Served) -> None:
    """On this host, that is known before it has been silent for long."""
    child = await asyncio.create_subprocess_exec("sleep", "60")
    info = {"driver": "qemu", "max_vms": 4, "machine": process.machine(), "started": process.start_time(child.pid)}
    await served.store.heartbeat("mine", host="here", pid=child.pid, info=info)
    (engine,) = (await served.viewer.get("/v1/engines")).json()
    assert (engine["alive"], engine["died"], await service.has_engine(served.store)) == (True, False, True)
    child.kill()
    await child.wait()
    (engine,) = (await served.viewer.get("/v1/engines")).json()
    assert (engine["alive"], engine["died"], await service.has_engine(served.store)) == (False, True, False)
    assert (await served.viewer.get("/v1/hosts")).json()[0]["alive"] == 0
    for page, says in (("/", "No engine runs"), ("/hosts", "takes its steps over at once")):
        assert says in (await served.viewer.get(page, headers={"accept": "text/html"})).text
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "swarm.cli.engine", "status", "--home", str(served.settings.home)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"engine {child.pid} on here: died; the next engine on this host" in done.stdout, done


async def test_a_slot_that_is_prepared_is_no_vm(served: Served, tmp_path: Path) -> None:
    for n, pid in ((1, 0), (2, 4_000_000)):
        place = tmp_path / "vms" / str(n)
        place.mkdir(parents=True)
        (place / "vm.json").write_text(json.dumps({"n": n, "kind": "attempt", "pid": pid}))
    found = await status(served.store, Inventory(state_dir=tmp_path))
    assert [vm.n for vm in found.vms] == [2]


async def test_costs(served: Served) -> None:
    await book(served)
    (row,) = (await served.viewer.get("/v1/costs")).json()
    assert (row["name"], row["calls"], row["input_tokens"], row["cost_usd"]) == ("echo", 1, 10, 0.25)
    (row,) = (await served.viewer.get("/v1/costs?by=model&since=7d")).json()
    assert row["name"] == "large"
    assert (await served.viewer.get("/v1/costs?by=day&since=2100-01-01")).json() == []
    for query, said in (("by=author", "by: must be"), ("since=soon", "is not a time"), ("until=7d", "unknown field")):
        refused(await served.viewer.get(f"/v1/costs?{query}"), 400, said)


async def test_costs_are_of_a_month_and_few(served: Served) -> None:
    await book(served)
    with contextlib.closing(
        sqlite3.connect(served.settings.data_dir / "swarm.db", isolation_level=None, timeout=60)
    ) as other:
        other.execute("UPDATE model_calls SET at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-40 days')")
    assert (await served.viewer.get("/v1/costs")).json() == []
    assert len((await served.viewer.get("/v1/costs?since=60d")).json()) == 1
    assert len((await served.viewer.get("/v1/costs?since=")).json()) == 1
    refused(await served.viewer.get("/v1/costs?limit=1001"), 400, "limit")


async def test_no_read_waits_for_one_of_all_rows(served: Served) -> None:
    store, begun, go_on = served.store, threading.Event(), threading.Event()

    def hold(tx: Tx) -> None:
        begun.set()
        assert go_on.wait(60)

    await book(served)
    held = asyncio.create_task(store._read.call(hold))
    try:
        assert await asyncio.to_thread(begun.wait, 60)
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert len(await store.costs("agent")) == 1
            assert await store.artifacts() == []
    finally:
        go_on.set()
        await held


async def book(served: Served) -> None:
    await served.add("costly")
    (claim,) = await served.store.claim("worker", lease_seconds=60)
    account = account_of(claim, agent_budget=Limit())
    most = Spend(usd=1.0, tokens=100)
    order = Order(id="call", account=account, upstream="x", model="large", most=most, least=most, day=Limit())
    await served.store.reserve(order)
    bill = Bill(
        id="call", account=account, upstream="x", model="large", status=200, counts={"input": 10, "output": 5},
        cost_usd=0.25, latency_ms=1.0, first_byte_ms=None, streamed=False, note="", estimated=False,
    )  # fmt: skip
    await served.store.book(bill)


async def test_images_and_templates(served: Served) -> None:
    write_image(served)
    (image,) = (await served.viewer.get("/v1/images")).json()
    assert (image["digest"], image["kernel_version"], image["size_bytes"]) == (DIGEST, "6.1", 3)
    refused(await served.admin.delete("/v1/images/ffff"), 404, "no image 'ffff'")
    refused(await served.admin.delete("/v1/images/%20"), 404, "no image ' '")
    assert (await served.admin.delete(f"/v1/images/{DIGEST[:8]}")).status_code == 204
    assert (await served.viewer.get("/v1/images")).json() == []
    (template,) = (await served.viewer.get("/v1/templates")).json()
    assert (template["key"], template["memory_mb"], template["image"]) == (KEY, 256, DIGEST)
    refused(await served.admin.delete("/v1/templates/ffff"), 404, "no templates")
    assert (await served.admin.delete(f"/v1/templates/{KEY[:8]}")).status_code == 204
    assert (await served.viewer.get("/v1/templates")).json() == []
    assert await changes(served) == [
        ("image.remove", "the-admin", DIGEST),
        ("template.remove", "the-admin", KEY),
    ]


def write_image(served: Served) -> None:
    image, template = served.settings.images / DIGEST, served.settings.templates / KEY
    image.mkdir(parents=True)
    manifest = {
        "format": 1, "recipe": "r", "created_at": "2026-01-31T12:00:00.000Z", "parts": PARTS, "kernel_version": "6.1",
        "boot_args": "", "packages": {"libc6": "2.36"},
    }  # fmt: skip
    (image / "manifest.json").write_text(json.dumps(manifest))
    template.mkdir(parents=True)
    shape = {"driver": "qemu", "image": DIGEST, "memory_mb": 256, "vcpus": 1, "disk_mb": 64, "preload": ["ssl"]}
    (template / "template.json").write_text(json.dumps({"key": KEY, "parts": shape, "files": [], "created_at": 1.0}))


AS_THE_COMMAND_LINE = {
    "/v1/agents": "swarm agent list",
    "/v1/agents/echo": "swarm agent show echo",
    "/v1/workflows": "swarm workflow list",
    "/v1/workflows/release@1": "swarm workflow show release@1",
    "/v1/schedules": "swarm workflow schedules",
    "/v1/secrets": "swarm secret list",
    "/v1/costs?by=model": "swarm cost --by model",
    "/v1/images": "swarm image list",
    "/v1/templates": "swarm template list",
    "/v1/tokens": "swarm token list",
    "/v1/status": "swarm-engine status",
}
PROGRAM = """
import contextlib, shlex, sys
from swarm.cli import engine, main
from swarm.cli.frame import start
for line in sys.stdin.read().splitlines():
    print("\\x1e", end="", flush=True)
    sys.argv = shlex.split(line)
    with contextlib.suppress(SystemExit):
        start({"swarm": main.app, "swarm-engine": engine.app}[sys.argv[0]], sys.argv[0])
    sys.stdout.flush()
"""


async def test_the_json_is_the_command_lines(served: Served) -> None:
    """And what the command line changes is recorded with its user."""
    await put(served.admin)
    await served.admin.put("/v1/secrets/API_KEY", json={"value": VALUE})
    await book(served)
    write_image(served)
    await served.store.heartbeat("one", host=socket.gethostname(), pid=os.getpid(), info={"max_vms": 2})
    await served.store.put_agent(Agent(**{**_fields(ECHO), "id": "other", "name": "other"}))
    answers = {path: (await served.admin.get(path)).json() for path in AS_THE_COMMAND_LINE}
    changing = [
        "swarm workflow disable release", "swarm workflow enable release", "swarm workflow disable release",
        "swarm workflow rm release", "swarm agent rm other", "swarm secret rm API_KEY",
        f"swarm template rm {KEY}",
    ]  # fmt: skip
    lines = [f"{line} --json --home {served.settings.home}" for line in AS_THE_COMMAND_LINE.values()]
    lines += [f"{line} --home {served.settings.home}" for line in changing]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_SECONDS):
        out, _ = await child.communicate("\n".join(lines).encode())
    printed = out.decode().split("\x1e")[1:]
    for (path, answer), said in zip(answers.items(), printed, strict=False):
        assert _steady(json.loads(said)) == _steady(answer), path
        assert answer, path
    user = process.user()
    assert [(did, by) for did, by, _ in await changes(served) if by == user] == [
        (did, user)
        for did in (
            "workflow.disable", "workflow.enable", "workflow.disable", "workflow.remove", "agent.remove",
            "secret.remove", "template.remove",
        )
    ]  # fmt: skip


def _fields(agent: Agent) -> dict[str, Any]:
    return {name: getattr(agent, name) for name in ("version", "path", "entry")}


def _steady(value: Any) -> Any:
    """Without what is another a moment later; and where the server is, which who asks it knows."""
    if isinstance(value, dict):
        moving = ("seen_ms_ago", "oldest_ready_ms", "next_due_ms", "last_used_at", "used_at", "server")
        return {name: _steady(each) for name, each in value.items() if name not in moving}
    return [_steady(each) for each in value] if isinstance(value, list) else value


async def test_answers_are_as_described(served: Served) -> None:
    """By the OpenAPI document, whatever it is that all may read."""
    await put(served.admin)
    await served.admin.put("/v1/secrets/API_KEY", json={"value": VALUE})
    await book(served)
    write_image(served)
    await served.store.register_host(MACHINE)
    await served.store.heartbeat("one", host="a", pid=1, info={"max_vms": 2})
    (run,) = await served.store.runs("costly")
    document = (await served.viewer.get("/v1/openapi.json")).json()
    ours = [one for module in (agents, engines, images, secrets, tokens, workflows) for one in module.ENDPOINTS]
    for endpoint in ENDPOINTS:
        of_tickets = re.match("/v1/(tickets|artifacts|events|sandboxes/|snapshots/)", endpoint.path)
        if endpoint.method != "GET" or of_tickets or endpoint.media_type != JSON:
            continue
        ref = "release" if "/workflows/" in endpoint.path else "echo"
        answer = await served.admin.get(endpoint.path.format(ref=ref, id=run.id, name="node%2F7"))
        assert answer.status_code == 200, f"{endpoint.path}: {answer.text}"
        described = document["paths"][endpoint.path]["get"]["responses"]["200"]["content"][JSON]["schema"]
        whole = {**described, "components": document["components"]}
        errors = list(jsonschema.Draft202012Validator(whole).iter_errors(answer.json()))
        assert not errors, f"{endpoint.path}: {errors[0].message} at {errors[0].json_path}"
        assert answer.json() or endpoint not in ours, endpoint.path


async def test_odd_names_are_nothing_that_exists(served: Served) -> None:
    odd = ["%00", "%FF", "%ED%A0%80", "a%0Ab", "%2e%2e", "@", "echo@1@2", "%E2%80%AE", "*", "x" * 3000]
    for module in (agents, images, secrets, tokens, workflows):
        for one in module.ENDPOINTS:
            sent: dict[str, Any] = {"json": {"value": VALUE}} if one.body is not None else {}
            for name in odd if "{" in one.path else []:
                answer = await served.admin.request(one.method, re.sub(r"{\w+}", name, one.path), **sent)
                assert answer.status_code in (400, 404), f"{one.method} {one.path} {name}: {answer.text}"
                assert answer.json()["detail"].isprintable()


def test_the_page_names_every_route() -> None:
    """With its role, and whether a project's token may not."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    for module in (agents, engines, images, secrets, tokens, workflows):
        for one in module.ENDPOINTS:
            path = re.sub(r"{(\w+)}", lambda name: name[1].upper(), one.path)
            rows = [line for line in page if f"`{one.method} {path}`" in line and line.startswith("|")]
            assert len(rows) == 1, f"{one.method} {path}"
            assert rows[0].split("|")[2].strip() == f"{one.role}{', shared' if one.shared else ''}", rows[0]


async def test_whoami_of_each(served: Served) -> None:
    for role, client in served.clients.items():
        answer: httpx.Response = await client.get("/v1/whoami")
        if role == "nobody":
            refused(answer, 401, "a valid token")
        else:
            assert answer.json() == {"name": f"the-{role}", "role": role, "project_id": None}
