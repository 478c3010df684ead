"""Sandboxes, for `AsyncSwarm`. sync_sandboxes.py is made from this file by `make docs`: change this one."""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import httpx

from swarm.client import calls
from swarm.client.archive import packed, unpack
from swarm.client.errors import Conflict, Invalid, NotFound, SandboxEnded, TimedOut
from swarm.client.stream import Outputs
from swarm.client.values import (
    Command,
    Event,
    Executed,
    GuestFile,
    NewSandbox,
    Output,
    Process,
    SandboxFields,
    Snapshot,
    read,
    read_all,
)

if TYPE_CHECKING:
    from swarm.client.aio import AsyncSwarm


@dataclass(frozen=True, kw_only=True)
class AsyncSandbox(SandboxFields):
    """A VM that stays, as it was when the server answered. Whatever is done in a paused one resumes it first. In a
    `with`, it ends with the block."""

    _swarm: AsyncSwarm = field(repr=False, compare=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def refresh(self) -> AsyncSandbox:
        return await self._swarm.sandboxes.get(self.id)

    async def wait(self, timeout: float | None = None) -> AsyncSandbox:
        """Return it when it has started. Raises SandboxEnded, and TimedOut after so many seconds. Nothing needs it:
        what is done in a sandbox waits by itself."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = calls.POLL_SECONDS if end is None else end - time.monotonic()
            seconds = max(0.0, min(left, calls.POLL_SECONDS))
            found = self._read(await self._swarm._do(calls.wait(self.id, seconds, "sandboxes")))
            if found.ended:
                raise SandboxEnded(found)
            if found.state != "starting":
                return found
            if left <= 0:
                raise TimedOut(f"the sandbox {self.id} has not started within {timeout:g} s")

    async def exec(self, *argv: str, **given: Unpack[Command]) -> Executed:
        """Run a command to its end: `exec("make", "test")`; one word that has spaces is a line for a shell. If the
        connection breaks, it is killed, unless it was told `background`. Raises CommandFailed if it was told `check`
        and did not end with 0."""
        return calls.executed(await self._swarm._do(calls.execute(self.id, argv, given)), given)

    async def start(self, *argv: str, **given: Unpack[Command]) -> AsyncRunning:
        """Begin a command, to hear what it writes while it runs. It runs on when the connection breaks."""
        given["background"] = True
        return await self.attach((await self.exec(*argv, **given)).process)

    async def attach(self, process: str, *, after: int = 0) -> AsyncRunning:
        """Come back to a command that runs, or has ended. ``after``: what it wrote before this byte is known; the
        sandbox keeps the latest 256 KiB."""
        return AsyncRunning(self, process, after)

    async def processes(self) -> Sequence[Process]:
        """Those that run, and the last that have ended, with their status."""
        return read_all(Process, await self._swarm._do(calls.in_sandbox(self.id, "processes")))

    async def signal(self, process: str, name: str = "TERM") -> None:
        """To a process and all that it started."""
        await self._swarm._do(calls.signal(self.id, process, name))

    async def read(self, path: str) -> bytes:
        """What is in a file. Raises NotFound."""
        file = io.BytesIO()
        await self._swarm._save(calls.in_sandbox(self.id, "files/content", path=path), file)
        return file.getvalue()

    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Make or replace a file: others see the old or the new one, never half of it."""
        await self._swarm._do(calls.write_file(self.id, path, data, mode))

    async def files(self, path: str = "/work") -> Sequence[GuestFile]:
        """What is in a directory. Raises NotFound."""
        return read_all(GuestFile, (await self._swarm._do(calls.in_sandbox(self.id, "files", path=path)))["entries"])

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        await self._swarm._do(calls.remove_file(self.id, path, recursive=recursive))

    async def put(self, local: str | os.PathLike[str], path: str = "/work") -> None:
        """Copy a file, or what is in a directory, into a directory of the sandbox."""
        archive = await asyncio.to_thread(packed, local)
        await self._swarm._do(calls.put_archive(self.id, path, archive))

    async def get(self, path: str, local: str | os.PathLike[str], *, replace: bool = False) -> list[Path]:
        """Copy a directory of the sandbox into a local one; returns the files' paths. Raises Conflict for a file that
        is there, unless ``replace``."""
        with tempfile.TemporaryFile() as file:
            await self._swarm._save(calls.in_sandbox(self.id, "files/archive", path=path), file)
            return await asyncio.to_thread(unpack, file, local, replace=replace)

    async def pause(self) -> AsyncSandbox:
        """To disk: it costs no memory then, and its next use resumes it as it was."""
        return self._read(await self._swarm._do(calls.change_sandbox(self.id, "pause")))

    async def resume(self) -> AsyncSandbox:
        return self._read(await self._swarm._do(calls.change_sandbox(self.id, "resume")))

    async def fork(self, count: int = 1, *, name: str | None = None) -> list[AsyncSandbox]:
        """New sandboxes that start from its files, processes and memory as they are. It runs on."""
        made = await self._swarm._do(calls.act_on_sandbox(self.id, "fork", count=count, name=name))
        return [self._read(one) for one in made]

    async def snapshot(
        self, name: str | None = None, *, keep_seconds: float | None = None, without_secrets: bool = False
    ) -> Snapshot:
        """Keep its state, from which sandboxes can start (`create(snapshot=…)`). It runs on."""
        more = {"keep_seconds": keep_seconds, "without_secrets": without_secrets or None}
        return read(Snapshot, await self._swarm._do(calls.act_on_sandbox(self.id, "snapshot", name=name, **more)))

    async def end(self) -> AsyncSandbox:
        """Its VM is gone then; what happened in it stays known."""
        return self._read(await self._swarm._do(calls.end_sandbox(self.id)))

    async def events(self, *, after: int = 0) -> AsyncIterator[Event]:
        """What happened in it until now: commands, files, connections, model calls."""
        while True:
            page = await self._swarm._do(calls.get(calls.sandbox(self.id, "events"), after=after))
            for event in read_all(Event, page["events"]):
                yield event
            if not page["events"]:
                return
            after = page["after"]

    def _read(self, data: Mapping[str, Any]) -> AsyncSandbox:
        return read(AsyncSandbox, data, _swarm=self._swarm)


class AsyncRunning:
    """A command in a sandbox, by `AsyncSandbox.start` or `attach`. In a `with`, one that still runs at the end of the
    block is killed, with all that it started."""

    def __init__(self, sandbox: AsyncSandbox, process: str, after: int) -> None:
        self.process = process
        self._sandbox, self._swarm = sandbox, sandbox._swarm
        self._outputs = Outputs(sandbox.id, process, after)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._outputs.result is None:
            with suppress(Invalid, Conflict, NotFound):  # it has ended
                await self.signal("KILL")

    @property
    def after(self) -> int:
        """How many bytes of its output are known, for another `attach`."""
        return self._outputs.after

    @property
    def dropped_bytes(self) -> int:
        """Of its output, were gone before they were asked for."""
        return self._outputs.dropped_bytes

    async def output(self) -> AsyncIterator[Output]:
        """What it writes, as it comes, until it has ended. Over a connection that breaks, it goes on where it was."""
        outputs, server = self._outputs, self._swarm._server
        tries = server.tries(outputs.call)
        while outputs.result is None:
            delay: float | None
            try:
                response = await self._swarm._http.send(outputs.call.request(self._swarm._http), stream=True)
                async with aclosing(response):
                    if (delay := tries.answered(response)) is None:
                        if response.status_code != 200:
                            await response.aread()
                            tries.value(response)
                        async for data in response.aiter_bytes():
                            for piece in outputs.take(data):
                                yield piece
                            tries.went_well()
                        delay = tries.cut() if outputs.result is None else 0.0
            except httpx.ReadTimeout:
                delay = 0.0  # it writes nothing
            except httpx.TransportError as error:
                delay = tries.broke(error)
            await asyncio.sleep(delay)

    async def wait(self) -> Executed:
        """How it ended, when it has. Output that nobody has read is lost."""
        async for _ in self.output():
            pass
        assert self._outputs.result is not None
        return self._outputs.result

    async def signal(self, name: str = "TERM") -> None:
        """To it and all that it started."""
        await self._sandbox.signal(self.process, name)


class AsyncSandboxes:
    def __init__(self, swarm: AsyncSwarm) -> None:
        self._swarm = swarm

    async def create(self, **given: Unpack[NewSandbox]) -> AsyncSandbox:
        """A new one; it starts while this returns. Raises NotFound, Invalid."""
        return read(AsyncSandbox, await self._swarm._do(calls.create_sandbox(given)), _swarm=self._swarm)

    async def get(self, sandbox: str) -> AsyncSandbox:
        """By its name or id. Raises NotFound."""
        return read(AsyncSandbox, await self._swarm._do(calls.get(calls.sandbox(sandbox))), _swarm=self._swarm)

    async def list(self, *, state: str | Sequence[str] = ()) -> AsyncIterator[AsyncSandbox]:
        """All, or those in this state, newest first, a page at a time."""
        after = None
        while True:
            page = await self._swarm._do(calls.get("/v1/sandboxes", state=state, limit=calls.PAGE, after=after))
            for sandbox in read_all(AsyncSandbox, page["sandboxes"], _swarm=self._swarm):
                yield sandbox
            if (after := page.get("after")) is None:
                return

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        """All, newest first."""
        after = None
        while True:
            page = await self._swarm._do(calls.get("/v1/snapshots", limit=calls.PAGE, after=after))
            for snapshot in read_all(Snapshot, page["snapshots"]):
                yield snapshot
            if (after := page.get("after")) is None:
                return

    async def remove_snapshot(self, snapshot: str) -> None:
        """By its name or id. Raises NotFound, and Conflict if something needs it."""
        await self._swarm._do(calls.remove_snapshot(snapshot))
