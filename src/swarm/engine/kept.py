"""VMs that outlive their attempt, as snapshots: for a person who looks into them, and for steps that start in forks.

The files come first, then the row that names them: what has no row is collected.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from swarm.base.aio import finish_uninterrupted
from swarm.base.log import logger
from swarm.channel import guest_files
from swarm.channel.conversation import Open
from swarm.engine.values import OUTPUT_FILE
from swarm.errors import HostError, ImageError, NoSpace, NotFound, StepError, StoreError, SwarmError
from swarm.model import Claim, FailureReason, KeepVm, Snapshot
from swarm.store.store import Store
from swarm.vm import driver
from swarm.vm.launcher import Launcher, LiveVm
from swarm.vm.snapshots import Snapshots, spec_as_json

log = logger(__name__)

EVENT: Final = "vm_kept"
WORK_DIR, AGENT_DIR = "/work", "/agent"


class Rows(Protocol):
    async def add_snapshot(
        self, snapshot: Snapshot, *, keep_seconds: float | None = None, by: str | None = None
    ) -> Snapshot: ...

    async def snapshot_ids(self, host: str | None) -> set[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """Writes and finds them on this host, which has the name ``host`` in the database. ``rows``: the store."""

    launcher: Launcher
    snapshots: Snapshots
    rows: Rows
    host: str

    async def source(self, claim: Claim) -> driver.Snapshot | None:
        """The snapshot in a fork of which the step starts. Raises StepError if it is gone or damaged."""
        if claim.source is None:
            return None
        try:
            if claim.source:
                return await self.snapshots.find(claim.source)
            why = "it was removed"
        except (NotFound, ImageError) as error:
            why = str(error)
        raise StepError(
            f"the VM that the step starts from is not there any more: {why}; `swarm ticket retry` makes it again",
            reason=FailureReason.HOST_ERROR, retryable=False,
        )  # fmt: skip

    async def leave(self, claim: Claim, live: LiveVm) -> str | None:
        """For steps that start in forks of this one's VM: a snapshot of it, which goes on. Returns its id. Raises
        SwarmError: without it, the step is not done."""
        if not claim.is_source:
            return None
        try:
            made = await self._write(claim, live, kind="step", pause=False, keep_seconds=None)
        except NoSpace as error:  # not put back, as before its start: its work is done, and would be done again
            said = f"its VM can't be kept for the steps that start from it: {error}"
            raise StepError(said, reason=FailureReason.HOST_ERROR, retryable=False) from None
        return made.id

    async def keep(self, claim: Claim, live: LiveVm, *, failed: bool) -> Mapping[str, object] | None:
        """For a person, if anybody wants that: a snapshot of the VM, which ends. What there is to tell. Never raises a
        SwarmError: the attempt has ended, and this is no part of it."""
        if claim.keep_vm is KeepVm.NEVER or (claim.keep_vm is KeepVm.FAILURE and not failed):
            return None
        try:
            made = await self._write(claim, live, kind="attempt", pause=True, keep_seconds=claim.keep_vm_seconds)
        except SwarmError as error:
            log.warning("the VM of an attempt could not be kept", ticket=claim.ticket.id, error=str(error))
            return {"error": f"the VM could not be kept: {error}"}
        return {"snapshot": made.id, "bytes": made.size_bytes, "seconds": claim.keep_vm_seconds, "host": made.host}

    async def _write(
        self, claim: Claim, live: LiveVm, *, kind: str, pause: bool, keep_seconds: float | None
    ) -> Snapshot:
        async with self.snapshots.stage(claim.ticket.project_id) as stage:
            write = self.launcher.pause if pause else self.launcher.save
            made = await write(live, stage)
            names = [(name, claim.agent.name) for name in claim.agent.secrets]
            row = Snapshot(
                id=made.id,
                kind=kind,
                host=self.host,
                project_id=claim.ticket.project_id,
                ticket_id=claim.ticket.id,
                step_id=claim.step_id,
                attempt_id=claim.attempt_id,
                spec=json.dumps(spec_as_json(made.spec) | {"secrets": names}),
                digest=made.digest,
                size_bytes=made.size_bytes,
                secrets=bool(claim.agent.secrets) or claim.source is not None,
            )
            return await add(self.rows, self.snapshots, row, keep_seconds=keep_seconds)


async def add(
    rows: Rows, snapshots: Snapshots, made: Snapshot, *, keep_seconds: float | None, by: str | None = None
) -> Snapshot:
    """Its row; without one, its files go. The answer may get lost when the row is there already."""
    try:
        return await finish_uninterrupted(rows.add_snapshot(made, keep_seconds=keep_seconds, by=by))
    except BaseException as error:
        named = await finish_uninterrupted(forsake(rows, snapshots, made.id))
        if named and isinstance(error, StoreError):
            return made
        raise


async def forsake(rows: Rows, snapshots: Snapshots, id: str) -> bool:
    """Remove the files of a snapshot that was to have a row; False: it has none. Where that can't be known, the files
    stay, and are collected if no row names them."""
    try:
        if id in await rows.snapshot_ids(None):
            return True
        await snapshots.remove(id)
    except (StoreError, HostError) as error:
        log.warning("the files of a snapshot may be left for a while", snapshot=id, error=str(error))
    return False


async def collect(store: Store, snapshots: Snapshots) -> None:
    """Remove from this host what nothing needs any more: what has expired, what steps of ended runs left, and what dead
    processes left half made. Raises StoreError, HostError."""
    host, before = await store.this_host(), set[str]()
    while (expired := {one.id for one in await store.expired_snapshots(host)}) - before:
        for id in expired:
            await snapshots.remove(id)
        await store.forget_snapshots(expired)
        before = expired  # another program may keep the rows
    await snapshots.collect(await store.snapshot_ids(None))  # this host may have had another name


async def clear(live: LiveVm) -> None:
    """Remove what the agent before left in a fork that the next one could take for its own. Processes stay."""
    await live.while_alive(_clear(live.channel.converse))


async def _clear(guest: Open) -> None:
    names = [f"{AGENT_DIR}/{one.name}" for one in (await guest_files.list_dir(guest, AGENT_DIR, user="root")).entries]
    for name in (*names, f"{WORK_DIR}/{OUTPUT_FILE}"):
        with contextlib.suppress(NotFound):
            await guest_files.remove(guest, name, user="root", recursive=True)
