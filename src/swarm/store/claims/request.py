"""What a claim is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from swarm.model import Claim
from swarm.store.claims import kept
from swarm.store.tickets.room import Room


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimRequest:
    worker: str
    limit: int
    lease_seconds: float
    ticket_id: str | None = None
    room: Room | None = None
    held: frozenset[str] = frozenset()  # attempts that this worker is executing
    idle: bool = True  # it is executing none, so it may run a suspect
    drain: bool = True  # it may take nothing more, until it is idle, for a suspect that has waited for long
    host: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)  # of that host
    queue_timeout_seconds: float | None = None
    host_timeout_seconds: float = kept.HOST_TIMEOUT_SECONDS


@dataclass(slots=True, kw_only=True)
class Claimed:
    claims: list[Claim] = field(default_factory=list)
    more: bool = False  # the transaction stopped at its limit of bad rows: claim again
    undecided: list[str] = field(default_factory=list)  # runs whose next decision is made outside the transaction
