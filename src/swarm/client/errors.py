"""What the SDK raises.

::

    SwarmError
    ├── Unreachable     no server answers, or the connection broke: `may_be_done` says whether it may have been done
    ├── Unauthorized    401: no token, or not a valid one
    ├── Forbidden       403: the token's role or project isn't enough
    ├── NotFound        404
    ├── Conflict        409: its state forbids it
    ├── Invalid         any other 4xx: the request makes no sense
    ├── RateLimited     429, also after all tries
    ├── ServerError     5xx, or an answer that isn't Swarm's
    ├── TimedOut        (and TimeoutError) the ticket has not ended in time; it goes on
    ├── TicketFailed    the ticket has ended and is not done: `ticket`
    ├── SandboxEnded    the sandbox has ended, or is lost: `sandbox`
    └── CommandFailed   the command in a sandbox did not end with 0: `executed`

The message of an answer is the server's own sentence, the one that the command line prints.
"""

from __future__ import annotations

from typing import Final

from swarm.client.values import Executed, SandboxFields, TicketFields


class SwarmError(Exception):
    """``status``: of the answer, if there was one."""

    status: int | None = None


class Unreachable(SwarmError):
    def __init__(self, message: str, *, may_be_done: bool = False) -> None:
        super().__init__(message)
        self.may_be_done = may_be_done


class Unauthorized(SwarmError):
    pass


class Forbidden(SwarmError):
    pass


class NotFound(SwarmError):
    pass


class Conflict(SwarmError):
    pass


class Invalid(SwarmError):
    pass


class RateLimited(SwarmError):
    pass


class ServerError(SwarmError):
    pass


class TimedOut(SwarmError, TimeoutError):
    pass


class TicketFailed(SwarmError):
    def __init__(self, ticket: TicketFields) -> None:
        super().__init__(f"the ticket {ticket.id} is {ticket.state}: {ticket.error or 'it has no error'}")
        self.ticket = ticket


class SandboxEnded(SwarmError):
    def __init__(self, sandbox: SandboxFields) -> None:
        said = f": {sandbox.error}" if sandbox.error else ""
        super().__init__(f"the sandbox {sandbox.name or sandbox.id} is {sandbox.state}{said}")
        self.sandbox = sandbox


class CommandFailed(SwarmError):
    def __init__(self, executed: Executed) -> None:
        how = "was out of time" if executed.timed_out else f"ended with status {executed.code}"
        how = how if executed.signal is None or executed.timed_out else f"was ended by signal {executed.signal}"
        last = executed.stderr.strip().rpartition("\n")[2][:300]
        super().__init__(f"the command {how}" + (f": {last}" if last else ""))
        self.executed = executed


_KINDS: Final = {401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 429: RateLimited}


def refused(status: int, detail: str) -> SwarmError:
    """The error of an answer with this status."""
    error = _KINDS.get(status, Invalid if 400 <= status < 500 else ServerError)(detail)
    error.status = status
    return error
