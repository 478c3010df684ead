"""What the gateway adds to model calls: direct ones, and by several ways to the same server, in turn, in one run.

    make bench-gateway                    or, in a sandbox: python -m tests.gateway.bench [--calls 300] [--chunks 100]
    make bench-gateway ARGS=--write-docs  writes the table in docs/benchmarks.md; on a quiet machine

Server, client, engine (which keeps the books, in a real database) and each way are processes of their own; the gateway
is confined as for a guest. `relay` knows no HTTP and only passes bytes on: what it adds is what one more process on the
way costs here. `proxy` is the barest reverse proxy that aiohttp makes. A streamed chunk carries the time when the
server wrote it, so its way takes what the clock says when it arrives: CLOCK_MONOTONIC is one for all processes of a
host. What each way computes for a chunk is told too: it says more than times do on a machine where others work.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import aiohttp
import psutil
from aiohttp import web

from swarm.ledger import Limit
from tests.conftest import PATIENCE_SECONDS
from tests.gateway.conftest import KEY, ask, open_harness
from tests.gateway.messages_api import MessagesApi

Way = tuple[str, str]  # address, key
_PAGE: Final = Path(__file__).parents[2] / "docs" / "benchmarks.md"
_ROUNDS: Final = 4


async def main(calls: int, chunks: int) -> str:
    """The table."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        async with contextlib.AsyncExitStack() as stack:

            async def child(name: str, module: str, *words: str) -> str:
                return await stack.enter_async_context(_child(module, Path(scratch, name), *words))

            api = await child("api", "tests.gateway.messages_api", "--key", KEY, "--port-file")
            ways: dict[str, Way] = {"direct": (api, KEY)}
            own: dict[str, psutil.Process] = {}
            for name in ("relay", "proxy", "gateway", "with a budget"):
                words = ["--budget", "1000"] if name == "with a budget" else []
                kind = name if name in ("relay", "proxy") else "gateway"
                address, key, pid = (await child(name, "tests.gateway.bench", *words, "--serve", kind, api)).split()
                ways[name], own[name] = (address, key), psutil.Process(int(pid))
            rows = await _compare(ways, own, calls=calls, chunks=chunks)
    names = list(ways)
    lines = [
        f"| | {' | '.join(names)} | gateway ÷ relay |",
        f"|---|{'--:|' * (len(names) + 1)}",
    ]
    for label, values, digits in rows:
        shown = [f"{values[name]:.{digits}f}" if name in values else "" for name in names]
        lines.append(f"| {label} | {' | '.join(shown)} | {values['gateway'] / values['relay']:.2f} |")
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, kernel {platform.release()}"
    taken = f"Python {platform.python_version()}; load before and after: {load:.1f} and {os.getloadavg()[0]:.1f}."
    return "\n".join([f"{machine}, {taken}", "", *lines])


async def _compare(
    ways: dict[str, Way], own: dict[str, psutil.Process], *, calls: int, chunks: int
) -> list[tuple[str, dict[str, float], int]]:
    """Rows: label, value by way, digits."""
    rows: list[tuple[str, dict[str, float], int]] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for way in ways.values():  # connections open, code loaded
            await asyncio.gather(*(_stream(session, way, 5, 0) for _ in range(100)))
        for count in (1, 100):
            took: dict[str, list[float]] = {name: [] for name in ways}
            computed = dict.fromkeys(own, 0.0)
            pause = 0.02 * max(1, count // 20)  # the server alone must be able to keep up
            for _ in range(_ROUNDS):
                for name, way in ways.items():
                    before = _computed(own, name)
                    done = await asyncio.gather(*(_stream(session, way, chunks, pause) for _ in range(count)))
                    if name in own:
                        computed[name] += _computed(own, name) - before
                    took[name] += [ms for one in done for ms in one]
            label = f"a chunk, {count} stream{'s' if count > 1 else ''}"
            rows += _points(label, took, {"p50": 50, "p95": 95})
            each = {name: ms / len(took[name]) for name, ms in computed.items()}
            rows.append((f"{label}: CPU with its share of the call, ms", each, 3))
        for count in (1, 10, 100):
            took = {name: [] for name in ways}
            seconds = dict.fromkeys(ways, 0.0)
            for _ in range(_ROUNDS):
                for name, way in ways.items():
                    began = time.perf_counter()
                    each_one = max(1, calls // count)
                    done = await asyncio.gather(*(_calls(session, way, each_one) for _ in range(count)))
                    seconds[name] += time.perf_counter() - began
                    took[name] += [ms for one in done for ms in one]
            label = f"calls, {count} connection{'s' if count > 1 else ''}"
            rows.append((f"{label}: a second", {name: len(took[name]) / seconds[name] for name in ways}, 0))
            rows += _points(label, took, {"p50": 50, "p99": 99})
    return rows


def _points(
    label: str, took: dict[str, list[float]], points: dict[str, int]
) -> list[tuple[str, dict[str, float], int]]:
    parts = {name: statistics.quantiles(ms, n=100) for name, ms in took.items()}
    return [
        (f"{label}: {point}, ms", {name: part[at - 1] for name, part in parts.items()}, 2)
        for point, at in points.items()
    ]


def _computed(own: dict[str, psutil.Process], name: str) -> float:
    """ms"""
    return sum(own[name].cpu_times()[:2]) * 1000 if name in own else 0.0


async def _calls(session: aiohttp.ClientSession, way: Way, count: int) -> list[float]:
    return [await _call(session, way) for _ in range(count)]


async def _call(session: aiohttp.ClientSession, way: Way) -> float:
    began = time.perf_counter()
    async with session.post(f"{way[0]}/v1/messages", json=ask(), headers={"x-api-key": way[1]}) as answer:
        await answer.read()
        assert answer.status == 200, await answer.text()
    return (time.perf_counter() - began) * 1000


async def _stream(session: aiohttp.ClientSession, way: Way, chunks: int, pause: float) -> list[float]:
    """The ms that each chunk was on its way."""
    body = {**ask(f"scenario=stamped words={chunks} delay={pause}", max_tokens=4096), "stream": True}
    took = []
    async with session.post(f"{way[0]}/v1/messages", json=body, headers={"x-api-key": way[1]}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b'data: {"type": "content_block_delta"'):
                now = time.monotonic_ns()
                took.append((now - int(json.loads(line[6:])["delta"]["text"])) / 1e6)
    return took


@contextlib.asynccontextmanager
async def _child(module: str, file: Path, *words: str) -> AsyncIterator[str]:
    """A process of ours; what it wrote into ``file`` when it was ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *words, str(file), stdout=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not file.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        yield file.read_text()
    finally:
        process.terminate()
        await process.wait()


class _Relay(asyncio.Protocol):
    """One side of a connection that is passed on; ``peer`` is the other, None on the side that was connected to."""

    def __init__(self, port: int, peer: _Relay | None = None) -> None:
        self._port, self._peer = port, peer
        self._waiting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._peer is None:
            self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        there = _Relay(self._port, self)
        await asyncio.get_running_loop().create_connection(lambda: there, "127.0.0.1", self._port)
        self._peer = there
        there.transport.write(self._waiting)

    def data_received(self, data: bytes) -> None:
        if self._peer is None:
            self._waiting += data
        else:
            self._peer.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._peer is not None:
            self._peer.transport.close()


async def _relay(upstream: str, ready: Callable[[str], None]) -> None:
    port = int(upstream.rpartition(":")[2])
    server = await asyncio.get_running_loop().create_server(lambda: _Relay(port), "127.0.0.1", 0)
    ready(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]} {KEY} {os.getpid()}")
    await asyncio.Event().wait()


async def _proxy(upstream: str, ready: Callable[[str], None]) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def serve(request: web.BaseRequest) -> web.StreamResponse:
            headers = {name: request.headers[name] for name in ("x-api-key", "content-type")}
            async with session.post(
                f"{upstream}{request.raw_path}", data=await request.read(), headers=headers
            ) as said:
                response = web.StreamResponse(status=said.status, headers={"content-type": said.content_type})
                await response.prepare(request)
                async for chunk in said.content.iter_any():
                    await response.write(chunk)
            return response

        server = await asyncio.get_running_loop().create_server(web.Server(serve), "127.0.0.1", 0)
        ready(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]} {KEY} {os.getpid()}")
        await asyncio.Event().wait()


async def _gateway(upstream: str, ready: Callable[[str], None], budget: float | None) -> None:
    api = MessagesApi(key=KEY, url=upstream)
    with tempfile.TemporaryDirectory() as scratch:
        async with (
            open_harness(api, Path(scratch), day=Limit(usd=budget) if budget else None) as harness,
            harness.listener(await harness.claim()) as listener,
        ):
            ready(f"{listener.env['ANTHROPIC_BASE_URL']} {listener.token} {harness.gateway.pid}")
            await asyncio.Event().wait()


async def _serve(kind: str, upstream: str, at: Path, budget: float | None) -> None:
    def ready(said: str) -> None:
        partial = at.with_name(f".{at.name}")
        partial.write_text(said)
        partial.rename(at)

    if kind == "gateway":
        await _gateway(upstream, ready, budget)
    else:
        await {"relay": _relay, "proxy": _proxy}[kind](upstream, ready)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=300, help="of one way, in each of the rounds")
    parser.add_argument("--chunks", type=int, default=100, help="of one stream")
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--serve", nargs=3, metavar=("KIND", "UPSTREAM", "AT"), help="by this program itself")
    parser.add_argument("--budget", type=float)
    given = parser.parse_args()
    os.environ.pop("ANTHROPIC_API_KEY", None)
    with contextlib.suppress(KeyboardInterrupt):
        if given.serve:
            kind, upstream, at = given.serve
            asyncio.run(_serve(kind, upstream, Path(at), given.budget))
            sys.exit()
        table = asyncio.run(main(given.calls, given.chunks))
        print(table)
        if given.write_docs:
            before, begin, rest = _PAGE.read_text().partition("<!-- gateway: made by `make bench-gateway` -->\n")
            _, end, after = rest.partition("<!-- gateway ends -->")
            _PAGE.write_text(f"{before}{begin}{table}\n{end}{after}")
