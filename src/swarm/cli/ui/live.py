"""The live view of `swarm-engine start` in a terminal: the queue, running attempts, attempts that ended lately."""

from __future__ import annotations

import asyncio
import contextlib
import select
import shutil
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from swarm.base.printable import clean
from swarm.cli.ui.output import STATE_STYLES, can_draw, joined
from swarm.cli.ui.render import duration
from swarm.cli.ui.table import Column, laid_out
from swarm.errors import StoreError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from swarm.engine.dispatch import Dispatcher
    from swarm.engine.worker import Ended
    from swarm.model import Claim
    from swarm.store.sql.rows import QueueStatus
    from swarm.store.store import Store

REFRESH_SECONDS = 0.25
_COLUMNS = (
    Column("TICKET", least=36), Column("AGENT", drop=3), Column("ATTEMPT", drop=1, right=True),
    Column("VM", drop=2, right=True), Column("PHASE"), Column("TIME", right=True),
)  # fmt: skip
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
        rows = [_row(a.claim, a.vm_id, a.timeline.last, a.timeline.since_ms("claimed")) for a in running[:_RUNNING]] + [
            _row(e.claim, e.vm_id, type(e.outcome).__name__.lower() if e.outcome else "lost", e.timings.get("total"))
            for e in reversed(self._ends)
        ]
        return drawn(head, rows, shutil.get_terminal_size().columns)


def drawn(head: str, rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    """A line about the engine, and a table of attempts: those that run, and those that ended lately."""
    from rich.console import Group
    from rich.text import Text

    lines, _ = laid_out(_COLUMNS, rows, width)
    return Group(
        Text(clean(head), style="bold"),
        *(
            joined([(text, STATE_STYLES.get(given, "") if number else "bold") for text, given in line])
            for number, line in enumerate(lines)
        ),
    )


def _row(claim: Claim, vm: int | None, phase: str, ms: float | None) -> list[str]:
    cells = (_name(claim), claim.agent.name, claim.attempt_number, "" if vm is None else vm, phase, duration(ms))
    return [clean(cell) for cell in cells]


def _name(claim: Claim) -> str:
    """The ticket's id, and the step's in a workflow."""
    return claim.ticket.id if claim.step_id == "main" else f"{claim.ticket.id} {claim.step_id}"


def _terminal_reads() -> bool:
    poll = select.poll()
    poll.register(sys.__stdout__ or 1, select.POLLOUT)
    return bool(poll.poll(0))


def wanted(log_format: str) -> bool:
    return log_format == "auto" and can_draw(sys.stdout)
