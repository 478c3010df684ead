"""Connect to a guest that may still be booting."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TRY_SECONDS: Final = 1.0  # a lost SYN is resent only after 1 s; by then newer tries have started
_FIRST_PAUSE, LAST_PAUSE = 0.005, 0.050
_PATIENCE: Final = 0.25
# The host may have a firewall that remembers connections and lets only answers in. If it forgets ours (`conntrack -F`,
# a reload, its timeout), what the guest sends is dropped until the host sends something: so it does after 5 s. No
# answer ends a connection only after 127 tries, ten minutes: a network that is being mended must not end a ticket.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 127))

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a VM's agentd listens: TCP as seen from the host, or a Unix socket (driver `process`).

    ``interface``: the only one by which packets may leave. Routes choose it otherwise, and a VPN may add one, so that a
    foreign host with the VM's address would answer.
    """

    host: str = ""
    port: int = 0
    interface: str = ""
    unix: Path | None = None


async def dial(endpoint: Endpoint, trouble: list[str], *, listening: bool = False) -> Streams:
    """Connect, however long it takes; ``trouble[0]`` says why it has not worked yet.

    ``listening``: agentd is already running, as in a clone, and every unnecessary try would cost it time.

    While a guest boots, a SYN may be refused, lost, or held in the tap until the guest's driver is loaded. So a new try
    starts every few milliseconds while older ones still wait, and the first to succeed is used. A guest that boots for
    minutes may need seconds to answer, so tries become rarer and longer; otherwise they would take all its time.
    """
    loop = asyncio.get_running_loop()
    tries: set[asyncio.Task[Streams]] = set()
    began = loop.time()
    next_try, pause = began, _PATIENCE if listening else _FIRST_PAUSE
    won = None
    try:
        while True:
            if loop.time() >= next_try:
                waited = loop.time() - began
                tries.add(asyncio.create_task(_try(endpoint, max(_TRY_SECONDS, waited / 20))))
                next_try = loop.time() + pause
                pause = pause if listening else min(pause * 1.5, max(LAST_PAUSE, waited / 100))
            patience = max(0.0, next_try - loop.time())
            if not tries:
                await asyncio.sleep(patience)
                continue
            done, tries = await asyncio.wait(tries, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if won is None and task.exception() is None:
                    won = task.result()
                elif task.exception() is None:
                    tries.add(task)  # a second connection: closed below
                else:
                    trouble[0] = str(task.exception()) or "no answer yet"
            if won:
                return won
    finally:
        for task in tries:
            task.cancel()
        for result in await asyncio.gather(*tries, return_exceptions=True):
            if isinstance(result, tuple):
                result[1].transport.abort()


async def _try(endpoint: Endpoint, seconds: float) -> Streams:
    async with asyncio.timeout(seconds):
        if endpoint.unix:
            return await asyncio.open_unix_connection(endpoint.unix)
        reader, writer = await asyncio.open_connection(sock=await _connected(endpoint))
    # Close by a reset, so that no old connection remains in a guest that becomes a template.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return reader, writer


async def _connected(endpoint: Endpoint) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if endpoint.interface:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, endpoint.interface.encode())
        await asyncio.get_running_loop().sock_connect(sock, (endpoint.host, endpoint.port))
    except BaseException:
        sock.close()
        raise
    return sock
