"""Every error that Swarm raises on purpose.

::

    SwarmError
    ├── UsageError             the caller's request makes no sense        exit 2, HTTP 400
    ├── NotFound               a named thing does not exist               exit 2, HTTP 404
    ├── Conflict               it exists, in a state that forbids this    exit 2, HTTP 409
    ├── LeaseLost              this attempt no longer owns its step
    ├── StoreError             the database can't be used (locked, read-only, full, not migrated)
    ├── HostError              this host lacks something (a tool, a right, a route, space)
    │   └── CommandFailed      a program that Swarm ran ended badly
    ├── ImageError             an image or template is missing, torn or can't be built
    │   └── NoImage            the one that every agent here gets that asks for none
    └── StepError(reason, retry)
        ├── BootFailed         no VM, or a VM that never answered
        ├── ChannelError       the guest broke the protocol or the connection
        ├── AgentFailed        exit status, signal, out of memory
        ├── AgentTimeout       ran, or was silent, for too long
        ├── LayerMissing       what the agent's manifest asks for was not built
        ├── OutputInvalid      no output.json, not JSON, too large
        ├── NotConfigured      a key or secret that the agent needs is not on this host
        ├── OverBudget         its model calls came to the end of a budget
        └── OutcomeUnknown     the VM died and nobody knows how far the agent got

A message says what happened, to what, and what to do about it. The CLI prints the message alone;
a traceback needs ``--debug``.
"""

from __future__ import annotations

from typing import ClassVar

from swarm.model import FailureReason


class SwarmError(Exception):
    """Something went wrong that Swarm understands; the message is meant for the user."""

    exit_status: ClassVar[int] = 1


class UsageError(SwarmError):
    exit_status = 2


class NotFound(SwarmError):
    exit_status = 2


class Conflict(SwarmError):
    exit_status = 2


class LeaseLost(SwarmError):
    """The attempt no longer owns its step: another attempt does, or the ticket was ended. Nothing was written."""


class StoreError(SwarmError):
    pass


class HostError(SwarmError):
    pass


class CommandFailed(HostError):
    """A program ended with a status other than 0.

    ``stderr`` holds the end of what it printed there (at most 4 KiB).
    """

    def __init__(self, message: str, *, returncode: int, stderr: str) -> None:
        super().__init__(message)
        self.returncode = returncode
        self.stderr = stderr


class ImageError(SwarmError):
    pass


class NoImage(ImageError):
    """There is no image for agents that ask for none: the next ticket would fail by it as well."""


class StepError(SwarmError):
    """An attempt can't succeed. ``reason`` is recorded; ``retryable`` says if another attempt may help."""

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


class OutputInvalid(StepError):
    reason = FailureReason.OUTPUT_INVALID


class NotConfigured(StepError):
    reason = FailureReason.NOT_CONFIGURED


class OverBudget(StepError):
    reason = FailureReason.OVER_BUDGET


class OutcomeUnknown(StepError):
    """The agent may or may not have finished. Only an idempotent agent is tried again."""

    reason = FailureReason.VM_DIED


def no_more_threads(error: BaseException) -> bool:
    """Is it what Python's threading raises when the kernel has no room for a thread, or memory none for its lock?"""
    return isinstance(error, RuntimeError) and str(error).startswith(("can't start new thread", "can't allocate lock"))
