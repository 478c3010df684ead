"""Sandboxes by the API: real agentds, held as an engine holds them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from swarm.model import Role
from swarm.store.registry.tokens import Actor, new_token
from tests.api.holding import Engine, holding
from tests.api.served import ECHO, Served, serving
from tests.api.web_socket import Rejected, Socket, web_socket
from tests.conftest import PATIENCE_SECONDS

BYTES = {"content-type": "application/octet-stream"}


@pytest.fixture
async def engine(served: Served, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    async with holding(served.store, tmp_path_factory.mktemp("e")) as engine:
        yield engine


async def box(served: Served, **fields: Any) -> str:
    made = await served.operator.post("/v1/sandboxes", json=fields)
    assert made.status_code == 201, made.text
    assert made.json()["state"] == "starting"
    return f"/v1/sandboxes/{made.json()['id']}"


async def run(client: httpx.AsyncClient, path: str, *argv: str, **fields: Any) -> dict[str, Any]:
    answer = await client.post(f"{path}/exec", json={"argv": argv, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_from_its_creation_to_its_end(served: Served, engine: Engine) -> None:
    path = await box(served, name="box", ttl_seconds=600, labels={"for": "test"}, env={"A": "b"})
    assert (await served.viewer.get(f"{path}/wait")).json()["state"] == "running"
    assert (await run(served.operator, path, "echo", "hello"))["stdout"] == "hello\n"
    assert (await served.operator.post(f"{path}/pause")).json()["state"] == "paused"
    assert (await run(served.operator, "/v1/sandboxes/box", "echo", "awake"))["stdout"] == "awake\n"
    forks = (await served.operator.post(f"{path}/fork", json={"count": 2, "name": "try"})).json()
    assert [(one["name"], one["parent_id"], one["state"]) for one in forks] == [
        (f"try-{number}", path.rpartition("/")[2], "starting") for number in (1, 2)
    ]
    kept = (await served.operator.post(f"{path}/snapshot", json={"name": "good", "without_secrets": True})).json()
    assert (kept["kind"], kept["name"], kept["secrets"]) == ("named", "good", False)
    assert [one["id"] for one in (await served.viewer.get("/v1/snapshots")).json()["snapshots"]] == [kept["id"]]
    again = await box(served, snapshot="good", name="again")
    assert (await served.viewer.get(again)).json()["snapshot_id"] == kept["id"]
    page = (await served.viewer.get("/v1/sandboxes?label=for=test&state=running")).json()
    assert [(one["name"], one["labels"], one["env"]) for one in page["sandboxes"]] == [
        ("box", {"for": "test"}, {"A": "b"})
    ]
    events = (await served.viewer.get(f"{path}/events")).json()["events"]
    assert {"transition", "change"} <= {one["kind"] for one in events}
    assert {one["sandbox_id"] for one in events} == {path.rpartition("/")[2]}
    assert (await served.operator.delete(path)).json()["state"] == "ended"
    gone = await served.operator.post(f"{path}/exec", json={"argv": ["true"]})
    assert gone.status_code == 409 and "the sandbox 'box' has ended" in gone.text
    assert (await served.operator.get("/v1/sandboxes/nothing/processes")).status_code == 404


async def test_commands(served: Served, engine: Engine) -> None:
    path = await box(served)
    data = os.urandom(300_000)
    given = {"stdin_base64": base64.b64encode(data).decode(), "encoding": "base64"}
    found = await run(served.operator, path, "cat", **given)
    assert base64.b64decode(found["stdout"]) == data and found["code"] == 0
    found = await run(
        served.operator, path, "sh", "-c", 'cat; echo "$A" >&2; pwd; exit 3', stdin="é\n", env={"A": "b c"}
    )
    assert (found["code"], found["stderr"]) == (3, "b c\n") and found["stdout"].startswith("é\n")
    found = await run(served.operator, path, "sh", "-c", "kill -9 $$")
    assert (found["code"], found["signal"]) == (None, 9)
    found = await run(served.operator, path, "head", "-c", "1000000", "/dev/zero", max_output_bytes=10)
    assert (len(found["stdout"]), found["dropped_bytes"]) == (10, 999_990)
    found = await run(served.operator, path, "sh", "-c", "sleep 1000 & sleep 1000", timeout_seconds=0.2)
    assert found["timed_out"]
    for body, status, said in [
        ({"argv": ["/nothing"]}, 409, "No such file"),
        ({"argv": []}, 400, "argv"),
        ({"argv": ["x\0"]}, 400, "argv"),
        ({"argv": ["x"], "process": "UPPER"}, 400, "process"),
        ({"argv": ["x"], "stdin_base64": "?"}, 400, "not base64"),
        ({"argv": ["x"], "stdin_base64": "", "stdin": ""}, 400, "not both"),
        ({"argv": ["x"], "user": "daemon"}, 400, "user"),
        ({"argv": ["x"] * 1001}, 400, "argv"),
        ({"argv": ["true", "é" * 70_000]}, 400, "has 140,000 bytes: Linux takes 131,071 in one"),
        ({"argv": ["true", *["x" * 110_000] * 20]}, 400, "Linux takes 2,097,152 together"),
        ({"argv": ["x"], "stdin": "x" * (1 << 20) + "x", "background": True}, 400, "at most 1 MiB of stdin"),
    ]:
        answer = await served.operator.post(f"{path}/exec", json=body)
        assert (answer.status_code, said in answer.text) == (status, True), answer.text


async def test_a_command_in_the_background(served: Served, engine: Engine) -> None:
    path = await box(served)
    script = "exec 2>/dev/null; trap 'echo end; exit 5' TERM; echo begin; while :; do sleep 0.05; done"
    begun = await run(served.operator, path, "sh", "-c", script, background=True, process="job")
    assert begun["process"] == "job" and begun["code"] is None
    of_job = f"{path}/processes/job"
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await served.operator.get(f"{of_job}/output")).text != "begin\n":
            pass
    (listed,) = (await served.operator.get(f"{path}/processes")).json()
    assert (listed["process"], listed["ended"], listed["background"]) == ("job", None, True)
    following = asyncio.create_task(served.operator.get(f"{of_job}/output?follow=true"))
    assert (await served.operator.post(f"{of_job}/signal", json={"all": False})).status_code == 204
    assert (await following).text.startswith("begin\nend\n")
    (listed,) = (await served.operator.get(f"{path}/processes")).json()
    assert listed["ended"]["code"] == 5
    assert (await served.operator.get(f"{of_job}/output?after=6")).text.startswith("end\n")
    for wrong in (f"{path}/processes/none/output", f"{path}/processes/None/output"):
        assert (await served.operator.get(wrong)).status_code == 409
    assert (await served.operator.post(f"{of_job}/signal", json={"signal": "KILL", "all": False})).status_code == 409


async def test_all_that_a_command_wrote(served: Served, engine: Engine) -> None:
    """What was given to one in the background arrives; its output comes whole, or in pieces, to go on behind each."""
    path = await box(served)
    script = "cat; echo err >&2; head -c 200000 /dev/zero | tr '\\0' y"
    await run(served.operator, path, "sh", "-c", script, stdin="x" * 99_999, background=True, process="much")
    get, of_it = served.operator.get, f"{path}/processes/much/output"
    both = (await get(f"{of_it}?follow=true")).text.replace("err\n", "")  # which may come among the others
    assert both.endswith("y" * 200_000), "it has ended"
    pieces = [json.loads(line) for line in (await get(f"{of_it}?lines=true&follow=true")).text.splitlines()]
    dropped, ended = pieces.pop(0).get("dropped_bytes"), pieces.pop()["exit"]
    assert ended["code"] == 0 and dropped > 0
    out, err = (
        b"".join(base64.b64decode(one["data"]) for one in pieces if one["stream"] == name)
        for name in ("stdout", "stderr")
    )
    assert set(out) <= {*b"xy"} and out.endswith(b"y" * 200_000) and err in (b"", b"err\n")
    assert dropped + len(out) + len(err) == 300_003 == pieces[-1]["offset"]
    assert len((await get(of_it)).content) == 300_003 - dropped
    after = pieces[0]["offset"]
    rest = [json.loads(line) for line in (await get(f"{of_it}?lines=true&after={after}")).text.splitlines()]
    assert rest == pieces[1:]


async def test_who_goes_away_ends_the_command(served: Served, engine: Engine) -> None:
    path = await box(served)
    asking = asyncio.create_task(run(served.operator, path, "sleep", "1000", process="left"))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await _processes(served, path):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        asking.cancel()
        while not all(one["ended"] for one in await _processes(served, path)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _processes(served: Served, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await served.operator.get(f"{path}/processes")).json()
    return found


async def test_files(served: Served, engine: Engine) -> None:
    path = await box(served)
    content, data = f"{path}/files/content", os.urandom(5 << 20)
    written = await served.operator.put(f"{content}?path=a/big&parents=true&mode=750", content=data, headers=BYTES)
    assert written.json() == {"bytes": len(data)}, written.text
    info = (await served.operator.get(f"{path}/files/info?path=/work/a/big")).json()
    assert (info["kind"], info["size"], info["mode"]) == ("file", len(data), 0o750)
    read = await served.operator.get(f"{content}?path=/work/a/big")
    assert (read.content, int(read.headers["content-length"])) == (data, len(data))
    part = await served.operator.get(f"{content}?path=a/big", headers={"range": "bytes=1000000-1000099"})
    assert (part.status_code, part.content) == (206, data[1_000_000:1_000_100])
    moved = await served.operator.post(f"{path}/files/move", json={"path": "a/big", "to": "a/b ü"})
    assert moved.status_code == 204
    assert (
        await served.operator.post(f"{path}/files/directory", json={"path": "d/e", "parents": True})
    ).status_code == 204
    listed = (await served.operator.get(f"{path}/files?path=/work/a")).json()
    assert [(one["name"], one["kind"]) for one in listed["entries"]] == [("b ü", "file")] and listed["complete"]
    assert (await served.operator.get(content, params={"path": "a/b ü"})).content == data
    archive = await served.operator.get(f"{path}/files/archive?path=/work/a")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        assert [(one.name, one.size, one.mode & 0o777) for one in tar] == [("b ü", len(data), 0o750)]
    unpacked = await served.operator.put(
        f"{path}/files/archive?path=/work/copy", content=archive.content, headers={"content-type": "application/x-tar"}
    )
    assert unpacked.json() == {"entries": 1, "bytes": len(data), "left_out": []}
    assert (await served.operator.get(content, params={"path": "copy/b ü"})).content == data
    assert (await served.operator.delete(f"{path}/files?path=/work/copy")).status_code == 409
    assert (await served.operator.delete(f"{path}/files?path=/work/copy&recursive=true")).status_code == 204
    for query, status in [
        ("files/content?path=/work/copy/x", 404), ("files/content?path=/work/a", 409), ("files?path=/work/none", 404),
        ("files/archive?path=/work/none", 404), ("files/content?path=", 400), ("files/content?path=a&user=x", 400),
        ("files/content?path=%00", 400), ("files/content?path=/etc/shadow", 400),
    ]:  # fmt: skip
        answer = await served.operator.get(f"{path}/{query}")
        assert answer.status_code == status, f"{query}: {answer.text}"


async def test_a_watch_tells_what_changes(served: Served, engine: Engine) -> None:
    path = await box(served)
    watch = f"{path}/files/watch"
    assert (await served.operator.get(f"{watch}?path=none")).status_code == 404
    await served.operator.post(f"{path}/files/directory", json={"path": "d"})
    async with served.operator.stream("GET", f"{watch}?path=/work&recursive=true") as stream:
        assert stream.status_code == 200
        lines = stream.aiter_lines()
        assert await anext(lines) == ": open"
        await run(served.operator, path, "sh", "-c", "echo x > d/file; mv d/file d/other")
        told = list[dict[str, Any]]()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not told or told[-1]["event"] != "moved":
                line = await anext(lines)
                told += [json.loads(line.removeprefix("data: "))] if line.startswith("data: ") else []
    assert (told[0]["event"], told[0]["path"], told[0]["directory"]) == ("created", "d/file", False)
    assert (told[-1]["path"], told[-1]["to"]) == ("d/file", "d/other")


async def test_an_upload_that_broke_off_goes_on(served: Served, engine: Engine) -> None:
    """And until all has come, the file is as it was."""
    path = await box(served)
    content, data = f"{path}/files/content", os.urandom(3 << 20)
    await served.operator.put(f"{content}?path=file", content=b"old", headers=BYTES)

    async def half() -> AsyncIterator[bytes]:
        yield data[: 2 << 20]
        raise ConnectionError("the client goes away")

    with pytest.raises(ConnectionError):
        length = {"content-length": str(len(data))}
        await served.operator.put(f"{content}?path=file&upload=u-1", content=half(), headers=BYTES | length)
    assert (await served.operator.get(f"{content}?path=file")).content == b"old"
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (there := (await served.operator.get(f"{path}/files/uploaded?path=file&upload=u-1")).json()["bytes"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert 0 < there <= 2 << 20
    rest = await served.operator.put(
        f"{content}?path=file&upload=u-1&offset={there}", content=data[there:], headers=BYTES
    )
    assert rest.json() == {"bytes": len(data)}
    assert (await served.operator.get(f"{content}?path=file")).content == data


async def test_one_says_what_its_host_must_have(served: Served) -> None:
    path = await box(served, requires={"zone": "a", "gpu": True})
    assert await served.store.claim_sandboxes("w", "h", lease_seconds=60, limit=1) == []
    shown = (await served.viewer.get(path)).json()
    assert shown["requires"] == {"zone": "a", "gpu": True} and "waits for a host with gpu=true" in shown["error"]
    for bad in ({"zone": "a b"}, {"": 1}, {"zone": None}):
        refused = await served.operator.post("/v1/sandboxes", json={"requires": bad})
        assert refused.status_code == 400 and "requires" in refused.text, refused.text


async def test_secrets_and_networks_are_for_admins(served: Served, engine: Engine) -> None:
    """Who works in a VM reads all that is in it."""
    keeper = replace(ECHO, id="keeper", name="keeper", secrets=("KEY",))
    await served.store.put_agent(keeper)
    for given in ({"secrets": ["KEY"]}, {"network": "open"}, {"agent": "keeper"}):
        refused = await served.operator.post("/v1/sandboxes", json=given)
        assert refused.status_code == 403 and "needs an admin" in refused.text, refused.text
    made = (await served.admin.post("/v1/sandboxes", json={"agent": "keeper", "name": "kept"})).json()
    path = f"/v1/sandboxes/{made['id']}"
    kept = (await served.admin.post(f"{path}/snapshot", json={})).json()
    assert kept["secrets"]
    for method, of, body in [
        ("POST", "exec", {"argv": ["env"]}), ("GET", "files/content?path=x", None), ("POST", "fork", {}),
        ("GET", "processes", None),
    ]:  # fmt: skip
        refused = await served.operator.request(method, f"{path}/{of}", json=body)
        assert refused.status_code == 403 and "there are secrets in this VM" in refused.text, refused.text
        with pytest.raises(Rejected) as rejected:
            async with web_socket(served.url, f"{path}/exec/live", _bearer(served, "operator")):
                pass
        assert rejected.value.status == 403
    assert (await served.operator.post("/v1/sandboxes", json={"snapshot": kept["id"]})).status_code == 403
    assert (await run(served.admin, path, "echo", "x"))["stdout"] == "x\n"
    token = new_token()
    await served.store.add_token(token, Actor(name="team", role=Role.ADMIN, project_id="p"), by="test")
    bearer = {"authorization": f"Bearer {token}"}
    refused = await served.nobody.post("/v1/sandboxes", json={"secrets": ["KEY"]}, headers=bearer)
    assert refused.status_code == 403
    assert (await served.nobody.get(path, headers=bearer)).status_code == 404
    with pytest.raises(Rejected) as rejected:
        async with web_socket(served.url, f"{path}/exec/live", bearer):
            pass
    assert rejected.value.status == 404
    assert json.loads(rejected.value.body)["detail"].startswith("no sandbox")


# --- streams both ways ------------------------------------------------------------------------------------------------


def _bearer(served: Served, role: str) -> dict[str, str]:
    return {"authorization": f"Bearer {served.tokens[role]}"}


async def heard(socket: Socket) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """All up to the end: stdout, stderr, texts."""
    streams, texts = {1: b"", 2: b""}, []
    while (message := await socket.receive()) is not None:
        if isinstance(message, bytes):
            streams[message[0]] += message[1:]
        else:
            texts.append(json.loads(message))
    return streams[1], streams[2], texts


async def test_a_terminal(served: Served, engine: Engine) -> None:
    path = await box(served)
    async with web_socket(served.url, f"{path}/exec/live", _bearer(served, "operator")) as socket:
        await socket.send({"argv": ["sh"], "pty": [100, 30], "env": {"PS1": ""}})
        assert "started" in json.loads(str(await socket.receive()))
        await socket.send(b"stty size\n")
        await until(socket, b"30 100")
        await socket.send({"op": "resize", "size": [80, 24]})
        await socket.send(b"stty size\n")
        await until(socket, b"24 80")
        await socket.send(b"sleep 1000\n")
        await asyncio.sleep(0.1)
        await socket.send({"op": "signal", "signal": "INT"})
        await socket.send(b"exit 7\n")
        _, _, texts = await heard(socket)
    assert texts[-1]["exit"]["code"] == 7 and socket.code == 1000


async def until(socket: Socket, wanted: bytes) -> None:
    seen = b""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while wanted not in seen:
            message = await socket.receive()
            assert isinstance(message, bytes), message
            seen += message[1:]


async def test_a_pipe_by_a_socket(served: Served, engine: Engine) -> None:
    path = await box(served)
    data = os.urandom(2 << 20)
    async with web_socket(served.url, f"{path}/exec/live", _bearer(served, "operator")) as socket:
        await socket.send({"argv": ["sh", "-c", "cat; echo err >&2"]})
        hearing = asyncio.create_task(heard(socket))
        for at in range(0, len(data), 1 << 18):
            await socket.send(data[at : at + (1 << 18)])
        await socket.send({"op": "end"})
        out, err, texts = await hearing
    assert (out, err, texts[-1]["exit"]["code"]) == (data, b"err\n", 0)


async def test_a_client_that_takes_nothing_holds_the_command_up(served: Served, engine: Engine) -> None:
    """Nothing is kept for it but what pipes and sockets hold."""
    path = await box(served)
    async with web_socket(served.url, f"{path}/exec/live", _bearer(served, "operator")) as socket:
        await socket.send({"argv": ["yes"], "process": "flood"})
        await socket.receive()
        before = -1
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (now := (await _processes(served, path))[0]["output_bytes"]) != before or not now:
                before = now
                await asyncio.sleep(0.3)
        assert now < 64 << 20
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (await _processes(served, path))[0]["ended"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_window_bounds_what_is_on_its_way(served: Served, engine: Engine) -> None:
    """For clients that read all that comes, such as a browser's script: they say what they have taken."""
    path, size = await box(served), 1 << 16
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        web_socket(served.url, f"{path}/exec/live", _bearer(served, "operator")) as socket,
    ):
        await socket.send({"argv": ["yes"], "window_bytes": size})
        assert "started" in str(await socket.receive())
        taken = seen = 0
        for _ in range(20):
            taken = seen
            await socket.send({"op": "taken", "bytes": taken})
            while seen - taken < size:
                message = await socket.receive()
                assert isinstance(message, bytes)
                seen += len(message) - 1
        await socket.send({"op": "taken", "bytes": taken - 1})
        out, _, texts = await heard(socket)
        assert "was taken so far" in texts[-1]["error"] and out == b"", "it sent more than the window"


async def test_input_is_not_stuck_behind_a_window(served: Served, engine: Engine) -> None:
    """What a client has taken is told behind its input, which a program takes that can write its output."""
    path, size = await box(served), 12 << 20

    async def type_all(socket: Socket) -> None:
        for _ in range(0, size, 1 << 18):
            await socket.send(bytes(1 << 18))
        await socket.send({"op": "end"})

    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        web_socket(served.url, f"{path}/exec/live", _bearer(served, "operator")) as socket,
    ):
        await socket.send({"argv": ["cat"], "window_bytes": 1 << 16})
        typing, seen = asyncio.create_task(type_all(socket)), 0
        while (message := await socket.receive()) is not None:
            if isinstance(message, bytes):
                seen += len(message) - 1
                if socket.code is None:
                    socket.say({"op": "taken", "bytes": seen})
        await typing
        assert seen == size


async def test_what_runs_is_come_back_to(served: Served, engine: Engine) -> None:
    path = await box(served)
    await run(served.operator, path, "true", background=True, process="done")
    await run(served.operator, path, "sleep", "1000", background=True, process="job")
    for _ in range(2):  # to leave it leaves it running
        async with web_socket(served.url, f"{path}/processes/job/live", _bearer(served, "operator")) as socket:
            assert json.loads(str(await socket.receive()))["started"] == "job"
    async with web_socket(served.url, f"{path}/exec/live", _bearer(served, "operator")) as socket:
        await socket.send({"argv": ["sleep", "1000"], "process": "left"})
        await socket.receive()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while {one["process"] for one in await _processes(served, path) if not one["ended"]} != {"job"}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    async with web_socket(served.url, f"{path}/processes/done/live", _bearer(served, "operator")) as socket:
        _, _, texts = await heard(socket)
        assert (texts[0]["started"], texts[1]["exit"]["code"]) == ("done", 0)
    with pytest.raises(Rejected) as rejected:
        async with web_socket(served.url, f"{path}/processes/none/live", _bearer(served, "operator")):
            pass
    assert rejected.value.status == 409 and b"no such process" in rejected.value.body


async def test_a_port(served: Served, engine: Engine) -> None:
    path = await box(served)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.write(b"bye")
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)  # a process of the host has the host's ports
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with web_socket(served.url, f"{path}/ports/{port}/live", _bearer(served, "operator")) as socket:
            await socket.send(b"\0hello")
            assert await socket.receive() == b"\0hello"
            await socket.send(b"")
            rest = b""
            while (message := await socket.receive()) is not None:
                assert isinstance(message, bytes)
                rest += message
        assert rest == b"bye" and socket.code == 1000
    for number, status in ((str(port), 409), ("0", 400), ("x", 400), ("70000", 400), ("1" * 5000, 400)):
        with pytest.raises(Rejected) as rejected:
            async with web_socket(served.url, f"{path}/ports/{number}/live", _bearer(served, "operator")):
                pass
        assert rejected.value.status == status, rejected.value


async def test_who_may_open_a_socket(served: Served, engine: Engine) -> None:
    path = f"{await box(served)}/exec/live"
    entered = await served.nobody.post(
        "/login", data={"token": served.tokens["operator"]}, headers={"origin": served.url}
    )
    cookie = {"cookie": f"swarm_session={entered.cookies['swarm_session']}"}
    for headers, status in [
        ({}, 401), (_bearer(served, "viewer"), 403), ({"authorization": "Bearer x"}, 401), (cookie, 403),
        (cookie | {"origin": "http://evil.example"}, 403), (cookie | {"origin": "null"}, 403),
    ]:  # fmt: skip
        with pytest.raises(Rejected) as rejected:
            async with web_socket(served.url, path, headers):
                pass
        assert rejected.value.status == status, headers
        assert rejected.value.headers["content-type"] == "application/problem+json"
        assert rejected.value.headers["x-frame-options"] == "DENY"
    async with web_socket(served.url, path, cookie | {"origin": served.url}) as socket:
        await socket.send({"argv": ["echo", "x"]})
        assert (await heard(socket))[0] == b"x\n"


async def test_a_first_message_that_makes_no_sense(served: Served, engine: Engine) -> None:
    path = await box(served)
    wrong: list[tuple[Any, str]] = [
        ("x", "not JSON"), (b"x", "must be a text"), ("[]", "must be an object"), ('{"argv": []}', "argv"),
        ('{"argv": ["/nothing"]}', "No such file"), ("[" * 5000, "message is"),
        ('{"argv": ["x"], "pty": [0, 1]}', "pty"),
    ]  # fmt: skip
    for said, why in wrong:
        async with web_socket(served.url, f"{path}/exec/live", _bearer(served, "operator")) as socket:
            await socket.send(said)
            _, _, texts = await heard(socket)
            assert why in texts[-1]["error"] and socket.code == 1008, said


async def test_what_takes_long_ends_with_its_token(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with (
        serving(tmp_path / "home", again_seconds=0.0) as served,
        holding(served.store, tmp_path_factory.mktemp("e")),
    ):
        path, token = await box(served), new_token()
        await served.store.add_token(token, Actor(name="ci", role=Role.OPERATOR), by="anna")
        headers = {"authorization": f"Bearer {token}"}
        sleep = {"argv": ["sleep", "1000"]}
        waiting = asyncio.create_task(served.nobody.post(f"{path}/exec", json=sleep, headers=headers))
        async with asyncio.timeout(PATIENCE_SECONDS), web_socket(served.url, f"{path}/exec/live", headers) as socket:
            await socket.send(sleep)
            await socket.receive()
            while len(await _processes(served, path)) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await served.store.revoke_token("ci", by="anna")
            _, _, texts = await heard(socket)
            assert "no longer valid" in texts[-1]["error"] and socket.code == 1008
            assert (await waiting).status_code == 401
            while not all(one["ended"] for one in await _processes(served, path)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
