"""A guest that lies about its programs, and hosts' frames that make no sense to an honest one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from swarm.channel import Channel, processes
from swarm.channel.processes import Order
from swarm.errors import ChannelError
from tests.channel import agentd_here
from tests.channel.test_hostile_guest import Answer, liar, ok, say
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.slow  # starts servers

END = {
    "code": 0, "signal": None, "timed_out": False, "oom": False, "cpu_ms": 1, "max_rss_kb": 1, "started_ns": 1,
    "ended_ns": 2, "dropped_bytes": 0,
}  # fmt: skip
LINE = {
    "process": "p", "argv": ["x"], "user": "agent", "pid": 1, "background": False, "pty": False, "attached": 0,
    "output_bytes": 0, "running": True, "started_ns": 1, "end": None,
}  # fmt: skip
Call = Callable[[Channel], Awaitable[object]]


def run(channel: Channel) -> Awaitable[object]:
    return processes.run(channel.converse, Order(argv=["x"]), limit_bytes=10)


async def write(channel: Channel) -> None:
    async with processes.start(channel.converse, Order(argv=["x"], open_stdin=True)) as process:
        await process.write(b"x" * 1_000_000)
        await process.exit()


async def attach(channel: Channel) -> None:
    async with processes.attach(channel.converse, "p") as process:
        await process.exit()


def listed(channel: Channel) -> Awaitable[object]:
    return processes.processes(channel.converse)


def freeze(channel: Channel) -> Awaitable[object]:
    return processes.freeze(channel.converse)


def signal(channel: Channel) -> Awaitable[object]:
    return processes.signal(channel.converse, "p", "TERM")


def start(id: int) -> bytes:
    return say(id, started_ns=1, pid=1, process="p")


def out(id: int, payload: bytes = b"x", **changes: object) -> bytes:
    return say(id, payload, **({"stream": "stdout", "offset": 1} | changes))


def lines(id: int, *said: object) -> list[bytes]:
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in said)
    return [say(id, text.encode(), stream="data"), ok(id, now_ns=5)]


LIES: dict[str, tuple[Call, Callable[[int], Answer]]] = {
    "closes": (run, lambda n: []),
    "no start": (run, lambda n: [ok(n, **END)]),
    "output before a start, and no start": (run, lambda n: [out(n), ok(n, **END)]),
    "two starts": (run, lambda n: [start(n), start(n), ok(n, **END)]),
    "a start without a pid": (run, lambda n: [say(n, started_ns=1), ok(n, **END)]),
    "foreign id": (run, lambda n: [start(n), out(n + 1)]),
    "foreign stream": (run, lambda n: [start(n), out(n, stream="swarm")]),
    "a stream of another type": (run, lambda n: [start(n), out(n, stream=["stdout"])]),
    "no offset": (run, lambda n: [start(n), say(n, b"x", stream="stdout")]),
    "a negative offset": (run, lambda n: [start(n), out(n, offset=-1)]),
    "empty output": (run, lambda n: [start(n), out(n, b"")]),
    "something else": (run, lambda n: [start(n), say(n, surprise=1)]),
    "two reports of what is gone": (run, lambda n: [start(n), say(n, dropped=1), say(n, dropped=1)]),
    "a refusal of another type": (run, lambda n: [start(n), say(n, refused=[1])]),
    "a long header": (run, lambda n: [start(n), out(n, x="y" * 2000)]),
    "an end of no kind": (run, lambda n: [start(n), ok(n, **(END | {"code": None}))]),
    "an end of both kinds": (run, lambda n: [start(n), ok(n, **(END | {"signal": 9}))]),
    "status 256": (run, lambda n: [start(n), ok(n, **(END | {"code": 256}))]),
    "signal 65": (run, lambda n: [start(n), ok(n, **(END | {"code": None, "signal": 65}))]),
    "a flag of another type": (run, lambda n: [start(n), ok(n, **(END | {"timed_out": "run"}))]),
    "an end without times": (run, lambda n: [start(n), ok(n, code=0)]),
    "takes what it did not get": (write, lambda n: [start(n), say(n, taken=1 << 40)]),
    "gives back": (write, lambda n: [start(n), say(n, taken=10), say(n, taken=9)]),
    "takes nothing and ends": (write, lambda n: [start(n), say(n, taken=-1)]),
    "attached to nothing": (attach, lambda n: [ok(n, **END)]),
    "a list of endless length": (listed, lambda n: [say(n, b"x" * (1 << 20), stream="data")] * 6),
    "a list in empty pieces": (listed, lambda n: [say(n, stream="data")] * 1000),
    "a list of many lines": (listed, lambda n: lines(n, *[LINE] * 1001)),
    "a list that is not JSON": (listed, lambda n: lines(n, "{\n")),
    "a list of lists": (listed, lambda n: lines(n, "[]\n")),
    "a line that is deep": (listed, lambda n: lines(n, "[" * 5000 + "\n")),
    "a line of many values": (listed, lambda n: lines(n, '{"x":[' + "1," * 5000 + "1]}\n")),
    "a long line": (listed, lambda n: lines(n, LINE | {"x": "y" * (65 << 10)})),
    "a line without a name": (listed, lambda n: lines(n, {})),
    "a process of no time": (listed, lambda n: lines(n, LINE | {"started_ns": "now"})),
    "arguments of another type": (listed, lambda n: lines(n, LINE | {"argv": [1]})),
    "an end in a list": (listed, lambda n: lines(n, LINE | {"end": {"code": 0}})),
    "a list without a time": (listed, lambda n: [ok(n)]),
    "frozen in parts": (freeze, lambda n: [say(n), ok(n)]),
    "ok as a number": (signal, lambda n: [say(n, ok=1)]),
}


@pytest.mark.parametrize(("call", "answer"), LIES.values(), ids=LIES.keys())
async def test_a_lie_is_a_channel_error(
    tmp_path_factory: pytest.TempPathFactory, call: Call, answer: Callable[[int], Answer]
) -> None:
    async with liar(tmp_path_factory.mktemp("l"), lambda head: answer(head["id"])) as channel:
        with pytest.raises(ChannelError) as caught:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await call(channel)
        assert len(str(caught.value)) < 2500
        assert str(caught.value).isprintable()


async def test_a_guest_that_does_not_keep_a_time_limit_is_not_waited_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async with liar(tmp_path_factory.mktemp("l"), lambda head: [start(head["id"])]) as channel:
        order = Order(argv=["x"], timeout_seconds=0.01)
        async with processes.start(channel.converse, order, grace_seconds=0.01) as process:
            with pytest.raises(ChannelError, match="its time was up, and the guest did not stop it"):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await process.exit()


async def test_what_a_guest_names_is_printable(tmp_path_factory: pytest.TempPathFactory) -> None:
    line = LINE | {"process": "\x1b[2J", "argv": ["\x07" * 9000], "user": "a\nb"}
    async with liar(tmp_path_factory.mktemp("l"), lambda head: lines(head["id"], line)) as channel:
        (one,) = await processes.processes(channel.converse)
    assert all(text.isprintable() and len(text) < 400 for text in (one.process, one.user, *one.argv))


async def test_a_flood_waits_in_the_guest(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What nobody reads here is not kept here, beyond a few megabytes."""
    sent = 0

    def answer(head: dict[str, object]) -> Answer:
        nonlocal sent
        sent += 1
        return [start(2), *[out(2, b"x" * (1 << 16), offset=1)] * 2000]

    async with (
        liar(tmp_path_factory.mktemp("l"), answer) as channel,
        processes.start(channel.converse, Order(argv=["x"])) as process,
    ):
        assert (await anext(aiter(process)))[1] == b"x" * (1 << 16)
        for _ in range(200):
            await asyncio.sleep(0)
        assert process._parts.qsize() <= 32
    assert sent == 1


Said = tuple[str, int, dict[str, object], bytes]
NONSENSE: dict[str, tuple[list[Said], str]] = {
    "another request": ([("hello", 7, {}, b"")], "closed"),
    "a second program": ([("exec", 2, {}, b"")], "does not belong"),
    "more than its window": ([("stdin", 2, {}, b"x" * (1 << 20))] * 3, "closed"),
    "a signal of no name": ([("signal", 2, {}, b"")], "must be text"),
    "a size that is none": ([("resize", 2, {"size": [1]}, b"")], "columns"),
    "two ends of its input": ([("stdin", 2, {}, b"")] * 2, "ok"),
    "a signal with a name": ([("signal", 2, {"signal": "HUP"}, b"")], "ok"),
}


async def test_a_host_that_makes_no_sense_loses_its_connection_only(tmp_path: Path) -> None:
    script = "read x; exit 3"
    async with agentd_here.running(tmp_path) as guest:
        for number, (what, (nonsense, outcome)) in enumerate(NONSENSE.items()):
            order: dict[str, Any] = {"argv": ["/bin/sh", "-c", script], "env": {}, "user": "agent", "stdin": True}
            order["pty"] = [80, 24] if "size" in what else None
            async with agentd_here.raw(guest.vm.endpoint.unix) as connection:
                connection.hello()
                await connection.hear()
                connection.say("exec", id=2, process=f"p{number}", **order)
                assert (await connection.hear()).number("pid")
                for op, id, fields, payload in nonsense:
                    connection.say(op, payload, id=id, **fields)
                said = ""
                try:
                    while outcome not in said:
                        frame = await connection.hear()
                        said = "ok" if frame.head.get("ok") else str(frame.head.get("refused"))
                except ChannelError:
                    said = "closed"
            assert outcome in said, what
        while any(one.ended is None for one in await processes.processes(guest.channel.converse)):
            pass
        assert len(await processes.processes(guest.channel.converse)) == len(NONSENSE)
