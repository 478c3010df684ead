"""Print every table and view, one after the other, as the commands do: run by test_golden.py under terminals and pipes.

Each begins with a line of its own: U+001E and its name.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import Final

from swarm.cli import engine, main
from swarm.cli.frame import start
from swarm.cli.ui import doctor_report, live, output
from swarm.doctor import Check, Status
from swarm.doctor.capacity import Capacity, Cost

COMMANDS: Final = {
    "agent-layers": "swarm agent layers",
    "agent-list": "swarm agent list",
    "agent-show": "swarm agent show echo",
    "artifact-list": "swarm artifact list",
    "cost": "swarm cost --by model",
    "engine-status": "swarm-engine status",
    "help-command": "swarm vm spawn -h",
    "help-group": "swarm secret -h",
    "help-run": "swarm run -h",
    "help-sandbox": "swarm sandbox -h",
    "host-list": "swarm host list",
    "image-list": "swarm image list",
    "sandbox-list": "swarm sandbox list --all",
    "sandbox-show": "swarm sandbox show build",
    "secret-list": "swarm secret list",
    "snapshot-list": "swarm snapshot list",
    "template-list": "swarm template list",
    "ticket-diff": "swarm ticket diff 019c1f6e-0000-7000-8000-000000000001 release-3:build",
    "ticket-files": "swarm ticket files 019c1f6e-0000-7000-8000-000000000001",
    "ticket-list": "swarm ticket list",
    "ticket-logs": "swarm ticket logs 019c1f6e-0000-7000-8000-000000000001",
    "ticket-show": "swarm ticket show 019c1f6e-0000-7000-8000-000000000001",
    "ticket-show-failed": "swarm ticket show 019c1f6e-0000-7000-8000-000000000002",
    "ticket-show-workflow": "swarm ticket show release-3",
    "usage-error": "swarm ticket list --nope",
    "vm-list": "swarm vm list",
    "workflow-graph": "swarm workflow graph fan-out-demo",
    "workflow-list": "swarm workflow list",
    "workflow-schedules": "swarm workflow schedules",
    "workflow-show": "swarm workflow show echo-chain",
}
CHECKS: Final = [
    Check(name="rights", status=Status.OK, detail="root"),
    Check(
        name="kernel: kvm", status=Status.WARN, detail="no /dev/kvm: QEMU emulates, ten times slower", fix="enable it"
    ),
    Check(name="disk: VMs", status=Status.FAIL, detail="12 MB are free in /var/lib/swarm", fix="swarm template rm"),
    Check(name="VM 1: link", status=Status.OK, detail="up"),
    Check(name="VM 1: agentd", status=Status.OK, detail="answers"),
]


def doctor() -> None:
    doctor_report.show(output.Out(), CHECKS)


def capacity() -> None:
    limits = {"memory": 25, "disk": 12, "descriptors": 4000}
    found = Capacity(
        memory_mb=256, vcpus=1, disk_mb=2048, cores=2,
        cost=Cost(private_mb=40, shared_mb=120, disk_mb=3, descriptors=12, threads=4),
        idle=limits, full={name: value // 3 for name, value in limits.items()},
    )  # fmt: skip
    doctor_report.show_capacity(output.Out(), found)


def engine_view() -> None:
    from rich.console import Console

    rows = [
        ["019c1f6e-0000-7000-8000-000000000001", "claude-code", "1", "7", "agent", "41.20 s"],
        ["release-3 publish", "shell", "2", "12", "boot", "310 ms"],
        ["日本語のチケット", "echo", "1", "3", "succeeded", "1.02 s"],
        ["t-9", "echo", "1", "", "lost", ""],
    ]
    head = "2 of 4 VMs · 3 ready, 0 in back-off, 1 blocked · 12 ended in the last minute"
    width = shutil.get_terminal_size().columns
    Console(highlight=False, markup=False, emoji=False).print(live.drawn(head, rows, width))


OTHERS: Final[dict[str, Callable[[], None]]] = {
    "doctor": doctor,
    "doctor-capacity": capacity,
    "engine-view": engine_view,
}


def _begin(name: str) -> None:
    sys.stdout.write(f"\x1e{name}\n")
    sys.stdout.flush()


def print_all() -> None:
    programs = {"swarm": main.app, "swarm-engine": engine.app}
    for name, command in COMMANDS.items():
        _begin(name)
        program, *words = shlex.split(command)
        sys.argv = [program, *words]
        with contextlib.suppress(SystemExit):
            start(programs[program], program)
    for name, show in OTHERS.items():
        if name != "engine-view" or sys.stdout.isatty():  # it is only shown on a terminal
            _begin(name)
            show()


if __name__ == "__main__":
    print_all()
