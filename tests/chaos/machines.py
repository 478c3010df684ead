"""Machines on this machine: each is a process with namespaces of its own (network, mounts, host name), in which
programs are started; so it has its own address, /etc, machine id, boot id, `ip netns`, bridge and rules, and its clock
may be wrong. All stand at one bridge, as does whatever else listens at an address of it.

Pids, users and the kernel's own times (of files) are those of the whole machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psutil

from swarm.base import process
from tests.conftest import PATIENCE_SECONDS

NET: Final = "10.78.0"
_BRIDGE: Final = "chaos0"
_SOURCE: Final = Path(__file__).with_name("clock.c")


@asynccontextmanager
async def bridge(*addresses: str) -> AsyncIterator[None]:
    """With these addresses of this side."""
    await _run("ip", "link", "add", _BRIDGE, "type", "bridge")
    try:
        await _run("ip", "link", "set", _BRIDGE, "up")
        # An address that is removed takes no other one of its network with it.
        Path(f"/proc/sys/net/ipv4/conf/{_BRIDGE}/promote_secondaries").write_text("1")
        for address in addresses:
            await add_address(address)
        yield
    finally:
        await _run("ip", "link", "del", _BRIDGE)


async def add_address(address: str) -> None:
    await _run("ip", "addr", "add", f"{address}/24", "dev", _BRIDGE)


async def remove_address(address: str) -> None:
    """Packets to it get no answer from now on."""
    await _run("ip", "addr", "del", f"{address}/24", "dev", _BRIDGE)


class Host:
    """``number``: of its name and address. `boot` it; `crash` ends it, and it may boot again."""

    def __init__(self, number: int, place: Path) -> None:
        self.number, self.place, self.name = number, place, f"h{number}"
        self.cut_off = ""
        self._machine: process.Child | None = None
        (place / "etc").mkdir(parents=True)
        (place / "etc" / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
        (place / "work").mkdir()
        self.set_clock(0)

    @property
    def way(self) -> list[str]:
        """What starts a program there, in the process that is started."""
        assert self._machine is not None
        return ["nsenter", f"--target={self._machine.pid}", "--net", "--mount", "--uts", "--"]

    async def boot(self) -> None:
        (self.place / "boot").write_text(f"{uuid.uuid4()}\n")
        argv = ["unshare", "--net", "--mount", "--uts", "sleep", "infinity"]
        self._machine = machine = await process.spawn(argv, output=self.place / "machine.log")
        pid, link, self.cut_off = machine.pid, f"v{self.name}", ""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await asyncio.to_thread(_spaces, pid) == _spaces(os.getpid()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        await _run("ip", "link", "set", link, "master", _BRIDGE, "up")
        etc = f"lowerdir=/etc,upperdir={self.place}/etc,workdir={self.place}/work"
        for argv in (
            ["hostname", self.name],
            ["mount", "-t", "overlay", "-o", etc, "overlay", "/etc"],
            ["mount", "-t", "tmpfs", "netns", "/run/netns"],
            ["mount", "--bind", str(self.place / "boot"), "/proc/sys/kernel/random/boot_id"],
            ["ip", "link", "set", "lo", "up"],
            ["ip", "addr", "add", f"{NET}.{10 + self.number}/24", "dev", "eth0"],
            ["ip", "link", "set", "eth0", "up"],
        ):
            await _run(*self.way, *argv)

    async def crash(self) -> None:
        """As a machine that loses its power: nothing of it is left but its files."""
        if self._machine is None:
            return
        async with asyncio.timeout(PATIENCE_SECONDS):
            while there := await asyncio.to_thread(self.processes):
                for one in there:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
                await asyncio.sleep(0.01)
        machine, self._machine = self._machine, None
        await process.kill(machine)
        async with asyncio.timeout(PATIENCE_SECONDS):
            # Of this network namespace, which /sys may not be of.
            while f"v{self.name}" in {name for _, name in socket.if_nameindex()}:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def processes(self) -> list[psutil.Process]:
        """All of it, without its own."""
        assert self._machine is not None
        space, found = _spaces(self._machine.pid)[-1:], dict[int, psutil.Process]()
        for one in psutil.process_iter():
            if _spaces(one.pid)[-1:] == space:
                with contextlib.suppress(psutil.NoSuchProcess):  # a VMM may have namespaces of its own
                    found |= {each.pid: each for each in (one, *one.children(recursive=True))}
        del found[self._machine.pid]
        return [one for one in found.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def signal(self, number: signal.Signals) -> None:
        """To each of its processes, also those that are only just started."""
        told = set[int]()
        while left := [one for one in self.processes() if one.pid not in told]:
            for one in left:
                told.add(one.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)

    async def cut(self, how: str) -> None:
        """Its way to all others, until `mend`: 'down', the cable is out; 'drop', its packets go nowhere."""
        if how == "down":
            await _run("ip", "link", "set", f"v{self.name}", "down")
        else:
            drop = "add table inet cut; add chain inet cut c { type filter hook output priority 0; policy drop; }"
            await _run(*self.way, "nft", drop)
        self.cut_off = how

    async def mend(self) -> None:
        how, self.cut_off = self.cut_off, ""
        if how == "down":
            await _run("ip", "link", "set", f"v{self.name}", "up")
        elif how:
            await _run(*self.way, "nft", "delete table inet cut")

    def set_clock(self, seconds: int) -> None:
        """Wrong by so much. It is asked of each program that starts after `wrong_clock`."""
        file = os.open(self.place / "clock", os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            os.pwrite(file, struct.pack("=q", seconds), 0)
        finally:
            os.close(file)

    async def wrong_clock(self) -> None:
        """Before it boots. Needs a C compiler."""
        library = self.place / "clock.so"
        await _run("cc", "-O2", "-shared", "-fPIC", f'-DCLOCK="{self.place}/clock"', "-o", str(library), str(_SOURCE))
        (self.place / "etc" / "ld.so.preload").write_text(f"{library}\n")

    async def swarm(self, *argv: str, program: str = "main", **env: str) -> process.Completed:
        """A command that somebody types there."""
        line = [*self.way, sys.executable, "-m", f"swarm.cli.{program}", *argv]
        return await process.run(line, env=dict(os.environ) | env, timeout_seconds=300, check=False)


def _spaces(pid: int) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple(os.readlink(f"/proc/{pid}/ns/{name}") for name in ("net", "mnt", "uts"))  # noqa: PTH115
    return ()


async def _run(*argv: str) -> None:
    await process.run(argv)
