"""Run one ticket to its end: what `swarm-engine run-ticket` does. A workflow's steps run together, as many as may."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final

from swarm.base.aio import finish_uninterrupted
from swarm.engine.worker import Attempt, Worker
from swarm.errors import Conflict, SwarmError
from swarm.model import TERMINAL_TICKET_STATES, Claim, Ticket, TicketState
from swarm.store.store import Store

# While another worker has the ticket, or it waits for its next attempt, or for a person.
_LOOK_AGAIN_SECONDS: Final = 0.2

_REFUSALS: Final = {
    TicketState.DRAFT: "set its state to 'ready' first",
    TicketState.BLOCKED: "tickets that it depends on are not done",
    TicketState.DONE: "it was run; `swarm ticket show` has its outputs",
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
    left_mb: Callable[[Mapping[str, Attempt]], int] | None = None,
    waits: Callable[[Ticket], None] = lambda _: None,
) -> Ticket:
    """Claim the ticket and execute attempts until it has ended; the ticket as it then is.

    ``max_vms`` attempts at once at most, and while they fit into ``left_mb`` (the first is always tried). What another
    worker is running is waited for, and so is a person's word (``waits`` is called then, once each time).

    Raises NotFound, Conflict for a state that can't run, and SwarmError when it takes longer than ``timeout_seconds``
    (the ticket then goes back and the try is not counted).
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
                        continue  # that may have made steps ready
                    if not claims and not tasks:
                        check(ticket)
                    if ticket.state == TicketState.WAITING and not waiting:
                        waits(ticket)
                    waiting = ticket.state == TicketState.WAITING
                    await _next(tasks)
            finally:
                await finish_uninterrupted(_end(tasks))
    except TimeoutError:
        raise SwarmError(
            f"ticket {ticket_id} did not end within {timeout_seconds:g} s; an attempt of ours was put back, uncounted"
        ) from None


async def _claim(
    worker: Worker, ticket_id: str, free: int, left_mb: Callable[[Mapping[str, Attempt]], int] | None
) -> list[Claim]:
    if free <= 0:
        return []
    if left_mb is None or not worker.running:
        return await worker.claim(ticket_id=ticket_id, limit=free if left_mb is None else 1)
    return await worker.claim(ticket_id=ticket_id, limit=1, memory_mb=left_mb(worker.running))


async def _next(tasks: set[asyncio.Task[object]]) -> None:
    """Until one of our attempts has ended, or something may have changed. Raises what ended an attempt."""
    if not tasks:
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        return
    done, _ = await asyncio.wait(tasks, timeout=_LOOK_AGAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    tasks -= done
    for task in done:
        task.result()


async def _end(tasks: set[asyncio.Task[object]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def check(ticket: Ticket) -> None:
    """Raise Conflict if the ticket's state forbids running it. A state that nobody knows is left to the claim."""
    with contextlib.suppress(ValueError):
        refusal = _REFUSALS.get(TicketState(ticket.state))
        if ticket.state == TicketState.WAITING and ticket.run_id is None:  # by hand: nobody asks, so nobody answers
            refusal = "no run of it waits for anybody; set its state to 'ready'"
        if refusal:
            why = f"\nIts error: {ticket.error}" if ticket.error else ""
            raise Conflict(f"ticket {ticket.id} is '{ticket.state}' and can't be run: {refusal}{why}")
