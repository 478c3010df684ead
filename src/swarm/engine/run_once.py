"""`swarm-engine run-ticket`: run one ticket to its end. Steps of a workflow run side by side where they can.

Not a `Dispatcher`, which serves every ticket until it is stopped: this loop ends with its ticket, raises the error of
an attempt at once, starts no schedules, and is not listed as an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Final

from swarm.base.aio import cancel_all, finish_uninterrupted
from swarm.engine.room import VmInUse, of_attempts
from swarm.engine.worker import Worker
from swarm.errors import Conflict, SwarmError
from swarm.model import TERMINAL_TICKET_STATES, Claim, Ticket, TicketState
from swarm.store.store import Store
from swarm.store.tickets.room import Room

# How often to look while another worker runs the ticket, or while it waits for its next attempt or for a person.
_LOOK_AGAIN_SECONDS: Final = 0.2

_REFUSALS: Final = {
    TicketState.DRAFT: "set its state to 'ready' first",
    TicketState.BLOCKED: "tickets that it depends on are not done",
    TicketState.DONE: "it has already run; `swarm ticket show` has its outputs",
    TicketState.FAILED: "`swarm ticket retry` makes it ready again",
    TicketState.CANCELLED: "`swarm ticket retry` makes it ready again",
}


async def run_ticket(
    store: Store,
    worker: Worker,
    ticket_id: str,
    *,
    timeout_seconds: float | None = None,
    max_vms: int = 1,
    left_mb: Callable[[Iterable[VmInUse]], int] | None = None,
    waits: Callable[[Ticket], None] = lambda _: None,
) -> Ticket:
    """Claim the ticket and execute attempts until it has ended. Returns the ended ticket.

    At most ``max_vms`` attempts run at once, as long as they fit into ``left_mb`` (the first one is always tried).
    Waits for attempts of other workers, and for a person's answer (``waits`` is then called, once for each wait).

    Raises NotFound, Conflict for a state that can't run, and SwarmError when it takes longer than ``timeout_seconds``
    (the ticket then goes back and the attempt is not counted).
    """
    check(await store.ticket(ticket_id))
    tasks: set[asyncio.Task[object]] = set()
    waiting = False
    try:
        async with asyncio.timeout(timeout_seconds), worker.supervised():
            try:
                while True:
                    claims = await _claim(worker, ticket_id, max_vms - len(tasks), left_mb)
                    tasks |= {asyncio.create_task(worker.attempt(claim)) for claim in claims}
                    ticket = await store.ticket(ticket_id)
                    if ticket.state in TERMINAL_TICKET_STATES and not tasks:
                        return ticket
                    if not claims and await store.decided():
                        continue  # a decision may have made steps ready
                    if not claims and not tasks:
                        check(ticket)
                    if ticket.state == TicketState.WAITING and not waiting:
                        waits(ticket)
                    waiting = ticket.state == TicketState.WAITING
                    await _next(tasks)
            finally:
                await finish_uninterrupted(cancel_all(tasks))
    except TimeoutError:
        raise SwarmError(
            f"ticket {ticket_id} did not end within {timeout_seconds:g} s; its running attempts were put back and are "
            "not counted"
        ) from None


async def _claim(
    worker: Worker, ticket_id: str, free: int, left_mb: Callable[[Iterable[VmInUse]], int] | None
) -> list[Claim]:
    if free <= 0 or any(attempt.claim.alone for attempt in worker.running.values()):
        return []
    if left_mb is None or not worker.running:
        return await worker.claim(ticket_id=ticket_id, limit=free if left_mb is None else 1)
    left = left_mb(of_attempts(worker.running.values()))
    return await worker.claim(ticket_id=ticket_id, limit=1, room=Room(memory_mb=left))


async def _next(tasks: set[asyncio.Task[object]]) -> None:
    """Wait until one of our attempts has ended, or it is time to look again. Raises the error of an attempt."""
    if not tasks:
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        return
    done, _ = await asyncio.wait(tasks, timeout=_LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    tasks -= done
    for task in done:
        task.result()


def check(ticket: Ticket) -> None:
    """Raise Conflict if the ticket's state forbids running it. Unknown states are left to the claim."""
    with contextlib.suppress(ValueError):
        refusal = _REFUSALS.get(TicketState(ticket.state))
        if ticket.state == TicketState.WAITING and ticket.run_id is None:  # set manually: no question to answer
            refusal = "it has no run that waits for an answer; set its state to 'ready'"
        if refusal:
            why = f"\nIts error: {ticket.error}" if ticket.error else ""
            raise Conflict(f"ticket {ticket.id} is '{ticket.state}' and can't be run: {refusal}{why}")
