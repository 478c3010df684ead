"""The one place that starts programs.

Every program gets an argv list, a scrubbed environment and stdio of its own (a VMM that inherits a pipe would keep the
caller of `swarm` waiting), and is waited for when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import getpass
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swarm.base import files, priority
from swarm.base.log import logger
from swarm.errors import CommandFailed, HostError

log = logger(__name__)

# The variables that a child inherits. The last six let package tools reach their registries as the host does.
_KEPT = (
    "PATH", "HOME", "LANG", "TZ", "TMPDIR", "TERM",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "SSL_CERT_FILE",
)  # fmt: skip
# What package tools make is for agents to read, and for nobody else to change, whoever called `swarm`.
_UMASK = 0o022
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    returncode: int
    stdout: bytes
    stderr: bytes


def which(program: str) -> str | None:
    """The path of a program, on PATH or in the sbin directories that a user's PATH may lack."""
    return shutil.which(program) or shutil.which(program, path=_SYSTEM_PATH)


def path_of(program: str) -> Path:
    """As `which`. Raises HostError if it is not installed."""
    path = which(program)
    if path is None:
        raise HostError(f"the program {program!r} is not installed; `swarm doctor` names its package")
    return Path(path)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    env = {k: os.environ[k] for k in _KEPT if k in os.environ}
    env["PATH"] = f"{env.get('PATH', '')}:{_SYSTEM_PATH}".lstrip(":")
    env.setdefault("LANG", "C.UTF-8")
    return env | dict(extra or {})


def in_netns(argv: Sequence[str], netns: str | None) -> list[str]:
    """``argv``, run inside the network namespace with this name or path. Mounts are unchanged (`ip netns exec` would
    remount /sys)."""
    if not netns:
        return list(argv)
    path_of(argv[0])  # here: nsenter would only say that it can't execute it
    return ["nsenter", f"--net={Path('/run/netns', netns)}", "--", *argv]


def signal_name(number: int) -> str:
    """As in `signal 11 (SIGSEGV)`."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:  # a real-time signal
        return f"signal {number}"


def how_it_ended(code: int) -> str:
    """``code``: a subprocess's returncode."""
    return f"was killed by {signal_name(-code)}" if code < 0 else f"ended with status {code}"


async def run(
    argv: Sequence[str],
    *,
    input: bytes | None = None,  # noqa: A002 - the word that subprocess uses
    timeout_seconds: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    netns: str | None = None,
    check: bool = True,
) -> Completed:
    """Run a program to its end and return what it printed.

    Raises CommandFailed when it exits with a status other than 0 (if ``check``), HostError when it can't be started or
    takes longer than ``timeout_seconds``. After a timeout or a cancellation it is killed first, with everything that it
    started. It has a session of its own, so that Ctrl+C doesn't reach a program that does the clean-up.
    """
    argv = in_netns(argv, netns)
    log.debug("run", argv=shlex.join(argv))
    process = await _start(
        argv,
        stdin=asyncio.subprocess.PIPE if input is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(env),
        cwd=cwd,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            stdout, stderr = await process.communicate(input)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, TimeoutError):
            raise HostError(
                f"{argv[0]} took longer than {timeout_seconds:g} s and was killed: {shlex.join(argv)}"
            ) from None
        raise
    finally:
        await kill(process)
    code = process.returncode or 0
    if check and code != 0:
        tail = stderr[-4096:].decode(errors="replace").strip()
        said = tail or stdout[-1024:].decode(errors="replace").strip() or "it printed nothing"
        raise CommandFailed(f"{shlex.join(argv)} {how_it_ended(code)}: {said}", returncode=code, stderr=tail)
    return Completed(returncode=code, stdout=stdout, stderr=stderr)


async def spawn(
    argv: Sequence[str],
    *,
    output: Path | None,
    stdout: int | None = None,
    netns: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    die_with_parent: bool = True,
    deaf: bool = False,
    lower_by: int = 0,
) -> Spawned:
    """Start a program in a session of its own, and return. Its stdout and stderr are appended to ``output``; with
    None they go to our stderr.

    With ``stdout``, its stdout goes to that descriptor instead. With ``die_with_parent`` the kernel kills it when this
    process dies, however it dies. With ``deaf``, it and its descendants never get SIGHUP, SIGINT and SIGTERM: a
    supervisor sends those to all processes of a service at once, and only this process knows what is to be ended when.
    With ``lower_by``, it has a smaller share of the CPUs (`priority.lower`).
    """
    argv = in_netns(argv, netns)
    if deaf:  # blocked rather than ignored: what installs a handler, as QEMU does, stops ignoring a signal
        argv = ["env", "--block-signal=HUP,INT,TERM", *argv]
    if die_with_parent:
        argv = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
    log.debug("spawn", argv=shlex.join(argv), output=str(output))
    with files.open_to_append(output) if output is not None else contextlib.nullcontext(2) as out:
        given = {"stdout": out if stdout is None else stdout, "stderr": out, "cwd": cwd, "pass_fds": tuple(pass_fds)}
        child = _spawned(argv, env=environment(env), start_new_session=True, **given)
        if lower_by:
            priority.lower(child.pid, lower_by)
        return child


def _spawned(argv: Sequence[str], **options: Any) -> Spawned:
    program = path_of(argv[0])
    pid = 0
    try:
        child = subprocess.Popen([program, *argv[1:]], stdin=subprocess.DEVNULL, umask=_UMASK, **options)
        child.returncode = 0  # it is waited for by Spawned
        pid = child.pid
        return Spawned(pid)
    except OSError as error:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise HostError(f"can't start {program}: {error}") from error


class Child(Protocol):
    """A process of ours: `asyncio.subprocess.Process`, or a `Spawned`."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int: ...


class Spawned:
    """A process of ours that asyncio is not told of: that kills what it has started, once nobody refers to it or the
    event loop ends. Made in the loop."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._fd = os.pidfd_open(pid)
        self._loop.add_reader(self._fd, self._reap)

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def _reap(self) -> None:
        """The loop calls it until the descriptor is removed, so also again after an error: without memory, say."""
        if self.returncode is None:
            try:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            except ChildProcessError:  # it has been waited for; as asyncio says it
                self.returncode = 255
        self._ended.set()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


async def kill(process: Child, *, grace_seconds: float = 0.0) -> None:
    """End a process and wait until it is dead. Idempotent. With a grace period, send SIGTERM first.

    `process.send_signal` isn't used because it polls, and may reap a child before asyncio does (status 255).
    """
    if process.returncode is not None:
        return
    if grace_seconds:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await process.wait()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await asyncio.shield(process.wait())


async def _start(argv: Sequence[str], **options: object) -> asyncio.subprocess.Process:
    program = path_of(argv[0])
    try:
        return await asyncio.create_subprocess_exec(program, *argv[1:], umask=_UMASK, **options)  # type: ignore[arg-type]
    except OSError as error:
        raise HostError(f"can't start {program}: {error}") from error


def expendable(pid: int, score: int) -> None:
    """When memory is short, the kernel kills processes with a higher oom_score_adj first (proc(5); up to 1000)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))


# --- processes that are not our children --------------------------------------------------------------------------


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (field 22 of proc(5) stat); with the pid it identifies the
    process for ever. None if there is no such process, or it is a zombie. Raises HostError if we have no descriptor or
    memory left to read it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise HostError(f"can't look at process {pid}: {error.strerror}") from error
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Is it stopped, by SIGSTOP or a debugger?"""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def boot_id() -> str:
    """Names this boot of the host: pids and start times mean nothing after the next."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def machine() -> str:
    """Names what pids and start times are counted in: this boot of the host, and its namespaces of pids and time. ''
    if /proc is of another namespace of pids than this process, and says nothing about its neighbours."""
    if os.readlink("/proc/self") != str(os.getpid()):  # noqa: PTH115
        return ""
    spaces = [os.stat(place).st_ino for name in ("pid", "time") if os.path.exists(place := f"/proc/self/ns/{name}")]  # noqa: PTH110, PTH116
    return " ".join([boot_id(), *map(str, spaces)])


def has_ended(pid: object, started: object) -> bool:
    """Has the process with this pid and start time surely ended? False if that can't be told: another user's /proc may
    be hidden (hidepid), and the values may be anything."""
    if type(pid) is not int or type(started) is not int or not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] in "ZX" or int(fields[19]) != started
    except (OSError, ValueError, IndexError):
        return False


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            return None
        raise HostError(f"can't watch process {pid}: {error.strerror}") from error


def signal_stranger(pid: int, started: int, number: signal.Signals) -> bool:
    """Send a signal to the process with this pid and start time; False if it is gone.

    A pidfd is opened before the start time is compared, so a recycled pid can't be hit.
    """
    fd = _pidfd(pid)
    if fd is None:
        return False
    try:
        if start_time(pid) != started:
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, number)
        return True
    finally:
        os.close(fd)


async def gone(pid: int, started: int, *, timeout_seconds: float | None = None) -> bool:
    """Wait until the process with this pid and start time is dead; False if it outlives the timeout."""
    fd = _pidfd(pid)
    if fd is None:
        return True
    loop = asyncio.get_running_loop()
    dead = asyncio.Event()
    loop.add_reader(fd, dead.set)
    try:
        if start_time(pid) != started:
            return True
        async with asyncio.timeout(timeout_seconds):
            await dead.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def user() -> str:
    """The name of this process's user, as events have it; its number if it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # KeyError: Python 3.11 and 3.12
        return f"uid {os.getuid()}"


async def kill_stranger(pid: int, started: int, *, timeout_seconds: float = 5.0) -> None:
    """Kill the process with this pid and start time, and wait until it is gone. Does nothing if it already is."""
    if signal_stranger(pid, started, signal.SIGKILL) and not await gone(pid, started, timeout_seconds=timeout_seconds):
        raise HostError(f"process {pid} did not die within {timeout_seconds:g} s of SIGKILL")
