"""`swarm-engine unit`: a systemd unit for an engine of this home."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from swarm.cli.frame import Cli
from swarm.errors import FilesChanged, UsageError

# How long after the grace a stop may still take: VMs are killed, outcomes written, slots removed.
_AFTER_GRACE_SECONDS: Final = 60
_LONGEST_GRACE_SECONDS: Final = 7 * 86400

_UNIT: Final = """\
# Written by `swarm-engine unit`. To change it: `systemctl edit swarm-engine`.
[Unit]
Description=Swarm engine
After=local-fs.target network.target time-sync.target

[Service]
Type=exec
ExecStart={program} start --foreground --grace={grace:g}{options}
Environment={home}
# A stop tells the engine, which pauses its sandboxes, lets tickets end for as long as the grace says, and then ends its
# VMs itself. What is left after TimeoutStopSec is killed.
KillMode=mixed
KillSignal=SIGTERM
TimeoutStopSec={stop_seconds}
# A fault (exit status 1) is started again: steps of the engine that ended are taken over. A wrong option ({usage}), or
# a database that was changed underneath ({changed}), needs a person first.
Restart=on-failure
RestartSec=5
RestartPreventExitStatus={usage} {changed}
# A VM takes about ten descriptors and a few threads.
LimitNOFILE=1048576
TasksMax=infinity
# A VM that the kernel kills for want of memory fails its own ticket, and must not stop the engine.
OOMPolicy=continue

[Install]
WantedBy=multi-user.target
"""


async def unit(
    cli: Cli,
    grace: Annotated[
        float,
        typer.Option(
            "--grace", min=0, max=_LONGEST_GRACE_SECONDS, metavar="S", help="As of start; a stop may take that longer."
        ),
    ] = 60.0,
    max_vms: Annotated[
        int | None, typer.Option("--max-vms", min=1, max=60000, metavar="N", help="As of start.")
    ] = None,
    max_sandboxes: Annotated[
        int | None, typer.Option("--max-sandboxes", min=0, max=60000, metavar="N", help="As of start.")
    ] = None,
    warm: Annotated[str | None, typer.Option("--warm", metavar="N|auto", help="As of start.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="As of start.")] = False,
) -> None:
    """Print a systemd unit for an engine of this home: for /etc/systemd/system/swarm-engine.service."""
    given = {"--max-vms": max_vms, "--max-sandboxes": max_sandboxes, "--warm": warm}
    options = "".join(f" {name}={value}" for name, value in given.items() if value is not None)
    options += " --serve" if serve else ""
    if warm is not None and not (warm == "auto" or warm.isdecimal()):
        raise UsageError(f"--warm takes a number of VMs, or auto, not {warm!r}")
    program = Path(sys.executable).parent / "swarm-engine"
    text = _UNIT.format(
        program=_quoted(str(program)),  # systemd takes a $ in it as it is
        home=_quoted(f"SWARM_HOME={cli.settings.home.absolute()}"),
        grace=grace,
        options=options,
        stop_seconds=round(grace) + _AFTER_GRACE_SECONDS,
        usage=UsageError.exit_status,
        changed=FilesChanged.exit_status,
    )
    sys.stdout.write(text)


def _quoted(text: str) -> str:
    """As systemd.syntax(7) reads it; % begins its specifiers."""
    if any(ord(char) < 32 for char in text):
        raise UsageError(f"a systemd unit can't name {text!r}, which has control characters")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
