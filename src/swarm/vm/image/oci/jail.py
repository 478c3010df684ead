"""Runs a program that reads a hostile image, with nothing of the host in sight but what it needs: /usr, read-only.

``python -m swarm.vm.image.oci.jail SPEC PROGRAM …``, started by `unshare` in namespaces of its own, mounts among them.
SPEC, a `Spec` as JSON, says what it sees besides. It is root, since it makes files of all owners, with the few
capabilities that this takes, and no file that it writes is larger than ``fsize`` bytes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from swarm.base import privileges
from swarm.base.libc import (
    CLONE_NEWNET,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REMOUNT,
    check,
    libc,
    mount,
    pivot_root,
)

# linux/capability.h: of other owners' files (chown, dac_override, dac_read_search, fowner, fsetid), device nodes
# (mknod), and capabilities of files (setfcap).
FILES: Final = frozenset({0, 1, 2, 3, 4, 27, 31})
# What a program needs besides that starts containers: kill, setgid, setuid, setpcap, net_bind_service, net_admin,
# sys_chroot, sys_admin, sys_resource.
CONTAINERS: Final = FILES | {5, 6, 7, 8, 10, 12, 18, 21, 24}
_SYSTEM: Final = ("usr", "bin", "sbin", "lib", "lib64", "lib32", "libx32")
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty", "net/tun")
_ETC: Final = ("containers", "ssl", "resolv.conf", "hosts", "nsswitch.conf", "passwd", "group")
_MODULE: Final = "swarm.vm.image.oci.jail"
NETWORK: Final = "/run/network"  # the namespace of a build's programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """``stage``: its /stage, which it can write to. ``shown``: files and directories of the host, and where it sees
    them, read-only. ``builds``: it starts containers, keeps them in that directory, its /builds, and has the host's
    network; theirs is another one, `NETWORK`, which leads out if ``leads_out``, but not to this host's loopback."""

    stage: str
    shown: Sequence[tuple[str, str]] = ()
    fsize: int
    builds: str = ""
    leads_out: bool = False

    def argv(self, program: Sequence[str]) -> list[str]:
        """As root, from anywhere."""
        return [
            "unshare", "--mount", *([] if self.builds else ["--net"]), "--ipc", "--uts", "--pid", "--fork",
            "--kill-child", "--", sys.executable, "-E", "-s", "-m", _MODULE, json.dumps(asdict(self)), *program,
        ]  # fmt: skip


def main(told: str, *program: str) -> None:
    spec = Spec(**json.loads(told))
    root = Path(spec.stage, "jail")
    root.mkdir(exist_ok=True)
    mount(b"tmpfs", os.fsencode(root), MS_NOSUID | MS_NODEV, kind=b"tmpfs", data=b"size=1m,mode=755")
    for name in _SYSTEM:
        place = Path("/", name)
        if place.is_symlink():
            (root / name).symlink_to(place.readlink())
        elif place.is_dir():
            _bind(place, root / name, MS_RDONLY | MS_NOSUID | MS_NODEV)
    shown = [(Path(source), target) for source, target in spec.shown]
    if spec.builds:
        shown += [(place, str(place)) for name in _ETC if (place := Path("/etc", name)).exists()]
    for source, target in shown:
        _bind(source, root / target.lstrip("/"), MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _bind(Path(spec.stage), root / "stage", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    proc = MS_NOSUID | MS_NODEV | MS_NOEXEC | (0 if spec.builds else MS_RDONLY)
    (root / "proc").mkdir()
    mount(b"proc", os.fsencode(root / "proc"), proc, kind=b"proc")
    if spec.builds:
        _place_of_builds(root, Path(spec.builds))
    os.chdir(root)
    pivot_root()
    os.chdir("/")
    limits = {resource.RLIMIT_FSIZE: spec.fsize, resource.RLIMIT_CORE: 0}
    if not spec.builds:
        limits[resource.RLIMIT_DATA] = 4 << 30
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    privileges.keep(CONTAINERS if spec.builds else FILES)
    if spec.builds:
        _network(leads_out=spec.leads_out)
    os.umask(0o022 if spec.builds else 0)  # modes are the image's
    os.execv(program[0], program)


def _bind(source: Path, target: Path, flags: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir()
    else:
        target.touch()
    mount(os.fsencode(source), os.fsencode(target), MS_BIND)  # without what is mounted below it
    mount(None, os.fsencode(target), MS_REMOUNT | MS_BIND | flags)


# --- builds -----------------------------------------------------------------------------------------------------------


def _place_of_builds(root: Path, builds: Path) -> None:
    """The devices and directories that buildah and crun look for. What is in memory, secrets too, ends with the build:
    buildah keeps the files of a container that runs in a directory beside its layers."""
    for name in _DEVICES:
        if Path("/dev", name).exists():
            _bind(Path("/dev", name), root / "dev" / name, MS_NOSUID | MS_NOEXEC)
    _bind(builds, root / "builds", MS_NOSUID | MS_NODEV)
    for name in ("run", "tmp", "var/tmp", "sys/fs/cgroup", "builds/overlay-containers", "builds/vfs-containers"):
        (root / name).mkdir(parents=True, exist_ok=True)
        mount(b"tmpfs", os.fsencode(root / name), MS_NOSUID | MS_NODEV, kind=b"tmpfs", data=b"size=1g,mode=700")


def _network(*, leads_out: bool) -> None:
    """Make the namespace that programs of the build join, and lead it out by slirp4netns, which ends with us."""
    with open("/proc/self/ns/net") as host:
        check(libc().unshare(CLONE_NEWNET), "unshare")
        Path(NETWORK).touch()
        mount(b"/proc/self/ns/net", NETWORK.encode(), MS_BIND)
        check(libc().setns(host.fileno(), CLONE_NEWNET), "setns")
    if not leads_out:
        return
    ready, told = os.pipe()
    options = ["--configure", "--mtu=65520", "--disable-host-loopback", "--enable-seccomp", f"--ready-fd={told}"]
    argv = ["slirp4netns", *options, "--netns-type=path", NETWORK, "tap0"]
    with Path("/stage/slirp4netns.log").open("wb") as log:
        subprocess.Popen(argv, stdout=log, stderr=log, pass_fds=[told])
    os.close(told)
    if not os.read(ready, 1):
        sys.exit(f"slirp4netns: {Path('/stage/slirp4netns.log').read_text()}")
    os.close(ready)


if __name__ == "__main__":
    main(*sys.argv[1:])
