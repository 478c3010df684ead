"""Functions whose results may be handed out before they are on the disk (sql/threads.py)."""

from __future__ import annotations

from typing import Final

from swarm.store.registry import schedules, secrets, workers
from swarm.store.runs import artifacts
from swarm.store.sandboxes import holding, taking
from swarm.store.tickets import tickets

# After a power failure no agent runs, so these tell nobody anything: heartbeats; of a store's own Finisher, what agents
# print, leases and VM numbers; and of its WorkflowEngine, items of fan-outs that have not begun. Who holds a sandbox,
# and that its VM runs: none does then, so it is paused, and its snapshot whole or found to be damaged; or it is started
# anew.
_WRITTEN: Final = (workers.heartbeat, taking.take, holding.running, holding.renew, holding.used)
# What engines ask for themselves.
_READ: Final = (
    *(tickets.due, schedules.due, secrets.of_names, artifacts.referred),
    *(taking.due, taking.candidates, holding.expired),
)
UNTOLD: Final = (*_WRITTEN, *_READ)
