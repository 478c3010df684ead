"""`swarm cluster …`: an engine on every node of a Ray cluster. See docs/hosts.md."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.ui.table import Column

if TYPE_CHECKING:
    from swarm.cli.keeper import Kept, Wanted

_CONNECT_SECONDS = 5.0

app = new_app("cluster", "Keep an engine on every node of a Ray cluster.")

_Address = Annotated[
    str,
    typer.Option("--address", envvar="RAY_ADDRESS", metavar="ADDRESS", help="Of Ray. Default: the one of this node."),
]


@command(
    app,
    "up",
    examples=["swarm cluster up", "swarm cluster up --max-vms 8", "swarm cluster up --address 10.1.0.5:6379"],
    json=True,
)
async def up(
    cli: Cli,
    address: _Address = "auto",
    max_vms: Annotated[
        int | None, typer.Option("--max-vms", min=1, max=60000, metavar="N", help="As of `swarm-engine start`.")
    ] = None,
    max_sandboxes: Annotated[
        int | None, typer.Option("--max-sandboxes", min=0, max=60000, metavar="N", help="As of `swarm-engine start`.")
    ] = None,
    grace: Annotated[
        float | None, typer.Option("--grace", min=0, metavar="S", help="As of `swarm-engine start`.")
    ] = None,
    warm: Annotated[str | None, typer.Option("--warm", metavar="N|auto", help="As of `swarm-engine start`.")] = None,
    driver: Annotated[str | None, typer.Option("--driver", hidden=True)] = None,
    node_home: Annotated[
        str | None, typer.Option("--node-home", metavar="DIR", help="Their home. Default: as each node's settings say.")
    ] = None,
    without_token: Annotated[bool, typer.Option("--without-token", help="Also where Ray asks for no token.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, metavar="S", help="Wait at most this many seconds for them.")
    ] = 300.0,
) -> int:
    """Start an engine on every node, and keep it there: on nodes that join later too, and again when one ends.

    No engine is a child of Ray's: if Ray ends, they go on. Exit status 1 if one does not run.
    """
    from swarm.cli.keeper import NO_TOKEN, Wanted, asks_for_token
    from swarm.errors import Conflict, UsageError

    given = {
        "--max-vms": max_vms,
        "--max-sandboxes": max_sandboxes,
        "--grace": grace,
        "--warm": warm,
        "--driver": driver,
    }
    options = tuple(f"{name}={value}" for name, value in given.items() if value is not None)
    wanted = Wanted(home=node_home, options=options, secured=not without_token)
    _need_ray()
    if not without_token and not asks_for_token():
        raise UsageError(NO_TOKEN)
    with _ray(address):
        overseer = _overseer(wanted)
        changed = await _get(overseer.want.remote(wanted))
        if changed is None:
            raise Conflict("`swarm cluster down` was interrupted: run it again first, to its end")
        if changed:
            cli.out.note("other options than before: engines that run keep theirs until they start anew")
        kept = await _settled(overseer, timeout)
    _show(cli, kept)
    missing = await _elsewhere(cli, kept)
    for one in missing:
        cli.out.error(f"the engine on {one.host} (pid {one.pid}) uses another database than this command")
    return 0 if kept and not missing and all(one.state == "running" for one in kept) else 1


@command(app, "status", examples=["swarm cluster status", "swarm cluster status --json"], json=True)
async def status(cli: Cli, address: _Address = "auto") -> int:
    """Show every node's engine. Exit status 1 if one does not run."""
    with _ray(address):
        overseer = _found()
        kept = [] if overseer is None else await _get(overseer.state.remote())
    _show(cli, kept)
    return 0 if all(one.state == "running" for one in kept) else 1


@command(app, "down", examples=["swarm cluster down", "swarm cluster down --drain"], json=True)
async def down(
    cli: Cli,
    address: _Address = "auto",
    drain: Annotated[
        bool, typer.Option("--drain", help="First wait until what runs has ended, however long it takes.")
    ] = False,
) -> int:
    """Stop every engine, and keep none. Running tickets get the grace; then their steps go back to the queue.

    It goes on if this command is interrupted. Exit status 1 if an engine still runs.
    """
    with _ray(address):
        import ray

        overseer = _found()
        kept = [] if overseer is None else await _get(overseer.down.remote(drain=drain))
        if overseer is not None:
            ray.kill(overseer)
    _show(cli, kept)
    return 0 if all(one.state == "stopped" for one in kept) else 1


def _need_ray() -> None:
    from swarm.errors import HostError

    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        raise HostError("Ray is not installed: `pip install 'swarm-engine[ray]'`, on every node") from None


@contextmanager
def _ray(address: str) -> Iterator[None]:
    """Connected to Ray for the length of the block."""
    from swarm.cli.keeper import NAMESPACE
    from swarm.errors import HostError

    _need_ray()
    import ray
    from ray._private import services

    try:
        if not address.startswith("ray://"):  # Ray itself would wait for a minute, and print what it does
            host, _, port = (services.canonicalize_bootstrap_address(address) or "").rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError("an address is HOST:PORT, or auto for the cluster of this node")
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(address, namespace=NAMESPACE, configure_logging=False, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines()
        raise HostError(f"can't connect to Ray at {address!r}: {said[0] if said else type(error).__name__}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _found() -> Any:
    """The overseer; None if there is none."""
    import ray

    from swarm.cli.keeper import NAMESPACE, OVERSEER

    try:
        return ray.get_actor(OVERSEER, namespace=NAMESPACE)
    except ValueError:
        return None


def _overseer(wanted: Wanted) -> Any:
    """The overseer, made if there is none."""
    import ray

    from swarm.cli.keeper import NAMESPACE, OVERSEER, Overseer

    make: Any = ray.remote(Overseer).options(
        name=OVERSEER, namespace=NAMESPACE, get_if_exists=True, lifetime="detached",
        num_cpus=0, max_restarts=-1, max_concurrency=16,
    )  # fmt: skip
    return make.remote(wanted)


async def _settled(overseer: Any, timeout_seconds: float) -> list[Kept]:
    """Once every node's engine runs, or has said why not."""
    from swarm.cli.keeper import living_nodes

    deadline = time.monotonic() + timeout_seconds
    while True:
        kept: list[Kept] = await _get(overseer.state.remote())
        nodes = await asyncio.to_thread(living_nodes)
        waits = nodes.keys() - {one.node for one in kept} or [
            one for one in kept if one.state == "starting" and not one.error
        ]
        if not waits or time.monotonic() > deadline:
            return kept
        await asyncio.sleep(0.5)


async def _get(reference: Any) -> Any:
    import ray

    return await asyncio.to_thread(ray.get, reference)


async def _elsewhere(cli: Cli, kept: list[Kept]) -> list[Kept]:
    """Engines that run, and that our database does not know."""
    from swarm.store.registry.workers import is_alive

    running = [one for one in kept if one.state == "running"]
    if not running:
        return []
    async with cli.store() as store:
        names = {row.id: row.name for row in await store.hosts()}
        known = {(row.host, row.pid) for row in await store.workers() if is_alive(row)}
    return [one for one in running if (names.get(one.host_id or ""), one.pid) not in known]


def _show(cli: Cli, kept: list[Kept]) -> None:
    kept = sorted(kept, key=lambda one: (one.host, one.address))
    lines = [
        (
            one.host,
            one.address,
            one.state,
            str(one.pid or ""),
            one.since or "",
            str(one.restarts or ""),
            one.error or "",
            one.node,
        )
        for one in kept
    ]
    columns = (
        "HOST", "ADDRESS", "STATE", Column("PID", right=True), "SINCE", Column("RESTARTS", right=True, drop=1), "ERROR",
        Column("NODE", drop=2, digest=True),
    )  # fmt: skip
    cli.out.listing(kept, columns, lines, empty="no engine is kept: `swarm cluster up` starts one on every node")
