"""Roots as imported images have them, made from files of the guest's own Debian: a static program, or a dynamic one
with its libraries."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

from swarm.base.files import sha256_of
from swarm.base.process import run
from swarm.vm.driver import Image, Layer, Root
from swarm.vm.image import staging

APPLETS = ("sh", "cat", "ls", "id", "sleep", "dd", "env", "rm", "stat", "mount", "ps", "kill", "true", "setsid", "pwd")


MODULES = {
    "mine": "import os\nprint('imported')\nopen('/tmp/imported', 'a').close()\nloaded_by = os.getpid()\n",
    "refuses": "raise RuntimeError('not\\nhere')\n",
    "quits": "import sys\nsys.exit('enough')\n",
    "hangs": "while True: pass\n",
}
# What a Python does that is asked to wait; it runs a file like any other.
BAD_PYTHONS = {
    "hangs": "sleep 1000",
    "ends": "exit 0",
    "dies": "kill -9 $$",
    "lies": "yes nonsense >&4; sleep 1000",
    "is-ready-and-ends": "printf ready >&4; exit 0",
    "leaves-another": "(printf ready; sleep 1000) >&4 & exit 0",
    "runs-nothing": "printf ready >&4; sleep 1000",
}


class Roots:
    """Makes roots in ``place``."""

    def __init__(self, place: Path, image: Image) -> None:
        self.place = place
        self.image = image
        self.debian = place / "debian"

    async def unpack(self) -> None:
        if not self.debian.exists():
            await run(["fsck.erofs", f"--extract={self.debian}", str(self.image.root)])

    async def static(self, name: str = "static", **said: object) -> Layer:
        """One static program, and nothing else: as `FROM scratch`."""
        await self.unpack()
        (tree := self.place / name).mkdir()
        shutil.copy2(self.debian / "bin/busybox", tree / "busybox")
        return await self.layer(tree, Root(**said))  # type: ignore[arg-type]

    async def dynamic(self, name: str = "dynamic", **said: object) -> Layer:
        """A small system: a shell, Python's own libraries apart, with the C library's loader."""
        await self.unpack()
        tree = self.place / name
        for folder in ("bin", "etc", "home/me", "root", "lib64", "usr/bin", "lib/x86_64-linux-gnu"):
            (tree / folder).mkdir(parents=True)
        shutil.copy2(self.debian / "bin/busybox", tree / "bin/busybox")
        for applet in APPLETS:
            (tree / "bin" / applet).symlink_to("busybox")
        await self.copy_program("usr/bin/dash", tree)
        await self.copy_program("usr/bin/sort", tree)
        (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nme:x:1234:1234::/home/me:/bin/sh\n")
        (tree / "etc/resolv.conf").symlink_to("/run/nowhere/resolv.conf")
        (tree / "work").symlink_to("/etc")  # what must not be followed
        (tree / "etc/mine").write_text("the image's\n")
        (tree / "etc/secret").write_text("root's\n")
        (tree / "etc/secret").chmod(0o600)
        shutil.copy2(tree / "usr/bin/sort", tree / "usr/bin/sudo-sort")
        (tree / "usr/bin/sudo-sort").chmod(0o4755)
        return await self.layer(tree, Root(**said))  # type: ignore[arg-type]

    async def whole(self, packages: Layer, name: str = "whole", **said: object) -> Layer:
        """The guest's own Debian without its modules, and a layer of more packages: as an image `FROM debian`."""
        tree = self.place / name
        for source in (self.image.root, packages.path):
            await run(["fsck.erofs", f"--extract={tree}", "--overwrite", str(source)])
        shutil.rmtree(tree / "usr/lib/modules")
        (tree / "usr/sbin/modprobe").unlink()
        return await self.layer(tree, Root(**said))  # type: ignore[arg-type]

    async def python(self, name: str = "python", **said: object) -> Layer:
        """Debian's Python as the image's own, programs in its place that are none, and modules to preload."""
        await self.unpack()
        tree = self.place / name
        for folder in ("bin", "bad", "etc", "home/me", "lib64", "usr/bin", "usr/lib", "lib/x86_64-linux-gnu"):
            (tree / folder).mkdir(parents=True)
        shutil.copy2(self.debian / "bin/busybox", tree / "bin/busybox")
        (tree / "bin/sh").symlink_to("busybox")
        (version,) = (self.debian / "usr/lib").glob("python3.*")
        await self.copy_program(f"usr/bin/{version.name}", tree)
        (tree / "usr/bin/python3").symlink_to(version.name)
        unused = shutil.ignore_patterns("test", "unittest", "pydoc_data", "config-*", "asyncio", "email", "xml*")
        modules = tree / "usr/lib" / version.name
        shutil.copytree(version, modules, ignore=unused, symlinks=True)
        for module, text in MODULES.items():
            (modules / f"{module}.py").write_text(text)
        for program, text in BAD_PYTHONS.items():
            (tree / "bad" / program).write_text(
                f'#!/bin/sh\nif [ "$1" = -c ]; then {text}; fi\nexec /usr/bin/python3 "$@"\n'
            )
            (tree / "bad" / program).chmod(0o755)
        return await self.layer(tree, Root(**{"python": "/usr/bin/python3", **said}))  # type: ignore[arg-type]

    async def copy_program(self, path: str, tree: Path) -> None:
        """A program with the libraries that it needs, found by the guest's own loader."""
        shutil.copy2(self.debian / path, tree / path)
        library = self.debian / "usr/lib/x86_64-linux-gnu"
        loader = (library / "ld-linux-x86-64.so.2").resolve()
        done = await run([str(loader), "--library-path", str(library), "--list", str(self.debian / path)])
        for found in re.findall(r"=> (\S+)", done.stdout.decode()):
            shutil.copy2(found, tree / "lib/x86_64-linux-gnu" / Path(found).name)
        shutil.copy2(loader, tree / "lib64/ld-linux-x86-64.so.2")

    async def layer(self, tree: Path, root: Root) -> Layer:
        path = self.place / f"{tree.name}.erofs"
        # The same bytes each time, so that a template of it can be kept.
        await run(["mkfs.erofs", "-T1700000000", "-U5a7a0000-0000-4000-8000-000000000002", str(path), str(tree)])
        said = json.dumps(dataclasses.asdict(root), sort_keys=True)
        return Layer(digest=staging.digest_of({"erofs": sha256_of(path), "said": said}), path=path, root=root)
