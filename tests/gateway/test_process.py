"""The gateway's process: what it may do, and what its death or a stop of it does to calls, books and the engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pydantic
import pytest

from swarm.base import privileges, process
from swarm.engine.egress import account_of
from swarm.errors import UsageError
from swarm.gateway import messages
from swarm.gateway.link import MAX_BYTES, Link, encode
from swarm.gateway.policy import Policy
from swarm.gateway.process import Server
from swarm.ledger import Limit, Order, Spend
from tests.conftest import PATIENCE_SECONDS
from tests.gateway.conftest import KEY, Harness, ask, client_of
from tests.gateway.messages_api import HAIKU


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def pid_of(harness: Harness) -> int:
    assert harness.gateway.pid is not None
    return harness.gateway.pid


async def other_pid(harness: Harness, dead: int) -> int:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while harness.gateway.pid in (None, dead):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return pid_of(harness)


async def call(listener: Server, prompt: str = "Write a haiku") -> str:
    async with client_of(listener) as client:
        return str((await client.messages.create(**ask(prompt))).content[0].text)


async def test_it_has_no_rights(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener:
        assert await call(listener) == HAIKU  # with all that it needs
        pid = pid_of(harness)
        status = status_of(pid)
        limits = Path(f"/proc/{pid}/limits").read_text()
        words = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert KEY.encode() not in words and listener.token.encode() not in words
        assert os.stat(f"/proc/{pid}/mem").st_uid == 0  # noqa: PTH116  nobody else reads or traces it
    ids = f"{privileges.UID}\t" * 4 if os.geteuid() == 0 else f"{os.geteuid()}\t" * 4
    assert status["Uid"] == ids.strip()
    assert status["NoNewPrivs"] == "1"
    assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
    if os.geteuid() == 0:
        assert (status["Gid"], status["Groups"], status["CapBnd"]) == (ids.strip(), "", "0" * 16)
    assert os.getsid(0) != pid == int(status["NSsid"].split()[-1])
    for name in ("Max core file size", "Max file size"):
        [line] = [line for line in limits.splitlines() if line.startswith(name)]
        assert line.split()[-3:-1] == ["0", "0"]


PARENT = """
import asyncio, os, signal, socket
from swarm.gateway import prices
from swarm.gateway.policy import Policy
from swarm.gateway.policy import Policy
from swarm.gateway.process import GatewayProcess
from swarm.ledger import Limit, Unbooked

async def main():
    gateway = GatewayProcess(ledger=Unbooked(), prices=prices.load(None), day=Limit())
    sock = socket.create_server(("127.0.0.1", 0))
    await gateway.open_proxy(Policy(open=True), sock=sock, address="127.0.0.1:1", record=print)
    os.kill(gateway.pid, signal.SIGSTOP)
    print(gateway.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_it_dies_with_its_engine() -> None:
    """Even if it can't hear that the engine is gone, since it is stopped."""
    engine = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, stdout=subprocess.PIPE)
    try:
        assert engine.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (line := await engine.stdout.readline()).strip().isdigit():  # the log comes before it
                assert line
        pid = int(line)
        started = process.start_time(pid)
        assert started is not None
    finally:
        engine.kill()
        await engine.wait()
    assert await process.gone(pid, started, timeout_seconds=120)


async def test_it_starts_when_it_is_needed(harness: Harness) -> None:
    assert harness.gateway.pid is None
    async with harness.listener(await harness.claim()):
        assert harness.gateway.pid is not None


async def test_killed_at_rest(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    """A new one serves the same listeners under the same tokens; the log has one line of it."""
    async with harness.listener(await harness.claim("a")) as a, harness.listener(await harness.claim("b")) as b:
        assert await call(a) == HAIKU
        assert [row[0] for row in await harness.booked(1)] == [200]  # which comes after the answer
        dead = pid_of(harness)
        os.kill(dead, signal.SIGKILL)
        assert set(await asyncio.gather(call(a), call(b))) == {HAIKU}
        assert pid_of(harness) != dead
        assert [row[0] for row in await harness.booked(3)] == [200] * 3
    assert capsys.readouterr().out.count("the gateway's process has ended") == 1


@pytest.mark.parametrize("streams", [True, False])
async def test_killed_in_the_middle_of_a_call(harness: Harness, streams: bool) -> None:
    """The client sees that the answer is incomplete; the books have what it may have cost, and no call for ever."""
    claim = await harness.claim(budget_usd=1)
    async with harness.listener(claim) as listener, client_of(listener) as client:
        if streams:
            with pytest.raises(Exception, match=r"(?i)peer closed|incomplete|connection|payload|disconnected"):
                async with client.messages.stream(**ask("words=1000 delay=0.02", max_tokens=2000)) as stream:
                    async for _ in stream.text_stream:
                        os.kill(pid_of(harness), signal.SIGKILL)
                        break
                    async for _ in stream.text_stream:
                        pass
        else:
            asked = asyncio.create_task(client.messages.create(**ask("scenario=hold", max_tokens=2000)))
            await asyncio.wait_for(harness.api.held.wait(), 60)
            os.kill(pid_of(harness), signal.SIGKILL)
            with pytest.raises(anthropic.APIConnectionError):
                await asked
            harness.api.release.set()
        [(status, tokens, cost, note)] = await harness.booked(1)
        assert (status, note) == (
            0,
            "estimated: the gateway's process gave no bill for the call: counted with all that it may have cost",
        )
        assert tokens > 2000 and cost >= 2000 * 5 / 1e6
        [event] = [e for e in await harness.store.events("t") if e.kind == "model_call"]
        assert event.data["estimated"] is True and event.data["output_tokens"] == 2000
        assert await call(listener) == HAIKU
        await harness.booked(2)
    assert harness.sql("SELECT 1 FROM model_calls WHERE status IS NULL") == []


async def test_killed_while_a_listener_closes(harness: Harness) -> None:
    async with harness.listener(await harness.claim()) as listener:
        asked = asyncio.create_task(call(listener, "scenario=hold"))
        await asyncio.wait_for(harness.api.held.wait(), 60)
        os.kill(pid_of(harness), signal.SIGSTOP)
        closing = asyncio.create_task(listener.close())
        await asyncio.sleep(0)
        os.kill(pid_of(harness), signal.SIGKILL)
        await asyncio.wait_for(closing, 60)
        with pytest.raises(anthropic.APIConnectionError):
            await asked
        harness.api.release.set()
    assert [row[0] for row in await harness.booked(1)] == [0]


async def test_stopped_it_stops_nobody_else(harness: Harness) -> None:
    """The engine goes on, its books too; an attempt that ends closes its listener in the kernel."""
    async with harness.listener(await harness.claim("a")) as a, harness.listener(await harness.claim("b")) as b:
        port = int(a.env["ANTHROPIC_BASE_URL"].rpartition(":")[2])
        pid = pid_of(harness)
        os.kill(pid, signal.SIGSTOP)
        try:
            asked = asyncio.create_task(call(b))
            await harness.claim("c")  # the database
            for _ in range(1000):  # the loop
                await asyncio.sleep(0)
            assert not asked.done()
            a.stop()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert await asked == HAIKU
        assert pid_of(harness) == pid


async def test_one_that_hangs_is_ended(harness: Harness) -> None:
    """So that no attempt waits for it: a new one takes over the others'."""
    harness.gateway._close_seconds = 0.2
    async with harness.listener(await harness.claim("a")) as a, harness.listener(await harness.claim("b")) as b:
        pid = pid_of(harness)
        started = process.start_time(pid)
        assert started is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.wait_for(a.close(), 60)
        harness.gateway._close_seconds = 30
        assert await process.gone(pid, started, timeout_seconds=120)
        assert await call(b) == HAIKU


async def test_the_proxy_is_in_it_too(harness: Harness) -> None:
    """What it refuses is recorded here, by a process that died and by the one that followed."""
    events: list[dict[str, Any]] = []
    sock = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{sock.getsockname()[1]}"
    policy = Policy(allow=("www.example.com",))
    proxy = await harness.gateway.open_proxy(
        policy, sock=sock, address=address, record=lambda _, data: events.append(dict(data))
    )
    try:
        async with aiohttp.ClientSession() as session:
            for count in (1, 2):
                async with session.get("http://127.0.0.1:1/", proxy=proxy.env["HTTP_PROXY"]) as answer:
                    assert answer.status == 403
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while len(events) < count:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                dead = pid_of(harness)
                os.kill(dead, signal.SIGKILL)
                await other_pid(harness, dead)
    finally:
        await proxy.close()
    assert [event["host"] for event in events] == ["127.0.0.1"] * 2


# --- what the engine takes from it --------------------------------------------------------------------------------

BILL = {
    "model": "m", "status": 200, "counts": {"input": 1}, "cost_usd": 0.1, "latency_ms": 1.0, "first_byte_ms": None,
    "streamed": False, "estimated": False, "note": "",
}  # fmt: skip
RESERVE = {
    "op": "reserve", "id": 1, "n": 1, "call": "0" * 32, "upstream": "u", "model": "m",
    "most": {"tokens": 1, "usd": None}, "least": {"tokens": 1, "usd": 0.1}, "counts": {"output": 1},
}  # fmt: skip


def test_what_it_may_say() -> None:
    for good in (RESERVE, {"op": "book", "id": 1, "n": 1, "call": "c", "bill": BILL}, {"op": "closed", "n": 1}):
        messages.ADAPTER.validate_python(good)
    for bad in (
        {}, {"op": "other"}, {"op": "closed"}, {"op": "closed", "n": "x"}, {"op": "closed", "n": 1, "more": 1},
        RESERVE | {"call": "../x"}, RESERVE | {"counts": {"other": 1}}, RESERVE | {"counts": {"input": -1}},
        RESERVE | {"most": {"tokens": 1, "usd": float("nan")}}, RESERVE | {"model": "m" * 5000},
        {"op": "book", "id": 1, "n": 1, "call": "c", "bill": BILL | {"cost_usd": -1.0}},
        {"op": "book", "id": 1, "n": 1, "call": "c", "bill": BILL | {"latency_ms": float("inf")}},
        {"op": "book", "id": 1, "n": 1, "call": "c", "bill": BILL | {"account": {"ticket_id": "other"}}},
        {"op": "event", "n": 1, "data": []}, {"op": "log", "level": "debug", "event": "x", "more": ""},
    ):  # fmt: skip
        with pytest.raises(pydantic.ValidationError):
            messages.ADAPTER.validate_python(bad)


@pytest.mark.parametrize(
    "said",
    [b"", b"{", b"[]", b"[" * 5000, b'{"x":[' + b"[]," * 5000 + b"1]}", b'{"x":[' + b"1," * 50_000 + b"1]}",
     b'{"x":"' + b"x" * (MAX_BYTES + 1) + b'"}', b"\xff"],
)  # fmt: skip
async def test_what_is_no_message_ends_the_link(said: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    ended = asyncio.Event()
    heard: list[dict[str, Any]] = []
    link = Link(ours, lambda message, _: heard.append(message), ended.set)
    with theirs:
        theirs.send(b'{"a":1}')
        theirs.send(said)
        await asyncio.wait_for(ended.wait(), 60)
    assert heard == [{"a": 1}] and link.closed


async def test_messages_to_one_that_does_not_listen_wait() -> None:
    """All of them, in order, with their descriptors, which are closed at the end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended: list[int] = []
    sending = Link(ours, lambda *_: None, lambda: ended.append(1))
    read, write = os.pipe()
    for number in range(2000):
        sending.send({"n": number, "x": "x" * 1000}, write if number % 500 == 0 else None)
    os.close(write)
    heard: list[int] = []
    done = asyncio.Event()

    def received(message: dict[str, Any], descriptor: int | None) -> None:
        heard.append(message["n"])
        if descriptor is not None:
            os.write(descriptor, b"%d\n" % message["n"])
            os.close(descriptor)
        if message["n"] == 1999:
            done.set()

    listening = Link(theirs, received, lambda: ended.append(2), descriptors=True)
    await asyncio.wait_for(done.wait(), 60)
    assert heard == list(range(2000))
    assert os.read(read, 100).split() == [b"0", b"500", b"1000", b"1500"]
    assert os.read(read, 100) == b""
    os.close(read)
    sending.close()
    listening.close()
    assert ended == []


async def test_an_end_that_takes_no_descriptors_ends_when_it_is_sent_one() -> None:
    """The gateway's process must not use up those of the engine."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended, heard = asyncio.Event(), list[object]()
    link = Link(ours, lambda *said: heard.append(said), ended.set)
    before = len(list(Path("/proc/self/fd").iterdir()))
    socket.send_fds(theirs, [b'{"op":"ready"}'], [0])
    await asyncio.wait_for(ended.wait(), 60)
    assert heard == [] and link.closed
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1
    theirs.close()


async def test_what_waits_for_one_that_reads_nothing_is_bounded() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended = asyncio.Event()
    link = Link(ours, lambda *_: None, ended.set)
    for number in range(50_000):
        link.send({"n": number})
    await asyncio.wait_for(ended.wait(), 60)
    theirs.close()


async def test_a_closed_listener_takes_no_more_calls(harness: Harness) -> None:
    """However many the process asks for: the end of a ticket waits for what is under way."""
    account = account_of(await harness.claim("flood"))
    sock = socket.create_server(("127.0.0.1", 0))
    server = await harness.gateway.open_listener(account, {}, sock=sock, url="", record=lambda *_: None)
    spend = {"tokens": 1, "usd": 0.0}
    harness.gateway._received({"op": "closed", "n": server.n})
    for number in range(100):
        call = {"call": f"{number:032x}", "upstream": "anthropic", "model": "m", "counts": {}}
        harness.gateway._received(
            {"op": "reserve", "id": 10**6 + number, "n": server.n, "most": spend, "least": spend, **call}
        )
    assert not server.tasks
    await asyncio.wait_for(server.close(), 60)


async def test_one_listener_with_too_many_calls_breaks_none_of_others(harness: Harness) -> None:
    claim = await harness.claim("many")
    async with harness.listener(claim) as many, harness.listener(await harness.claim("few")) as few:
        pid = pid_of(harness)
        order = Order(
            id="", account=account_of(claim), upstream="anthropic", model="m", counts={},
            most=Spend(tokens=1, usd=0.0), least=Spend(tokens=1, usd=0.0), day=Limit(),
        )  # fmt: skip
        many.calls |= {str(number): (order, 0.0) for number in range(1001)}
        with pytest.raises(anthropic.InternalServerError, match="try again"):
            await call(many)
        assert await call(few) == HAIKU
        many.calls.clear()
        assert await call(many) == HAIKU
        assert pid_of(harness) == pid


def test_half_of_a_character_is_no_text_for_the_engine() -> None:
    """A hostile service may put it into its answer: the bill of one call must not end those of others."""
    said = json.loads(encode({"op": "exceeded", "n": 1, "message": "an answer of m\ud800\U0001f600"}))
    assert messages.ADAPTER.validate_python(said).message == "an answer of m?\U0001f600"


async def test_a_policy_that_is_too_long_for_a_message(harness: Harness) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    names = tuple(f"{number}.example.com" for number in range(20_000))
    with pytest.raises(UsageError, match="too long for the gateway"):
        await harness.gateway.open_proxy(Policy(allow=names), sock=sock, address="127.0.0.1:1", record=print)
    assert sock.fileno() == -1
