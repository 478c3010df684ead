"""`swarm sandbox …`: what is done in one: commands, shells, files, ports."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli import remote
from swarm.cli.frame import Cli, command
from swarm.cli.remote import OWN_FAULT, Env, Words
from swarm.cli.sandbox import Id, app, live_of
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.channel.conversation import Open

User = Annotated[str, typer.Option("--user", "-u", metavar="USER", help="As whom: agent or root.")]
_Process = Annotated[str, typer.Argument(metavar="PROCESS", help="Its name, as `swarm sandbox ps` has it.")]


@asynccontextmanager
async def _guest(cli: Cli, id: str) -> AsyncIterator[Open]:
    """The way to its guest; the store is closed meanwhile, since a shell may be open for days."""
    async with cli.store() as store:
        one = await store.sandbox(id)
        live = await live_of(cli, store, one.id)
        yield live.open


@command(
    app,
    "exec",
    examples=[
        "swarm sandbox exec build make test",
        "swarm sandbox exec build --user root -- apt-get install -y ./tool.deb",
        "swarm sandbox exec build --detach -- python3 -m http.server 8000",
        "tar c src | swarm sandbox exec build tar x",
    ],
    runs="there",
    fault=OWN_FAULT,
)
async def exec_(
    cli: Cli,
    id: Id,
    argv: Words,
    env: Env = None,
    cwd: Annotated[
        str | None, typer.Option("--cwd", "-w", metavar="DIR", help="Where it starts. Default: the user's home, /work.")
    ] = None,
    user: User = "agent",
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.001, metavar="S", help="End it after so many seconds.")
    ] = None,
    tty: Annotated[
        bool | None, typer.Option("--tty/--no-tty", help="With a terminal of its own. Default: if there is one here.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Let it run in the background, and print its name.")
    ] = False,
) -> int:
    """Run a command in a sandbox. Its streams are ours, its exit status is the command's, as with `swarm run`.

    When this command ends, all that it started ends too, but for what --detach lets go on. Exit status 125: Swarm
    itself failed.
    """
    from swarm.errors import GuestRefused

    given = remote.variables(env or [])
    async with _guest(cli, id) as guest:
        if detach:
            try:
                cli.out.line(await _detached(guest, argv, env=given, cwd=cwd, user=user, timeout_seconds=timeout))
            except GuestRefused as refused:
                return remote.not_started(cli, argv, refused)
            return 0
        wanted = remote.Command(argv=argv, env=given, cwd=cwd, user=user, timeout_seconds=timeout, tty=tty)
        return await remote.execute(cli, guest, wanted)


async def _detached(
    guest: Open, argv: list[str], *, env: dict[str, str], cwd: str | None, user: str, timeout_seconds: float | None
) -> str:
    from swarm.channel import processes

    order = processes.Order(argv=argv, env=env, cwd=cwd, user=user, timeout_seconds=timeout_seconds, background=True)
    async with processes.start(guest, order) as process:
        return process.name


@command(app, "shell", examples=["swarm sandbox shell build", "swarm sandbox shell build --user root"], fault=OWN_FAULT)
async def shell(cli: Cli, id: Id, user: User = "agent") -> int:
    """Open a shell in a sandbox."""
    from swarm.admin.sandboxes import SHELL

    async with _guest(cli, id) as guest:
        return await remote.execute(cli, guest, remote.Command(argv=SHELL, user=user))


@command(app, "ps", examples=["swarm sandbox ps build"], json=True)
async def ps(cli: Cli, id: Id) -> None:
    """List the programs that were started in a sandbox: those that run, and the last that have ended."""
    import shlex

    from swarm.channel import processes
    from swarm.cli.ui import render

    async with _guest(cli, id) as guest:
        found = await processes.processes(guest)
    rows = [
        (
            one.process, "running" if one.ended is None else f"status {one.ended.status}", one.user, one.pid,
            render.duration(one.running_seconds * 1000), render.size(one.output_bytes), shlex.join(one.argv),
        )
        for one in found
    ]  # fmt: skip
    columns = (
        "PROCESS", "STATE", Column("USER", drop=4), Column("PID", drop=2, right=True),
        Column("TIME", drop=3, right=True), Column("OUTPUT", drop=1, right=True), Column("COMMAND", least=16),
    )  # fmt: skip
    cli.out.listing(found, columns, rows, empty="nothing was started in it")


@command(app, "attach", examples=["swarm sandbox attach build 3f9a41c0b7d2"], fault=OWN_FAULT)
async def attach(cli: Cli, id: Id, process: _Process) -> int:
    """Come back to a program in the background: its latest output, then what it prints from now on.

    What is typed goes to it. It goes on when this command ends; its exit status is the program's.
    """
    from swarm.channel import processes
    from swarm.cli.ui import terminal

    async with _guest(cli, id) as guest:
        listed = next((one for one in await processes.processes(guest) if one.process == process), None)
        pty = listed is not None and listed.pty and terminal.both_are_terminals()
        async with processes.attach(guest, process) as it:
            if it.dropped_bytes:
                cli.out.note(f"{it.dropped_bytes:,} bytes of earlier output are gone")
            if pty:
                await it.resize(*terminal.size())
            await terminal.joined(it, pty=pty)
            return remote.status(cli, listed.argv if listed else [process], await it.exit())


@command(app, "kill", examples=["swarm sandbox kill build 3f9a41c0b7d2", "swarm sandbox kill build web --signal INT"])
async def kill(
    cli: Cli,
    id: Id,
    process: _Process,
    signal: Annotated[
        str | None, typer.Option("--signal", metavar="NAME", help="Send this, such as INT or 2. Default: kill it.")
    ] = None,
) -> None:
    """End a program and all that it started; or send it a signal."""
    from swarm.channel import processes
    from swarm.errors import UsageError

    named = (signal or "").upper().removeprefix("SIG")
    if named.isdecimal():  # the kernel's numbers, on all processors that Swarm runs on
        try:
            named = Signals(int(named[:9])).name.removeprefix("SIG")
        except ValueError:
            raise UsageError(f"--signal {named[:20]}: there is no such signal; `kill -l` lists all") from None
    async with _guest(cli, id) as guest:
        if signal is None:
            await processes.signal(guest, process, "KILL", descendants=True)
        else:
            await processes.signal(guest, process, named)


# --- files ------------------------------------------------------------------------------------------------------------


@command(app, "ls", examples=["swarm sandbox ls build", "swarm sandbox ls build /etc --user root"], json=True)
async def ls(
    cli: Cli,
    id: Id,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Absolute, or below /work.")] = "/work",
    user: User = "agent",
) -> None:
    """List a directory of a sandbox, or one file."""
    from swarm.base.clock import iso
    from swarm.channel import guest_files

    async with _guest(cli, id) as guest:
        info = await guest_files.stat(guest, path, user=user)
        if info.kind == "directory":
            listing = await guest_files.list_dir(guest, path, user=user)
        else:
            listing = guest_files.Listing(entries=(info,), complete=True)
    rows = [
        (
            f"{one.name}/" if one.kind == "directory" else f"{one.name} -> {one.target}" if one.target else one.name,
            one.size, f"{one.mode:o}", {0: "root", 1000: "agent"}.get(one.uid, one.uid), iso(one.mtime_ns / 1e6),
        )
        for one in listing.entries
    ]  # fmt: skip
    columns = (
        "NAME", Column("BYTES", drop=4, right=True), Column("MODE", drop=2, right=True), Column("OWNER", drop=1),
        Column("CHANGED", drop=3),
    )  # fmt: skip
    cli.out.listing(listing.entries, columns, rows, empty="it is empty")
    if not listing.complete:
        cli.out.note(f"it has more than these {len(listing.entries):,}")


@command(app, "put", examples=["swarm sandbox put build ./src", "swarm sandbox put build data.csv --to /work/in/x.csv"])
async def put(
    cli: Cli,
    id: Id,
    source: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="Of this host.")],
    to: Annotated[str | None, typer.Option("--to", metavar="PATH", help="Default: its name, below /work.")] = None,
    all_files: Annotated[
        bool, typer.Option("--all-files", help="Of a git work tree, those that git ignores and .git, too.")
    ] = False,
    user: User = "agent",
) -> None:
    """Send a file or a directory to a sandbox. Of a git work tree go the files that belong to it."""
    from swarm.channel import guest_files, guest_trees
    from swarm.cli import moving
    from swarm.cli.ui import render
    from swarm.errors import UsageError

    name = source.resolve().name
    path = to or name or "root"
    if path.endswith("/") and not source.is_dir():
        path += name
    if not source.exists():
        raise UsageError(f"{source} does not exist")
    async with _guest(cli, id) as guest:
        if source.is_dir():
            picked = await moving.pick(source, all_files=all_files)
            for what in picked.left_out:
                cli.out.note(f"left out: {what}")
            names = [entry.name.rstrip("/") for entry, _ in picked.files]
            sent = (await guest_trees.put_tree(guest, source.resolve(), path, names=names, user=user)).bytes
        else:
            sent = await guest_files.put(guest, source, path, user=user, parents=True)
    cli.out.note(f"sent {render.size(sent)} to {path}")


@command(app, "get", examples=["swarm sandbox get build dist", "swarm sandbox get build /var/log/syslog --to s.log"])
async def get(
    cli: Cli,
    id: Id,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Absolute, or below /work.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="PATH", help="Of this host. Default: its name, here; - is stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    user: User = "agent",
) -> None:
    """Bring a file or a directory of a sandbox to this host."""
    from swarm.base import trees
    from swarm.channel import guest_files, guest_trees
    from swarm.cli.ui import render, terminal
    from swarm.errors import Conflict, UsageError

    async with _guest(cli, id) as guest:
        if str(to) == "-":
            async for piece in guest_files.read(guest, path, user=user):
                await terminal.write(1, piece)
            return
        info = await guest_files.stat(guest, path, user=user)
        place = to or Path(Path(path).name or "root")
        if to is not None and to.is_dir():  # as cp does; the guest says what is a directory, and what is in it
            place = to / Path(path).name
        if place.name in ("..", ""):
            raise UsageError(f"{path!r} has no name that it could have here: say where to with --to")
        if place != to and trees.runs_git(place.name):
            why = "git would run what is in a .git here, or beside a HEAD"
            raise UsageError(f"{path} can't come to {place}: {why}; say where to with --to, under another name")
        if os.path.lexists(place) and not force:
            raise Conflict(f"{place} exists: give --force to replace, or --to another place")
        if info.kind == "directory":
            moved = await guest_trees.get_tree(guest, path, place, user=user)
            for what in moved.left_out:
                cli.out.note(f"left out: {what}")
            size = moved.bytes
        else:
            size = await guest_files.get(guest, path, place, user=user)
    cli.out.note(f"brought {render.size(size)} to {place}")


# --- ports ------------------------------------------------------------------------------------------------------------


@command(app, "port", examples=["swarm sandbox port build 8000", "swarm sandbox port build 8000 --listen 9000"])
async def port(
    cli: Cli,
    id: Id,
    port: Annotated[int, typer.Argument(metavar="PORT", min=1, max=65535, help="Of the sandbox's 127.0.0.1.")],
    listen: Annotated[
        int | None,
        typer.Option("--listen", min=0, max=65535, metavar="PORT", help="Of this host. Default: the same. 0: any."),
    ] = None,
) -> None:
    """Pass connections from a port of this host to one in a sandbox, until Ctrl+C.

    It listens on 127.0.0.2: browsers send what they know of 127.0.0.1, such as the dashboard's session, to any port.
    """
    from swarm.channel import ports

    async with (
        _guest(cli, id) as guest,
        ports.forward(
            guest,
            port,
            host_port=port if listen is None else listen,
            on_error=lambda error: cli.out.note(str(error)),
        ) as here,
    ):
        cli.out.line(f"{ports.HOST}:{here} is port {port} of {id}; Ctrl+C ends it")
        await asyncio.Event().wait()
