"""What the gateway adds to a model call: direct and through it, to the same server, in turn, in one run.

    make bench-gateway                    or, in a sandbox: python -m tests.gateway.bench [--calls 300] [--streams 100]

Server, gateway, engine (which keeps the books, in a real database) and client are a process each. A call is timed by
the client; a streamed chunk carries the time when the server wrote it, so its way takes what the clock says when it
arrives: CLOCK_MONOTONIC is one for all processes of a host. What gateway and engine compute for each is told apart: it
says more than times do on a machine where others work. A chunk goes a third way, too: by a relay that knows no HTTP and
only passes bytes on, in a process of its own. What that adds is what one more process on the way costs here.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil

from swarm.ledger import Limit
from tests.gateway.conftest import KEY, ask, open_harness
from tests.gateway.messages_api import MessagesApi

Way = tuple[str, str]  # address, key


async def main(calls: int, streams: int, chunks: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        async with _child("tests.gateway.messages_api", Path(scratch, "api"), "--key", KEY, "--port-file") as api:
            direct = (api, KEY)
            for budget in ("", "1000"):
                place, relayed = Path(scratch, f"gateway{budget}"), Path(scratch, f"relay{budget}")
                async with (
                    _child("tests.gateway.bench", place, "--budget", budget, "--serve", api, "--at") as gateway,
                    _child("tests.gateway.bench", relayed, "--relay", api, "--at") as relay,
                ):
                    ways: dict[str, Way] = {"direct": direct, "relay": (relay, KEY)}
                    ways["gateway"] = tuple(gateway.split())  # type: ignore[assignment]
                    print(f"\n{'with a budget for the day' if budget else 'without budgets'}")
                    pids = Path(f"{place}.pid").read_text().split()
                    own = {
                        name: psutil.Process(int(pid)) for name, pid in zip(("gateway", "engine"), pids, strict=True)
                    }
                    await _compare(ways, own, calls=calls, streams=streams, chunks=chunks)


async def _compare(
    ways: dict[str, Way], own: dict[str, psutil.Process], *, calls: int, streams: int, chunks: int
) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        for way in ways.values():  # connections open, code loaded
            for _ in range(20):
                await _call(session, way)
                await _stream(session, way, 5, 0)
        called: dict[str, list[float]] = {name: [] for name in ways}
        before = _computed(own)
        for _ in range(calls):
            for name, way in ways.items():
                called[name].append(await _call(session, way))
        print(f"{'':34}{'p50':>12}{'p95':>12}")
        _show("a call", called, "ms")
        _show_computed(own, before, calls)
        for count in (1, streams):
            took: dict[str, list[float]] = {name: [] for name in ways}
            before = _computed(own)
            for _ in range(3 if count > 1 else 10):
                for name, way in ways.items():
                    pause = 0.02 * max(1, count // 20)  # the server alone must be able to keep up
                    done = await asyncio.gather(*(_stream(session, way, chunks, pause) for _ in range(count)))
                    took[name] += [ms for one in done for ms in one]
            _show(f"a chunk, {count} stream{'s' if count > 1 else ''} at once", took, "ms")
            _show_computed(own, before, len(took["gateway"]))


def _computed(own: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in own.items()}


def _show_computed(own: dict[str, psutil.Process], before: dict[str, float], count: int) -> None:
    for name, seconds in _computed(own).items():
        print(f"{f'  computed by the {name}':34}{(seconds - before[name]) / count * 1000:>9.3f} ms")


def _show(what: str, measured: dict[str, list[float]], unit: str) -> None:
    points = {name: (statistics.median(ms), statistics.quantiles(ms, n=20)[18]) for name, ms in measured.items()}
    for name, (p50, p95) in points.items():
        print(f"{what + ', ' + name:34}{p50:>9.3f} {unit}{p95:>9.3f} {unit}")
    d50, d95 = points.pop("direct")
    for name, (p50, p95) in points.items():
        print(f"{f'  more by the {name}':34}{p50 - d50:>9.3f} {unit}{p95 - d95:>9.3f} {unit}")
        print(f"{'  ratio':34}{p50 / d50:>9.2f}   {p95 / d95:>9.2f}")


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
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", module, *words, str(file))
    try:
        async with asyncio.timeout(30):
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


async def _relay(upstream: str, at: Path) -> None:
    loop, port = asyncio.get_running_loop(), int(upstream.rpartition(":")[2])
    server = await loop.create_server(lambda: _Relay(port), "127.0.0.1", 0)
    partial = at.with_name(f".{at.name}")
    partial.write_text(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    partial.rename(at)
    await asyncio.Event().wait()


async def _serve(upstream: str, at: Path, budget: str) -> None:
    api = MessagesApi(key=KEY, url=upstream)
    day = Limit(usd=float(budget)) if budget else None
    with tempfile.TemporaryDirectory() as scratch:
        async with (
            open_harness(api, Path(scratch), day=day) as harness,
            harness.listener(await harness.claim()) as listener,
        ):
            at.with_name(f"{at.name}.pid").write_text(f"{harness.gateway.pid} {os.getpid()}")
            partial = at.with_name(f".{at.name}")
            partial.write_text(f"{listener.env['ANTHROPIC_BASE_URL']} {listener.token}")
            partial.rename(at)
            await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--chunks", type=int, default=50)
    parser.add_argument("--serve")
    parser.add_argument("--relay")
    parser.add_argument("--at", type=Path)
    parser.add_argument("--budget", default="")
    given = parser.parse_args()
    os.environ.pop("ANTHROPIC_API_KEY", None)
    with contextlib.suppress(KeyboardInterrupt):
        if given.serve:
            asyncio.run(_serve(given.serve, given.at, given.budget))
        elif given.relay:
            asyncio.run(_relay(given.relay, given.at))
        else:
            asyncio.run(main(given.calls, given.streams, given.chunks))
