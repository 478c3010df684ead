"""`swarm cluster`: real Ray, three nodes, each with a network namespace, a home and a state directory of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from swarm.base import process
from tests.conftest import PATIENCE_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.needs("netns", "ray")]
BIN = Path(sys.executable).parent
# Ray refuses an address that it finds on the command line of any process of this machine, whatever its namespace.
NET = f"10.77.{random.randrange(256)}"
HEAD = f"{NET}.1:6379"


@dataclass(kw_only=True)
class Cluster:
    """Ray's nodes: the first is its head, in the namespace of the tests."""

    place: Path
    nodes: dict[int, process.Child] = field(default_factory=dict)
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    def env(self, number: int) -> dict[str, str]:
        mine = {
            "SWARM_DATABASE_URL": f"sqlite:///{self.place}/swarm.db", "SWARM_DRIVER": "process",
            "SWARM_HOME": str(self.place / f"h{number}"), "SWARM_STATE_DIR": str(self.place / f"s{number}"),
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_TMPDIR": str(self.place),
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        return {name: value for name, value in os.environ.items() if not name.startswith(("SWARM_", "RAY_"))} | mine

    async def start(self, number: int) -> None:
        where = ["--head", "--port=6379", "--include-dashboard=false"] if number == 1 else [f"--address={HEAD}"]
        argv = [
            str(BIN / "ray"), "start", "--block", *where, f"--node-ip-address={NET}.{number}", "--num-cpus=1",
            "--object-store-memory=80000000", "--disable-usage-stats",
        ]  # fmt: skip
        netns = None if number == 1 else f"ray{number}"
        log = self.place / f"{len(list(self.place.glob('*.log')))}.log"
        self.nodes[number] = await process.spawn(argv, output=log, netns=netns, env=self.env(number))
        await until(lambda: asyncio.to_thread(lambda: log.exists() and b"Ray runtime started" in log.read_bytes()))

    async def end(self, number: int) -> None:
        """As a machine that loses its power: Ray's processes there are killed."""
        node = self.nodes.pop(number)
        theirs = psutil.Process(node.pid).children(recursive=True)
        for one in [psutil.Process(node.pid), *theirs]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        await node.wait()
        await asyncio.to_thread(psutil.wait_procs, theirs)

    async def ray(self, *argv: str) -> None:
        await process.run([str(BIN / "ray"), *argv, f"--address={HEAD}"], env=self.env(1))

    async def swarm(self, *argv: str, status: int | None = 0, env: Mapping[str, str] | None = None) -> str:
        argv = (sys.executable, "-m", "swarm.cli.main", *argv)
        done = await process.run(argv, env=self.env(1) | dict(env or {}), timeout_seconds=240, check=False)
        assert status in (None, done.returncode), (argv, done)
        return done.stdout.decode() + done.stderr.decode()

    async def cluster(self, *argv: str, status: int | None = 0) -> list[dict[str, Any]]:
        said = await self.swarm("cluster", *argv, "--address", HEAD, "--json", status=status)
        return list(json.loads(said[said.index("[") : said.rindex("]") + 1]))

    async def kept(self) -> list[dict[str, Any]]:
        return await self.cluster("status", status=None)

    async def run(self, number: int, *, restarts: int = 0) -> bool:
        """Do so many engines run, after so many restarts in all?"""
        kept = await self.kept()
        return [one["state"] for one in kept] == ["running"] * number and sum(o["restarts"] for o in kept) == restarts

    async def tickets(self, *ids: str) -> None:
        """They are added, and done in the end."""
        for id in ids:
            await self.swarm("ticket", "add", id, "--id", id, "--agent", "echo")

        async def done() -> bool:
            found = json.loads(await self.swarm("ticket", "list", "--state", "done", "--json"))
            return set(ids) <= {one["id"] for one in found}

        await until(done)


async def until(check: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.2)


@pytest.fixture
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    place = tmp_path_factory.mktemp("r")
    async with namespaces(2, 3):
        ours = Cluster(place=place)
        try:
            await ours.swarm("init", "--no-image")
            await ours.start(1)
            yield ours
        finally:
            for node in ours.nodes.values():
                await process.kill(node, grace_seconds=20)
            left = await asyncio.to_thread(left_in, place)
            for one in left:
                one.kill()
            await asyncio.to_thread(psutil.wait_procs, left)


def left_in(place: Path) -> list[psutil.Process]:
    """Ray's processes that outlive its `ray start`, and engines."""
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if one.environ().get("RAY_TMPDIR") == str(place):
                found.append(one)
    return found


@asynccontextmanager
async def namespaces(*numbers: int) -> AsyncIterator[None]:
    async def ip(*words: str) -> None:
        await process.run(["ip", *words])

    await ip("link", "add", "ray0", "type", "bridge")
    try:
        await ip("addr", "add", f"{NET}.1/24", "dev", "ray0")
        await ip("link", "set", "ray0", "up")
        for number in numbers:
            name = f"ray{number}"
            await ip("netns", "add", name)
            await ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            await ip("link", "set", f"v{name}", "master", "ray0", "up")
            await ip("-n", name, "addr", "add", f"{NET}.{number}/24", "dev", "eth0")
            await ip("-n", name, "link", "set", "eth0", "up")
            await ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for number in numbers:
            await ip("link", "del", f"vray{number}")
            await ip("netns", "del", f"ray{number}")
        await ip("link", "del", "ray0")


async def test_an_engine_on_every_node(cluster: Cluster) -> None:
    assert await cluster.cluster("status") == []
    await cluster.start(2)
    said = await cluster.swarm("cluster", "up", "--address", HEAD, status=None, env={"RAY_AUTH_MODE": "disabled"})
    assert "Ray asks for no token" in said, said
    failing = await cluster.cluster("up", "--warm", "many", status=1)
    assert [one["state"] for one in failing] == ["failing"] * 2 and "--warm takes a number" in failing[0]["error"]
    await cluster.cluster("up", "--max-vms", "2", status=None)
    await cluster.start(3)  # a node that joins later
    await until(lambda: cluster.run(3))
    await cluster.tickets("a", "b")

    victim = (await cluster.kept())[0]
    os.kill(victim["pid"], signal.SIGKILL)
    await until(lambda: cluster.run(3, restarts=1))

    other = {"SWARM_DATABASE_URL": f"sqlite:///{cluster.place}/other.db", "SWARM_HOME": str(cluster.place / "other")}
    await cluster.swarm("init", "--no-image", env=other)
    said = await cluster.swarm("cluster", "up", "--address", HEAD, "--max-vms", "2", status=1, env=other)
    assert said.count("uses another database than this command") == 3, said

    # Ray takes a node down: its engine is drained and ended, and no other is started there.
    (leaving,) = [one for one in await cluster.kept() if one["address"] == f"{NET}.3"]
    await cluster.ray("drain-node", f"--node-id={leaving['node']}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                      "--reason-message=spot", "--deadline-remaining-seconds=3600")  # fmt: skip
    await until(lambda: asyncio.to_thread(lambda: not psutil.pid_exists(leaving["pid"])))

    # Without its head, Ray is gone; the engines are not.
    engines = {one["pid"] for one in await cluster.kept() if one["state"] == "running"}
    assert len(engines) == 2
    await cluster.end(1)
    assert "can't connect to Ray" in await cluster.swarm("cluster", "status", "--address", HEAD, status=1)
    await cluster.end(2)
    await cluster.end(3)
    await cluster.tickets("c", "d")

    # A new head finds the engine that runs on its node, and keeps it.
    await cluster.start(1)
    (again,) = await cluster.cluster("up")
    assert again["state"] == "running" and again["pid"] in engines and again["restarts"] == 0
    down = await cluster.cluster("down", "--drain")
    assert [one["state"] for one in down] == ["stopped"] and not psutil.pid_exists(again["pid"])
    assert await cluster.cluster("status") == []
    hosts = json.loads(await cluster.swarm("host", "list", "--json"))
    assert len(hosts) == 3 and not any(one["draining"] for one in hosts)

    # What a person has drained stays so.
    (again,) = await cluster.cluster("up")
    await cluster.swarm("host", "drain", again["host_id"], "--within", "3600")
    await cluster.cluster("down", "--drain")
    hosts = json.loads(await cluster.swarm("host", "list", "--json"))
    (drained,) = [one for one in hosts if one["draining"]]
    assert drained["id"] == again["host_id"] and 0 < drained["put_back_seconds"] <= 3600


@pytest.mark.parametrize("address", ["nonsense", "10.0.0.1:notaport", "", "local", "http://x", "127.0.0.1:1"])
async def test_an_address_of_no_ray(address: str) -> None:
    argv = [sys.executable, "-m", "swarm.cli.main", "cluster", "status", "--address", address]
    done = await process.run(argv, env=dict(os.environ), check=False)
    # Ray itself may have said something before.
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1].startswith(f"error: can't connect to Ray at {address!r}: ")
