"""What VMs of QEMU and Firecracker share: a VMM process with log files, a serial console, agentd's address."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from swarm.base import process
from swarm.base.process import Child
from swarm.channel.dial import Endpoint
from swarm.errors import SwarmError
from swarm.vm.driver import AGENTD_PORT, Slot
from swarm.vm.drivers.console import Console, last_lines

_ANSWER_SECONDS = 5.0


class VmmVm(ABC):
    """The common part of `QemuVm` and `FirecrackerVm`. See `swarm.vm.driver.Vm`."""

    vmm: ClassVar[str]  # its name, for messages
    logs: ClassVar[Mapping[str, int]]  # log files in the VM's directory -> how many of their last lines an error has

    def __init__(
        self,
        *,
        child: Child,
        dir: Path,
        console: Console | None,
        slot: Slot | None,
    ) -> None:
        self.pid = child.pid
        self.dir = dir
        self.console = dir / "console.log"
        self.endpoint = slot.agentd if slot else Endpoint(port=AGENTD_PORT)
        self._child = child
        self._console_reader = console

    async def printed(self, text: bytes) -> None:
        assert self._console_reader, "only the console of a VM that ends with this process is read"
        await self._console_reader.printed(text)

    async def wait(self) -> str:
        return self._how_it_ended(await self._child.wait())

    async def doing(self) -> str:
        if self._child.returncode is not None:
            return self._how_it_ended(self._child.returncode)
        if process.is_stopped(self.pid):
            return f"{self.vmm} was stopped by a signal (`kill -CONT {self.pid}` continues it)"
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return f"{self.vmm} says that the VM is {await self._status()!r}"
        except (TimeoutError, OSError, SwarmError) as error:
            return f"{self.vmm} (pid {self.pid}) does not answer{f': {error}' if str(error) else ''}"

    @abstractmethod
    async def _status(self) -> str:
        """The VM's state, in the VMM's own word. Raises OSError, SwarmError."""

    def _how_it_ended(self, code: int) -> str:
        return f"{self.vmm} {process.how_it_ended(code)}"

    def last_output(self) -> str:
        """What the VMM printed last, or else the guest, for an error message."""
        lines = [line for name, count in self.logs.items() for line in last_lines(self.dir / name, lines=count)]
        return " | ".join(lines or last_lines(self.console, lines=3)) or "it printed nothing"
