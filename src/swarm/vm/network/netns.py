"""Named network namespaces, without a helper process for each.

A namespace is a property of a thread. So whatever has to happen inside one runs in a thread of its own that enters it
and ends there: no pooled thread can ever be left in the wrong place, and nothing has to come back. A netlink socket
stays in the namespace that it was opened in, so a thread that opens one before it leaves can talk to both sides.

Namespaces are pinned at ``/run/netns/<name>`` the way iproute2 does it, so ``ip netns`` sees them. Ours carry a mark
*inside* (the alias of their ``lo``), set before they get a name: what is visible and marked is Swarm's, what is
visible and not marked is not, at whatever point a maker was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import functools
import os
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from swarm.base.aio import finish_uninterrupted
from swarm.errors import HostError

T = TypeVar("T")

RUN = Path("/run/netns")
MARK = "swarm"

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_MS_BIND, _MS_REC, _MS_SHARED, _MNT_DETACH = 0x1000, 0x4000, 0x100000, 2  # linux/mount.h
_TUNSETIFF, _TUNSETPERSIST, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x400454CB, 0x0002, 0x1000  # linux/if_tun.h
_SIOCGSKNS, _SYS_PIDFD_GETFD = 0x894C, 438  # linux/sockios.h; one number on every architecture
_ALIAS_BYTES = 255  # IFALIASZ in linux/if.h, less the zero at its end
_LOOPBACK = 1  # index of lo in every namespace


async def in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a fresh thread, which may change its namespace. Waited for, also when the caller is cancelled."""
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
    """A route netlink socket in the namespace that this thread is in now; it stays there. ~0.4 ms."""
    ipr = IPRoute()
    try:
        yield ipr
    finally:
        ipr.close()


# --- names ------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def locked(*, exclusive: bool, timeout_seconds: float = 30.0) -> AsyncIterator[None]:
    """A host-wide lock between processes: on ``/run/netns`` itself, which iproute2 locks for the same purpose.

    It needs no file of its own, and an outer `unshare --mount` with its own /run/netns has its own lock.
    """
    RUN.mkdir(parents=True, exist_ok=True)
    fd = os.open(RUN, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HostError(
                        f"another process holds the lock on {RUN} for more than {timeout_seconds:g} s: "
                        f"see who with `lsof {RUN}`"
                    ) from None
                await asyncio.sleep(0.003)
        yield
    finally:
        os.close(fd)


def create(name: str, owner: str = "") -> None:
    """Move this thread into a new namespace, mark it as ours, and pin it under ``name``.

    ``owner`` is remembered in the mark, for `owner_of`. Raises FileExistsError when the name is taken.
    """
    _share_run_directory()
    path = RUN / name
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    try:
        _call(_libc().unshare(_CLONE_NEWNET), "unshare")
        with netlink() as here:
            here.link("set", index=_LOOPBACK, ifalias=f"{MARK} {owner}"[:_ALIAS_BYTES].strip())
        _call(_libc().mount(b"/proc/thread-self/ns/net", bytes(path), b"none", _MS_BIND, None), f"mount {path}")
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def enter(name: str) -> None:
    """Move this thread into the namespace. Raises FileNotFoundError when there is none of that name."""
    fd = os.open(RUN / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _is_namespace(os.fstat(fd)):
            raise FileNotFoundError(f"{RUN / name} is a plain file, not a network namespace")
        _call(_libc().setns(fd, _CLONE_NEWNET), f"setns {name}")
    finally:
        os.close(fd)


def enter_ours(name: str) -> bool:
    """Move this thread into the namespace and say if it is one of Swarm's. False (unmoved) when there is none."""
    try:
        enter(name)
    except FileNotFoundError:
        return False
    with netlink() as here:
        return _mark(here) is not None


@contextlib.contextmanager
def netlink_in_ours(name: str) -> Iterator[Any]:
    """Move this thread into the namespace, and give a socket there; None when there is none of Swarm's of that name."""
    try:
        enter(name)
    except FileNotFoundError:
        yield None
        return
    with netlink() as here:
        yield here if _mark(here) is not None else None


def owner_of(name: str) -> str:
    """What the mark of our namespace says of its owner; '' when it says nothing. Moves this thread."""
    with contextlib.suppress(FileNotFoundError):
        enter(name)
        with netlink() as here:
            return _mark(here) or ""
    return ""


def _mark(here: Any) -> str | None:
    """The owner that the namespace of this socket is marked with; None when it has no mark."""
    mark, _, owner = (here.link("get", index=_LOOPBACK)[0].get_attr("IFLA_IFALIAS") or "").partition(" ")
    return owner if mark == MARK else None


def remove(name: str) -> None:
    """Take the name away; the kernel ends the namespace when nothing is in it any more. Idempotent.

    The caller has looked that it is ours. A plain file is what a maker that was killed leaves: it pins nothing.
    """
    path = RUN / name
    _libc().umount2(bytes(path), _MNT_DETACH)  # EINVAL: not mounted
    path.unlink(missing_ok=True)


def is_plain_file(name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return not _is_namespace((RUN / name).stat())
    return False


def inode(name: str) -> tuple[int, int] | None:
    """What identifies the namespace in ``/proc/<pid>/ns/net``: device and inode."""
    with contextlib.suppress(FileNotFoundError):
        status = (RUN / name).stat()
        return (status.st_dev, status.st_ino) if _is_namespace(status) else None
    return None


def of_tap(pid: int, fd: int) -> tuple[int, int] | None:
    """Which namespace (as `inode` says) the tap lives in that descriptor ``fd`` of process ``pid`` has open.

    None when it is no tap any more. Linux 5.6 (pidfd_getfd).
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        process = os.pidfd_open(pid)
        stack.callback(os.close, process)
        copy = _libc().syscall(_SYS_PIDFD_GETFD, process, fd, 0)
        if copy < 0:
            return None
        stack.callback(os.close, copy)
        space = fcntl.ioctl(copy, _SIOCGSKNS)
        stack.callback(os.close, space)
        status = os.fstat(space)
        return status.st_dev, status.st_ino
    return None


def names() -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(entry.name for entry in RUN.iterdir())
    return []


# --- things inside (call these in a thread that is there) -------------------------------------------------------------


def make_tap(name: str) -> int:
    """Create a persistent tap here and return its index. The VMM opens it by name with the flags it likes."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    finally:
        os.close(fd)
    return socket.if_nametoindex(name)


def await_up(socket_: Any, index: int, *, seconds: float = 5.0) -> Any:
    """Wait until an interface that was just given a carrier is used by the kernel, and return it.

    Until its link watch has run it silently drops every packet, and a lost SYN costs a second. That is at once on an
    idle host, and not while namespaces are being torn down. (On newer kernels the look-up itself makes it run.)
    """
    deadline = time.monotonic() + seconds
    while True:
        link = socket_.link("get", index=index)[0]
        # A tap's device driver reports 'UNKNOWN' in between; 'UP' comes from the link watch.
        if link.get_attr("IFLA_OPERSTATE") == "UP":
            return link
        if time.monotonic() > deadline:
            raise HostError(f"{link.get_attr('IFLA_IFNAME')} did not come up within {seconds:g} s: see `ip link`")
        time.sleep(0.001)


def sysctl(key: str, value: str) -> None:
    """Set a network sysctl here. A key that this kernel does not have (IPv6 compiled out) is not an error."""
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/sys/net", key).write_text(value)


def forget_connections() -> None:
    """Drop every tracked connection here (ctnetlink: a DELETE that names nothing deletes all)."""
    nfnetlink(_NFNL_CTNETLINK, _IPCTNL_MSG_CT_DELETE, family=socket.AF_INET)


# --- netfilter's netlink, of which two messages are needed (linux/netfilter/nfnetlink.h) ------------------------------

_NFNL_CTNETLINK, _IPCTNL_MSG_CT_DELETE = 1, 2
_NFNL_NFTABLES, _NFT_MSG_GETTABLE, _NFTA_TABLE_NAME, _NFTA_TABLE_USERDATA = 10, 1, 1, 6
_NFT_MSG_GETOBJ, _NFT_MSG_GETOBJ_RESET, _NFT_OBJECT_COUNTER, _NFTA_COUNTER_PACKETS = 19, 21, 1, 2
_NFTA_OBJ_TABLE, _NFTA_OBJ_NAME, _NFTA_OBJ_TYPE, _NFTA_OBJ_DATA = 1, 2, 3, 4
_NLMSG_ERROR, _NLM_F_REQUEST, _NLM_F_ACK, _NFPROTO_INET, _NFPROTO_NETDEV = 2, 1, 4, 1, 5


def nft_comment(table: str) -> str | None:
    """Comment of the nft table ``inet <table>`` here ('' without one); None when there is no such table. ~0.1 ms."""
    named = _attribute(_NFTA_TABLE_NAME, table.encode() + b"\0")
    try:
        payload = nfnetlink(_NFNL_NFTABLES, _NFT_MSG_GETTABLE, family=_NFPROTO_INET, attributes=named)
    except FileNotFoundError:
        return None
    for kind, value in _attributes(payload[4:]):
        # Userdata is a list of (type u8, length u8, value); a table has one type, 0: the comment.
        if kind == _NFTA_TABLE_USERDATA and len(value) > 2 and value[0] == 0:
            return value[2 : 2 + value[1]].rstrip(b"\0").decode(errors="replace")
    return ""


def nft_counter(table: str, name: str, *, reset: bool = False) -> int:
    """Packets that a named counter of ``netdev <table>`` here has seen; with ``reset`` it is 0 afterwards. ~0.1 ms.

    Raises FileNotFoundError when there is none."""
    asked = (
        _attribute(_NFTA_OBJ_TABLE, table.encode() + b"\0")
        + _attribute(_NFTA_OBJ_NAME, name.encode() + b"\0")
        + _attribute(_NFTA_OBJ_TYPE, struct.pack(">I", _NFT_OBJECT_COUNTER))
    )
    message = _NFT_MSG_GETOBJ_RESET if reset else _NFT_MSG_GETOBJ
    payload = nfnetlink(_NFNL_NFTABLES, message, family=_NFPROTO_NETDEV, attributes=asked)
    counter = dict(_attributes(dict(_attributes(payload[4:]))[_NFTA_OBJ_DATA]))
    return int.from_bytes(counter[_NFTA_COUNTER_PACKETS], "big")


def nfnetlink(subsystem: int, message: int, *, family: int, attributes: bytes = b"") -> bytes:
    """One request; the payload of the first answer, or b'' for a bare acknowledgement. Raises OSError."""
    body = struct.pack("=BBH", family, 0, 0) + attributes
    header = struct.pack("=IHHII", 16 + len(body), subsystem << 8 | message, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as s:  # NETLINK_NETFILTER
        s.settimeout(5)
        s.sendto(header + body, (0, 0))
        answer = s.recv(65536)
    length, kind = struct.unpack_from("=IH", answer)
    if kind == _NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", answer, 16)
        if code:
            raise OSError(-code, os.strerror(-code))
        return b""
    return answer[16:length]


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("HH", data)
        yield kind & 0x3FFF, data[4:length]
        data = data[max(4, length + -length % 4) :]


# --- small parts ------------------------------------------------------------------------------------------------------


def explain(error: OSError | NetlinkError) -> str:
    code = error.code if isinstance(error, NetlinkError) else error.errno
    return f"{os.strerror(code)} (errno {code})" if code else str(error)


def _is_namespace(status: os.stat_result) -> bool:
    return status.st_dev == Path("/proc/self/ns/net").stat().st_dev


def _share_run_directory() -> None:
    """As iproute2 does: mounts and unmounts below /run/netns must reach the mount namespaces of other services, or a
    removed namespace would live on in them."""
    RUN.mkdir(parents=True, exist_ok=True)
    libc, path = _libc(), bytes(RUN)
    if libc.mount(b"", path, b"none", _MS_SHARED | _MS_REC, None) == 0:
        return
    _call(libc.mount(path, path, b"none", _MS_BIND | _MS_REC, None), f"bind {RUN}")
    _call(libc.mount(b"", path, b"none", _MS_SHARED | _MS_REC, None), f"share {RUN}")


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p)
    libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
    return libc


def _call(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
