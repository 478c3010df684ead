"""Wait for tickets: `swarm ticket wait`; and `--wait` of `swarm ticket add` and `swarm workflow run`, which prints a
line for each step that starts, waits or ends, and runs the ticket itself if no engine does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swarm.cli import service
from swarm.cli.frame import Cli
from swarm.cli.ui import render
from swarm.model import TERMINAL_TICKET_STATES, Event, StepStatus, Ticket, TicketState

if TYPE_CHECKING:
    from swarm.store.store import Store

_SHOWN = frozenset(StepStatus) - {StepStatus.PENDING, StepStatus.READY}
_POLL_SECONDS = 1.0  # in case no commit is noticed


async def to_the_end(cli: Cli, ticket: Ticket, *, only_outputs: bool = False) -> int:
    """Print what happens, on stderr, until the ticket has ended; if no engine runs, run it here. Then print the ticket,
    or ``only_outputs``. The exit status."""
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
    elif not only_outputs:
        render.show_ticket(cli.out, ended)
    elif ended.state == TicketState.DONE:
        cli.out.json_text(render.pretty(ended.outputs) or "{}")
    else:
        cli.out.error(f"ticket {ended.id} is {ended.state}: {ended.error or 'it has no error'}")
    return 0 if ended.state == "done" else 1


async def all_ended(cli: Cli, ids: Sequence[str], *, timeout_seconds: float | None) -> int:
    """Print each of these tickets when it has ended. The exit status: 1 if one was not done, or not in time."""
    left, said, done, ended = dict.fromkeys(ids), set[str](), True, list[Ticket]()
    async with cli.store() as store, store.watching() as wake:
        left = dict.fromkeys([(await store.ticket(id_)).id for id_ in left])
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    states = await store.ticket_states(list(left))
                    for id_ in list(left):
                        if id_ not in states:
                            cli.out.error(f"ticket {id_} was deleted")
                        elif states[id_] in TERMINAL_TICKET_STATES:
                            ended.append(await store.ticket(id_))
                            _say_end(cli, ended[-1])
                        else:
                            continue
                        del left[id_]
                        done = done and states.get(id_) == TicketState.DONE
                    if not left:
                        break
                    await _say_what_lacks(cli, store, {id_: states[id_] for id_ in left}, said)
                    # An engine that was killed commits nothing: then it is looked at once it has been silent for long.
                    await wake.changed(timeout_seconds=service.SILENT_AFTER_SECONDS)
        except TimeoutError:
            cli.out.error(f"not ended within {timeout_seconds:g} s: {_some(list(left))}")
            done = False
    if cli.out.json:
        cli.out.dump(ended)
    return 0 if done else 1


def _say_end(cli: Cli, ticket: Ticket) -> None:
    if not cli.out.json:
        why = (ticket.error or "").partition("\n")[0]
        cli.out.line(f"ticket {ticket.id} is {ticket.state}{f': {why}' if why else ''}")


async def _say_what_lacks(cli: Cli, store: Store, states: dict[str, str], said: set[str]) -> None:
    """What a person has to do before these tickets can end; each thing once."""
    words = {
        TicketState.DRAFT: "is a draft: `swarm ticket ready {}` lets it run",
        TicketState.WAITING: "waits for a person: `swarm ticket show {}` shows for what",
    }
    notes = [f"ticket {id_} {words[TicketState(s)].format(id_)}" for id_, s in states.items() if s in words]
    queued = [id_ for id_, state in states.items() if state in (TicketState.READY, TicketState.BLOCKED)]
    if queued and not any(service.is_alive(row) for row in await store.workers()):
        notes.append("no engine runs, so tickets stay ready: `swarm-engine start` runs them")
    for note in notes:
        if note not in said:
            said.add(note)
            cli.out.note(note)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


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
