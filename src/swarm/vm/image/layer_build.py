"""Building a layer: what an agent's `requirements`, `packages` and `npm` add to the guest's root, as one erofs file.

The guest's own root is unpacked, and its own apt database and Python are used. So the result is what an installation
in a guest would give; versions, platforms and markers are not guessed. Fetching needs the network and runs nothing of
what it fetched. Installing runs Debian's maintainer scripts, in a chroot, without a network, in namespaces that end
with this process. Then every file that was there before is removed, and the rest is the layer.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from email.parser import HeaderParser
from pathlib import Path
from typing import Final

from swarm.base import files
from swarm.base.aio import finish_uninterrupted
from swarm.base.progress import Progress
from swarm.errors import CommandFailed, ImageError, UsageError
from swarm.vm.driver import Image
from swarm.vm.image import apt, elf, npm, pip
from swarm.vm.image.base import UNWANTED_PATHS
from swarm.vm.image.build import EPOCH, below, remove, require, require_root, tool
from swarm.vm.image.pip import NOT_BUILT

# Raise it when the code below makes a different layer of the same requirements and packages.
BUILDER_VERSION: Final = 1
MAX_BYTES: Final = 4 << 30
_EROFS_UUID: Final = "5a7a0000-0000-4000-8000-000000000002"
_TOOLS: Final = {
    "mkfs.erofs": "erofs-utils", "fsck.erofs": "erofs-utils", "apt-get": "apt", "unshare": "util-linux",
    "setpriv": "util-linux", "prlimit": "util-linux",
}  # fmt: skip
_SCRATCH: Final = "var/tmp/swarm-layer"
_MODULES: Final = "usr/lib/python3/dist-packages"  # searched last: wheels' modules take precedence
# Directories that Debian's maintainer scripts expect, and that the image's build removed.
_EXPECTED: Final = ("var/cache/debconf", "var/lib/ucf", "var/lib/apt", "var/lib/systemd", "var/cache/apt")
# What differs from run to run, or is useless in a guest. The image's own files are never removed by these patterns.
_NOISE: Final = (
    _SCRATCH, "usr/sbin/policy-rc.d", "var/cache/*", "var/log/*", "var/lib/dpkg/*-old", "var/lib/dpkg/lock*",
    "var/lib/apt", "var/lib/ucf", "etc/*-", "etc/.pwd.lock", "run/*", "tmp/*", "boot/*", "root/.cache",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The contents of a layer, name -> version: wheels, Debian's and npm's packages, with all dependencies. ``lacks``:
    shared library -> a file that needs it."""

    python: Mapping[str, str]
    debian: Mapping[str, str]
    npm: Mapping[str, str]
    lacks: Mapping[str, str]


def check_host(where: Path) -> None:
    """Raises HostError or ImageError, before anything is done, if a build can't succeed here."""
    require_root("a layer")
    require("a layer", _TOOLS, where)


async def build(
    requirements: Sequence[str],
    packages: Sequence[str],
    npm_packages: Sequence[str],
    modules: Mapping[str, bytes],
    *,
    image: Image,
    stage: Path,
    sources: Path,
    progress: Progress,
) -> Installed:
    """Make layer.erofs in ``stage``. ``modules``: Python modules to add, name -> text. ``sources``: the directory of
    apt's configuration (/etc/apt).

    Raises UsageError for what doesn't exist, ImageError if they can't be fetched or installed,
    HostError.
    """
    pip.check(requirements)
    apt.check(packages)
    if npm_packages:
        npm.check(npm_packages)
        if not any(one.partition("=")[0].startswith("nodejs") for one in (*packages, *requirements)):
            packages = [*packages, "nodejs"]
    root = stage / "root"
    progress("unpacking the guest's root", 0.0)
    await tool("fsck.erofs", f"--extract={root}", str(image.root))
    before = await asyncio.to_thread(_inventory, root)
    scratch = root / _SCRATCH
    scratch.mkdir(parents=True)
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")  # no service is started in a chroot
    policy.chmod(0o755)
    old = _debian(root)
    if packages:
        progress("installing Debian packages", 0.15)
        await _install_packages(packages, root, image, sources)
    if requirements:
        progress("fetching requirements", 0.4)
        await _fetch(requirements, root, stage)
        progress("installing requirements", 0.6)
        await _install_wheels(requirements, root)
    from_npm: Mapping[str, str] = {}
    if npm_packages:
        progress("fetching npm packages", 0.65)
        from_npm = await npm.fetch(npm_packages, stage / "npm", most=MAX_BYTES)
        (stage / "npm" / npm.MODULES).rename(root / npm.MODULES)
        await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, stage / "npm"))
        npm.link_programs(npm_packages, root / npm.MODULES, root / "usr/local/bin")
    for name, text in modules.items():
        file = root / _MODULES / f"{name}.py"
        files.make_directory(file.parent)
        files.write_atomically(file, text)
    progress("compiling", 0.7)
    places = [f"/{d.relative_to(root)}" for d in (*root.glob("usr/local/lib/python3*"), root / "usr/lib/python3")]
    # -S: a .pth file of a wheel would run its code. Hashes replace time stamps, which are all equal in the erofs.
    # -j 0: on all CPUs. A file that can't be compiled is not an error here.
    await _in(root, "/usr/bin/python3", "-I", "-S", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode",
              "unchecked-hash", *places, check=False)  # fmt: skip
    new = [path for path in below(root) if str(path.relative_to(root)) not in before]
    installed = Installed(
        python=await asyncio.to_thread(_wheels, root),
        lacks=await asyncio.to_thread(elf.lacks, root, new),
        npm=from_npm,
        debian={name: version for name, version in _debian(root).items() if old.get(name) != version},
    )
    progress("packing", 0.85)
    size = await finish_uninterrupted(asyncio.to_thread(_keep_new_files, root, before))
    if size > MAX_BYTES:
        raise UsageError(f"the layer would take {size >> 20} MiB, and at most {MAX_BYTES >> 20} are allowed")
    await tool("mkfs.erofs", "--quiet", "-x-1", f"-T{EPOCH}", f"-U{_EROFS_UUID}", str(stage / "layer.erofs"), str(root))
    await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, root))
    return installed


# --- Debian -----------------------------------------------------------------------------------------------------------


async def _install_packages(packages: Sequence[str], root: Path, image: Image, etc: Path) -> None:
    """Fetch with the host's apt, by the guest's list of installed packages; install in the guest's root."""
    for place in _EXPECTED:
        files.make_directory(root / place)
    release = _release(root)
    dir = root / _SCRATCH / "apt"
    # Packages of an archive on a local disk (file:) would be installed from there, which the chroot can't see.
    found = [
        replace(one, uris=tuple(re.sub("^file:", "copy:", uri) for uri in one.uris))
        for one in apt.host_sources(release, etc=etc)
    ]
    client = apt.PrivateApt(
        dir, sources=found, options=await apt.host_options(),
        status=root / "var/lib/dpkg/status",
    )  # fmt: skip
    await client.update()
    options = [f"-oDPkg::Options::=--path-exclude=/usr/share/{name}/*" for name in UNWANTED_PATHS]
    settings = [
        "--quiet", "--yes", "--no-install-recommends", f"-oDPkg::Chroot-Directory={root}", "-oDpkg::Use-Pty=0",
        "-oDPkg::Options::=--force-confold", "-oDPkg::Options::=--force-unsafe-io", *options, "install",
    ]  # fmt: skip
    await client.install(["--download-only", *settings, *packages])
    # Without a network, and in a process namespace of its own: programs that scripts started end with it.
    await client.install(["--no-download", *settings, *packages], within=_isolated(root))


def _release(root: Path) -> str:
    text = (root / "usr/lib/os-release").read_text()
    found = re.search(r"^VERSION_CODENAME=(\w+)$", text, re.MULTILINE)
    if not found:
        raise ImageError("the guest's root does not say which Debian it is (/usr/lib/os-release)")
    return found[1]


def _debian(root: Path) -> dict[str, str]:
    return apt.installed((root / "var/lib/dpkg/status").read_text())


# --- PyPI -------------------------------------------------------------------------------------------------------------


async def _fetch(requirements: Sequence[str], root: Path, stage: Path) -> None:
    """Download wheels and their dependencies, by the guest's interpreter: its versions, platform and markers count.

    It does not run in a chroot, so that pip finds this host's configuration, indexes and certificates.
    """
    libraries = next(root.glob("usr/lib/*-linux-gnu"), root)
    loader = next(libraries.glob("ld-linux-*.so.*"), None)
    if loader is None:
        raise ImageError("the guest's root has no dynamic loader: is it Debian's?")
    interpreter = [str(loader), "--library-path", str(libraries), str(root / "usr/bin/python3")]
    wheels = root / _SCRATCH / "wheels"
    await pip.run(
        ["prlimit", f"--fsize={MAX_BYTES}", "--", *interpreter, str(pip.location()), "download", *pip.OPTIONS,
         f"--dest={wheels}", "--", *requirements],
        where=stage,
        python="the guest's Python",
    )  # fmt: skip


async def _install_wheels(requirements: Sequence[str], root: Path) -> None:
    """By the guest's own Python, in its own root: paths and scripts are right, and a hostile wheel stays inside."""
    await finish_uninterrupted(asyncio.to_thread(shutil.copytree, pip.location(), root / _SCRATCH / "pip"))
    await _in(
        root, "/usr/bin/python3", "-I", f"/{_SCRATCH}/pip", "--isolated", "install", "--no-index",
        f"--find-links=/{_SCRATCH}/wheels", "--no-compile", "--ignore-installed", "--break-system-packages",
        "--root-user-action=ignore", "--no-cache-dir", *pip.OPTIONS, "--", *requirements,
    )  # fmt: skip


def _wheels(root: Path) -> dict[str, str]:
    """Name -> version, from the metadata in the root (importlib.metadata would look at this host)."""
    found = {}
    for file in root.glob("usr/local/lib/python3*/dist-packages/*.dist-info/METADATA"):
        head = HeaderParser().parsestr(file.read_text(errors="replace"), headersonly=True)
        found[str(head["Name"])] = str(head["Version"])
    return dict(sorted(found.items()))


# --- the root ---------------------------------------------------------------------------------------------------------


def _isolated(root: Path) -> list[str]:
    return [
        "unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child",
        f"--mount-proc={root / 'proc'}", "--",
    ]  # fmt: skip


async def _in(root: Path, *argv: str, check: bool = True) -> None:
    """Run a program of the guest in its root, in namespaces of its own. Raises UsageError with its error output."""
    try:
        await tool("prlimit", f"--fsize={MAX_BYTES}", "--", *_isolated(root), "chroot", str(root), *argv)
    except CommandFailed as error:
        if apt.FULL_DISK.search(str(error)):
            raise ImageError(files.no_space(root.parent, NOT_BUILT)) from error
        if check:
            raise UsageError(f"the requirements can't be installed: {error.stderr[-1000:]}") from error


def _inventory(root: Path) -> dict[str, tuple[int, ...]]:
    """Path -> what changes whenever the file does: inode and change time; for a directory, its owner and mode."""
    found: dict[str, tuple[int, ...]] = {}
    for path in below(root):
        info = path.lstat()
        marks: tuple[int, ...] = (info.st_ino, info.st_ctime_ns)
        if stat.S_ISDIR(info.st_mode):
            marks = (info.st_mode, info.st_uid, info.st_gid)
        found[str(path.relative_to(root))] = marks
    return found


def _keep_new_files(root: Path, before: Mapping[str, tuple[int, ...]]) -> int:
    """Remove what was there before. What was deleted gets overlayfs' mark for a deleted file, a device 0:0.

    Returns how many bytes are left.
    """
    for pattern in _NOISE:
        for path in sorted(root.glob(pattern)):
            if str(path.relative_to(root)) not in before:
                remove(path)
    after = _inventory(root)
    old = {name for name, marks in after.items() if before.get(name) == marks}
    for name in sorted(before.keys() - after.keys()):
        path = root / name
        if path.parent.is_dir() and not path.parent.is_symlink():
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
    size = 0
    for path in below(root):
        info = path.lstat()
        known = str(path.relative_to(root)) in old
        if stat.S_ISDIR(info.st_mode):
            if known and not any(path.iterdir()):
                path.rmdir()
        elif known:
            path.unlink()
        elif stat.S_ISREG(info.st_mode):
            size += info.st_size
            if info.st_mode & (stat.S_ISUID | stat.S_ISGID):  # privileges that no agent needs
                path.chmod(stat.S_IMODE(info.st_mode) & 0o777)
    return size
