"""What runs on a Ray cluster: on each node a `Keeper`, which keeps an engine alive there, and one `Overseer`, which
puts a keeper on every node. Neither knows tickets, and no engine is a child of either: without Ray, engines go on.

Both are actors of Ray's: only values go in and out. `cluster` speaks to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from swarm import config
from swarm.base import host, process
from swarm.base.clock import iso
from swarm.base.log import logger
from swarm.cli import service
from swarm.errors import CommandFailed, SwarmError

NAMESPACE: Final = "swarm"
OVERSEER: Final = "overseer"
_LOOK_SECONDS: Final = 1.0
_START_SECONDS: Final = 240.0  # `swarm-engine start` gives up before
_PAUSE_SECONDS: Final = (1.0, 60.0)  # before an engine that ended is started again: doubled each time
_STOP_SECONDS: Final = 7 * 86400.0  # a stop lasts as long as the grace
_CALL_SECONDS: Final = 10.0  # for a keeper's answer
NO_TOKEN: Final = (
    "Ray asks for no token: whoever reaches its ports runs programs on every node. Set "
    "RAY_AUTH_MODE=token for every part of it, or say --without-token"
)
_LEAST_NOTICE_SECONDS: Final = 20.0  # of a drain's time, what is left for the engine's own end


log = logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What every node is to run."""

    home: str | None = None  # None: as that node's settings say
    options: tuple[str, ...] = ()  # of `swarm-engine start`
    secured: bool = True  # only on nodes that ask for Ray's token


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A node's engine, as its keeper sees it."""

    node: str  # Ray's id of it
    host: str
    address: str
    state: str = "starting"  # running, failing, stopping, stopped, silent (the keeper doesn't answer)
    pid: int | None = None
    host_id: str | None = None  # Swarm's, of the engine
    since: str | None = None
    restarts: int = 0
    error: str | None = None


class Keeper:
    """Keeps an engine on this node until `stop`. One that runs already is kept as it is. Ray makes it in its event
    loop, and calls it there."""

    def __init__(self, kept: Kept, wanted: Wanted) -> None:
        self._kept, self._wanted = kept, wanted
        self._settings = config.load(home=wanted.home)
        self._ends = asyncio.Event()
        self._stopping = asyncio.Lock()
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def state(self) -> Kept:
        return self._kept

    async def want(self, wanted: Wanted) -> None:
        """For engines that start from now on; the home stays."""
        self._wanted = wanted

    async def stop(self, *, drain: bool, within_seconds: float | None = None) -> Kept:
        """End the engine: it gets its grace. With ``drain``, first wait until what runs has ended, and put back what
        still runs after ``within_seconds``."""
        self._ends.set()
        async with self._stopping:
            await self._task
            self._kept = replace(self._kept, state="stopping", error=None)
            try:
                if (found := service.in_background(self._settings)) is not None:
                    await self._stop(found, drain=drain, within_seconds=within_seconds)
                self._kept = replace(self._kept, state="stopped", pid=None, since=None)
            except SwarmError as error:
                self._kept = replace(self._kept, state="running", error=_said(error))
        return self._kept

    async def _keep(self) -> None:
        least, most = _PAUSE_SECONDS
        ours, began, pause = None, 0.0, least
        while not self._ends.is_set():
            found = service.in_background(self._settings)
            if found is not None:
                if found != ours:
                    ours, began, since = found, time.monotonic(), iso(time.time() * 1000)
                    id = host.host_id(self._settings.state_dir)
                    self._kept = replace(
                        self._kept, state="running", pid=found.pid, host_id=id, since=since, error=None
                    )
                await self._wait(_LOOK_SECONDS)
                continue
            if ours is not None:  # it has ended
                pause = least if time.monotonic() - began > most else min(2 * pause, most)
                ours, restarts = None, self._kept.restarts + 1
                self._kept = replace(self._kept, state="starting", pid=None, since=None, restarts=restarts)
                await self._wait(pause)
            try:
                self._refuse_without_token()
                await self._command("swarm.cli.engine", "start", *self._wanted.options, seconds=_START_SECONDS)
            except Exception as error:  # whatever it is, it is told, and tried again
                self._kept = replace(self._kept, state="failing", error=_said(error))
                pause = min(2 * pause, most)
                await self._wait(pause)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ends.wait()

    async def _stop(self, engine: service.Process, *, drain: bool, within_seconds: float | None) -> None:
        id, ours = host.host_id(self._settings.state_dir) if drain else None, False
        if id:
            said = await self._command("swarm.cli.main", "host", "show", id, "--json", seconds=60.0)
            shown = json.loads(said)["host"]
            ours = not shown["draining"]
            # The sooner of the two times: ours, and that of whoever drains it already.
            times = [one for one in (within_seconds, shown["put_back_seconds"]) if one is not None]
            within = [f"--within={max(0.0, min(times)):g}"] if times else []
            await self._command("swarm.cli.main", "host", "drain", id, "--wait", *within, seconds=_STOP_SECONDS)
        await service.stop(engine, now=False, timeout_seconds=None)
        if id and ours:  # the drain was for this stop: the next engine here takes work
            await self._command("swarm.cli.main", "host", "undrain", id, seconds=60.0)

    async def _command(self, module: str, *words: str, seconds: float) -> bytes:
        """What it prints."""
        home = ["--home", str(self._settings.home)]
        argv = [sys.executable, "-m", module, *words, *home]
        # The environment has the settings, the database's too.
        return (await process.run(argv, timeout_seconds=seconds, env=dict(os.environ))).stdout

    def _refuse_without_token(self) -> None:
        if self._wanted.secured and not asks_for_token():
            raise SwarmError(NO_TOKEN)


class Overseer:
    """Puts a keeper on every node, new ones too, and drains the engine of a node that Ray is about to take down."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._keepers: dict[str, tuple[Kept, Any]] = {}  # by node: what it was made with, and the actor
        self._leaving: set[str] = set()
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._going_down = threading.Lock()
        self._stopped: list[Kept] = []
        threading.Thread(target=self._oversee, daemon=True).start()

    def want(self, wanted: Wanted) -> bool | None:
        """What engines that start from now on are to run. True if it is something else than before; None if a `down`
        has begun."""
        if self._ends.is_set():
            return None
        with self._lock:
            changed, self._wanted = wanted != self._wanted, wanted
            for _, keeper in self._keepers.values():
                keeper.want.remote(wanted)
        return changed

    def state(self) -> list[Kept]:
        with self._lock:
            asked = [(kept, keeper.state.remote()) for kept, keeper in self._keepers.values()]
        return [_answer(kept, reference, _CALL_SECONDS) for kept, reference in asked]

    def down(self, *, drain: bool) -> list[Kept]:
        """Stop every engine, and keep none. Another call meanwhile waits for the same."""
        self._ends.set()
        with self._going_down:
            nodes = living_nodes()
            with self._lock:
                keepers = [one for node, one in self._keepers.items() if node in nodes]
            asked = [(kept, keeper.stop.remote(drain=drain)) for kept, keeper in keepers]
            self._stopped += [_answer(kept, reference, _STOP_SECONDS) for kept, reference in asked]
            with self._lock:
                self._keepers.clear()
            for _, keeper in keepers:
                _kill(keeper)
            return self._stopped

    def _oversee(self) -> None:
        while not self._ends.is_set():
            try:
                self._look()
            except Exception as error:  # Ray's own: it is asked again, and this loop must not end
                log.warning("Ray does not say which nodes it has", error=str(error)[:500])
            self._ends.wait(_LOOK_SECONDS)

    def _look(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = living_nodes()
        drained = ray._private.state.state.get_draining_nodes()  # Ray's own libraries ask so; there is no public way
        with self._lock:
            if self._ends.is_set():
                return
            for node in nodes.keys() - self._keepers.keys() - drained.keys():
                make = ray.remote(Keeper).options(
                    name=f"keeper of {node}", namespace=NAMESPACE, get_if_exists=True, lifetime="detached",
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                    num_cpus=0, max_restarts=-1, max_concurrency=8,
                )  # fmt: skip
                self._keepers[node] = nodes[node], make.remote(nodes[node], self._wanted)
            for node in self._keepers.keys() - nodes.keys():
                _kill(self._keepers.pop(node)[1])
            for node in (drained.keys() & self._keepers.keys()) - self._leaving:
                self._leaving.add(node)
                within = None  # Ray names no time
                if drained[node]:
                    within = max(0.0, drained[node] / 1000 - time.time() - _LEAST_NOTICE_SECONDS)
                self._keepers[node][1].stop.remote(drain=True, within_seconds=within)


def living_nodes() -> dict[str, Kept]:
    """Ray's nodes by their id, each with an engine that starts."""
    import ray

    return {
        node["NodeID"]: Kept(node=node["NodeID"], host=node["NodeManagerHostname"], address=node["NodeManagerAddress"])
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }


def _answer(kept: Kept, reference: Any, seconds: float) -> Kept:
    import ray

    try:
        return cast(Kept, ray.get(reference, timeout=seconds))
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()
        return replace(kept, state="silent", error=said[-1][:500] if said else type(error).__name__)


def _kill(keeper: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError, ValueError):  # it is gone already
        ray.kill(keeper)


def asks_for_token() -> bool:
    """Does this process's Ray want its token of everybody who connects?"""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def _said(error: Exception) -> str:
    """The last line of what a command printed is its error."""
    text = error.stderr if isinstance(error, CommandFailed) and error.stderr.strip() else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[-1].removeprefix("error: ")[:500]
