"""The way to a sandbox that an engine of this host holds: for the command line and the API alike."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

from swarm.base import unix_socket
from swarm.errors import Conflict
from swarm.live.client import Live
from swarm.model import TERMINAL_SANDBOX_STATES, Sandbox, SandboxState
from swarm.store.registry.workers import is_alive
from swarm.store.store import Store
from swarm.store.tickets.validation import shown

T = TypeVar("T")

# What opens a shell: bash, where there is one.
SHELL: Final = ("/bin/sh", "-c", "command -v bash >/dev/null && exec bash -l; exec sh -l")
WAIT_SECONDS: Final = 600.0  # for a VM that boots without KVM, or for room for one
END_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 1.0  # the longest pause between two looks: the end of an engine changes nothing in the row
_AGAIN_SECONDS: Final = 0.1  # between two tries while an engine pauses it
_ENGINE_SECONDS: Final = 3.0  # in which an engine that is being started gives its first sign of life


async def reach(
    store: Store, id: str, *, by: str, wait_seconds: float = WAIT_SECONDS, engine_seconds: float = _ENGINE_SECONDS
) -> Live:
    """The way to the sandbox with this id, by the engine that holds it. One that starts is waited for, a paused one is
    resumed. Raises NotFound, and Conflict for one that has ended, is on another host, or that no engine holds."""

    async def again() -> Path:
        async with store.watching() as wake:
            await wake.changed(timeout_seconds=_AGAIN_SECONDS)
        return await _held(store, id, by=by, wait_seconds=wait_seconds, engine_seconds=engine_seconds)

    path = await _held(store, id, by=by, wait_seconds=wait_seconds, engine_seconds=engine_seconds)
    return Live(path, id, by=by, again=again)


async def started(
    store: Store, id: str, *, say: Callable[[str], None], engine_seconds: float = _ENGINE_SECONDS
) -> Sandbox:
    """It, once it runs, on whichever host; ``say`` is told once what it waits for. Raises NotFound, Conflict."""
    told = False

    async def look(waited: float) -> Sandbox | None:
        nonlocal told
        row = await _living(store, id, anywhere=True)
        if row.state != SandboxState.STARTING:
            return row
        if row.error and not told:
            told = True
            say(row.error)
        await _check_waiting(
            store, row, waited, engine_seconds=engine_seconds, wait_seconds=WAIT_SECONDS, anywhere=True
        )
        return None

    return await _until(store, look)


async def _held(store: Store, id: str, *, by: str, wait_seconds: float, engine_seconds: float) -> Path:
    """The socket of the engine that holds it."""
    asked = False

    async def look(waited: float) -> Path | None:
        nonlocal asked
        row = await _living(store, id)
        if row.state == SandboxState.PAUSED and row.wanted != SandboxState.RUNNING:
            if asked and row.error:
                raise Conflict(f"{named(row)}: {row.error}")
            await _check_drained(store, row)
            await store.want_sandbox(row.id, SandboxState.RUNNING, by=by)
            asked = True
        if row.state == SandboxState.RUNNING and (path := await _socket(store, row)) is not None:
            return path
        await _check_waiting(store, row, waited, engine_seconds=engine_seconds, wait_seconds=wait_seconds)
        return None

    return await _until(store, look)


async def pause(store: Store, id: str, *, by: str) -> Sandbox:
    """Returns it when it is paused. Raises NotFound, Conflict; NoSpace, and then it runs on."""
    if (row := await _living(store, id)).state != SandboxState.PAUSED:
        await (await reach(store, row.id, by=by)).pause()
    return await store.sandbox(id)


async def end(store: Store, id: str, *, by: str, wait_seconds: float = END_SECONDS) -> Sandbox:
    """Returns it when it has ended, or after a time, if its engine does not answer: it ends with its lease then. Does
    nothing if it has ended. Raises NotFound."""
    row = await store.want_sandbox(id, SandboxState.ENDED, by=by)

    async def look(waited: float) -> Sandbox | None:
        row = await store.sandbox(id)
        return row if row.state in TERMINAL_SANDBOX_STATES or waited > wait_seconds else None

    return row if row.state in TERMINAL_SANDBOX_STATES else await _until(store, look)


def named(row: Sandbox) -> str:
    return f"the sandbox {shown(row.name or row.id)}"


async def _until(store: Store, look: Callable[[float], Awaitable[T | None]]) -> T:
    """What ``look`` finds, at the latest soon after a commit that changes it. It gets the time since the beginning."""
    if (found := await look(0.0)) is not None:
        return found
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with store.watching() as wake:
        while (found := await look(loop.time() - began)) is None:
            await wake.changed(timeout_seconds=_LOOK_SECONDS)
    return found


async def _check_waiting(
    store: Store,
    row: Sandbox,
    waited: float,
    *,
    engine_seconds: float,
    wait_seconds: float,
    anywhere: bool = False,
) -> None:
    """Raises Conflict."""
    if waited > engine_seconds and not await _engine(store, anywhere=anywhere):
        where = "" if anywhere else "here "
        raise Conflict(f"no engine runs {where}that could hold {named(row)}: `swarm-engine start` starts one")
    if waited > wait_seconds:
        why = row.error or "see `swarm-engine status`"
        raise Conflict(f"{named(row)} is still {row.state} after {wait_seconds:g} s: {why}")


async def _living(store: Store, id: str, *, anywhere: bool = False) -> Sandbox:
    """Raises NotFound, Conflict."""
    row = await store.sandbox(id)
    if row.state in TERMINAL_SANDBOX_STATES:
        said = "is lost" if row.state == SandboxState.LOST else "has ended"
        raise Conflict(f"{named(row)} {said}" + (f": {row.error}" if row.error else ""))
    if row.wanted == SandboxState.ENDED:
        raise Conflict(f"{named(row)} is being ended")
    if not anywhere and row.host is not None and row.host != await store.this_host():
        raise Conflict(f"{named(row)} is on the host {shown(row.host)}, and can be used only there")
    return row


async def _check_drained(store: Store, row: Sandbox) -> None:
    """Raises Conflict for one that is not resumed, since its host is drained."""
    if any(one.draining for one in await store.hosts() if one.name == row.host):
        host = shown(row.host)
        raise Conflict(f"{named(row)} sleeps on the host {host}, which is drained: `swarm host undrain` ends that")


async def _socket(store: Store, row: Sandbox) -> Path | None:
    """None if it is on its way: what the database soon says, or an engine that has just ended."""
    holder = next((one for one in await store.workers() if one.id == row.worker), None)
    path = holder.info.get("live") if holder is not None else None
    return Path(path) if isinstance(path, str) and unix_socket.listens(Path(path)) else None


async def _engine(store: Store, *, anywhere: bool) -> bool:
    """Is there one that holds sandboxes, on this host?"""
    here = await store.this_host()
    holders = [one for one in await store.workers() if "live" in one.info and (anywhere or one.host == here)]
    return any(is_alive(one) for one in holders)
