"""`swarm vm …` and `swarm-spawn-ns`: VMs started manually."""

from __future__ import annotations

import os
import shlex
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.frame import Cli, command, new_app, start
from swarm.cli.ui.table import Column
from swarm.errors import NotFound

if TYPE_CHECKING:
    from swarm.vm.slots.inventory import VmRecord

MAX_VM = 65533

app = new_app("vm", "Start, list, log in to and remove VMs.")
spawn_ns = new_app("swarm-spawn-ns", "Start VM N in its own network namespace.", many=False)

_N = Annotated[int, typer.Argument(metavar="N", min=1, max=MAX_VM, help="Number of the VM.")]
_Memory = Annotated[int, typer.Option("--memory", min=128, metavar="MB", help="Memory of the VM.")]
_Cpus = Annotated[int, typer.Option("--cpus", min=1, metavar="N", help="Virtual CPUs of the VM.")]


async def _spawn(cli: Cli, n: int, memory: int, cpus: int) -> None:
    from swarm.app import manual_vm

    with cli.out.progress(f"VM {n}") as progress:
        spawned = await manual_vm.spawn(cli.settings, n, memory_mb=memory, vcpus=cpus, progress=progress)
    if cli.out.json:
        cli.out.dump(spawned)
        return
    record = spawned.record
    cli.out.line(f"VM {n} runs at {record.address}")
    cli.out.fields(
        {
            "  driver": spawned.driver,
            "  process": f"{record.pid}",
            "  namespace": record.netns,
            "  link": f"tap{n}, on {cli.settings.bridge}",
            "  console": spawned.console,
            "  log in": f"ssh root@{record.address}   or: swarm vm ssh {n}",
            "  remove": f"swarm vm rm {n}",
        }
    )


@command(app, "spawn", examples=["swarm vm spawn 1", "swarm vm spawn 7 --memory 512 --cpus 2"], json=True)
async def spawn(cli: Cli, n: _N, memory: _Memory = 256, cpus: _Cpus = 1) -> None:
    """Start VM N, reachable at subnet + N + 1 (10.0.0.2 for VM 1). Replaces a VM N that was started manually."""
    await _spawn(cli, n, memory, cpus)


@command(spawn_ns, examples=["swarm-spawn-ns 1", "ssh root@10.0.0.2", "swarm-cleanup"], json=True)
async def spawn_ns_(cli: Cli, n: _N, memory: _Memory = 256, cpus: _Cpus = 1) -> None:
    """Start VM N in its own network namespace, reachable at subnet + N + 1 (10.0.0.2 for VM 1).

    Replaces a VM N that was started manually. Prints how to reach it.
    """
    await _spawn(cli, n, memory, cpus)


@command(app, "list", examples=["swarm vm list", "swarm vm list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List the VMs on this host, including those of engines."""
    from swarm.app import wiring

    records = wiring.inventory(cli.settings).records()
    rows = [(r.n, r.address, r.kind, _state(r), r.driver, r.pid or None, r.ticket_id, r.created_at) for r in records]
    columns = (
        "VM", "ADDRESS", Column("KIND", drop=3), "STATE", Column("DRIVER", drop=2), Column("PID", drop=1),
        Column("TICKET", drop=5), Column("CREATED", drop=4),
    )  # fmt: skip
    cli.out.listing(records, columns, rows, empty="no VMs")


@command(app, "ssh", examples=["swarm vm ssh 1", "swarm vm ssh 1 -- uname -a"])
async def ssh(
    cli: Cli,
    n: _N,
    argv: Annotated[list[str] | None, typer.Argument(metavar="COMMAND", help="Run this instead of a shell.")] = None,
) -> None:
    """Log in to VM N as root, or run a command there. VMs of engines end with their ticket."""
    from swarm.app import wiring
    from swarm.base.process import which

    record = _record(cli, n)
    if not record.alive:
        raise NotFound(f"VM {n} does not run; see `swarm vm list`")
    if not record.address:
        raise NotFound(
            f"VM {n} is a plain process of this host (driver {record.driver}): there is nothing to log in to"
        )
    program = which("ssh")
    if program is None:
        raise NotFound("the program 'ssh' is not installed: apt-get install openssh-client")
    keys = wiring.ssh_dir(cli.settings)
    if record.host_key:  # engines start too many VMs to write all of them down
        keys.know(IPv4Address(record.address), record.host_key)
    options = keys.options()
    # ssh passes the command to the guest's shell, so every word is quoted for that.
    remote = [shlex.join(argv)] if argv else []
    os.execv(program, ["ssh", "-o", "ConnectTimeout=10", *options, f"root@{record.address}", *remote])


@command(app, "rm", examples=["swarm vm rm 1 2"])
async def rm(
    cli: Cli,
    n: Annotated[list[int], typer.Argument(metavar="N", min=1, max=MAX_VM, help="Numbers of the VMs.")],
) -> None:
    """Remove VMs that were started manually."""
    from swarm.app import manual_vm

    for number in n:
        _record(cli, number)
        await manual_vm.remove(cli.settings, number)
        cli.out.line(f"removed VM {number}")


def _record(cli: Cli, n: int) -> VmRecord:
    from swarm.app import wiring

    for record in wiring.inventory(cli.settings).records():
        if record.n == n:
            return record
    raise NotFound(f"no VM {n} on this host; see `swarm vm list`")


def _state(record: VmRecord) -> str:
    if record.alive:
        return "running" if record.ticket_id or record.sandbox_id or record.kind == "manual" else "ready"
    return "free" if record.owner_alive and not record.pid else "dead"


def run_spawn_ns() -> None:
    start(spawn_ns, "swarm-spawn-ns")
