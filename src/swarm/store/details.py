"""All that there is to see about one ticket."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.model import Ticket
from swarm.store import spending
from swarm.store.sql.database import Tx
from swarm.store.sql.rows import AttemptRow, RunRow, StepRow
from swarm.store.tickets import dependencies, tickets


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """Model calls of which the service did not say the cost."""

    calls: int
    usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketDetails:
    """``attempts``: of all steps; the step that each is of has its `step_id`."""

    ticket: Ticket
    runs: list[RunRow]
    steps: list[StepRow]
    attempts: list[AttemptRow]
    depends_on: list[str]
    estimated: Estimated


def details(tx: Tx, id: str) -> TicketDetails:
    """Raises NotFound."""
    calls, usd = spending.estimates(tx, id)
    return TicketDetails(
        ticket=tickets.ticket(tx, id),
        runs=tickets.runs(tx, id),
        steps=tickets.steps(tx, id),
        attempts=tickets.attempts(tx, id),
        depends_on=dependencies.depends_on(tx, id),
        estimated=Estimated(calls=calls, usd=usd),
    )
