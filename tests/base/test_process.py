"""Starting programs: they end with their caller, and errors say why they failed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.base import process
from swarm.errors import CommandFailed, HostError
from tests.conftest import PATIENCE_SECONDS


def test_who_has_surely_ended() -> None:
    ours, now = os.getpid(), process.start_time(os.getpid())
    for pid, started in ((ours, now), (1, process.start_time(1))):
        assert not process.has_ended(pid, started)
    assert process.has_ended(ours, (now or 0) - 1), "another process has its pid by now"
    child = subprocess.Popen(["sleep", "60"])
    started = process.start_time(child.pid)
    assert not process.has_ended(child.pid, started)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.has_ended(child.pid, started), "a zombie does nothing more"
    child.wait()
    assert process.has_ended(child.pid, started)


@pytest.mark.parametrize("pid", [None, "1", 0, -1, 1.0, True, 1 << 40, 1 << 70])
def test_what_can_not_be_told_has_not_ended(pid: object) -> None:
    assert not process.has_ended(pid, 1)
    assert not process.has_ended(os.getpid(), pid) or type(pid) is int


@pytest.mark.needs("root")
async def test_pids_of_another_namespace_are_not_ours() -> None:
    """In a container, the same pid is another process. Where /proc is not the namespace's own, nothing can be said."""
    code = "from swarm.base import process; print(process.machine(), end='')"
    assert process.machine()
    said = {
        option: (await process.run(["unshare", "--pid", "--fork", *option, sys.executable, "-c", code])).stdout.decode()
        for option in ((), ("--mount-proc",))
    }
    assert said[()] == ""
    assert said[("--mount-proc",)] not in ("", process.machine())


async def test_output_and_status() -> None:
    done = await process.run(["sh", "-c", "cat; echo err >&2"], input=b"in")
    assert (done.stdout, done.stderr, done.returncode) == (b"in", b"err\n", 0)


async def test_failure_names_the_command_and_quotes_it() -> None:
    with pytest.raises(CommandFailed, match="ended with status 3: no such thing") as caught:
        await process.run(["sh", "-c", "echo no such thing >&2; exit 3"])
    assert caught.value.returncode == 3


async def test_missing_program() -> None:
    with pytest.raises(HostError, match="'no-such-program' is not installed"):
        await process.run(["no-such-program"])


async def test_timeout_kills() -> None:
    with pytest.raises(HostError, match=r"took longer than 0\.1 s"):
        await process.run(["sleep", "60"], timeout_seconds=0.1)


async def test_cancel_kills(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    os.mkfifo(pidfile)
    task = asyncio.create_task(process.run(["sh", "-c", f"echo $$ > {pidfile}; exec sleep 60"]))
    pid = int(await asyncio.to_thread(pidfile.read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.start_time(pid) is None


async def test_timeout_kills_what_it_started_too(tmp_path: Path) -> None:
    (tmp_path / "pid").touch()
    script = f"sleep 600 & echo $! > {tmp_path / 'pid'}; wait"
    for seconds in (0.5, 5, 60):  # a busy machine may take a second to start them
        with pytest.raises(HostError, match="took longer"):
            await process.run(["sh", "-c", script], timeout_seconds=seconds)
        if said := (tmp_path / "pid").read_text():
            break
    child = int(said)
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(child)
        await asyncio.to_thread(select.select, [fd], [], [], 60)
        os.close(fd)
    assert process.start_time(child) is None


async def test_the_terminals_interrupt_is_not_its_own() -> None:
    """Ctrl+C goes to a whole process group; what runs to clean up must not get it."""
    done = await process.run([sys.executable, "-c", "import os; print(os.getpgid(0))"])
    assert int(done.stdout) != os.getpgid(0)


async def test_environment_is_scrubbed(tmp_path: Path) -> None:
    code = "import os; print(sorted(os.environ))"
    os.environ["SWARM_TEST_SECRET"] = "x"
    try:
        done = await process.run([sys.executable, "-c", code], env={"GIVEN": "1"})
    finally:
        del os.environ["SWARM_TEST_SECRET"]
    assert b"GIVEN" in done.stdout
    assert b"SECRET" not in done.stdout


async def test_what_is_to_outlive_us_does(tmp_path: Path) -> None:
    """Also what nobody refers to when the event loop ends: asyncio would kill that, from Python 3.12 on."""
    script = f"""
import asyncio, gc, pathlib
from swarm.base import process
async def main():
    child = await process.spawn(["sleep", "60"], output=pathlib.Path({str(tmp_path / "out")!r}), die_with_parent=False)
    return child.pid
print(asyncio.run(main()))
gc.collect()
"""
    done = await process.run([sys.executable, "-c", script])
    child = int(done.stdout.split()[-1])
    started = process.start_time(child)
    assert started is not None
    await process.kill_stranger(child, started)


async def test_spawned_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent killed by SIGKILL takes what it spawned along."""
    script = f"""
import asyncio, pathlib
from swarm.base import process
async def main():
    child = await process.spawn(["sleep", "60"], output=pathlib.Path({str(tmp_path / "out")!r}))
    print("pid", child.pid, flush=True)
    await child.wait()
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout
    line = b""
    while not line.startswith(b"pid "):
        line = await parent.stdout.readline()
    child = int(line.split()[1])
    # Before, the kernel has not been told whose death to heed: what is left of so young a child, a sweep removes.
    while Path(f"/proc/{child}/comm").read_text() != "sleep\n":  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    fd = os.pidfd_open(child)
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, gone.set)
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await gone.wait()
    asyncio.get_running_loop().remove_reader(fd)
    os.close(fd)


async def test_the_deaf_hear_no_signal_of_a_supervisor_though_they_have_handlers(tmp_path: Path) -> None:
    ends = "import signal, sys, os\nfor n in (1, 2, 15): signal.signal(n, lambda *_: os._exit(7))\n"
    said, output = os.pipe()
    argv = [sys.executable, "-uc", ends + "print('up')\nsignal.pause()"]
    child = await process.spawn(argv, output=tmp_path / "err", stdout=output, deaf=True)
    assert await asyncio.to_thread(os.read, said, 2) == b"up"
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, number)
    # Its blocked and its pending signals: none of the three was delivered, nor will be.
    assert {blocked & 0x4003 for blocked in blocked_signals(child.pid)} == {0x4003}
    await process.kill(child)
    assert child.returncode == -signal.SIGKILL
    os.close(said)
    os.close(output)


def blocked_signals(pid: int) -> list[int]:
    """Of each thread, as bits; bit 0 is signal 1."""
    files = [task / "status" for task in Path(f"/proc/{pid}/task").iterdir()]
    lines = [line for file in files for line in file.read_text().splitlines() if line.startswith("SigBlk:")]
    return [int(line.split()[1], 16) for line in lines]


async def test_kill_stranger_spares_a_recycled_pid() -> None:
    child = await asyncio.create_subprocess_exec("sleep", "60")
    started = process.start_time(child.pid)
    assert started
    await process.kill_stranger(child.pid, started + 1)
    assert child.returncode is None
    await process.kill_stranger(child.pid, started)
    assert await child.wait() == -9
    await process.kill_stranger(child.pid, started)  # gone: nothing to do


async def test_kill_with_grace_terminates_first() -> None:
    child = await asyncio.create_subprocess_exec(
        "sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done", stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout
    await child.stdout.readline()
    await process.kill(child, grace_seconds=60)
    assert child.returncode == 7
    await process.kill(child)


def test_a_user_without_a_name_has_a_number() -> None:
    """Such as in a container that is started with a number alone."""
    argv = ["unshare", "--user", "--map-user=54321", "--", sys.executable]
    program = "from swarm.base import process; print(process.user())"
    env = {name: value for name, value in os.environ.items() if name not in ("LOGNAME", "USER", "LNAME", "USERNAME")}
    said = subprocess.run([*argv, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "uid 54321", said.stderr
