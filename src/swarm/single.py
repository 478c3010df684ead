"""Run one ticket to its end: what `swarm-engine run-ticket` does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from swarm.errors import Conflict, SwarmError
from swarm.model import TERMINAL_TICKET_STATES, Ticket, TicketState
from swarm.store.store import Store
from swarm.worker import Worker

# While another worker has the ticket, or it waits for its next attempt.
_LOOK_AGAIN_SECONDS: Final = 0.2

_REFUSALS: Final = {
    TicketState.DRAFT: "set its state to 'ready' first",
    TicketState.BLOCKED: "tickets that it depends on are not done",
    TicketState.WAITING: "it waits for an approval",
    TicketState.DONE: "it was run; `swarm ticket show` has its outputs",
    TicketState.FAILED: "`swarm ticket retry` makes it ready again",
    TicketState.CANCELLED: "`swarm ticket retry` makes it ready again",
}


async def run_ticket(store: Store, worker: Worker, ticket_id: str, *, timeout_seconds: float | None = None) -> Ticket:
    """Claim the ticket and execute attempts until it has ended; the ticket as it then is.

    One that another worker is running is waited for. Raises NotFound, Conflict for a state that can't run, and
    SwarmError when it takes longer than ``timeout_seconds`` (the ticket then goes back and the try is not counted).
    """
    check(await store.ticket(ticket_id))
    try:
        async with asyncio.timeout(timeout_seconds), worker.supervised():
            while True:
                claims = await worker.claim(ticket_id=ticket_id)
                for claim in claims:
                    await worker.attempt(claim)
                ticket = await store.ticket(ticket_id)
                if ticket.state in TERMINAL_TICKET_STATES:
                    return ticket
                if not claims:
                    check(ticket)
                    await asyncio.sleep(_LOOK_AGAIN_SECONDS)
    except TimeoutError:
        raise SwarmError(
            f"ticket {ticket_id} did not end within {timeout_seconds:g} s; an attempt of ours was put back, uncounted"
        ) from None


def check(ticket: Ticket) -> None:
    """Raise Conflict if the ticket's state forbids running it. A state that nobody knows is left to the claim."""
    with contextlib.suppress(ValueError):
        refusal = _REFUSALS.get(TicketState(ticket.state))
        if refusal:
            why = f"\nIts error: {ticket.error}" if ticket.error else ""
            raise Conflict(f"ticket {ticket.id} is '{ticket.state}' and can't be run: {refusal}{why}")
