"""The base of an image: a Debian root file system and a kernel, from the distribution's packages. Needs the network.

mmdebstrap makes the root, which is cleaned of what differs from run to run and kept as one tar file. The kernel package
is fetched at the same time, since installing packages keeps only one core busy.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from swarm.base import files, process
from swarm.base.aio import finish_uninterrupted
from swarm.base.progress import Progress
from swarm.errors import CommandFailed, ImageError
from swarm.vm.image import apt, kernel
from swarm.vm.image.build import EPOCH, Recipe, below, in_root, remove, tool

_USRMERGE_HOOK: Final = Path("/usr/share/mmdebstrap/hooks/merged-usr")
UNWANTED_PATHS: Final = ("man", "doc", "info", "locale", "lintian", "bug", "bash-completion", "zsh")  # in /usr/share
_PACKAGES_INSTALLED: Final = 110  # in the root, roughly: only for the progress bar
# Modules that agents may rely on; a base without one of these is not used.
_STDLIB: Final = (
    "import asyncio, bz2, ctypes, hashlib, json, lzma, multiprocessing, random, sqlite3, ssl, urllib.request, uuid, "
    "zoneinfo"
)


async def build_base(recipe: Recipe, stage: Path, progress: Progress) -> None:
    """Fill ``stage`` with root.tar, vmlinuz, vmlinux, modules/, on-demand/ and base.json. Needs the network."""
    base = recipe.base
    sources = apt.host_sources(base["release"])
    options = await apt.host_options()
    try:
        async with asyncio.TaskGroup() as tasks:
            root = tasks.create_task(_base_root(base, stage, sources, options, progress))
            version = tasks.create_task(_base_kernel(base, stage, sources, options))
    except ExceptionGroup as group:
        raise _first(group) from None
    modules = sorted((stage / "modules").iterdir())
    on_demand = sorted(one for one in (stage / "on-demand").rglob("*") if one.is_file())
    parts = [stage / "root.tar", stage / "vmlinuz", stage / "vmlinux", *modules, *on_demand]
    manifest = {
        "recipe": base,
        "packages": root.result(),
        "kernel_version": version.result(),
        "modules": [m.name for m in modules],
        "parts": {str(p.relative_to(stage)): await asyncio.to_thread(files.sha256_of, p) for p in parts},
    }
    (stage / "base.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))


async def _base_root(
    base: Mapping[str, Any], stage: Path, sources: Sequence[apt.Source], options: Sequence[str], progress: Progress
) -> dict[str, str]:
    """Make root.tar; return {package: version}."""
    scratch = stage / "scratch"
    root = scratch / "root"
    scratch.mkdir()
    (scratch / "host.sources").write_text(apt.render(sources))
    log = scratch / "mmdebstrap.log"
    # In a process namespace of its own: if it is killed, or we are, everything that apt and dpkg started dies with it.
    child = await process.spawn(
        [
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
            "mmdebstrap", "--verbose", "--mode=root", "--format=directory",
            # Without apt, and with /usr already merged: the package usrmerge would install all of Perl.
            "--variant=essential", f"--hook-dir={_USRMERGE_HOOK}",
            f"--include={','.join(base['packages'])}",
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNWANTED_PATHS),
            "--dpkgopt=force-unsafe-io", "--aptopt=Acquire::Languages \"none\"",
            *(f"--aptopt={line}" for line in options),
            base["release"], str(root), str(scratch / "host.sources"),
        ],
        output=log,
        env={"SOURCE_DATE_EPOCH": str(EPOCH), "TMPDIR": str(scratch), "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    ended = asyncio.ensure_future(child.wait())
    share = 0.0
    try:
        while not ended.done():
            await asyncio.wait({ended}, timeout=0.25)
            share = max(share, _share_installed(log))
            progress("installing packages", 0.9 * share)
    finally:
        await process.kill(child)
    if child.returncode:
        text = log.read_text(errors="replace")
        failed = CommandFailed(
            f"mmdebstrap {process.how_it_ended(child.returncode)}", returncode=child.returncode, stderr=text
        )
        raise apt.explain(failed, where=scratch)
    packages = apt.installed((root / "var/lib/dpkg/status").read_text())
    progress("cleaning", 0.9)
    await finish_uninterrupted(asyncio.to_thread(_clean, root))
    # Debian compiles only the part of the standard library that the interpreter itself needs. A guest's root is
    # read-only and its CPU may be emulated, so each import without a compiled file is slow.
    compiled = ["--invalidation-mode", "timestamp", "-q", "-j", "0", "/usr/lib/python3"]
    await in_root(
        root, "-m", "compileall", *compiled, *(f"/{d.relative_to(root)}" for d in root.glob("usr/lib/python3.*"))
    )
    await finish_uninterrupted(asyncio.to_thread(_open_compiled, root))
    await in_root(root, "-B", "-c", _STDLIB)
    progress("packing the base", 0.95)
    await tool(
        "tar", "--create", f"--file={stage / 'root.tar'}", f"--directory={root}", "--sort=name", "--numeric-owner",
        f"--mtime=@{EPOCH}", "--format=gnu", ".",
    )  # fmt: skip
    await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, scratch))
    return packages


async def _base_kernel(
    base: Mapping[str, Any], stage: Path, sources: Sequence[apt.Source], options: Sequence[str]
) -> str:
    """Make vmlinuz, vmlinux, modules/ and on-demand/; return the kernel's version."""
    dir = stage / "kernel"
    dir.mkdir()
    client = apt.PrivateApt(dir, sources=sources, options=options)
    await client.update()
    package = await client.dependency(base["kernel_package"], r"linux-image-\d.*")
    deb = await client.download(package)
    await tool("dpkg-deb", "--extract", str(deb), str(dir / "files"))
    await finish_uninterrupted(asyncio.to_thread(_take_kernel, dir / "files", stage, base))
    await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, dir))
    return package.removeprefix("linux-image-")


def _take_kernel(files: Path, stage: Path, base: Mapping[str, Any]) -> None:
    images = list(files.glob("boot/vmlinuz-*"))
    trees = [t for t in (*files.glob("lib/modules/*"), *files.glob("usr/lib/modules/*")) if (t / "kernel").is_dir()]
    if len(images) != 1 or len(trees) != 1:
        raise ImageError(f"the kernel package has {len(images)} kernels and {len(trees)} sets of modules, not one each")
    bzimage = images[0].read_bytes()
    (stage / "vmlinuz").write_bytes(bzimage)
    (stage / "vmlinux").write_bytes(kernel.extract_elf(bzimage))
    modules = stage / "modules"
    modules.mkdir()
    for n, file in enumerate(kernel.modules_in_load_order(trees[0], base["modules"])):
        (modules / f"{n:02}-{file.name.partition('.')[0]}.ko").write_bytes(kernel.read_module(file))
    on_demand = stage / "on-demand" / trees[0].name
    on_demand.mkdir(parents=True)
    for name, data in kernel.modules_on_demand(trees[0], base["on_demand"]).items():
        (on_demand / name).write_bytes(data)


def _share_installed(log: Path) -> float:
    """How far mmdebstrap is (0..1), from its log: each package is fetched, unpacked and set up once."""
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return 0.0
    # It installs the essential packages, then the others, and logs the number of each when it starts with them.
    counts = [int(n) for n in re.findall(r"^\d+ upgraded, (\d+) newly installed", text, re.MULTILINE) if n != "0"]
    packages = sum(counts) if len(counts) > 1 else max(_PACKAGES_INSTALLED, sum(counts))
    steps = len(re.findall(r"^(?:Get:\d+ .* \[|Unpacking |Setting up )", text, re.MULTILINE))
    return min(1.0, steps / (3 * packages))


def _clean(root: Path) -> None:
    """Remove what differs between two runs, what belongs to the host, and privileges that no agent needs."""
    for pattern in (
        "etc/ssh/ssh_host_*", "etc/machine-id", "var/lib/dbus/machine-id", "etc/hostname", "etc/resolv.conf",
        "etc/apt", "etc/dpkg/dpkg.cfg.d/99mmdebstrap", "etc/*-", "etc/.pwd.lock", "etc/ssh/sshd_config.d",
        "var/cache/*", "var/log/*", "var/lib/apt", "var/lib/dpkg/*-old", "var/lib/dpkg/lock*", "var/lib/systemd",
        "var/lib/ucf", "run/*", "tmp/*", "boot/*", "usr/lib/python3*/**/__pycache__",
    ):  # fmt: skip
        for path in sorted(root.glob(pattern)):
            remove(path)
    for path in below(root):
        info = path.lstat()
        if stat.S_ISREG(info.st_mode) and info.st_mode & (stat.S_ISUID | stat.S_ISGID):
            path.chmod(stat.S_IMODE(info.st_mode) & 0o777)
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


def _open_compiled(root: Path) -> None:
    """Compiled files were made with our umask, but agents must be able to read them."""
    for dir in root.glob("usr/lib/python3*/**/__pycache__"):
        dir.chmod(0o755)
        for file in dir.iterdir():
            file.chmod(0o644)


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    """The first error of a task group; it made the others be cancelled."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
