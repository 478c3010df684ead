"""Engines that hold sandboxes, in this process, and what tests ask of them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm import config
from swarm.app import setup, wiring
from swarm.channel import processes
from swarm.channel.conversation import Open
from swarm.channel.processes import Done, Order
from swarm.cli.prove import prove
from swarm.config import Settings
from swarm.engine.sandboxes import Sandboxes
from swarm.model import Event, Sandbox
from swarm.store.sandboxes.snapshots import SnapshotFilter, SnapshotPage
from swarm.store.sql.wake import FileWake
from swarm.store.store import Store
from swarm.vm.slots.inventory import VmRecord
from tests.conftest import PATIENCE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A database and what lies on this host's disk."""

    settings: Settings
    store: Store
    dir: Path

    no_snapshots = SnapshotPage(snapshots=[], after=None)

    @classmethod
    @asynccontextmanager
    async def at(cls, values: Mapping[str, Any]) -> AsyncIterator[Desk]:
        """A new home with these settings."""
        settings = config.load(**values)
        await setup.init(settings, image=False)
        async with wiring.store(settings) as store:
            yield cls(settings=settings, store=store, dir=settings.home)

    @property
    def database(self) -> Path:
        return self.settings.data_dir / "swarm.db"

    def sql(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        """As any tool would: plain SQL, another connection."""
        with sqlite3.connect(self.database, timeout=60) as connection:
            rows = connection.execute(statement, values).fetchall()
        connection.close()
        return rows

    def insert(self, id: str, **columns: object) -> None:
        row = {"id": id, **columns}
        self.sql(f"INSERT INTO sandboxes ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", *row.values())

    async def until(self, holds: Callable[[], Awaitable[bool]], *, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        async with FileWake.watching(self.database) as wake, asyncio.timeout(timeout_seconds):
            while not await holds():
                await wake.changed(timeout_seconds=0.1)

    async def state(self, id: str, *states: str) -> Sandbox:
        """The row, once it has one of these states."""

        async def there() -> bool:
            return (await self.store.sandbox(id)).state in states

        try:
            await self.until(there)
        except TimeoutError:
            raise AssertionError(f"not {states}: {await self.store.sandbox(id)}") from None
        return await self.store.sandbox(id)

    async def running(self, id: str) -> Sandbox:
        return await self.state(id, "running")

    async def one_of(self, *ids: str) -> str:
        """The first of these that runs."""
        found: list[str] = []

        async def one() -> bool:
            found.extend([id for id in ids if (await self.store.sandbox(id)).state == "running"])
            return bool(found)

        await self.until(one)
        return found[0]

    async def resumed(self, id: str) -> Sandbox:
        await self.store.want_sandbox(id, "running", by="test")
        return await self.running(id)

    async def story(self, id: str) -> list[Event]:
        return await self.store.sandbox_events(id)

    async def told(self, id: str, kind: str) -> list[Mapping[str, object]]:
        """Its events of one kind, once there is one."""

        async def there() -> bool:
            return any(event.kind == kind for event in await self.story(id))

        await self.until(there)
        return [event.data for event in await self.story(id) if event.kind == kind]

    @staticmethod
    def pauses_of(id: str) -> SnapshotFilter:
        return SnapshotFilter(sandbox_id=id, kinds=("pause",))

    async def gone(self) -> None:
        """No VM is left."""

        async def none() -> bool:
            return not self.vms()

        await self.until(none)

    async def settled(self) -> None:
        """No VM, no half snapshot; and nothing broken, as `swarm prove` says."""
        assert self.vms() == []
        assert [name for name in self.files() if name.startswith(".")] == []
        report = await prove(self.settings)
        assert report.kept, report.violations

    def vms(self) -> list[VmRecord]:
        return [record for record in wiring.inventory(self.settings).records() if record.pid]

    def files(self) -> list[str]:
        """Of snapshots."""
        place = self.settings.snapshots
        return sorted(one.name for one in place.iterdir()) if place.exists() else []

    @asynccontextmanager
    async def engine(self, *, most: int = 8, grace_seconds: float = 0.0) -> AsyncIterator[Sandboxes]:
        """Serves for the length of the block, and stops in good order."""
        async with wiring.dispatcher(
            self.settings, self.store, max_vms=1, max_sandboxes=most, grace_seconds=grace_seconds
        ) as dispatcher:
            task = asyncio.create_task(dispatcher.run())
            assert dispatcher.sandboxes is not None
            try:
                yield dispatcher.sandboxes
            finally:
                dispatcher.stop()
                await task


def opening(sandboxes: Sandboxes, id: str, by: str = "test") -> Open:
    def open_(op: str, fields: Mapping[str, object], payload: bytes) -> AbstractAsyncContextManager[Any]:
        return sandboxes.converse(id, op, fields, payload, by=by)

    return open_


async def background(sandboxes: Sandboxes, id: str, line: str) -> str:
    """Start a shell that outlives this; its process."""
    order = Order(argv=("/bin/sh", "-c", line), user="root", background=True)
    async with processes.start(opening(sandboxes, id), order):
        return order.process


async def run(sandboxes: Sandboxes, id: str, *argv: str, by: str = "test", **order: Any) -> Done:
    """A program in its guest, to its end."""
    return await processes.run(opening(sandboxes, id, by), Order(argv=argv, **order))


async def shell(sandboxes: Sandboxes, id: str, line: str) -> str:
    done = await run(sandboxes, id, "/bin/sh", "-c", line, user="root")
    assert done.ended.code == 0, (done.ended, done.stderr)
    return done.stdout.decode().strip()
