"""`swarm host …`: the machines that engines run on; which take work, and which don't. See docs/hosts.md."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.base.clock import iso
from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui import render
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.admin.engines import Host
    from swarm.store.store import Store

app = new_app("host", "List, drain and remove the machines that engines run on.")

_Ref = Annotated[str, typer.Argument(metavar="HOST", help="Its name, its id, or how that begins.")]


@command(app, "list", examples=["swarm host list", "swarm host list --json"], json=True)
async def list_(cli: Cli) -> None:
    """List the hosts: those that an engine was started on."""
    from swarm.admin import engines

    async with cli.store() as store:
        rows = await engines.hosts(store)
    lines = [
        (one.host, _state(one), f"{one.running} of {one.max_vms}", _memory(one), _labels(one), _seen(one), one.id)
        for one in rows
    ]
    columns = (
        "NAME", "STATE", Column("VMS", right=True), Column("MEMORY", drop=2), Column("LABELS", drop=3), "SEEN",
        Column("ID", drop=1, digest=True),
    )  # fmt: skip
    cli.out.listing(rows, columns, lines, empty="no hosts: `swarm-engine start` adds this one")


@command(app, "show", examples=["swarm host show build-7", "swarm host show build-7 --json"], json=True)
async def show(cli: Cli, host: _Ref) -> None:
    """Show a host: what it has, what it runs, what depends on it."""
    from swarm.admin import engines

    async with cli.store() as store:
        found = await engines.host(store, host)
        theirs = [one for one in await engines.engines(store) if one.host == found.host]
        held = await store.host_holds(found.host)
    if cli.out.json:
        cli.out.dump({"host": found, "engines": theirs, "held": held})
        return
    capacity, drained = found.capacity, found.drained_by and f"by {found.drained_by} at {found.drained_at}"
    cli.out.fields(
        {
            "host": found.host,
            "id": found.id,
            "state": _state(found),
            "drained": drained or None,
            "puts back": None if found.put_back_seconds is None else _until(found.put_back_seconds),
            "seen": _seen(found),
            "generation": found.generation,
            "labels": _labels(found),
            "memory": _memory(found) or None,
            "CPUs": capacity.get("vcpus"),
            "VMs": f"{found.running} of {found.max_vms}",
            "Swarm": found.versions.get("swarm"),
            "kernel": found.versions.get("kernel"),
            "holds": str(held) or "nothing",
            "since": found.created_at,
        }
    )
    for engine in theirs:
        cli.out.line(render.engine_line(engine))


@command(
    app,
    "drain",
    examples=[
        "swarm host drain build-7",
        "swarm host drain build-7 --wait",
        "swarm host drain build-7 --within 600 --wait",
        "swarm host drain build-7 --now --wait --timeout 60",
    ],
    json=True,
)
async def drain(
    cli: Cli,
    host: _Ref,
    now: Annotated[
        bool, typer.Option("--now", help="Put back at once what runs there; it is not counted as tried.")
    ] = False,
    within: Annotated[
        float | None,
        typer.Option("--within", min=0, max=2_592_000, metavar="S", help="Put it back after this many seconds."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until nothing runs there any more.")] = False,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0, metavar="S", help="With --wait: at most this many seconds.")
    ] = None,
) -> int:
    """Let a host start no more tickets and sandboxes, until `swarm host undrain`. Its engines learn it within seconds,
    and go on running.

    What runs there ends by itself, unless you say for how long; then steps go back to the queue, for other hosts, and
    sandboxes are paused. Exit status 1 if something still runs after --timeout.
    """
    from swarm.admin import engines
    from swarm.errors import UsageError

    if now and within is not None:
        raise UsageError("--now and --within exclude each other")
    async with cli.store() as store:
        row = await store.drain_host(host, by=cli.user, within_seconds=0.0 if now else within)
        found = await engines.of_row(store, row)
        empty = await _drained(store, found, timeout) if wait else False
    said = f"the host {found.host} " + ("is drained: nothing runs there" if empty else "is being drained")
    cli.out.result({"host": found.host, "draining": True, "empty": empty} if wait else found, said)
    if wait and not empty:
        cli.out.error(f"something still runs on {found.host} after {timeout:g} s: see `swarm host show {found.host}`")
        return 1
    return 0


@command(app, "undrain", examples=["swarm host undrain build-7"])
async def undrain(cli: Cli, host: _Ref) -> None:
    """Let a host take work again."""
    async with cli.store() as store:
        row = await store.undrain_host(host, by=cli.user)
    cli.out.line(f"the host {row.name} takes work")


@command(app, "rm", examples=["swarm host rm build-7", "swarm host rm build-7 --force"], json=True)
async def rm(
    cli: Cli,
    host: _Ref,
    force: Annotated[bool, typer.Option("--force", help="Also if an engine of it is alive.")] = False,
) -> None:
    """Forget a host that is gone, and say what it still held.

    What ran there is run on another host. Sandboxes that are paused there are lost, and its snapshots are forgotten.
    If it comes back, its engine adds it again.
    """
    async with cli.store() as store:
        row, held = await store.remove_host(host, by=cli.user, force=force)
    said = f"; it held {held}" if str(held) else ""
    cli.out.result({"host": row.name, "id": row.id, "held": held}, f"the host {row.name} is removed{said}")


async def _drained(store: Store, host: Host, timeout_seconds: float | None) -> bool:
    import asyncio

    from swarm.admin import engines

    try:
        async with asyncio.timeout(timeout_seconds), store.watching() as wake:
            while not await engines.drained(store, host):
                await wake.changed(timeout_seconds=1.0)
    except TimeoutError:
        return False
    return True


def _state(host: Host) -> str:
    if not host.alive:
        return "gone, drained" if host.draining else "gone"
    return ("draining" if host.running else "drained") if host.draining else "alive"


def _seen(host: Host) -> str:
    return iso(time.time() * 1000 - host.seen_ms_ago)


def _until(seconds: float) -> str:
    return f"in {render.duration(seconds * 1000)}" if seconds > 0 else "now"


def _memory(host: Host) -> str:
    """Free of all; of a host that is gone, all."""
    total = host.memory_mb if host.memory_mb is not None else host.capacity.get("memory_mb")
    if not isinstance(total, int):
        return ""
    return f"{total} MB" if host.memory_free_mb is None else f"{host.memory_free_mb} of {total} MB free"


def _labels(host: Host) -> str:
    import json

    return " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in host.labels.items()
    )
