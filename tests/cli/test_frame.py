"""What all commands share, tested with a small program: exit status, signals, pipes, and never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = '''
import asyncio, sys
from pathlib import Path
from typing import Annotated
import typer
from swarm.cli.frame import Cli, command, new_app, start
from swarm.errors import Conflict, HostError, UsageError

app = new_app("demo", "A program.")

@command(app, examples=["demo fail host"], json=True)
async def fail(cli: Cli, how: Annotated[str, typer.Argument()]) -> int:
    """Fail."""
    if how == "host":
        raise HostError("no tap: install it")
    if how == "conflict":
        raise Conflict("it is\\x1b[31m taken")
    if how == "group":
        async with asyncio.TaskGroup():
            raise HostError("from a group")
    if how == "bug":
        raise ZeroDivisionError("oops")
    if how == "descriptors":
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
        kept = [open("/dev/null") for _ in range(9)]
    if how == "full":
        with open("/dev/full", "w") as file:
            file.write("x")
    if how == "status":
        return 3
    cli.out.dump({"how": how, "json": cli.out.json})
    return 0

@command(app, examples=["demo elsewhere"], runs="here", fault=125)
async def elsewhere(
    cli: Cli,
    argv: Annotated[list[str], typer.Argument(metavar="COMMAND...")],
    dir: Annotated[Path, typer.Option("--dir")] = Path(),
    timeout: Annotated[float, typer.Option("--timeout", min=0.001)] = 1,
) -> int:
    """Have the exit status of another program."""
    errors = {"host": HostError, "conflict": Conflict, "use": UsageError, "bug": ZeroDivisionError}
    if argv[0] in errors:
        raise errors[argv[0]]("failed")
    return int(argv[0])

@command(app, examples=["demo wait"])
async def wait(cli: Cli) -> None:
    """Wait for a signal."""
    try:
        cli.out.line("waiting")
        await asyncio.Event().wait()
    finally:
        cli.out.line("cleaned up")

@command(app, examples=["demo many"])
async def many(cli: Cli) -> None:
    """Print much."""
    for n in range(100_000):
        cli.out.line(n)

start(app, "demo")
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("frame") / "demo.py"
    path.write_text(PROGRAM)
    yield path


def run(program: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, program, *argv], check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("host", 1, "error: no tap: install it\n"),
        ("conflict", 2, "error: it is\N{REPLACEMENT CHARACTER}[31m taken\n"),
        ("group", 1, "error: from a group\n"),
        (
            "descriptors",
            1,
            "error: out of file descriptors: allow this process more (`ulimit -n`, systemd's LimitNOFILE)\n",
        ),
        ("full", 1, "error: no space left on a disk, or a quota is used up: see `df`\n"),
        ("bug", 1, "error: unexpected: ZeroDivisionError: oops (--debug shows where)\n"),
        ("status", 3, ""),
    ],
)
def test_errors_are_one_line_and_a_status(program: Path, how: str, status: int, said: str) -> None:
    done = run(program, "fail", how)
    assert (done.returncode, done.stderr, done.stdout) == (status, said, "")


@pytest.mark.parametrize(
    ("words", "status"), [("host", 125), ("conflict", 125), ("bug", 125), ("use", 2), ("--nope", 2), ("1", 1)]
)
def test_a_fault_of_ours_is_not_taken_for_the_programs(program: Path, words: str, status: int) -> None:
    assert run(program, "elsewhere", words).returncode == status


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fail", ""], "'how': it is empty"),
        (["elsewhere", ""], "'COMMAND...': it is empty"),
        (["elsewhere", "--dir", "", "0"], "'--dir': it is empty"),
        (["elsewhere", "--dir=", "0"], "'--dir': it is empty"),
        (["elsewhere", "--timeout", "inf", "0"], "'--timeout': inf is not a finite number"),
        (["elsewhere", "--timeout", "nan", "0"], '--timeout must be at least 0.001, but is "nan"'),
    ],
)
def test_what_no_command_can_mean(program: Path, words: list[str], said: str) -> None:
    done = run(program, *words)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert run(program, "elsewhere", "0", "", "x=").returncode == 0, "these words are the program's"


def test_debug_shows_the_traceback(program: Path) -> None:
    done = run(program, "fail", "bug", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError: oops" in done.stderr


@pytest.mark.parametrize("argv", [["fail"], ["fail", "a", "b"], ["frob"], ["fail", "x", "--nope"], ["wait", "--json"]])
def test_wrong_use_is_status_2(program: Path, argv: list[str]) -> None:
    done = run(program, *argv)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "-h` shows how" in done.stderr or "did you mean" in done.stderr


def test_without_arguments_there_is_help_alone(program: Path) -> None:
    done = run(program)
    assert done.returncode == 2 and "Usage" in done.stdout and done.stderr == ""


def test_json_and_bad_settings(program: Path) -> None:
    assert run(program, "fail", "not", "--json").stdout == '{\n  "how": "not",\n  "json": true\n}\n'
    bad = subprocess.run(
        [sys.executable, program, "wait"],
        check=False, capture_output=True, text=True, env=os.environ | {"SWARM_LEASE_SECONDS": "soon"},
    )  # fmt: skip
    assert bad.returncode == 2 and "lease_seconds" in bad.stderr and "'soon'" in bad.stderr


def test_common_options_may_stand_before_the_command(program: Path) -> None:
    assert run(program, "--json", "fail", "not").stdout == run(program, "fail", "not", "--json").stdout
    assert "Traceback" in run(program, "--debug", "fail", "bug").stderr
    refused = run(program, "--json", "wait")
    assert (refused.returncode, refused.stderr) == (2, "error: `demo wait` prints no JSON: leave out --json\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up_and_is_the_status(program: Path, number: signal.Signals) -> None:
    argv = ["env", "--default-signal", sys.executable, str(program), "wait"]  # also under `nohup`, which ignores SIGHUP
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        assert process.stdout.read() == "cleaned up\n"
        assert "Traceback" not in process.stderr.read()
        assert process.wait(timeout=300) == 128 + number


def test_a_closed_pipe_is_not_an_error(program: Path) -> None:
    with subprocess.Popen(
        [sys.executable, program, "many"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=300) == 128 + signal.SIGPIPE
