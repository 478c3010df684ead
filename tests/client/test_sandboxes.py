"""Sandboxes by the SDK: real VMs, a real engine, a real server."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from swarm.app import serve
from swarm.client import AsyncSandbox, AsyncSwarm, CommandFailed, Conflict, NotFound, SandboxEnded
from swarm.config import Settings
from swarm.vm.driver import Image
from tests.conftest import PATIENCE_SECONDS
from tests.engine.test_sandboxes import desk_at

pytestmark = [pytest.mark.slow, pytest.mark.needs("qemu")]


async def hears_a_command(box: AsyncSandbox) -> None:
    """While it runs, with both streams, and again from where it was left."""
    script = "cat; echo one; echo two >&2; until [ -e go ]; do sleep 0.1; done; echo three; exit 3"
    async with await box.start("sh", "-c", script, stdin="given\n", process="job") as job:
        heard: dict[str, str] = {"stdout": "", "stderr": ""}
        async for piece in job.output():
            heard[piece.stream] += piece.text
            if heard == {"stdout": "given\none\n", "stderr": "two\n"}:
                break
        await box.write("go", "")
        again = await box.attach("job", after=job.after)
        assert [piece.text async for piece in again.output()] == ["three\n"]
        ended = await job.wait()
        assert (ended.code, ended.timed_out, (await again.wait()).code) == (3, False, 3)
    async with await box.start("head -c 1000000 /dev/zero; exec sleep 1000") as long:
        size = 0
        async for piece in long.output():
            size += len(piece.data)
            if long.after == 1_000_000:
                break
        late = await box.attach(long.process)
        async for _ in late.output():
            break
        assert size == 1_000_000 - long.dropped_bytes and late.dropped_bytes > 700_000
    assert (await late.wait()).signal == 9, "the block was left"
    for name in ("go",):
        await box.remove(name)


async def test_a_vm_that_stays(settings: Settings, image: Image, tmp_path: Path) -> None:
    """It sleeps and wakes up with its processes; forks have its state and are others."""
    async with (
        desk_at(settings, tmp_path) as desk,
        desk.engine(),
        serve.served(desk.settings, host="127.0.0.1", port=0, remote=False),
        AsyncSwarm(home=desk.settings.home, timeout_seconds=60) as s,
    ):
        async with await s.sandboxes.create(
            name="box", ttl_seconds=600, idle_timeout_seconds=300, requires={"arch": os.uname().machine}
        ) as box:
            data = os.urandom(3 << 20)
            await box.write("data", data)
            counts = "n=0; while :; do n=$((n+1)); echo $n 1<> /work/n; sleep 1; done"  # never empty
            await box.exec("sh", "-c", counts, background=True, process="counts")
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not (await box.exec("cat n")).stdout:
                    pass
            who = "cat /etc/machine-id /etc/hostname; head -c 16 /dev/urandom | base64"
            first = (await box.exec(who)).stdout.splitlines()
            assert (await box.pause()).state == "paused"
            before = int((await box.exec("cat n", check=True)).stdout)  # which wakes it up
            async with asyncio.timeout(PATIENCE_SECONDS):
                while int((await box.exec("cat n")).stdout or 0) <= before:
                    pass
            assert await box.read("data") == data
            assert (await box.exec(who)).stdout.splitlines()[:2] == first[:2]
            await hears_a_command(box)
            kept = await box.snapshot("good")
            forks = await box.fork(2, name="try")
            seen = [tuple(first), *[tuple((await fork.exec(who)).stdout.splitlines()) for fork in forks]]
            assert all(len({one[place] for one in seen}) == 3 for place in range(3)), seen
            assert [await fork.read("data") == data for fork in forks] == [True, True]
            assert [one.process for one in await forks[0].processes() if one.ended is None] == ["counts"]
            again = await s.sandboxes.create(snapshot="good", name="again")
            assert (await again.exec("ls")).stdout.split() == ["data", "n", "out"]
            with pytest.raises(CommandFailed, match="ended with status 1"):
                await again.exec("false", check=True)
            with pytest.raises(NotFound):
                await again.read("none")
            for one in (*forks, again):
                assert (await one.end()).state == "ended"
            assert [one.name async for one in s.sandboxes.list(state="running")] == ["box"]
            await s.sandboxes.remove_snapshot(kept.id)
        with pytest.raises(Conflict, match="has ended"):
            await box.exec("true")
        with pytest.raises(SandboxEnded):
            await box.wait()
        kinds = {event.kind async for event in box.events()}
        assert {"exec", "exit", "files", "fork", "transition"} <= kinds
    await desk.gone()
