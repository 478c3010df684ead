"""Engines as processes on this host: start one in the background, find those of a home, stop them.

An engine records its pid and start time in the table `workers`; together they identify a process for ever. An engine in
the background also has a pid file (with the same two) and a log file beside the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.app import address
from swarm.base import files, process
from swarm.base.aio import cancel_all
from swarm.base.log import logger
from swarm.errors import Conflict, HostError, StoreError

if TYPE_CHECKING:
    from swarm.app.address import Address
    from swarm.config import Settings
    from swarm.store.sql.rows import WorkerRow
    from swarm.store.store import Store

_PROGRAMS = ("swarm-engine", "swarm.cli.engine")
_ONE_TICKET = (*_PROGRAMS, "swarm", "swarm.cli.main")
_SECOND_SIGNAL_SECONDS = 0.2
_START_SECONDS = 180.0  # at worst it boots a VM with every driver first
_SERVER_SECONDS = 15.0  # until the server has its address
_SERVER_GRACE_SECONDS = 11.0  # requests get 10 s to end
_SERVER_PAUSE_SECONDS = (1.0, 60.0)  # before a server that ended is started again: doubled each time

log = logger("swarm.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, identified for ever."""

    pid: int
    started: int  # clock ticks since boot

    @property
    def alive(self) -> bool:
        return process.start_time(self.pid) == self.started


async def has_engine(store: Store) -> bool:
    from swarm.store.registry.workers import is_alive

    return any(is_alive(row) for row in await store.workers())


async def is_served(settings: Settings, store: Store, ticket_id: str) -> bool:
    """Does anything take this ticket: a live engine, or a command of this host that runs it itself?"""
    return await has_engine(store) or await asyncio.to_thread(_is_run_here, settings, ticket_id)


def _is_run_here(settings: Settings, ticket_id: str) -> bool:
    """Does a process of this host run this one ticket, or one with an id that its arguments don't name? Such a process
    is no engine, and in no table. One that was started in the background names the home, also before it has opened the
    database."""
    database = _database(settings)
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = place.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        runs = ticket_id in argv if "run-ticket" in argv else "--wait" in argv
        if runs and int(place.parent.name) != os.getpid():
            one = Process(pid=int(place.parent.name), started=process.start_time(int(place.parent.name)) or 0)
            if str(settings.home) in argv or _has_open(one, database, _ONE_TICKET):
                return True
    return False


def _database(settings: Settings) -> Path | None:
    from swarm.store.sql.database import Database

    return Database(settings.database, busy_timeout_seconds=settings.busy_timeout_seconds).file


def pid_file(settings: Settings) -> Path:
    return settings.data_dir / "engine.pid"


def log_file(settings: Settings) -> Path:
    return settings.data_dir / "engine.log"


def in_background(settings: Settings) -> Process | None:
    """The live engine that the pid file names."""
    try:
        value = json.loads(files.read_own(pid_file(settings)))
        found = Process(pid=int(value["pid"]), started=int(value["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.alive else None


@contextlib.contextmanager
def pid_written(path: Path | None) -> Iterator[None]:
    """Keep a pid file for the length of the block. It is written atomically."""
    if path is None:
        yield
        return
    ours = {"pid": os.getpid(), "started": process.start_time(os.getpid())}
    try:
        files.write_atomically(path, json.dumps(ours))
    except OSError as error:
        raise HostError(f"can't write the pid file {path}: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(files.read_own(path)) == ours:  # another engine may have replaced it
                path.unlink()


def of_row(row: WorkerRow) -> Process | None:
    """The process of this row, if it is alive on this host."""
    started = row.info.get("started")
    if not _is_here(row) or not isinstance(started, int) or not row.pid:
        return None
    found = Process(pid=row.pid, started=started)
    return found if found.alive else None


def is_engine(one: Process, database: Path | None) -> bool:
    """Is it really an engine, with this database open? A row or a pid file may name any process of the host."""
    return _has_open(one, database, _PROGRAMS, word="start")


def _has_open(one: Process, database: Path | None, programs: Sequence[str], *, word: str = "") -> bool:
    place = Path(f"/proc/{one.pid}")
    try:
        argv = place.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
        descriptors = list(place.joinpath("fd").iterdir())
    except OSError:  # it has ended, or is not ours
        return False
    named = any(Path(part).name in programs for part in argv[:4]) and (not word or word in argv)
    has_it = database is None or any(_opens(one, os.path.realpath(database)) for one in descriptors)
    return named and has_it and one.alive


def _opens(descriptor: Path, file: str) -> bool:
    try:
        return str(descriptor.readlink()).removesuffix(" (deleted)") == file
    except OSError:  # closed meanwhile
        return False


def _is_here(row: WorkerRow) -> bool:
    """Does its process, if it lives, have its pid here? The host's name may have changed since."""
    machine = row.info.get("machine")
    return machine == process.machine() if machine else row.host == socket.gethostname()


async def forget_dead(store: Store) -> None:
    """Remove the rows of engines that were killed on this host."""
    for row in await store.workers():
        if _is_here(row) and of_row(row) is None:
            await store.forget_worker(row.id)


async def start(settings: Settings, store: Store, argv: Sequence[str]) -> Process:
    """Start an engine in the background, and wait until it serves. Raises Conflict if one already runs."""
    if (running := in_background(settings)) is not None:
        raise Conflict(f"an engine already runs in the background (pid {running.pid}); `swarm-engine stop` stops it")
    await store.workers()  # raises StoreError now if the database can't be used
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)  # of a host whose database is elsewhere
    except OSError as error:
        raise HostError(f"can't make {settings.data_dir}: {error.strerror}") from None
    log, pidfile = log_file(settings), pid_file(settings)
    child = await process.spawn(
        [sys.executable, "-m", "swarm.cli.engine", "start", "--foreground", "--pid-file", str(pidfile),
         "--home", str(settings.home), *argv],
        output=log, env=dict(os.environ), die_with_parent=False,
    )  # fmt: skip
    found = Process(pid=child.pid, started=process.start_time(child.pid) or 0)
    dead = asyncio.create_task(child.wait())
    try:
        async with asyncio.timeout(_START_SECONDS), store.watching() as wake:
            while not any(row.pid == found.pid for row in await store.workers()):
                changed = asyncio.create_task(wake.changed(timeout_seconds=5.0))
                await asyncio.wait({dead, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                await asyncio.gather(changed, return_exceptions=True)
                if dead.done():
                    raise HostError(f"the engine ended at once (status {dead.result()}): {_last_line(log)}")
    except TimeoutError:
        raise HostError(
            f"the engine (pid {found.pid}) is not ready yet after {_START_SECONDS:g} s; see {log}"
        ) from None
    finally:
        dead.cancel()
    return found


@contextlib.asynccontextmanager
async def with_server(settings: Settings, port: int, *, as_json: bool, output: Path | None) -> AsyncIterator[None]:
    """Run `swarm serve` beside the block, in a process of its own, which is started again whenever it ends. That it
    can't run ends nothing else. ``output``: of its log; None: our stderr."""
    task = asyncio.create_task(_keep_serving(settings, port, as_json=as_json, output=output))
    try:
        yield
    finally:
        await cancel_all([task])


async def _keep_serving(settings: Settings, port: int, *, as_json: bool, output: Path | None) -> None:
    argv = [sys.executable, "-m", "swarm.cli.main", "serve", f"--port={port}", "--home", str(settings.home)]
    argv += ["--json-log"] if as_json else []
    least, most = _SERVER_PAUSE_SECONDS
    pause = least
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        while True:
            began = time.monotonic()
            try:
                child = await process.spawn(argv, output=output, stdout=null, env=dict(os.environ))
                try:
                    how = process.how_it_ended(await child.wait())
                finally:
                    await process.kill(child, grace_seconds=_SERVER_GRACE_SECONDS)
            except HostError as error:
                how = str(error)
            pause = least if time.monotonic() - began > most else pause
            log.warning("the server ended; it is started again", how=how, in_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, most)
    finally:
        os.close(null)


async def server_ready(settings: Settings) -> Address | None:
    """The home's server, once it serves; None if it doesn't within some seconds."""
    for _ in range(round(_SERVER_SECONDS / 0.05)):
        if (found := address.running(settings)) is not None:
            return found
        await asyncio.sleep(0.05)
    return None


def server(settings: Settings) -> Process | None:
    """The home's server, if it is one: the file could name any process."""
    found = address.running(settings)
    one = None if found is None else Process(pid=found.pid, started=found.started)
    return one if one and _has_open(one, _database(settings), ("swarm", "swarm.cli.main"), word="serve") else None


async def engines(settings: Settings) -> list[Process]:
    """Every live engine of this home on this host. If the database can't be read: only the one in the pid file."""
    from swarm.app import wiring

    # Its pid file is written before it opens the database.
    found = {ours.pid: ours for ours in [in_background(settings)] if ours is not None and is_engine(ours, None)}
    with contextlib.suppress(StoreError):
        file = _database(settings)
        async with wiring.store(settings) as store:
            for row in await store.workers():
                if (one := of_row(row)) is not None and is_engine(one, file):
                    found[one.pid] = one
    return list(found.values())


async def stop(one: Process, *, now: bool, timeout_seconds: float | None) -> bool:
    """Send SIGTERM (twice if ``now``), and wait for its end. Returns False if it has not ended in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            # The second comes a moment later: the kernel merges two pending signals into one.
            for pause in (_SECOND_SIGNAL_SECONDS, None) if now else (None,):
                process.signal_stranger(one.pid, one.started, signal.SIGTERM)
                if await process.gone(one.pid, one.started, timeout_seconds=pause):
                    return True
    return False


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else f"it printed nothing; see {log}"
