"""The VMs of sandboxes: made from nothing or from a snapshot, saved, and put to sleep.

What only the engine knows of a VM lies beside the files of its pause: the gateway's tokens, which the programs of the
resumed VM still use, and which of these run in the background. A fork gets new tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from swarm.agents import Installed
from swarm.base import files
from swarm.base.aio import quietly
from swarm.base.clock import Timeline
from swarm.base.log import logger
from swarm.channel import processes
from swarm.channel.guest import Guest
from swarm.engine.conversing import exit_of
from swarm.engine.egress import Egress
from swarm.engine.engine import AGENT_DIR, ImageSource, LayerSource, vm_spec
from swarm.engine.held import Held
from swarm.errors import ChannelError, GuestRefused, SwarmError
from swarm.ledger import Account
from swarm.model import Agent, SandboxClaim, Snapshot
from swarm.store.sandboxes import rows
from swarm.vm import driver
from swarm.vm.launcher import Assignment, Launcher, LiveVm
from swarm.vm.snapshots import Snapshots, spec_as_json

log = logger(__name__)

_KEPT_FILE: Final = "held.json"
_ASK_SECONDS: Final = 2.0


def agent_of(claim: SandboxClaim) -> Agent:
    """What the VM is like and what it may do: the agent's settings, and over them the sandbox's own. One without an
    agent has the usual settings."""
    sandbox = claim.sandbox
    base = claim.agent or Agent(id="", name="", version="", path=Path(), entry=(), runtime="exec")
    names = ("image", "vcpus", "disk_mb", "network")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(sandbox, name)) is not None}
    if sandbox.secrets:
        given["secrets"] = tuple(json.loads(sandbox.secrets) or ())
    if claim.snapshot is not None and (size := rows.disk_mb(claim.snapshot.spec)) is not None:
        given["disk_mb"] = size
    env = {**base.env, **(json.loads(sandbox.env or "{}") or {})}
    return replace(base, memory_mb=claim.memory_mb, env=env, **given)


class Machines:
    """``at_once``: so many are started at the same time, and as many saved. ``host``: this one's name."""

    def __init__(
        self,
        *,
        launcher: Launcher,
        snapshots: Snapshots,
        images: ImageSource,
        layers: LayerSource,
        egress: Egress,
        installed: Installed,
        at_once: int,
        host: str,
    ) -> None:
        self._launcher, self.snapshots = launcher, snapshots
        self._images, self._layers, self._egress, self._installed = images, layers, egress, installed
        self._starting, self._saving = asyncio.Semaphore(at_once), asyncio.Semaphore(at_once)
        self.host = host

    @asynccontextmanager
    async def started(self, held: Held, runs: Callable[[int], Awaitable[None]]) -> AsyncIterator[LiveVm]:
        """Its VM, for the length of the block. ``runs`` is called with its number before any program of a snapshot goes
        on; what it raises ends the VM. The last bills are written when the block has ended. Raises SwarmErrors of what
        it lacks, or of what went wrong."""
        claim = held.claim
        if claim.agent is not None:
            held.agent = replace(held.agent, path=(await self._installed.here(claim.agent)).path)
        grant = await self._egress.granted(held.agent, _account(held), to=held.name)
        if claim.snapshot is not None and (names := rows.secrets(claim.snapshot.spec)):
            former = await self._egress.former(names)
            grant = replace(grant, former={n: it for n, it in former.items() if it not in grant.secrets.values()})
        async with self._egress.attempt(grant, held.record) as egress:
            held.egress, timeline = egress, Timeline()

            async def prepare(live: LiveVm) -> None:
                held.vm_id = live.n
                await egress.open(lambda port: self._launcher.listen(live, port), tokens=self._kept(held))
                if claim.snapshot is None and claim.agent is not None:
                    await live.while_alive(live.channel.put_tree(held.agent.path, dest=AGENT_DIR, owner="root"))
                await runs(live.n)

            try:
                async with self._vm(held, timeline, prepare) as live:
                    held.record("started", {"vm": live.n, "timings": timeline.phases()})
                    yield live
            finally:
                egress.stop()

    @asynccontextmanager
    async def _vm(
        self, held: Held, timeline: Timeline, prepare: Callable[[LiveVm], Awaitable[None]]
    ) -> AsyncIterator[LiveVm]:
        claim, assignment, launcher = held.claim, Assignment(sandbox_id=held.id), self._launcher
        async with AsyncExitStack() as stack:
            if claim.snapshot is None:  # another host may have to send them, and others start meanwhile
                image = await self._images.find(held.agent.image)
                spec = vm_spec(held.agent, image, await self._layers.find(held.agent, image))
                if spec.interpreter:  # its programs are started, none is run by an interpreter that waits
                    spec = replace(spec, interpreter=False, preload=())
            async with self._starting:
                if claim.snapshot is not None:
                    found = await self.snapshots.find(claim.snapshot.id)
                    start = launcher.restored(found, assignment, timeline, fork=not claim.resumes, prepare=prepare)
                    live = await stack.enter_async_context(start)
                else:
                    live = await stack.enter_async_context(launcher.vm(spec, assignment, timeline))
                    await prepare(live)
            yield live

    async def pause(self, held: Held, live: LiveVm) -> Snapshot:
        """Its snapshot; its VM has ended. After an error it goes on. Raises BootFailed, NoSpace, HostError."""
        await self._tell_ends(held, live)
        async with self._saving, self.snapshots.stage(held.sandbox.project_id) as stage:
            tokens = held.egress.tokens if held.egress is not None else {}
            kept = json.dumps({"tokens": tokens, "background": sorted(held.background)})
            with stage.explained():
                await asyncio.to_thread(files.write_atomically, stage.dir / _KEPT_FILE, kept, mode=0o600)
            return self._row(held, await self._launcher.pause(live, stage), kind="pause")

    async def save(self, held: Held, live: LiveVm, *, kind: str, name: str | None = None) -> Snapshot:
        """A snapshot of it; it goes on. Raises BootFailed, NoSpace, HostError."""
        async with self._saving, self.snapshots.stage(held.sandbox.project_id) as stage:
            made = await self._launcher.save(live, stage)
            return replace(self._row(held, made, kind=kind), name=name)

    def _row(self, held: Held, made: driver.Snapshot, *, kind: str) -> Snapshot:
        return Snapshot(
            id=made.id,
            kind=kind,
            host=self.host,
            project_id=held.sandbox.project_id,
            sandbox_id=held.id,
            spec=json.dumps(spec_as_json(made.spec) | {"secrets": _secrets(held)}),
            digest=made.digest,
            size_bytes=made.size_bytes,
            secrets=held.secret,
        )

    async def used_up(self, held: Held) -> None:
        """It runs, in the files of its snapshot: what is left of that goes."""
        if held.claim.resumes and held.claim.snapshot is not None:
            await quietly(self.snapshots.remove(held.claim.snapshot.id))

    async def is_whole(self, snapshot: Snapshot) -> bool:
        """Can it still be resumed?"""
        try:
            await self.snapshots.find(snapshot.id)
        except SwarmError:
            return False
        return True

    def _kept(self, held: Held) -> dict[str, str]:
        """The gateway's tokens, of a VM that is resumed. Its snapshot was verified."""
        if not held.claim.resumes or held.claim.snapshot is None:
            return {}
        try:
            kept = json.loads((self.snapshots.dir / held.claim.snapshot.id / _KEPT_FILE).read_bytes())
        except FileNotFoundError:
            return {}
        held.background |= set(kept["background"])
        tokens: dict[str, str] = kept["tokens"]
        return tokens

    async def _tell_ends(self, held: Held, live: LiveVm) -> None:
        """How processes in the background ended that nobody has waited for."""
        if not held.background:
            return
        guest = Guest(live.vm.endpoint, live.identity.token)
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                found = await processes.processes(guest.open)
                for one in found:
                    if one.process in held.background and one.ended is not None:
                        held.background.discard(one.process)
                        held.record("exit", {"process": one.process, **exit_of(asdict(one.ended))})
                held.background &= {one.process for one in found}  # the guest forgets those that ended long ago
        except (ChannelError, GuestRefused, TimeoutError) as error:
            log.warning("can't ask a sandbox for its processes", sandbox=held.id, error=str(error))
        finally:
            await guest.close()


def _secrets(held: Held) -> list[tuple[str, str]]:
    """Names of what may be in its memory, each with the agent for which it is looked up: never the values."""
    before = rows.secrets(held.claim.snapshot.spec) if held.claim.snapshot is not None else []
    return sorted({*before, *((name, held.agent.name) for name in held.agent.secrets)})


def _account(held: Held) -> Account:
    sandbox = held.sandbox
    return Account(
        ticket_id=None,
        run_id="",
        step_execution_id="",
        step_id="",
        attempt_id=held.claim.hold_id,
        agent_id=held.agent.id,
        agent_name=held.agent.name,
        sandbox_id=sandbox.id,
    )
