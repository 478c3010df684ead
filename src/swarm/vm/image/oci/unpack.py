"""From an OCI layout to one erofs file: umoci applies the layers, mkfs.erofs packs them, both in a jail.

umoci checks each layer's digest while it reads it, keeps owners, hard links, device nodes, extended attributes and
set-id bits, applies whiteouts, and follows no link out of the root. What an image may cost is watched from outside,
since a few bytes can become very many: a bomb costs its limit, and a sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base import files, priority, process
from swarm.base.aio import finish_uninterrupted
from swarm.errors import HostError, ImageError
from swarm.vm.image.oci.fetch import TAG, Fetched
from swarm.vm.image.oci.jail import Spec

FILE: Final = "root.erofs"
_EROFS_UUID: Final = "5a7a0000-0000-4000-8000-000000000003"
_WATCH_SECONDS: Final = 0.5
_TIMEOUT_SECONDS: Final = 3600.0
_SAID_BYTES: Final = 64 << 10
_KEPT_FREE_BYTES: Final = 256 << 20  # or other programs of the host find its disk full


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one image may take at most, unpacked; ``ratio``: times what was fetched of it, beyond ``small_bytes``."""

    layers: int = 128
    bytes: int = 20 * 10**9
    files: int = 2_000_000
    ratio: int = 200
    small_bytes: int = 10**9


async def unpack(
    image: Fetched, *, stage: Path, blobs: Path, name: str, limits: Limits, progress: Callable[[str, float], None]
) -> Path:
    """The root of the image, as a directory in ``stage``, in which its layout is. Raises ImageError, HostError."""
    if len(image.layers) > limits.layers:
        raise ImageError(f"{name} has {len(image.layers)} layers, and at most {limits.layers} are allowed")
    layout, root = stage / "layout", stage / "root"
    await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, layout / "blobs", True))  # skopeo leaves an empty one
    (layout / "blobs").symlink_to("/blobs")  # as the jail has it
    most = min(limits.bytes, max(limits.small_bytes, limits.ratio * image.size_bytes))

    def check(size: int, count: int) -> None:
        progress(f"unpacking: {about(size)}", 0.0)
        if size > most:
            by = "" if most == limits.bytes else f", {limits.ratio} times what was fetched"
            raise ImageError(f"{name} takes more than {most / 1e9:.3g} GB when it is unpacked{by}")
        if count > limits.files:
            raise ImageError(f"{name} has more than {limits.files} files")

    argv = ["umoci", "raw", "unpack", "--image", f"/stage/layout:{TAG}", "/stage/root"]
    await _run(argv, stage, blobs, root, name=name, fsize=most, check=check)
    return root


async def pack(root: Path, *, stage: Path, blobs: Path, name: str, progress: Callable[[str, float], None]) -> Path:
    """The erofs file of that directory, not compressed: guests without KVM would decompress slowly."""
    total = max(1, (await asyncio.to_thread(measure, root))[0])
    file = stage / FILE

    def check(size: int, _count: int) -> None:
        progress(f"packing: {about(size)} of {about(total)}", min(1.0, size / total))

    argv = ["mkfs.erofs", "--quiet", f"-U{_EROFS_UUID}", f"/stage/{FILE}", "/stage/root"]
    await _run(argv, stage, blobs, file, name=name, fsize=4 * total + (1 << 30), check=check)
    return file


async def _run(
    argv: list[str], stage: Path, blobs: Path, grows: Path, *, name: str, fsize: int, check: Callable[[int, int], None]
) -> None:
    spec = Spec(stage=str(stage), shown=[(str(blobs), "/blobs")], fsize=fsize)
    code, said = await jailed(argv, spec, grows, failed=f"{name} can't be unpacked", check=check)
    if code:
        raise _explain(said, argv[0], code, name, fsize)


async def jailed(
    argv: list[str], spec: Spec, grows: Path, *, failed: str, check: Callable[[int, int], None],
    env: Mapping[str, str] | None = None,
) -> tuple[int, str]:  # fmt: skip
    """Run a program in the jail while ``check`` looks at how much there is below ``grows``. Returns its status, and the
    end of what it said. Raises ImageError, which begins with ``failed``, and OSError when the disk is full."""
    stage = Path(spec.stage)
    log = stage / f"{argv[0]}.log"
    program = str(process.path_of(argv[0]).resolve())
    child = await process.spawn(spec.argv([program, *argv[1:]]), output=log, env=env, lower_by=priority.BELOW_ENGINE)
    ended = asyncio.ensure_future(child.wait())
    began, pause = time.monotonic(), _WATCH_SECONDS
    try:
        while not ended.done():
            await asyncio.wait({ended}, timeout=pause)
            looked = time.monotonic()
            check(*await asyncio.to_thread(measure, grows))
            pause = max(_WATCH_SECONDS, 2 * (time.monotonic() - looked))
            disk = os.statvfs(stage)
            if disk.f_bavail * disk.f_frsize < _KEPT_FREE_BYTES or files.has_no_room(stage):
                raise OSError(28, "no space left", str(stage))
            if time.monotonic() - began > _TIMEOUT_SECONDS:
                raise ImageError(f"{failed} within {_TIMEOUT_SECONDS:g} s")
        check(*await asyncio.to_thread(measure, grows))
    finally:
        await _end(child)
    return child.returncode or 0, said_last(log)


async def _end(child: process.Child) -> None:
    """Kill the first process of the jail: `unshare`, its parent, ends when all others in there have."""
    if child.returncode is None:
        with contextlib.suppress(OSError, HostError):
            for first in map(int, Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()):
                await process.kill_stranger(first, process.start_time(first) or 0)
    await process.kill(child)


def said_last(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _SAID_BYTES))
        return file.read(_SAID_BYTES).decode(errors="replace")


def _explain(said: str, program: str, code: int, name: str, fsize: int) -> Exception:
    last = " ".join(said.split())[-600:] or process.how_it_ended(code)
    last = "".join(one if one.isprintable() else "?" for one in last)
    if "no space left" in said:
        return OSError(28, "no space left")
    if "file too large" in said or "file size limit" in said.lower():
        return ImageError(f"{name} has a file of more than {fsize / 1e9:.3g} GB")
    return ImageError(f"{name} can't be unpacked: {program}: {last}")


def about(size: int) -> str:
    """Two digits: where no bar is drawn, each new text is a line."""
    return f"{float(f'{size / 1e6:.2g}'):g} MB"


def measure(place: Path) -> tuple[int, int]:
    """The bytes and the number of what is there, while it changes. A hard link counts once, a hole as what it hides."""
    size, count, seen = 0, 0, set[int]()
    todo = [os.fspath(place)]
    while todo:
        try:
            with os.scandir(todo.pop()) as found:
                for one in found:
                    try:
                        status = one.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    count += 1
                    if one.is_dir(follow_symlinks=False):
                        todo.append(one.path)
                    elif status.st_nlink > 1:
                        if status.st_ino in seen:
                            continue
                        seen.add(status.st_ino)
                    size += status.st_size
        except NotADirectoryError:
            return place.stat().st_size, 1
        except FileNotFoundError:
            continue
    return size, count
