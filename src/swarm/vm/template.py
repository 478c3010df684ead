"""Templates on disk: booted, paused VMs from which clones are made.

A template is named by the digest of everything that shapes the state of a VM, so one that fits is right by its name
and one that no longer fits is never found. It is built under a lock in a directory beside, and renamed in.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from swarm.aio import settle
from swarm.errors import HostError, ImageError, NotFound
from swarm.vm.driver import Driver, Probe, Template, VmSpec, host_tsc_khz

log = structlog.get_logger(__name__)

FORMAT = 2
MANIFEST = "template.json"
# Whenever one is built, those that no clone was made from for so long go: an update leaves the old ones behind.
UNUSED_SECONDS = 7 * 86400.0
_STAMP = "verified.json"
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInfo:
    """For lists. ``size_bytes`` is what the files take on disk; ``used_at`` the last clone, seconds since the epoch."""

    key: str
    driver: str
    image: str
    memory_mb: int
    vcpus: int
    disk_mb: int
    preload: tuple[str, ...]
    layer: str
    size_bytes: int
    created_at: float
    used_at: float


def shape(spec: VmSpec, *, driver: Driver, probe: Probe) -> dict[str, object]:
    """Everything that shapes a VM's state, as a JSON object. The image's digest covers kernel, root, agentd."""
    return {
        "recipe": _recipe(type(driver).__module__),
        "format": FORMAT,
        "image": spec.image.digest,
        "boot_args": spec.image.boot_args,
        "vcpus": spec.vcpus,
        "memory_mb": spec.memory_mb,
        "disk_mb": spec.disk_mb,
        "entropy": spec.entropy,
        "driver": driver.name,
        "version": probe.version,
        "accelerator": probe.accelerator,
        # A KVM guest has seen the host's CPU; an emulated one only the speed of its counter.
        "cpu": _host_cpu() if probe.accelerator == "kvm" else f"{host_tsc_khz()} kHz",
        "preload": sorted(spec.preload),
        "layer": spec.layer.digest if spec.layer else "",
    }


def key_of(parts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Templates:
    def __init__(self, *, dir: Path) -> None:  # noqa: A002
        self.dir = dir

    async def find(self, spec: VmSpec, parts: Mapping[str, object]) -> Template | None:
        """The template of this shape if it is there, verified."""
        return await asyncio.to_thread(self._verified, key_of(parts), spec)

    async def get(
        self, spec: VmSpec, parts: Mapping[str, object], build: Callable[[Path], Awaitable[bytes]]
    ) -> Template:
        """The template of this shape: verified, or built now by ``build(dir)``, which fills an empty directory and
        returns the token that the template's agentd knows. Concurrent callers, in any process, build once."""
        key = key_of(parts)
        if found := await asyncio.to_thread(self._verified, key, spec):
            return found
        async with self._locked(key):
            if found := await asyncio.to_thread(self._verified, key, spec):
                return found
            began = time.monotonic()
            place = self.dir / f".{key}.building"
            await _remove(place)  # of a builder that died
            place.mkdir(mode=0o700)
            try:
                token = await build(place)
                await settle(asyncio.to_thread(self._seal, place, key, parts, token))
                final = self.dir / key
                await _remove(final)  # failed its verification
                place.rename(final)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise HostError(
                    f"no space left on the disk that holds {self.dir}: the template was not built"
                ) from None
            finally:
                await _remove(place)
            for old in await self.collect(unused_seconds=UNUSED_SECONDS):
                log.info("template removed: nobody used it for long", key=old[:12])
            log.info("template built", key=key[:12], seconds=round(time.monotonic() - began, 2))
            return Template(key=key, dir=self.dir / key, spec=spec, token=token)

    def all(self) -> list[TemplateInfo]:
        found = []
        for manifest in sorted(self.dir.glob(f"*/{MANIFEST}")):
            try:
                data = json.loads(manifest.read_bytes())
                parts, files = data["parts"], [manifest.parent / name for name in data["files"]]
                found.append(
                    TemplateInfo(
                        key=data["key"],
                        driver=parts["driver"],
                        image=parts["image"],
                        memory_mb=parts["memory_mb"],
                        vcpus=parts["vcpus"],
                        disk_mb=parts["disk_mb"],
                        preload=tuple(parts["preload"]),
                        layer=parts.get("layer", ""),
                        size_bytes=sum(f.stat().st_blocks * 512 for f in files),
                        created_at=data["created_at"],
                        used_at=(manifest.parent / _STAMP).stat().st_mtime,
                    )
                )
            except (OSError, ValueError, KeyError):
                continue  # being removed, or torn: `get` rebuilds it
        return found

    async def remove(self, key: str) -> str:
        """Remove the template whose key begins so; returns the whole key. Running clones keep their memory."""
        matches = [t.key for t in self.all() if t.key.startswith(key)]
        if len(matches) != 1:
            raise NotFound(f"{len(matches) or 'no'} templates begin with {key!r}; see `swarm template list`")
        async with self._locked(matches[0]):
            await _remove(self.dir / matches[0])
        return matches[0]

    async def collect(self, *, unused_seconds: float) -> list[str]:
        """Remove what no clone was made from for so long. Returns the keys."""
        old = [t.key for t in self.all() if time.time() - t.used_at > unused_seconds]
        return [await self.remove(key) for key in old]

    # --- files ------------------------------------------------------------------------------------------------------

    def _seal(self, place: Path, key: str, parts: Mapping[str, object], token: bytes) -> None:
        """Write the manifest: digests of the files as they were built, and who may speak to the clones."""
        files = {f.name: {"sha256": _digest(f), "bytes": f.stat().st_size} for f in sorted(place.iterdir())}
        manifest = {"key": key, "parts": parts, "files": files, "token": token.hex(), "created_at": time.time()}
        with open(os.open(place / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(manifest, file, indent=1)
        self._stamp(place, manifest)

    def _verified(self, key: str, spec: VmSpec) -> Template | None:
        """The template, if it is there and every file is as it was built; None (and a log line) when it is not.

        Hashing 256 MB takes ~0.2 s, so a file is hashed again only when its inode says that it may have changed, or
        after a reboot.
        """
        place = self.dir / key
        try:
            manifest = json.loads((place / MANIFEST).read_bytes())
            if not self._stamped(place, manifest):
                for name, is_ in manifest["files"].items():
                    if (place / name).stat().st_size != is_["bytes"] or _digest(place / name) != is_["sha256"]:
                        raise ImageError(f"{name} is not what was built")
                self._stamp(place, manifest)
            token = bytes.fromhex(manifest["token"])
            os.utime(place / _STAMP)
        except FileNotFoundError as error:
            if place.exists():
                log.warning("template is rebuilt", key=key[:12], reason=f"{error.filename} is missing")
            return None
        except (OSError, ValueError, KeyError, TypeError, ImageError) as error:
            log.warning("template is rebuilt", key=key[:12], reason=str(error))
            return None
        return Template(key=key, dir=place, spec=spec, token=token)

    def _stamp(self, place: Path, manifest: Mapping[str, object]) -> None:
        partial = place / f"{_STAMP}.{os.getpid()}"
        partial.write_text(json.dumps(_identity(place, manifest)))
        partial.rename(place / _STAMP)

    def _stamped(self, place: Path, manifest: Mapping[str, object]) -> bool:
        try:
            return bool(json.loads((place / _STAMP).read_bytes()) == _identity(place, manifest))
        except (OSError, ValueError):
            return False

    @asynccontextmanager
    async def _locked(self, key: str) -> AsyncIterator[None]:
        self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.dir / f".{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Waiting for another builder takes seconds: not on the loop, and given up when the caller is.
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.05)
            yield
        finally:
            os.close(fd)


async def _remove(place: Path) -> None:
    """While the lock is held: a thread that goes on removing after its caller was cancelled would take away what the
    next builder has made there."""
    await settle(asyncio.to_thread(shutil.rmtree, place, ignore_errors=True))


def _identity(place: Path, manifest: Mapping[str, object]) -> dict[str, object]:
    """What changes whenever a file's content may have: its inode's own marks, and the host's boot."""
    names = manifest["files"]
    assert isinstance(names, dict)
    marks = {}
    for name in names:
        info = (place / name).stat()
        marks[name] = [info.st_ino, info.st_size, info.st_mtime_ns]
    return {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "files": marks}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@functools.cache
def _recipe(driver: str) -> str:
    """Digest of the code that says how a VM is started and what is done in it: devices, kernel arguments, rehearsal.
    Whoever changes it need not remember to count a version up; the price is a rebuild after each update of that code.
    """
    here = Path(__file__)
    digest = hashlib.sha256()
    for path in (Path(sys.modules[driver].__file__ or ""), here, here.with_name("rehearsal.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _host_cpu() -> str:
    """Model and flags of the first CPU."""
    wanted = ("model name", "flags", "microcode")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(wanted))
