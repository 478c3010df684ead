"""What QEMU can see and do of the host, looked at from outside, and tried from inside by a program in its place."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import signal
import sys
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.base import process
from swarm.base.libc import libc
from swarm.config import Settings
from swarm.errors import HostError
from swarm.vm.driver import BASE_UID, OOM_SCORE, Image, Vm
from swarm.vm.drivers import cgroups, confine, jailer, qemu
from swarm.vm.drivers.jailer import JailFile
from swarm.vm.network import netns
from tests.vm.drivers.test_drivers import Host, Way, inside, qemu_way

pytestmark = pytest.mark.needs("qemu")

UID = BASE_UID + 4242


@pytest.fixture(scope="module")
def way(settings: Settings, image: Image) -> Way:
    return asyncio.run(qemu_way(settings, image, restored=True))


@asynccontextmanager
async def started(way: Way, how: str) -> AsyncIterator[tuple[Vm, Path, str]]:
    """A VM's QEMU that has answered; its directory and its network namespace."""
    host = Host(replace(way, template=way.template if how == "restored" else None))
    async with host.place() as (place, slot):
        assert slot
        if how == "template":
            vm = await way.driver.boot(way.spec, slot, place, for_template=True, token=secrets.token_bytes(32))
        else:
            vm = await host.way.start(place, slot, token=secrets.token_bytes(32))
        groups = groups_of(vm.pid)
        try:
            yield vm, place, slot.netns
        finally:
            await vm.kill()
        assert inside(place) == []
        assert [group for group in groups if group.exists()] == []


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def spaces(pid: int | str) -> dict[str, int]:
    return {name: Path(f"/proc/{pid}/ns/{name}").stat().st_ino for name in ("mnt", "pid", "ipc", "uts", "net")}


@pytest.mark.parametrize("how", ["booted", "template", "restored"])
async def test_qemu_has_nothing_of_the_host_around_it(way: Way, how: str) -> None:
    ours = spaces("self")
    async with started(way, how) as (vm, place, space), started(way, how) as (other, _, _):
        pid = vm.pid
        said = status(pid)
        assert said["Name"].startswith("qemu-system")
        assert said["NSpid"].split()[-1] == "1", "it is the first process of a namespace of its own"
        its, others = spaces(pid), spaces(other.pid)
        assert [name for name in ours if its[name] in (ours[name], others[name])] == []
        inside_ = netns.inode(space)
        assert inside_
        assert its["net"] == inside_[1]

        assert len(said["Uid"].split()) == 4
        assert len({*said["Uid"].split(), *said["Gid"].split()}) == 1
        assert int(said["Uid"].split()[0]) > BASE_UID
        assert said["Groups"].strip() == ""
        assert {said[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
        assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == OOM_SCORE
        limits = Path(f"/proc/{pid}/limits").read_text()
        file_bytes = max(way.spec.disk_mb, way.spec.memory_mb) << 20
        for name, value in (("core file size", 0), ("file size", file_bytes), ("open files", 256), ("processes", 512)):
            assert re.search(rf"Max {name}\s+{value}\s+{value}\s", limits), limits

        # QEMU's own memory, and no more threads than its disks may use; 0 groups only where the host has none to give.
        groups = groups_of(pid)
        assert len(groups) == len({"memory", "pids"} & set(cgroups.usable()[1])) or cgroups.usable()[0] == 2
        for file, least, most in LIMITS:
            for group in groups:
                if (group / file).exists():
                    assert least < int((group / file).read_text()) < most
        assert {group.name for group in groups}.isdisjoint(group.name for group in groups_of(other.pid))

        root = Path(f"/proc/{pid}/root")
        allowed = {str(path) for path in await files_of(qemu.root_of("tcg"))}
        seen = {"/" + str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or path.is_symlink()}
        beside = {path for path in seen if not any(path == one or path.startswith(f"{one}/") for one in allowed)}
        assert beside == {"/kernel", "/initramfs", "/memory"}
        assert {path.name for path in (root / "dev").iterdir()} == {"urandom"}
        mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        assert {mount[mount.index("-") + 1] for mount in mounts}.isdisjoint({"proc", "sysfs", "cgroup", "cgroup2"})
        writable = {mount[4] for mount in mounts if "ro" not in mount[5].split(",")}
        assert writable <= {"/memory"}
        assert all("nosuid" in mount[5] for mount in mounts)
        assert Path(f"/proc/{pid}/environ").read_bytes() == b""
        assert str(place) not in Path("/proc/self/mountinfo").read_text(), "the host sees none of its mounts"


LIMITS = [
    ("memory.limit_in_bytes", 256 << 20, 640 << 20), ("memory.max", 256 << 20, 640 << 20), ("pids.max", 16, 128),
]  # fmt: skip


def groups_of(pid: int) -> list[Path]:
    """The control groups of Swarm's that a process is in."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    places = [Path("/sys/fs/cgroup", controllers, path.lstrip("/")) for _, controllers, path in lines]
    return [place for place in places if place.parent.name == cgroups.PARENT]


async def files_of(root: confine.Root) -> set[Path]:
    programs = (process.path_of("setpriv"), process.path_of("prlimit"), *root.programs)
    linked = await process.run(["ldd", *map(str, programs)])
    libraries = {Path(word) for word in linked.stdout.decode().split() if word.startswith("/") and ":" not in word}
    return {*programs, *root.files, *libraries, *(Path("/dev", name) for name in root.devices)}


async def test_a_dead_owners_groups_are_swept(way: Way) -> None:
    async with started(way, "restored") as (vm, place, _):
        groups = groups_of(vm.pid)
        os.kill(vm.pid, signal.SIGKILL)
        await vm.wait()
        assert [group for group in groups if not group.exists()] == []
        jailer.remove(place)  # as swarm.vm.slots.sweep does
        assert [group for group in groups if group.exists()] == []
        jailer.remove(place)


# --- a program in QEMU's place ----------------------------------------------------------------------------------------

HIJACKED = """
import ctypes, json, os, socket, subprocess, sys

secret, other, setuid = sys.argv[1:]
said = {}

def attempt(name, what):
    try:
        said[name] = what()
    except BaseException as error:
        said[name] = type(error).__name__

def run(path):
    return subprocess.run([path, "-u"], capture_output=True).stdout.decode().strip()

attempt("secret", lambda: open(secret).read())
attempt("other", lambda: os.listdir(other))
attempt("passwd", lambda: open("/etc/passwd").read())
attempt("root", lambda: sorted(os.listdir("/")))
attempt("up", lambda: sorted(os.listdir("/../..")))
attempt("proc", lambda: os.listdir("/proc"))
attempt("me", os.getpid)
attempt("parent", os.getppid)
attempt("others", lambda: os.kill(-1, 0))
attempt("host name", socket.gethostname)
attempt("interfaces", lambda: [name for _, name in socket.if_nameindex()])
attempt("setuid", lambda: run(setuid))
attempt("own setuid", lambda: run("/memory"))
attempt("write", lambda: open(setuid, "w"))
attempt("make", lambda: open("/made", "w"))
attempt("become root", lambda: os.setuid(0))
attempt("unlimited", lambda: __import__("resource").setrlimit(7, (1024, 1024)))
libc = ctypes.CDLL(None, use_errno=True)
attempt("unshare", lambda: libc.unshare(0x20000))
attempt("mount", lambda: libc.mount(b"none", b"/dev", b"tmpfs", 0, None))
attempt("shared memory", lambda: libc.shmget(0x5357, 0, 0))
print(json.dumps(said))
"""


async def hijacked(tmp_path: Path, settings: Settings) -> dict[str, object]:
    """What a Python says that was started with QEMU's root, as QEMU is."""
    secret, other, log = tmp_path / "secret", tmp_path / "other-vm", tmp_path / "log"
    secret.write_text("x")
    other.mkdir()
    for path in (secret, other):
        path.chmod(0o777)
    setuid, own = tmp_path / "id", tmp_path / "own"
    for path in (setuid, own):
        shutil.copy(process.path_of("id"), path)
        path.chmod(0o4755)
    python = Path(sys.executable).resolve()
    stdlib = Path(sysconfig.get_path("stdlib"))
    root = replace(
        qemu.root_of("tcg"),
        programs=(*qemu.root_of("tcg").programs, python, setuid, *(stdlib / "lib-dynload").glob("_ctypes.*.so")),
        files=(*qemu.root_of("tcg").files, stdlib),
    )
    child = await confine.spawn(
        [str(python), "-I", "-S", "-B", "-c", HIJACKED, str(secret), str(other), str(setuid)],
        root=root,
        own=[JailFile("memory", own, writable=True)],
        space=None,
        uid=UID,
        groups=(),
        file_bytes=1 << 20,
        output=log,
        pass_fds=(),
        outlive=False,
    )
    assert await child.wait() == 0, log.read_text()
    said = json.loads(log.read_text())
    assert isinstance(said, dict)
    return said


async def test_a_program_in_qemus_place_gets_nowhere(tmp_path: Path, settings: Settings) -> None:
    segment = Segment()
    try:
        said = await hijacked(tmp_path, settings)
    finally:
        segment.remove()
    top = {path.parts[1] for path in tmp_path.parents if len(path.parts) > 1}
    assert {said[name] for name in ("secret", "other", "passwd", "proc")} == {"FileNotFoundError"}
    assert isinstance(said["root"], list)
    assert set(said["root"]) - top <= {"bin", "dev", "etc", "lib", "lib64", "usr", "kernel", "initramfs", "memory"} | {
        Path(sys.base_prefix).parts[1]
    }
    assert said["up"] == said["root"], "there is nothing above its root"
    assert (said["me"], said["parent"], said["others"]) == (1, 0, "ProcessLookupError")
    assert said["host name"] == "vm"
    assert said["interfaces"] == ["lo"]
    assert said["setuid"] == str(UID)
    assert said["own setuid"] == "PermissionError"
    assert {said["write"], said["make"]} == {"OSError"}, "read-only"
    assert said["become root"] == "PermissionError"
    assert said["unlimited"] == "ValueError"
    assert (said["unshare"], said["mount"], said["shared memory"]) == (-1, -1, -1)


class Segment:
    """System V shared memory of the host that everybody may use."""

    def __init__(self) -> None:
        self._id = libc().shmget(0x5357, 4096, 0o1666)
        assert self._id >= 0
        assert libc().shmget(0x5357, 0, 0) == self._id

    def remove(self) -> None:
        libc().shmctl(self._id, 0, None)


async def test_the_thread_that_starts_vmms_comes_back(tmp_path: Path, settings: Settings) -> None:
    """Also after a start that failed half-way: the next one finds the host's files and namespaces."""
    before = spaces("self")
    with pytest.raises(HostError, match=r"apart from the host: .*nothing-there"):
        await confine.spawn(
            ["x"],
            root=qemu.root_of("tcg"),
            own=[JailFile("kernel", tmp_path / "nothing-there")],
            space=None, uid=UID, groups=(), file_bytes=0, output=tmp_path / "log", pass_fds=(), outlive=False,
        )  # fmt: skip
    with pytest.raises(HostError, match="move_mount /unknown"):
        await confine.spawn(
            ["x"],
            root=qemu.root_of("tcg"),
            own=[JailFile("unknown", tmp_path)],
            space=None, uid=UID, groups=(), file_bytes=0, output=tmp_path / "log", pass_fds=(), outlive=False,
        )  # fmt: skip
    await hijacked(tmp_path, settings)
    tasks = [Path("/proc/self/task", tid, "ns") for tid in os.listdir("/proc/self/task")]  # noqa: PTH208
    assert [str(task) for task in tasks if {n: (task / n).stat().st_ino for n in before} != before] == []
