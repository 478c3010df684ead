"""What a VMM process can see of the host when it has no jailer of its own: nothing but what it needs to run.

::

    /                            a read-only tmpfs, the same for all VMs of an engine
        usr/bin/…, lib/…, dev/…  the VMM, its libraries, its devices: single files, bind-mounted read-only
        kernel, memory …         files of this VM alone

A process inherits the namespaces of the thread that forks it. So one thread goes into a VM's namespaces, starts its VMM
there, and comes back. That takes 0.3 ms; each program that did a part of it (nsenter, unshare) would take 1 ms. The
root is made once, in a mount namespace that no process is in; each VM has a copy of that namespace.

What the VMM inherits as descriptors needs no place in the root: disks, tap, console, QMP. The VMM is pid 1 of its pid
namespace, and no /proc is mounted.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from swarm.base import priority, process
from swarm.base.aio import finish_uninterrupted
from swarm.base.libc import (
    CLONE_FS,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    attach_tree,
    check,
    libc,
    mount,
    open_tree,
    pivot_root,
)
from swarm.base.log import logger
from swarm.base.process import Spawned
from swarm.errors import HostError
from swarm.vm import driver
from swarm.vm.drivers.jailer import JailFile
from swarm.vm.network import netns

log = logger(__name__)

T = TypeVar("T")

_HOST_NAME = b"vm"
_THREADS = 512  # of its uid. QEMU may use 64 for disks, beside its CPUs, and ends when it gets none
_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
_NAMESPACES = {
    "mnt": CLONE_NEWNS, "pid": CLONE_NEWPID, "ipc": CLONE_NEWIPC, "uts": CLONE_NEWUTS, "net": CLONE_NEWNET,
}  # fmt: skip
_BOUND = MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """What a VMM's root contains. ``programs``: with the libraries that they are linked to; ``files``: also whole
    directories; ``devices``: names in /dev; ``own``: names of files that are another one for each VM. The two programs
    that give up rights and set limits are there too."""

    programs: tuple[Path, ...]
    files: tuple[Path, ...] = ()
    devices: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


async def spawn(
    argv: Sequence[str],
    *,
    root: Root,
    own: Sequence[JailFile],
    space: str | None,
    uid: int,
    groups: Sequence[int],
    file_bytes: int,
    output: Path,
    pass_fds: Sequence[int],
    outlive: bool,
    join: Callable[[int], None] = lambda _: None,
) -> Spawned:
    """Start a program in namespaces of its own and in ``root``, with the VM's ``own`` files there.

    ``space``: the network namespace; None for an empty one. ``file_bytes``: the size beyond which it can't write a
    file. stdout and stderr are appended to ``output``. Unless it is to ``outlive`` us, it ends with us, and gets no
    SIGHUP, SIGINT and SIGTERM (see `process.spawn`). ``join`` is called at once with its pid, in the thread. Raises
    HostError.
    """
    base = await _base(root)
    setpriv, prlimit = _rights()
    argv = [
        str(setpriv), f"--reuid={uid}", f"--regid={uid}",
        f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups",
        "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all",
        *(() if outlive else ("--pdeathsig=KILL",)),  # here, since a change of uid clears it
        str(prlimit), "--core=0", f"--fsize={file_bytes}", f"--nproc={_THREADS}", "--nofile=256",
        *argv,
    ]  # fmt: skip
    log.debug("spawn", argv=shlex.join(argv), output=str(output))
    pids: list[int] = []

    def start() -> None:
        with contextlib.ExitStack() as stack:
            log_file = stack.enter_context(output.open("ab"))
            nothing = stack.enter_context(Path(os.devnull).open("rb"))
            trees = []
            for file in own:
                trees.append((file, open_tree(bytes(file.source))))
                stack.callback(os.close, trees[-1][1])
            with _thread().away():
                _enter(base, space, trees)
                if not outlive:
                    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                    stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
                child = subprocess.Popen(  # asyncio starts processes in its own thread only
                    argv,
                    stdin=nothing,
                    stdout=log_file,
                    stderr=log_file,
                    env={},
                    pass_fds=tuple(pass_fds),
                    start_new_session=True,
                )
                child.returncode = 0  # it is waited for by Spawned
                pids.append(child.pid)
        process.expendable(child.pid, driver.OOM_SCORE)
        priority.lower(child.pid, priority.BELOW_ENGINE)
        join(child.pid)  # it is still being loaded: it has no memory to speak of, and no guest

    try:
        await _thread().run(start)
        return Spawned(pids[0])
    except BaseException as error:
        for pid in pids:
            await process.kill(Spawned(pid))
        if isinstance(error, OSError):
            raise HostError(f"can't start {argv[0]} apart from the host: {error}") from error
        raise


# --- the thread -------------------------------------------------------------------------------------------------------


class _Thread:
    """The thread that starts VMMs, one after another. It lives as long as this process does, since the kernel sends the
    signal of a parent's death when the *thread* that forked has ended."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vmm-spawn", initializer=self._begin)
        self._home: dict[str, int] = {}
        self._away = False

    async def run(self, work: Callable[[], T]) -> T:
        async def wait() -> T:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)

        return await finish_uninterrupted(wait())

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """For the length of the block, this thread may change its namespaces."""
        if self._away:  # it could not return
            self._return()
        self._away = True
        try:
            yield
        finally:
            self._return()

    def _begin(self) -> None:
        check(libc().unshare(CLONE_FS), "unshare")  # root and umask of its own, which a mount namespace requires
        os.umask(0o022)
        for name in _NAMESPACES:
            self._home[name] = os.open(f"/proc/thread-self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def _return(self) -> None:
        for name, kind in _NAMESPACES.items():
            check(libc().setns(self._home[name], kind), f"setns to the host's {name}")
        self._away = False


@functools.cache
def _thread() -> _Thread:
    return _Thread()


def _enter(base: int, space: str | None, trees: Iterable[tuple[JailFile, int]]) -> None:
    if space:
        netns.enter(space)
    check(libc().setns(base, CLONE_NEWNS), "setns")
    new = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | (0 if space else CLONE_NEWNET)
    check(libc().unshare(new), "unshare")
    check(libc().sethostname(_HOST_NAME, len(_HOST_NAME)), "sethostname")
    for file, tree in trees:
        target = f"/{file.name}".encode()
        attach_tree(tree, target)
        mount(None, target, _BOUND | MS_NOEXEC | (0 if file.writable else MS_RDONLY))


# --- the root ---------------------------------------------------------------------------------------------------------

_bases: dict[Root, int] = {}  # descriptors of mount namespaces, for the life of this process


async def _base(root: Root) -> int:
    """A mount namespace with this root, made at its first use. ~20 ms."""
    if root not in _bases:
        programs = (*_rights(), *root.programs)
        files = {*programs, *root.files, *await _libraries(programs)}
        try:
            await _thread().run(functools.partial(_make, root, sorted(files)))
        except OSError as error:
            raise HostError(f"can't make an empty root for VMs: {error}") from error
    return _bases[root]


def _rights() -> tuple[Path, Path]:
    return process.path_of("setpriv"), process.path_of("prlimit")


async def _libraries(programs: Sequence[Path]) -> set[Path]:
    """The paths of the shared libraries and the loader of these programs, as the loader itself finds them."""
    done = await process.run(["ldd", *map(str, programs)], check=False)  # it fails for one that is linked statically
    text = done.stdout.decode(errors="replace")
    if missing := re.findall(r"(\S+) => not found", text):
        raise HostError(f"the library {missing[0]} of {programs[-1]} is missing: install QEMU anew")
    return {Path(found) for found in re.findall(r"^\t(?:\S+ => )?(/\S+) \(0x", text, re.MULTILINE)}


def _make(root: Root, files: Sequence[Path]) -> None:
    if root in _bases:  # made meanwhile
        return
    with _thread().away():
        check(libc().unshare(CLONE_NEWNS), "unshare")
        base = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            mount(None, b"/", MS_PRIVATE | MS_REC)
            # Over /proc, where nothing of a root comes from.
            plain = MS_NOSUID | MS_NODEV | MS_NOEXEC
            mount(b"swarm", b"/proc", plain, kind=b"tmpfs", data=b"mode=755,size=1m")
            for source in files:
                _bind(source, _BOUND | MS_RDONLY)
            for name in root.devices:
                _bind(Path("/dev", name), (_BOUND & ~MS_NODEV) | MS_NOEXEC | MS_RDONLY)
            for name in root.own:
                Path("/proc", name).touch()
            mount(None, b"/proc", MS_REMOUNT | MS_BIND | plain | MS_RDONLY)
            os.chdir("/proc")
            pivot_root()
        except BaseException:
            os.close(base)
            raise
    _bases[root] = base


def _bind(source: Path, flags: int) -> None:
    target = Path("/proc", source.relative_to("/"))
    if target.exists():  # in a directory that is bound already
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir() if source.is_dir() else target.touch()
    mount(bytes(source), bytes(target), MS_BIND)
    mount(None, bytes(target), flags)
