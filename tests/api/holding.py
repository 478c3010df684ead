"""An engine's part for sandboxes, without VMs: each is a real agentd, as a plain process of this host. It claims and
holds them by the store and listens on a live socket as an engine does. What is paused runs on, unseen."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from swarm.base import process
from swarm.base.aio import cancel_all
from swarm.channel.conversation import Conversation
from swarm.channel.guest import Guest
from swarm.engine import live
from swarm.live.wire import NotHeld
from swarm.model import Sandbox, SandboxClaim, SandboxState, Snapshot
from swarm.store.store import Store
from tests.channel.agentd_here import TOKEN, running
from tests.channel.agentd_here import Guest as Agentd

HOST = socket.gethostname()


class Engine:
    def __init__(self, store: Store, directory: Path, stack: AsyncExitStack) -> None:
        self.store, self.name = store, f"engine-{os.getpid()}"
        self._directory, self._stack = directory, stack
        self.held: dict[str, tuple[SandboxClaim, Guest]] = {}
        self._agentds: dict[str, Agentd] = {}
        self._snapshots = 0

    async def serve(self) -> None:
        async with self.store.watching() as wake:
            while True:
                for claim in await self.store.claim_sandboxes(self.name, HOST, lease_seconds=600, limit=10):
                    await self._hold(claim)
                renewal = await self.store.renew_sandboxes(
                    [one.hold_id for one, _ in self.held.values()], lease_seconds=600
                )
                for id, (claim, _) in list(self.held.items()):
                    if renewal.wanted.get(claim.hold_id) == "ended":
                        await self.end(id, by="renewal")
                await wake.changed(timeout_seconds=1)

    async def _hold(self, claim: SandboxClaim) -> None:
        id = claim.sandbox.id
        if not claim.resumes:
            directory = self._directory / str(len(self._agentds))
            directory.mkdir()
            self._agentds[id] = await self._stack.enter_async_context(running(directory))
        guest = Guest(self._agentds[id].vm.endpoint, TOKEN)
        self._stack.push_async_callback(guest.close)
        self.held[id] = claim, guest
        await self.store.sandbox_running(claim.hold_id, len(self._agentds))

    def _of(self, id: str) -> tuple[SandboxClaim, Guest]:
        if id not in self.held:
            raise NotHeld(f"the sandbox {id} is not held here")
        return self.held[id]

    @asynccontextmanager
    async def converse(
        self, id: str, op: str, fields: Mapping[str, object], payload: bytes, *, by: str
    ) -> AsyncIterator[Conversation]:
        async with self._of(id)[1].open(op, fields, payload) as conversation:
            yield conversation

    async def pause(self, id: str, *, by: str) -> None:
        claim, guest = self._of(id)
        del self.held[id]
        await guest.close()
        await self.store.sandbox_paused(claim.hold_id, self._snapshot("pause", claim.sandbox))

    def _snapshot(self, kind: str, of: Sandbox, name: str | None = None, *, secrets: bool = False) -> Snapshot:
        self._snapshots += 1
        return Snapshot(
            id=f"snap-{self._snapshots}", kind=kind, host=HOST, name=name, project_id=of.project_id, sandbox_id=of.id,
            size_bytes=1 << 20, secrets=secrets,
        )  # fmt: skip

    async def snapshot(
        self, id: str, *, by: str, name: str | None, keep_seconds: float | None, without_secrets: bool
    ) -> str:
        made = self._snapshot("named", self._of(id)[0].sandbox, name, secrets=not without_secrets)
        return (await self.store.add_snapshot(made, keep_seconds=keep_seconds, by=by)).id

    async def fork(self, id: str, *, by: str, count: int, name: str | None) -> Sequence[str]:
        parent = self._of(id)[0].sandbox
        names = [name and (name if count == 1 else f"{name}-{number}") for number in range(1, count + 1)]
        forks = [
            Sandbox(id="", state=SandboxState.STARTING, name=each, parent_id=id, project_id=parent.project_id)
            for each in names
        ]
        return [one.id for one in await self.store.add_sandboxes(forks, by=by)]

    async def end(self, id: str, *, by: str) -> None:
        claim, guest = self._of(id)
        del self.held[id]
        await guest.close()
        await self.store.sandbox_ended(claim.hold_id)


@asynccontextmanager
async def holding(store: Store, directory: Path) -> AsyncIterator[Engine]:
    """``directory``: with a short path; Unix sockets are in it."""
    async with AsyncExitStack() as stack:
        engine = Engine(store, directory, stack)
        path = await stack.enter_async_context(live.serving(engine, directory / "live"))
        info = {
            "live": str(path), "driver": "process", "max_vms": 4, "running": 0,
            "machine": process.machine(), "started": process.start_time(os.getpid()),
        }  # fmt: skip
        await store.heartbeat(engine.name, host=HOST, pid=os.getpid(), info=info)
        task = asyncio.create_task(engine.serve())
        try:
            yield engine
        finally:
            await cancel_all([task])
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
