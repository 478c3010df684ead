"""Runs of one ticket, without an engine that serves them all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from swarm.app import wiring
from swarm.base.progress import Progress, silent
from swarm.config import Settings

if TYPE_CHECKING:
    from swarm.model import Ticket
    from swarm.store.sql.rows import AttemptRow


async def run_ticket(
    settings: Settings,
    ticket_id: str,
    *,
    timeout_seconds: float | None = None,
    waits: Callable[[Ticket], None] = lambda _: None,
    progress: Progress = silent,
) -> tuple[Ticket, list[AttemptRow]]:
    """Run one ticket to its end in this process. See `swarm.engine.run_once.run_ticket`."""
    from swarm.base.aio import quietly
    from swarm.engine import kept, run_once
    from swarm.engine.room import Memory

    async with wiring.store(settings) as opened:
        run_once.check(await opened.ticket(ticket_id))  # before the worker is prepared
        async with wiring.worker(settings, opened, progress=progress) as ours:
            ticket = await run_once.run_ticket(
                opened,
                ours,
                ticket_id,
                timeout_seconds=timeout_seconds,
                max_vms=wiring.default_max_vms(),
                left_mb=None if settings.driver == "process" else Memory.of_this_host().left_mb,
                waits=waits,
            )
        if ticket.workflow_id is not None:  # there may be no engine that removes what its steps left
            await quietly(kept.collect(opened, wiring.snapshots(settings)))
        return ticket, await opened.attempts(ticket_id)


async def run_ticket_in_background(settings: Settings, ticket_id: str, *, timeout_seconds: float | None = None) -> int:
    """Start a process that runs the ticket and outlives this one; its pid. Raises NotFound, Conflict."""
    from swarm.base import process
    from swarm.engine import run_once
    from swarm.gateway import upstreams

    async with wiring.store(settings) as opened:
        run_once.check(await opened.ticket(ticket_id))
    log = settings.data_dir / "run-ticket.log"
    argv = [sys.executable, "-m", "swarm.cli.engine", "run-ticket", "--wait", "--json", "--driver", settings.driver]
    if timeout_seconds is not None:
        argv += ["--timeout", f"{timeout_seconds:g}"]
    # With the keys of the gateway's services: the gateway runs in that process.
    keys = upstreams.variables(wiring.upstreams(settings))
    env = {name: value for name, value in os.environ.items() if name.startswith("SWARM_") or name in keys}
    child = await process.spawn(
        [*argv, "--home", str(settings.home), "--", ticket_id], output=log, env=env, die_with_parent=False
    )
    return child.pid
