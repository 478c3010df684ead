"""The errors that Swarm raises on purpose.

::

    SwarmError                 exit status 1, unless noted
    ├── UsageError             the request makes no sense: exit status 2
    │   └── Invalid            a file from the user has problems, each with its line (base/manifest.py)
    ├── NotFound               something named in the request does not exist: exit status 2
    ├── Conflict               it exists, but its state forbids the request: exit status 2
    │   └── Busy               the VM slot is in use (vm/slots/inventory.py)
    ├── LeaseLost              this attempt no longer owns its step
    │   └── TicketWithdrawn    since somebody cancelled or deleted the ticket
    ├── StoreError             the database can't be used (locked, read-only, full, not migrated)
    │   ├── ChangeRefused      a trigger, an index or a constraint that Swarm did not make refused one change
    │   ├── Locked             another program holds its write lock: the same work may succeed later
    │   └── FilesChanged       its files were changed underneath an engine or a server: exit status 3
    ├── HostError              this host lacks something (a tool, a permission, a route, disk space)
    │   ├── CommandFailed      a program that Swarm ran exited with a status other than 0
    │   └── NoSpace            a disk is full or a quota used up: the same work may succeed later
    ├── GuestRefused           agentd refused one request: no such file, process, program…; the VM is well
    ├── ImageError             an image or template is missing or damaged, or can't be built
    │   └── NoImage            there is no default image
    └── StepError              an attempt failed, for a reason, and may be retryable
        ├── BootFailed         the VM didn't start, or never answered
        │   └── Refused        Firecracker refused a request (vm/drivers/firecracker_api.py)
        ├── ChannelError       the guest broke the protocol or the connection
        ├── AgentFailed        the agent's exit status, a signal, out of memory
        ├── AgentTimeout       the agent ran, or printed nothing, for too long
        │   └── GuestSilent    and the guest did not end it
        ├── LayerMissing       the agent's requirements were not built
        ├── OutputInvalid      output.json is missing, too large, not JSON, or doesn't fit the schema
        ├── NotConfigured      a key or secret that the agent needs is not on this host
        ├── OverBudget         the step's model calls used up a budget
        └── OutcomeUnknown     the VM died, so nobody knows how far the agent got

A message says what happened, to what, and what to do about it. The command line prints only the message; ``--debug``
adds the traceback.
"""

from __future__ import annotations

from typing import ClassVar

from swarm.model import FailureReason


class SwarmError(Exception):
    """A failure that Swarm understands. The message is for the user."""

    exit_status: ClassVar[int] = 1


class UsageError(SwarmError):
    exit_status = 2


class NotFound(SwarmError):
    exit_status = 2


class Conflict(SwarmError):
    exit_status = 2


class LeaseLost(SwarmError):
    """The attempt no longer owns its step: another attempt does, or the ticket has ended. Nothing was written."""


class TicketWithdrawn(LeaseLost):
    """Somebody cancelled or deleted the ticket while its attempt ran: wanted, not a fault."""


class StoreError(SwarmError):
    pass


class ChangeRefused(StoreError):
    """The database is well, but it refused one change, because of what another program added to it."""

    def __init__(self, why: object) -> None:
        super().__init__(
            f"the database refused the change: {' '.join(str(why).split())}; look for a trigger, an index or a "
            "constraint that Swarm did not make"
        )


class Locked(StoreError):
    pass


class FilesChanged(StoreError):
    """Somebody else removed, replaced or overwrote the database's files. A person must look before the next start, so a
    supervisor must not start the engine again by itself."""

    exit_status = 3


class HostError(SwarmError):
    pass


class CommandFailed(HostError):
    """A program exited with a status other than 0. ``stderr`` is the end of its error output, at most 4 KiB."""

    def __init__(self, message: str, *, returncode: int, stderr: str) -> None:
        super().__init__(message)
        self.returncode = returncode
        self.stderr = stderr


class NoSpace(HostError):
    pass


class GuestRefused(SwarmError):
    """agentd refused a request; the guest is well. ``kind``: the class of its error there, such as FileNotFoundError or
    CannotStart; ``said``: its words."""

    def __init__(self, op: str, kind: str, said: str) -> None:
        super().__init__(f"{op}: {said}")
        self.kind = kind
        self.said = said


class ImageError(SwarmError):
    pass


class NoImage(ImageError):
    """There is no image for agents that don't name one, so every other ticket would fail the same way."""


class StepError(SwarmError):
    """An attempt failed. ``reason`` is recorded; ``retryable`` says whether another attempt could succeed."""

    reason: FailureReason = FailureReason.AGENT_FAILED
    retryable: bool = False

    def __init__(self, message: str, *, reason: FailureReason | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.reason = reason if reason is not None else type(self).reason
        self.retryable = retryable if retryable is not None else type(self).retryable


class BootFailed(StepError):
    reason = FailureReason.BOOT_FAILED
    retryable = True


class ChannelError(StepError):
    reason = FailureReason.CHANNEL_BROKEN
    retryable = True


class LayerMissing(StepError):
    reason = FailureReason.LAYER_MISSING


class AgentFailed(StepError):
    reason = FailureReason.AGENT_FAILED
    retryable = True


class AgentTimeout(StepError):
    reason = FailureReason.TIMEOUT
    retryable = True


class GuestSilent(AgentTimeout):
    pass


class OutputInvalid(StepError):
    reason = FailureReason.OUTPUT_INVALID


class NotConfigured(StepError):
    reason = FailureReason.NOT_CONFIGURED


class OverBudget(StepError):
    """``outputs``: JSON text of what the agent left all the same, when a refused call made it end."""

    reason = FailureReason.OVER_BUDGET

    def __init__(self, message: str, *, outputs: str | None = None) -> None:
        super().__init__(message)
        self.outputs = outputs


class OutcomeUnknown(StepError):
    """The agent may or may not have finished. It is retried only if it is idempotent."""

    reason = FailureReason.VM_DIED


def no_more_threads(error: BaseException) -> bool:
    """Whether Python failed to start a thread because the kernel's limit, or the memory, is exhausted."""
    return isinstance(error, RuntimeError) and str(error).startswith(("can't start new thread", "can't allocate lock"))
