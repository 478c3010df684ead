"""Templates on disk: booted, paused VMs from which clones are made.

A template is named by the digest of everything that shapes the state of a VM. So a template with the right name fits,
and one that no longer fits is never found. It is built under a lock in a directory beside its place, and renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.base import files
from swarm.base.aio import stoppable
from swarm.base.log import logger
from swarm.errors import BootFailed, HostError, NoSpace, NotFound
from swarm.vm.driver import Driver, Probe, Template, VmSpec, host_tsc_khz
from swarm.vm.image import staging

log = logger(__name__)

OnBuild = Callable[[int], None]  # called before a template is made, with about how many seconds that takes

FORMAT = 3
MANIFEST = "template.json"
# Templates of which no clone was made for this long are removed after a build: an update leaves the old ones behind.
UNUSED_SECONDS = 7 * 86400.0
_STAMP = "verified.json"
_FULL_BYTES = 64 << 10  # a disk with less free space counts as full: some file systems keep a few blocks back
_NOT_BUILT = "the template was not built"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInfo:
    """For lists. ``size_bytes``: what the files take on disk; ``used_at``: the last clone, seconds since the epoch."""

    key: str
    driver: str
    image: str
    memory_mb: int
    vcpus: int
    disk_mb: int
    preload: tuple[str, ...]
    interpreter: bool
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
        "interpreter": spec.interpreter,
        "layer": spec.layer.digest if spec.layer else "",
    }


def key_of(parts: Mapping[str, object]) -> str:
    return staging.digest_of(parts)[:32]


class Templates:
    def __init__(self, *, dir: Path) -> None:
        self.dir = dir

    async def find(self, spec: VmSpec, parts: Mapping[str, object]) -> Template | None:
        """The template of this shape, verified; None if it is missing or damaged."""
        return await stoppable(functools.partial(self._verified, key_of(parts), spec))

    async def get(
        self,
        spec: VmSpec,
        parts: Mapping[str, object],
        build: Callable[[Path], Awaitable[bytes]],
        on_build: OnBuild | None = None,
    ) -> Template:
        """The template of this shape: verified, or built now by ``build(dir)``, which fills an empty directory and
        returns the token that the template's agentd knows. Concurrent callers, in any process, build it once;
        ``on_build`` is called in each of them before it waits."""
        key = key_of(parts)
        verified = functools.partial(self._verified, key, spec)
        if found := await stoppable(verified):
            return found
        if on_build is not None:
            # On an idle machine; a large package to preload takes as long again.
            on_build((3 if parts.get("accelerator") == "kvm" else 15) * (2 if spec.preload else 1))
        async with self._locked(key):
            if found := await stoppable(verified):
                return found
            began = time.monotonic()
            stage = self._stage(key)
            await staging.discard(stage)  # of a dead builder
            with self._explained(_NOT_BUILT):
                stage.mkdir(mode=0o700)
            try:
                token = await build(stage)
                with self._explained(_NOT_BUILT):
                    await stoppable(functools.partial(self._seal, stage, key, parts, token))
                    await staging.discard(self.dir / key)  # it failed its verification
                    stage.rename(self.dir / key)
            except (OSError, BootFailed) as error:
                # A VMM does not say why it could not write. (`f_bfree`: root may use the last 5 % of an ext4.)
                disk = os.statvfs(stage)
                if not files.is_full(error) and disk.f_bfree * disk.f_frsize > _FULL_BYTES:
                    raise
                raise self._full(_NOT_BUILT) from error
            finally:
                await staging.discard(stage)
            try:
                for old in await self.collect(unused_seconds=UNUSED_SECONDS):
                    log.info("template removed: no clone was made of it for long", key=old[:12])
            except HostError as error:  # the new template is ready all the same
                log.warning("unused templates were not removed", error=str(error))
            log.info("template built", key=key[:12], seconds=round(time.monotonic() - began, 2))
            return Template(key=key, dir=self.dir / key, spec=spec, token=token)

    def all(self) -> list[TemplateInfo]:
        """The templates with a readable manifest. Raises HostError if the directory can't be read."""
        found = []
        for key in self._keys():
            place = self.dir / key
            try:
                data = json.loads((place / MANIFEST).read_bytes())
                parts = data["parts"]
                found.append(
                    TemplateInfo(
                        key=data["key"],
                        driver=parts["driver"],
                        image=parts["image"],
                        memory_mb=parts["memory_mb"],
                        vcpus=parts["vcpus"],
                        disk_mb=parts["disk_mb"],
                        preload=tuple(parts["preload"]),
                        interpreter=parts.get("interpreter", False),
                        layer=parts.get("layer", ""),
                        size_bytes=sum((place / name).stat().st_blocks * 512 for name in data["files"]),
                        created_at=data["created_at"],
                        used_at=self._used_at(key),
                    )
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being removed, or torn: `get` rebuilds it
        return found

    async def remove(self, key: str) -> str:
        """Remove the template whose key begins with ``key``, also a torn one; returns the whole key. Running clones
        keep their memory. Raises NotFound, HostError."""
        matches = [each for each in self._keys() if key and each.startswith(key)]
        if len(matches) != 1:
            raise NotFound(f"{len(matches) or 'no'} templates begin with {key!r}; see `swarm template list`")
        async with self._locked(matches[0]):
            if not await self._remove(matches[0]):
                raise NotFound(f"the template {matches[0]} has just been removed by someone else")
        return matches[0]

    async def collect(self, *, unused_seconds: float) -> list[str]:
        """Remove templates, also torn ones, of which no clone was made for that long, and what dead builders left.
        Returns the keys of the former. Templates that are being built or removed now are skipped. Raises HostError."""
        removed = []
        for key in sorted({*self._keys(), *self._keys(building=True)}):
            fd = self._try_lock(key)
            if fd is None:
                continue
            try:
                await staging.discard(self._stage(key))
                # Looked up now, under the lock: it may have been used, or removed, meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - self._used_at(key) > unused_seconds and await self._remove(key):
                        removed.append(key)
            finally:
                os.close(fd)
        return removed

    # --- files ------------------------------------------------------------------------------------------------------

    def _stage(self, key: str) -> Path:
        """Where it is built and removed. The holder of the key's lock owns it."""
        return self.dir / f".{key}.building"

    def _keys(self, *, building: bool = False) -> list[str]:
        pattern = re.compile(r"\.([0-9a-f]{32})\.building" if building else r"([0-9a-f]{32})")
        try:
            names = os.listdir(self.dir)  # noqa: PTH208 - names are all we want
        except FileNotFoundError:
            return []
        except OSError as error:
            rights = " (only root may read templates)" if isinstance(error, PermissionError) else ""
            raise HostError(f"can't look into {self.dir}: {error.strerror}{rights}") from error
        return sorted(match[1] for name in names if (match := pattern.fullmatch(name)))

    def _used_at(self, key: str) -> float:
        return staging.last_used(self.dir / key, self.dir / key / _STAMP)

    async def _remove(self, key: str) -> bool:
        """While its lock is held; False if it is missing. Renamed first: nobody finds a part of it, and what a killed
        process leaves is collected."""
        stage = self._stage(key)
        await staging.discard(stage)
        with self._explained("the template was not removed"):
            try:
                (self.dir / key).rename(stage)
            except FileNotFoundError:
                return False
        await staging.discard(stage)
        return True

    def _full(self, what: str) -> NoSpace:
        return NoSpace(files.no_space(self.dir, what, setting="SWARM_TEMPLATES_DIR"))

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if files.is_full(error):
                raise self._full(what) from error
            raise HostError(f"can't use {self.dir} ({error.strerror}): {what}") from error

    def _seal(
        self, stage: Path, key: str, parts: Mapping[str, object], token: bytes, check: Callable[[], None]
    ) -> None:
        """Write the manifest: digests of the files as they were built, and the token of the clones' agentd."""
        built = {
            f.name: {"sha256": files.sparse_sha256_of(f, check), "bytes": f.stat().st_size}
            for f in sorted(stage.iterdir())
        }
        manifest = {"key": key, "parts": parts, "files": built, "token": token.hex(), "created_at": time.time()}
        files.write_atomically(stage / MANIFEST, json.dumps(manifest, indent=1), mode=0o600)
        staging.stamp(_parts(stage, manifest), stage / _STAMP, flushed=False)

    def _verified(self, key: str, spec: VmSpec, check: Callable[[], None]) -> Template | None:
        """The template; None (and a line in the log) if it is missing or not as it was built. Raises HostError."""
        place = self.dir / key
        try:
            manifest = json.loads((place / MANIFEST).read_bytes())
            token = bytes.fromhex(manifest["token"])
            reason = staging.damage(_parts(place, manifest, check), place / _STAMP, flushed=False)
        except FileNotFoundError:
            if not place.exists():
                return None
            reason = f"{MANIFEST} is missing"
        except (OSError, ValueError, KeyError, TypeError) as error:
            staging.raise_host_error(error, place)
            reason = str(error)
        if reason:
            log.warning("template is rebuilt", key=key[:12], reason=reason)
            return None
        return Template(key=key, dir=place, spec=spec, token=token)

    def _try_lock(self, key: str) -> int | None:
        with self._explained("a template can't be locked"):
            files.make_directory(self.dir, 0o700)
            return files.try_lock(self.dir / f".{key}.lock", create=0o600)

    @asynccontextmanager
    async def _locked(self, key: str) -> AsyncIterator[None]:
        while (fd := self._try_lock(key)) is None:  # noqa: ASYNC110 - the kernel does not notify
            await asyncio.sleep(0.05)
        try:
            yield
        finally:
            os.close(fd)


def _parts(place: Path, manifest: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> list[staging.Part]:
    """Not flushed to disk when they are built: writing 256 MB would take longer than booting another VM."""
    digest = functools.partial(files.sparse_sha256_of, check=check)  # `disk_mb` may make a file of a terabyte of holes
    return [
        staging.Part(path=place / name, size_bytes=file["bytes"], sha256=file["sha256"], digest=digest)
        for name, file in manifest["files"].items()
    ]


@functools.cache
def _recipe(driver: str) -> str:
    """Digest of the code that says how a VM is started and what is done in it: devices, kernel arguments, warm-up.
    So nobody has to remember to raise a version; the price is a rebuild after each update of that code.
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
