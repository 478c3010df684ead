"""Templates on disk: booted, paused VMs from which clones are made.

A template is named by the digest of everything that shapes the state of a VM, so one that fits is right by its name
and one that no longer fits is never found. It is built under a lock in a directory beside, and renamed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from swarm.base.aio import finish_uninterrupted
from swarm.errors import BootFailed, HostError, ImageError, NotFound
from swarm.vm.driver import Driver, Probe, Template, VmSpec, host_tsc_khz

log = structlog.get_logger(__name__)

FORMAT = 2
MANIFEST = "template.json"
# Whenever one is built, those that no clone was made from for so long go: an update leaves the old ones behind.
UNUSED_SECONDS = 7 * 86400.0
_STAMP = "verified.json"
_NOT_ITS_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM})
_FULL_BYTES = 64 << 10  # a disk with less free is full: some file systems keep a few blocks back
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
            place = self._building(key)
            await _remove(place)  # of a builder that died
            with self._said("the template was not built"):
                place.mkdir(mode=0o700)
            try:
                token = await build(place)
                with self._said("the template was not built"):
                    await finish_uninterrupted(asyncio.to_thread(self._seal, place, key, parts, token))
                    await _remove(self.dir / key)  # failed its verification
                    place.rename(self.dir / key)
            except (OSError, BootFailed) as error:
                # A VMM does not say why it could not write. (`f_bfree`: root may have the last 5 % of an ext4.)
                disk = os.statvfs(place)
                if getattr(error, "errno", 0) != errno.ENOSPC and disk.f_bfree * disk.f_frsize > _FULL_BYTES:
                    raise
                raise self._full("the template was not built") from error
            finally:
                await _remove(place)
            try:
                for old in await self.collect(unused_seconds=UNUSED_SECONDS):
                    log.info("template removed: nobody used it for long", key=old[:12])
            except HostError as error:  # the new one is there
                log.warning("templates that nobody uses stay", error=str(error))
            log.info("template built", key=key[:12], seconds=round(time.monotonic() - began, 2))
            return Template(key=key, dir=self.dir / key, spec=spec, token=token)

    def all(self) -> list[TemplateInfo]:
        """Those that are whole, by their manifests. Raises HostError when they can't be looked at."""
        found = []
        for key in self._keys():
            manifest = self.dir / key / MANIFEST
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
                        used_at=_used_at(manifest.parent),
                    )
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being removed, or torn: `get` rebuilds it
        return found

    async def remove(self, key: str) -> str:
        """Remove the template whose key begins so, whole or torn; returns the whole key. Running clones keep their
        memory. Raises NotFound, HostError."""
        matches = [each for each in self._keys() if key and each.startswith(key)]
        if len(matches) != 1:
            raise NotFound(f"{len(matches) or 'no'} templates begin with {key!r}; see `swarm template list`")
        async with self._locked(matches[0]):
            if not await self._take_away(matches[0]):
                raise NotFound(f"somebody else has just removed the template {matches[0]}")
        return matches[0]

    async def collect(self, *, unused_seconds: float) -> list[str]:
        """Remove what no clone was made from for so long, whole or torn, and what dead builders left. Returns the keys
        of the former. What somebody builds or removes at this moment is left to him. Raises HostError."""
        gone = []
        for key in sorted({*self._keys(), *self._keys(building=True)}):
            fd = self._try_lock(key)
            if fd is None:
                continue
            try:
                await _remove(self._building(key))
                with contextlib.suppress(FileNotFoundError):  # asked now: it may have been used, or removed, meanwhile
                    if time.time() - _used_at(self.dir / key) > unused_seconds and await self._take_away(key):
                        gone.append(key)
            finally:
                os.close(fd)
        return gone

    # --- files ------------------------------------------------------------------------------------------------------

    def _building(self, key: str) -> Path:
        """Whoever holds the lock of the key owns what is there."""
        return self.dir / f".{key}.building"

    def _keys(self, *, building: bool = False) -> list[str]:
        pattern = re.compile(r"\.([0-9a-f]{32})\.building" if building else r"([0-9a-f]{32})")
        try:
            names = os.listdir(self.dir)  # noqa: PTH208 - names are all we want
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HostError(f"can't look into {self.dir}: {error.strerror} (templates are root's)") from error
        return sorted(match[1] for name in names if (match := pattern.fullmatch(name)))

    async def _take_away(self, key: str) -> bool:
        """While its lock is held; False when there is none. Renamed first: nobody finds the half of it, and what a kill
        leaves is collected."""
        place = self._building(key)
        await _remove(place)
        with self._said("the template was not removed"):
            try:
                (self.dir / key).rename(place)
            except FileNotFoundError:
                return False
        await _remove(place)
        return True

    def _full(self, what: str) -> HostError:
        return HostError(f"no space left on the disk that holds {self.dir}: {what}")

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise self._full(what) from error
            raise HostError(f"can't use {self.dir} ({error.strerror}): {what}") from error

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
            with contextlib.suppress(OSError):
                os.utime(place / _STAMP)
        except FileNotFoundError as error:
            if place.exists():
                log.warning("template is rebuilt", key=key[:12], reason=f"{error.filename} is missing")
            return None
        except (OSError, ValueError, KeyError, TypeError, ImageError) as error:
            if isinstance(error, OSError) and error.errno in _NOT_ITS_FAULT:
                raise HostError(f"can't look into {place}: {error.strerror}") from error
            log.warning("template is rebuilt", key=key[:12], reason=str(error))
            return None
        return Template(key=key, dir=place, spec=spec, token=token)

    def _stamp(self, place: Path, manifest: Mapping[str, object]) -> None:
        """Only a saving: where it can't be written, the files are hashed each time."""
        partial = place / f"{_STAMP}.{os.getpid()}.{threading.get_ident()}"
        with contextlib.suppress(OSError):
            try:
                partial.write_text(json.dumps(_identity(place, manifest)))
                partial.rename(place / _STAMP)
            finally:
                partial.unlink(missing_ok=True)

    def _stamped(self, place: Path, manifest: Mapping[str, object]) -> bool:
        try:
            return bool(json.loads((place / _STAMP).read_bytes()) == _identity(place, manifest))
        except (OSError, ValueError):
            return False

    @asynccontextmanager
    async def _locked(self, key: str) -> AsyncIterator[None]:
        # Waiting for another builder takes seconds: not on the loop, and given up when the caller is.
        while (fd := self._try_lock(key)) is None:  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.05)
        try:
            yield
        finally:
            os.close(fd)

    def _try_lock(self, key: str) -> int | None:
        """A descriptor that holds the key's lock until it is closed; None while another one does."""
        with self._said("a template can't be locked"):
            self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.dir / f".{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd


async def _remove(place: Path) -> None:
    """While the lock is held: a thread that goes on removing after its caller was cancelled would take away what the
    next builder has made there."""
    await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, place, ignore_errors=True))


def _used_at(place: Path) -> float:
    """Raises FileNotFoundError when there is no template."""
    stamp = place / _STAMP
    return (stamp if stamp.exists() else place).stat().st_mtime


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
    for path in (Path(sys.modules[driver].__file__ or ""), here, here.with_name("warmup.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _host_cpu() -> str:
    """Model and flags of the first CPU."""
    wanted = ("model name", "flags", "microcode")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(wanted))
