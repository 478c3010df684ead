"""agentd: Swarm's program in a guest. It runs commands and copies files for the host only.

Init starts it (``python3 -I -S -B agentd.py``) before a template is taken. The `process` driver starts it on the host
(``--unix PATH --root DIR``), where it changes nothing outside DIR: not the clock, host name, random pool or sshd.

There are two processes. *agentd* owns the connections and the token. The *zygote* is forked from it at start, before
any secret exists, stays single-threaded, and forks every agent: Python agents run in the fork itself, others are exec'd
from it. The zygote is a subreaper, so everything that an agent leaves behind, even a daemon, is its descendant and is
killed with the agent.

In a VM whose agents see the files of an image (``--image``), the zygote changes its root to them (`enter_image`), and
is the first process of a namespace of its own: agents see neither agentd nor its files. docs/adr/0028 says how. There
the process that waits for a Python agent is the image's own Python (`Agentd.start_interpreter`).

Wire format: ``>II`` lengths, JSON header (<= 64 KiB), payload (<= 1 MiB). A request has ``id`` and ``op``. Its replies
carry that id, and the last one has ``ok`` or ``error``. Requests can be pipelined; ``after: id`` skips a request if the
one with that id failed. After some, frames of their id go both ways until then. docs/adr/0004, 0005 and 0023 say why.

The module is longer than 400 lines because the guest starts a single compiled file: beside it is interpreter.py alone,
which an image's Python gets as text. It imports little because each import costs tens of milliseconds of boot on an
emulated CPU (hence no pathlib, argparse, threading, subprocess, runpy).
"""
# ruff: noqa: PTH101, PTH102, PTH103, PTH104, PTH106, PTH108, PTH110, PTH112, PTH115, PTH116, PTH118, PTH119, PTH120
# ruff: noqa: PTH208, SIM105, RUF012

from __future__ import annotations

import _thread
import ctypes
import errno
import faulthandler
import fcntl
import gc
import io
import json
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from _blake2 import blake2b  # hashlib.blake2b, without importing OpenSSL
from _operator import _compare_digest  # hmac.compare_digest, likewise
from collections import deque  # json has imported it

PROTOCOL = 4
MAX_HEADER = 64 << 10
MAX_PAYLOAD = 1 << 20
MAX_PUT = 256 << 20  # bytes of one put request
MAX_NAME = 4000  # bytes of a file's name in a directory that is sent
MAX_ORDER = 4 * MAX_HEADER  # an order is a request's header in ASCII, which may be three times as long
MAX_CONNECTIONS = 64
MAX_SSH = 16
CHUNK = 64 << 10  # a pipe's capacity
FIRST_FRAME_SECONDS = 10.0
IO_SECONDS = 60.0  # how long the peer may stall inside a request
STACK_SECONDS = 2.0  # for the stacks of an agent whose time is up
KILL_SECONDS = 20.0  # from SIGKILL to the end of all descendants: hundreds that used all memory need that long
DRAIN_SECONDS = 2.0  # from the end of all descendants to the end of their pipes
MAX_PROGRAMS = 64  # of `exec`, alive at once
MAX_ENDED = 100  # how many that have ended are remembered
SCROLLBACK = 256 << 10  # bytes of a program's latest output that are kept
ENDED_SCROLLBACK = 4 << 20  # of all that have ended together
WINDOW = 256 << 10  # bytes of input that the host may send before the program takes them
TAKEN = 64 << 10  # it is told whenever the program has taken that many
BUSY_READS = 4  # of a program's output, so soon after each other: then it is given a moment to write more
SOON_SECONDS = 0.01
LINGER_SECONDS = 0.002
FREEZE_SECONDS = 20.0

USERS = {"agent": (1000, 1000, "/work"), "root": (0, 0, "/root")}
RLIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 4096}
MAX_PROCESSES = 512  # of user agent, threads included
HOST_KEY = "/etc/ssh/ssh_host_ed25519_key"
SSHD = "/usr/sbin/sshd"
# Settings for every program: the CPU's, from the kernel's command line (see tools/firecracker-test-kernel), and on the
# host the location of an agent's layer.
PASSED_ENV = {
    name: os.environ[name] for name in ("GLIBC_TUNABLES", "OPENSSL_ia32cap", "PYTHONPATH") if name in os.environ
}

MLOCK_ONFAULT = 1  # linux/mman.h
PR_SET_CHILD_SUBREAPER = 36
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # linux/random.h
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME = 2, 4, 8, 1024
IP_FREEBIND = 15
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
CLONE_FS, CLONE_NEWNS, CLONE_NEWPID = 0x200, 0x20000, 0x20000000  # linux/sched.h
PIVOT_ROOT, OPEN_TREE, MOVE_MOUNT = 155, 428, 429  # numbers of system calls; the first is x86-64's
AT_FDCWD, OPEN_TREE_CLONE, AT_RECURSIVE, MOVE_MOUNT_F_EMPTY_PATH = -100, 1, 0x8000, 4  # linux/mount.h
TIOCSCTTY, TIOCSWINSZ, TIOCSIG = 0x540E, 0x5414, 0x40045436  # asm-generic/ioctls.h
CGROUPS = "/sys/fs/cgroup"
GONE = (errno.ENOENT, errno.ENODEV)  # of a control group that was removed

# Of a VM with an image: its work disk and its root, in the guest's own root, where no agent sees them
HIDDEN = "/swarm"
DISK = f"{HIDDEN}/disk"
# What an agent's root has besides the image: where it is in the guest's own.
SHOWN = {
    "/dev": "/dev",
    "/sys": "/sys",
    "/work": f"{DISK}/work",
    "/agent": "/agent",
    **{path: path for path in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/machine-id")},
}
IMAGE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # of an image that says nothing else
# What an image's Python is started with when it is to wait; its text comes on descriptor 4.
WAIT = 'exec(__import__("os").read(4, 1 << 18), {})'
# How variables begin that matter when Python starts, or what it loads: not when it waits already.
AT_START = ("PYTHON", "LD_", "LC_", "LANG", "HOME", "TZ", "MALLOC_", "GLIBC_", "OPENSSL_")

# Of files, directories, watches and ports
BATCH = 256 << 10  # of what is sent in small pieces, as one frame; the capacity of a busy program's pipes
F_SETPIPE_SZ = 1031  # linux/fcntl.h
STALL_SECONDS = 600  # how long the host may take nothing in the middle of a file: its user may be slow
DIAL_SECONDS = 10.0
MAX_DEPTH = 100_000  # of directories that are removed
MAX_PENDING = 100_000  # names of directories that are yet to be packed
MAX_EXTENSION = 64 << 10  # of a name in an archive
MAX_WATCHES = 8192  # directories
WATCH_SECONDS = 0.02  # changes of that time are told together
DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}
TAR_KINDS = {stat.S_IFREG: b"0", stat.S_IFDIR: b"5", stat.S_IFLNK: b"2"}
TAR_BLOCK = struct.Struct("100s8s8s8s12s12s8s1s355x")
UCRED = struct.Struct("3i")  # unix(7)
INOTIFY_EVENT = struct.Struct("iIII")  # and all below: inotify(7)
IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 2, 4, 8, 64, 128, 256, 512
IN_EVENTS = IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
IN_Q_OVERFLOW, IN_IGNORED, IN_ISDIR = 0x4000, 0x8000, 0x40000000
IN_ONLYDIR, IN_DONT_FOLLOW = 0x1000000, 0x2000000

LIBC = ctypes.CDLL(None, use_errno=True)  # once: opening it costs milliseconds on an emulated CPU
COMPACT = json.JSONEncoder(separators=(",", ":")).encode

INTERPRETER = os.path.join(os.path.dirname(__file__), "interpreter.py")
with open(INTERPRETER, encoding="ascii") as _file:
    INTERPRETER_TEXT = _file.read()
RUN: dict[str, Any] = {"__name__": "interpreter"}  # what is in it
exec(compile(INTERPRETER_TEXT, INTERPRETER, "exec"), RUN)

Header = dict[str, object]
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    FileOp = Callable[["Agentd", "Connection", Header, bytes], Header]


class Broken(Exception):
    """The peer broke the protocol or the connection, so no reply can be sent."""


class Refused(Exception):
    """A request that makes no sense; the message goes back to the host."""


class NotRegular(Refused):
    """`get` of a link, device, directory…"""


class DiskFull(Refused):
    """Neither does the guest's disk have room, nor its memory, if it is a file in memory."""


class NotListening(Refused):
    """No program answers on that port."""


class CannotStart(Refused):
    """The program could not be started: no such file, not executable, no such directory."""


class Skipped(Refused):
    """The request that this one depends on failed."""


# --- helpers --------------------------------------------------------------------------------------------------------


def log(text: str) -> None:
    os.write(2, f"agentd: {text}\n".encode(errors="replace"))


def read_file(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def read_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_ORDER)
    except OSError:
        return b""


def write_file(path: str, data: str, mode: int = 0o644) -> None:
    """Replace a small file's contents. A file that doesn't shrink is overwritten in place: truncating it would free and
    reallocate its page, through much kernel code that a clone on an emulated CPU hasn't translated yet."""
    content = data.encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        if os.lseek(fd, 0, os.SEEK_END) > len(content):
            os.ftruncate(fd, len(content))
        os.pwrite(fd, content, 0)
    finally:
        os.close(fd)


def relay(source: socket.socket, target: socket.socket) -> None:
    """Copy one direction of a connection between two sockets, until it ends."""
    try:
        while data := source.recv(CHUNK):
            target.sendall(data)
    except OSError:
        pass
    try:
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def poke(path: str, value: str) -> None:
    """Write to a file of the kernel's."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def set_oom_score(pid: int | str, value: int) -> None:
    poke(f"/proc/{pid}/oom_score_adj", str(value))


def crng_ready() -> bool:
    try:
        return len(os.getrandom(1, os.GRND_NONBLOCK)) == 1
    except BlockingIOError:
        return False


def oom_kills() -> int:
    """How often the kernel's OOM killer has killed since boot, from /proc/vmstat."""
    for line in read_file("/proc/vmstat").splitlines():
        if line.startswith("oom_kill "):
            return int(line[9:])
    return 0


def libc(name: str, *args: object) -> None:
    if getattr(LIBC, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def keep_resident() -> None:
    """Keep the interpreter's code in memory. When agents use up memory, the kernel would otherwise drop it and read it
    from disk again, page by page, for this process and for those that it has just killed."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, access, _, _, _, *file = line.split()
            if file and file[0].startswith("/") and "w" not in access:
                start, end = (ctypes.c_size_t(int(number, 16)) for number in place.split("-"))
                libc("mlock2", start, ctypes.c_size_t(end.value - start.value), MLOCK_ONFAULT)


def text(head: Header, key: str) -> str:
    value = head.get(key)
    if not isinstance(value, str):
        raise Refused(f"{key!r} must be text, not {value!r:.80}")
    return value


def number(head: Header, key: str) -> float:
    value = head.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**63:
        raise Refused(f"{key!r} must be a number >= 0, not {value!r:.80}")
    return value


def open_parent(root: str, path: str, owner: tuple[int, int] | None = None, create: bool = False) -> tuple[int, str]:
    """The directory (as an open descriptor) and name of ``path`` below ``root``. Follows no symbolic link: the agent
    owns /work, and must not make root leave it."""
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") or not parts or ".." in parts or "." in parts or "\0" in path:
        raise Refused(f"not an absolute, plain path: {path!r:.200}")
    here = os.open(root or "/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            if create:
                make_dir(here, part, owner)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
    except BaseException:
        os.close(here)
        raise
    return here, parts[-1]


def create(parent: int, name: str) -> int:
    """Create a file, replacing one with that name: nothing is ever written through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, 0o600, dir_fd=parent)
    except FileExistsError:
        os.unlink(name, dir_fd=parent)
        return os.open(name, flags, 0o600, dir_fd=parent)


def make_dir(parent: int, name: str, owner: tuple[int, int] | None) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        return
    if owner:
        os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)


def make_link(parent: int, name: str, target: bytes, owner: tuple[int, int] | None) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    os.symlink(target, os.fsencode(name), dir_fd=parent)
    if owner:
        os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)


# --- the zygote: forks agents, and reaps them -------------------------------------------------------------------------


class Job:
    """What a new child must run: its order, and the descriptor on which it reports its start."""

    def __init__(self, order: Header, report: int) -> None:
        self.order = order
        self.report = report


class Zygote:
    """The single-threaded parent of all agents, one at a time, and of programs of `exec`. It never holds a secret."""

    def __init__(self, commands: socket.socket, in_vm: bool) -> None:
        self.commands = commands
        self.in_vm = in_vm
        self.apart = in_vm and os.getpid() == 1  # in a namespace of its own, with all that it starts and nobody else
        self.main = 0  # pid of the agent that is running, or waiting for its order
        self.uid: int | None = None
        self.report = -1
        self.status: int | None = None
        self.ended_ns = self.cpu_us = self.max_rss_kb = 0
        self.programs: dict[str, tuple[int, int]] = {}  # those of `exec`: key -> pid, descriptor for their end
        self.leaves = False  # what the agent started outlives it, if it ends with 0
        faulthandler.enable(2)  # every agent inherits it: the stacks of one that crashes are in its stderr
        self.wake, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number_ in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number_, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def serve(self, preload: list[str]) -> Job:
        """Execute agentd's orders for ever. Returns only in a forked child."""
        own_session()
        libc("prctl", PR_SET_CHILD_SUBREAPER, *(ctypes.c_ulong(value) for value in (1, 0, 0, 0)))
        failed = self.preload(preload)
        OURS.update(sys.modules)
        gc.collect()
        gc.freeze()  # a child's collector must not write to pages that it shares with this process
        self.commands.send(json.dumps({"failed": failed}).encode())
        poller = select.poll()
        poller.register(self.commands, select.POLLIN)
        poller.register(self.wake, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll()]
            if self.commands.fileno() in ready:
                data, fds, _, _ = socket.recv_fds(self.commands, MAX_ORDER, 6, socket.MSG_CMSG_CLOEXEC)
                if not data:  # agentd is gone
                    self.kill_and_reap_all()
                    os._exit(0)
                order = json.loads(data)
                del data  # otherwise each child would have to unmap it
                if order["op"] in ("run", "park"):
                    if self.main:  # agentd no longer uses it
                        self.finish()
                    job = self.fork(order, fds)
                    if job is not None:
                        return job
                elif order["op"] in ("exec", "spare"):
                    job = self.fork_program(order, fds)
                    if job is not None:
                        return job
                elif order["op"] in ("adopt", "signal", "end", "stop", "continue"):
                    self.command(order, fds)
                elif order["op"] == "leave":
                    self.leaves = True
                elif order["op"] == "enter":
                    self.enter(str(order["image"]), fds[0])
                elif order["op"] == "abort" and self.main and self.status is None:
                    os.kill(self.main, signal.SIGABRT)
                elif order["op"] == "kill" and self.main and self.status is None:
                    os.kill(self.main, signal.SIGKILL)  # our child, not yet waited for: the pid can't be reused
                    # Or hundreds of its children leave it no CPU time in which to die.
                    self.kill_at_once()
            self.reap()
            if self.main and self.status is not None:
                self.finish()

    def preload(self, modules: list[str]) -> dict[str, str]:
        """Import modules for agents. `site` is first: -S left dist-packages out of sys.path, and agents need them."""
        failed = {}
        try:
            import site

            site.main()
        except Exception as error:
            failed["site"] = f"{type(error).__name__}: {error}"
        for name in modules:
            try:
                __import__(name)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
        return failed

    @staticmethod
    def enter(image: str, report: int) -> None:
        said: Header = {"entered": True}
        try:
            enter_image(image)
        except Exception as error:
            said = {"cannot": f"{type(error).__name__}: {error}"}
        os.write(report, json.dumps(said).encode())
        os.close(report)

    def fork(self, order: Header, fds: list[int]) -> Job | None:
        self.report = fds[3]
        self.status, self.ended_ns, self.cpu_us, self.max_rss_kb = None, 0, 0, 0
        user = order["user"]
        self.uid = user[0] if isinstance(user, list) else None
        try:
            pid = os.fork()
        except OSError as error:
            pid = -1
            self.tell({"cannot": f"fork: {error.strerror}"})
        if pid == 0:
            self.commands.detach()  # or its finalizer would close a descriptor that the agent uses by then
            signal.set_wakeup_fd(-1)
            report = become(order, fds)
            if "python" in order:
                start_interpreter(str(order["python"]), report)
            return Job(order, report) if order["op"] == "run" else wait_for_order(report, touch=bool(order["touch"]))
        self.main = max(pid, 0)
        for fd in (*fds[:3], *fds[4:]):
            os.close(fd)
        return None

    def fork_program(self, order: Header, fds: list[int]) -> Job | None:
        """Fork a program of `exec`. The fifth of its descriptors is where its end is reported."""
        apart = fds.pop() if "apart" in order else -1
        try:
            pid = os.fork()
        except OSError as error:
            pid = -1
            try:
                os.write(fds[3], json.dumps({"cannot": f"fork: {error.strerror}"}).encode() + b"\n")
            except OSError:  # agentd gave it up
                pass
        if pid == 0:
            self.commands.detach()
            signal.set_wakeup_fd(-1)
            if apart >= 0:
                order.update(json.loads(os.pread(apart, int(str(order["apart"])), 0)))
            report = become(order, fds)
            return Job(order, report) if order["op"] == "exec" else wait_for_program(report)
        if apart >= 0:
            os.close(apart)
        for fd in fds[:4] if pid > 0 else fds:
            os.close(fd)
        if pid > 0:
            self.programs[str(order["key"])] = pid, fds[4]
        return None

    def command(self, order: Header, fds: list[int]) -> None:
        """Orders about programs. ``signal``: to a program's process group. ``end``: kill all that it started.
        ``stop`` and ``continue``: all programs; those that were stopped are written to the descriptor that came."""
        op, number_ = order["op"], int(str(order.get("signal") or 0))
        known = self.programs.get(str(order.get("key")))
        try:
            if op == "adopt":
                self.adopt(str(order["key"]), fds)
            elif op == "signal" and known:
                os.killpg(known[0], number_)  # not yet waited for, so the group can't be another's
            elif op == "end":
                if known:
                    os.kill(known[0], number_)
                marked = f"SWARM_PROCESS={order['process']}".encode()
                for _ in range(100):
                    found = signal_descendants(
                        number_, lambda pid: marked in read_bytes(f"/proc/{pid}/environ").split(b"\0")
                    )
                    if not found or number_ != signal.SIGKILL:
                        break
            elif op == "stop":
                spared = str(order["spared"])
                found = signal_descendants(signal.SIGSTOP, lambda pid: str(pid) != spared and not is_stopped(pid))
                os.write(fds[0], json.dumps(found).encode())
            elif op == "continue":
                stopped = order["pids"]
                assert isinstance(stopped, list)
                signal_descendants(signal.SIGCONT, lambda pid: pid in stopped)
        except Exception as error:  # most often: it has ended meanwhile
            log(f"zygote: {op}: {error}")
        finally:
            for fd in fds:
                os.close(fd)

    def adopt(self, key: str, fds: list[int]) -> None:
        """The process that waits to become the next agent becomes a program of `exec` instead."""
        fd = fds.pop()
        if self.main and self.status is None:
            self.programs[key] = self.main, fd
            os.close(self.report)
            self.main = 0
        else:
            os.write(fd, b'{"exit":-9}')
            os.close(fd)

    def finish(self) -> None:
        clean = (self.leaves and self.status == 0) or self.kill_and_reap_all()
        self.leaves = self.leaves and self.status is None  # not for the waiting process that was not used
        code = os.waitstatus_to_exitcode(self.status) if self.status is not None else -signal.SIGKILL
        done = {"exit": code, "ended_ns": self.ended_ns, "cpu_us": self.cpu_us}
        self.tell({**done, "max_rss_kb": self.max_rss_kb, "clean": clean})

    def tell(self, message: Header) -> None:
        """Report an agent's end to agentd, if that still listens."""
        try:
            os.write(self.report, json.dumps(message).encode())
        except BrokenPipeError:  # agentd stopped using this agent, or never did
            pass
        except OSError as error:
            log(f"zygote: can't report the end of the agent: {error}")
        os.close(self.report)
        self.main = 0

    def reap(self) -> bool:
        """Wait for children that have ended. True if no child is left."""
        try:
            os.read(self.wake, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return True
            if dead is None:
                return False
            if dead.si_pid == self.main and not (self.leaves and (dead.si_code, dead.si_status) == (os.CLD_EXITED, 0)):
                try:  # not yet waited for, so its process group can't be another's
                    os.killpg(self.main, signal.SIGKILL)
                except ProcessLookupError:  # it died before it had a group
                    pass
            pid, status, usage = os.wait4(dead.si_pid, 0)
            key = next((key for key, (known, _) in self.programs.items() if known == pid), None)
            if key is not None:
                self.tell_end(key, status, usage)
                continue
            self.cpu_us += int((usage.ru_utime + usage.ru_stime) * 1e6)
            self.max_rss_kb = max(self.max_rss_kb, usage.ru_maxrss)
            if pid == self.main:
                self.status, self.ended_ns = status, time.monotonic_ns()

    def tell_end(self, key: str, status: int, usage: resource.struct_rusage) -> None:
        """Report the end of a program of `exec` to agentd."""
        _, fd = self.programs.pop(key)
        end = {
            "exit": os.waitstatus_to_exitcode(status),
            "ended_ns": time.monotonic_ns(),
            "cpu_us": int((usage.ru_utime + usage.ru_stime) * 1e6),
            "max_rss_kb": usage.ru_maxrss,
        }
        try:
            os.write(fd, json.dumps(end).encode())
        except BrokenPipeError:  # agentd gave it up
            pass
        os.close(fd)

    def kill_and_reap_all(self) -> bool:
        """Kill and wait for every descendant. As this process is the subreaper, no children means none is left."""
        deadline = time.monotonic() + KILL_SECONDS / 2
        poller = select.poll()
        poller.register(self.wake, select.POLLIN)
        kills, next_kill = 0, 0.0
        while not self.reap():
            now = time.monotonic()
            if now > deadline:
                return False
            if now >= next_kill:
                # Scanning /proc is slow with hundreds of processes, and takes CPU time that they need to die. So it is
                # only used for those that a kill at once doesn't reach.
                if kills % 4 == 3 or not self.kill_at_once():
                    signal_descendants(signal.SIGKILL)
                kills, next_kill = kills + 1, time.monotonic() + 0.1
            poller.poll(20)
        return True

    def kill_at_once(self) -> bool:
        """kill(-1), where it reaches agents alone: one step in the kernel, that no fork bomb outruns. False if there
        is no such step. In this process's own namespace it reaches all but this process; elsewhere it is done as the
        agent's user. Not in a child process, because a fork may take long when the agent has used all memory.
        (Meanwhile the agent could kill this process too, which would end its own attempt.)"""
        if not self.apart and not (self.in_vm and self.uid):
            return False
        try:
            if not self.apart:
                os.setresuid(self.uid, self.uid, 0)  # type: ignore[arg-type]
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            if not self.apart:
                os.setresuid(0, 0, 0)
        return True


def enter_image(image: str) -> None:
    """Make an image's files, below those that agents write to the work disk, the root of this process and of all that
    it forks. Whatever names the image has are looked up when its root is the only one: no link leads out of it."""
    import encodings.ascii  # noqa: F401 - of `read_file`
    import warnings  # noqa: F401 - of os.execvp

    forbid_imports()
    libc("unshare", CLONE_NEWNS)
    libc("mount", None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    dirs = f"lowerdir={image},upperdir={DISK}/upper,workdir={DISK}/scratch"
    libc("mount", b"image", f"{HIDDEN}/root".encode(), b"overlay", ctypes.c_ulong(MS_NOATIME), dirs.encode())
    trees = {}
    for path, source in SHOWN.items():
        flags = OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
        trees[path] = LIBC.syscall(OPEN_TREE, AT_FDCWD, source.encode(), flags)
        if trees[path] < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{source}: {os.strerror(code)}")
    os.chdir(f"{HIDDEN}/root")
    libc("syscall", PIVOT_ROOT, b".", b".")
    libc("umount2", b".", MNT_DETACH)  # the old root, which is above the new one now
    os.chdir("/")
    for path, tree in trees.items():
        make_place(path, stat.S_ISDIR(os.fstat(tree).st_mode))
        libc("syscall", MOVE_MOUNT, tree, b"", AT_FDCWD, path.encode(), MOVE_MOUNT_F_EMPTY_PATH)
        os.close(tree)
    make_place("/proc", True)
    libc("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC), None)
    if not os.path.lexists("/tmp"):
        os.mkdir("/tmp")
        os.chmod("/tmp", 0o1777)


def make_place(path: str, directory: bool) -> None:
    """Have a directory, or a file, where something is to be mounted: an image may have none there, or a link."""
    try:
        there = stat.S_IFMT(os.lstat(path).st_mode)
        if there == (stat.S_IFDIR if directory else stat.S_IFREG):
            return
        if there != stat.S_IFDIR:
            os.unlink(path)
    except FileNotFoundError:
        pass
    if directory:
        os.mkdir(path, 0o755)
    else:
        make_parents(os.path.dirname(path))
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))


def forbid_imports() -> None:
    """From now on, no module is looked up in files: they may be an agent's."""
    kept = [sys.modules["_frozen_importlib"].__dict__[name] for name in ("BuiltinImporter", "FrozenImporter")]
    sys.meta_path[:] = kept


def fork_apart() -> int:
    """A fork that is the first process of a namespace of its own, where the kernel has such."""
    try:
        here = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        libc("unshare", CLONE_NEWPID)
    except OSError as error:
        log(f"no process namespace: {error}")
        return os.fork()
    pid = os.fork()
    if pid:
        libc("setns", here, CLONE_NEWPID)  # what else this process starts is not in it
    os.close(here)
    return pid


def process(name: str) -> tuple[int, str] | None:
    """Parent and start time of a live process: fields 4 and 22 of proc(5) stat."""
    fields = read_file(f"/proc/{name}/stat").rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in "ZX" else (int(fields[1]), fields[19])


def signal_descendants(number_: int, wanted: Callable[[int], bool] | None = None) -> list[int]:
    """Send a signal to every live descendant that one scan of /proc finds and that is wanted; the caller repeats it.
    Returns which got it."""
    found = {name: process(name) for name in os.listdir("/proc") if name.isdigit()}
    living = {int(name): it for name, it in found.items() if it}
    me, told = os.getpid(), []
    for pid, (parent, started) in living.items():
        for _ in living:  # bounds the way up: parents may change during the scan
            if parent in (0, me):
                break
            parent = living.get(parent, (0, ""))[0]
        if parent != me or (wanted and not wanted(pid)):
            continue
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        now = process(str(pid))
        if now and now[1] == started:  # not another process that got the pid meanwhile
            signal.pidfd_send_signal(fd, number_)
            told.append(pid)
        os.close(fd)
    return told


def is_stopped(pid: int) -> bool:
    return read_file(f"/proc/{pid}/stat").rpartition(")")[2][1:2] == "T"


def own_session() -> None:
    """With no larger share of the CPUs than the one before: the kernel gives each new session a whole one."""
    nice = read_file("/proc/self/autogroup").rpartition(" ")[2]
    os.setsid()
    if nice not in ("", "0"):
        try:
            poke("/proc/self/autogroup", nice)
        except OSError:
            pass


def become(order: Header, fds: list[int]) -> int:
    """In the new child: drop everything inherited from the zygote. Returns the descriptor for reports.

    From ``order`` it uses env and user ([uid, gid, further groups…], or null for no change); the rest is for `run_job`.
    """
    try:
        own_session()
        for target, fd in enumerate(fds[:3]):
            os.dup2(fd, target)
        report = os.dup2(fds[3], 3, inheritable=False)
        if "python" in order:
            os.dup2(fds[4], 4, inheritable=False)
        os.closerange(5 if "python" in order else 4, 1 << 20)
        if order.get("pty"):
            fcntl.ioctl(0, TIOCSCTTY, 0)
        if group := order.get("cgroup"):
            poke(f"{group}/cgroup.procs", "0")
        # Undo inherited and own signal handling, except for SIGPIPE and SIGXFSZ, which Python itself ignores.
        for number_ in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
            if signal.getsignal(number_) is not signal.SIG_DFL:
                signal.signal(number_, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # While still privileged, so that the kernel takes it as the lowest value that the agent may set.
        set_oom_score("self", 500)
        for limit, value in RLIMITS.items():
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        os.umask(0o022)
        user = order["user"]
        if isinstance(user, list):
            os.setpriority(os.PRIO_PROCESS, 0, max(0, os.getpriority(os.PRIO_PROCESS, 0)))
            if user[0]:
                resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
            os.setgroups(user[1:])
            os.setgid(user[1])
            os.setuid(user[0])
        os.environ.clear()
        set_environment(order)
        for fd, name in enumerate(("stdin", "stdout", "stderr")):
            setattr(sys, name, standard_stream(fd, name))
            setattr(sys, f"__{name}__", getattr(sys, name))
        return report
    except BaseException as error:
        cannot_start(3, error)


def set_environment(order: Header) -> None:
    env = order["env"]
    assert isinstance(env, dict)
    for name, value in env.items():
        os.environ[name] = value


def wait_for_order(report: int, touch: bool) -> Job:
    """The process of the next agent, forked before a template is taken. All that needs no knowledge of the agent is
    done here, so that a clone needn't translate that code. It holds no secret, and renews the random state that it
    shares with its siblings when its order arrives."""
    if touch:
        RUN["touch_pages"]()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=report)
    buffer = bytearray(MAX_ORDER)
    sock.send(json.dumps({"ready": True, "cpu_us": time.process_time_ns() // 1000, "pid": os.getpid()}).encode())
    size, ancillary, _, _ = sock.recvmsg_into([buffer], socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC)
    if not size:  # agentd doesn't need this process
        os._exit(0)
    sock.detach()
    KEPT.append(buffer)
    order = json.loads(buffer[:size].decode())
    if ancillary:  # it became a program of `exec`
        take_descriptors(order, list(struct.unpack("4i", ancillary[0][2])))
    set_environment(order)
    return Job(order, report)


def take_descriptors(order: Header, fds: list[int]) -> None:
    """Make what agentd sent the program's standard streams, and the descriptor (3) for reports."""
    try:
        for target, fd in enumerate(fds[:3]):
            os.dup2(fd, target)
        os.dup2(fds[3], 3, inheritable=False)
        os.closerange(4, 1 << 20)
        if order["pty"]:
            fcntl.ioctl(0, TIOCSCTTY, 0)
    except BaseException as error:
        cannot_start(3, error)


def wait_for_program(order_fd: int) -> Job:
    """The process of the next program of `exec`, forked ahead: the order comes with its descriptors."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=order_fd)
    data, fds, _, _ = socket.recv_fds(sock, MAX_ORDER, 4, socket.MSG_CMSG_CLOEXEC)
    sock.detach()
    if not data:  # agentd doesn't need this process
        os._exit(0)
    order = json.loads(data)
    take_descriptors(order, fds)
    set_environment(order)
    return Job(order, order_fd)


def start_interpreter(python: str, report: int) -> NoReturn:
    """Become an image's own Python, as if to run a program. From here on, all is the image's: it has no descriptor but
    its standard streams and the socket (4) on which it waits, and says nothing that is believed."""
    os.set_inheritable(4, True)
    unignore_signals()
    os.write(report, json.dumps({"ready": True, "cpu_us": 0, "pid": os.getpid()}).encode())
    try:
        os.execv(python, [python, "-c", WAIT])
    except OSError as error:
        cannot_start(report, error)


def unignore_signals() -> None:
    """Those that Python ignores, and other programs expect to end them."""
    for number_ in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number_, signal.SIG_DFL)


def cannot_start(report: int, error: BaseException) -> NoReturn:
    name = getattr(error, "filename", None)
    said = (getattr(error, "strerror", None) or f"{type(error).__name__}: {error}") + (f": {name!r}" if name else "")
    try:
        os.write(report, json.dumps({"cannot": said}).encode() + b"\n")
    finally:
        os._exit(127)


def standard_stream(fd: int, name: str) -> io.TextIOWrapper:
    """Python's stream for descriptor 0, 1 or 2 under LANG=C.UTF-8, but line-buffered: the host shows output live."""
    mode = "w" if fd else "r"
    raw = io.FileIO(fd, mode, closefd=False)
    raw.name = f"<{name}>"
    buffer = io.BufferedWriter(raw) if fd else io.BufferedReader(raw)
    errors = "backslashreplace" if name == "stderr" else "surrogateescape"
    stream = io.TextIOWrapper(buffer, "utf-8", errors, newline="\n" if fd else None, line_buffering=fd > 0)
    stream.mode = mode  # type: ignore[misc]
    return stream


OURS: set[str] = set()  # modules loaded before the agent
KEPT: list[bytearray] = []  # kept, since freeing a large block costs more than it is worth


def run_job(job: Job) -> None:
    """Run the agent in this process. Returns (the interpreter then exits as for ``python3 file``), raises or execs."""
    argv = job.order["argv"]
    assert isinstance(argv, list)

    def report_start() -> None:
        started = {"started_ns": time.monotonic_ns(), "pid": os.getpid()}
        os.write(job.report, json.dumps(started).encode() + b"\n")
        if job.order["warm"]:
            os.close(job.report)

    try:
        os.chdir(str(job.order["cwd"]))
        if not job.order["warm"]:
            unignore_signals()
            report_start()
            os.execvp(argv[0], argv)
        with io.open_code(argv[0]) as file:
            source = file.read()
    except BaseException as error:
        cannot_start(job.report, error)
    # Not this module's own name: an agent is its interpreter's __main__.
    main = type(sys)("__main__")
    main.__dict__.update(__builtins__=__builtins__, __annotations__={})
    wanted = [name for name in os.environ.get("PYTHONPATH", "").split(":") if name]
    paths = [os.path.dirname(os.path.realpath(argv[0])), *wanted]
    RUN["run"](main, argv, source, paths, OURS, begun=report_start)


# --- files and ports, for conversations -------------------------------------------------------------------------------


def act_as(uid: int, gid: int) -> None:
    """This thread's rights to files, from now on: those of a user (setfsuid(2); they don't change other threads')."""
    LIBC.setfsgid(gid)
    LIBC.setfsuid(uid)
    if LIBC.setfsuid(-1) != uid or LIBC.setfsgid(-1) != gid:
        raise RuntimeError(f"can't act with the rights of uid {uid}")


def file_op(operation: FileOp) -> FileOp:
    """An operation that acts with the rights of ``user``, and fails in plain words."""

    def act(agentd: Agentd, connection: Connection, head: Header, payload: bytes) -> Header:
        user = head.get("user", "agent")
        if user not in agentd.users:
            raise Refused(f"no such user: {user!r:.40}")
        try:
            if agentd.image_space >= 0:
                # A thread that this one has started shares its root and directory, with which it could not go there.
                libc("unshare", CLONE_FS)
                libc("setns", agentd.image_space, CLONE_NEWNS)
            if agentd.in_vm:
                act_as(*agentd.users[str(user)][:2])
            return operation(agentd, connection, head, payload)
        except UnicodeEncodeError:
            raise Refused("a name holds what no name can hold") from None
        except OSError as error:
            kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else type(error)
            raise kind(f"{head.get('path')}: {error.strerror or error}") from None
        finally:
            if agentd.in_vm:
                act_as(0, 0)
            if agentd.image_space >= 0:
                libc("setns", agentd.own_space, CLONE_NEWNS)
            be_patient(connection.sock, 0)

    return act


def be_patient(sock: socket.socket, seconds: int) -> None:
    """Let the kernel wait, for that long (0: for ever): one call then sends or receives all of a frame, while Python's
    own time-outs take a few calls for each piece that the socket's buffer has room for."""
    sock.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, 0))


def place(agentd: Agentd, head: Header, key: str = "path", follow: bool = True) -> str:
    """The real path that is meant. On the host nothing outside ``root`` is, wherever links lead."""
    path = text(head, key)
    if not path or "\0" in path:
        raise Refused(f"{key!r} must be a path")
    path = os.path.join("/work", path)
    if agentd.in_vm:
        return path
    root = os.path.realpath(agentd.root)
    path = root + os.path.normpath(path)
    real = os.path.realpath(path if follow else os.path.dirname(path)) + "/"
    if not real.startswith((f"{root}/work/", f"{root}/agent/")):
        raise Refused(f"{text(head, key)} is outside of /work and /agent, and this is no VM but a process of the host")
    return path


def describe(status: os.stat_result) -> Header:
    return {
        "kind": KINDS.get(stat.S_IFMT(status.st_mode), "device"),
        "size": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": max(0, status.st_mtime_ns),
    }


@file_op
def stat_file(agentd: Agentd, _: Connection, head: Header, __: bytes) -> Header:
    """What ``path`` is; with ``follow`` what it leads to."""
    follow = bool(head.get("follow", True))
    path = place(agentd, head, follow=follow)
    found = describe(os.stat(path, follow_symlinks=follow))
    return {**found, "target": os.readlink(path)} if found["kind"] == "link" else found


@file_op
def list_dir(agentd: Agentd, connection: Connection, head: Header, _: bytes) -> Header:
    """The entries of a directory, a JSON text in a line each, in no order; at most ``limit`` of them."""
    limit = int(number(head, "limit"))
    outlet = Outlet(connection, head["id"])
    count = 0
    with os.scandir(place(agentd, head)) as entries:
        for entry in entries:
            if count >= limit:
                outlet.flush()
                return {"count": count, "complete": False}
            try:
                found = {"name": entry.name, **describe(entry.stat(follow_symlinks=False))}
                if found["kind"] == "link":
                    found["target"] = os.readlink(entry.path)
            except FileNotFoundError:  # gone since
                continue
            outlet.line(found)
            count += 1
    outlet.flush()
    return {"count": count, "complete": True}


@file_op
def make_a_dir(agentd: Agentd, _: Connection, head: Header, __: bytes) -> Header:
    path = place(agentd, head)
    if head.get("parents"):
        make_parents(path)
    else:
        os.mkdir(path, 0o755)
    return {}


def make_parents(path: str) -> None:
    """Make a directory and those above it. Not os.makedirs, which calls itself for each level."""
    at = 0
    while at < len(path):
        at = path.find("/", at + 1) % (len(path) + 1)
        try:
            os.mkdir(path[:at], 0o755)
        except FileExistsError:
            if at == len(path) and not os.path.isdir(path):
                raise


@file_op
def move(agentd: Agentd, _: Connection, head: Header, __: bytes) -> Header:
    """Rename; what is at ``to`` is replaced if it is a file."""
    path, to = place(agentd, head, follow=False), place(agentd, head, "to", follow=False)
    try:
        os.rename(path, to)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise Refused(f"{text(head, 'to')} is on another file system than {text(head, 'path')}: use mv") from None
        raise
    return {}


@file_op
def remove(agentd: Agentd, _: Connection, head: Header, __: bytes) -> Header:
    path = place(agentd, head, follow=False).rstrip("/")
    if not os.path.basename(path):
        raise Refused("the root directory stays")
    parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = os.path.basename(path)
        if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            os.unlink(name, dir_fd=parent)
        elif not head.get("recursive"):
            os.rmdir(name, dir_fd=parent)
        else:
            remove_tree(parent, name)
    finally:
        os.close(parent)
    return {}


def remove_tree(parent: int, name: str) -> None:
    """Remove a directory with all that is in it, however deep it is and however much: with one descriptor, and a few
    words for each level. The way up is '..'; it is looked at, since somebody may move directories meanwhile."""
    trail: list[tuple[str, int, int]] = []
    here, below = os.dup(parent), name
    try:
        while True:
            if below:
                if len(trail) >= MAX_DEPTH:
                    raise Refused(f"it is nested in more than {MAX_DEPTH:,} directories")
                status = os.fstat(here)
                trail.append((below, status.st_dev, status.st_ino))
                next_ = os.open(below, DIR_FLAGS | os.O_NOFOLLOW, dir_fd=here)
            else:
                below, *above = trail.pop()
                next_ = os.open("..", DIR_FLAGS, dir_fd=here) if trail else os.dup(parent)
                status = os.fstat(next_)
                if above != [status.st_dev, status.st_ino]:
                    os.close(next_)
                    raise Refused("it was moved while it was removed")
                os.rmdir(below, dir_fd=next_)
            os.close(here)
            here = next_
            if not trail:
                return
            below = empty(here)
    finally:
        os.close(here)


def empty(here: int) -> str:
    """Remove what is in a directory, up to the first directory that isn't empty: its name, or ''."""
    with os.scandir(here) as entries:
        for entry in entries:
            try:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=here)
                    continue
                os.rmdir(entry.name, dir_fd=here)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return entry.name
    return ""


@file_op
def read(agentd: Agentd, connection: Connection, head: Header, _: bytes) -> Header:
    """Send a file's contents from ``offset`` on, ``length`` bytes or all. With ``holes``, what was never written in
    it comes as a frame {"hole": bytes} and not as zeros."""
    fd = open_regular(place(agentd, head))
    try:
        status = os.fstat(fd)
        at = int(number(head, "offset"))
        end = at + int(number(head, "length")) if head.get("length") is not None else 1 << 62
        outlet, first = Outlet(connection, head["id"]), at
        holes = bool(head.get("holes")) and status.st_blocks * 512 < status.st_size
        while at < end:
            upto = end
            if holes:
                data_at, upto = next_data(fd, at, min(end, status.st_size))
                if data_at > at:
                    connection.send({"id": head["id"], "hole": data_at - at})
                    at = data_at
                    continue
            sent = outlet.file(fd, at, min(end, upto) - at)
            if not sent:
                break
            at += sent
    finally:
        os.close(fd)
    return {**describe(status), "bytes": at - first}


def next_data(fd: int, at: int, end: int) -> tuple[int, int]:
    """From where to where there is data, at or after ``at``; (end, …) if none is."""
    if at >= end:
        return at, at + MAX_PAYLOAD  # it has grown, perhaps
    try:
        data_at = min(os.lseek(fd, at, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end, end
    return data_at, os.lseek(fd, data_at, os.SEEK_HOLE) if data_at < end else end


def open_regular(path: str) -> int:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise NotRegular(f"{path} is a socket or a pipe") from None
        raise
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind != stat.S_IFREG:
        os.close(fd)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise NotRegular(f"{path} is a {KINDS.get(kind, 'device')}, not a file")
    return fd


@file_op
def write(agentd: Agentd, connection: Connection, head: Header, payload: bytes) -> Header:
    """Write a file: beside the one that it replaces, and then in its place, so nobody sees half of it. ``size``: of it
    all. ``upload``: a name under which a broken one is kept, to go on at ``offset``; see `uploaded`. ``mode``: default
    that of the file it replaces, or 644. ``parents``: make directories above it. ``owner``: another than ``user``; a
    file that root replaces keeps its own."""
    path, upload = place(agentd, head), upload_of(head)
    offset = int(number(head, "offset")) if upload and head.get("offset") else 0
    if head.get("parents"):
        make_parents(os.path.dirname(path))
    parent, name, part = open_beside(path, upload or os.urandom(8).hex())
    try:
        there, owner = file_at(parent, name), None
        mode = (
            int(number(head, "mode"))
            if head.get("mode") is not None
            else stat.S_IMODE(there.st_mode)
            if there
            else 0o644
        )
        if head.get("owner") is not None:
            owner = agentd.owner(head)
        elif there and agentd.in_vm and head.get("user") == "root":
            owner = there.st_uid, there.st_gid
        fd = take_up(parent, part, offset) if offset else create(parent, part)
        kept = False
        try:
            total = offset
            for data in inlet(connection, head, payload):
                total += len(data)
                while data:
                    data = data[os.write(fd, data) :]
            if head.get("size") is not None and total != number(head, "size"):
                raise Refused(f"{total} bytes came, and {head['size']} were announced")
            if owner:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode & 0o7777)
            os.rename(part, name, src_dir_fd=parent, dst_dir_fd=parent)
            kept = True
        except Broken:
            kept = bool(upload)
            raise
        finally:
            os.close(fd)
            if not kept:
                os.unlink(part, dir_fd=parent)
    finally:
        os.close(parent)
    return {"bytes": total}


@file_op
def uploaded(agentd: Agentd, _: Connection, head: Header, __: bytes) -> Header:
    """How much of a broken `write` is there."""
    try:
        parent, _name, part = open_beside(place(agentd, head), upload_of(head) or "-")
    except FileNotFoundError:
        return {"bytes": 0}
    try:
        status = os.lstat(part, dir_fd=parent)
        return {"bytes": status.st_size if stat.S_ISREG(status.st_mode) else 0}
    except FileNotFoundError:
        return {"bytes": 0}
    finally:
        os.close(parent)


def upload_of(head: Header) -> str:
    upload = head.get("upload") or ""
    if not isinstance(upload, str) or len(upload) > 64 or not f"a{upload.replace('-', 'a')}".isalnum():
        raise Refused("'upload' must be at most 64 letters, digits and -")
    return upload


def open_beside(path: str, upload: str) -> tuple[int, str, str]:
    """The directory of the file that ``path`` leads to, its name there, and the name of the file beside it."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), name, f".swarm-{upload}.part"


def is_part(path: str) -> bool:
    """Is it what `write` makes beside a file?"""
    name = path.rpartition("/")[2]
    return name.startswith(".swarm-") and name.endswith(".part")


def file_at(parent: int, name: str) -> os.stat_result | None:
    """The file that will be replaced, if there is one. Nothing but a file is."""
    try:
        status = os.lstat(name, dir_fd=parent)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise NotRegular(f"{name} is a {KINDS.get(stat.S_IFMT(status.st_mode), 'device')}, not a file")
    try:  # who may not write to it may not replace it, either
        os.close(os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent))
    except OSError as error:
        if error.errno != errno.ETXTBSY:  # a program that runs can be replaced
            raise
    return status


def take_up(parent: int, part: str, offset: int) -> int:
    """Open what there is of a file, to go on at ``offset``."""
    fd = os.open(part, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise NotRegular("what was written of it is no file any more")
        if status.st_size < offset:
            raise Refused(f"only {status.st_size} bytes of it are there")
        os.ftruncate(fd, offset)
        os.lseek(fd, offset, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Outlet:
    """What a conversation sends to the host, in frames of some size."""

    def __init__(self, connection: Connection, request_id: object) -> None:
        self.connection = connection
        self.id = request_id
        self.head = {"id": request_id, "stream": "data"}
        self.unsent = bytearray()
        self.room: memoryview | None = None

    def line(self, value: object) -> None:
        self.add(COMPACT(value).encode() + b"\n")

    def add(self, data: bytes) -> None:
        self.unsent += data
        if len(self.unsent) >= BATCH:
            self.flush()

    def flush(self) -> None:
        if self.unsent:
            data, self.unsent = self.unsent, bytearray()
            self.send(memoryview(data))

    def file(self, fd: int, at: int, most: int) -> int:
        """Send up to ``most`` bytes of a file; returns how many, at most a frame's."""
        if self.room is None:
            self.room = memoryview(bytearray(MAX_PAYLOAD))
        size = os.preadv(fd, [self.room[: min(most, MAX_PAYLOAD)]], at)
        if size:
            self.send(self.room[:size])
        return size

    def send(self, data: memoryview) -> None:
        """A frame, without a copy of its payload."""
        sock, said = self.connection.sock, COMPACT(self.head).encode()
        try:
            be_patient(sock, STALL_SECONDS)
            first = struct.pack(">II", len(said), len(data)) + said
            sent = sock.sendmsg([first, data])
            sock.sendall(first[sent:])
            sock.sendall(data[max(0, sent - len(first)) :])
        except OSError as error:
            raise Broken(f"{type(error).__name__}: {error}") from None


def inlet(connection: Connection, head: Header, payload: bytes) -> Iterator[memoryview]:
    """The data that the host sends in this conversation, up to an empty piece. Each piece is valid until the next."""
    if payload:
        yield memoryview(payload)
    room = memoryview(bytearray(MAX_PAYLOAD))
    be_patient(connection.sock, STALL_SECONDS)
    while True:
        try:
            sizes = struct.unpack(">II", connection.exactly(8))
            if not 2 <= sizes[0] <= 1024 or sizes[1] > MAX_PAYLOAD:
                raise Broken(f"a frame of {sizes[0]} + {sizes[1]} bytes within a conversation")
            said = json.loads(bytes(connection.exactly(sizes[0])))
            if said.get("id") != head["id"] or said.get("op") != "data":
                raise Broken("a frame that does not belong to the conversation")
            if not sizes[1]:
                return
            connection.fill(room[: sizes[1]])
        except (OSError, ValueError, AttributeError) as error:
            raise Broken(f"{type(error).__name__}: {error}") from None
        yield room[: sizes[1]]


# --- directories, as tar archives


@file_op
def pack(agentd: Agentd, connection: Connection, head: Header, _: bytes) -> Header:
    """Send what is below a directory (or a file) as a tar archive: at most ``entries`` files and directories with
    ``limit`` bytes. Pipes, sockets, devices and what ``user`` can't read are left out, and counted."""
    packer = Packer(Outlet(connection, head["id"]), int(number(head, "limit")), int(number(head, "entries")))
    packer.pack(place(agentd, head))
    return {"entries": packer.count, "bytes": packer.bytes, "left_out": packer.left_out, "first": packer.first}


class Packer:
    """Writes an archive in GNU's format, which takes any name. Directories come before what is in them; of those that
    are yet to be sent only names are kept."""

    def __init__(self, outlet: Outlet, limit: int, entries: int) -> None:
        self.outlet = outlet
        self.limit, self.entries = limit, entries
        self.count = self.bytes = self.left_out = 0
        self.first = ""  # of those left out, and why

    def pack(self, top: str) -> None:
        if not stat.S_ISDIR(os.stat(top).st_mode):
            folder, name = os.path.split(os.path.realpath(top))
            here = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self.send(here, name, os.fsencode(name), True)
            finally:
                os.close(here)
        else:
            self.send_below(top)
        self.outlet.add(bytes(1024))
        self.outlet.flush()

    def send_below(self, top: str) -> None:
        levels: list[tuple[str, list[str]]] = [("", [""])]  # of each level: where it is, and what is left of it
        pending = 1
        while levels:
            prefix, names = levels[-1]
            if not names:
                levels.pop()
                continue
            below = prefix + names.pop()
            pending -= 1
            try:
                here = os.open(f"{top}/{below}", DIR_FLAGS | (os.O_NOFOLLOW if below else 0))
            except OSError as error:
                if not below:
                    raise
                self.leave_out(below, error)
                continue
            try:
                prefix, names = f"{below}/" if below else "", []
                with os.scandir(here) as entries:
                    for entry in entries:
                        is_file = entry.is_file(follow_symlinks=False)
                        if self.send(here, entry.name, os.fsencode(prefix + entry.name), is_file):
                            names.append(entry.name)
                            pending += 1
                            if pending > MAX_PENDING:
                                raise Refused(f"it has more than {MAX_PENDING:,} directories beside each other")
            finally:
                os.close(here)
            levels.append((prefix, names))

    def leave_out(self, path: str, why: OSError | str) -> None:
        if isinstance(why, FileNotFoundError):  # gone since it was listed
            return
        self.left_out += 1
        self.first = self.first or f"{path:.200}: {why if isinstance(why, str) else why.strerror}"

    def send(self, here: int, name: str, path: bytes, is_file: bool) -> bool:
        """True for a directory, whose contents are yet to be sent. ``is_file``: it was one a moment ago."""
        fd = -1
        try:
            if is_file:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
            status = os.fstat(fd) if fd >= 0 else os.lstat(name, dir_fd=here)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFREG and fd < 0:
                return False  # it has become one since
            target = os.fsencode(os.readlink(name, dir_fd=here)) if kind == stat.S_IFLNK else b""
        except OSError as error:
            self.leave_out(os.fsdecode(path), error)
            return False
        try:
            if kind not in TAR_KINDS:
                self.leave_out(os.fsdecode(path), f"it is a {KINDS.get(kind, 'device')}")
                return False
            if len(path) > MAX_NAME:
                raise Refused(f"{os.fsdecode(path):.200}… is nested too deep to be sent")
            self.count += 1
            size = status.st_size if kind == stat.S_IFREG else 0
            self.bytes += size
            if self.count > self.entries:
                raise Refused(f"it has more than {self.entries:,} files and directories")
            if self.bytes > self.limit:
                raise Refused(f"its files have more than {self.limit:,} bytes, with {os.fsdecode(path):.200}")
            is_dir = kind == stat.S_IFDIR
            named = path + b"/" if is_dir else path
            self.outlet.add(tar_header(named, status.st_mode, size, status.st_mtime, TAR_KINDS[kind], target))
            if size:
                self.contents(fd, size, os.fsdecode(path))
            return is_dir
        finally:
            if fd >= 0:
                os.close(fd)

    def contents(self, fd: int, size: int, path: str) -> None:
        outlet, at = self.outlet, 0
        if size <= CHUNK:
            data = os.read(fd, size)
            at = len(data)
            outlet.add(data)
        else:
            outlet.flush()
            while at < size and (sent := outlet.file(fd, at, size - at)):
                at += sent
        if at < size:  # it shrank meanwhile: as tar does, the rest is zeros
            self.leave_out(path, "it shrank while it was read")
        while at < size:
            outlet.add(bytes(min(size - at, BATCH)))
            at = min(size, at + BATCH)
        outlet.add(bytes(-size % 512))


def tar_header(name: bytes, mode: int, size: int, mtime: float, kind: bytes, target: bytes = b"") -> bytes:
    head = b""
    for which, value in ((b"L", name), (b"K", target)):
        if len(value) > 100:
            longer = tar_header(b"././@LongLink", 0, len(value) + 1, 0, which) + value
            head += longer + bytes(512 - len(value) % 512)
    sized = b"%011o" % size if size < 1 << 33 else b"\x80" + size.to_bytes(11, "big")
    fields = (name[:100], b"%07o" % (mode & 0o7777), b"%07o" % 0, b"%07o" % 0, sized)
    block = bytearray(TAR_BLOCK.pack(*fields, b"%011o" % min(max(0, int(mtime)), (1 << 33) - 1), b" " * 8, kind))
    block[157:257] = target[:100].ljust(100, b"\0")
    block[257:265] = b"ustar  \0"
    block[148:155] = b"%06o\0" % tar_sum(block)
    return head + block


def tar_sum(block: bytes | bytearray) -> int:
    """Of a header's bytes, those of the sum itself as blanks. Most are 0, and summing takes time for each."""
    return sum(block[:148].replace(b"\0", b"")) + 8 * 32 + sum(block[156:].replace(b"\0", b""))


@file_op
def unpack(agentd: Agentd, connection: Connection, head: Header, payload: bytes) -> Header:
    """Unpack a tar archive (ustar, PAX or GNU, not compressed) below ``path``, which is made if it isn't there. Files
    are replaced, links in it are never followed; all belongs to ``user``."""
    path = place(agentd, head)
    make_parents(path)
    top = os.open(path, DIR_FLAGS)
    unpacker = Unpacker(top, Pieces(inlet(connection, head, payload)))
    try:
        unpacker.unpack()
    finally:
        unpacker.close()
    return {"entries": unpacker.count, "bytes": unpacker.bytes}


class Pieces:
    """Reads a stream of pieces by numbers of bytes."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self.pieces = pieces
        self.rest = memoryview(b"")

    def some(self, most: int) -> memoryview:
        if not self.rest:
            self.rest = next(self.pieces, self.rest)
        found, self.rest = self.rest[:most], self.rest[most:]
        if not found:
            raise Refused("the archive is cut off")
        return found

    def take(self, size: int) -> bytes:
        found = bytes(self.some(size)) if size else b""
        while len(found) < size:
            found += self.some(size - len(found))
        return found

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.some(size))

    def drain(self) -> None:
        for _ in self.pieces:
            pass


class Unpacker:
    def __init__(self, top: int, pieces: Pieces) -> None:
        self.top = top
        self.pieces = pieces
        self.count = self.bytes = 0
        self.folder: bytes | None = None  # of the last file: the next is most often beside it
        self.parent = -1
        self.modes: dict[bytes, int] = {}  # of directories; set at the end, as they may forbid writing

    def close(self) -> None:
        for fd in (self.top, self.parent):
            if fd >= 0:
                os.close(fd)

    def unpack(self) -> None:
        said: dict[str, bytes] = {}
        while (block := self.pieces.take(512)).strip(b"\0"):
            try:
                if block[257:262] != b"ustar" and tar_number(block[148:156]) != tar_sum(block):
                    raise ValueError
                kind, size = block[156:157], tar_number(block[124:136])
                mode, mtime = tar_number(block[100:108]) & 0o7777, tar_number(block[136:148])
                if kind in b"xgLK":
                    if size > MAX_EXTENSION:
                        raise ValueError
                    said |= tar_extension(kind, self.pieces.take(size))
                    self.pieces.skip(-size % 512)
                    continue
                size = int(said.get("size", size))
            except ValueError:
                raise Refused("that is not a tar archive, or it is damaged") from None
            name = block[:100].split(b"\0")[0]
            if block[257:263] == b"ustar\0" and block[345]:
                name = block[345:500].split(b"\0")[0] + b"/" + name
            name, target = said.get("path", name), said.get("linkpath", block[157:257].split(b"\0")[0])
            said = {}
            try:
                self.member(name, kind, mode, size, mtime, target)
            except OSError as error:
                raise type(error)(error.errno, f"{os.fsdecode(name):.200}: {error.strerror}") from None
        self.pieces.drain()
        for name, mode in reversed(self.modes.items()):
            parent, last = self.place(name)
            fd = os.open(last, DIR_FLAGS | os.O_NOFOLLOW, dir_fd=parent)
            os.fchmod(fd, mode)
            os.close(fd)

    def member(self, name: bytes, kind: bytes, mode: int, size: int, mtime: int, target: bytes) -> None:
        self.count += 1
        if kind in b"5" or (kind in b"0\0" and name.endswith(b"/")):
            parts = [part for part in name.split(b"/") if part not in (b"", b".")]
            if parts:
                parent, last = self.place(name)
                make_dir(parent, last, None)
                if mode != 0o755:
                    self.modes[b"/".join(parts)] = mode
            return
        parent, last = self.place(name)
        if kind == b"2":
            make_link(parent, last, target, None)
            return
        if kind == b"1":
            self.hard_link(target, name)
            return
        if kind not in b"0\x007":
            raise Refused(f"{os.fsdecode(name):.200} is neither a file nor a directory nor a link")
        fd = create(parent, last)
        try:
            self.bytes += size
            left = size
            while left:
                data = self.pieces.some(left)
                left -= len(data)
                while data:
                    data = data[os.write(fd, data) :]
            os.fchmod(fd, mode)
            os.utime(fd, (mtime, mtime))
        finally:
            os.close(fd)
        self.pieces.skip(-size % 512)

    def hard_link(self, source: bytes, name: bytes) -> None:
        parent, last = self.place(source)
        parent = os.dup(parent)
        try:
            here, new = self.place(name)
            try:
                os.unlink(new, dir_fd=here)
            except FileNotFoundError:
                pass
            os.link(last, new, src_dir_fd=parent, dst_dir_fd=here, follow_symlinks=False)
        finally:
            os.close(parent)

    def place(self, path: bytes) -> tuple[int, str]:
        """The directory of a member, which is made if it isn't there, and its name."""
        folder, _, name = path.rstrip(b"/").rpartition(b"/")
        if name in (b"", b".", b".."):
            raise Refused(f"the archive has a file named {os.fsdecode(path)!r:.200}")
        if folder != self.folder:
            here = os.dup(self.top)
            try:
                for part in folder.split(b"/"):
                    if part in (b"", b"."):
                        continue
                    if part == b"..":
                        raise Refused(f"the archive has a file named {os.fsdecode(path)!r:.200}")
                    make_dir(here, os.fsdecode(part), None)
                    below = os.open(part, DIR_FLAGS | os.O_NOFOLLOW, dir_fd=here)
                    os.close(here)
                    here = below
            except BaseException:
                os.close(here)
                raise
            if self.parent >= 0:
                os.close(self.parent)
            self.folder, self.parent = folder, here
        return self.parent, os.fsdecode(name)


def tar_number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def tar_extension(kind: bytes, data: bytes) -> dict[str, bytes]:
    """What an extended header says of the next member."""
    if kind in b"LK":
        return {"path" if kind == b"L" else "linkpath": data.rstrip(b"\0")}
    said: dict[str, bytes] = {}
    while data and kind == b"x":
        size = int(data[: data.index(b" ")])
        key, _, value = data[:size].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        if size <= 0 or key.startswith(b"GNU.sparse"):
            raise ValueError
        if key in (b"path", b"linkpath", b"size"):
            said[key.decode()] = value
        data = data[size:]
    return said


# --- watches


@file_op
def watch(agentd: Agentd, connection: Connection, head: Header, _: bytes) -> Header:
    """Tell what changes in a directory (or of a file), a JSON text in a line each, until the host has enough."""
    fd = LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise Refused("too many watches are open")
    try:
        watcher = Watcher(fd, place(agentd, head), bool(head.get("recursive")), Outlet(connection, head["id"]))
        watcher.begin()
        connection.send({"id": head["id"], "started_ns": time.monotonic_ns()})
        watcher.outlet.flush()
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(connection.sock, select.POLLIN | select.POLLRDHUP)
        while True:
            ready = [one for one, _ in poller.poll()]
            if connection.sock.fileno() in ready:
                for _piece in inlet(connection, head, b""):
                    pass
                return {"watches": len(watcher.paths)}
            select.select([], [], [], WATCH_SECONDS)  # what changes often is told once
            if not watcher.tell():
                return {"watches": 0}
    finally:
        os.close(fd)


class Watcher:
    """inotify(7), for a tree. What can't be watched is told as 'lost': too many directories, or more changes than the
    kernel keeps for us while the host is behind."""

    def __init__(self, fd: int, top: str, recursive: bool, outlet: Outlet) -> None:
        self.fd = fd
        self.top = top
        self.recursive = recursive
        self.outlet = outlet
        self.paths: dict[int, str] = {}  # of each watch, below top
        self.told: set[tuple[str, str]] = set()  # in this batch
        self.limit = MAX_WATCHES
        self.foreign = {os.stat(name).st_dev for name in ("/proc", "/sys") if os.path.isdir(name)}

    def begin(self) -> None:
        self.add("", follow=True)
        if self.recursive and stat.S_ISDIR(os.stat(self.top).st_mode):
            self.add_below("", tell=False)

    def path(self, below: str) -> str:
        return f"{self.top}/{below}" if below else self.top

    def add(self, below: str, follow: bool = False) -> bool:
        if len(self.paths) >= self.limit:
            self.lose(f"more than {self.limit:,} directories")
            return False
        mask = IN_EVENTS if follow else IN_EVENTS | IN_ONLYDIR | IN_DONT_FOLLOW
        got = LIBC.inotify_add_watch(self.fd, os.fsencode(self.path(below)), mask)
        if got >= 0:
            self.paths[got] = below
            return True
        code = ctypes.get_errno()
        if follow:
            raise OSError(code, os.strerror(code))
        if code == errno.ENOSPC:
            self.lose("the kernel has no more watches")
        elif code not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            self.event("lost", below, why=os.strerror(code))
        return False

    def lose(self, why: str) -> None:
        """No more can be watched: told once."""
        if self.limit:
            self.limit = 0
            self.event("lost", "", why=why)

    def add_below(self, below: str, tell: bool) -> None:
        """Watch all directories below one. ``tell``: it is new, and what is in it may have come before the watch."""
        left = [below]
        while left:
            here = left.pop()
            try:
                with os.scandir(self.path(here)) as entries:
                    for entry in entries:
                        path = f"{here}/{entry.name}" if here else entry.name
                        is_dir = entry.is_dir(follow_symlinks=False)
                        if tell:
                            self.event("created", path, directory=is_dir)
                        if is_dir and entry.stat(follow_symlinks=False).st_dev not in self.foreign and self.add(path):
                            left.append(path)
                        if not self.limit:
                            return
            except OSError:  # gone, or not for this user, which `add` has told
                continue

    def tell(self) -> bool:
        """Tell what the kernel has for us. False if what is watched is gone."""
        self.told = set()
        moved: dict[int, tuple[str, bool]] = {}
        at, data = 0, os.read(self.fd, CHUNK)
        while at < len(data):
            wd, mask, cookie, size = INOTIFY_EVENT.unpack_from(data, at)
            name = os.fsdecode(data[at + 16 : at + 16 + size].rstrip(b"\0"))
            at += 16 + size
            if mask & IN_Q_OVERFLOW:
                self.event("lost", "", why="more changed than could be told")
                if self.recursive:
                    self.limit = MAX_WATCHES
                    self.add_below("", tell=False)
                continue
            below = self.paths.get(wd)
            if below is None:
                continue
            path = f"{below}/{name}" if below and name else below or name
            self.tell_one(wd, mask, cookie, path, below, moved)
        for path, is_dir in moved.values():  # out of what is watched
            self.event("removed", path, directory=is_dir)
            if is_dir:
                self.forget(path)
        self.outlet.flush()
        return bool(self.paths)

    def tell_one(
        self, wd: int, mask: int, cookie: int, path: str, below: str, moved: dict[int, tuple[str, bool]]
    ) -> None:
        is_dir = bool(mask & IN_ISDIR)
        if mask & IN_IGNORED:
            del self.paths[wd]
            if not below:
                self.event("removed", "", directory=True)
        elif mask & IN_MOVED_FROM:
            moved[cookie] = (path, is_dir)
        elif mask & IN_MOVED_TO and cookie in moved:
            old = moved.pop(cookie)[0]
            self.told.clear()
            if is_part(old):
                self.event("written", path)
            else:
                self.event("moved", old, to=path, directory=is_dir)
            if is_dir:
                for one, where in self.paths.items():
                    if where == old or where.startswith(f"{old}/"):
                        self.paths[one] = path + where[len(old) :]
        elif mask & (IN_CREATE | IN_MOVED_TO):
            self.event("created", path, directory=is_dir)
            if is_dir and self.recursive and self.add(path):
                self.add_below(path, tell=True)
        elif mask & IN_DELETE:
            self.event("removed", path, directory=is_dir)
            self.told.clear()  # it may come again
        elif mask & (IN_MODIFY | IN_CLOSE_WRITE):
            self.event("written", path)
        elif mask & IN_ATTRIB and (path or not is_dir):
            self.event("attributes", path, directory=is_dir)

    def forget(self, path: str) -> None:
        for wd, where in list(self.paths.items()):
            if where == path or where.startswith(f"{path}/"):
                LIBC.inotify_rm_watch(self.fd, wd)
                del self.paths[wd]

    def event(self, kind: str, path: str, **more: object) -> None:
        if kind != "lost":
            if (kind, path) in self.told or is_part(path):
                return
            if len(self.told) > 10_000:
                self.told.clear()
            self.told.add((kind, path))
        self.outlet.line({"event": kind, "path": path, **{key: value for key, value in more.items() if value}})


# --- ports


def dial(agentd: Agentd, connection: Connection, head: Header, payload: bytes) -> Header:
    """Connect to a port of this machine's loopback: `data` both ways, an empty one is the end of its direction."""
    port = int(number(head, "port"))
    if not 0 < port < 65536:
        raise Refused("a port is a number from 1 to 65535")
    sock = socket.socket()
    try:
        sock.settimeout(DIAL_SECONDS)
        try:
            sock.connect(("127.0.0.1", port))
        except OSError as error:
            raise NotListening(f"nothing answers on port {port} of the guest: {error.strerror or error}") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Dialled(Talk(connection, head["id"]), sock, payload).relay()
    finally:
        sock.close()


class Dialled:
    """Relays between the host and a port. Each side that is behind stops the other from being read."""

    def __init__(self, talk: Talk, sock: socket.socket, payload: bytes) -> None:
        self.talk = talk
        self.port = sock
        self.to_port = bytearray(payload)
        self.host_ended = self.port_ended = self.shut = self.reset = False
        self.sent = self.received = 0
        self.output = Output()

    def relay(self) -> Header:
        self.port.setblocking(False)
        self.talk.say({"started_ns": time.monotonic_ns()})
        while self.talk.unsent or not (self.port_ended and self.shut):
            try:
                self.turn()
            except ConnectionError:
                self.reset = self.host_ended = self.port_ended = self.shut = True
                self.to_port.clear()
            if self.talk.gone:
                raise Broken("the host closed the connection to a port")
        return {"sent": self.sent, "received": self.received, "reset": self.reset}

    def turn(self) -> None:
        talk, port, poller = self.talk, self.port, select.poll()
        ignored = select.POLLIN if self.to_port or self.host_ended else 0
        poller.register(talk.sock, talk.events() & ~ignored)
        wanted = (select.POLLOUT if self.to_port else 0) | (0 if talk.unsent or self.port_ended else select.POLLIN)
        if wanted:
            poller.register(port, wanted)
        for fd, event in poller.poll():
            if fd == port.fileno():
                if wanted & select.POLLIN and event & ~select.POLLOUT:
                    data = self.output.read(port.fileno())
                    self.received += len(data)
                    self.port_ended = not data
                    talk.say({"stream": "data"}, data)
                if self.to_port:
                    self.flush()
            elif event & select.POLLOUT:
                talk.flush()
            elif ignored:
                talk.lose()
            else:
                self.hear()

    def hear(self) -> None:
        self.output.hurry()
        for head, data in self.talk.hear():
            if head["op"] != "data":
                raise Broken("a frame that does not belong to a port")
            self.to_port += data
            self.host_ended = self.host_ended or not data
        self.flush()

    def flush(self) -> None:
        try:
            while self.to_port:
                sent = self.port.send(self.to_port)
                self.sent += sent
                del self.to_port[:sent]
            if self.host_ended and not self.shut:
                self.shut = True
                self.port.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass


FILE_OPS: dict[str, FileOp] = {
    "stat": stat_file,
    "list": list_dir,
    "make_dir": make_a_dir,
    "move": move,
    "remove": remove,
    "read": read,
    "write": write,
    "uploaded": uploaded,
    "pack": pack,
    "unpack": unpack,
    "watch": watch,
    "dial": dial,
}


# --- agentd: connections ----------------------------------------------------------------------------------------------


class Connection:
    """One connection from the host: reads and writes frames."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.authorised = False
        self.failed: set[object] = set()  # ids of requests that failed
        self.early = bytearray()  # what a conversation has read beyond its end

    def receive(self, first: bool = False) -> tuple[Header, bytes] | None:
        """The next frame; None if the host closed the connection between two frames."""
        try:
            # Between requests the host may be silent for any time; TCP keep-alive notices its death.
            self.sock.settimeout(FIRST_FRAME_SECONDS if first else None)
            prefix = self.take(8) or self.sock.recv(8)
            if not prefix:
                return None
            self.sock.settimeout(IO_SECONDS)
            sizes = struct.unpack(">II", prefix + self.exactly(8 - len(prefix)))
            if not 2 <= sizes[0] <= MAX_HEADER or sizes[1] > MAX_PAYLOAD:
                raise Broken(f"a frame of {sizes[0]} + {sizes[1]} bytes")
            head = json.loads(bytes(self.exactly(sizes[0])))
            payload = bytes(self.exactly(sizes[1]))
        except (OSError, ValueError, RecursionError) as error:
            raise Broken(f"{type(error).__name__}: {error}") from None
        return checked(head), payload

    def take(self, size: int) -> bytes:
        data = bytes(self.early[:size])
        del self.early[:size]
        return data

    def shut(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is closed already
            pass

    def exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        self.fill(memoryview(data))
        return data

    def fill(self, view: memoryview) -> None:
        if self.early:
            ready = self.take(len(view))
            view[: len(ready)] = ready
            view = view[len(ready) :]
        while view:
            got = self.sock.recv_into(view, 0, socket.MSG_WAITALL)
            if not got:
                raise Broken("closed inside a frame")
            view = view[got:]

    def send(self, head: Header, payload: bytes = b"") -> None:
        try:
            self.sock.settimeout(IO_SECONDS)
            self.sock.sendall(frame(head, payload))
        except OSError as error:
            raise Broken(f"{type(error).__name__}: {error}") from None


def checked(head: object) -> Header:
    if not isinstance(head, dict) or not isinstance(head.get("id"), int) or not isinstance(head.get("op"), str):
        raise Broken("a header without id and op")
    return head


class Talk:
    """A conversation: frames both ways, after its request and until agentd's last reply. Nothing in it waits."""

    def __init__(self, connection: Connection, request_id: object) -> None:
        self.connection = connection
        self.id = request_id
        self.sock = connection.sock
        self.unsent = bytearray()
        self.gone = False  # the host closed the connection, or broke the protocol
        connection.sock.setblocking(False)

    def events(self) -> int:
        """What to poll its socket for."""
        return select.POLLIN | select.POLLRDHUP | (select.POLLOUT if self.unsent else 0)

    def say(self, head: Header, payload: bytes = b"") -> None:
        if self.gone:
            return
        prefix, sent = frame({"id": self.id, **head}, size=len(payload)), 0
        try:
            if not self.unsent:
                sent = self.sock.sendmsg([prefix, payload])
        except BlockingIOError:
            pass
        except OSError:
            self.lose()
            return
        if sent < len(prefix):
            self.unsent += prefix[sent:]
        self.unsent += memoryview(payload)[max(0, sent - len(prefix)) :]

    def flush(self) -> None:
        try:
            while self.unsent and not self.gone:
                del self.unsent[: self.sock.send(self.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.lose()

    def hear(self) -> list[tuple[Header, bytes]]:
        """The frames of this conversation that have come; after the host's end, ``gone`` is set."""
        arrived = self.connection.early
        try:
            data = self.sock.recv(CHUNK)
            if not data:
                self.lose()
            arrived += data
            frames = []
            while len(arrived) >= 8:
                header, payload = struct.unpack(">II", arrived[:8])
                if not 2 <= header <= MAX_HEADER or payload > MAX_PAYLOAD:
                    raise Broken(f"a frame of {header} + {payload} bytes")
                if len(arrived) < 8 + header + payload:
                    break
                head = checked(json.loads(arrived[8 : 8 + header]))
                if head["id"] != self.id:
                    raise Broken("another request during a conversation")
                frames.append((head, bytes(arrived[8 + header : 8 + header + payload])))
                del arrived[: 8 + header + payload]
            return frames
        except BlockingIOError:
            return []
        except (OSError, ValueError, RecursionError, Broken) as error:
            log(f"connection dropped: {error}")
            self.lose()
            return []

    def lose(self) -> None:
        self.gone = True
        self.unsent.clear()


def frame(head: Header, payload: bytes = b"", size: int = 0) -> bytes:
    """``size``: of a payload that is sent by itself."""
    data = COMPACT(head).encode()
    return struct.pack(">II", len(data), size or len(payload)) + data + payload


def key_of(token: str) -> bytes:
    if not 32 <= len(token) <= 128:
        raise Refused("a token has 32 to 128 characters")
    return bytes.fromhex(token)


def boot_token() -> str:
    """The token on the kernel's command line. An agent can read it there: it is void after the first `renew`."""
    words = [word[12:] for word in read_file("/proc/cmdline").split() if word.startswith("swarm.token=")]
    return words[0] if words else ""


def proof(token: bytes, who: str, nonce: str) -> str:
    """See swarm/channel/proof.py."""
    return blake2b(f"{who} {nonce}".encode(), key=token, digest_size=32).hexdigest()


class Agentd:
    """The daemon's state, and one method for each operation, which takes (connection, header, payload) and returns the
    fields of its last reply."""

    def __init__(self, zygote: socket.socket, zygote_pid: int, unix: str, root: str, image: str = "") -> None:
        self.zygote = zygote
        self.zygote_pid = zygote_pid
        self.unix = unix
        self.root = root  # "" in a VM
        self.in_vm = not root
        self.image = image  # where it is mounted, if agents see an image's files
        self.image_env: dict[str, str] = {}
        self.interpreter: Header = {}  # the image's own, if it is to wait for the next agent
        self.useless: Header = {}  # one that did not
        self.own_space = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) if image else -1
        self.image_space = -1  # the mount namespace of agents, if it is another
        self.hurried = False  # the next agent's process is forked while a host waits: it may be in no template
        self.users = dict(USERS)
        self.groups: list[int] = []  # of user agent, besides its own
        self.token = key_of(word) if self.in_vm and (word := boot_token()) else None
        self.generation: str | None = None
        self.preload_failed: object = {}
        self.next: AgentLinks | None = None  # to the process that waits to become the next agent
        self.connections = 0
        self.parked = 0  # threads waiting for a connection
        self.parking = _thread.allocate_lock()
        self.boot_id = read_file("/proc/sys/kernel/random/boot_id")
        self.machine_id = read_file("/etc/machine-id")
        self.ooms = oom_kills()
        self.python, self.kernel = sys.version.split()[0], os.uname().release
        self.crng = self.placed = self.mounted = self.disk_still = False
        self.busy = _thread.allocate_lock()  # held while an agent runs, or the next one's process is forked
        self.has_sshd = os.path.exists(SSHD)
        self.ssh_files: tuple[tuple[str, str], ...] = ()  # (path, contents) for sshd, not yet written
        self.ssh: socket.socket | None = None
        self.sessions: dict[int, int] = {}  # pidfd -> pid of each sshd
        self.keep_sshd = False  # have an sshd started before its connection arrives
        self.waiting_sshd: tuple[int, socket.socket] | None = None  # its pidfd, and our end of its socket
        self.address = ""
        self.programs: dict[str, Program] = {}  # those of `exec`, in the order of their starts
        self.programs_lock = _thread.allocate_lock()
        self.serial = 0  # of the latest
        self.cgroups: bool | None = None  # whether each program has a control group of its own; not known before one
        self.spare: Spare | None = None
        self.leaving: list[Program] = []  # they have ended, but not all that they started
        self.open: set[Connection] = set()
        self.frozen_at: float | None = None
        self.frozen_seconds = 0.0  # how long programs were frozen, all in all
        self.stopped: list[int] = []  # frozen by SIGSTOP

    # -- serving

    def serve(self, host: str, port: int) -> None:
        """Listen and answer until SIGTERM or `poweroff`."""
        if self.unix:
            os.makedirs(f"{self.root}/work/out", exist_ok=True)  # as on a VM's work disk
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.unix)
            os.chmod(self.unix, 0o600)
        else:
            listener = self.listen_tcp(host, port)
            self.address = host
        listener.listen(128)  # beyond this Linux uses SYN cookies, which are expensive in a slow guest
        ready = self.zygote.recv(1 << 18)
        self.preload_failed = json.loads(ready)["failed"] if ready else {"zygote": "died"}
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # and so in all threads: it waits for sigwait
        log(f"listening on {self.unix or f'{host}:{port}'}")
        # Two threads wait before any template is taken, so that a clone's first connection starts none.
        for _ in range(2):
            self.park(listener)
        signal.sigwait({signal.SIGTERM})
        if self.unix:
            os.unlink(self.unix)
        self.zygote.shutdown(socket.SHUT_RDWR)  # it then kills the agent and exits
        os.waitpid(self.zygote_pid, 0)

    def listen_tcp(self, host: str, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)  # the address may not exist yet
        # Accepted connections inherit these.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        listener.bind((host, port))
        return listener

    def park(self, listener: socket.socket) -> None:
        """Start another thread that waits for connections and serves them one after the other."""
        self.parked += 1
        try:
            _thread.start_new_thread(self.attend, (listener,))
        except RuntimeError as error:
            self.parked -= 1
            log(f"can't start a thread: {error}")

    def attend(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, peer = listener.accept()
            except OSError as error:  # out of descriptors, or the peer is gone already
                log(f"accept: {error}")
                select.select([], [], [], 0.1)
                continue
            # A connection from inside the guest comes from an agent, not the host.
            inside = not self.unix and (peer[0] == self.address or peer[0].startswith("127."))
            if inside or self.connections >= MAX_CONNECTIONS:
                sock.close()
                continue
            with self.parking:
                self.connections += 1
                self.parked -= 1
                if not self.parked:
                    self.park(listener)
            self.converse(sock)
            with self.parking:
                self.connections -= 1
                self.parked += 1

    def converse(self, sock: socket.socket) -> None:
        """Answer one connection's requests, in order, until it closes or breaks the protocol."""
        connection = Connection(sock)
        self.open.add(connection)
        try:
            while (request := connection.receive(first=not connection.authorised)) is not None:
                self.answer(connection, *request)
        except Broken as error:
            log(f"connection dropped: {error}")
        except BaseException as error:
            log(f"connection ended by {type(error).__name__}: {error}")
        finally:
            self.open.discard(connection)
            sock.close()

    def answer(self, connection: Connection, head: Header, payload: bytes) -> None:
        op = text(head, "op")
        # The rest of a put that failed, or what was under way when a conversation ended.
        if op in ("data", "stdin", "resize") or (op == "signal" and "process" not in head):
            return
        if not connection.authorised and op != "hello":
            raise Broken(f"{op!r:.40} before hello")
        try:
            if head.get("after") in connection.failed:
                raise Skipped(f"{op}: the request before it failed")
            handler = self.OPS.get(op)
            if handler is None:
                raise Refused(f"no such operation: {op!r:.40}")
            reply = handler(self, connection, head, payload)
        except Broken:
            raise
        except Exception as error:
            if len(connection.failed) < 1024:
                connection.failed.add(head["id"])
            said = {"type": type(error).__name__, "message": str(error)[:2000]}
            connection.send({"id": head["id"], "error": said})
            if not connection.authorised:
                raise Broken("not authorised") from None
        else:
            connection.send({"id": head["id"], "ok": True, **reply})
        if op == "exec":  # now, since nobody waits
            self.make_spare()

    # -- operations

    def hello(self, connection: Connection, head: Header, _: bytes) -> Header:
        """Comes first on every connection. Both sides prove that they know the token. A VM got its first one at boot;
        over a Unix socket, which only its maker can open, the first hello brings it."""
        if self.token is None:
            if not self.unix:
                raise Refused("this guest was given no token at boot")
            self.token = key_of(text(head, "token"))
        nonce, shown = text(head, "nonce"), text(head, "proof")
        if not 32 <= len(nonce) <= 128:
            raise Refused("a nonce has 32 to 128 characters")
        if not _compare_digest(shown.encode(), proof(self.token, "host", nonce).encode()):
            raise Refused("wrong token")
        connection.authorised = True
        return {
            "protocol": PROTOCOL,
            "proof": proof(self.token, "guest", nonce),
            "mode": "vm" if self.in_vm else "process",
            **self.identity(),
            "python": self.python,
            "kernel": self.kernel,
            "preload_failed": self.preload_failed,
            "uptime_ms": time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000,
        }

    def identity(self) -> Header:
        self.crng = self.crng or crng_ready()
        return {
            "boot_id": self.boot_id,
            "generation": self.generation,
            "crng_ready": self.crng,
            "sshd": self.ssh is not None,
            "hostname": socket.gethostname(),
            "machine_id": self.machine_id,
            "clock_ns": time.time_ns(),
        }

    def renew(self, connection: Connection, head: Header, payload: bytes) -> Header:
        """Take a new identity: replace everything that a clone shares with its siblings before an agent runs.

        Other connections end, if this is a clone or a VM that was paused: their host ends are gone. Programs go on."""
        generation, token = text(head, "generation"), key_of(text(head, "token"))
        if self.frozen_at is not None or generation != self.generation:
            with self.programs_lock:
                for program in self.programs.values():
                    program.background = True
            for other in self.open - {connection}:
                other.shut()
        done: list[str] = []
        if self.in_vm:
            self.renew_vm(head, done)
        else:
            for name in ("work", "agent"):
                os.makedirs(f"{self.root}/{name}", exist_ok=True)
        # Agents' processes renew their own random state first; the zygote uses none.
        RUN["reseed"]()
        # A fork or a VM that is resumed seldom runs an agent: it is not forked ahead, for 0.13 s on an emulated CPU.
        if self.in_vm and self.frozen_at is None:
            self.fork_next()
        done.append("interpreter")
        self.generation, self.token = generation, token
        everything = ("seed", "clock", "machine_id", "hostname", "work", "ssh", "interpreter")
        return {**self.identity(), "done": done, "skipped": [name for name in everything if name not in done]}

    def renew_vm(self, head: Header, done: list[str]) -> None:
        if self.image and head.get("image") is not None:
            self.take_image(head["image"])
        seed = bytes.fromhex(text(head, "seed"))
        hostname = text(head, "hostname")
        if seed:
            pool = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
            fcntl.ioctl(pool, RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
            fcntl.ioctl(pool, RNDRESEEDCRNG)
            os.close(pool)
            done.append("seed")
        time.clock_settime_ns(time.CLOCK_REALTIME, int(number(head, "wall_ns")))
        done.append("clock")
        self.machine_id = text(head, "machine_id")
        write_file("/etc/machine-id", self.machine_id + "\n", 0o444)
        done.append("machine_id")
        socket.sethostname(hostname)
        write_file("/etc/hostname", hostname + "\n")
        write_file("/etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {hostname}\n")
        done.append("hostname")
        if not self.placed:
            for path in ("/agent", "/work"):
                try:
                    os.mkdir(path)
                except FileExistsError:
                    pass
            os.chown("/work", *self.users["agent"][:2])
            self.placed = True
        if head.get("work_disk"):
            if not self.mounted:
                flags = ctypes.c_ulong(MS_NODEV | MS_NOSUID | MS_NOATIME)
                libc("mount", b"/dev/vdb", DISK.encode() if self.image else b"/work", b"ext4", flags, None)
                if self.image:
                    self.enter_image()
                os.chown("/work", *self.users["agent"][:2])
                self.mounted = True
            done.append("work")
        if text(head, "ssh_host_key") and self.has_sshd:
            self.renew_ssh(head)
            done.append("ssh")

    def take_image(self, said: object) -> None:
        """Learn as whom, and with which environment, the image's programs run: user agent is its user."""
        assert isinstance(said, dict)
        uid, gid, groups, home = said["user"]
        self.users["agent"] = (uid, gid, home)
        self.groups = [int(group) for group in groups]
        self.image_env = {str(name): str(value) for name, value in said["env"].items()}
        self.interpreter = said.get("interpreter") or {}
        if self.interpreter == self.useless:
            self.interpreter = {}

    def enter_image(self) -> None:
        """Have the zygote change its root, now that there is a disk to write to. /work is a directory on that."""
        for name in ("work", "upper", "scratch"):
            os.mkdir(f"{DISK}/{name}")
        os.rename(f"{DISK}/out", f"{DISK}/work/out")
        os.chown(f"{DISK}/work/out", *self.users["agent"][:2])
        libc("mount", f"{DISK}/work".encode(), b"/work", None, ctypes.c_ulong(MS_BIND), None)
        if self.cgroups is None:  # now, since what is mounted later can't be seen from there
            self.cgroups = self.mount_cgroups()
        theirs: list[int] = []
        report = Program.pipe(theirs)
        try:
            os.set_blocking(report, True)
            self.order({"op": "enter", "image": self.image}, (theirs[0],))
            os.close(theirs.pop())
            said = json.loads(os.read(report, MAX_HEADER) or b'{"cannot": "the zygote died"}')
        finally:
            for fd in (report, *theirs):
                os.close(fd)
        if "cannot" in said:
            raise RuntimeError(f"can't enter the image: {said['cannot']}")
        forbid_imports()  # threads of this process go there too
        self.hurried = True
        self.image_space = os.open(f"/proc/{self.zygote_pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        if self.next:  # it was forked before, with the other root
            self.next.close()
            self.next = None

    def renew_ssh(self, head: Header) -> None:
        """A template holds no sshd: keys are written when the first one starts, and read by the `sshd -i` of each
        connection. With ``sshd_ready`` one is started ahead: on an emulated CPU its start takes longer than clients
        wait."""
        self.ssh_files = (
            (HOST_KEY, text(head, "ssh_host_key")),
            ("/root/.ssh/authorized_keys", text(head, "authorized_keys")),
        )
        old, self.waiting_sshd = self.waiting_sshd, None
        if old:
            old[1].close()  # it has read the keys of the previous identity
        self.keep_sshd = bool(head.get("sshd_ready"))
        if self.keep_sshd:
            self.start_sshd_ahead()
        if self.ssh is None:
            listener = self.listen_tcp(self.address, 22)
            listener.listen(MAX_SSH)
            self.ssh = listener
            _thread.start_new_thread(self.serve_ssh, (listener,))

    def serve_ssh(self, listener: socket.socket) -> None:
        """Port 22: one `sshd -i` per connection, at most MAX_SSH. Further connections wait in the backlog."""
        sessions = self.sessions
        while True:
            if self.keep_sshd and self.waiting_sshd is None and len(sessions) < MAX_SSH:
                try:
                    self.start_sshd_ahead()
                except OSError as error:  # don't start more ahead; each connection still starts its own
                    log(f"ssh: {error}")
                    self.keep_sshd = False
            accepting = len(sessions) < MAX_SSH and self.frozen_at is None
            waiting = [*sessions, *([listener.fileno()] if accepting else [])]
            poller = select.poll()
            for fd in waiting:
                poller.register(fd, select.POLLIN)
            for fd, _ in poller.poll(None if self.frozen_at is None else 100):
                try:
                    if fd not in sessions and self.frozen_at is not None:
                        continue
                    if fd in sessions:
                        os.waitpid(sessions.pop(fd), 0)
                        os.close(fd)
                        if self.waiting_sshd and self.waiting_sshd[0] == fd:
                            self.waiting_sshd, self.keep_sshd = None, False  # not again: the next would end too
                        continue
                    sock, _ = listener.accept()
                    if self.waiting_sshd:
                        (_, ours), self.waiting_sshd = self.waiting_sshd, None
                        for pair in ((sock, ours), (ours, sock)):
                            _thread.start_new_thread(relay, pair)
                        continue
                    with sock:
                        pid = self.spawn_sshd(sock.fileno())
                    sessions[os.pidfd_open(pid)] = pid
                except Exception as error:
                    log(f"ssh: {type(error).__name__}: {error}")

    def start_sshd_ahead(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self.spawn_sshd(theirs.fileno(), "-o", "LoginGraceTime=0")  # else it would run while it waits
        pidfd = os.pidfd_open(pid)
        self.sessions[pidfd] = pid
        self.waiting_sshd = pidfd, ours

    def sshd_ready(self, _: Connection, head: Header, __: bytes) -> Header:
        """Whether the sshd that was started ahead has sent its greeting. Waits for up to ``seconds``."""
        waiting = self.waiting_sshd
        if waiting is None:
            return {"ready": not self.keep_sshd and self.ssh is not None}
        poller = select.poll()
        poller.register(waiting[1], select.POLLIN)
        return {"ready": bool(poller.poll(min(number(head, "seconds"), IO_SECONDS / 2) * 1000))}

    def spawn_sshd(self, fd: int, *options: str) -> int:
        files, self.ssh_files = self.ssh_files, ()
        for path, mode in (("/root/.ssh", 0o700), ("/run/sshd", 0o755)) if files else ():
            os.makedirs(path, exist_ok=True)
            os.chmod(path, mode)  # the second: sshd's privilege separation directory
        for path, data in files:
            write_file(path, data, 0o600)
        stdio = [(os.POSIX_SPAWN_DUP2, fd, 0), (os.POSIX_SPAWN_DUP2, fd, 1)]
        env = {**PASSED_ENV, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        argv = [SSHD, "-i", "-e", "-h", HOST_KEY, *options]
        defaults = [signal.SIGPIPE, signal.SIGXFSZ]
        pid = os.posix_spawn(SSHD, argv, env, file_actions=stdio, setsid=True, setsigmask=[], setsigdef=defaults)
        set_oom_score(pid, 0)  # agentd's own is -1000
        os.setpriority(os.PRIO_PROCESS, pid, 0)
        return pid

    def put(self, connection: Connection, head: Header, payload: bytes) -> Header:
        """Write files below ``dest``: ``files`` is [[relative path, size, mode], …]; a path that ends in '/' is a
        directory, and what has a link's mode (S_IFLNK) has its target as contents. The contents are concatenated in the
        payload and the `data` frames after it."""
        dest, files, owner = text(head, "dest"), head.get("files"), self.owner(head)
        if not isinstance(files, list) or sum(size for _, size, _ in files) > MAX_PUT:
            raise Refused(f"files must be a list of at most {MAX_PUT >> 20} MiB in all")
        left = memoryview(payload)  # a slice of bytes would be a copy: of a MiB, for each small file
        parent, opened = -1, ""  # of the last file: the next is most often beside it
        try:
            for path, size, mode in files:
                folder, _, name = path.rstrip("/").rpartition("/")
                if parent < 0 or folder != opened or name in ("", ".", "..") or "\0" in name:
                    if parent >= 0:
                        os.close(parent)
                        parent = -1
                    parent, name = open_parent(self.root, f"{dest}/{path}", owner, create=True)
                    opened = folder
                if path.endswith("/"):
                    make_dir(parent, name, owner)
                    continue
                if stat.S_ISLNK(mode):
                    target = b""
                    while len(target) < size:
                        left = left or memoryview(self.more(connection, head))
                        target, left = target + bytes(left[: size - len(target)]), left[size - len(target) :]
                    make_link(parent, name, target, owner)
                    continue
                fd = create(parent, name)
                try:
                    while size > 0:
                        left = left or memoryview(self.more(connection, head))
                        written = os.write(fd, left[:size])
                        left, size = left[written:], size - written
                    os.fchmod(fd, mode & 0o777)
                    if owner and owner != (0, 0):  # new files belong to root already
                        os.fchown(fd, *owner)
                finally:
                    os.close(fd)
        finally:
            if parent >= 0:
                os.close(parent)
        if left:
            raise Broken("more data than the files hold")
        return {"files": len(files)}

    def more(self, connection: Connection, head: Header) -> bytes:
        received = connection.receive()
        if received is None or received[0]["op"] != "data" or received[0]["id"] != head["id"] or not received[1]:
            raise Broken("a request without its data")
        return received[1]

    def owner(self, head: Header) -> tuple[int, int] | None:
        """Who will own the files; None on the host, where owners don't change."""
        name = text(head, "owner")
        if name not in self.users:
            raise Refused(f"no such user: {name!r:.40}")
        return self.users[name][:2] if self.in_vm else None

    def get(self, connection: Connection, head: Header, _: bytes) -> Header:
        """Send a regular file of at most ``limit`` bytes. ``found`` is false if it doesn't exist."""
        path, limit = text(head, "path"), int(number(head, "limit"))
        try:
            parent, name = open_parent(self.root, path)
        except (FileNotFoundError, NotADirectoryError):
            return {"found": False}
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=parent)
        except FileNotFoundError:
            return {"found": False}
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise NotRegular(f"{path} is a link, a socket or a pipe") from None
            raise
        finally:
            os.close(parent)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            os.close(fd)
            raise NotRegular(f"{path} is not a regular file with one name")
        with open(fd, "rb", buffering=0) as file:
            if status.st_size > limit:
                return {"found": True, "size": status.st_size, "too_large": True}
            sent = 0
            while sent < limit and (data := file.read(min(MAX_PAYLOAD, limit - sent))):
                connection.send({"id": head["id"], "stream": "data"}, data)
                sent += len(data)
        return {"found": True, "size": sent, "too_large": False}

    def tree(self, connection: Connection, head: Header, _: bytes) -> Header:
        """Send what is below a directory, as a stream of entries (`Sender`): files of at most ``limit`` bytes together,
        ``entries`` of them, whose names have ``names`` bytes."""
        path = text(head, "path")
        limit, entries, names = (int(number(head, name)) for name in ("limit", "entries", "names"))
        sender = Sender(connection, head["id"], limit, entries, names, self.in_vm)
        try:
            sender.send_all(path, self.root)
        except (FileNotFoundError, NotADirectoryError):
            return {"found": False, "complete": True}
        sender.flush(0)
        return {"found": True, "complete": sender.complete}

    def has_out(self) -> bool:
        """Did the agent leave anything in /work/out?"""
        try:
            fd = os.open(self.inside("/work/out"), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            with os.scandir(fd) as found:
                return next(found, None) is not None
        finally:
            os.close(fd)

    def run(self, connection: Connection, head: Header, payload: bytes) -> Header:
        self.check_thawed()
        if not self.busy.acquire(blocking=False):
            raise Refused("an agent is already running here")
        try:
            return Run(self, connection, head).run(payload)
        finally:
            self.busy.release()

    def start_program(self, connection: Connection, head: Header, payload: bytes) -> Header:
        """Run a program, any number at once. The host sends `stdin`, `resize` and `signal` while it runs."""
        if "packed" in head:  # an argv and env that no header holds come before its input
            sizes = head["packed"]
            assert isinstance(sizes, list)
            size, total = sizes
            while len(payload) < total:
                payload += self.more(connection, head)
            head, payload = {**head, **json.loads(payload[:size])}, payload[size:]
        program = Program(self, head)
        with self.programs_lock:
            self.check_thawed()
            if program.name in self.programs:
                raise Refused(f"there is a process {program.name} already")
            if sum(not other.finished for other in self.programs.values()) >= MAX_PROGRAMS:
                raise Refused(f"{MAX_PROGRAMS} processes are running already")
            program.start(payload)  # not after a freeze that begins now
            self.programs[program.name] = program
        talk = program.owner = Listener(connection, head["id"])
        program.join(talk)
        if program.background:
            _thread.start_new_thread(program.follow, ())
            talk.parted.acquire()
        else:
            program.follow()
        return self.told_end(program, talk)

    def next_group(self) -> tuple[str, str]:
        """The key of the next program, and its control group."""
        self.serial += 1
        return str(self.serial), self.make_group(str(self.serial))

    def take_spare(self) -> Spare | None:
        """The process that waits to become the next program. Before the first, that of the next agent does as well."""
        spare, self.spare = self.spare, None
        if spare is None and self.next is not None and not self.next.python and self.busy.acquire(blocking=False):
            try:
                links, self.next = self.next, None
                spare = Spare(self, links) if links else None
            finally:
                self.busy.release()
        return spare

    def make_spare(self) -> None:
        """Have the next program's process forked ahead: its fork is most of what a small program costs."""
        with self.programs_lock:
            if self.spare is not None or self.frozen_at is not None:
                return
            try:
                self.spare = Spare(self)
            except (OSError, RuntimeError) as error:
                log(f"no process was forked ahead: {error}")

    def attach(self, connection: Connection, head: Header, _: bytes) -> Header:
        """Hear a program's latest output, and then what it writes from now on. ``after``: only what follows that many
        bytes of all its output."""
        program = self.program(head)
        talk = Listener(connection, head["id"])
        talk.after = 0 if head.get("after") is None else int(number(head, "after"))
        if program.join(talk):
            talk.parted.acquire()
        else:
            program.replay(talk)
        return self.told_end(program, talk)

    def told_end(self, program: Program, talk: Listener) -> Header:
        unsent, sock = bytes(talk.unsent), talk.sock
        if talk.gone:
            raise Broken(f"the host left the process {program.name}")
        if unsent:
            sock.settimeout(IO_SECONDS)
            sock.sendall(unsent)
        if program.cannot is not None:
            raise CannotStart(program.cannot)
        assert program.end is not None
        return {**program.end, "dropped_bytes": talk.dropped}

    def program(self, head: Header) -> Program:
        program = self.programs.get(text(head, "process"))
        if program is None:
            raise Refused(f"no such process: {head['process']!r:.80}")
        return program

    def processes(self, connection: Connection, head: Header, _: bytes) -> Header:
        """Send a line of JSON for each program that runs, and for the last of those that have ended."""
        with self.programs_lock:
            lines = [json.dumps(program.described()) for program in self.programs.values()]
        for at in range(0, len(lines), 16):
            part = "".join(f"{line}\n" for line in lines[at : at + 16])
            connection.send({"id": head["id"], "stream": "data"}, part.encode())
        return {"now_ns": time.monotonic_ns()}

    def signal(self, _: Connection, head: Header, __: bytes) -> Header:
        program = self.program(head)
        if not program.signal(head):
            raise Refused(f"the process {program.name} has ended")
        return {}

    def make_group(self, name: str) -> str:
        """A control group for a program, or "" if this guest has none: then programs are found by what is in /proc."""
        if self.cgroups is None:
            self.cgroups = self.in_vm and self.mount_cgroups()
        self.leaving = [program for program in self.leaving if not program.remove_group()]
        if not self.cgroups:
            return ""
        group = f"{CGROUPS}/swarm/{name}"
        try:
            os.mkdir(group)
        except OSError as error:  # a program of root's has meddled with them
            log(f"no control group: {error}")
            return ""
        return group

    def mount_cgroups(self) -> bool:
        try:
            if not os.path.exists(f"{CGROUPS}/cgroup.procs"):
                flags = ctypes.c_ulong(MS_NODEV | MS_NOSUID | MS_NOEXEC)
                libc("mount", b"cgroup2", CGROUPS.encode(), b"cgroup2", flags, None)
            os.mkdir(f"{CGROUPS}/swarm")
            return os.path.exists(f"{CGROUPS}/swarm/cgroup.kill")
        except OSError as error:
            log(f"no control groups: {error}")
            return False

    def forget(self, program: Program) -> None:
        with self.programs_lock:
            self.programs.pop(program.name, None)

    def keep_few(self) -> None:
        """Forget the oldest of the programs that have ended, and then their output."""
        with self.programs_lock:
            ended = [program for program in self.programs.values() if program.finished]
        for program in ended[: -MAX_ENDED or None]:
            self.forget(program)
        room = ENDED_SCROLLBACK
        for program in reversed(ended):
            room -= program.kept
            if room < 0:
                program.log.clear()
                program.kept = 0

    def check_thawed(self) -> None:
        if self.frozen_at is not None:
            raise Refused("the guest is frozen: thaw it first")

    def is_frozen(self) -> bool:
        return self.frozen_at is not None

    def frozen_until(self, now: float) -> float:
        """For how many seconds programs were frozen until now."""
        since = self.frozen_at
        return self.frozen_seconds + (now - since if since is not None else 0.0)

    def freeze(self, _: Connection, head: Header, __: bytes) -> Header:
        """Stop all programs of the guest until `thaw`; a clone, or a VM that is resumed, runs none before `renew`.
        ``disk``: the kernel writes nothing to the work disk either; whether that is so is answered."""
        disk = head.get("disk") is True
        if disk:
            self.on_disk(lambda work: libc("syncfs", work))  # most of it while programs run
        with self.programs_lock:
            if self.frozen_at is not None:
                return {"disk_still": self.disk_still}
            self.make_group_of_rest()
            self.frozen_at = time.monotonic()
        try:
            self.freeze_all(self.frozen_at + FREEZE_SECONDS)
            self.disk_still = disk and self.on_disk(lambda work: fcntl.ioctl(work, FIFREEZE, 0))
            if not self.is_frozen():  # the host has given up, and thawed it
                self.thaw_all()
        except BaseException:
            self.thaw_all()
            raise
        return {"disk_still": self.disk_still}

    def on_disk(self, act: Callable[[int], object]) -> bool:
        """False if there is no work disk, or if a program of root's stands in the way."""
        if not self.mounted:
            return False
        try:
            work = os.open("/work", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                act(work)
            finally:
                os.close(work)
        except OSError as error:
            log(f"the work disk: {error}")
            return False
        return True

    def make_group_of_rest(self) -> None:
        if self.cgroups is None:
            self.cgroups = self.in_vm and self.mount_cgroups()
        if self.cgroups and not os.path.exists(f"{CGROUPS}/swarm/rest"):
            os.mkdir(f"{CGROUPS}/swarm/rest")

    def freeze_all(self, deadline: float) -> None:
        late = Refused(f"the guest's programs did not stop within {FREEZE_SECONDS:g} s")
        if not self.cgroups:
            while stopped := self.stop_by_signal(deadline):
                self.stopped += stopped
                if time.monotonic() > deadline:
                    raise late
            return
        spared = {1, os.getpid(), self.zygote_pid, self.waiting_pid()}
        while True:
            groups = control_groups()
            for group in groups:
                set_frozen(group, True)
            # What is started while this runs has its parent's group: only programs of others (sshd's, an agent's) have
            # none yet, and those that they start while it is moved.
            strays = [pid for pid in user_processes() if pid not in spared and not in_group(pid)]
            for pid in strays:
                try:
                    poke(f"{CGROUPS}/swarm/rest/cgroup.procs", str(pid))
                except ProcessLookupError:
                    pass
            for group in groups:
                if not wait_for_event(group, b"frozen 1", deadline):
                    raise late
            if time.monotonic() > deadline:
                raise late
            if not strays and control_groups() == groups:
                return

    def waiting_pid(self) -> int:
        """Of the next agent's process: nobody's program yet."""
        return self.next.pid if self.next else 0

    def stop_by_signal(self, deadline: float) -> list[int]:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with open(reader, "rb", buffering=0) as file:
            try:
                spared = self.next.inner_pid if self.next else 0
                self.order({"op": "stop", "spared": spared}, (writer,))
            finally:
                os.close(writer)
            poller = select.poll()
            poller.register(reader, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise Refused("the guest's programs were not stopped in time")
            found = json.loads(file.read(1 << 16) or b"[]")
            assert isinstance(found, list)
            return found

    def thaw(self, _: Connection, head: Header, __: bytes) -> Header:
        """Let them go on. ``wall_ns``: the time now, since a VM's clock stands still with it."""
        if self.in_vm and head.get("wall_ns") is not None:
            time.clock_settime_ns(time.CLOCK_REALTIME, int(number(head, "wall_ns")))
        if self.frozen_at is not None:
            self.thaw_all()
        return {}

    def thaw_all(self) -> None:
        with self.programs_lock:
            since, self.frozen_at = self.frozen_at, None
            self.frozen_seconds += time.monotonic() - since if since is not None else 0.0
        if self.disk_still:
            self.disk_still = not self.on_disk(lambda work: fcntl.ioctl(work, FITHAW, 0))
        if self.cgroups:
            for group in control_groups():
                set_frozen(group, False)
        elif self.stopped:
            self.order({"op": "continue", "pids": self.stopped})
            self.stopped = []

    def kill(self, _: Connection, __: Header, ___: bytes) -> Header:
        running = self.busy.locked()
        if running:
            self.order({"op": "kill"})
        return {"killed": running}

    def poweroff(self, _: Connection, __: Header, ___: bytes) -> Header:
        """End agentd; in a VM, init then powers off."""
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    OPS = {
        "hello": hello,
        "renew": renew,
        "sshd_ready": sshd_ready,
        "put": put,
        "get": get,
        "tree": tree,
        "run": run,
        "exec": start_program,
        "attach": attach,
        "processes": processes,
        "signal": signal,
        "freeze": freeze,
        "thaw": thaw,
        "kill": kill,
        "poweroff": poweroff,
        **FILE_OPS,
    }  # fmt: skip

    def order(self, order: Header, fds: tuple[int, ...] = ()) -> None:
        try:
            socket.send_fds(self.zygote, [json.dumps(order).encode()], fds)
        except OSError as error:
            raise RuntimeError(f"the zygote is dead: {error}") from None

    def fork_next(self) -> None:
        """Have the next agent's process forked ahead, unless one is waiting already (as in a template's clones)."""
        if self.next is not None or not self.busy.acquire(blocking=False):
            return
        try:
            hurried, self.hurried = self.hurried, False
            if self.interpreter and self.image_space >= 0 and not hurried:
                self.next = self.start_interpreter(**self.interpreter)  # type: ignore[arg-type]
            self.next = self.next or self.fork_waiting(AgentLinks(), touch=not hurried)
            if not hurried:  # or the collector goes through all of it in a clone, now and then: 35 ms, 7 MB
                gc.collect()
                gc.freeze()
        finally:
            self.busy.release()

    def fork_waiting(self, links: AgentLinks, **more: object) -> AgentLinks:
        """Have the zygote fork a process that waits for an order."""
        try:
            links.env = self.environment("agent")
            order: Header = {"op": "park", "user": self.rights("agent"), "env": links.env, **more}
            if self.image:  # it knows only the number that it has in its own namespace
                links.report.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            links.hand_over(self, order)
            links.report.settimeout(IO_SECONDS)
            data, sender, _, _ = links.report.recvmsg(4096, socket.CMSG_SPACE(UCRED.size))
            said = json.loads(data or b"{}")
            if not said.get("ready"):
                raise RuntimeError(f"the next agent's process was not made: {said.get('cannot') or 'it died'}")
            links.report.settimeout(None)
            links.cpu_us, links.inner_pid = said["cpu_us"], said["pid"]
            links.pid = UCRED.unpack(sender[0][2])[0] if sender else links.inner_pid
        except BaseException:
            links.close()
            raise
        return links

    def start_interpreter(
        self, python: str, common: list[str], preload: list[str], seconds: float
    ) -> AgentLinks | None:
        """As the next agent's process, the image's own Python with these modules, started as the agent would start it.
        None if it is not ready in time. Of what it says, only which of ``preload`` can't be imported is passed on."""
        links = self.fork_waiting(AgentLinks(python), python=python)
        try:
            links.orders.settimeout(seconds)
            links.orders.send(f"{INTERPRETER_TEXT}\nwait(4, {common!a}, {preload!a})".encode())
            first, *lines = links.orders.recv(MAX_HEADER).decode(errors="replace").split("\n")
            if first != "ready":
                raise OSError("it ended, or said something else")
            clock = ~links.pid << 3 | 2  # of that process's CPU time: linux/posix-timers.h
            links.cpu_us = time.clock_gettime_ns(clock) // 1000
            said = dict(line.partition(": ")[::2] for line in lines)
            self.preload_failed = {name: said[name][:200] for name in preload[:100] if name in said}
            links.orders.setblocking(False)
            return links
        except OSError as error:
            log(f"{python} does not wait for agents, they start it: {error}")
            if preload:
                self.preload_failed = {python: f"it had not imported them in {seconds:g} s: {error}"}
            links.close()
            self.useless, self.interpreter = self.interpreter, {}
            return None

    def make_order(self, head: Header) -> tuple[str, Header]:
        """The user, and the zygote's order for a program."""
        argv, env, user = head.get("argv"), head.get("env"), text(head, "user")
        if not isinstance(argv, list) or not argv or not all(isinstance(a, str) and "\0" not in a for a in argv):
            raise Refused("argv must be a list of texts without NUL")
        if not isinstance(env, dict) or not all(isinstance(v, str) and "\0" not in k + v for k, v in env.items()):
            raise Refused("env must map texts to texts, without NUL")
        if user not in self.users:
            raise Refused(f"no such user: {user!r:.40}")
        home = "/work" if user == "agent" or not self.in_vm else "/" if self.image else self.users[user][2]
        cwd = home if head.get("cwd") is None else os.path.join(home, text(head, "cwd"))
        return user, {
            "argv": [self.inside(argv[0]), *argv[1:]],
            "env": env,  # plus the user's environment, unless the process has it already
            "cwd": self.inside(cwd),
            "user": self.rights(user) if self.in_vm else None,
        }

    def rights(self, user: str) -> list[int]:
        """Its uid, gid, and further groups."""
        return [*self.users[user][:2], *(self.groups if user == "agent" else ())]

    def environment(self, user: str) -> dict[str, str]:
        if self.image:
            return {
                **PASSED_ENV,
                "PATH": IMAGE_PATH,
                "HOME": self.users[user][2],
                "LANG": "C.UTF-8",
                "SWARM_WORK": "/work",
                "SWARM_AGENT": "/agent",
                "PYTHONFAULTHANDLER": "1",
                **self.image_env,
            }
        sbin = "/usr/local/sbin:/usr/sbin:/sbin:" if user == "root" else ""
        return {
            **PASSED_ENV,
            "PATH": f"{sbin}/usr/local/bin:/usr/bin:/bin",
            "HOME": self.inside(self.users[user][2]),
            "USER": user,
            "LOGNAME": user,
            "LANG": "C.UTF-8",
            "PYTHONFAULTHANDLER": "1",  # as in warm agents
            "SWARM_WORK": self.inside("/work"),
            "SWARM_AGENT": self.inside("/agent"),
        }

    def more_ooms(self) -> bool:
        """Whether the OOM killer has killed since the last call: by the kernel's count, not a guess from SIGKILL."""
        before, self.ooms = self.ooms, oom_kills()
        return self.ooms > before

    def inside(self, path: str) -> str:
        """The real path of the guest's /work and /agent, which may be below ``root``."""
        return self.root + path if self.root and path.startswith(("/work", "/agent")) else path


class Sender:
    """Sends a directory tree. Each entry is its header (>IIQ: length of its name, mode, size), its name, its contents;
    of a link, the target. A mode without a type stands for what was left out. Empty directories are entries too."""

    def __init__(
        self, connection: Connection, request_id: object, limit: int, entries: int, names: int, shared: bool
    ) -> None:
        self.connection = connection
        self.id = request_id
        self.bytes, self.entries, self.names = limit, entries, names  # what is left of each
        self.shared = shared  # may files have several names?
        self.complete = True
        self.unsent = bytearray()

    def send_all(self, top: str, root: str) -> None:
        left = [""]
        while left:
            below = left.pop()
            if not self.entries or len(os.fsencode(below)) > 3800:
                self.complete = False
                continue
            self.entries -= 1
            parent, name = open_parent(root, f"{top}/{below}")
            try:
                here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            finally:
                os.close(parent)
            try:
                children = self.children(here)
                if not children and below:
                    self.add(f"{below}/", os.fstat(here).st_mode, 0)
                prefix = f"{below}/" if below else ""
                dirs = [f"{prefix}{child}" for child in children if self.send(here, child, f"{prefix}{child}")]
            finally:
                os.close(here)
            left += reversed(dirs)

    def children(self, here: int) -> list[str]:
        found: list[str] = []
        with os.scandir(here) as entries:
            for entry in entries:
                if len(found) > self.entries:  # a hostile directory may have millions
                    self.complete = False
                    break
                found.append(entry.name)
        return sorted(found)

    def send(self, here: int, name: str, path: str) -> bool:
        """True for a directory, which is yet to be sent."""
        status = os.lstat(name, dir_fd=here)
        if stat.S_ISDIR(status.st_mode):
            return True
        size = status.st_size
        if stat.S_ISLNK(status.st_mode):
            target = os.readlink(os.fsencode(name), dir_fd=here)
            if self.add(path, status.st_mode, len(target)):
                self.write(target)
            return False
        regular = stat.S_ISREG(status.st_mode) and (self.shared or status.st_nlink == 1)
        if not regular or size > self.bytes:
            self.add(path, 0, size)
        elif self.add(path, status.st_mode, size):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
            with open(fd, "rb", buffering=0) as file:
                while size and (data := file.read(min(MAX_PAYLOAD, size))):
                    self.write(data)
                    size -= len(data)
            if size:
                raise RuntimeError(f"{path:.200} shrank while it was read")
        return False

    def add(self, path: str, mode: int, size: int) -> bool:
        name = os.fsencode(path)
        if not self.entries or len(name) > min(self.names, MAX_NAME):
            self.complete = False
            return False
        self.entries, self.names = self.entries - 1, self.names - len(name)
        self.bytes -= size if mode else 0
        self.write(struct.pack(">IIQ", len(name), mode, size) + name)
        return True

    def write(self, data: bytes) -> None:
        self.unsent += data
        self.flush(MAX_PAYLOAD)

    def flush(self, least: int) -> None:
        while len(self.unsent) > least or (self.unsent and not least):
            data = bytes(self.unsent[:MAX_PAYLOAD])
            del self.unsent[:MAX_PAYLOAD]
            self.connection.send({"id": self.id, "stream": "data"}, data)


class Output:
    """Reads a program's output. What comes after a silence is read at once. What comes in many small writes is read
    after a moment: to be woken up for each of them, and to send a frame for it, costs more than the write."""

    def __init__(self) -> None:
        self.soon = 0  # how many reads followed so soon on the one before
        self.read_at = 0.0
        self.got = 0  # by the reads since a pipe was last found empty
        self.large: set[int] = set()  # pipes that hold more

    def read(self, fd: int) -> bytes:
        """What is there, at most CHUNK."""
        if self.soon >= BUSY_READS and self.got < CHUNK:
            time.sleep(LINGER_SECONDS)
        data = os.read(fd, CHUNK)
        before, self.read_at = self.read_at, time.monotonic()
        self.soon = self.soon + 1 if self.read_at < before + SOON_SECONDS else 0
        self.got += len(data)
        if len(data) < CHUNK:
            if self.got >= BATCH:  # it had to wait for us
                self.soon = 0
            self.got = 0
        if self.soon >= BUSY_READS and fd not in self.large:
            self.large.add(fd)
            enlarge(fd)
        return data

    def hurry(self) -> None:
        """What comes next is an answer to somebody."""
        self.soon = 0


def enlarge(fd: int) -> None:
    """Let a pipe hold more."""
    try:
        fcntl.fcntl(fd, F_SETPIPE_SZ, BATCH)
    except OSError:  # it is a terminal, or a socket
        pass


class AgentLinks:
    """agentd's ends of its connections to one agent's process: the socket for reports (and for the order to a waiting
    process), and the pipes for its output. ``python``: it is an image's, and gets its order on a socket of its own."""

    def __init__(self, python: str = "") -> None:
        self.report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.orders, self.theirs = self.report, [theirs]
        self.python = python
        if python:
            self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.theirs.append(theirs)
        self.env: dict[str, str] = {}  # that it was started with
        pipes = {"stdout": os.pipe2(os.O_CLOEXEC), "stderr": os.pipe2(os.O_CLOEXEC)}
        self.writers = [pair[1] for pair in pipes.values()]
        self.reading = {pair[0]: name for name, pair in pipes.items()}
        self.cpu_us = 0  # of a waiting process: the time that it used before it got its order
        self.pid = self.inner_pid = 0  # in this process's namespace, and in its own

    def hand_over(self, agentd: Agentd, order: Header, stdin: bytes = b"") -> None:
        """Send the other ends to the zygote, for the process that it will fork."""
        source = os.memfd_create("stdin") if stdin else os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for at in range(0, len(stdin), CHUNK):
                os.write(source, stdin[at : at + CHUNK])
            if stdin:
                os.lseek(source, 0, os.SEEK_SET)
            agentd.order(order, (source, *self.writers, *(sock.fileno() for sock in self.theirs)))
        finally:
            os.close(source)
            self.close_theirs()

    def tell(self, order: Header) -> bool:
        """Send its order to the waiting process. False if it is dead, or an interpreter that the order is not for."""
        if self.python and not self.suits(order):
            return False
        try:
            self.orders.send(literal(order) if self.python else json.dumps(order).encode())
        except (OSError, UnicodeError):
            return False
        return True

    def suits(self, order: Header) -> bool:
        """Whether an image's Python that waits does the same as one that is started now."""
        argv, env = order["argv"], order["env"]
        assert isinstance(argv, list) and isinstance(env, dict)
        is_file = argv[0] == self.python and len(argv) > 1 and argv[1].startswith("/")
        return is_file and all(self.env.get(name) == env[name] for name in env if name.startswith(AT_START))

    def close_theirs(self) -> None:
        for sock in self.theirs:
            sock.close()
        while self.writers:
            os.close(self.writers.pop())

    def close(self) -> None:
        self.close_theirs()
        self.report.close()
        self.orders.close()
        for fd in self.reading:
            os.close(fd)
        self.reading.clear()


def literal(order: Header) -> bytes:
    """What an image's Python must know to run a program: argv, environment and directory, as a Python literal."""
    argv, env = order["argv"], order["env"]
    assert isinstance(argv, list) and isinstance(env, dict)
    words = [word.encode(errors="surrogateescape") for word in argv]
    variables = {name.encode(): value.encode(errors="surrogateescape") for name, value in env.items()}
    return repr((words, variables, str(order["cwd"]).encode())).encode()


class Run:
    """One agent, from its order to its end: streams its output, and enforces its timeouts and the host's presence."""

    def __init__(self, agentd: Agentd, connection: Connection, head: Header) -> None:
        self.agentd = agentd
        self.connection = connection
        self.id = head["id"]
        self.user, self.order = agentd.make_order(head)
        self.order.update(op="run", warm=bool(head.get("warm")))
        self.leaves = bool(head.get("leaves"))
        now = time.monotonic()
        self.received_ns = time.monotonic_ns()
        self.timeout = number(head, "timeout")
        self.idle_timeout = number(head, "idle_timeout") if head.get("idle_timeout") is not None else None
        self.deadline, self.last_output = now + self.timeout, now
        self.left = int(number(head, "max_output"))
        self.sizes = {"stdout": 0, "stderr": 0}
        self.dropped = 0
        self.timed_out: str | None = None
        self.stacks_by: float | None = None  # when it has to be gone, after SIGABRT
        self.killed_at: float | None = None
        self.started_ns: object = None
        self.cannot: object = None
        self.exit: Header | None = None
        self.output = Output()
        self.unsent = bytearray()
        self.sent_at = now  # when the host last took data, or none was waiting
        self.host_gone = False

    def run(self, stdin: bytes) -> Header:
        links = self.start(stdin)
        try:
            self.follow(links.report, links.reading)
        finally:
            if self.exit is None:
                self.agentd.order({"op": "kill"})
            links.close()
        assert self.exit is not None
        code = int(str(self.exit["exit"]))
        return {
            "code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "cpu_ms": max(0, int(str(self.exit["cpu_us"])) - links.cpu_us) // 1000,
            "max_rss_kb": self.exit["max_rss_kb"],
            "oom": code != 0 and self.agentd.more_ooms() and not self.timed_out and not self.killed_at,
            "timed_out": self.timed_out,
            "clean": self.exit["clean"],
            "stdout_bytes": self.sizes["stdout"],
            "stderr_bytes": self.sizes["stderr"],
            "dropped_bytes": self.dropped,
            "out": self.agentd.has_out(),
            "received_ns": self.received_ns,
            "started_ns": self.started_ns,
            "ended_ns": self.exit["ended_ns"],
        }

    def start(self, stdin: bytes) -> AgentLinks:
        """Start the agent: in the waiting process if it fits, else in a new one."""
        if self.leaves:
            self.agentd.order({"op": "leave"})
        links, self.agentd.next = self.agentd.next, None
        if links is not None:
            if self.user == "agent" and not stdin and links.tell(self.order):
                if links.python:
                    self.started_ns = time.monotonic_ns()
                return links
            links.close()
        links = AgentLinks()
        try:
            env = self.order["env"]
            assert isinstance(env, dict)
            links.hand_over(self.agentd, {**self.order, "env": {**self.agentd.environment(self.user), **env}}, stdin)
        except BaseException:
            links.close()
            raise
        return links

    def follow(self, report: socket.socket, reading: dict[int, str]) -> None:
        """Forward output until the agent has ended and its pipes are empty. While the host is behind, nothing is read,
        so the agent blocks in its own write."""
        host = self.connection.sock
        host.setblocking(False)
        if self.started_ns:
            self.emit({"id": self.id, "started_ns": self.started_ns})
        drain_by = 0.0
        while True:
            now = time.monotonic()
            if self.unsent:
                self.last_output = now  # the agent is blocked, not silent
                drain_by = now + DRAIN_SECONDS
                if now > self.sent_at + IO_SECONDS:
                    self.lose_host()
            else:
                self.sent_at = now
            if self.exit is None:
                self.check_time(now)
                drain_by = now + DRAIN_SECONDS
            elif not self.unsent and (not reading or now > drain_by):
                break
            poller = select.poll()
            if self.exit is None:
                poller.register(report, select.POLLIN)
            if not self.host_gone:
                poller.register(host, select.POLLRDHUP | (select.POLLOUT if self.unsent else 0))
            for fd in () if self.unsent else reading:
                poller.register(fd, select.POLLIN)
            for fd, event in poller.poll(self.patience_ms(now)):
                if fd == report.fileno():
                    self.handle_report(report.recv(4096))
                elif fd != host.fileno():
                    self.pump(fd, reading)
                elif event & ~select.POLLOUT:
                    self.lose_host()
                else:
                    self.flush()
        if self.host_gone:
            raise Broken("the host closed the connection during a run")
        if self.cannot is not None:
            raise CannotStart(str(self.cannot))

    def patience_ms(self, now: float) -> int:
        until = [now + 1.0]
        if self.killed_at is None:
            until.append(self.stacks_by or self.deadline)
        if self.idle_timeout is not None and self.timed_out is None:
            until.append(self.last_output + self.idle_timeout)
        return max(1, int((min(until) - now) * 1000) + 1)

    def check_time(self, now: float) -> None:
        if self.killed_at is not None:
            if now > self.killed_at + KILL_SECONDS:
                raise RuntimeError(f"the agent is not gone {KILL_SECONDS:g} s after SIGKILL")
        elif self.stacks_by is not None:
            if now > self.stacks_by:
                self.kill(now)
        elif now > self.deadline:
            self.time_out("run", now)
        elif self.idle_timeout is not None and now > self.last_output + self.idle_timeout:
            self.time_out("idle", now)

    def time_out(self, how: str, now: float) -> None:
        """End it by SIGABRT, at which Python (and Go) print where each thread is; others just die."""
        self.timed_out, self.stacks_by = how, now + STACK_SECONDS
        self.agentd.order({"op": "abort"})

    def kill(self, now: float) -> None:
        self.killed_at = now
        self.agentd.order({"op": "kill"})

    def lose_host(self) -> None:
        self.host_gone = True
        self.unsent.clear()
        if self.killed_at is None:
            self.kill(time.monotonic())

    def handle_report(self, data: bytes) -> None:
        """Handle a report about the agent, from its process or from the zygote."""
        if not data:
            if self.cannot is None:
                raise RuntimeError("the zygote died")
            self.exit = {}
            return
        said = json.loads(data)
        if "started_ns" in said:
            self.started_ns = said["started_ns"]
            self.emit({"id": self.id, "started_ns": self.started_ns})
        elif "cannot" in said:
            self.cannot = said["cannot"]
        else:
            self.exit = said

    def pump(self, fd: int, reading: dict[int, str]) -> None:
        if self.exit is not None:
            self.output.hurry()
        data = self.output.read(fd)
        if not data:
            del reading[fd]
            os.close(fd)
            return
        self.last_output = time.monotonic()
        name = reading[fd]
        self.sizes[name] += len(data)
        kept, rest = data[: self.left], data[self.left :]
        self.left -= len(kept)
        if kept:
            self.emit({"id": self.id, "stream": name}, kept)
        if rest and not self.dropped:
            self.emit({"id": self.id, "truncated": True})
        self.dropped += len(rest)

    def emit(self, head: Header, payload: bytes = b"") -> None:
        if not self.host_gone:
            self.unsent += frame(head, payload)
            self.flush()

    def flush(self) -> None:
        try:
            while self.unsent:
                del self.unsent[: self.connection.sock.send(self.unsent)]
                self.sent_at = time.monotonic()
        except BlockingIOError:
            pass
        except OSError:
            self.lose_host()


class Listener(Talk):
    """A conversation about a program: `exec`, or `attach`."""

    def __init__(self, connection: Connection, request_id: object) -> None:
        super().__init__(connection, request_id)
        self.after = self.dropped = 0  # bytes of output before what it wants, and that it wanted but are gone
        self.fed = self.taken = self.told = 0  # bytes of input: from the host, into the program, and so said
        self.parted = _thread.allocate_lock()  # held until the program has done with it
        self.parted.acquire()


class Program:
    """A program of `exec`. One thread follows it, and is the only one that touches it or its conversations: that of
    the connection which started it, or one of its own if it runs in the background.

    While a host that listens is behind, nothing is read from the program, so it blocks in its own write."""

    def __init__(self, agentd: Agentd, head: Header) -> None:
        self.agentd = agentd
        self.name = text(head, "process")
        if not 1 <= len(self.name) <= 64 or set(self.name) - set("abcdefghijklmnopqrstuvwxyz0123456789-"):
            raise Refused("a process is named by 1 to 64 of a-z, 0-9 and -")
        self.user, self.order = agentd.make_order(head)
        argv = self.order["argv"]
        assert isinstance(argv, list)
        self.argv = [part[:256] for part in argv[:32]]  # what is remembered
        self.large = "packed" in head
        self.background = bool(head.get("background"))  # it outlives the connection that started it
        self.more_stdin = bool(head.get("stdin"))
        self.size = self.window_size(head.get("pty")) if head.get("pty") is not None else b""
        self.timeout = None if head.get("timeout") is None else number(head, "timeout")
        self.group = ""  # its control group, if it has one
        self.grouped = False  # it had one
        self.serial = ""
        self.lock = _thread.allocate_lock()  # of what other threads touch: `joining`, `finished`
        self.joining: list[Listener] = []
        self.finished = False
        self.talks: list[Listener] = []
        self.owner: Listener | None = None  # whose end is its end, unless it runs in the background
        self.log: deque[tuple[str, bytes]] = deque()  # its latest output
        self.kept = self.written = 0  # bytes of that, and of all its output
        self.input: deque[tuple[Listener | None, memoryview]] = deque()  # not yet taken by it
        self.input_ends = self.deaf = False
        self.full = False  # it was once behind with its input
        self.input_fd = self.wake = self.beginning = self.ending = -1
        self.reading: dict[int, str] = {}
        self.output = Output()
        self.start_report = b""
        self.begun = 0.0
        self.frozen = 0.0
        self.killed_at: float | None = None
        self.kills = 0
        self.timed_out = False
        self.cannot: str | None = None
        self.pid = self.started_ns = 0
        self.exit: Header | None = None
        self.end: Header | None = None

    @staticmethod
    def window_size(size: object) -> bytes:
        numbers = size if isinstance(size, list) else []
        if len(numbers) != 2 or not all(isinstance(n, int) and 0 < n < 1 << 16 for n in numbers):
            raise Refused("a terminal's size is [columns, rows]")
        return struct.pack("HHHH", numbers[1], numbers[0], 0, 0)

    def start(self, stdin: bytes) -> None:
        theirs: list[int] = []
        try:
            self.open_files(theirs, stdin)
            env = self.order["env"]
            assert isinstance(env, dict)
            term = {"TERM": "xterm-256color"} if self.size else {}
            env = {**self.agentd.environment(self.user), "SWARM_PROCESS": self.name, **term, **env}
            order: Header = {**self.order, "op": "exec", "env": env, "pty": bool(self.size), "warm": False}
            self.begun = time.monotonic()
            self.frozen = self.agentd.frozen_until(self.begun)
            if self.large or not self.start_in_spare(order, theirs):
                self.serial, self.group = self.agentd.next_group()
                self.ending = self.pipe(theirs)
                if self.large:
                    self.set_apart(order, theirs)
                self.agentd.order({**order, "key": self.serial, "cgroup": self.group}, tuple(theirs))
            self.grouped = bool(self.group)
            self.order.clear()
        except BaseException:
            self.close()
            self.remove_group()
            raise
        finally:
            for fd in set(theirs):
                os.close(fd)

    def start_in_spare(self, order: Header, theirs: list[int]) -> bool:
        """Start it in a process that was forked ahead. False if there is none for it, or those were killed."""
        while self.user == "agent" and (spare := self.agentd.take_spare()):
            self.serial, self.group, self.ending = spare.key, spare.group, spare.ending
            try:
                socket.send_fds(spare.sock, [json.dumps(order).encode()], theirs)
                return True
            except OSError:
                os.close(self.ending)
                self.ending = -1
                self.remove_group()
            finally:
                spare.sock.close()
        return False

    @staticmethod
    def set_apart(order: Header, theirs: list[int]) -> None:
        """Move what is too large for a message to the zygote into a file in memory."""
        large = json.dumps({name: order.pop(name) for name in ("argv", "env")}).encode()
        theirs.append(os.memfd_create("order"))
        with open(theirs[-1], "wb", closefd=False) as file:
            file.write(large)
        order["apart"] = len(large)

    @staticmethod
    def pipe(theirs: list[int], inwards: bool = False) -> int:
        """Our end of a new pipe; the other is added to ``theirs``."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        ours, other = (writer, reader) if inwards else (reader, writer)
        theirs.append(other)
        os.set_blocking(ours, False)
        return ours

    def open_files(self, theirs: list[int], stdin: bytes) -> None:
        """Make the pipes, or the terminal, between the program and this process."""
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if self.size:
            self.input_fd, slave = os.openpty()
            theirs += [slave] * 3
            os.set_blocking(self.input_fd, False)
            fcntl.ioctl(slave, TIOCSWINSZ, self.size)
            if self.agentd.in_vm:
                os.fchown(slave, self.agentd.users[self.user][0], -1)
            self.reading[self.input_fd] = "stdout"
        else:
            if stdin or self.more_stdin:
                self.input_fd = self.pipe(theirs, inwards=True)
            else:
                theirs.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            self.reading[self.pipe(theirs)] = "stdout"
            self.reading[self.pipe(theirs)] = "stderr"
        self.beginning = self.pipe(theirs)
        if stdin:
            self.input.append((None, memoryview(stdin)))
        self.input_ends = not self.more_stdin and not self.size

    def join(self, talk: Listener) -> bool:
        """Let a conversation hear it from now on. False if it has ended."""
        with self.lock:
            if not self.finished:
                self.joining.append(talk)
                os.eventfd_write(self.wake, 1)
            return not self.finished

    def follow(self) -> None:
        """Follow it to its end, and that of its output."""
        try:
            while self.turn():
                pass
            self.end = self.described_end()
        except BaseException as error:
            log(f"process {self.name}: {type(error).__name__}: {error}")
            self.kill()
            self.end = self.end or {**NO_END, "started_ns": self.started_ns, "ended_ns": time.monotonic_ns()}
        with self.lock:
            self.finished = True
            talks, self.talks = self.talks + self.joining, []
            for talk in self.joining:
                self.replay(talk)
        self.close()
        if not self.background:
            self.log.clear()
            self.kept = 0
        if self.cannot is not None:
            self.agentd.forget(self)
        self.agentd.keep_few()
        for talk in talks:
            talk.parted.release()

    def turn(self) -> bool:
        """Wait for the next things to happen, and see to them. False at the end."""
        now = time.monotonic()
        self.admit()
        for talk in self.talks[:]:
            if talk.gone:
                self.lose(talk)
        self.check_time(now)
        behind = any(talk.unsent for talk in self.talks)
        if self.exit is not None:
            if not behind:
                self.drain(now)
            if not self.reading and not any(talk.unsent for talk in self.talks):
                return False
        poller = select.poll()
        poller.register(self.wake, select.POLLIN)
        for fd in (self.beginning, self.ending):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        masks = {} if behind else dict.fromkeys(self.reading, select.POLLIN)
        if self.input_fd >= 0 and self.input:
            masks[self.input_fd] = masks.get(self.input_fd, 0) | select.POLLOUT
        for fd, mask in masks.items():
            poller.register(fd, mask)
        by_fd = {talk.sock.fileno(): talk for talk in self.talks}
        for fd, talk in by_fd.items():
            poller.register(fd, talk.events())
        for fd, event in poller.poll(self.patience_ms(now)):
            if fd in by_fd:
                self.attend(by_fd[fd], event)
            elif fd == self.wake:
                os.eventfd_read(self.wake)
            elif fd == self.beginning:
                self.hear_start()
            elif fd == self.ending:
                self.hear_end()
            else:
                if fd == self.input_fd and event & ~select.POLLIN:
                    if self.full:  # it has enough for a while: a write for each of its small reads would cost more
                        time.sleep(LINGER_SECONDS)
                    self.feed()
                if fd in self.reading and event & ~select.POLLOUT:
                    while self.pump(fd) and 0 < self.output.got < BATCH and not any(talk.unsent for talk in self.talks):
                        pass
        return True

    def patience_ms(self, now: float) -> int | None:
        if self.killed_at is not None or (self.exit is not None and self.reading):
            return 100
        if self.timeout is None:
            return None
        return max(1, min(1 << 30, int((self.deadline(now) - now) * 1000) + 1))

    def deadline(self, now: float) -> float:
        """When its time is up; that in which it was frozen does not count."""
        assert self.timeout is not None
        return self.begun + self.timeout + self.agentd.frozen_until(now) - self.frozen

    def check_time(self, now: float) -> None:
        if self.killed_at is not None:
            if self.exit is None and now > self.killed_at + KILL_SECONDS:
                raise RuntimeError(f"it is not gone {KILL_SECONDS:g} s after SIGKILL")
            if self.exit is None and now > self.killed_at + 0.1 * self.kills:
                self.kill()
        elif self.timeout is not None and self.exit is None and now > self.deadline(now):
            self.timed_out = True
            self.kill()

    def kill(self) -> None:
        """Kill it and all that it started."""
        self.killed_at = self.killed_at or time.monotonic()
        self.kills += 1
        self.signal_all(signal.SIGKILL)

    def signal(self, head: Header) -> bool:
        """Send a signal to its process group (in a terminal: to that in the foreground), or to all that it started.
        False if there is nothing left of it."""
        name = text(head, "signal")
        number_ = getattr(signal, f"SIG{name}", None) if name.isalnum() else None
        if not isinstance(number_, signal.Signals):
            raise Refused(f"no such signal: {name!r:.40}")
        if head.get("all"):
            return self.signal_all(number_)
        if self.exit is not None or self.finished:
            return False
        if self.size and number_ in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
            with self.lock:
                if not self.finished:
                    fcntl.ioctl(self.input_fd, TIOCSIG, number_)
        else:
            self.agentd.order({"op": "signal", "key": self.serial, "signal": int(number_)})
        return True

    def signal_all(self, number_: int) -> bool:
        if self.grouped and not self.group:
            return False  # all of it has ended
        if not self.grouped:
            order: Header = {"op": "end", "key": self.serial, "process": self.name, "signal": int(number_)}
            self.agentd.order(order)
            return True
        try:
            if number_ == signal.SIGKILL:
                populated = "populated 1" in read_file(f"{self.group}/cgroup.events")
                poke(f"{self.group}/cgroup.kill", "1")
                return populated
            pids = [int(pid) for pid in read_file(f"{self.group}/cgroup.procs").split()]
        except FileNotFoundError:  # all of it has ended
            return False
        for pid in pids:
            try:
                os.kill(pid, number_)
            except ProcessLookupError:
                pass
        return bool(pids)

    def attend(self, talk: Listener, event: int) -> None:
        """See to a conversation's socket."""
        if event & select.POLLOUT:
            talk.flush()
        for head, payload in talk.hear() if event & ~select.POLLOUT else ():
            try:
                self.obey(talk, head, payload)
            except (Refused, OSError) as error:
                talk.say({"refused": str(error)[:500]})
        if talk.gone:
            self.lose(talk)

    def obey(self, talk: Listener, head: Header, payload: bytes) -> None:
        op = head["op"]
        self.output.hurry()
        if op == "stdin":
            talk.fed += len(payload)
            if talk.fed - talk.taken > WINDOW + MAX_PAYLOAD:
                log(f"process {self.name}: the host sends more than may be sent")
                talk.lose()
            elif not payload:
                self.input_ends = True
                if self.size:
                    self.input.append((None, memoryview(b"\4")))  # Ctrl+D
            else:
                self.input.append((talk, memoryview(payload)))
            self.feed()
        elif op == "resize":
            if self.size:
                self.size = self.window_size(head.get("size"))
                fcntl.ioctl(self.input_fd, TIOCSWINSZ, self.size)
        elif op == "signal":
            self.signal(head)
        else:
            raise Refused(f"{op!r:.40} does not belong in a conversation with a process")

    def lose(self, talk: Listener) -> None:
        if talk not in self.talks:
            return
        self.talks.remove(talk)
        if talk is self.owner:
            self.owner = None
            if self.agentd.frozen_at is not None:
                self.background = True  # it was cut by a pause: the program goes on
            elif not self.background and self.killed_at is None:
                self.kill()
        talk.parted.release()

    def admit(self) -> None:
        with self.lock:
            joining, self.joining = self.joining, []
        for talk in joining:
            self.talks.append(talk)
            self.replay(talk)

    def replay(self, talk: Listener) -> None:
        """Tell a conversation what it missed."""
        if self.pid:
            talk.say(self.said_start())
        at = self.written - self.kept
        if talk.after < at:
            talk.dropped = at - talk.after
            talk.say({"dropped": talk.dropped})
        for name, data in self.log:
            at += len(data)
            if at > talk.after:
                talk.say({"stream": name, "offset": at}, data[max(0, talk.after - at + len(data)) :])

    def said_start(self) -> Header:
        return {"process": self.name, "started_ns": self.started_ns, "pid": self.pid}

    def hear_start(self) -> None:
        """Its process reports its start, then perhaps that it can't start; the end of the pipe says that it did."""
        try:
            while data := os.read(self.beginning, 4096):
                self.start_report += data
        except BlockingIOError:
            return
        os.close(self.beginning)
        self.beginning = -1
        for line in self.start_report.splitlines():
            said = json.loads(line)
            if "cannot" in said:
                self.cannot = str(said["cannot"])
            else:
                self.started_ns, self.pid = said["started_ns"], said["pid"]
        if self.cannot is None and self.pid:
            for talk in self.talks:
                talk.say(self.said_start())

    def hear_end(self) -> None:
        """The zygote reports its end."""
        data = os.read(self.ending, 4096)
        os.close(self.ending)
        self.ending = -1
        while self.beginning >= 0:
            self.hear_start()
        if not data and self.cannot is None:
            raise RuntimeError("the zygote died")
        if not self.pid and self.cannot is None:
            self.cannot = "its process was killed before it was started"
        self.exit = json.loads(data or b"{}")
        self.drained_by = time.monotonic() + DRAIN_SECONDS

    drained_by = 0.0

    def drain(self, now: float) -> None:
        """After its end, read what is in the pipes; what it left running may hold them open. (A terminal closes by
        itself when its owner ends, but later.)"""
        self.output.hurry()
        for fd in list(self.reading):
            while not any(talk.unsent for talk in self.talks) and self.pump(fd):
                self.output.hurry()
        if not any(talk.unsent for talk in self.talks) and (not self.size or now > self.drained_by):
            for fd in list(self.reading):
                self.stop_reading(fd)

    def pump(self, fd: int) -> bool:
        """Read once. False if there is nothing now."""
        try:
            data = self.output.read(fd)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the terminal open
            data = b""
        if not data:
            self.stop_reading(fd)
            return False
        name = self.reading[fd]
        self.written += len(data)
        self.kept += len(data)
        self.log.append((name, data))
        while self.kept > SCROLLBACK:
            self.kept -= len(self.log.popleft()[1])
        for talk in self.talks:
            talk.say({"stream": name, "offset": self.written}, data)
        return True

    def stop_reading(self, fd: int) -> None:
        del self.reading[fd]
        if fd != self.input_fd:
            os.close(fd)

    def feed(self) -> None:
        """Give it input, as much as it takes."""
        try:
            while self.input and self.input_fd >= 0:
                talk, data = self.input.popleft()
                try:
                    size = os.write(self.input_fd, data[:CHUNK])
                except BlockingIOError:
                    self.input.appendleft((talk, data))
                    break
                if data[size:]:
                    self.input.appendleft((talk, data[size:]))
                self.tell_taken(talk, size)
                if size < min(CHUNK, len(data)):
                    if not self.full:
                        enlarge(self.input_fd)
                    self.full = True
                    break
        except OSError:  # it reads no more
            self.end_input()
            self.input.appendleft((talk, data))
        if self.input_fd < 0 or self.deaf:
            while self.input:
                talk, data = self.input.popleft()
                self.tell_taken(talk, len(data))
        elif self.input_ends and not self.input and not self.size:
            self.end_input()

    def tell_taken(self, talk: Listener | None, size: int) -> None:
        if talk is not None:
            talk.taken += size
            if talk.taken - talk.told >= TAKEN:
                talk.told = talk.taken
                talk.say({"taken": talk.taken})

    def end_input(self) -> None:
        self.deaf = True
        if self.input_fd >= 0 and self.input_fd not in self.reading:
            os.close(self.input_fd)
            self.input_fd = -1

    def described_end(self) -> Header:
        """How it ended. If it was killed, all that it started is gone."""
        exit_ = self.exit or {}
        if self.killed_at is not None and self.group:
            wait_for_event(self.group, b"populated 0", self.killed_at + KILL_SECONDS)
        if not self.remove_group():
            with self.agentd.programs_lock:
                self.agentd.leaving.append(self)
        code = int(str(exit_.get("exit", -signal.SIGKILL)))
        return {
            "code": code if code >= 0 and not self.timed_out else None,
            "signal": -code if code < 0 else signal.SIGKILL if self.timed_out else None,
            "timed_out": self.timed_out,
            "oom": code != 0 and self.killed_at is None and self.agentd.more_ooms(),
            "cpu_ms": int(str(exit_.get("cpu_us", 0))) // 1000,
            "max_rss_kb": exit_.get("max_rss_kb", 0),
            "started_ns": self.started_ns,
            "ended_ns": exit_.get("ended_ns", time.monotonic_ns()),
        }

    def described(self) -> Header:
        """Its line in the list of processes."""
        return {
            "process": self.name,
            "argv": self.argv,
            "user": self.user,
            "pid": self.pid,
            "background": self.background,
            "pty": bool(self.size),
            "attached": len(self.talks),
            "output_bytes": self.written,
            "running": not self.finished,
            "started_ns": self.started_ns,
            "end": self.end,
        }

    def remove_group(self) -> bool:
        """Remove its control group. False if there are processes in it."""
        try:
            if self.group:
                os.rmdir(self.group)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        self.group = ""
        return True

    def close(self) -> None:
        with self.lock:
            fds = {self.input_fd, self.wake, self.beginning, self.ending, *self.reading} - {-1}
            self.input_fd = self.wake = self.beginning = self.ending = -1
            self.reading.clear()
            self.finished = True
        for fd in fds:
            os.close(fd)


class Spare:
    """agentd's ends of its connections to the process that waits to become the next program of user agent."""

    def __init__(self, agentd: Agentd, adopted: AgentLinks | None = None) -> None:
        self.key, self.group = agentd.next_group()
        theirs: list[int] = []
        if adopted:
            self.sock = adopted.report.dup()
            order: Header = {"op": "adopt"}
        else:
            theirs += [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)] * 3
            self.sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.append(other.detach())
            user = agentd.rights("agent") if agentd.in_vm else None
            order = {"op": "spare", "user": user, "env": {}, "cgroup": self.group}
        self.ending = Program.pipe(theirs)
        try:
            agentd.order({**order, "key": self.key}, tuple(theirs))
            if adopted and self.group:
                poke(f"{self.group}/cgroup.procs", str(adopted.pid))
        except ProcessLookupError:  # it is dead, which is seen by whoever sends it an order
            pass
        finally:
            for fd in set(theirs):
                os.close(fd)
            if adopted:
                adopted.close()


NO_END: Header = {
    "code": None, "signal": int(signal.SIGKILL), "timed_out": False, "oom": False, "cpu_ms": 0, "max_rss_kb": 0
}  # fmt: skip


def wait_for_event(group: str, event: bytes, deadline: float) -> bool:
    """False if a control group is not so until then. One that is gone is empty, and frozen."""
    try:
        with open(f"{group}/cgroup.events", "rb", buffering=0) as events:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while event not in os.pread(events.fileno(), 4096, 0):
                if time.monotonic() > deadline:
                    return False
                poller.poll(100)
    except OSError as error:
        if error.errno not in GONE:
            raise
    return True


def control_groups() -> list[str]:
    """Those at the top: agentd's own, and what programs made for theirs, as podman does for containers."""
    with os.scandir(CGROUPS) as found:
        return sorted(one.path for one in found if one.is_dir(follow_symlinks=False))


def set_frozen(group: str, frozen: bool) -> None:
    try:
        poke(f"{group}/cgroup.freeze", "1" if frozen else "0")
    except OSError as error:
        if error.errno not in GONE:
            raise


def user_processes() -> list[int]:
    """All live processes but the kernel's own, which have no program."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.readlink(f"/proc/{name}/exe"):
                found.append(int(name))
        except OSError:
            pass
    return found


def in_group(pid: int) -> bool:
    return read_file(f"/proc/{pid}/cgroup").rpartition("::")[2].strip() != "/" or not process(str(pid))


def main(arguments: list[str]) -> int:
    options = {"--listen": "172.16.0.2:1024", "--unix": "", "--root": "", "--preload": "", "--image": ""}
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        if name not in options:
            sys.exit(f"agentd: unknown option {name}; use one of {', '.join(options)}")
        options[name] = value
    unix, root = options["--unix"], options["--root"]
    if bool(unix) != bool(root):
        sys.exit("agentd: --unix and --root must be given together")
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)
    if not unix:
        set_oom_score("self", -1000)
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # to be able to kill hundreds of busy processes
        keep_resident()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = fork_apart() if options["--image"] else os.fork()
    if pid == 0:
        ours.close()
        job = Zygote(theirs, in_vm=not unix).serve([name for name in options["--preload"].split(",") if name])
        run_job(job)
        return 0
    theirs.close()
    host, _, port = options["--listen"].rpartition(":")
    Agentd(ours, pid, unix, root, options["--image"]).serve(host, int(port))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
