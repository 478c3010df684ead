"""A command in a guest, as if it ran here: its streams, its signals, its exit status."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

import typer

from swarm.cli.frame import Cli
from swarm.errors import UsageError

if TYPE_CHECKING:
    from swarm.base.redact import Redactor
    from swarm.channel.conversation import Open
    from swarm.channel.processes import Ended
    from swarm.errors import GuestRefused

OWN_FAULT: Final = 125  # as env(1), nohup(1) and timeout(1) have them
CANT_START: Final = 126
NOT_FOUND: Final = 127

Words = Annotated[list[str], typer.Argument(metavar="COMMAND...", help="The command and its arguments.")]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="NAME[=VALUE]", help="A variable; without a value, this shell's."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """``tty``: None for a terminal if there is one here, on stdin and stdout."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str = "agent"
    timeout_seconds: float | None = None
    tty: bool | None = None


async def execute(cli: Cli, open: Open, command: Command, *, redactor: Redactor | None = None) -> int:  # noqa: A002
    """Run it to its end, joined to our streams. Returns its exit status. Raises SwarmError."""
    from swarm.channel import processes
    from swarm.cli.ui import terminal
    from swarm.errors import GuestRefused

    pty = terminal.both_are_terminals() if command.tty is None else command.tty
    order = processes.Order(
        argv=tuple(command.argv),
        env={"TERM": os.environ.get("TERM", "xterm"), **command.env} if pty else command.env,
        cwd=command.cwd,
        user=command.user,
        pty=terminal.size() if pty else None,
        timeout_seconds=command.timeout_seconds,
        open_stdin=True,
    )
    try:
        async with processes.start(open, order) as process:
            await terminal.joined(process, pty=pty, redactor=redactor)
            return status(cli, command.argv, await process.exit())
    except GuestRefused as refused:
        return not_started(cli, command.argv, refused)


def not_started(cli: Cli, argv: Sequence[str], refused: GuestRefused) -> int:
    """The exit status of a program that could not be started; raises what is refused for another reason."""
    if refused.kind != "CannotStart":
        raise refused
    cli.out.error(f"{shlex.quote(argv[0])} can't be started: {refused.said}")
    return NOT_FOUND if "No such file" in refused.said else CANT_START


def status(cli: Cli, argv: Sequence[str], ended: Ended) -> int:
    """The exit status for how it ended; what a status can't say is printed."""
    if ended.timed_out:
        cli.out.error(f"{shlex.join(argv)[:200]} was ended: its time was up")
    elif ended.oom:
        cli.out.note("the VM ran out of memory, and its kernel killed a program: give it more with --memory")
    return ended.status


def variables(given: Sequence[str]) -> dict[str, str]:
    """Of `--env`. Raises UsageError."""
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"--env {one[:100]!r}: write NAME=VALUE, or NAME for the value that it has here")
        if not equals:
            if name not in os.environ:
                raise UsageError(f"--env {name}: there is no such variable here; write {name}=VALUE")
            value = os.environ[name]
        found[name] = value
    return found
