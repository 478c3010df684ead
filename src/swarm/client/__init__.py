"""Swarm from Python: `Swarm` and, for asyncio, `AsyncSwarm`.

::

    from swarm.client import Swarm

    with Swarm() as s:
        print(s.tickets.submit("echo", inputs={"message": "hi"}).result())

It needs httpx and nothing else of Swarm's; docs/sdk.md shows the rest.
"""

from swarm.client.aio import AsyncApproval, AsyncSwarm, AsyncTicket
from swarm.client.aio_sandboxes import AsyncRunning, AsyncSandbox
from swarm.client.errors import (
    CommandFailed,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    RateLimited,
    SandboxEnded,
    ServerError,
    SwarmError,
    TicketFailed,
    TimedOut,
    Unauthorized,
    Unreachable,
)
from swarm.client.sync import Approval, Swarm, Ticket
from swarm.client.sync_sandboxes import Running, Sandbox
from swarm.client.values import (
    Agent,
    Attempt,
    Comparison,
    Costs,
    Details,
    Event,
    Executed,
    File,
    FileChange,
    GuestFile,
    Line,
    Output,
    Problem,
    Process,
    Run,
    Snapshot,
    Step,
    Submission,
    Workflow,
)

__all__ = [
    "Agent",
    "Approval",
    "AsyncApproval",
    "AsyncRunning",
    "AsyncSandbox",
    "AsyncSwarm",
    "AsyncTicket",
    "Attempt",
    "CommandFailed",
    "Comparison",
    "Conflict",
    "Costs",
    "Details",
    "Event",
    "Executed",
    "File",
    "FileChange",
    "Forbidden",
    "GuestFile",
    "Invalid",
    "Line",
    "NotFound",
    "Output",
    "Problem",
    "Process",
    "RateLimited",
    "Run",
    "Running",
    "Sandbox",
    "SandboxEnded",
    "ServerError",
    "Snapshot",
    "Step",
    "Submission",
    "Swarm",
    "SwarmError",
    "Ticket",
    "TicketFailed",
    "TimedOut",
    "Unauthorized",
    "Unreachable",
    "Workflow",
]
