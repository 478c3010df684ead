"""Hosts that lack something, with real VMs: a ticket runs all the same, or command and doctor say what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.base.process import which
from swarm.config import Settings
from swarm.errors import HostError
from swarm.vm.driver import Image
from swarm.vm.network.network import Network

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.slow]  # starts programs
BIN = Path(sys.executable).parent


class Host:
    """Commands at a home with the image; ``within`` is a command that prepares the state of the host."""

    def __init__(self, settings: Settings, state: Path) -> None:
        self._env = os.environ | {
            "SWARM_HOME": str(settings.home),
            "SWARM_STATE_DIR": str(state),
            "SWARM_IMAGES_DIR": str(settings.images),
            "SWARM_DRIVER": "qemu",
        }

    def run(self, *argv: str, within: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*within, str(BIN / argv[0]), *argv[1:]], check=False, capture_output=True, text=True, timeout=300,
            env=self._env | env, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done

    def ticket(self, id: str) -> None:
        done = self.run("swarm", "ticket", "add", "t", "--agent", "echo", "--id", id, "--input", "name=x")
        assert done.returncode == 0, done.stderr

    def state(self, id: str) -> str:
        return str(json.loads(self.run("swarm", "ticket", "show", id, "--json").stdout)["ticket"]["state"])

    def doctor(self, within: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
        return {c["name"]: c for c in json.loads(self.run("swarm", "doctor", "--json", within=within).stdout)}


@pytest.fixture(scope="module")
def host(settings: Settings, image: Image) -> Host:
    return Host(settings, settings.state_dir)


def mounted(script: str) -> tuple[str, ...]:
    """A command with mounts of its own."""
    return ("unshare", "--mount", "--", "sh", "-ec", f'{script}\nexec "$@"', "sh")


# The user namespace of an unprivileged container: ids from 65,536 on don't exist. (unshare needs newuidmap for this.)
_LXC = """
import ctypes, os, sys
ready, mapped = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    assert ctypes.CDLL(None).unshare(0x10000000 | 0x00020000 | 0x40000000) == 0  # user, mount, net
    os.write(ready[1], b"x")
    os.read(mapped[0], 1)
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(ready[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{pid}/{name}", "w") as file:
        file.write("0 0 65536")
os.write(mapped[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
NO_TUN = mounted("mount -t tmpfs none /dev/net")
READ_ONLY_PROC_SYS = mounted("mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys")
LACKING = {
    "no /dev/net/tun": (NO_TUN, "/dev/net/tun", "/dev/net/tun can't be opened: No such file"),
    "/dev/net/tun is no device": (
        mounted("mount -t tmpfs -o nodev none /dev/net; mknod /dev/net/tun c 10 200"), "/dev/net/tun", "can't be opened"
    ),
    "read-only /proc/sys": (READ_ONLY_PROC_SYS, "/proc/sys", "/proc/sys is read-only"),
    "without CAP_NET_ADMIN": (
        ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"), "rights", "without CAP_NET_ADMIN"
    ),
    "65,536 ids": ((sys.executable, "-c", _LXC), "uids", "this user namespace has only 0 to 65535"),
    "no nft": (mounted('mount --bind /etc/passwd "$(command -v nft)"'), "program nft", "nft"),
    "no ext4 tools": (mounted('mount --bind /etc/passwd "$(command -v mkfs.ext4)"'), "program mkfs.ext4", "mkfs.ext4"),
}  # fmt: skip


@pytest.fixture
def short(settings: Settings) -> Iterator[Path]:
    """A directory with a short path, for Unix sockets below it."""
    with tempfile.TemporaryDirectory(dir=settings.state_dir.parent, prefix="s") as place:
        yield Path(place)


@pytest.fixture(scope="module")
def waiting(host: Host) -> str:
    host.ticket("waits-for-the-host")
    return "waits-for-the-host"


@pytest.mark.parametrize(("within", "check", "says"), LACKING.values(), ids=LACKING)
def test_what_is_missing_is_said_before_the_first_vm(
    host: Host, waiting: str, within: tuple[str, ...], check: str, says: str
) -> None:
    """By the command, with what to do, and by the doctor. The ticket is not touched."""
    found = host.doctor(within)[check]
    assert found["status"] == "fail" and found["fix"]
    if check not in found["detail"] and not check.startswith("program"):
        assert says in found["detail"]
    done = host.run("swarm-engine", "run-ticket", waiting, "--wait", within=within)
    assert done.returncode == 1 and done.stderr.startswith("error: this host can't run VMs: "), done.stderr
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert host.state(waiting) == "ready"


def test_the_ticket_runs_once_the_host_has_what_was_missing(host: Host, waiting: str) -> None:
    assert host.run("swarm-engine", "run-ticket", waiting, "--wait").returncode == 0
    assert host.state(waiting) == "done"


def test_qemu_behind_a_link(host: Host, tmp_path: Path) -> None:
    """As /usr/local/bin and Nix profiles have it: its modules are beside the file, not beside the link."""
    (tmp_path / "qemu-system-x86_64").symlink_to(str(which("qemu-system-x86_64")))
    host.ticket("linked")
    done = host.run("swarm-engine", "run-ticket", "linked", "--wait", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_vm_that_was_started_with_private_mounts(host: Host) -> None:
    """As by a service with PrivateTmp or ProtectSystem: the name of the VM's namespace was in the mounts of that
    service only, and is gone with them. All the rest of its path is looked at, and is well."""
    done = host.run("swarm-spawn-ns", "3", within=mounted("mount --make-rprivate /"))
    assert done.returncode == 0, done.stderr
    try:
        checks = {name: check for name, check in host.doctor().items() if name.startswith("VM 3: ")}
        namespace = checks.pop("VM 3: namespace")
        assert namespace["status"] == "warn" and "gone with the mounts it was in" in namespace["detail"]
        assert len(checks) == 9 and {check["status"] for check in checks.values()} == {"ok"}, checks
    finally:
        assert host.run("swarm", "vm", "rm", "3").returncode == 0


def test_a_vm_made_under_umask_0(settings: Settings, image: Image, short: Path) -> None:
    """Nobody else can change what later VMs are made of."""
    host = Host(settings, short / "state")
    host.ticket("umask")
    templates = str(short / "templates")  # its own, so that one is made here
    done = host.run(
        "swarm-engine", "run-ticket", "umask", "--wait", within=mounted("umask 0"), SWARM_TEMPLATES_DIR=templates
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = {
        name: (Path(root) / name).lstat().st_mode
        for root, directories, names in os.walk(short)
        for name in (*directories, *names)
        if Path(root).stat().st_mode & 0o011  # what is in others is out of reach
    }
    assert "blank" in made and not [name for name, mode in made.items() if mode & 0o022]


def shell(script: str) -> None:
    """In the sandbox's own mounts, which an engine that runs sees too."""
    subprocess.run(["sh", "-ec", script], check=True)


GOES_AWAY = {
    "/dev/net/tun": ("mount -t tmpfs none /dev/net", "umount /dev/net", "/dev/net/tun can't be opened.*modprobe tun"),
    "/proc/sys": (
        "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys",
        "umount /proc/sys",
        "/proc/sys is read-only.*remount,rw",
    ),
    "nft": (
        f"mount --bind /etc/passwd {which('nft')}", f"umount {which('nft')}", "the program 'nft' is not installed"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("go", "come", "says"), GOES_AWAY.values(), ids=GOES_AWAY)
async def test_a_slot_says_what_went_away_and_is_made_when_it_is_back(
    network: Network, go: str, come: str, says: str
) -> None:
    await network.ensure_host()
    shell(go)
    try:
        with pytest.raises(HostError, match=says):
            await network.create(5)
    finally:
        shell(come)
    assert [slot.n for slot in await network.list()] == []
    await network.create(5)


@pytest.mark.needs("cc")
def test_a_kernel_without_ipv6(host: Host, tmp_path: Path) -> None:
    shim = tmp_path / "without_ipv6.so"
    source = Path(__file__).with_name("without_ipv6.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl"], check=True)
    host.ticket("no-ipv6")
    done = host.run("swarm-engine", "run-ticket", "no-ipv6", "--wait", LD_PRELOAD=str(shim))
    assert done.returncode == 0, done.stdout + done.stderr
