"""What VMs need of a host and a container, or a host without it, may lack: told before the first VM is made.

Nothing here changes anything, and all of it together takes less than a millisecond.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from swarm.base.process import which
from swarm.errors import HostError
from swarm.vm.driver import BASE_UID

# linux/capability.h. The VMM itself runs with none.
_CAPABILITIES = {
    12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN", 7: "CAP_SETUID", 6: "CAP_SETGID", 5: "CAP_KILL", 0: "CAP_CHOWN",
}  # fmt: skip
_LAST_UID = BASE_UID + 65_533  # of the last slot
_TUN = Path("/dev/net/tun")
_SYSCTL = Path("/proc/sys/net/ipv4/ip_forward")
# That make a VM: program -> its Debian package. (A driver's own programs are the driver's matter.)
_PROGRAMS = {"nft": "nftables", "nsenter": "util-linux", "setpriv": "util-linux", "mkfs.ext4": "e2fsprogs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """``fix``: what to do about it."""

    what: str
    fix: str


def check() -> None:
    """Raises HostError that names everything that is missing, and what to do."""
    if found := told():
        raise HostError(f"this host can't run VMs: {found}")


def told() -> str:
    """What is missing, and what to do about each; '' if nothing is."""
    found = [lack for judge in (*CHECKS.values(), _programs) if (lack := judge())]
    return "; ".join(f"{lack.what} ({lack.fix})" for lack in found)


def _rights() -> Lack | None:
    effective = int(re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.M)[1], 16)  # type: ignore[index]
    missing = ", ".join(name for bit, name in _CAPABILITIES.items() if not effective >> bit & 1)
    if not missing:
        return None
    what = f"VMs and namespaces can't be made without {missing}"
    if os.geteuid() != 0:
        return Lack(what=what, fix="run it as root: sudo swarm …")
    return Lack(what=what, fix="give them to this container or service (--cap-add, CapabilityBoundingSet)")


def _uids() -> Lack | None:
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if any(first <= BASE_UID and first + count > _LAST_UID for first, _, count in ranges):
        return None
    known = ", ".join(f"{first} to {first + count - 1}" for first, _, count in ranges)
    return Lack(
        what=f"VMM processes have uids from {BASE_UID} on, and this user namespace has only {known or 'none'}",
        fix=f"run it outside a user namespace, or map the uids and gids {BASE_UID} to {_LAST_UID} too",
    )


def _tun() -> Lack | None:
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Lack(
            what=f"{_TUN} can't be opened: {error.strerror}",
            fix="`modprobe tun`; a container needs the device, as with --device /dev/net/tun",
        )
    return None


def _sysctls() -> Lack | None:
    if os.access(_SYSCTL, os.W_OK):
        return None
    why = "read-only" if os.statvfs("/proc/sys").f_flag & os.ST_RDONLY else "not writable"
    return Lack(
        what=f"/proc/sys is {why}, so a VM's namespace can't be made to forward packets",
        fix="`mount -o remount,rw /proc/sys`; without ProtectKernelTunables in a service, with --privileged in Docker",
    )


def _programs() -> Lack | None:
    missing = {name: package for name, package in _PROGRAMS.items() if which(name) is None}
    if not missing:
        return None
    install = f"apt-get install --no-install-recommends {' '.join(sorted(set(missing.values())))}"
    return Lack(what=f"no program {', '.join(missing)}", fix=install)


CHECKS: Mapping[str, Callable[[], Lack | None]] = {
    "rights": _rights,
    "uids": _uids,
    str(_TUN): _tun,
    "/proc/sys": _sysctls,
}
