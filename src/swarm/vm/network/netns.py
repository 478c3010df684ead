"""Named network namespaces, without a helper process for each.

A network namespace is a property of a thread. So everything that has to happen inside one runs in a thread of its own,
which enters the namespace and ends there: no pooled thread is ever left in the wrong namespace, and none has to come
back. A netlink socket stays in the namespace in which it was opened, so a thread that opens one before it leaves can
talk to both.

Namespaces are pinned at ``/run/netns/<name>`` the way iproute2 does it, so ``ip netns`` sees them. Swarm's carry a mark
*inside* (the alias of their ``lo``), which is set before they get a name. So a visible namespace is Swarm's exactly if
it is marked, even if its maker was killed half-way.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from swarm.base import files
from swarm.base.aio import finish_uninterrupted
from swarm.base.libc import CLONE_NEWNET, MNT_DETACH, MS_BIND, MS_REC, MS_SHARED, check, libc, mount
from swarm.errors import HostError

T = TypeVar("T")

RUN = Path("/run/netns")
LOCK = Path("/run/swarm-netns.lock")
MARK = "swarm"
QDISC = "tbf"  # what limits a tap

_TUNSETIFF, _TUNSETPERSIST, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x400454CB, 0x0002, 0x1000  # linux/if_tun.h
_SIOCGSKNS, _SYS_PIDFD_GETFD = 0x894C, 438  # linux/sockios.h; the same number on every architecture
_ALIAS_BYTES = 255  # IFALIASZ in linux/if.h, without the zero at its end
_LOOPBACK = 1  # index of lo in every namespace


async def in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a new thread, which may change its namespace. Waits for it even if the caller is cancelled."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def body() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(future.set_exception, error)
        else:
            loop.call_soon_threadsafe(future.set_result, result)

    async def wait() -> T:
        return await future

    threading.Thread(target=body, name="netns", daemon=True).start()
    return await finish_uninterrupted(wait())


@contextlib.contextmanager
def netlink() -> Iterator[Any]:
    """A route netlink socket in this thread's current namespace; the socket stays there. ~0.4 ms."""
    ipr = IPRoute()
    try:
        yield ipr
    finally:
        ipr.close()


# --- names ------------------------------------------------------------------------------------------------------------


def locked(*, exclusive: bool, timeout_seconds: float = 30.0) -> contextlib.AbstractAsyncContextManager[None]:
    """A host-wide lock between processes.

    Not on ``/run/netns`` itself, as iproute2's: every user can open that directory, and so lock it for ever.
    """
    deadline = time.monotonic() + timeout_seconds

    def waiting() -> None:
        if time.monotonic() > deadline:
            raise HostError(
                f"another process has held the lock on {LOCK} for more than {timeout_seconds:g} s: "
                f"find it with `lsof {LOCK}`"
            )

    return files.locked_async(LOCK, shared=not exclusive, poll_seconds=0.003, create=0o600, waiting=waiting)


def create(name: str, owner: str = "") -> None:
    """Move this thread into a new namespace, mark it as Swarm's, and pin it under ``name``.

    ``owner`` is stored in the mark, for `owner_of`. Raises FileExistsError if the name is taken.
    """
    _share_run_directory()
    path = RUN / name
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    try:
        check(libc().unshare(CLONE_NEWNET), "unshare")
        with netlink() as here:
            here.link("set", index=_LOOPBACK, ifalias=f"{MARK} {owner}"[:_ALIAS_BYTES].strip())
        mount(b"/proc/thread-self/ns/net", bytes(path), MS_BIND)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def enter(name: str) -> None:
    """Move this thread into the namespace. Raises FileNotFoundError if it doesn't exist."""
    fd = os.open(RUN / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _is_namespace(os.fstat(fd)):
            raise FileNotFoundError(f"{RUN / name} is a plain file, not a network namespace")
        check(libc().setns(fd, CLONE_NEWNET), f"setns {name}")
    finally:
        os.close(fd)


def enter_ours(name: str) -> bool:
    """Move this thread into the namespace; return whether it is Swarm's. False without a move if it doesn't exist."""
    with netlink_in_ours(name) as here:
        return here is not None


@contextlib.contextmanager
def netlink_in_ours(name: str) -> Iterator[Any]:
    """Move this thread into the namespace and yield a socket there; None if it doesn't exist or isn't Swarm's."""
    try:
        enter(name)
    except FileNotFoundError:
        yield None
        return
    with netlink() as here:
        yield here if _mark(here) is not None else None


def owner_of(name: str) -> str:
    """The owner stored in the mark of Swarm's namespace; '' if it has none. Moves this thread."""
    with contextlib.suppress(FileNotFoundError):
        enter(name)
        with netlink() as here:
            return _mark(here) or ""
    return ""


def _mark(here: Any) -> str | None:
    """The owner in the mark of this socket's namespace; None if it has no mark."""
    mark, _, owner = (here.link("get", index=_LOOPBACK)[0].get_attr("IFLA_IFALIAS") or "").partition(" ")
    return owner if mark == MARK else None


def remove(name: str) -> None:
    """Remove the name; the kernel removes the namespace once nothing is in it. Idempotent.

    The caller has checked that it is Swarm's. A plain file is left by a maker that was killed: it pins nothing.
    """
    path = RUN / name
    libc().umount2(bytes(path), MNT_DETACH)  # EINVAL: not mounted
    path.unlink(missing_ok=True)


def is_plain_file(name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return not _is_namespace((RUN / name).stat())
    return False


def inode(name: str) -> tuple[int, int] | None:
    """Device and inode of the namespace, as ``/proc/<pid>/ns/net`` has them; None if it doesn't exist."""
    with contextlib.suppress(FileNotFoundError):
        status = (RUN / name).stat()
        return (status.st_dev, status.st_ino) if _is_namespace(status) else None
    return None


def of_tap(pid: int, fd: int) -> tuple[int, int] | None:
    """The namespace (as in `inode`) of the tap that process ``pid`` has open as descriptor ``fd``.

    None if it isn't a tap any more. Linux 5.6 (pidfd_getfd).
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        copy = libc().syscall(_SYS_PIDFD_GETFD, process, fd, 0)
        if copy < 0:
            return None
        stack.callback(os.close, copy)
        namespace = fcntl.ioctl(copy, _SIOCGSKNS)
        stack.callback(os.close, namespace)
        status = os.fstat(namespace)
        return status.st_dev, status.st_ino
    return None


def names() -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(entry.name for entry in RUN.iterdir())
    return []


def _is_namespace(status: os.stat_result) -> bool:
    return status.st_dev == Path("/proc/self/ns/net").stat().st_dev


def _share_run_directory() -> None:
    """As iproute2 does: mounts and unmounts below /run/netns must reach the mount namespaces of other services.
    Otherwise a removed namespace would live on in them."""
    files.make_directory(RUN)
    path = bytes(RUN)
    try:
        mount(b"", path, MS_SHARED | MS_REC)
    except OSError:  # not a mount point yet
        mount(path, path, MS_BIND | MS_REC)
        mount(b"", path, MS_SHARED | MS_REC)


# --- things inside (call these in a thread that is in the namespace) --------------------------------------------------


def make_tap(name: str) -> int:
    """Create a persistent tap and return its index. The VMM opens it by name with the flags that it needs."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    finally:
        os.close(fd)
    return socket.if_nametoindex(name)


def limit_receiving(tap: str, bytes_per_second: int, burst_bytes: int) -> None:
    """Let a VM receive no more than this by its tap: what comes faster waits in a queue. Raises HostError."""
    with netlink() as here:
        index = here.link_lookup(ifname=tap)[0]
        try:
            here.tc(
                "replace", QDISC, index, root=True,
                rate=f"{8 * bytes_per_second}bit", burst=burst_bytes, limit=2 * burst_bytes,
            )  # fmt: skip
        except NetlinkError as error:
            if error.code != errno.ENOENT:
                raise
            raise HostError(
                "this host's kernel can't limit what a VM receives, which `network_mb_per_second` of the agent asks "
                "for: load its module sch_tbf, or remove the limit"
            ) from None


def await_up(socket_: Any, index: int, *, seconds: float = 5.0) -> None:
    """Wait until the kernel uses an interface that was just given a carrier.

    Until the kernel's link watch has run, the interface silently drops every packet, and a lost SYN costs a second. The
    link watch runs at once on an idle host, but later while namespaces are being torn down. (On newer kernels the
    look-up itself makes it run.)
    """
    deadline = time.monotonic() + seconds
    while True:
        link = socket_.link("get", index=index)[0]
        # A tap's device driver reports 'UNKNOWN' in between; 'UP' comes from the link watch.
        if link.get_attr("IFLA_OPERSTATE") == "UP":
            return
        if time.monotonic() > deadline:
            raise HostError(f"{link.get_attr('IFLA_IFNAME')} did not come up within {seconds:g} s: see `ip link`")
        time.sleep(0.001)


def sysctl(key: str, value: str) -> None:
    """Set a network sysctl. A key that this kernel lacks (IPv6 compiled out) is not an error."""
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net", key).write_text(value)
