"""The transcripts of the pages, run again: each command as it is typed, and what it prints compared with the page.

A comment above a fenced block says what the block is for this test: `<!-- run: qemu -->` (or `process`, where the same
commands work without VMs) a transcript, `<!-- file: NAME -->` a file that the reader is told to write. The blocks of a
page share one shell, directory and home. In a transcript, a line `…` stands for any lines, `…` within a line for any
text. Times, ids, paths and columns' widths may differ.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup
from swarm.config import Settings
from tests.agents.scripted_api import Answer, ScriptedApi
from tests.conftest import CACHE

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^(?:<!-- (run|file): (\S+) -->\n)?```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEY = "sk-ant-your-key"  # as the README has it
SECONDS = 300  # for one command

MASKS = [
    (re.compile(pattern), mask)
    for pattern, mask in (
        (r"\S*/(?=\.demo\b)", ""),
        (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}\b", "<id>"),
        (r"\d{4}-\d\d-\d\dT[\d:.]+Z?|\b\d\d:\d\d:\d\d\b", "<when>"),
        (r"\b[\d.]+ ?(?:ms|s|min|h)\b", "<time>"),
        (r"\b[0-9a-f]{12,}\b", "<digest>"),
        (r"\b(process|engine) \d+", r"\1 <pid>"),
        (r" *[█▏▎▍▌▋▊▉]+", ""),
        (r" +", " "),
    )
]


@dataclass(frozen=True)
class Block:
    kind: str  # run, file, or '' if the test does nothing with it
    name: str  # the driver, or the file
    text: str

    @property
    def commands(self) -> Iterator[tuple[str, str]]:
        """Each command, and what the page shows under it. A command goes on while it ends in a backslash or a quote is
        open."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            lines = part.splitlines(keepends=True)
            ends = next(n for n in range(1, len(lines) + 1) if _complete("".join(lines[:n])))
            yield "".join(lines[:ends]).rstrip(), "".join(lines[ends:])


def _complete(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return not command.endswith("\\\n")


def blocks(page: str) -> list[Block]:
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [Block(*one) for one in found]


def masked(text: str) -> list[str]:
    for pattern, mask in MASKS:
        text = pattern.sub(mask, text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def matches(shown: str, printed: str) -> bool:
    """Whether a page shows what a command printed; empty lines don't count."""
    pattern = ""
    for line in masked(shown):
        one = ".*".join(map(re.escape, line.split("…")))
        pattern += r"(?:.*\n)*?" if line == "…" else one + r"\n"
    return re.fullmatch(pattern, "".join(line + "\n" for line in masked(printed))) is not None


class Shell:
    """One bash that keeps its directory and variables between commands, as a reader's does."""

    def __init__(self, place: Path, env: dict[str, str]) -> None:
        self._bash = subprocess.Popen(
            ["bash", "--norc"], cwd=place, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __enter__(self) -> Shell:
        return self

    def __call__(self, command: str) -> str:
        """What the command prints."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        timer = threading.Timer(SECONDS, self._bash.kill)
        timer.start()
        try:
            self._bash.stdin.write(f"{{ {command}\n}} </dev/null; printf '\\n\\1\\n'\n")
            self._bash.stdin.flush()
            printed = ""
            while not printed.endswith("\n\1\n"):
                line = self._bash.stdout.readline()
                assert line, f"the shell has ended, or it took {SECONDS} s: {command}\n{printed}"
                printed += line
            return printed.removesuffix("\n\1\n")
        finally:
            timer.cancel()

    def __exit__(self, *_: object) -> None:
        self._bash.kill()
        self._bash.communicate()


def bash(says: str, command: str) -> Answer:
    return {"text": says, "calls": [{"name": "Bash", "input": {"command": command}}]}


MENDED = r"    middle = len(values) // 2\n    return (values[middle] + values[-1 - middle]) / 2"
SCRIPT = [  # what the model says in the README
    bash("I run the tests first.", "python3 -m unittest 2>&1 | tail -4"),
    bash("An even number of values has two middle ones.", f"sed -i 's|    return .*|{MENDED}|' median.py"),
    bash("Now the tests again.", "python3 -m unittest 2>&1 | tail -3"),
    {"text": "median() returned the upper of the two middle values; now it returns their mean. Both tests pass."},
]


@contextmanager
def model() -> Iterator[str]:
    """The scripted API in a thread of its own, since the test waits for the shell; its address."""
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    api = ScriptedApi(SCRIPT, key=KEY)

    async def serve() -> None:
        async with api.serving():
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(SECONDS)
        yield api.url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@contextmanager
def shell_in(place: Path, settings: Settings) -> Iterator[Shell]:
    """A shell where `make demo` was run before: its home is `.demo`."""
    home = place / ".demo"
    asyncio.run(setup.init(config.load(home=home, images_dir=CACHE), image=False))
    (home / "env").write_text(f"export SWARM_HOME={home} PATH={Path(sys.executable).parent}:$PATH\n")
    shutil.copytree(ROOT / "docs" / "examples", place / "docs" / "examples")
    with model() as url:
        env = dict(os.environ) | {
            "SWARM_IMAGES_DIR": str(settings.images),
            "SWARM_TEMPLATES_DIR": str(settings.templates),
            "ANTHROPIC_BASE_URL": url,
            "COLUMNS": "120",
        }
        try:
            with Shell(place, env) as shell:
                shell(". .demo/env")
                shell("SWARM_DRIVER=qemu swarm template build")  # `make demo` and `swarm init` make it
                yield shell
        finally:
            engine = [sys.executable, "-m", "swarm.cli.engine", "stop", "--home", str(home)]
            subprocess.run(engine, env=env, check=True, stdin=subprocess.DEVNULL, capture_output=True)


@pytest.mark.slow
@pytest.mark.needs("qemu")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param("README.md", marks=pytest.mark.needs("claude-code")),
        "docs/tutorial.md",
        "docs/sandboxes.md",
    ],
)
def test_a_page_shows_what_its_commands_print(page: str, settings: Settings, image: object, tmp_path: Path) -> None:
    installed, home = "/opt/swarm-platform", str(tmp_path / ".demo")
    stale, printed = [], []
    with shell_in(tmp_path, settings) as shell:
        for block in blocks(page):
            if block.kind == "file":
                (tmp_path / block.name).write_text(block.text, encoding="utf-8")
            if block.kind == "run":
                shell(f"export SWARM_DRIVER={block.name}")
                for command, shown in block.commands:
                    said = shell(command.replace(installed, home))
                    shown = shown.replace(installed, home)
                    printed.append(f"$ {command}\n{said}")
                    if not matches(shown, said):
                        stale.append(command)
    assert printed
    assert not stale, "the page doesn't show what these print:\n" + "\n".join(printed)


@pytest.mark.parametrize("page", ["README.md", "docs/sandboxes.md"])
def test_every_transcript_of_a_page_is_run(page: str) -> None:
    assert not [block.text for block in blocks(page) if block.kind != "run" and re.search(r"^\$ ", block.text, re.M)]


def test_a_stale_transcript_is_noticed() -> None:
    printed = "ID   STATE  CREATED\nt-1  done   2026-11-28T19:25:21.364Z\nqueue  1.32 s  ███\n\nOK\n"
    page = "ID  STATE  CREATED\nt-1  done  2025-01-01T00:00:00.000Z\nqueue  20 ms  █\nOK\n"
    assert matches(page, printed) and matches("ID …\n…\nOK\n", printed) and matches("…\n", "")
    lines = page.splitlines(keepends=True)
    for i, line in enumerate(lines):
        without, more = "".join(lines[:i] + lines[i + 1 :]), "".join([*lines[:i], line, line, *lines[i + 1 :]])
        assert not matches(without, printed) and not matches(more, printed)
        assert not matches(page.replace(line, line.upper().lower() + "x\n"), printed)
        assert not matches(page.replace(line, "x" + line), printed)
