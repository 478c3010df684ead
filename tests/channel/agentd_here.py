"""A real agentd on this host (driver `process`), for tests."""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from swarm.channel import Channel, Exit, Identity, frames
from swarm.channel.proof import HOST, new_nonce, proof
from swarm.errors import ChannelError
from swarm.vm.driver import Image, VmSpec
from swarm.vm.drivers.process import ProcessDriver, ProcessVm

TOKEN = b"t" * 16
_NOTHING = Path(os.devnull)
SPEC = VmSpec(
    image=Image(
        digest="", dir=_NOTHING, kernel=_NOTHING, kernel_elf=_NOTHING, root=_NOTHING, initramfs=None, boot_args=""
    )
)


def identity(**changes: object) -> Identity:
    values: dict[str, object] = {
        "generation": "g1",
        "seed": b"",
        "hostname": "someone-else",
        "machine_id": "0" * 32,
        "ssh_host_key": "",
        "authorized_keys": "",
        "token": TOKEN,
    }
    return Identity(**(values | changes))  # type: ignore[arg-type]


class Guest:
    """An agentd and an open channel to it."""

    def __init__(self, vm: ProcessVm, channel: Channel, dir: Path) -> None:
        self.vm = vm
        self.channel = channel
        self.work = dir / "root" / "work"
        self.agent = dir / "root" / "agent"
        self.output: dict[str, bytes] = {"stdout": b"", "stderr": b"", "swarm": b""}

    def hear(self, stream: str, data: bytes) -> None:
        self.output[stream] += data

    async def python(self, source: str, *arguments: str, timeout_seconds: float = 60, **options: object) -> Exit:
        """Run Python source warm; what it prints is added to ``output``."""
        await self.channel.put({"main.py": source.encode()}, dest="/agent", owner="root")
        argv = ["/agent/main.py", *arguments]
        run = self.channel.run
        return await run(argv, warm=True, timeout_seconds=timeout_seconds, on_output=self.hear, **options)  # type: ignore[arg-type]

    async def sh(self, script: str, *, timeout_seconds: float = 60, **options: object) -> Exit:
        argv = ["/bin/sh", "-c", script]
        return await self.channel.run(argv, timeout_seconds=timeout_seconds, on_output=self.hear, **options)  # type: ignore[arg-type]

    @asynccontextmanager
    async def another(self, token: bytes = TOKEN) -> AsyncIterator[Channel]:
        async with Channel.connect(self.vm.endpoint, token=token, timeout_seconds=60) as channel:
            yield channel


@asynccontextmanager
async def running(dir: Path) -> AsyncIterator[Guest]:
    vm = await ProcessDriver().boot(SPEC, None, dir)
    try:
        async with Channel.connect(vm.endpoint, token=TOKEN, timeout_seconds=60) as channel:
            await channel.renew(identity())
            yield Guest(vm, channel, dir)
    finally:
        await vm.kill()


class Raw:
    """A connection that says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, op: str, payload: bytes = b"", *, id: int = 1, **fields: object) -> None:
        self.writer.write(frames.encode({"id": id, "op": op, **fields}, payload))

    def hello(self, *, id: int = 1) -> None:
        nonce = new_nonce()
        self.say("hello", id=id, nonce=nonce, proof=proof(TOKEN, HOST, nonce))

    async def hear(self) -> frames.Frame:
        return await frames.read(self.reader)


@asynccontextmanager
async def raw(socket: Path | None) -> AsyncIterator[Raw]:
    assert socket
    reader, writer = await asyncio.open_unix_connection(socket)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def serving(
    path: Path, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncIterator[None]:
    """A server whose connections have all ended when the block has."""
    busy: set[asyncio.Task[object]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        busy.add(task)
        try:
            await serve(reader, writer)
        except (ChannelError, ConnectionError):
            pass  # the client closed
        finally:
            writer.transport.abort()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async with await asyncio.start_unix_server(handle, path):
        yield
    await asyncio.gather(*busy)


def frame(head: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", len(head), len(payload)) + head + payload


def token() -> bytes:
    return secrets.token_bytes(16)
