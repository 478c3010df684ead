"""The same in real VMs: what one can reach, and that the key is nowhere but in the gateway."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from aiohttp import web

from swarm import config
from swarm.app import setup, wiring
from swarm.base import process
from swarm.config import Settings
from swarm.engine.run_once import run_ticket
from swarm.errors import LayerMissing
from swarm.vm.driver import Image
from tests.conftest import missing
from tests.engine.conftest import Bench
from tests.gateway.conftest import KEY
from tests.gateway.messages_api import HAIKU, MessagesApi

pytestmark = pytest.mark.needs("qemu")

# http.client, since every import costs a guest without KVM dearly.
PROGRAM = """
import http.client, json, os, socket

host = os.environ.get("ANTHROPIC_BASE_URL", "http://172.16.0.1:8080")[7:]
token = os.environ.get("ANTHROPIC_API_KEY", "")

def call(prompt="haiku", token=token, path="/v1/messages", model="claude-haiku-4-5"):
    connection = http.client.HTTPConnection(host, timeout=300)
    body = {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": prompt}]}
    connection.request("POST", path, json.dumps(body), {"x-api-key": token})
    answer = connection.getresponse()
    said = json.load(answer)
    return said["content"][0]["text"] if answer.status == 200 else answer.status

def reaches(host, port):
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError as error:
        return type(error).__name__
    return "connected"

given = json.load(open("input.json"))["inputs"]
json.dump({name: eval(code) for name, code in given.items()}, open("output.json", "w"))
"""


@pytest.fixture
async def gated(
    settings: Settings, image: Image, api: MessagesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", api.url)
    own = config.load(**{**settings.model_dump(), "home": tmp_path / "home", "templates_dir": settings.templates})
    await setup.init(own, image=False)
    async with wiring.store(own) as store, wiring.worker(own, store) as worker:
        yield Bench(settings=own, store=store, worker=worker, dir=tmp_path)


async def test_what_a_vm_reaches(gated: Bench) -> None:
    asked = {
        "answer": "call()",
        "foreign": "call(token='x' * 43)",
        "outside": "call(path='/v1/files')",
        "proxy": "reaches('172.16.0.1', 3128)",
        "agentds": "reaches('172.16.0.1', 1024)",
        "host": "reaches('10.0.0.1', 8080)",
        "beyond": "reaches('192.0.2.1', 443)",
    }
    ticket = await gated.run(PROGRAM, inputs=asked, network="gateway")
    assert ticket.state == "done", ticket.error
    got = json.loads(ticket.outputs or "")
    assert got.pop("answer") == HAIKU
    assert (got.pop("foreign"), got.pop("outside")) == (401, 404)
    assert set(got.values()) <= {"TimeoutError", "ConnectionRefusedError", "OSError"}, got
    refused = [e.data["refused"] for e in await gated.store.events("t") if e.kind == "egress"]
    assert refused == ["token", "path"]
    [attempt] = await gated.attempts()
    assert attempt.cost_usd > 0

    alone = await gated.agent(PROGRAM, "alone")
    gated.insert("u", alone.id, inputs=json.dumps({"gateway": "reaches('172.16.0.1', 8080)"}))
    without = await run_ticket(gated.store, gated.worker, "u")
    assert json.loads(without.outputs or "")["gateway"] in ("ConnectionRefusedError", "TimeoutError")


# As root of the guest: only root may send such frames.
SPOOF = """
import fcntl, socket, struct
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as s:
    for source in ("172.16.0.1", "10.0.0.3", "192.0.2.1"):
        header = struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, 17, 0)
        header += socket.inet_aton(source) + socket.inet_aton("172.16.0.1")
        s.sendto(header + struct.pack("!HHHH", 53, 8080, 8, 0), ("172.16.0.1", 0))
"""


async def test_a_false_source_address_is_refused_and_recorded(gated: Bench, api: MessagesApi) -> None:
    """And only of the attempt that did it, though the next one gets the same slot."""
    agent = await gated.agent(PROGRAM, network="gateway")
    gated.insert("liar", agent.id, inputs=json.dumps({"answer": "call('scenario=hold')"}))
    running = asyncio.create_task(run_ticket(gated.store, gated.worker, "liar"))
    await asyncio.wait_for(api.held.wait(), 90)
    [record] = gated.vms()
    unknown = ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={gated.dir / 'hosts'}"]
    ssh = ["ssh", *unknown, *wiring.ssh_dir(gated.settings).options(), f"root@{record.address}"]
    await process.run([*ssh, "python3", "-I", "-S", "-"], input=SPOOF.encode())
    api.release.set()
    assert (await running).state == "done"
    gated.insert("honest", agent.id, inputs=json.dumps({"answer": "call()"}))
    assert (await run_ticket(gated.store, gated.worker, "honest")).state == "done"
    [attempt], [next_] = await gated.attempts("liar"), await gated.attempts("honest")
    assert attempt.vm_id == next_.vm_id
    [event] = [e for e in await gated.store.events("liar") if e.kind == "egress"]
    assert event.data == {"via": "tap", "refused": "source", "frames": 3} and event.attempt_id == attempt.id
    assert [e for e in await gated.store.events("honest") if e.kind == "egress"] == []


async def test_two_vms_at_once_and_each_others_tokens(gated: Bench, api: MessagesApi) -> None:
    """The first is in the middle of a call while the second tries its token, which it got by other ways."""
    agent = await gated.agent(PROGRAM, network="gateway")
    smuggled = {"leak": "print(token[::-1], flush=True)", "answer": "call('scenario=hold')"}
    gated.insert("one", agent.id, inputs=json.dumps(smuggled))
    first = asyncio.create_task(run_ticket(gated.store, gated.worker, "one"))
    await asyncio.wait_for(api.held.wait(), 90)
    await gated.until_it_prints("one")
    [leaked] = [str(e.data["text"]).strip() for e in await gated.store.events("one") if e.kind == "output"]
    gated.insert("two", agent.id, inputs=json.dumps({"tried": f"call(token={leaked!r}[::-1])", "own": "call()"}))
    async with wiring.store(gated.settings) as store, wiring.worker(gated.settings, store) as other:
        second = await run_ticket(store, other, "two")
    assert len(leaked) == 43
    assert json.loads(second.outputs or "") == {"tried": 401, "own": HAIKU}
    assert [e.data["refused"] for e in await gated.store.events("two") if e.kind == "egress"] == ["token"]
    api.release.set()
    done = await first
    assert json.loads(done.outputs or "")["answer"] == HAIKU  # the token was good where it belongs


async def test_the_key_is_nowhere_but_in_the_gateway(gated: Bench, api: MessagesApi) -> None:
    """While an attempt is in the middle of a call: guest memory, disks, templates, processes, files, database, log."""
    agent = await gated.agent(PROGRAM, network="gateway", secrets=())
    gated.insert("t", agent.id, inputs=json.dumps({"answer": "call('scenario=hold mark-of-this-call')"}))
    running = asyncio.create_task(run_ticket(gated.store, gated.worker, "t"))
    await asyncio.wait_for(api.held.wait(), 90)
    assert any(KEY in call["headers"].values() for call in api.seen)

    [record] = wiring.inventory(gated.settings).records()
    key = KEY.encode()
    # That the search would find it: what the guest does have is there.
    assert await asyncio.to_thread(_in_memory, record.pid, b"mark-of-this-call")
    assert not await asyncio.to_thread(_in_memory, record.pid, key)
    for place in (gated.settings.home, gated.settings.state_dir, gated.settings.templates):
        for file in place.rglob("*"):
            if file.is_file() and not file.is_symlink():
                assert not await asyncio.to_thread(_in_file, file, key), file
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            for what in ("cmdline", "environ"):
                try:
                    assert key not in (entry / what).read_bytes(), (entry, what)
                except OSError:
                    continue
    api.release.set()
    assert (await running).state == "done"
    history = json.dumps([dict(e.data) for e in await gated.store.events("t")])
    assert "mark-of-this-call" not in history  # prompts are private, too
    assert KEY not in history
    for file in gated.settings.home.rglob("*"):
        if file.is_file():
            assert not _in_file(file, key), file


# Everything that the server can answer, as the SDK in a VM sees it through the gateway.
SDK = """
import json, time
import anthropic

client = anthropic.Anthropic(max_retries=0, http_client=anthropic.DefaultHttpxClient(verify=False))

def asked(prompt):
    return {"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": prompt}]}

def streamed(prompt):
    times = []
    with client.messages.stream(**asked(prompt)) as stream:
        for _ in stream.text_stream:
            times.append(time.monotonic())
        return [stream.get_final_message().content[0].text, round(times[-1] - times[0], 1)]

def failed(ask, prompt):
    try:
        return ["no error", str(ask(prompt))]
    except anthropic.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.response.headers.get("retry-after")]
    except Exception as error:
        return [type(error).__name__]

def whole(prompt):
    return client.messages.create(**asked(prompt)).content[0].text

tool = {"name": "add", "description": "adds", "input_schema": {"type": "object", "properties": {}}}
called = client.messages.create(**asked('scenario=tool input={"a": 1}'), tools=[tool])
found = {
    "json": whole("Write a haiku"),
    "sse": streamed("Write a haiku")[0],
    "slow": streamed("words=5 delay=0.2"),
    "tool": [called.stop_reason, called.content[0].name, called.content[0].input],
    "busy": client.with_options(max_retries=2).messages.create(**asked("scenario=429 times=1")).content[0].text,
    **{name: failed(whole, f"scenario={name}") for name in ("429", "529", "500", "malformed")},
    "cut": failed(streamed, "scenario=cut words=40"),
}
json.dump(found, open("output.json", "w"))
"""


async def test_the_sdk_and_the_shipped_agents_in_vms(gated: Bench, api: MessagesApi) -> None:
    """Clones of one template, in which the SDK's first call was made."""
    claude = await gated.store.agent("claude")
    like = {"requirements": claude.requirements, "preload": claude.preload, "memory_mb": claude.memory_mb}
    program = await gated.agent(SDK, "sdk", network="gateway", files=[claude.path / "first_call.py"], **like)
    gated.insert("sdk", program.id)
    done = await run_ticket(gated.store, gated.worker, "sdk")
    got = json.loads(done.outputs or "{}")
    assert got.get("json") == got["sse"] == got["busy"] == HAIKU, done.error
    assert got["slow"][0] == "word " * 5 and got["slow"][1] >= 0.6, "as it came"
    assert got["tool"] == ["tool_use", "add", {"a": 1}]
    assert got["429"] == ["RateLimitError", 429, "1"]
    assert [got[name][:2] for name in ("529", "500")] == [["OverloadedError", 529], ["InternalServerError", 500]]
    assert len(got["malformed"]) == len(got["cut"]) == 1, got
    history = await gated.store.events("sdk")
    assert not [e.data for e in history if e.kind == "egress"], "nothing was refused"
    calls = [e.data for e in history if e.kind == "model_call"]
    assert sorted(int(str(call["status"])) for call in calls) == [200] * 7 + [429, 429, 500, 529]

    gated.insert("haiku", claude.id, description="words=6 delay=0.2")  # the description is the prompt
    haiku = await run_ticket(gated.store, gated.worker, "haiku")
    assert json.loads(haiku.outputs or "{}").get("text") == "word " * 6, haiku.error
    printed = [e for e in await gated.store.events("haiku") if e.kind == "output"]
    assert len(printed) >= 2 and printed[0].at != printed[-1].at, "while it came"


async def test_mini_swe_in_a_vm(gated: Bench, image: Image) -> None:
    """From files to a patch and a branch: mini-swe-agent, git and a compiler in the layer, LiteLLM by the gateway."""
    agent = await gated.store.agent("mini-swe")
    try:
        await wiring.layers(gated.settings).find(agent, image)
    except LayerMissing:
        missing("mini-swe", "needs the layer of mini-swe: run `make ready AGENTS=mini-swe`")
    program = "int main(void) { return 42; }"
    turns = [
        [f"echo '{program}' > a.c && gcc a.c -o /tmp/a && /tmp/a; echo $? > b.txt; id -un >> b.txt; rg one a.txt"],
        ["sed -i s/one/two/ a.txt && python3 -m pip --version && git commit -qam mine"],
        ["echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"],
    ]
    script = [[{"name": "bash", "input": {"command": line}} for line in turn] for turn in turns]
    inputs = {"prompt": f"scenario=script script={json.dumps(script)}", "files": {"a.txt": "one\n"}}
    gated.insert("work", agent.id, inputs=json.dumps(inputs))
    work = await run_ticket(gated.store, gated.worker, "work")
    made = json.loads(work.outputs or "{}")
    assert made.get("finished"), (work.error, made)
    assert {change["path"]: change["status"] for change in made["changes"]} == {
        "a.txt": "changed", "a.c": "added", "b.txt": "added"
    }  # fmt: skip
    assert "-one\n+two\n" in made["diff"] and "+42\n+agent\n" in made["diff"]
    assert made["patch"] and made["bundle"] and made["commits"] == 2
    calls = [e.data for e in await gated.store.events("work") if e.kind == "model_call"]
    assert [call["status"] for call in calls] == [200] * 3


async def test_http_fetch_in_a_vm(gated: Bench) -> None:
    """By the proxy in its namespace, to a site on the host's loopback, which is let in for this test."""

    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(text=f"{request.method} {request.path}")

    own = gated.settings.model_copy(update={"egress_private": (IPv4Network("127.0.0.0/8"),)})
    server = await asyncio.get_running_loop().create_server(web.Server(answer), "127.0.0.2", 0)
    port = server.sockets[0].getsockname()[1]
    agent = await gated.store.agent("http-fetch")
    gated.insert("t", agent.id, inputs=json.dumps({"url": f"http://127.0.0.2:{port}/there"}))
    gated.insert("u", agent.id, inputs=json.dumps({"url": "http://10.0.0.1:22/", "expect": [403]}))
    async with server, wiring.store(own) as store, wiring.worker(own, store) as worker:
        fetched = await run_ticket(store, worker, "t")
        refused = await run_ticket(store, worker, "u")
    assert json.loads(fetched.outputs or "{}").get("text") == "GET /there", fetched.error
    assert "no policy allows" in json.loads(refused.outputs or "{}")["text"], refused.error
    events = [e.data for name in "tu" for e in await gated.store.events(name) if e.kind == "egress"]
    assert [(e["host"], e.get("refused")) for e in events] == [
        ("127.0.0.2", None),
        ("10.0.0.1", "10.0.0.1 is an address of Swarm's own, which no policy allows"),
    ]


def _in_memory(pid: int, needle: bytes) -> bool:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end in list(_mappings(pid)):
            try:
                memory.seek(start)
                if _holds(iter(lambda end=end: memory.read(min(1 << 22, max(0, end - memory.tell()))), b""), needle):  # type: ignore[misc]
                    return True
            except (OSError, ValueError):  # vvar and the like can't be read
                continue
    return False


def _mappings(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, rights, *_ = line.split()
        if rights.startswith("r"):
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16)


def _in_file(file: Path, needle: bytes) -> bool:
    try:
        with file.open("rb", buffering=0) as opened:
            return _holds(_data(opened.fileno()), needle)
    except OSError:
        return False


def _data(fd: int) -> Iterator[bytes]:
    """What is in a file, without its holes: guest memory is mostly that."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # nothing more
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        for at in range(start, end, 1 << 22):
            yield os.pread(fd, min(1 << 22, end - at), at)


def _holds(chunks: Iterator[bytes], needle: bytes) -> bool:
    tail = b""
    for chunk in chunks:
        if needle in tail + chunk:
            return True
        tail = chunk[-len(needle) :]
    return False
