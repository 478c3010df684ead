"""What the gateway adds to a model call: direct and through it, to the same server, in turn, in one run.

    make bench-gateway                    or, in a sandbox: python -m tests.gateway.bench [--calls 300] [--streams 100]

Server, gateway (its books in a real database) and client are a process each. A call is timed by the client; a streamed
chunk carries the time when the server wrote it, so its way takes what the clock says when it arrives: CLOCK_MONOTONIC
is one for all processes of a host. What the gateway's process computes for each is told apart: it says more than times
do on a machine where others work.
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
from tests.gateway.conftest import KEY, an_office, ask
from tests.gateway.messages_api import MessagesApi

Way = tuple[str, str]  # address, key


async def main(calls: int, streams: int, chunks: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        async with _child("tests.gateway.messages_api", Path(scratch, "api"), "--key", KEY, "--port-file") as api:
            direct = (api, KEY)
            for budget in ("", "1000"):
                place = Path(scratch, f"gateway{budget}")
                async with _child("tests.gateway.bench", place, "--budget", budget, "--serve", api, "--at") as gateway:
                    through: Way = tuple(gateway.split())  # type: ignore[assignment]
                    print(f"\n{'with a budget for the day' if budget else 'without budgets'}")
                    own = psutil.Process(int(Path(f"{place}.pid").read_text()))
                    await _compare(direct, through, own, calls=calls, streams=streams, chunks=chunks)


async def _compare(
    direct: Way, through: Way, gateway: psutil.Process, *, calls: int, streams: int, chunks: int
) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        ways = {"direct": direct, "gateway": through}
        for way in ways.values():  # connections open, code loaded
            for _ in range(20):
                await _call(session, way)
                await _stream(session, way, 5, 0)
        called: dict[str, list[float]] = {name: [] for name in ways}
        before = sum(gateway.cpu_times()[:2])
        for _ in range(calls):
            for name, way in ways.items():
                called[name].append(await _call(session, way))
        print(f"{'':34}{'p50':>12}{'p95':>12}")
        _show("a call", called, "ms")
        print(f"{'  computed by the gateway':34}{(sum(gateway.cpu_times()[:2]) - before) / calls * 1000:>9.3f} ms")
        for count in (1, streams):
            took: dict[str, list[float]] = {name: [] for name in ways}
            before = sum(gateway.cpu_times()[:2])
            for _ in range(3 if count > 1 else 10):
                for name, way in ways.items():
                    pause = 0.02 * max(1, count // 20)  # the server alone must be able to keep up
                    done = await asyncio.gather(*(_stream(session, way, chunks, pause) for _ in range(count)))
                    took[name] += [ms for one in done for ms in one]
            _show(f"a chunk, {count} stream{'s' if count > 1 else ''} at once", took, "ms")
            used = (sum(gateway.cpu_times()[:2]) - before) / len(took["gateway"]) * 1000
            print(f"{'  computed by the gateway':34}{used:>9.3f} ms")


def _show(what: str, measured: dict[str, list[float]], unit: str) -> None:
    points = {name: (statistics.median(ms), statistics.quantiles(ms, n=20)[18]) for name, ms in measured.items()}
    for name, (p50, p95) in points.items():
        print(f"{what + ', ' + name:34}{p50:>9.3f} {unit}{p95:>9.3f} {unit}")
    (d50, d95), (g50, g95) = points["direct"], points["gateway"]
    print(f"{'  more by':34}{g50 - d50:>9.3f} {unit}{g95 - d95:>9.3f} {unit}")
    print(f"{'  ratio':34}{g50 / d50:>9.2f}   {g95 / d95:>9.2f}")


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


async def _serve(upstream: str, at: Path, budget: str) -> None:
    api = MessagesApi(key=KEY, url=upstream)
    day = Limit(usd=float(budget)) if budget else None
    with tempfile.TemporaryDirectory() as scratch:
        async with an_office(api, Path(scratch), day=day) as office, office.door(await office.claim()) as door:
            at.with_name(f"{at.name}.pid").write_text(str(os.getpid()))
            partial = at.with_name(f".{at.name}")
            partial.write_text(f"{door.env['ANTHROPIC_BASE_URL']} {door.token}")
            partial.rename(at)
            await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--chunks", type=int, default=50)
    parser.add_argument("--serve")
    parser.add_argument("--at", type=Path)
    parser.add_argument("--budget", default="")
    given = parser.parse_args()
    os.environ.pop("ANTHROPIC_API_KEY", None)
    with contextlib.suppress(KeyboardInterrupt):
        if given.serve:
            asyncio.run(_serve(given.serve, given.at, given.budget))
        else:
            asyncio.run(main(given.calls, given.streams, given.chunks))
