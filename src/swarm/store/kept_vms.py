"""Kept VMs of a ticket's attempts, for a person who looks into them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from swarm.errors import Conflict, NotFound
from swarm.model import Snapshot
from swarm.store import comparison
from swarm.store.details import KEPT, KEPT_OF
from swarm.store.store import Store

_EVENT: Final = "vm_kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptVm:
    """``number``: of the attempt, among those of its step."""

    snapshot: Snapshot
    ticket_id: str
    step_id: str
    number: int


async def kept(store: Store, ticket_id: str) -> list[Snapshot]:
    """Those that are there, the newest first."""
    return (await store.snapshot_page(KEPT_OF(ticket_id=ticket_id), limit=KEPT)).snapshots


async def find(store: Store, ref: str, *, step: str | None = None) -> KeptVm:
    """The newest that ``TICKET[:STEP][:NUMBER]`` means. Raises NotFound, with what to do, and Conflict if it is on
    another host."""
    ticket_id, named, number = await comparison.parsed(store, ref)
    step = step or named
    attempts = [one for one in await store.attempts(ticket_id) if step in (None, one.step_id)]
    if step is not None and not attempts:
        raise NotFound(f"the ticket {ticket_id} has no attempt of a step {step!r}")
    tried = Counter[str]()
    numbers: dict[str, int] = {}
    for one in attempts:
        tried[one.step_id] += 1
        if number in (None, tried[one.step_id]):
            numbers[one.id] = tried[one.step_id]
    if number is not None and not numbers:
        there = f"there are the attempts 1 to {max(tried.values())}" if tried else "there is no attempt yet"
        raise NotFound(f"{ref}: {there}")
    for snapshot in await kept(store, ticket_id):
        if snapshot.attempt_id in numbers:
            if snapshot.host != (here := await store.this_host()):
                raise Conflict(
                    f"the VM was kept on the host {snapshot.host}, and this is {here}: run the command there"
                )
            return KeptVm(
                snapshot=snapshot, ticket_id=ticket_id, step_id=snapshot.step_id or "",
                number=numbers[snapshot.attempt_id],
            )  # fmt: skip
    raise NotFound(await _why_none(store, ticket_id, numbers))


async def _why_none(store: Store, ticket_id: str, attempts: dict[str, int]) -> str:
    for event in await store.history(ticket_id):
        if event.kind == _EVENT and event.attempt_id in attempts:
            if "error" in event.data:
                return f"the ticket {ticket_id}: {event.data['error']}"
            gone = "and is gone: its time was over, or it was removed"
            return f"the VM of the ticket {ticket_id} was kept at {event.at}, {gone}"
    return (
        f"no VM of the ticket {ticket_id} was kept. Say `keep_vm: failure` (or `always`) in agent.yaml or in a step of "
        "the workflow, or `--keep-vm failure` in `swarm ticket add` (the column keep_vm); then run it again"
    )
