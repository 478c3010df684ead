"""Wait for tickets: `swarm ticket wait`; and `--wait` of `swarm ticket add` and `swarm workflow run`, which prints a
line for each step that starts, waits or ends, and runs the ticket itself if no engine does. What agents print, and how
to have a ticket run that nothing runs."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from swarm.base.log import LINES
from swarm.cli import service
from swarm.cli.frame import Cli
from swarm.cli.ui import render
from swarm.cli.ui.output import first_line
from swarm.errors import SwarmError
from swarm.model import TERMINAL_TICKET_STATES, Event, StepStatus, Ticket, TicketState
from swarm.store.tickets.output import OutputLines, shown

if TYPE_CHECKING:
    from swarm.store.store import Store

_SHOWN = frozenset(StepStatus) - {StepStatus.PENDING, StepStatus.READY}
_POLL_SECONDS = 1.0  # in case no commit is noticed
_EVENTS = 64  # at once: each may be 16 KiB of text, and leases are renewed meanwhile
_NEEDS_ENGINE = frozenset({TicketState.READY, TicketState.BLOCKED, TicketState.IN_PROGRESS})


async def to_the_end(cli: Cli, ticket: Ticket, *, only_outputs: bool = False) -> int:
    """Print what happens, on stderr, until the ticket has ended; if no engine runs, run it here. Then print the ticket,
    or ``only_outputs``. The exit status."""
    from swarm.app import ticket_runs

    here = None
    async with cli.store() as store:
        if not await service.has_engine(store):
            cli.out.note(f"no engine runs: ticket {ticket.id} runs here")
            here = asyncio.create_task(
                ticket_runs.run_ticket(cli.settings, ticket.id, progress=lambda step, _: cli.out.note(step))
            )
        try:
            ended = await _follow(cli, store, ticket.id, here)
        finally:
            if here is not None:
                here.cancel()
                await asyncio.gather(here, return_exceptions=True)
        runs, steps = await store.runs(ticket.id), await store.steps(ticket.id)
        names = await store.names((ended.agent_id, ended.workflow_id))
    if cli.out.json:
        cli.out.dump({"ticket": ended, "runs": runs, "steps": steps})
    elif not only_outputs:
        render.show_ticket(cli.out, ended, names)
    elif ended.state == TicketState.DONE:
        cli.out.json_text(render.pretty(ended.outputs) or "{}")
    else:
        cli.out.error(f"ticket {ended.id} is {ended.state}: {ended.error or 'it has no error'}")
    return 0 if ended.state == "done" else 1


async def all_ended(cli: Cli, ids: Sequence[str], *, timeout_seconds: float | None) -> int:
    """Print each of these tickets when it has ended. The exit status: 1 if one was not done, or not in time."""
    from swarm.store.registry.workers import SILENT_AFTER_SECONDS

    said, done, ended = set[str](), True, list[Ticket]()
    async with cli.store() as store, store.watching() as wake:
        left = dict.fromkeys([await store.ticket_id(id_) for id_ in ids])
        end = None if timeout_seconds is None else asyncio.get_running_loop().time() + timeout_seconds
        try:
            async with asyncio.timeout(None) as limit:
                while True:
                    states = await store.ticket_states(list(left))
                    for id_ in list(left):
                        if id_ not in states:
                            cli.out.error(f"ticket {id_} was deleted")
                        elif states[id_] in TERMINAL_TICKET_STATES:
                            ended.append(await store.ticket(id_))
                            if not cli.out.json:
                                cli.out.line(_how_it_ended(ended[-1]))
                        else:
                            continue
                        del left[id_]
                        done = done and states.get(id_) == TicketState.DONE
                    if not left:
                        break
                    limit.reschedule(end)  # after the first look: with 0 s, too, a ticket that has ended is found
                    await _say_what_lacks(cli, store, {id_: states[id_] for id_ in left}, said)
                    # An engine that was killed commits nothing: then it is looked at once it has been silent for long.
                    await wake.changed(timeout_seconds=SILENT_AFTER_SECONDS)
        except TimeoutError:
            cli.out.error(f"not ended within {timeout_seconds:g} s: {_some(list(left))}")
            done = False
    if cli.out.json:
        cli.out.dump(ended)
    return 0 if done else 1


def _how_it_ended(ticket: Ticket) -> str:
    why = first_line(ticket.error)
    return f"ticket {ticket.id} is {ticket.state}{f': {why}' if why else ''}"


async def _say_what_lacks(cli: Cli, store: Store, states: dict[str, str], said: set[str]) -> None:
    """What a person has to do before these tickets can end; each thing once."""
    words = {
        TicketState.DRAFT: "is a draft: `swarm ticket ready {}` lets it run",
        TicketState.WAITING: "waits for a person: `swarm ticket show {}` shows for what",
    }
    notes = [f"ticket {id_} {words[TicketState(s)].format(id_)}" for id_, s in states.items() if s in words]
    queued = [id_ for id_, state in states.items() if state in (TicketState.READY, TicketState.BLOCKED)]
    if queued and not await service.has_engine(store):
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
                        cli.out.note(asked)
                        cli.out.note(f"`swarm ticket approve {id_}`, or `swarm ticket reject {id_} --why …`")
            waiting = ticket.state == TicketState.WAITING
            if here is not None and here.done():
                here.result()
            await wake.changed(timeout_seconds=_POLL_SECONDS)


def _show(cli: Cli, event: Event) -> None:
    if event.kind == "template":
        cli.out.note(_template(event))
    to = event.data.get("to")
    if event.kind != "transition" or event.data.get("of") != "step" or to not in _SHOWN:
        return
    number = event.data.get("number")
    again = f" (try {number})" if isinstance(number, int) and number > 1 else ""
    why = first_line(str(event.data.get("error") or ""))
    cli.out.note(f"{event.at[11:19]}  {to:<9}  {event.step_id}{again}{f': {why}' if why else ''}")


def _template(event: Event) -> str:
    return making_template(event.data.get("about_seconds"))


def making_template(seconds: object) -> str:
    about = f": about {seconds:.0f} s" if isinstance(seconds, int | float) else ""
    return f"making a template of the VM, once per image and agent size{about}"


async def say_if_unserved(cli: Cli, store: Store, ticket: Ticket) -> None:
    """One line if the ticket is to run and nothing takes tickets: it would wait for ever, and nobody would know."""
    if cli.out.json or ticket.state not in _NEEDS_ENGINE or await service.is_served(cli.settings, store, ticket.id):
        return
    alone = ""
    if ticket.state != TicketState.BLOCKED:
        alone = f", or run this ticket: `swarm-engine run-ticket {shlex.quote(ticket.id)} --wait`"
    cli.out.note(f"no engine serves {cli.settings.home}: start one with `swarm-engine start`{alone}")


def status(cli: Cli, ticket: Ticket) -> int:
    """Say how the followed ticket ended; the exit status."""
    if not cli.out.json:
        cli.out.note(_how_it_ended(ticket))
    return 0 if ticket.state == TicketState.DONE else 1


class Output:
    """What a ticket's agents print, line by line, named by their steps if there are several. `more` prints what is
    new."""

    def __init__(self, cli: Cli, store: Store, id_: str, *, after: int = 0, write: Callable[[str], object]) -> None:
        self._cli, self._store, self._id, self._after = cli, store, id_, after
        self._write = write
        self._lines = OutputLines()
        self._steps: set[str] = set()

    async def more(self) -> None:
        while events := await self._store.events(self._id, after=self._after, limit=_EVENTS):
            if len(self._steps) < 2 and {event.step_id for event in events if event.kind == "output"} - self._steps:
                self._steps = {step.step_id for step in await self._store.steps(self._id)}
            self._after = events[-1].seq
            for event in events:
                self._add(event)

    def _add(self, event: Event) -> None:
        if self._cli.out.json:
            self._cli.out.dump_line(event)
        elif event.kind == "template":
            self._cli.out.note(_template(event))
        else:
            self._print(self._lines.add(event))

    def _print(self, lines: Iterable[tuple[str, str]]) -> None:
        for step, line in lines:
            self._write(shown(step, line, named=len(self._steps) > 1))

    def end(self) -> None:
        """Print what has no line end yet."""
        self._print(self._lines.end())


@asynccontextmanager
async def live(cli: Cli, store: Store, id_: str) -> AsyncIterator[None]:
    """While the block runs, what the ticket's agents print from now on goes to stderr, written by a thread: a reader
    that stalls holds up neither agents nor leases, and is told how many lines it missed."""
    if cli.out.json:
        yield
        return
    output = Output(cli, store, id_, after=await store.last_event(id_), write=LINES.write)

    async def follow() -> None:
        async with store.watching() as wake:
            while True:
                await output.more()
                await wake.changed(timeout_seconds=_POLL_SECONDS)

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(SwarmError):  # to show it is not what the command is for
            await output.more()
        output.end()
        LINES.finish()
