"""Stand-ins for guests: a VM's network can be tested without a VM.

A `Guest` is a namespace with a tap of its own, and a pump that carries frames between it and a slot's ``tap0``, as a
VMM would. So behind the slot there is a whole Linux, with the address and MAC of a real guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

from swarm.base import process
from swarm.vm.driver import GUEST_ADDRESS, GUEST_GATEWAY, GUEST_MAC, TAP_MAC, TAP_NAME, Slot
from swarm.vm.network import netns

T = TypeVar("T")

_LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534


class Guest:
    """What a VM would be behind ``slot``: listens, connects, and can write any frame (`send`)."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    async def __aenter__(self) -> Self:
        await netns.in_thread(self._attach)
        await netns.in_thread(self._make)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._outer, self._carry, self._outer, self._inner)
        loop.add_reader(self._inner, self._carry, self._inner, self._outer)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._outer, self._inner):
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        os.close(self._space)

    @contextlib.asynccontextmanager
    async def listening(self, port: int, greeting: bytes = b"hello") -> AsyncIterator[None]:
        """A server that greets, and then sends back what it gets."""
        sock = await self._inside(lambda: socket.create_server((str(GUEST_ADDRESS), port)))
        open_: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(echo(greeting, open_), sock=sock)
        try:
            yield
        finally:
            server.close()
            for writer in open_:
                if not writer.is_closing():
                    writer.transport.abort()

    async def reaches(self, host: str, port: int, *, seconds: float = 0.4) -> bool:
        """Can the guest open a connection there? (The rules drop frames, so no answer means no. Who expects one gives
        it more time.)"""
        sock = await self._inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        with sock:
            sock.setblocking(False)
            try:
                async with asyncio.timeout(seconds):
                    await asyncio.get_running_loop().sock_connect(sock, (host, port))
            except (TimeoutError, OSError):
                return False
            return True

    def send(self, frame: bytes) -> None:
        os.write(self._outer, frame)

    async def _inside(self, work: Callable[[], T]) -> T:
        def enter() -> T:
            _LIBC.setns(self._space, 0x40000000)
            return work()

        return await netns.in_thread(enter)

    def _attach(self) -> None:
        netns.enter(self.slot.netns)
        self._outer = open_tap(TAP_NAME)
        with netns.netlink() as here:
            netns.await_up(here, socket.if_nametoindex(TAP_NAME))

    def _make(self) -> None:
        if _LIBC.unshare(0x40000000) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        self._space = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._inner = open_tap("eth0")
        with netns.netlink() as here:
            index = socket.if_nametoindex("eth0")
            netns.sysctl("ipv6/conf/all/disable_ipv6", "1")
            here.link("set", index=index, address=GUEST_MAC, state="up")
            here.link("set", index=1, state="up")
            here.addr("add", index=index, address=str(GUEST_ADDRESS), prefixlen=30)
            here.neigh("add", ifindex=index, dst=str(GUEST_GATEWAY), lladdr=TAP_MAC, state="permanent")
            here.route("add", dst="0.0.0.0/0", gateway=str(GUEST_GATEWAY))

    @staticmethod
    def _carry(source: int, target: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(target, os.read(source, 65536))


def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000))  # TUNSETIFF, TAP | NO_PI
    return fd


def echo(
    greeting: bytes, connections: set[asyncio.StreamWriter] | None = None
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if connections is not None:
            connections.add(writer)
        with contextlib.suppress(ConnectionError):
            writer.write(greeting)
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

    return serve


async def talk(host: object, port: int, data: bytes = b"", *, seconds: float = 60.0) -> bytes:
    """Connect, send, close our half, and return all that comes back."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(str(host), port)
        try:
            writer.write(data)
            writer.write_eof()
            return await reader.read()
        finally:
            writer.close()


async def pings(host: object) -> bool:
    return (await process.run(["ping", "-n", "-c1", "-W30", str(host)], check=False)).returncode == 0


async def connect_as(uid: int, host: object, port: int) -> None:
    """Connect as another user would. (Each thread has its own file-system uid, and a socket belongs to that.)"""

    def connect() -> None:
        _LIBC.setfsuid(uid)
        socket.create_connection((str(host), port), timeout=60).close()

    await netns.in_thread(connect)


async def ip(*argv: str) -> str:
    return (await process.run(["ip", *argv])).stdout.decode()


async def nft(rules: str, inside: str | None = None) -> str:
    return (await process.run(["nft", "-f", "-"], input=rules.encode(), netns=inside)).stdout.decode()


async def host_state() -> dict[str, str]:
    """Everything that Swarm's network could leave on a host."""
    seen = {
        "links": await ip("-o", "link", "show"),
        "netns": await ip("netns", "list"),
        "routes": await ip("route", "show", "table", "all"),
        # Only what Swarm makes. The kernel adds INCOMPLETE ones by itself while an orphaned socket of an earlier guest
        # still sends its FIN.
        "neighbours": await ip("neigh", "show", "nud", "permanent"),
        "nft": (await process.run(["nft", "list", "ruleset"])).stdout.decode(),
    }
    # Flags and "linkdown" show whether there is a carrier, which the kernel notices with a delay.
    seen["links"] = "\n".join(line.partition(" <")[0] for line in seen["links"].splitlines())
    seen["routes"] = seen["routes"].replace("linkdown", "")
    return {
        what: text if what == "nft" else "\n".join(sorted(line.strip() for line in text.splitlines()))
        for what, text in seen.items()
    }
