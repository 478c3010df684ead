"""Tickets in real VMs while somebody changes the host's network or stops a VMM: they are done, or say why not."""

from __future__ import annotations

import os
import re
import signal

import pytest

from swarm.base import process
from tests.engine.conftest import Bench, ended, serving

pytestmark = pytest.mark.needs("qemu")

SLEEPS = "import time\nprint('started', flush=True)\ntime.sleep(3600)"
DONE = "import json\njson.dump({'n': 1}, open('output.json', 'w'))"
ENDS = "import json, time\nprint('started', flush=True)\ntime.sleep(6)\njson.dump({'n': 1}, open('output.json', 'w'))"


@pytest.mark.parametrize(
    "lines",
    [
        ["ip link del br0"],
        ["ip addr flush dev br0"],
        ["ip link set br0 down", "nft flush ruleset"],
        ["ip netns del vm{n}"],
    ],
    ids=["bridge", "address", "down, no rules", "name of the namespace"],
)
async def test_a_running_ticket_outlives_what_its_host_loses(bench: Bench, lines: list[str]) -> None:
    """The agent ends by itself, while the host has nothing to send to it; the next ticket runs too."""
    agent = await bench.agent(ENDS)
    async with serving(bench):
        bench.insert("t", agent.id)
        await bench.until_it_prints()
        (vm,) = bench.vms()
        for line in lines:
            await process.run(line.format(n=vm.n).split())
        assert await ended(bench, "t") == ["done"]
        bench.insert("next", (await bench.agent(DONE, "next")).id)
        assert await ended(bench, "next") == ["done"]


async def test_a_guest_that_is_silent_is_asked_why(bench: Bench) -> None:
    """Its time is up, and nothing comes from it: what its VMM does, whether agentd answers, what the network lacks."""
    causes = {
        "stopped": "QEMU was stopped by a signal",
        "tap": "QEMU says that the VM is 'running'; agentd at [0-9.]+:1024 did not answer in 5 s: .*; "
        "tap0 in vm{n} does not exist any more",
    }

    async def wrong(seconds: int) -> list[str]:
        agent = await bench.agent(SLEEPS, f"sleeps-{seconds}", timeout_seconds=seconds)
        ids = {f"{cause}-{seconds}": says for cause, says in causes.items()}
        for id_ in ids:
            bench.insert(id_, agent.id)
        for id_ in ids:
            await bench.until_it_prints(id_)
        vms = {(vm.ticket_id or "").partition("-")[0]: vm for vm in bench.vms()}
        if vms.keys() != causes.keys():
            return ["the time of one of them was up"]
        os.kill(vms["stopped"].pid, signal.SIGSTOP)
        await process.run(["ip", "-n", vms["tap"].netns, "link", "del", "tap0"])
        assert await ended(bench, *ids, timeout_seconds=120) == ["failed", "failed"]
        errors = {id_: (await bench.store.ticket(id_)).error or "" for id_ in ids}
        n = vms["tap"].n
        return [errors[id_] for id_, says in ids.items() if not re.search(says.format(n=n), errors[id_])]

    async with serving(bench):
        assert not await wrong(3) or not (left := await wrong(25)), left  # a busy machine is slower
