"""The store of images: one directory per image, named by its digest, never changed once it is there.

::

    <images>/
      .lock                   flock: one build at a time; its holder owns everything named .building-*
      .building-…/            an unfinished image; if its builder died, the next build removes it
      .verified/<digest>      the inodes of the files that were hashed already
      .fetched/<sha256>       a file of another host, as far as it was fetched
      <sha256>/               manifest.json, vmlinuz, vmlinux, initramfs, root.erofs

A digest is the sha256 over the parts' digests and the boot arguments, so an image with one changed byte is another
image. Every part is hashed before it is booted.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from swarm.base import files
from swarm.base.aio import finish_uninterrupted
from swarm.base.clock import iso
from swarm.base.log import logger
from swarm.base.progress import Progress, silent
from swarm.errors import ImageError, NotFound
from swarm.model import names_imported
from swarm.vm.driver import Image
from swarm.vm.image import build, elsewhere, staging
from swarm.vm.image.base import build_base
from swarm.vm.image.build import Recipe
from swarm.vm.image.elsewhere import IMAGE, Elsewhere, Fetched, Shared
from swarm.vm.image.oci.store import Imported

log = logger(__name__)

GUEST: Final = Path(__file__).resolve().parents[2] / "guest"
_MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1
SETTING: Final = "SWARM_IMAGES_DIR"
# Images that were not used for this long are removed after a build: an update leaves the old ones behind.
UNUSED_SECONDS: Final = 14 * 86400.0
# Share of a build's time, measured (docs/adr/0003-image.md).
_BASE_SHARE: Final = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """One image, from its manifest; its parts have not been hashed."""

    digest: str
    recipe: str
    built_at: str  # ISO-8601 UTC
    size_bytes: int
    kernel_version: str
    boot_args: str
    packages: Mapping[str, str]  # name -> version
    dir: Path


class Images:
    """The images in ``dir``. ``cache`` keeps bases between builds; ``guest`` holds our own guest files; ``others``:
    what other hosts have; ``imported``: those that agents may name as well."""

    def __init__(
        self,
        *,
        dir: Path,
        cache: Path,
        guest: Path = GUEST,
        default: str = "",
        others: Elsewhere | None = None,
        imported: Imported | None = None,
    ) -> None:
        self.dir = dir
        self._others = others
        self._imported = imported
        self._cache = cache
        self._guest = guest
        self._default = default
        self._last: tuple[int, str, ImageInfo] | None = None  # directory's time, recipe, and what `_current` found

    async def build(
        self,
        *,
        force: bool = False,
        kernel: Path | None = None,
        boot_args: str | None = None,
        keep: Collection[str] = (),
        progress: Progress = silent,
    ) -> Image:
        """The image of the current recipe. If it is missing, it is fetched from another host, or else built. ``force``
        builds it from newly fetched packages.

        A build removes images and bases that were not used for long, except those in ``keep`` (digests).

        ``kernel`` (an ELF or a bzImage with its drivers built in) replaces the distribution's; ``boot_args`` are the
        arguments it needs. Raises ImageError, HostError.
        """
        recipe = await asyncio.to_thread(build.recipe, self._guest, kernel=kernel, boot_args=boot_args)
        if not force and (image := await self._find_complete(recipe)):
            return image
        build.require_root("an image")
        why = list[str]()
        with elsewhere.saying(why), self._build_errors():
            files.make_directory(self.dir)
            async with staging.lock(self.dir, progress):
                if not force:
                    if image := await self._find_complete(recipe):
                        return image  # the build we waited for made it
                    found = await self._fetch(recipe.key, progress)
                    if found.name:
                        return await asyncio.to_thread(self._verified, _info(self.dir / found.name))
                    why.append(found.why)
                await finish_uninterrupted(asyncio.to_thread(staging.sweep, self.dir))
                base = await self._base(recipe, force, lambda step, f: progress(step, _BASE_SHARE * f))
                image = await self._assemble(
                    recipe, base, kernel, lambda step, f: progress(step, _BASE_SHARE + (1 - _BASE_SHARE) * f)
                )
                await finish_uninterrupted(asyncio.to_thread(self.collect, {image.digest, *keep}))
                return image

    async def find(self, ref: str | None = None) -> Image:
        """The image whose digest begins with ``ref`` (or with the default), else the newest of the current recipe.
        Every part is verified. One that another host has is fetched. For an imported image it is that of no ``ref``, in
        whose VM its agents run.

        Raises ImageError if it is missing (the message says how to build it) or a part was changed; NotFound or
        ImageError if ``ref`` fits no image or several.
        """
        if names_imported(ref) and self._imported and ref:
            if not self._imported.knows(ref):
                await self._imported.layer(ref)  # of another host
            ref = None
        ref = ref or self._default or None
        if ref is None:
            recipe = await asyncio.to_thread(build.recipe, self._guest)
            info = self._current(recipe) or await self._info_of_another(recipe.key, lambda: self._current(recipe))
            if info is None:
                raise ImageError(f"{self.dir} has no guest image for this version of Swarm: run `swarm image build`")
        else:
            try:
                info = self._named(ref)
            except NotFound:
                if (found := await self._info_of_another(ref, lambda: None)) is None:
                    raise
                info = found
        return await asyncio.to_thread(self._verified, info)

    async def _info_of_another(self, wanted: str, made: Callable[[], ImageInfo | None]) -> ImageInfo | None:
        """Of an image that another host has, fetched, unless it was ``made`` meanwhile. None if none has it."""
        if self._others is None or not await self._others.known(IMAGE, wanted):
            return None
        with self._build_errors():
            files.make_directory(self.dir)
            async with staging.lock(self.dir, silent):
                if (info := made()) is not None:
                    return info
                found = await self._fetch(wanted, silent)
        if not found.name:
            raise ImageError(
                f"{self.dir} lacks a guest image that another host has, and it can't be fetched: {found.why}; run "
                "`swarm image build`"
            )
        return _info(self.dir / found.name)

    async def _fetch(self, wanted: str, progress: Progress) -> Fetched:
        return await elsewhere.fetch(
            self._others, IMAGE, wanted, dir=self.dir, manifest=_MANIFEST, parts=_parts, progress=progress
        )

    def _build_errors(self) -> AbstractContextManager[None]:
        return staging.build_errors("an image", self.dir, "an image needs 1 GB while it is built", setting=SETTING)

    def shared(self) -> builtins.list[Shared]:
        """Every image, for other hosts; the newest first."""
        found = []
        for info in self.list():
            with contextlib.suppress(OSError, ImageError):  # it has just been removed
                manifest = _manifest(info.dir)
                parts = [replace(part, path=info.dir / part.path) for part in _parts(manifest, info.digest)]
                path = info.dir / _MANIFEST
                found.append(elsewhere.shared(IMAGE, info.digest, info.recipe, info.built_at, path, parts))
        return found

    def list(self) -> list[ImageInfo]:
        """Every image, newest first. Unreadable ones are skipped, with a line in the log."""
        found = []
        for dir in sorted(self.dir.glob("[0-9a-f]*")) if self.dir.exists() else ():
            try:
                found.append(_info(dir))
            except ImageError as error:
                log.warning("image skipped", reason=str(error))
        return sorted(found, key=lambda info: info.built_at, reverse=True)

    def remove(self, ref: str) -> str:
        """Remove an image; return its digest. VMs that run from it are not affected: they have its files open."""
        digest = self._named(ref).digest
        staging.remove(self.dir, digest)
        return digest

    def used(self, image: Image) -> AbstractContextManager[None]:
        """For the length of the block, no build of any process removes this image as unused."""
        return staging.used(image.dir)

    def collect(self, keep: Collection[str], *, unused_seconds: float = UNUSED_SECONDS) -> tuple[str, ...]:
        """Remove images that were not used for that long, and that no live process has `used`; return their digests."""
        old = []
        for info in self.list():
            wanted = info.digest in keep or (self._default and info.digest.startswith(self._default))
            if not wanted and staging.unused(
                info.dir, self.dir / staging.VERIFIED / info.digest, seconds=unused_seconds
            ):
                log.info("image removed: it was not used for long", image=info.digest[:12], built=info.built_at)
                old.append(self.remove(info.digest))
        return tuple(old)

    def _stamp(self, info: ImageInfo) -> Path:
        return self.dir / staging.VERIFIED / info.digest

    # --- finding --------------------------------------------------------------------------------------------------

    def _current(self, recipe: Recipe) -> ImageInfo | None:
        """The newest of the recipe. Every ticket needs it, so it is remembered until the directory's time changes: then
        an image was added or removed."""
        try:
            stamp = self.dir.stat().st_mtime_ns
        except OSError:
            return None
        if self._last is None or self._last[:2] != (stamp, recipe.key):
            info = next((info for info in self.list() if info.recipe == recipe.key), None)
            self._last = (stamp, recipe.key, info) if info else None
        return self._last[2] if self._last else None

    def _named(self, ref: str) -> ImageInfo:
        fits = [info for info in self.list() if info.digest.startswith(ref)] if ref else []
        if not fits:
            raise NotFound(f"no image {ref!r} in {self.dir}; see `swarm image list`")
        if len(fits) > 1:
            raise ImageError(
                f"{ref!r} could be any of {', '.join(i.digest[:12] for i in fits)}: give more of the digest"
            )
        return fits[0]

    async def _find_complete(self, recipe: Recipe) -> Image | None:
        """The current image; None if it is missing or damaged, and has to be built."""
        if info := self._current(recipe):
            try:
                return await asyncio.to_thread(self._verified, info)
            except ImageError as error:
                log.warning("image is built again", reason=str(error))
        return None

    def _verified(self, info: ImageInfo) -> Image:
        """Raises ImageError if a part is not as it was built."""
        manifest = _manifest(info.dir)
        paths = {name: info.dir / part["file"] for name, part in manifest["parts"].items()}
        parts = [
            staging.Part(path=paths[name], size_bytes=part["size_bytes"], sha256=part["sha256"])
            for name, part in manifest["parts"].items()
        ]
        if wrong := staging.damage(parts, self._stamp(info)):
            raise ImageError(f"image {info.digest[:12]} is damaged: {wrong}; {_REBUILD}")
        return Image(
            digest=info.digest,
            dir=info.dir,
            kernel=paths["kernel"],
            kernel_elf=paths["vmlinux"],
            root=paths["root"],
            initramfs=paths.get("initramfs"),
            boot_args=info.boot_args,
            base=manifest["base"],
            packages=info.packages,
        )

    # --- building -------------------------------------------------------------------------------------------------

    async def _base(self, recipe: Recipe, force: bool, progress: Progress) -> Path:
        """The directory of the recipe's base, built if it is missing or torn, or if ``force``."""
        files.make_directory(self._cache)
        final = self._cache / recipe.base_key
        async with staging.lock(self._cache, progress):
            await finish_uninterrupted(asyncio.to_thread(staging.sweep, self._cache))
            with contextlib.suppress(OSError):
                os.utime(final / "base.json")
            await finish_uninterrupted(asyncio.to_thread(_collect_bases, self._cache, recipe.base_key))
            if not force and await asyncio.to_thread(_base_is_complete, final):
                build.check_host(for_base=False, where=self.dir)
                return final
            build.check_host(for_base=True, where=self._cache)
            async with staging.staged(self._cache) as stage:
                await build_base(recipe, stage, progress)
                await finish_uninterrupted(asyncio.to_thread(staging.move_in, stage, final))
        return final

    async def _assemble(self, recipe: Recipe, base: Path, kernel: Path | None, progress: Progress) -> Image:
        base_manifest = json.loads((base / "base.json").read_text())
        async with staging.staged(self.dir) as stage:
            parts = await build.assemble(recipe, base, stage, progress)
            described: dict[str, dict[str, Any]] = {}
            for name, path in sorted(parts.items()):
                path.chmod(0o444)  # immutable, and a VMM with a uid of its own may read it by a descriptor
                described[name] = {
                    "file": path.name,
                    "sha256": await asyncio.to_thread(files.sha256_of, path),
                    "size_bytes": path.stat().st_size,
                }
            manifest = {
                "format": _FORMAT,
                "recipe": recipe.key,
                "base": recipe.base_key,
                "builder_version": build.BUILDER_VERSION,
                "created_at": iso(),
                "boot_args": recipe.boot_args,
                "kernel_version": base_manifest["kernel_version"] if kernel is None else f"given: {kernel.name}",
                "packages": base_manifest["packages"],
                "guest": recipe.guest_digests,
                "parts": described,
            }
            digest = _digest(manifest)
            manifest["digest"] = digest
            staging.write_manifest(stage / _MANIFEST, manifest)
            stage.chmod(0o755)
            await finish_uninterrupted(asyncio.to_thread(staging.move_in, stage, self.dir / digest))
        return await asyncio.to_thread(self._verified, _info(self.dir / digest))


_REBUILD: Final = "run `swarm image build` to build it again"


def _manifest(dir: Path) -> dict[str, Any]:
    """The manifest of the image in ``dir``, whose name must be the manifest's digest."""
    try:
        manifest = json.loads((dir / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            raise ImageError(f"image {dir} is of another version of Swarm (format {manifest['format']}); {_REBUILD}")
        parts = [p["file"] for p in manifest["parts"].values()]
        if _digest(manifest) != dir.name or any(Path(file).name != file for file in parts):
            raise ImageError(f"image {dir} is damaged: its manifest was changed; {_REBUILD}")
        return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"image {dir} is damaged: its manifest can't be read ({error!r}); {_REBUILD}") from error


def _info(dir: Path) -> ImageInfo:
    manifest = _manifest(dir)
    return ImageInfo(
        digest=dir.name,
        recipe=manifest["recipe"],
        built_at=manifest["created_at"],
        size_bytes=sum({p["file"]: p["size_bytes"] for p in manifest["parts"].values()}.values()),
        kernel_version=manifest["kernel_version"],
        boot_args=manifest["boot_args"],
        packages=manifest["packages"],
        dir=dir,
    )


def _parts(manifest: dict[str, Any], digest: str) -> list[staging.Part]:
    """The files of an image with this digest."""
    if manifest["format"] != _FORMAT or _digest(manifest) != digest:
        raise ImageError("it is of another image, or of another version of Swarm")
    parts = {part["file"]: part for part in manifest["parts"].values()}.values()
    return [
        staging.Part(path=Path(part["file"]), size_bytes=part["size_bytes"], sha256=part["sha256"]) for part in parts
    ]


def _digest(manifest: Mapping[str, Any]) -> str:
    parts = {name: [part["file"], part["sha256"], part["size_bytes"]] for name, part in manifest["parts"].items()}
    return staging.digest_of({"parts": parts, "boot_args": manifest["boot_args"]})


def _collect_bases(cache: Path, current: str) -> None:
    """Remove bases that no build used for long. The caller holds the lock of the cache."""
    for manifest in cache.glob("[0-9a-f]*/base.json"):
        if manifest.parent.name != current and time.time() - manifest.stat().st_mtime > UNUSED_SECONDS:
            log.info("base removed: no build used it for long", base=manifest.parent.name[:12])
            shutil.rmtree(manifest.parent, ignore_errors=True)


def _base_is_complete(base: Path) -> bool:
    try:
        parts = json.loads((base / "base.json").read_text())["parts"]
        return all(files.sha256_of(base / name) == sha256 for name, sha256 in parts.items())
    except (OSError, ValueError, KeyError):
        return False
