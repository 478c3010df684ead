"""The shell agent: runs commands and reports on each. agent.yaml lists its inputs and outputs.

An example of an agent that starts other programs: it streams their output (`swarm ticket logs -f` shows it live), keeps
a bounded part of it for its own outputs, and fails when they fail. A program that a command leaves in the background
runs on until the agent ends; its output is still shown, but it belongs to no command any more.
"""

# ruff: noqa: T201

import base64
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

WORK = Path.cwd()
PIPE_BYTES = 64 << 10  # a pipe's capacity: a shell that has ended has no more than this in it
COLLECTED_BYTES = 8 << 20  # of all collected files together, as JSON
COLLECTED_FILES = 1000
NAMED = 20  # of those left out, on stderr


def inside(name: str) -> Path:
    """A path below the work directory; any other is refused."""
    path = (WORK / name).resolve()
    if WORK.resolve() not in path.parents:
        raise SystemExit(f"shell: {name!r} is not below the work directory")
    return path


class Pipe:
    """Passes on what a program prints, and keeps the first ``limit`` bytes until its command has ended."""

    def __init__(self, fd: int, out: BinaryIO, limit: int) -> None:
        self.fd, self.out, self.limit = fd, out, limit
        self.kept = bytearray()
        self.total = 0

    def read(self) -> bool:
        """False at its end."""
        data = os.read(self.fd, PIPE_BYTES)
        self.out.write(data)
        self.out.flush()
        self.kept += data[: max(0, self.limit - self.total)]
        self.total += len(data)
        return bool(data)


class Commands:
    def __init__(self, env: dict[str, str], limit: int) -> None:
        self.env, self.limit = env, limit
        self.open = selectors.DefaultSelector()  # pipes, also of what earlier commands left running

    def run(self, command: str) -> dict[str, Any]:
        print(f"$ {command}", file=sys.stderr, flush=True)
        began = time.monotonic()
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            cwd=WORK,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdout is not None and child.stderr is not None
        out = Pipe(os.dup(child.stdout.fileno()), sys.stdout.buffer, self.limit)
        err = Pipe(os.dup(child.stderr.fileno()), sys.stderr.buffer, self.limit)
        child.stdout.close()
        child.stderr.close()
        for pipe in (out, err):
            self.open.register(pipe.fd, selectors.EVENT_READ, pipe)
        ended = os.pidfd_open(child.pid)
        self.open.register(ended, selectors.EVENT_READ, None)
        # The shell's end counts, not that of its pipes, which what it left in the background has too.
        while (ready := self.read(None)) and ended not in ready:
            pass
        self.open.unregister(ended)
        os.close(ended)
        code = child.wait()
        self.read(0)  # what it printed last
        out.limit = err.limit = 0
        return {
            "command": command,
            "exit_code": code if code >= 0 else 128 - code,
            "stdout": out.kept.decode(errors="replace"),
            "stderr": err.kept.decode(errors="replace"),
            "truncated": any(pipe.total > self.limit for pipe in (out, err)),
            "seconds": round(time.monotonic() - began, 3),
        }

    def read(self, timeout: float | None) -> list[int]:
        """Read once from each pipe that has something. Returns which descriptors were ready."""
        ready = []
        for key, _ in self.open.select(timeout):
            ready.append(key.fd)
            if isinstance(key.data, Pipe) and not key.data.read():
                self.open.unregister(key.fd)
                os.close(key.fd)
        return ready


@dataclass
class Collected:
    """Files for the outputs. What does not fit, or is no file, is named: nothing is cut."""

    files: dict[str, str] = field(default_factory=dict)
    binary: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    def add(self, name: str) -> None:
        """A file, a directory with all that is below it, or a pattern such as dist/*.txt or **/*.log."""
        there = os.path.lexists(WORK / name)
        found = list(files_of(WORK / name)) if there else list(matching(name))
        if not found and not there:
            self.missing.append(name)
            print(f"shell: nothing to collect is named {name!r}", file=sys.stderr)
        for path in found:
            self.add_file(path)

    def add_file(self, path: Path) -> None:
        name = str(path.relative_to(WORK)).encode(errors="replace").decode()
        if name in self.files or name in self.binary or name in self.left_out:
            return
        size = path.stat().st_size if path.is_file() else 0
        full = size > COLLECTED_BYTES - self.bytes or len(self.files) + len(self.binary) >= COLLECTED_FILES
        if full or not path.is_file() or WORK.resolve() not in path.resolve().parents:
            self.leave_out(name, size)
            return
        data = path.read_bytes()
        try:
            text, into = data.decode(), self.files
        except UnicodeDecodeError:
            text, into = base64.b64encode(data).decode(), self.binary
        length = len(json.dumps(text))
        if length > COLLECTED_BYTES - self.bytes:
            self.leave_out(name, size)
            return
        into[name] = text
        self.bytes += length

    def leave_out(self, name: str, size: int) -> None:
        if len(self.left_out) >= COLLECTED_FILES:
            return
        self.left_out[name] = size
        if len(self.left_out) <= NAMED:
            why = f"the outputs hold {COLLECTED_FILES:,} plain files and {COLLECTED_BYTES >> 20} MiB"
            print(f"shell: {name!r} ({size:,} bytes) is left out: {why}; leave others in out/", file=sys.stderr)


def files_of(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for here, _, names in os.walk(path):
        yield from (Path(here) / name for name in sorted(names))


def matching(pattern: str) -> Iterator[Path]:
    try:
        found = sorted(WORK.glob(pattern))
    except ValueError:  # no pattern either
        return
    for path in found:
        if path != WORK / "input.json":
            yield from files_of(path)


def main() -> None:
    inputs = json.loads(Path("input.json").read_text(encoding="utf-8"))["inputs"]
    commands = inputs["commands"]
    if isinstance(commands, str):
        commands = [commands]
    stop = inputs.get("stop_on_error", True)
    for name in inputs.get("collect", []):
        inside(name)  # before any work is done
    for name, text in inputs.get("files", {}).items():
        path = inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shell = Commands({**os.environ, **inputs.get("env", {})}, inputs.get("max_output_bytes", 65536))
    results = []
    for command in commands:
        results.append(shell.run(command))
        if results[-1]["exit_code"] and stop:
            break
    code = next((one["exit_code"] for one in results if one["exit_code"]), 0)
    collected = Collected()
    for name in inputs.get("collect", []):
        collected.add(name)
    made = {
        "exit_code": code,
        "ok": code == 0,
        "stdout": "".join(one["stdout"] for one in results),
        "results": results,
        "files": collected.files,
        "binary": collected.binary,
        "missing": collected.missing,
        "left_out": collected.left_out,
    }
    Path("output.json").write_text(json.dumps(made), encoding="utf-8")
    if code and stop:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
