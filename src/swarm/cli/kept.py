"""`swarm ticket shell`, and what `files`, `get` and `diff` do with kept VMs: each in a copy, which leaves nothing."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from swarm.cli import remote
from swarm.cli.frame import Cli, command
from swarm.cli.inputs import TicketId
from swarm.cli.ticket import app
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.store.comparison import File
    from swarm.store.kept_vms import KeptVm
    from swarm.vm.live import LiveVm

WORK: Final = "/work"
_USER: Final = "root"  # who looks into a dead VM may see all of it
_MOST_BYTES: Final = 1 << 30
_COMPARED_BYTES: Final = 256 << 20

Step = Annotated[str | None, typer.Option("--step", metavar="STEP", help="Of a workflow: the step, such as fix[2].")]


@command(
    app,
    "shell",
    examples=[
        "swarm ticket shell report-7",
        "swarm ticket shell 'race-3' --step 'fix[2]'",
        "swarm ticket shell report-7 -- ls -la /work",
    ],
    fault=remote.OWN_FAULT,
)
async def shell(
    cli: Cli,
    id: TicketId,
    argv: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="Run this instead of a shell.")
    ] = None,
    step: Step = None,
    user: Annotated[str, typer.Option("--user", metavar="agent|root", help="As whom.")] = "agent",
) -> int:
    """Walk into the VM of a ticket, as it was when its agent had ended: a copy, with its network off.

    What is done in it stays in it: the kept VM is as it was, and the copy is gone when the shell has ended. Only VMs
    that were kept can be walked into: `swarm ticket add --keep-vm failure`, or keep_vm in agent.yaml.
    """
    from swarm.channel import guest_files

    async with copy(cli, id, step=step) as (found, live):
        cli.out.note(
            f"a copy of the VM of step {found.step_id}, attempt {found.number}, as it was at "
            f"{found.snapshot.created_at}; its network is off"
        )
        guest = live.channel.converse
        bash = await live.while_alive(guest_files.exists(guest, "/bin/bash"))
        words = argv or ["/bin/bash" if bash else "/bin/sh"]
        order = remote.Command(argv=words, cwd=WORK, user=user)
        return await live.while_alive(remote.execute(cli, guest, order))


@asynccontextmanager
async def copy(cli: Cli, ref: str, *, step: str | None = None) -> AsyncIterator[tuple[KeptVm, LiveVm]]:
    """A copy of the kept VM. Raises NotFound, with what to do, if none was kept."""
    from swarm.app import oneoff
    from swarm.store import kept_vms

    async with cli.store() as store:
        found = await kept_vms.find(store, ref, step=step)
    async with oneoff.kept_vm(cli.settings, found.snapshot.id) as live:
        yield found, live


async def listed(cli: Cli, ref: str, path: str) -> None:
    """Print what is in a directory of the kept VM."""
    from swarm.channel import guest_files

    async with copy(cli, ref) as (_, live):
        listing = await live.while_alive(guest_files.list_dir(live.channel.converse, _absolute(path), user=_USER))
    rows = [
        (one.name + (f" -> {one.target}" if one.target else ""), one.size, one.kind, f"{one.mode:04o}")
        for one in listing.entries
    ]
    columns = ("NAME", Column("BYTES", drop=3, right=True), Column("KIND", drop=2), Column("MODE", drop=1))
    cli.out.listing(listing.entries, columns, rows, empty=f"{path} is empty")
    if not listing.complete:
        cli.out.note("There is more than this in it.")


async def brought(cli: Cli, ref: str, path: str, to: Path, *, force: bool) -> None:
    """Bring a file or a directory of the kept VM here, below ``to``. Raises Conflict if it is there."""
    from swarm.base import trees
    from swarm.channel import guest_files, guest_trees
    from swarm.errors import Conflict, UsageError

    path = _absolute(path).rstrip("/")
    target = to / (path.rpartition("/")[2] or "vm")
    if trees.runs_git(target.name):
        raise UsageError(f"git would run what {target} names: have an archive of it made, by `swarm ticket shell`")
    if target.exists() and not force:
        raise Conflict(f"{target} exists: give --force to replace, or --to another directory")
    async with copy(cli, ref) as (_, live):
        guest = live.channel.converse
        about = await live.while_alive(guest_files.stat(guest, path or "/", user=_USER))
        if about.kind == "directory":
            tree = guest_trees.get_tree(guest, path or "/", target, user=_USER, limit_bytes=_MOST_BYTES)
            moved = await live.while_alive(tree)
            for what in moved.left_out:
                cli.out.note(f"left out: {what}")
        else:
            to.mkdir(parents=True, exist_ok=True)
            await live.while_alive(guest_files.get(guest, path, target, user=_USER, limit_bytes=_MOST_BYTES))
    cli.out.line(target)


@asynccontextmanager
async def trees(cli: Cli, refs: tuple[str, str], path: str) -> AsyncIterator[list[dict[str, File]]]:
    """A directory of two kept VMs, each as the files in it by name."""
    from swarm.channel import guest_trees
    from swarm.store.comparison import files_below

    with tempfile.TemporaryDirectory(prefix="swarm-diff-") as scratch:
        found = []
        for number, ref in enumerate(refs):
            place = Path(scratch) / str(number)
            async with copy(cli, ref) as (_, live):
                tree = guest_trees.get_tree(
                    live.channel.converse, _absolute(path), place, user=_USER, limit_bytes=_COMPARED_BYTES, git=True
                )
                for what in (await live.while_alive(tree)).left_out:
                    cli.out.note(f"left out of {ref}: {what}")
            found.append(files_below(place))
        yield found


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"{WORK}/{path}"
