"""Sandboxes, for `Swarm`. Made from aio_sandboxes.py by `make docs`: change that file."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
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
    from swarm.client.sync import Swarm


@dataclass(frozen=True, kw_only=True)
class Sandbox(SandboxFields):
    """A VM that stays, as it was when the server answered. Whatever is done in a paused one resumes it first. In a
    `with`, it ends with the block."""

    _swarm: Swarm = field(repr=False, compare=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def refresh(self) -> Sandbox:
        return self._swarm.sandboxes.get(self.id)

    def wait(self, timeout: float | None = None) -> Sandbox:
        """Return it when it has started. Raises SandboxEnded, and TimedOut after so many seconds. Nothing needs it:
        what is done in a sandbox waits by itself."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = calls.POLL_SECONDS if end is None else end - time.monotonic()
            seconds = max(0.0, min(left, calls.POLL_SECONDS))
            found = self._read(self._swarm._do(calls.wait(self.id, seconds, "sandboxes")))
            if found.ended:
                raise SandboxEnded(found)
            if found.state != "starting":
                return found
            if left <= 0:
                raise TimedOut(f"the sandbox {self.id} has not started within {timeout:g} s")

    def exec(self, *argv: str, **given: Unpack[Command]) -> Executed:
        """Run a command to its end: `exec("make", "test")`; one word that has spaces is a line for a shell. If the
        connection breaks, it is killed, unless it was told `background`. Raises CommandFailed if it was told `check`
        and did not end with 0."""
        return calls.executed(self._swarm._do(calls.execute(self.id, argv, given)), given)

    def start(self, *argv: str, **given: Unpack[Command]) -> Running:
        """Begin a command, to hear what it writes while it runs. It runs on when the connection breaks."""
        given["background"] = True
        return self.attach((self.exec(*argv, **given)).process)

    def attach(self, process: str, *, after: int = 0) -> Running:
        """Come back to a command that runs, or has ended. ``after``: what it wrote before this byte is known; the
        sandbox keeps the latest 256 KiB."""
        return Running(self, process, after)

    def processes(self) -> Sequence[Process]:
        """Those that run, and the last that have ended, with their status."""
        return read_all(Process, self._swarm._do(calls.in_sandbox(self.id, "processes")))

    def signal(self, process: str, name: str = "TERM") -> None:
        """To a process and all that it started."""
        self._swarm._do(calls.signal(self.id, process, name))

    def read(self, path: str) -> bytes:
        """What is in a file. Raises NotFound."""
        file = io.BytesIO()
        self._swarm._save(calls.in_sandbox(self.id, "files/content", path=path), file)
        return file.getvalue()

    def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Make or replace a file: others see the old or the new one, never half of it."""
        self._swarm._do(calls.write_file(self.id, path, data, mode))

    def files(self, path: str = "/work") -> Sequence[GuestFile]:
        """What is in a directory. Raises NotFound."""
        return read_all(GuestFile, (self._swarm._do(calls.in_sandbox(self.id, "files", path=path)))["entries"])

    def remove(self, path: str, *, recursive: bool = False) -> None:
        self._swarm._do(calls.remove_file(self.id, path, recursive=recursive))

    def put(self, local: str | os.PathLike[str], path: str = "/work") -> None:
        """Copy a file, or what is in a directory, into a directory of the sandbox."""
        archive = packed(local)
        self._swarm._do(calls.put_archive(self.id, path, archive))

    def get(self, path: str, local: str | os.PathLike[str], *, replace: bool = False) -> list[Path]:
        """Copy a directory of the sandbox into a local one; returns the files' paths. Raises Conflict for a file that
        is there, unless ``replace``."""
        with tempfile.TemporaryFile() as file:
            self._swarm._save(calls.in_sandbox(self.id, "files/archive", path=path), file)
            return unpack(file, local, replace=replace)

    def pause(self) -> Sandbox:
        """To disk: it costs no memory then, and its next use resumes it as it was."""
        return self._read(self._swarm._do(calls.change_sandbox(self.id, "pause")))

    def resume(self) -> Sandbox:
        return self._read(self._swarm._do(calls.change_sandbox(self.id, "resume")))

    def fork(self, count: int = 1, *, name: str | None = None) -> list[Sandbox]:
        """New sandboxes that start from its files, processes and memory as they are. It runs on."""
        made = self._swarm._do(calls.act_on_sandbox(self.id, "fork", count=count, name=name))
        return [self._read(one) for one in made]

    def snapshot(
        self, name: str | None = None, *, keep_seconds: float | None = None, without_secrets: bool = False
    ) -> Snapshot:
        """Keep its state, from which sandboxes can start (`create(snapshot=…)`). It runs on."""
        more = {"keep_seconds": keep_seconds, "without_secrets": without_secrets or None}
        return read(Snapshot, self._swarm._do(calls.act_on_sandbox(self.id, "snapshot", name=name, **more)))

    def end(self) -> Sandbox:
        """Its VM is gone then; what happened in it stays known."""
        return self._read(self._swarm._do(calls.end_sandbox(self.id)))

    def events(self, *, after: int = 0) -> Iterator[Event]:
        """What happened in it until now: commands, files, connections, model calls."""
        while True:
            page = self._swarm._do(calls.get(calls.sandbox(self.id, "events"), after=after))
            yield from read_all(Event, page["events"])
            if not page["events"]:
                return
            after = page["after"]

    def _read(self, data: Mapping[str, Any]) -> Sandbox:
        return read(Sandbox, data, _swarm=self._swarm)


class Running:
    """A command in a sandbox, by `Sandbox.start` or `attach`. In a `with`, one that still runs at the end of the
    block is killed, with all that it started."""

    def __init__(self, sandbox: Sandbox, process: str, after: int) -> None:
        self.process = process
        self._sandbox, self._swarm = sandbox, sandbox._swarm
        self._outputs = Outputs(sandbox.id, process, after)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._outputs.result is None:
            with suppress(Invalid, Conflict, NotFound):  # it has ended
                self.signal("KILL")

    @property
    def after(self) -> int:
        """How many bytes of its output are known, for another `attach`."""
        return self._outputs.after

    @property
    def dropped_bytes(self) -> int:
        """Of its output, were gone before they were asked for."""
        return self._outputs.dropped_bytes

    def output(self) -> Iterator[Output]:
        """What it writes, as it comes, until it has ended. Over a connection that breaks, it goes on where it was."""
        outputs, server = self._outputs, self._swarm._server
        tries = server.tries(outputs.call)
        while outputs.result is None:
            delay: float | None
            try:
                response = self._swarm._http.send(outputs.call.request(self._swarm._http), stream=True)
                with closing(response):
                    if (delay := tries.answered(response)) is None:
                        if response.status_code != 200:
                            response.read()
                            tries.value(response)
                        for data in response.iter_bytes():
                            yield from outputs.take(data)
                            tries.went_well()
                        delay = tries.cut() if outputs.result is None else 0.0
            except httpx.ReadTimeout:
                delay = 0.0  # it writes nothing
            except httpx.TransportError as error:
                delay = tries.broke(error)
            time.sleep(delay)

    def wait(self) -> Executed:
        """How it ended, when it has. Output that nobody has read is lost."""
        for _ in self.output():
            pass
        assert self._outputs.result is not None
        return self._outputs.result

    def signal(self, name: str = "TERM") -> None:
        """To it and all that it started."""
        self._sandbox.signal(self.process, name)


class Sandboxes:
    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    def create(self, **given: Unpack[NewSandbox]) -> Sandbox:
        """A new one; it starts while this returns. Raises NotFound, Invalid."""
        return read(Sandbox, self._swarm._do(calls.create_sandbox(given)), _swarm=self._swarm)

    def get(self, sandbox: str) -> Sandbox:
        """By its name or id. Raises NotFound."""
        return read(Sandbox, self._swarm._do(calls.get(calls.sandbox(sandbox))), _swarm=self._swarm)

    def list(self, *, state: str | Sequence[str] = ()) -> Iterator[Sandbox]:
        """All, or those in this state, newest first, a page at a time."""
        after = None
        while True:
            page = self._swarm._do(calls.get("/v1/sandboxes", state=state, limit=calls.PAGE, after=after))
            yield from read_all(Sandbox, page["sandboxes"], _swarm=self._swarm)
            if (after := page.get("after")) is None:
                return

    def snapshots(self) -> Iterator[Snapshot]:
        """All, newest first."""
        after = None
        while True:
            page = self._swarm._do(calls.get("/v1/snapshots", limit=calls.PAGE, after=after))
            yield from read_all(Snapshot, page["snapshots"])
            if (after := page.get("after")) is None:
                return

    def remove_snapshot(self, snapshot: str) -> None:
        """By its name or id. Raises NotFound, and Conflict if something needs it."""
        self._swarm._do(calls.remove_snapshot(snapshot))
