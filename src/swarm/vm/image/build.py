"""Building an image: the parts of a guest, made of the distribution's packages and our own guest files.

There are two steps, because they change at different speeds. The *base* (base.py) is expensive and needs the network: a
Debian root file system and a kernel. The *image* is cheap and needs no network: our guest files are laid over the base,
then one erofs and one initramfs are written. Bases are kept in a cache of their own, so a changed agentd costs seconds.
The same base and the same guest files give the same bytes (tested).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from swarm.base import process
from swarm.base.aio import finish_uninterrupted
from swarm.base.files import make_directory, mounted
from swarm.base.progress import Progress
from swarm.errors import CommandFailed, HostError, ImageError
from swarm.vm.image import kernel
from swarm.vm.image.staging import digest_of

# Raise it when the code below makes a different image of the same packages and guest files.
BUILDER_VERSION: Final = 1
# Every time stamp in an image (2023-11-14). Python's compiled files contain it, so there must be one.
EPOCH: Final = 1_700_000_000
# libstdc++6: most compiled wheels (numpy, pandas) and Node need it, and no Python package says so.
PACKAGES: Final = (
    "busybox-static", "ca-certificates", "iproute2", "libpython3-stdlib", "libstdc++6", "mount", "openssh-server",
    "python3-minimal", "tzdata",
)  # fmt: skip
# Modules that a guest's kernel needs; their dependencies are resolved, and built-in ones skipped.
MODULES: Final = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "overlay", "erofs", "ext4")
# Modules that its kernel loads when something needs them, and no others (docs/guest.md names what they are for).
ON_DEMAND: Final = (
    "fuse", "cuse", "loop", "squashfs", "isofs", "vfat", "nls_ascii", "nls_cp437", "nls_iso8859_1", "nls_utf8",
    "binfmt_misc",
    "tun", "veth", "bridge", "br_netfilter", "8021q", "dummy", "ifb", "ipvlan", "macvlan", "vxlan", "wireguard",
    "sch_htb", "sch_ingress", "sch_netem", "sch_prio", "sch_tbf", "act_mirred", "act_police", "cls_fw",
    "cls_matchall", "cls_u32",
    "nf_tables", "nft_chain_nat", "nft_compat", "nft_connlimit", "nft_ct", "nft_dup_netdev", "nft_fib_inet",
    "nft_fib_ipv4", "nft_fib_ipv6", "nft_fwd_netdev", "nft_hash", "nft_limit", "nft_log", "nft_masq", "nft_nat",
    "nft_numgen", "nft_objref", "nft_queue", "nft_quota", "nft_redir", "nft_reject_inet", "nft_reject_ipv4",
    "nft_reject_ipv6", "nft_socket", "nft_tproxy", "nf_conntrack_netlink", "nf_log_syslog", "nfnetlink_log",
    "ip_set_hash_ip", "ip_set_hash_net", "ipt_REJECT", "ip6t_REJECT", "xt_CHECKSUM", "xt_CT", "xt_LOG",
    "xt_MASQUERADE", "xt_NFLOG", "xt_REDIRECT", "xt_TCPMSS", "xt_addrtype", "xt_comment", "xt_connmark",
    "xt_conntrack", "xt_hashlimit", "xt_iprange", "xt_length", "xt_limit", "xt_mac", "xt_mark", "xt_multiport",
    "xt_nat", "xt_owner", "xt_physdev", "xt_pkttype", "xt_recent", "xt_set", "xt_state", "xt_statistic",
    "xt_string", "xt_tcpmss", "xt_tcpudp", "xt_time",
)  # fmt: skip
# The kernel's own arguments: a guest that breaks ends at once, and self-tests of ciphers are skipped (0.4 s of 2.8
# without KVM). The driver adds those for console and devices.
BOOT_ARGS: Final = "quiet panic=-1 oops=panic cryptomgr.notests"
NO_INITRAMFS_ARGS: Final = "root=/dev/vda rootfstype=erofs ro init=/sbin/swarm-init"

_EROFS_UUID: Final = "5a7a0000-0000-4000-8000-000000000001"
_NEEDED_BYTES: Final = 1 << 30
_TOOLS: Final = {
    "mmdebstrap": "mmdebstrap", "mkfs.erofs": "erofs-utils", "apt-get": "apt", "dpkg-deb": "dpkg", "tar": "tar",
    "unshare": "util-linux", "setpriv": "util-linux",
}  # fmt: skip
# Our own files (src/swarm/guest) and their places in the guest's root.
GUEST_FILES: Final = {
    "init": "usr/sbin/swarm-init",
    "fstab": "usr/lib/swarm/fstab",
    "agentd.py": "usr/lib/swarm/agentd.py",
    "interpreter.py": "usr/lib/swarm/interpreter.py",
    "sshd_config": "etc/ssh/sshd_config",
    "initramfs-init": "",  # in the initramfs instead
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides an image's content, known before it is built; ``key`` is its digest.

    Files are read once, here, so that an edit during a build can't get into a part of the image.
    """

    base: Mapping[str, Any]
    guest: Mapping[str, bytes]  # file name -> content
    kernel: bytes | None  # the user's own
    boot_args: str

    @property
    def base_key(self) -> str:
        return digest_of(self.base)

    @property
    def guest_digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.guest.items()}

    @property
    def key(self) -> str:
        own = None if self.kernel is None else hashlib.sha256(self.kernel).hexdigest()
        return digest_of(
            {"base": self.base_key, "guest": self.guest_digests, "kernel": own, "boot_args": self.boot_args}
        )


def recipe(guest: Path, *, kernel: Path | None = None, boot_args: str | None = None) -> Recipe:
    """The recipe for this host and the guest files in ``guest``. Raises ImageError if Swarm can't build guests here."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    if release.get("ID") != "debian" or not release.get("VERSION_CODENAME"):
        raise ImageError(
            "images are built from Debian's packages, on Debian; this is "
            f"{release.get('PRETTY_NAME', 'another system')}. Build on a Debian host and copy its images directory here"
        )
    if platform.machine() != "x86_64":
        raise ImageError(f"images are built for x86_64 only, and this is {platform.machine()}")
    try:
        files = {name: (guest / name).read_bytes() for name in GUEST_FILES}
        own = kernel.read_bytes() if kernel else None
    except OSError as error:
        raise ImageError(f"can't read {error.filename}: {error.strerror}") from error
    args = boot_args if boot_args is not None else BOOT_ARGS
    return Recipe(
        base={
            "builder": BUILDER_VERSION,
            "distribution": "debian",
            "release": release["VERSION_CODENAME"],
            "architecture": "amd64",
            "packages": PACKAGES,
            "kernel_package": "linux-image-cloud-amd64",
            "modules": MODULES,
            "on_demand": ON_DEMAND,
        },
        guest=files,
        kernel=own,
        boot_args=args if own is None else f"{args} {NO_INITRAMFS_ARGS}",
    )


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise HostError(f"building {what} needs root, to set the owners of its files: run this as root")


def check_host(*, for_base: bool, where: Path) -> None:
    """Raises HostError or ImageError, before anything is done, if a build can't succeed here."""
    tools = _TOOLS if for_base else {t: _TOOLS[t] for t in ("mkfs.erofs", "tar", "setpriv")}
    require("an image", tools, where, setting="XDG_CACHE_HOME" if for_base else "SWARM_IMAGES_DIR")


def require(what: str, tools: Mapping[str, str], where: Path, *, setting: str = "SWARM_IMAGES_DIR") -> None:
    """``tools``: program -> its Debian package. Raises HostError if one is missing or nothing can run in ``where``,
    which ``setting`` chooses; ImageError without 1 GB free there."""
    if missing := sorted({package for tool, package in tools.items() if process.which(tool) is None}):
        raise HostError(f"building {what} needs programs that are missing here: apt-get install {' '.join(missing)}")
    if options := mounted(where, "ro", "noexec", "nodev"):
        raise HostError(
            f"building {what} runs programs in a root below {where}, and that file system is mounted {options}: mount "
            f"it without (`mount -o remount,rw,exec,dev …`), or choose another place ({setting})"
        )
    if (free := shutil.disk_usage(where).free) < _NEEDED_BYTES:
        raise ImageError(f"{what} needs 1 GB below {where} while it is built, and only {free >> 20} MB are free there")


# --- the image ----------------------------------------------------------------------------------------------------


async def assemble(recipe: Recipe, base: Path, stage: Path, progress: Progress) -> dict[str, Path]:
    """Make an image's parts in ``stage`` from a base and our guest files. Needs no network.

    Returns {part: file}: kernel, vmlinux, initramfs, root; no initramfs for the user's own kernel.
    """
    elf = await asyncio.to_thread(kernel.extract_elf, recipe.kernel) if recipe.kernel is not None else b""
    progress("unpacking the base", 0.0)
    root = stage / "scratch"
    root.mkdir(mode=0o755)
    await tool("tar", "--extract", f"--file={base / 'root.tar'}", f"--directory={root}", "--numeric-owner", "-p")
    progress("installing guest files", 0.4)
    await finish_uninterrupted(asyncio.to_thread(_install, root, recipe.guest))
    if recipe.kernel is None:
        await finish_uninterrupted(asyncio.to_thread(_install_modules, root, base / "on-demand"))
    await in_root(root, "-B", "-c", _COMPILE_AGENTD)
    (root / "usr/lib/swarm/agentd.pyc").chmod(0o644)
    parts = {"root": stage / "root.erofs"}
    busybox = (root / "usr/bin/busybox").read_bytes()
    progress("writing the root file system", 0.5)
    # Not compressed: decompression would run in the guest, whose CPU may be emulated (docs/adr/0003-image.md).
    await tool("mkfs.erofs", "--quiet", "-x-1", f"-T{EPOCH}", f"-U{_EROFS_UUID}", str(parts["root"]), str(root))
    await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, root))
    progress("writing the kernel", 0.9)
    if recipe.kernel is None:
        parts |= {"kernel": stage / "vmlinuz", "vmlinux": stage / "vmlinux", "initramfs": stage / "initramfs"}
        for name in ("kernel", "vmlinux"):
            await finish_uninterrupted(asyncio.to_thread(shutil.copyfile, base / parts[name].name, parts[name]))
        modules = {m.name: m.read_bytes() for m in sorted((base / "modules").iterdir())}
        parts["initramfs"].write_bytes(initramfs(recipe.guest["initramfs-init"], busybox, modules))
    else:
        parts["vmlinux"] = parts["kernel"] = stage / "vmlinux"
        parts["vmlinux"].write_bytes(elf)
        if recipe.kernel[0x202:0x206] == b"HdrS":
            parts["kernel"] = stage / "vmlinuz"
            parts["kernel"].write_bytes(recipe.kernel)
    progress("done", 1.0)
    return parts


async def tool(*argv: str) -> None:
    """Run a program of a build. It dies with the build: else it would still write into what the next one removes."""
    await process.run(
        ["setpriv", "--pdeathsig", "KILL", "--", *argv],
        timeout_seconds=600,
        env={"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "HOME": "/root", "TMPDIR": "/tmp"},
    )


async def in_root(root: Path, *arguments: str) -> None:
    """Run the guest's own Python in its root."""
    try:
        await tool("chroot", str(root), "/usr/bin/python3", "-I", *arguments)
    except CommandFailed as error:
        raise ImageError(f"the guest's Python is not complete: {error.stderr[-500:]}") from error


def _install(root: Path, files: Mapping[str, bytes]) -> None:
    """Lay our guest files over the base, with the accounts and directories that the guest's programs expect."""
    for name, data in files.items():
        if place := GUEST_FILES[name]:
            target = root / place
            make_directory(target.parent)
            target.write_bytes(data)
            target.chmod(0o755 if place.endswith("-init") else 0o644)
    for name, line in (
        ("passwd", "agent:x:1000:1000:agent:/work:/bin/bash"),
        ("group", "agent:x:1000:"),
        ("shadow", "agent:*:19675::::::"),
        ("gshadow", "agent:*::"),
    ):
        path = root / "etc" / name
        text = path.read_text()
        if name == "shadow":  # '*': no password matches. With '!', sshd refuses keys as well
            text = re.sub(r"^root:[^:]*:", "root:*:", text, flags=re.MULTILINE)
        path.write_text(f"{text}{line}\n")
    for name, text in (
        ("hostname", "swarm\n"),
        ("hosts", "127.0.0.1 localhost\n"),
        ("resolv.conf", ""),
        ("machine-id", ""),
        ("motd", ""),
        ("fstab", ""),
    ):
        path = root / "etc" / name
        remove(path)
        path.write_text(text)
        path.chmod(0o644)
    for name, mode, owner in (
        ("work", 0o755, 1000), ("agent", 0o755, 0), ("root/.ssh", 0o700, 0), ("mnt", 0o755, 0),
        ("proc", 0o555, 0), ("sys", 0o555, 0), ("dev", 0o755, 0), ("run", 0o755, 0), ("tmp", 0o1777, 0),
    ):  # fmt: skip
        path = root / name
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        os.chown(path, owner, owner)
    # A kernel that mounts this root itself opens /dev/console before anything is mounted on /dev.
    for name, minor in (("console", 1), ("null", 3)):
        if not (root / "dev" / name).exists():
            os.mknod(root / "dev" / name, 0o600 | stat.S_IFCHR, os.makedev(5 if name == "console" else 1, minor))
    (root / "usr/lib/swarm").chmod(0o755)


def _install_modules(root: Path, modules: Path) -> None:
    """Have the kernel find the modules that it loads on demand: by its own call of modprobe, which busybox has."""
    target = root / "usr/lib/modules"
    shutil.copytree(modules, target)
    for path in (target, *below(target)):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (root / "usr/sbin/modprobe").symlink_to("../bin/busybox")


# agentd starts from its compiled form, so that no guest parses it. The guest's own Python compiles it: it's its format.
_COMPILE_AGENTD: Final = (
    "import py_compile; py_compile.compile('/usr/lib/swarm/agentd.py', '/usr/lib/swarm/agentd.pyc', doraise=True, "
    "invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
)


def initramfs(init: bytes, busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    """A cpio archive (newc, Documentation/driver-api/early-userspace/buffer-format.rst), not compressed."""
    order = "".join(f"{name}\n" for name in modules).encode()
    entries: dict[str, tuple[int, bytes]] = {
        **dict.fromkeys(("bin", "dev", "modules", "root"), (stat.S_IFDIR | 0o755, b"")),
        "bin/busybox": (stat.S_IFREG | 0o755, busybox),
        "dev/console": (stat.S_IFCHR | 0o600, b""),
        "init": (stat.S_IFREG | 0o755, init),
        "modules/order": (stat.S_IFREG | 0o644, order),
        **{f"modules/{name}": (stat.S_IFREG | 0o644, data) for name, data in modules.items()},
    }
    out = bytearray()
    for number, (name, (mode, data)) in enumerate([*sorted(entries.items()), ("TRAILER!!!", (0, b""))], 1):
        device = (5, 1) if stat.S_ISCHR(mode) else (0, 0)
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, EPOCH, len(data), 0, 0, *device, len(path), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


# --- small things -------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def below(root: Path) -> Iterator[Path]:
    """Everything below ``root``, a directory after its contents; links are not followed."""
    for place, dirs, others in os.walk(root, topdown=False):
        yield from (Path(place, name) for name in (*dirs, *others))
