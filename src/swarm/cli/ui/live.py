"""The live view of `swarm-engine start` in a terminal: the queue, running attempts, attempts that ended lately."""

from __future__ import annotations

import asyncio
import contextlib
import select
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from swarm.cli.ui.output import STATE_STYLES, clean
from swarm.cli.ui.render import duration
from swarm.errors import StoreError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from swarm.engine.dispatch import Dispatcher
    from swarm.engine.worker import Ended
    from swarm.model import Claim
    from swarm.store.sql.rows import QueueStatus
    from swarm.store.store import Store

REFRESH_SECONDS = 0.25
_ENDS = 8
_RUNNING = 24


class View:
    """Pass every attempt that ends to `ended`; `showing` draws the view for the length of its block."""

    def __init__(self) -> None:
        self._ends: deque[Ended] = deque(maxlen=_ENDS)

    def ended(self, ended: Ended) -> None:
        self._ends.append(ended)

    @asynccontextmanager
    async def showing(self, dispatcher: Dispatcher, store: Store) -> AsyncIterator[None]:
        from rich.console import Console
        from rich.live import Live

        console = Console(highlight=False, markup=False, emoji=False)
        live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=True)
        with contextlib.suppress(OSError):
            live.start()
        drawing = asyncio.create_task(self._draw(live.update, dispatcher, store))
        try:
            yield
        finally:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
            if _terminal_reads():
                with contextlib.suppress(OSError):
                    live.stop()

    async def _draw(self, update: object, dispatcher: Dispatcher, store: Store) -> None:
        assert callable(update)
        while True:
            queue = None
            with contextlib.suppress(StoreError):
                queue = await store.queue()
            # A terminal that is gone or stopped (Ctrl+S) must not end or stop the engine that it shows.
            if _terminal_reads():
                with contextlib.suppress(OSError):
                    update(self.render(dispatcher, queue), refresh=True)
            await asyncio.sleep(REFRESH_SECONDS)

    def render(self, dispatcher: Dispatcher, queue: QueueStatus | None) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        running = list(dispatcher.running.values())
        head = f"{'stopping, ' if dispatcher.stopping else ''}{len(running)} of {dispatcher.max_vms} VMs"
        if queue is not None:
            head += f" · {queue.ready} ready, {queue.delayed} in back-off, {queue.blocked} blocked"
            if queue.waiting:
                head += f", {queue.waiting} waiting for a person"
            if queue.oldest_ready_ms:
                head += f" · oldest ready {duration(queue.oldest_ready_ms)}"
        head += f" · {dispatcher.per_minute} ended in the last minute"
        if dispatcher.waits_for and queue is not None and queue.ready:
            head += f" · waiting for {dispatcher.waits_for}"
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("TICKET", "AGENT", "ATTEMPT", "VM", "PHASE", "TIME"):
            table.add_column(column, overflow="ellipsis", no_wrap=True)
        for attempt in running[:_RUNNING]:
            claim, age = attempt.claim, attempt.timeline.since_ms("claimed")
            cells = (
                _name(claim),
                claim.agent.name,
                claim.attempt_number,
                attempt.vm_id or "",
                attempt.timeline.last,
            )
            table.add_row(*(Text(clean(cell)) for cell in cells), Text(duration(age)))
        for ended in reversed(self._ends):
            outcome = type(ended.outcome).__name__.lower() if ended.outcome else "lost"
            past = (_name(ended.claim), ended.claim.agent.name, ended.claim.attempt_number, ended.vm_id or "")
            table.add_row(
                *(Text(clean(cell), style="dim") for cell in past),
                Text(outcome, style=STATE_STYLES.get(outcome, "")),
                Text(duration(ended.timings.get("total")), style="dim"),
            )
        return Group(Text(clean(head), style="bold"), table)


def _name(claim: Claim) -> str:
    """The ticket's id, and the step's in a workflow."""
    return claim.ticket.id if claim.step_id == "main" else f"{claim.ticket.id} {claim.step_id}"


def _terminal_reads() -> bool:
    poll = select.poll()
    poll.register(sys.__stdout__ or 1, select.POLLOUT)
    return bool(poll.poll(0))


def wanted(log_format: str) -> bool:
    return log_format == "auto" and sys.stdout.isatty()
