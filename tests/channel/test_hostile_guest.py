"""A guest that lies: a server which answers each request with frames of the test's choice."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from swarm.channel import Channel, frames
from swarm.channel.client import PROTOCOL
from swarm.channel.dial import Endpoint
from swarm.channel.proof import GUEST, proof
from swarm.errors import AgentTimeout, ChannelError
from tests.channel.agentd_here import TOKEN, frame, identity, serving
from tests.conftest import PATIENCE_SECONDS

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

STATE = {
    "boot_id": "b", "generation": "g1", "crng_ready": True, "sshd": False, "hostname": "h", "machine_id": "m",
    "clock_ns": 1,
}  # fmt: skip
HELLO = {
    **STATE, "protocol": PROTOCOL, "mode": "vm", "python": "3", "kernel": "6", "preload_failed": {}, "uptime_ms": 1,
}  # fmt: skip
EXIT = {
    "code": 0, "signal": None, "oom": False, "cpu_ms": 1, "max_rss_kb": 1, "stdout_bytes": 0, "stderr_bytes": 0,
    "dropped_bytes": 0, "received_ns": 1, "started_ns": 1, "ended_ns": 1, "clean": True, "out": False,
    "timed_out": None,
}  # fmt: skip
Answer = list[bytes]


def ok(id: int, **fields: object) -> bytes:
    return frames.encode({"id": id, "ok": True, **fields})


def hello(head: Mapping[str, Any], **changes: object) -> bytes:
    """An honest answer to a hello."""
    return ok(head["id"], proof=proof(TOKEN, GUEST, head["nonce"]), **(HELLO | changes))


def say(id: int, payload: bytes = b"", **fields: object) -> bytes:
    return frames.encode({"id": id, **fields}, payload)


@asynccontextmanager
async def liar(
    dir: Path,
    answer: Callable[[dict[str, Any]], Answer | None],
    *,
    io_timeout_seconds: float = 600.0,
) -> AsyncIterator[Channel]:
    """A channel to a server that answers hello honestly and then with the given frames; None: not at all."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said: Answer | None = None
        while said != []:
            head: dict[str, Any] = dict((await frames.read(reader)).head)
            said = [hello(head)] if head["op"] == "hello" else answer(head)
            for part in said or []:
                writer.write(part)
            await writer.drain()

    async with serving(dir / "s", serve):
        endpoint = Endpoint(unix=dir / "s")
        async with Channel.connect(
            endpoint, token=TOKEN, timeout_seconds=60, io_timeout_seconds=io_timeout_seconds
        ) as channel:
            yield channel


Call = Callable[[Channel], Awaitable[object]]


def run(channel: Channel) -> Awaitable[object]:
    return channel.run(["x"], timeout_seconds=600, max_output_bytes=10)


def get(channel: Channel) -> Awaitable[object]:
    return channel.get("/work/x", limit_bytes=10)


def renew(channel: Channel) -> Awaitable[object]:
    return channel.renew(identity())


async def tree(channel: Channel) -> object:
    with tempfile.TemporaryFile() as spool:
        return await channel.get_tree("/work/out", limit_bytes=10, limit_entries=10, spool=cast("BinaryIO", spool))


def put(channel: Channel) -> Awaitable[object]:
    return channel.put({"x": b""}, dest="/work")


HOSTILE: dict[str, tuple[Call, Callable[[int], Answer]]] = {
    "closes": (run, lambda n: []),
    "garbage": (run, lambda n: [b"\x00\x00\x00\x02\x00\x00\x00\x00{}" * 3]),
    "huge header": (run, lambda n: [b"\xff" * 8]),
    "huge payload": (run, lambda n: [b"\x00\x00\x00\x02\xff\xff\xff\xff{}"]),
    "deep json": (run, lambda n: [frame(b"[" * 60_000)]),
    "foreign id": (run, lambda n: [ok(n + 1, **EXIT)]),
    "late answer": (put, lambda n: [ok(n - 1), ok(n)]),
    "id as text": (put, lambda n: [frame(b'{"id":"2","ok":true}')]),
    "ok as text": (put, lambda n: [say(n, ok="yes")]),
    "exit without start": (run, lambda n: [ok(n, **EXIT)]),
    "two starts": (run, lambda n: [say(n, started_ns=1), say(n, started_ns=1), ok(n, **EXIT)]),
    "two truncations": (run, lambda n: [say(n, truncated=True)] * 2),
    "too much output": (run, lambda n: [say(n, started_ns=1), say(n, b"x" * 11, stream="stdout")]),
    "too much in pieces": (run, lambda n: [say(n, b"x", stream="stderr")] * 11),
    "long headers": (run, lambda n: [say(n, b"x", stream="stdout", x=[[]] * 600)]),
    "endless empty output": (run, lambda n: [say(n, stream="stdout")] * 1000),
    "foreign stream": (run, lambda n: [say(n, b"x", stream="swarm")]),
    "stream is a list": (run, lambda n: [say(n, b"x", stream=["stdout"])]),
    "code and signal": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"signal": 9}))]),
    "neither": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"code": None}))]),
    "code 256": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"code": 256}))]),
    "signal 65": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"code": None, "signal": 65}))]),
    "negative": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"cpu_ms": -1}))]),
    "too large a number": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"cpu_ms": 1 << 63}))]),
    "infinity": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"cpu_ms": float("inf")}))]),
    "number for a flag": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"oom": 0}))]),
    "error of another shape": (put, lambda n: [say(n, error=[1])]),
    "error of many words": (put, lambda n: [say(n, error={"type": "\x1b[2J", "message": "x\n\x07" * 4000})]),
    "more than asked for": (get, lambda n: [say(n, b"x" * 11, stream="data")]),
    "more in pieces": (get, lambda n: [say(n, b"x", stream="data")] * 11),
    "wrong size": (get, lambda n: [say(n, b"x", stream="data"), ok(n, found=True, too_large=False, size=2)]),
    "empty data": (get, lambda n: [say(n, stream="data")] * 1000),
    "found is a text": (get, lambda n: [ok(n, found="yes")]),
    "more of a directory": (tree, lambda n: [say(n, b"x" * (1 << 20), stream="data")] * 4),
    "a directory in empty pieces": (tree, lambda n: [say(n, stream="data")] * 1000),
    "foreign stream of a directory": (tree, lambda n: [say(n, b"x", stream="stdout")]),
    "complete is a text": (tree, lambda n: [ok(n, found=True, complete="yes")]),
    "out is a text": (run, lambda n: [say(n, started_ns=1), ok(n, **(EXIT | {"out": "yes"}))]),
    "other generation": (renew, lambda n: [ok(n, **(STATE | {"generation": "old"}), done=[], skipped=[])]),
    "done is not a list": (renew, lambda n: [ok(n, **STATE, done="all", skipped=[])]),
}


@pytest.mark.parametrize(("call", "answer"), HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_lie_is_a_channel_error(
    tmp_path_factory: pytest.TempPathFactory, call: Call, answer: Callable[[int], Answer]
) -> None:
    async with liar(tmp_path_factory.mktemp("l"), lambda head: answer(head["id"])) as channel:
        with pytest.raises(ChannelError) as caught:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await call(channel)
        assert len(str(caught.value)) < 2500
        assert str(caught.value).isprintable()


# What takes long to parse, long to free, or much memory, in 64 KiB.
BOMBS = {
    "lists": b'"x":[' + b"[]," * 20_000 + b"[]]",
    "deep lists": b'"x":[' + (b"[" * 900 + b"]" * 900 + b",") * 30 + b"1]",
    "objects": b'"x":[' + b"{}," * 20_000 + b"{}]",
    "names": b",".join(b'"%x":1' % n for n in range(6000)),
    "numbers": b'"x":[' + b"1.5e9," * 10_000 + b"1]",
    "after a text": b'"y":"",' + b'"x":[' + b"1," * 30_000 + b"1]",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
@pytest.mark.parametrize("kind", [b'"stream":"stdout"', b'"ok":true', b'"error":{}'])
async def test_a_header_that_is_work_to_parse_is_not_parsed(
    tmp_path_factory: pytest.TempPathFactory, kind: bytes, bomb: bytes
) -> None:
    def answer(head: dict[str, Any]) -> Answer:
        return [say(head["id"], started_ns=1), frame(b'{"id":%d,%s,%s}' % (head["id"], kind, bomb), b"x")]

    async with liar(tmp_path_factory.mktemp("l"), answer) as channel:
        with pytest.raises(ChannelError, match="a header of too many values"):
            await run(channel)


async def test_long_headers_of_short_frames(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One byte of output each: they would cost the host a thousand times what its limit on output allows."""
    async with liar(
        tmp_path_factory.mktemp("l"), lambda head: [say(head["id"], b"x", stream="stdout", x="y" * 2000)]
    ) as channel:
        with pytest.raises(ChannelError, match=r"a header of 20\d\d bytes in the middle of run"):
            await run(channel)


async def test_thousands_of_frames_at_once_leave_others_their_turns(tmp_path_factory: pytest.TempPathFactory) -> None:
    turns, frames_of_turn = 0, Counter[int]()

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def answer(head: dict[str, Any]) -> Answer:
        return [b"".join([say(head["id"], started_ns=1), *[say(head["id"], b"x", stream="stdout")] * 3000])]

    beside = asyncio.create_task(others())
    async with liar(tmp_path_factory.mktemp("l"), answer) as channel:
        with pytest.raises(ChannelError, match=r"closed|more than the limit"):
            await channel.run(
                ["x"], timeout_seconds=60, max_output_bytes=2999, on_output=lambda *_: frames_of_turn.update([turns])
            )
    beside.cancel()
    assert frames_of_turn.total() == 2999
    assert max(frames_of_turn.values()) <= 64


async def test_frames_that_nobody_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with liar(tmp_path_factory.mktemp("l"), lambda head: [ok(head["id"])] * 2) as channel:
        await put(channel)
        with pytest.raises(ChannelError, match="the guest's reply does not belong to this put request"):
            await put(channel)
        with pytest.raises(ChannelError, match="can't be used any more: the guest's reply does not belong to this"):
            await put(channel)


@pytest.mark.parametrize("call", [put, get, renew])
async def test_silence_ends_in_time(tmp_path_factory: pytest.TempPathFactory, call: Call) -> None:
    async with liar(tmp_path_factory.mktemp("l"), lambda head: None, io_timeout_seconds=0.05) as channel:
        with pytest.raises(ChannelError, match=r"within 0\.05"):
            await call(channel)


async def test_a_guest_that_takes_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """It accepts, and reads no more: 200 MiB can't be sent."""
    path = tmp_path_factory.mktemp("l") / "s"
    stop = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(hello((await frames.read(reader)).head))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await stop.wait()

    async with (
        serving(path, serve),
        Channel.connect(Endpoint(unix=path), token=TOKEN, timeout_seconds=60, io_timeout_seconds=0.05) as channel,
    ):
        with pytest.raises(ChannelError, match=r"did not take put within [45]\.05 s"):
            await channel.put({"x": bytes(5 << 20)}, dest="/work")
        stop.set()


async def test_a_guest_that_never_ends_its_agent(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """The host's own timer, 25 s behind the guest's, is the last word."""
    async with liar(tmp_path_factory.mktemp("l"), lambda head: [say(head["id"], started_ns=1)]) as channel:
        with pytest.raises(AgentTimeout, match="the guest did not stop it"):
            await channel.run(["x"], timeout_seconds=-24.9)  # 0.1 s from now
        with pytest.raises(ChannelError, match="can't be used any more"):
            await channel.run(["x"], timeout_seconds=1)


async def test_another_protocol_version_is_said_so(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(hello((await frames.read(reader)).head, protocol=PROTOCOL + 1))
        await reader.read()

    async with serving(tmp_path / "s", serve):
        with pytest.raises(ChannelError, match="rebuild the image"):
            async with Channel.connect(Endpoint(unix=tmp_path / "s"), token=TOKEN, timeout_seconds=60):
                pass


@pytest.mark.parametrize("echoes", [False, True])
async def test_a_stranger_learns_no_token_and_gets_no_secret(echoes: bool) -> None:
    """A host that answers in a VM's place; it may send back what it was sent."""
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await frames.read(reader)).head
        heard.extend(repr(head).encode())
        writer.write(ok(1, **HELLO, proof=head["proof"] if echoes else "0" * 64))
        heard.extend(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ChannelError, match="does not know its token") as caught:
            endpoint = Endpoint(host="127.0.0.1", port=port)
            async with Channel.connect(endpoint, token=TOKEN, timeout_seconds=60) as channel:
                await channel.renew(identity())
    assert not caught.value.retryable
    assert b"nonce" in heard
    assert TOKEN not in heard and TOKEN.hex().encode() not in heard


async def test_half_dead_connections_are_tried_again(tmp_path: Path) -> None:
    """A clone may wake up inside its template's connection and reset the next ones."""
    tries = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            return
        writer.write(hello((await frames.read(reader)).head))
        await reader.read()

    async with (
        serving(tmp_path / "s", serve),
        Channel.connect(Endpoint(unix=tmp_path / "s"), token=TOKEN, timeout_seconds=60) as channel,
    ):
        assert channel.greeting.mode == "vm"
    assert tries >= 4  # while one is slow, the next has begun


async def test_a_listener_that_never_answers(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(tmp_path / "s", serve):
        with pytest.raises(ChannelError, match=r"did not answer in 0\.1 s"):
            async with Channel.connect(Endpoint(unix=tmp_path / "s"), token=TOKEN, timeout_seconds=0.1):
                pass
