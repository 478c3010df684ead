"""All that there is to see about one ticket."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from swarm.model import Snapshot, Ticket
from swarm.store import spending
from swarm.store.sandboxes import snapshots
from swarm.store.sandboxes.snapshots import SnapshotFilter
from swarm.store.sql.rows import AttemptRow, RunRow, StepRow
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import dependencies, tickets

KEPT: Final = 500
KEPT_OF: Final = partial(SnapshotFilter, kinds=("attempt",))
MOST: Final = 1000  # runs, steps and attempts each
_MOST_CHARS: Final = 16 << 20  # of steps' inputs and outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """Model calls of which the service did not say the cost."""

    calls: int
    usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketDetails:
    """``attempts``: the step that each is of has its `step_id`. ``kept``: VMs of its attempts, the newest first. Not
    ``complete``: there are more runs, steps or attempts; these are the newest, and those that wait for an answer."""

    ticket: Ticket
    runs: list[RunRow]
    steps: list[StepRow]
    attempts: list[AttemptRow]
    depends_on: list[str]
    estimated: Estimated
    kept: list[Snapshot]
    complete: bool


def details(tx: Tx, id: str) -> TicketDetails:
    """Raises NotFound."""
    calls, usd = spending.estimates(tx, id)
    runs, steps, attempts, complete = tickets.some(tx, id, limit=MOST, most_chars=_MOST_CHARS)
    return TicketDetails(
        ticket=tickets.ticket(tx, id),
        runs=runs,
        steps=steps,
        attempts=attempts,
        complete=complete,
        depends_on=dependencies.depends_on(tx, id),
        estimated=Estimated(calls=calls, usd=usd),
        kept=snapshots.page(tx, KEPT_OF(ticket_id=id), after=None, limit=KEPT).snapshots,
    )
