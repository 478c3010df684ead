"""The engines of a kill campaign: started, frozen, healed and stopped."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import signal
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from swarm.app import wiring
from swarm.config import Settings
from swarm.vm.slots.inventory import VmRecord

LEASE_SECONDS = 3.0
ENGINES = 2


@dataclass(kw_only=True)
class Engines:
    settings: Settings
    seed: int
    max_vms: int
    engine_count: int = ENGINES
    lease_seconds: float = LEASE_SECONDS
    opened: AsyncExitStack = field(default_factory=AsyncExitStack)
    engines: dict[int, asyncio.subprocess.Process] = field(default_factory=dict)
    frozen: set[int] = field(default_factory=set)
    stalled: dict[int, int] = field(default_factory=dict)  # by engine: the end of its log that nobody reads

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.options: tuple[str, ...] = ()

    async def open(self) -> None:
        self.store = await self.opened.enter_async_context(wiring.store(self.settings))

    async def close(self) -> None:
        await self.opened.aclose()

    def pick(self) -> int:
        """An engine."""
        return self.random.randrange(self.engine_count)

    async def serves(self, number: int) -> bool:
        """Wait until this engine serves. False if it doesn't within minutes, or dies."""
        await self.heal(number)
        engine, until = self.engines[number], time.monotonic() + 300
        while engine.returncode is None and time.monotonic() < until:
            if any(row.pid == engine.pid for row in await self.store.workers()):
                return True
            await asyncio.sleep(0.05)
        return False

    def thaw(self, number: int) -> None:
        if number in self.frozen and self.engines[number].returncode is None:
            self.signal(number, signal.SIGCONT)
        self.frozen.discard(number)

    def signal(self, number: int, name: signal.Signals) -> None:
        self.engines[number].send_signal(name)

    async def heal(self, number: int) -> None:
        """What hinders this engine ends."""
        self.thaw(number)

    async def start(self, number: int) -> None:
        (log,) = self.random.choices((self.log_in_file, self.log_that_stalls, self.log_that_ends), (6, 1, 1))
        output = log(number)
        settings = self.settings_of(number)
        given = {
            "SWARM_STATE_DIR": settings.state_dir, "SWARM_IMAGES_DIR": settings.images,
            "SWARM_TEMPLATES_DIR": settings.templates, "SWARM_LEASE_SECONDS": self.lease_seconds,
            "SWARM_DRIVER": settings.driver, "SWARM_DATABASE_URL": settings.database_url,
            "SWARM_LABELS": json.dumps(settings.labels),
        }  # fmt: skip
        try:
            self.engines[number] = await asyncio.create_subprocess_exec(
                *self.way_to(number), "env", "--default-signal", sys.executable,  # SIGHUP under nohup
                "-m", "swarm.cli.engine", "start", "--foreground", f"--max-vms={self.most_vms(number)}",
                "--log-format=json", "--grace=5", *self.options, "--home", str(settings.home),
                env=os.environ | {name: str(value) for name, value in given.items()},
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        finally:
            os.close(output)

    def settings_of(self, number: int) -> Settings:
        return self.settings

    def most_vms(self, number: int) -> int:
        return self.max_vms

    def way_to(self, number: int) -> list[str]:
        """What starts a program where this engine runs."""
        return []

    def log(self, number: int) -> Path:
        return self.settings.home / f"engine-{number}.log"

    def last_lines(self) -> str:
        """Of each engine's log, if the last engine wrote into a file."""
        logs = [self.log(number) for number in self.engines if self.log(number).exists()]
        return "\n".join(f"{log.name}: {line}" for log in logs for line in log.read_text().splitlines()[-10:])

    def log_in_file(self, number: int) -> int:
        return os.open(self.log(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def log_that_stalls(self, number: int) -> int:
        """A pipe that nobody reads, and that is full soon."""
        self.forget_log(number)
        self.stalled[number], ours = os.pipe()
        fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, 4096)
        return ours

    def log_that_ends(self, number: int) -> int:
        """A pipe whose reader goes away, before or after the engine serves."""
        ours = self.log_that_stalls(number)
        asyncio.get_running_loop().call_later(self.random.uniform(0, 5), self.forget_log, number)
        return ours

    def forget_log(self, number: int) -> None:
        if (reader := self.stalled.pop(number, None)) is not None:
            os.close(reader)

    async def stop(self) -> dict[int, int]:
        """Send SIGTERM to all engines, once each serves: one that begins would just end. Returns the statuses but 0."""
        for number, engine in self.engines.items():
            if await self.serves(number):
                engine.terminate()
        ended = {number: await asyncio.wait_for(engine.wait(), 300) for number, engine in self.engines.items()}
        return {number: status for number, status in ended.items() if status and not self.why_ended(number)}

    def why_ended(self, number: int) -> str:
        """This engine, by itself; '' if it may not."""
        return ""

    async def kill(self) -> None:
        for engine in self.engines.values():
            if engine.returncode is None:
                engine.kill()
                await engine.wait()
        for number in range(self.engine_count):
            self.forget_log(number)

    def vms(self) -> list[VmRecord]:
        return wiring.inventory(self.settings).records()
