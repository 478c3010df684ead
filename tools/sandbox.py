"""Run a command in network and mount namespaces of its own, and report what it left behind.

    tools/sandbox.py CMD [ARG…]      run CMD; exit with its status, or 1 if it succeeded but left something
        --keep NAME,…                before CMD: pass these SWARM_ settings through unchanged
    tools/sandbox.py --leaks         inside a sandbox: print what was added since its start, one line each; 1 if any

In the new namespaces `lo` is up, there is no route out, and `/run/netns` is private, so `ip netns` works. CMD's
settings point at a new directory on disk, which is removed afterwards. Signals are forwarded to CMD.

Left processes are found by descent, not by name: this process is the subreaper of everything that CMD starts, so
whatever still runs below it when CMD has ended is a leak, in whichever network namespace it runs. A sandbox inside a
sandbox looks at its own descendants only. Standard library only.
"""
# ruff: noqa: T201 - a command-line tool

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PF_EXITING = 0x4  # linux/sched.h: in the flags of /proc/PID/stat
CLONE_NEWNS, CLONE_NEWNET, PR_SET_CHILD_SUBREAPER = 0x00020000, 0x40000000, 36  # linux/sched.h, linux/prctl.h
SI_KERNEL = 0x80  # siginfo.h: the terminal sent the signal, to the whole process group
FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
NETNS_LOCK = Path("/run/swarm-netns.lock")  # src/swarm/vm/network/netns.py: the only file outside that CMD makes
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"


def main(argv: list[str]) -> int:
    if argv == ["--leaks"]:
        return report(leaks(Path(os.environ["SWARM_SANDBOX"]), int(os.environ["SWARM_SANDBOX_PID"])))
    kept = {"SWARM_REQUIRE", "SWARM_TEST_KERNEL", "SWARM_TEST_LIMITS"}
    if argv[:1] == ["--keep"]:
        kept.update(argv[1].split(","))
        argv = argv[2:]
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("sandbox: needs root, to make network namespaces", file=sys.stderr)
        return 1
    lock_was_there = NETNS_LOCK.exists()
    enter()
    # Short, because Unix sockets live below it; on a disk, because work disks do.
    place = Path(tempfile.mkdtemp(prefix="sw", dir=on_disk("/tmp", "/var/tmp")))
    try:
        (place / "baseline.json").write_text(json.dumps(inventory(place)))
        status = run(argv, environment(place, kept))
        left = wait_for_leaks(place)
        kill_leaked()
        left_status = report(left)
        return status or left_status
    finally:
        if not lock_was_there:
            remove_netns_lock()
        shutil.rmtree(place, ignore_errors=True)


def remove_netns_lock() -> None:
    """Unless an engine of the host holds it. Other sandboxes have a /run/netns of their own: nothing is shared."""
    with contextlib.suppress(OSError), NETNS_LOCK.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        NETNS_LOCK.unlink()


def enter() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for result in (libc.unshare(CLONE_NEWNS | CLONE_NEWNET), libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)):
        if result != 0:
            raise OSError(ctypes.get_errno(), "can't make namespaces: " + os.strerror(ctypes.get_errno()))
    Path("/run/netns").mkdir(exist_ok=True)
    for command in (
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "tmpfs", "-o", "mode=755", "swarm-sandbox", "/run/netns"],
        ["ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(command, check=True, env={"PATH": PATH})


def on_disk(*candidates: str) -> str:
    """The first of these directories that is not a tmpfs; the first of all if each is one."""
    mounts = {
        m.split()[4]: m.partition(" - ")[2].split()[0] for m in Path("/proc/self/mountinfo").read_text().splitlines()
    }
    return next((c for c in candidates if mounts.get(c) != "tmpfs"), candidates[0])


def environment(place: Path, kept: set[str]) -> dict[str, str]:
    """Our environment, with Swarm's settings replaced by ones that point into ``place``; those in ``kept`` stay."""
    (place / "tmp").mkdir()
    own = {
        "SWARM_CONFIG": str(place / "swarm.toml"),  # absent
        "SWARM_HOME": str(place / "home"),
        "SWARM_STATE_DIR": str(place / "state"),
        "TMPDIR": str(place / "tmp"),
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith("SWARM_") or k in kept}
    names = {"SWARM_SANDBOX": str(place), "SWARM_SANDBOX_PID": str(os.getpid())}
    return env | {k: v for k, v in own.items() if k not in kept or k not in os.environ} | names


def run(argv: list[str], env: dict[str, str]) -> int:
    """Run the command in our process group, so that it keeps the terminal; forward signals, reap everything.

    A shell that starts a job with `&` lets it ignore SIGINT and SIGQUIT, and programs pass that on to their children:
    tests that send Ctrl+C to a program would wait for ever. So the command starts with the defaults. SIGHUP stays as it
    was, for `nohup`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    try:
        child = os.posix_spawnp(argv[0], argv, env, setsigmask=(), setsigdef=(signal.SIGINT, signal.SIGQUIT))
    except OSError as error:
        print(f"sandbox: can't start {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127
    while True:
        info = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
        if info.si_signo != signal.SIGCHLD:
            if info.si_code != SI_KERNEL:  # otherwise the child got it too
                os.kill(child, info.si_signo)
            continue
        status = reap(child)
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def reap(child: int = 0) -> int | None:
    """Reap every dead child; return the wait status of ``child`` if it was among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


# --- leaks ------------------------------------------------------------------------------------------------------------


def inventory(place: Path) -> list[str]:
    """Everything in this sandbox that a test could leave, but for processes (see `processes`); one line each."""
    netns = Path("/run/netns")
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return [
        *(f"link {name}" for _, name in socket.if_nameindex()),
        *(f"netns {entry.name}" for entry in netns.iterdir()),
        *(f"mount {path}" for path in sorted(mounts) if not path.startswith("/run/netns/")),
        *(f"nft {line}" for line in output("nft", "list", "tables")),
        *(f"route {line.strip()}" for line in output("ip", "-4", "route", "show", "table", "all")),
        *(f"file {path}" for path in sorted(place.glob("state/vms/*"))),
        *(
            f"loop device {line}"
            for line in output("losetup", "--noheadings", "--output", "BACK-FILE")
            if str(place) in line
        ),
    ]


def processes(top: int) -> list[str]:
    """The processes below ``top``, the sandbox's process, without this one and its ancestors; one line each."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended since
                continue
            if fields[0] not in "ZX":
                parents[int(entry.name)] = int(fields[1])
    own, pid = set(), os.getpid()
    while pid in parents:
        own.add(pid)
        pid = parents[pid]
    return [
        f"process {pid} {command(pid)}" for pid in sorted(parents) if pid not in own and descends(pid, top, parents)
    ]


def descends(pid: int, top: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == top:
            return True
    return False


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200].strip()
    except OSError:
        return ""


def output(*argv: str) -> list[str]:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, env={"PATH": PATH})
    return [line for line in done.stdout.splitlines() if line.strip()]


def leaks(place: Path, top: int) -> list[str]:
    reap()
    baseline = set(json.loads((place / "baseline.json").read_text()))
    return [*processes(top), *(line for line in inventory(place) if line not in baseline)]


def wait_for_leaks(place: Path, *, seconds: float = 1.0, dying_seconds: float = 60.0) -> list[str]:
    """What is left, after giving processes that are just ending a moment to do so; those that the kernel ends
    already, longer: on a busy machine, it takes its time to free the memory of a VM."""
    began = time.monotonic()
    while (left := leaks(place, os.getpid())) and left[0].startswith("process "):
        dying = all(is_dying(int(line.split()[1])) for line in left if line.startswith("process "))
        if time.monotonic() - began > (dying_seconds if dying else seconds):
            break
        time.sleep(0.02)
    return left


def is_dying(pid: int) -> bool:
    """Is it exiting, or has it a SIGKILL that it has not acted on yet?"""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return True
    pending = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd:", "ShdPnd:"))]
    return bool(flags & PF_EXITING) or any(bits >> (signal.SIGKILL - 1) & 1 for bits in pending)


def kill_leaked() -> None:
    for line in processes(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[1]), signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass


def report(left: list[str]) -> int:
    for line in left:
        print(f"left behind: {line}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
