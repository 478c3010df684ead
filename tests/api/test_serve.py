"""`swarm serve` as a process: where it is, how a browser gets in, how it ends, what it leaves."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from swarm import config
from swarm.api import server as api_server
from swarm.app import address, wiring
from swarm.base import unix_socket
from swarm.cli import serve as serve_command
from swarm.config import Settings
from swarm.errors import UsageError
from swarm.model import Event, Role, Ticket
from swarm.store.registry.tokens import Actor, new_token
from tests.api.served import ECHO
from tests.conftest import PATIENCE_SECONDS


@asynccontextmanager
async def server(settings: Settings) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "swarm.cli.main", "serve", "--port=0", "--home", str(settings.home),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield (await process.stdout.readline()).decode().split()[1].rstrip(";"), process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(settings: Settings, *argv: str, program: str = "main", **environment: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"swarm.cli.{program}", *argv, "--home", str(settings.home),
        env=os.environ | {"SWARM_STATE_DIR": str(settings.home / "state")} | environment,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 300)
    return process.returncode or 0, out.decode()


@pytest.fixture
async def settings(tmp_path: Path) -> Settings:
    settings = config.load(home=tmp_path / "home")
    settings.data_dir.mkdir(parents=True)
    async with wiring.store(settings) as store:
        await store.migrate()
        await store.put_agent(ECHO)
    return settings


async def test_it_ends_at_once_with_streams_open(settings: Settings) -> None:
    """Neither a stream that waits for news holds it up, nor one whose reader reads nothing."""
    token = new_token()
    async with wiring.store(settings) as store:
        await store.add_token(token, Actor(name="ci", role=Role.VIEWER), by="test")
        for id in ("quiet", "long"):
            await store.add_ticket(Ticket(id=id, title=id, state="ready", agent_id=ECHO.id, execution_mode="agent"))
        text = {"stream": "stdout", "text": "x" * 16_000}
        await store.append([Event(ticket_id="long", kind="output", data=text) for _ in range(600)])
    headers = {"authorization": f"Bearer {token}"}
    async with server(settings) as (url, process):
        port = int(url.rsplit(":", 1)[1])
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", port))
        head = f"GET /v1/tickets/long/events/live HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
        stalled.sendall(head.encode())
        async with (
            httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client,
            client.stream("GET", "/v1/tickets/quiet/events/live") as answer,
        ):
            lines = answer.aiter_lines()
            assert await anext(lines) == ": open"
            assert stalled.recv(15) == b"HTTP/1.1 200 OK"
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            assert time.monotonic() - began < api_server.GRACE_SECONDS, "an answer has these; a stream has none"
        stalled.close()


async def test_where_it_is(settings: Settings) -> None:
    assert (await run(settings, "dashboard"))[0] == 2
    async with server(settings) as (url, process):
        found = address.running(settings)
        assert found is not None and (found.url, found.pid) == (url, process.pid)
        status, said = await run(settings, "dashboard", "--json")
        assert status == 0 and json.loads(said)["url"].startswith(f"{url}/login?code=")
        assert url in (await run(settings, "status", program="engine"))[1]
        status, said = await run(settings, "stop", "--serve", program="engine")
        assert status == 0 and f"server {process.pid} stopped" in said
        assert await process.wait() == 0
    assert not address.file(settings).exists() and not settings.api_socket.exists()


async def test_a_server_without_descriptors_says_so_and_goes_on(settings: Settings) -> None:
    async with server(settings) as (url, process):
        assert process.stderr is not None
        async with httpx.AsyncClient(timeout=60) as client:  # it has begun
            assert (await client.get(f"{url}/healthz")).status_code == 200
            assert b"server serves" in await process.stderr.readline()
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
        waiting = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(3)]
        said = b""
        while b"no connection can be accepted" not in (line := await process.stderr.readline()):
            assert line, said
            said += line
        assert b"Too many open files" in line
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.get(f"{url}/healthz")).status_code == 200
        for each in waiting:
            each.close()
        process.terminate()
        assert b"no connection" not in await process.stderr.read(), "it is said once a minute"


async def test_links_lead_to_the_public_url(settings: Settings) -> None:
    public = config.load(home=settings.home, public_url="https://swarm.example")
    with address.written(public, "http://127.0.0.1:1"):
        status, said = await run(settings, "dashboard", "--json")
        assert status == 0 and json.loads(said)["url"].startswith("https://swarm.example/login?code=")
    with pytest.raises(UsageError, match="public_url"):
        config.load(home=settings.home, public_url="https://swarm.example/path")


async def test_a_browser_is_opened_by_no_argument_that_lets_others_in(settings: Settings, tmp_path: Path) -> None:
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    opener = programs / "xdg-open"
    opener.write_text(f'#!/bin/sh\necho "$1" > {told}.part\nmv {told}.part {told}\n')
    opener.chmod(0o755)
    async with server(settings) as (url, _):
        status, said = await run(settings, "dashboard", "--open", PATH=f"{programs}:{os.environ['PATH']}")
        assert status == 0
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not told.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        page = Path(told.read_text().strip().removeprefix("file://"))
        assert said.strip().startswith(url) and said.strip() in page.read_text()
        assert stat.S_IMODE(page.stat().st_mode) == 0o600
        assert "code=" not in told.read_text()


async def test_what_a_killed_server_leaves_is_removed(settings: Settings) -> None:
    async with server(settings) as (_, process):
        process.kill()
        await process.wait()
    assert address.file(settings).exists() and settings.api_socket.exists()
    assert address.running(settings) is None
    removed = address.forget_dead(settings)
    assert set(removed) == {address.file(settings), settings.api_socket} and not any(p.exists() for p in removed)
    async with server(settings):
        assert address.forget_dead(settings) == [] and settings.api_socket.exists()
        address.file(settings).unlink()
        assert address.forget_dead(settings) == [] and settings.api_socket.exists()


async def test_a_database_that_was_replaced_ends_the_server(settings: Settings) -> None:
    """Its reads would go on in a file that has no name any more, with tokens that were revoked since."""
    database = settings.data_dir / "swarm.db"
    async with server(settings) as (_, process):
        assert process.stderr is not None
        shutil.copy(database, settings.home / "older.db")
        (settings.home / "older.db").replace(database)
        said = await asyncio.wait_for(process.stderr.read(), 30)
        assert await process.wait() == 3 and b"was changed from outside" in said
    assert not settings.api_socket.exists()


def _answering(name: str, gate: asyncio.Event | None = None) -> Callable[..., Awaitable[None]]:
    async def app(scope: object, receive: object, send: Callable[..., Awaitable[None]]) -> None:
        if gate is not None:
            await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": name.encode()})

    return app


async def _ask(path: Path) -> str:
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), timeout=60) as client:
        return (await client.get("http://swarm/")).text


async def test_the_socket_is_taken_over_when_its_server_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    async with AsyncExitStack() as second:
        async with api_server.serving_locally(_answering("first"), path):
            await second.enter_async_context(api_server.serving_locally(_answering("second"), path))
            assert await _ask(path) == "first"
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not path.exists() or await _ask(path) != "second":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert not path.exists()


async def test_a_server_that_still_answers_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    path, gate, begun = tmp_path / "api.sock", asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await _answering("first", gate)(scope, receive, send)

    async with AsyncExitStack() as first:
        await first.enter_async_context(api_server.serving_locally(slow, path))
        asked = asyncio.create_task(_ask(path))
        await asyncio.wait_for(begun.wait(), 30)
        ending = asyncio.create_task(first.aclose())
        async with asyncio.timeout(PATIENCE_SECONDS):
            while unix_socket.listens(path):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            async with api_server.serving_locally(_answering("second"), path):
                assert not ending.done()
                gate.set()
                await ending
                assert await asked == "first" and await _ask(path) == "second"


def test_the_server_loads_nothing_that_runs_vms() -> None:
    """It stays for months, beside engines: they took 20 of its 75 MB."""
    program = (
        "import sys, swarm.app.serve; print(*{'pyroute2', 'cryptography', 'swarm.engine.engine'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "\n"


async def test_a_small_answer_is_not_held_back_until_the_one_before_is_acknowledged() -> None:
    """asyncio turns Nagle's algorithm off only for a socket that says that it is TCP."""
    off: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        off.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    bound = api_server.bind("127.0.0.1", 0)
    async with await asyncio.start_server(connected, sock=bound):
        _, writer = await asyncio.open_connection(*bound.getsockname())
        assert await off
        writer.close()
        await writer.wait_closed()


def test_the_demo_says_the_address() -> None:
    port = inspect.signature(serve_command.serve).parameters["port"].default
    assert f"http://127.0.0.1:{port}" in (Path(__file__).parents[2] / "tools" / "demo").read_text()
