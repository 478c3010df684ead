"""Swarm from Python: `Swarm` and, for asyncio, `AsyncSwarm`.

::

    from swarm.client import Swarm

    with Swarm() as s:
        print(s.tickets.submit("echo", inputs={"message": "hi"}).result())

It needs httpx and nothing else of Swarm's; docs/sdk.md shows the rest.
"""

from swarm.client.aio import AsyncApproval, AsyncSwarm, AsyncTicket
from swarm.client.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    RateLimited,
    ServerError,
    SwarmError,
    TicketFailed,
    TimedOut,
    Unauthorized,
    Unreachable,
)
from swarm.client.sync import Approval, Swarm, Ticket
from swarm.client.values import (
    Agent,
    Attempt,
    Costs,
    Details,
    Event,
    File,
    Line,
    Problem,
    Run,
    Step,
    Submission,
    Workflow,
)

__all__ = [
    "Agent",
    "Approval",
    "AsyncApproval",
    "AsyncSwarm",
    "AsyncTicket",
    "Attempt",
    "Conflict",
    "Costs",
    "Details",
    "Event",
    "File",
    "Forbidden",
    "Invalid",
    "Line",
    "NotFound",
    "Problem",
    "RateLimited",
    "Run",
    "ServerError",
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
