"""`swarm workflow run --wait`: print a line for each step that starts, waits or ends, until the ticket has ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from swarm.cli import service
from swarm.cli.frame import Cli
from swarm.cli.ui import render
from swarm.model import TERMINAL_TICKET_STATES, Event, StepStatus, Ticket, TicketState

if TYPE_CHECKING:
    from swarm.store.store import Store

_SHOWN = frozenset(StepStatus) - {StepStatus.PENDING, StepStatus.READY}
_POLL_SECONDS = 1.0  # in case no commit is noticed


async def to_the_end(cli: Cli, ticket: Ticket) -> int:
    """Print what happens, on stderr, until the ticket has ended; if no engine runs, run it here. The exit status."""
    from swarm.app import wiring

    here = None
    async with cli.store() as store:
        if not any(service.is_alive(row) for row in await store.workers()):
            cli.out.note(f"no engine runs: ticket {ticket.id} runs here")
            here = asyncio.create_task(wiring.run_ticket(cli.settings, ticket.id))
        try:
            ended = await _follow(cli, store, ticket.id, here)
        finally:
            if here is not None:
                here.cancel()
                await asyncio.gather(here, return_exceptions=True)
        runs, steps = await store.runs(ticket.id), await store.steps(ticket.id)
    if cli.out.json:
        cli.out.dump({"ticket": ended, "runs": runs, "steps": steps})
    else:
        render.show_ticket(cli.out, ended)
    return 0 if ended.state == "done" else 1


async def _follow(cli: Cli, store: Store, id_: str, here: asyncio.Task[object] | None) -> Ticket:
    after, waiting = 0, False
    async with store.watching() as wake:
        while True:
            ticket = await store.ticket(id_)  # read before its events, since it has none after its end
            while events := await store.events(id_, after=after):
                after = events[-1].seq
                for event in events:
                    _show(cli, event)
            if ticket.state in TERMINAL_TICKET_STATES:
                if here is not None:
                    await here  # until its VMs are gone
                return ticket
            if ticket.state == TicketState.WAITING and not waiting:
                for step in await store.steps(id_):
                    if step.status == StepStatus.WAITING:
                        asked = f"step {step.step_id} asks: {step.question}" if step.question else step.step_id
                        cli.out.note(f"{asked}\n`swarm ticket approve {id_}`, or `swarm ticket reject {id_} --why …`")
            waiting = ticket.state == TicketState.WAITING
            if here is not None and here.done():
                here.result()
            await wake.changed(timeout_seconds=_POLL_SECONDS)


def _show(cli: Cli, event: Event) -> None:
    to = event.data.get("to")
    if event.kind != "transition" or event.data.get("of") != "step" or to not in _SHOWN:
        return
    number = event.data.get("number")
    again = f" (try {number})" if isinstance(number, int) and number > 1 else ""
    why = str(event.data.get("error") or "").partition("\n")[0]
    cli.out.note(f"{event.at[11:19]}  {to:<9}  {event.step_id}{again}{f': {why}' if why else ''}")
