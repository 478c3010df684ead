"""Runs a built-in agent as its VM does, but as a process of this host: a fork of an agentd that has preloaded it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm.agents import check
from swarm.channel import Channel
from swarm.channel.dial import Endpoint
from swarm.model import Agent
from swarm.vm.drivers.process import AGENTD
from tests.channel.agentd_here import TOKEN, identity


@dataclass
class Ran:
    code: int | None
    printed: str
    said: str
    outputs: dict[str, Any] = field(default_factory=dict)


@contextmanager
def warmed(agent: Agent, place: Path, *modules: Path) -> Iterator[Path]:
    """An agentd with all that the manifest preloads, in the empty directory ``place``. Yields the root of its files.

    ``modules``: where Python looks besides the agent's own directory, which in a VM comes with the layer.
    """
    (place / "root").mkdir()
    argv = [sys.executable, "-P", "-s", "-S", "-B", str(AGENTD), "--unix", str(place / "s")]
    argv += ["--root", str(place / "root"), "--preload", ",".join(agent.preload)]
    env = {**os.environ, "PYTHONPATH": ":".join(map(str, (*modules, agent.path)))}
    with (place / "log").open("wb") as log:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, env=env)
    try:
        yield place / "root"
    finally:
        child.terminate()
        child.wait(30)


@asynccontextmanager
async def connected(root: Path, *, seconds: float) -> AsyncIterator[Channel]:
    async with Channel.connect(Endpoint(unix=root.parent / "s"), token=TOKEN, timeout_seconds=seconds) as channel:
        assert (await channel.hello()).preload_failed == {}
        await channel.renew(identity())
        yield channel


async def perform(
    channel: Channel,
    root: Path,
    agent: Agent,
    inputs: Mapping[str, Any],
    *,
    ticket: Mapping[str, Any],
    env: Mapping[str, str],
    timeout_seconds: float,
    step: Mapping[str, Any] | None = None,
    heard: Callable[[str, bytes], None] = lambda *_: None,
) -> Ran:
    """One run, in an empty work directory; its inputs and outputs are checked as the engine does."""
    for left in (root / "work").glob("*"):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    given = {"inputs": check.inputs(agent, dict(inputs)), "ticket": ticket} | ({"step": step} if step else {})
    printed = {"stdout": b"", "stderr": b""}

    def hear(stream: str, data: bytes) -> None:
        printed[stream] += data
        heard(stream, data)

    await channel.put_tree(agent.path, dest="/agent", owner="root")
    await channel.put({"input.json": json.dumps(given).encode()}, dest="/work", owner="agent")
    ended = await channel.run(
        [f"/agent/{agent.entry[0]}"], env=dict(env), warm=True, timeout_seconds=timeout_seconds, on_output=hear
    )
    ran = Ran(code=ended.code, printed=printed["stdout"].decode(), said=printed["stderr"].decode())
    assert "Traceback" not in ran.said, ran.said
    if ran.code == 0:
        ran.outputs = json.loads((root / "work/output.json").read_text())
        check.outputs(agent, ran.outputs)
    return ran
