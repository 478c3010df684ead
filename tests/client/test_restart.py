"""The server is killed and started again under a client that follows a ticket: each line comes once."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from swarm import config
from swarm.app import serve, wiring
from swarm.base.unix_socket import short_path
from swarm.client import AsyncSwarm, Swarm, Unreachable
from swarm.config import Settings
from swarm.model import Event, Ticket
from swarm.store.store import Store
from tests.api.served import ECHO
from tests.conftest import PATIENCE_SECONDS

# httpcore leaves it to Python to close a Unix socket that can't be connected.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning")
LINES = 400
PATIENCE = 600.0  # until a server is there again, on a slow machine


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[tuple[Settings, Store]]:
    settings = config.load(home=tmp_path / ("deep" * 40) / "home")  # too long a path for a socket
    settings.data_dir.mkdir(parents=True)
    async with wiring.store(settings) as store:
        await store.migrate()
        await store.put_agent(ECHO)
        await store.add_ticket(Ticket(id="t", title="t", state="ready", agent_id=ECHO.id, execution_mode="agent"))
        yield settings, store


@asynccontextmanager
async def server(settings: Settings) -> AsyncIterator[asyncio.subprocess.Process]:
    """`swarm serve` as a process of its own, once it serves; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "swarm.cli.main", "serve", "--port", "0", "--home", str(settings.home),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert b"http://" in await process.stdout.readline()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def prints(store: Store, first: int, last: int) -> None:
    """An agent prints these numbers, in pieces that end anywhere."""
    text = "".join(f"line {number}\n" for number in range(first, last))
    for at in range(0, len(text), 37):
        data = {"stream": "stdout", "text": text[at : at + 37]}
        await store.append([Event(ticket_id="t", kind="output", data=data, step_id="main", attempt_id=None)])


@asynccontextmanager
async def server_here(settings: Settings) -> AsyncIterator[None]:
    """In this process, where it starts at once; it ends its streams by itself."""
    async with serve.served(settings, host="127.0.0.1", port=0, remote=False):
        yield


async def test_every_line_comes_once(store: tuple[Settings, Store]) -> None:
    settings, opened = store
    seen: list[str] = []
    at = asyncio.Event()

    async def follow() -> None:
        async with AsyncSwarm(home=settings.home, retry_seconds=PATIENCE) as s:
            async for line in (await s.tickets.get("t")).output():
                seen.append(line.text)
                at.set()

    def follow_too() -> list[str]:
        with Swarm(home=settings.home, retry_seconds=PATIENCE) as s:
            return [str(line) for line in s.tickets.get("t").output()]

    async def until_seen(number: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(seen) < number:
                at.clear()
                await at.wait()

    async with server(settings) as first:
        tasks = [asyncio.create_task(follow()), asyncio.create_task(asyncio.to_thread(follow_too))]
        await prints(opened, 0, 100)
        await until_seen(50)
        first.kill()
        await first.wait()
    await prints(opened, 100, 200)
    async with server_here(settings):
        await until_seen(200)
        await prints(opened, 200, 300)
        await until_seen(250)
    await prints(opened, 300, LINES)
    async with server_here(settings):
        await until_seen(LINES)
        await opened.cancel("t", "test")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*tasks)
    assert seen == tasks[1].result() == [f"line {number}" for number in range(LINES)]


async def test_without_a_server(store: tuple[Settings, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = store
    for name in ("SWARM_URL", "SWARM_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWARM_HOME", str(settings.home))
    for kind in (Swarm, AsyncSwarm):
        with pytest.raises(Unreachable, match=r"`swarm serve` is not running.*api\.sock; start it, or set SWARM_URL"):
            kind()
    async with AsyncExitStack() as clients:
        async with server_here(settings):
            s = await clients.enter_async_context(AsyncSwarm(retry_seconds=0.2))
            other = clients.enter_context(Swarm(retry_seconds=0.2))  # has not asked yet
            assert [ticket.id async for ticket in s.tickets.list()] == ["t"]
        for _ in ("its socket is gone", "nobody listens there"):
            with pytest.raises(Unreachable, match="`swarm serve` is not running"):
                await asyncio.to_thread(other.tickets.get, "t")
            with pytest.raises(Unreachable, match="`swarm serve` is not running"):
                await s.tickets.get("t")
            with short_path(settings.api_socket) as path, socket.socket(socket.AF_UNIX) as one, suppress(OSError):
                one.bind(path)


async def test_the_directory_of_a_long_path_is_closed(store: tuple[Settings, Store]) -> None:
    settings, _ = store
    settings.api_socket.touch()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    Swarm(home=settings.home).close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
