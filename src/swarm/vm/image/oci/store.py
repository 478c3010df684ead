"""The store of imported OCI images: what agents whose `image` names one see as their root.

::

    <images>/oci/
      .lock                   flock: one import at a time
      .building-…/            an unfinished import; if its importer died, the next one removes it
      .builds/                what buildah keeps of builds, so that the next one finds their steps
      .blobs/sha256/<digest>  manifests, configs and layers as they were fetched, shared by all images
      .verified/<key>         the inode of the file that was hashed already
      names.json              name -> the image that it means here
      <key>/                  image.json, root.erofs

A key is the digest of the image's config, which covers its layers, and of how Swarm unpacks them. A name stays what it
was when it was imported, whatever its registry does, until somebody imports or pulls it again. Running an agent only
looks here; it fetches nothing.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from swarm.base import files
from swarm.base.aio import finish_uninterrupted
from swarm.base.clock import iso
from swarm.base.log import logger
from swarm.base.progress import Progress, silent
from swarm.errors import ImageError, NotFound, UsageError
from swarm.model import BUILT
from swarm.vm.driver import Layer, Root
from swarm.vm.image import elsewhere, staging
from swarm.vm.image.build import require_root
from swarm.vm.image.elsewhere import Elsewhere, Shared
from swarm.vm.image.oci import build, config, fetch, others, unpack
from swarm.vm.image.oci.build import Buildah, Recipe
from swarm.vm.image.oci.fetch import Access, Fetched
from swarm.vm.image.oci.info import ImportedInfo, Name, key_of, stored_root
from swarm.vm.image.oci.reference import Reference, known_as, parse
from swarm.vm.image.oci.unpack import FILE, Limits

log = logger(__name__)

_MANIFEST: Final = "image.json"
_NAMES: Final = "names.json"
_BUILDS: Final = ".builds"
_BLOBS: Final = ".blobs"
_LEAST_DIGEST: Final = 12  # of the hexadecimal digits of a digest that an agent gives
SETTING: Final = "SWARM_IMAGES_DIR"


class Imported:
    """The imported images in ``dir``. ``others``: what other hosts have."""

    def __init__(self, *, dir: Path, limits: Limits | None = None, others: Elsewhere | None = None) -> None:
        self.dir = dir
        self._others = others
        self.blobs = dir / _BLOBS
        self.limits = limits or Limits()

    def knows(self, image: str) -> bool:
        """Does an agent with that `image` run on an imported one?"""
        return self._key_of(image) is not None

    async def layer(self, image: str) -> Layer:
        """The root that agents with that `image` see, verified. One that another host has is fetched, and has its name
        here from then on. Raises NotFound, ImageError; both say how to get it."""
        try:
            return await self._find(image)
        except (NotFound, ImageError) as error:
            found = await self._fetch_elsewhere(image)
            if not found.name:
                raise type(error)(f"{error}; {found.why}" if found.why else str(error)) from None
        return await self._find(image)

    async def _find(self, image: str) -> Layer:
        if (key := self._key_of(image)) is None:
            raise NotFound(missing(image))
        try:
            return await asyncio.to_thread(self._verified, key)
        except FileNotFoundError:
            raise NotFound(missing(image)) from None
        except ImageError as error:
            name = self.names().get(known_as(image))
            raise ImageError(f"{error}; {anew(image, name.source if name else '')} again") from error

    def named(self, digest: str) -> Layer | None:
        """The image with that `Layer.digest`, for VMs that are made from a list. Not verified."""
        for info in self.list():
            layer = self._layer(self._manifest(info.key), info.key)
            if layer.digest == digest:
                return layer
        return None

    def list(self) -> list[ImportedInfo]:
        """Every image, by name; those without one last."""
        names, found = self.names(), []
        for file in self.dir.glob(f"*/{_MANIFEST}"):
            key = file.parent.name
            try:
                told = self._manifest(key)
                found.append(
                    ImportedInfo(
                        key=key,
                        digest=told["digest"],
                        config_digest=told["config_digest"],
                        names=tuple(one for one in names.values() if one.key == key),
                        layers=told["layers"],
                        size_bytes=told["size_bytes"],
                        fetched_bytes=told["fetched_bytes"],
                        made_at=told["made_at"],
                        root=stored_root(told["root"]),
                        blobs=tuple(told["blobs"]),
                    )
                )
            except (OSError, ImageError, KeyError, TypeError) as error:
                log.warning("imported image skipped", path=str(file), reason=repr(error))
        return sorted(found, key=lambda info: (not info.names, [one.name for one in info.names], info.key))

    def names(self) -> dict[str, Name]:
        """What each name means. Raises ImageError."""
        place = self.dir / _NAMES
        try:
            told = json.loads(place.read_bytes())
            return {name: Name(**{**one, "access": Access(**one["access"])}) for name, one in told.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(f"{place} can't be read ({error!r}): remove it, and import the images again") from error

    def info(self, ref: str) -> ImportedInfo:
        """The image of that name, digest or key. Raises NotFound."""
        key = self._key_of(ref) or ref
        fits = [info for info in self.list() if key and info.key.startswith(key)]
        if len(fits) != 1:
            raise NotFound(missing(ref) if not fits else f"{ref!r} could be any of {len(fits)} images: give more of it")
        return fits[0]

    def shared(self) -> builtins.list[Shared]:
        """Every image, for other hosts."""
        found = builtins.list[Shared]()
        for info in self.list():
            place = self.dir / info.key
            with contextlib.suppress(OSError, ImageError):  # it has just been removed
                found += others.offers(info, place, place / _MANIFEST, self._manifest(info.key)["sha256"])
        return found

    async def _fetch_elsewhere(self, image: str) -> elsewhere.Fetched:
        """Raises ImageError, HostError of this host."""
        if self._others is None:
            return elsewhere.Fetched()
        wanted = known_as(image)
        with self._errors():
            async with self._locked(silent), staging.staged(self.dir) as stage:
                if (here := self._key_of(image)) and await self._is_complete(here):
                    return elsewhere.Fetched(name=here)  # what was waited for has fetched it
                found = await self._others.fetch(
                    others.IMPORTED, wanted, into=stage, manifest=_MANIFEST, parts=others.parts, progress=silent
                )
                if found.name:
                    key = others.key(found.name)
                    await finish_uninterrupted(asyncio.to_thread(staging.move_in, stage, self.dir / key))
                    if not wanted.startswith("sha256:"):
                        reference = Reference(name=wanted, source=others.SOURCE)
                        self._name(reference, Access(), key, str(self._manifest(key)["digest"]))
        return replace(found, why=f"and it can't be fetched: {found.why}" if found.why else "")

    # --- importing ----------------------------------------------------------------------------------------------------

    async def import_(
        self, text: str, *, name: str = "", access: Access | None = None, progress: Progress = silent
    ) -> tuple[Name, bool]:
        """Fetch an image and make it one that agents can run on, under the name by which it is asked for, or ``name``.
        False: it was here already. Needs root. Raises UsageError, ImageError, HostError."""
        reference = parse(text)
        if name:
            reference = replace(reference, name=parse(name).name)
        if reference.name.startswith(BUILT):  # of a registry, whose names anybody may take
            raise UsageError(f"{reference.name}: names that begin with {BUILT} are of images that are built for agents")
        require_root("an imported image")
        fetch.check_host()
        access = (access or Access()).anywhere()
        self._make_blobs()
        with self._errors():
            async with self._locked(progress):
                pinned = ""
                if reference.in_registry:
                    progress("asking the registry", 0.0)
                    pinned = await fetch.digest_of(reference, access)
                    known = next((one.key for one in self.names().values() if one.digest == pinned), None)
                    if (
                        known
                        and await self._is_complete(known)
                        and fetch.has(self.blobs, self._manifest(known)["blobs"])
                    ):
                        return self._name(reference, access, known, pinned), False
                return await self._import(reference, access, pinned, progress)

    async def build(
        self, recipe: Recipe | Callable[[Path], Awaitable[Recipe]], *, name: str, source: str = "",
        access: Access | None = None, progress: Progress = silent,
    ) -> tuple[Name, bool]:  # fmt: skip
        """Build an image from a Dockerfile, and import it under that name. False: it was here already, as it is when
        nothing that goes into it has changed. ``source``: what is said of where it came from. ``recipe`` may
        be what makes one, in a directory of the build's own. Needs root. Raises UsageError, ImageError, HostError."""
        reference = Reference(name=parse(name).name, source=source)
        require_root("an image of a Dockerfile")
        fetch.check_host()
        build.check_host()
        if isinstance(recipe, Recipe):
            reference = replace(reference, source=source or f"{build.SOURCE}{recipe.dockerfile.absolute()}")
            await asyncio.to_thread(build.check, recipe, self.limits)
        access = (access or Access()).anywhere()
        self._make_blobs()
        with self._errors():
            async with self._locked(progress):
                await build.tidy(cache := self.dir / _BUILDS, self.limits.bytes)
                async with staging.staged(self.dir) as stage:
                    if not isinstance(recipe, Recipe):
                        recipe = await recipe(stage / "recipe")
                        await asyncio.to_thread(build.check, recipe, self.limits)
                    buildah = Buildah(name=reference.name, cache=cache, stage=stage, limits=self.limits)
                    base = stage / "base" if recipe.base else None
                    if base:
                        blobs = list(self.info(recipe.base).blobs)
                        await asyncio.to_thread(fetch.lay_out, base, self.blobs, blobs)
                    id_ = await buildah.build(recipe, access, progress, base=base)
                    key = buildah.imported(id_)
                    if is_new := not (key and await self._is_complete(key)):
                        pushed = replace(reference, source=await buildah.push(id_))
                        key = (await self._import(pushed, access, "", progress))[0].key
                        buildah.remember(id_, key)
                return self._name(reference, access, key, str(self._manifest(key)["digest"])), is_new

    async def _import(self, reference: Reference, access: Access, pinned: str, progress: Progress) -> tuple[Name, bool]:
        async with staging.staged(self.dir) as stage:
            image = await self._fetch(reference, access, pinned, stage, progress)
            key = key_of(image.config_digest)
            if is_new := not await self._is_complete(key):
                try:
                    await self._make(image, key, reference, stage, progress)
                except ImageError:
                    # skopeo doesn't look into what it finds to be here already, and a disk may have lost power.
                    torn = await asyncio.to_thread(fetch.damaged, self.blobs, image.blobs)
                    for blob in torn:
                        blob.unlink()
                    if not torn:
                        raise
                    log.warning("a layer was torn, and is fetched again", image=reference.name)
                    return await self._import(reference, access, pinned, progress)
            return self._name(reference, access, key, pinned or image.digest), is_new

    async def _fetch(
        self, reference: Reference, access: Access, pinned: str, stage: Path, progress: Progress
    ) -> Fetched:
        return await fetch.copy(
            reference, access, pinned=pinned, layout=stage / "layout", blobs=self.blobs, most=self.limits.bytes,
            progress=lambda size: progress(f"fetching: {unpack.about(size)}", 0.1),
        )  # fmt: skip

    async def _make(self, image: Fetched, key: str, reference: Reference, stage: Path, progress: Progress) -> None:
        name = reference.name
        root = await unpack.unpack(
            image, stage=stage, blobs=self.blobs, name=name, limits=self.limits,
            progress=lambda step, _: progress(step, 0.4),
        )  # fmt: skip
        told = await asyncio.to_thread(config.root_of, image.config, root, name)
        file = await unpack.pack(
            root, stage=stage, blobs=self.blobs, name=name,
            progress=lambda step, share: progress(step, 0.7 + 0.3 * share),
        )  # fmt: skip
        ready = stage / "ready"
        ready.mkdir()
        file.rename(ready / FILE)
        await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, root))
        await finish_uninterrupted(asyncio.to_thread(self._move_in, ready, key, image, told))

    def _move_in(self, ready: Path, key: str, image: Fetched, root: Root) -> None:
        file = ready / FILE
        file.chmod(0o444)
        manifest = {
            "digest": image.digest,
            "config_digest": image.config_digest,
            "layers": len(image.layers),
            "fetched_bytes": image.size_bytes,
            "blobs": image.blobs,
            "root": asdict(root),
            "sha256": files.sha256_of(file),
            "size_bytes": file.stat().st_size,
            "made_at": iso(),
        }
        staging.write_manifest(ready / _MANIFEST, manifest)
        ready.chmod(0o755)
        staging.move_in(ready, self.dir / key)

    def _name(self, reference: Reference, access: Access, key: str, digest: str) -> Name:
        """The caller holds the lock."""
        made = Name(
            name=reference.name, key=key, digest=digest, source=reference.source, imported_at=iso(), access=access
        )
        self._write_names({**self.names(), made.name: made})
        return made

    def _write_names(self, names: Mapping[str, Name]) -> None:
        told = {name: asdict(one) for name, one in sorted(names.items())}
        files.write_atomically(self.dir / _NAMES, json.dumps(told, indent=1), flush=True)

    # --- upkeep -------------------------------------------------------------------------------------------------------

    async def is_behind(self, name: Name) -> bool:
        """Has its registry another image under that name by now? Files are always read again. Raises UsageError too."""
        if name.source.startswith(build.SOURCE):
            raise UsageError(f"{name.name} was built: {anew(name.name, name.source)} again")
        if name.source == others.SOURCE:
            raise UsageError(f"{name.name} came from another host: after `swarm image rm`, the next ticket fetches it")
        reference = Reference(name=name.name, source=name.source)
        return not reference.in_registry or await fetch.digest_of(reference, name.access) != name.digest

    async def remove(self, ref: str) -> ImportedInfo:
        """Remove a name; and the image, once it has none. VMs that run from it have its file open. Raises NotFound."""
        async with self._locked(silent):
            info = self.info(ref)
            names = self.names()
            own = known_as(ref)
            gone = [own] if own in names else [one.name for one in info.names]
            self._write_names({name: one for name, one in names.items() if name not in gone})
            if not any(one.name not in gone for one in info.names):
                await finish_uninterrupted(asyncio.to_thread(staging.remove, self.dir, info.key))
                await finish_uninterrupted(asyncio.to_thread(self._collect_blobs))
            return info

    async def prune(self, keep: Collection[str], *, unused: Collection[str] = ()) -> tuple[tuple[str, ...], int]:
        """Remove the names in ``unused``, images without a name, but for those in ``keep`` (`Layer.digest`), and what
        was fetched for images that are gone, or kept of builds. Returns what was removed, and how many bytes."""
        async with self._locked(silent):
            removed, freed = list(unused), 0
            self._write_names({name: one for name, one in self.names().items() if name not in unused})
            for info in self.list():
                if not info.names and self._layer(self._manifest(info.key), info.key).digest not in keep:
                    await finish_uninterrupted(asyncio.to_thread(staging.remove, self.dir, info.key))
                    removed.append(info.key)
                    freed += info.size_bytes
            freed += await build.discard(self.dir / _BUILDS)
            return tuple(removed), freed + await finish_uninterrupted(asyncio.to_thread(self._collect_blobs))

    def damage(self, info: ImportedInfo) -> str:
        """What is wrong with an image, all of which is read; '' if nothing is."""
        (self.dir / staging.VERIFIED / info.key).unlink(missing_ok=True)
        try:
            self._verified(info.key)
        except (ImageError, FileNotFoundError) as error:
            return str(error)
        return ""

    def _collect_blobs(self) -> int:
        wanted = {blob for info in self.list() for blob in info.blobs}
        freed = 0
        for blob in (self.blobs / "sha256").glob("*"):
            if blob.name not in wanted:
                freed += blob.stat().st_size
                blob.unlink()
        return freed

    # --- files --------------------------------------------------------------------------------------------------------

    def _make_blobs(self) -> None:
        with files.host_errors(f"can't make {self.dir}"):
            files.make_directory(self.blobs)
            self.blobs.chmod(0o700)  # images may be private

    @asynccontextmanager
    async def _locked(self, progress: Progress) -> AsyncIterator[None]:
        """What an interrupted import left is removed first."""
        if not self.dir.is_dir():
            with files.host_errors(f"can't make {self.dir}"):
                files.make_directory(self.dir)
        async with staging.lock(self.dir, progress):
            await finish_uninterrupted(asyncio.to_thread(staging.sweep, self.dir))
            yield

    def _errors(self) -> Any:
        return staging.build_errors("an imported image", self.dir, "the image was not imported", setting=SETTING)

    def _key_of(self, image: str) -> str | None:
        """By its name as it was imported, or by a digest: `sha256:…`, or enough of its beginning."""
        names = self.names()
        if found := names.get(image) or names.get(known_as(image)):
            return found.key
        if not image.startswith("sha256:") or len(image) < len("sha256:") + _LEAST_DIGEST:
            return None
        fits = {one.key for one in names.values() if one.digest.startswith(image)}
        fits |= {
            info.key for info in self.list() if any(d.startswith(image) for d in (info.digest, info.config_digest))
        }
        return fits.pop() if len(fits) == 1 else None

    async def _is_complete(self, key: str) -> bool:
        try:
            await asyncio.to_thread(self._verified, key)
            return True
        except FileNotFoundError:
            return False
        except ImageError as error:
            log.warning("image is imported again", reason=str(error))
            return False

    def _verified(self, key: str) -> Layer:
        """Raises FileNotFoundError, or ImageError if it is not as it was made."""
        manifest = self._manifest(key)
        layer = self._layer(manifest, key)
        part = staging.Part(path=layer.path, size_bytes=manifest["size_bytes"], sha256=manifest["sha256"])
        if wrong := staging.damage([part], self.dir / staging.VERIFIED / key):
            raise ImageError(f"the imported image {key[:12]} is damaged: {wrong}")
        return layer

    def _layer(self, manifest: Mapping[str, Any], key: str) -> Layer:
        digest = staging.digest_of({"file": manifest["sha256"], "root": manifest["root"]})
        return Layer(digest=digest, path=self.dir / key / FILE, root=stored_root(manifest["root"]))

    def _manifest(self, key: str) -> dict[str, Any]:
        """Raises FileNotFoundError, ImageError."""
        place = self.dir / key / _MANIFEST
        try:
            told = json.loads(place.read_bytes())
            stored_root(told["root"])
            return {**told, "sha256": str(told["sha256"]), "size_bytes": int(told["size_bytes"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(f"{place} can't be read ({error!r})") from error


def missing(image: str) -> str:
    return f"the image {image!r} is not on this host: {anew(image)}, `swarm image list` shows those that are here"


def anew(image: str, source: str = "") -> str:
    if image.startswith(BUILT):
        return f"`swarm agent build {image.removeprefix(BUILT).partition(':')[0]}` builds it"
    if source.startswith(build.SOURCE):
        return f"`swarm image build --name {image}` builds it"
    return f"`swarm image import {image}` fetches it"
