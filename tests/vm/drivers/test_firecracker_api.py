"""The API client against servers that are not Firecracker: what a VMM that was taken over might answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm.errors import BootFailed
from swarm.vm.drivers.firecracker_api import Api, Refused


@contextlib.asynccontextmanager
async def answering(path: Path, *answers: bytes, hang: bool = False) -> AsyncIterator[list[bytes]]:
    """A server on a Unix socket that sends these answers in order, whatever the requests. Yields the requests."""
    seen: list[bytes] = []
    left = list(answers)
    held = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:")), 0)
                seen.append(head + await reader.readexactly(length))
                if hang:
                    await held.wait()
                if left:
                    writer.write(left.pop(0))
                    await writer.drain()
                if not left:
                    break
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield seen
    finally:
        held.set()
        server.close()


def http(status: str, body: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


async def test_what_is_sent(tmp_path: Path) -> None:
    socket = tmp_path / "api.sock"
    async with (
        answering(socket, http("200 OK", b'{"id": "vm1"}'), http("204 No Content"), http("204 No Content")) as seen,
        contextlib.aclosing(Api(socket)) as api,
    ):
        assert api.listener() == (os.getpid(), os.getuid())
        assert await api.get("/") == {"id": "vm1"}
        assert await api.put("/actions", action_type="InstanceStart") is None
        assert await api.patch("/vm", state="Paused") is None
    get, put, patch = seen
    assert get.startswith(b"GET / HTTP/1.1\r\n")
    assert get.endswith(b"\r\n\r\n"), "Firecracker refuses a GET with a body"
    assert put.startswith(b"PUT /actions ")
    assert put.endswith(b'{"action_type":"InstanceStart"}')
    assert b"application/json" in put
    assert patch.startswith(b"PATCH /vm ")


async def test_a_path_longer_than_a_sockets_name(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    fd = os.open(deep, os.O_PATH)
    try:
        near = Path(f"/proc/self/fd/{fd}/api.sock")
        async with answering(near, http("200 OK", b"{}")), contextlib.aclosing(Api(deep / "api.sock")) as api:
            assert await api.get("/") == {}
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (http("400 Bad Request", b'{"fault_message": "The vCPU number is invalid!"}'), "The vCPU number is invalid!"),
        (http("400 Bad Request", b"not JSON"), "not JSON"),
        (http("500 Oh", b'["fault_message"]'), '["fault_message"]'),
        (http("400 Bad Request"), ""),
        (http("400 Bad Request", b'{"fault_message": "' + b"x" * 5000 + b'"}'), "x" * 1000),
    ],
)
async def test_a_refusal_says_why(tmp_path: Path, answer: bytes, fault: str) -> None:
    async with answering(tmp_path / "s", answer), contextlib.aclosing(Api(tmp_path / "s")) as api:
        with pytest.raises(Refused) as caught:
            await api.put("/machine-config", vcpu_count=0)
    assert caught.value.fault == fault
    assert str(caught.value) == f"Firecracker refused PUT /machine-config: {fault}"
    assert not caught.value.retryable


async def test_an_answer_without_an_end(tmp_path: Path) -> None:
    flood = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 65536 + b"\r\n"
    async with (
        answering(tmp_path / "s", flood + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 40),
        contextlib.aclosing(Api(tmp_path / "s")) as api,
    ):
        with pytest.raises(BootFailed, match="is longer than 256 KiB"):
            await api.get("/")


async def test_no_answer(tmp_path: Path) -> None:
    async with answering(tmp_path / "s", hang=True), contextlib.aclosing(Api(tmp_path / "s")) as api:
        with pytest.raises(BootFailed, match=r"did not answer PUT /snapshot/create within 0\.1 s"):
            await api.put("/snapshot/create", timeout_seconds=0.1)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"])
async def test_broken_answers(tmp_path: Path, answer: bytes) -> None:
    async with (
        answering(tmp_path / "s", *([answer] if answer else [])),
        contextlib.aclosing(Api(tmp_path / "s")) as api,
    ):
        with pytest.raises(BootFailed, match="connection to Firecracker failed at GET /"):
            await api.get("/")


async def test_nobody_there(tmp_path: Path) -> None:
    async with contextlib.aclosing(Api(tmp_path / "s")) as api:
        with pytest.raises(FileNotFoundError):
            api.listener()
        with pytest.raises(BootFailed, match="connection to Firecracker failed"):
            await api.get("/")
        await api.aclose()
        await api.aclose()
