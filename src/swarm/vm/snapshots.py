"""Snapshots on disk: VMs as they were at one moment, each a directory named by its id.

::

    <dir>/<id>/                 memory, state, work, and snapshot.json: spec, identity, digests of the three
    <dir>/.building-<id>/       one that is being written, locked (flock) by the process that does

The directory is root's alone (0700), and so are the files (0600): a VM's memory holds what its programs know, secrets
too, and the manifest the keys of its identity. A snapshot is verified before it runs. Unlike a template it can't be
made again, so a damaged one is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from swarm.base import files, sparse
from swarm.base.aio import finish_uninterrupted, stoppable
from swarm.base.log import logger
from swarm.channel import Identity
from swarm.errors import BootFailed, HostError, ImageError, NoSpace, NotFound
from swarm.vm.driver import Image, Layer, Snapshot, VmSpec
from swarm.vm.image import staging

log = logger(__name__)

FORMAT: Final = 1
MANIFEST: Final = "snapshot.json"
# One that nobody knows yet is not collected: its row may be about to be written.
NEW_SECONDS: Final = 3600.0
_UNLOCKED_SECONDS: Final = 10.0
_STAMP: Final = "verified.json"
_ID: Final = re.compile(r"[0-9a-f]{32}")
_BYTES: Final = ("seed", "token")  # of an identity


class Images(Protocol):
    async def find(self, ref: str | None = None) -> Image: ...


class Layers(Protocol):
    def named(self, digest: str) -> Layer | None: ...


class Stage:
    """A snapshot that is being written into ``dir``, which is removed unless it is sealed. See `Snapshots.stage`."""

    def __init__(self, *, id: str, dir: Path, owner: Snapshots, project: str | None) -> None:
        self.id = id
        self.dir = dir
        self._owner, self._project = owner, project

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Report a full disk as NoSpace, and other errors of files as HostError."""
        with self._owner.explained():
            yield

    async def seal(
        self,
        *,
        spec: VmSpec,
        identity: Identity,
        driver: str,
        accelerator: str,
        version: str,
        disk_still: bool = False,
        lasts: bool = False,
    ) -> Snapshot:
        """Give it its manifest, with the digests of its files, and its name. ``lasts``: it is all that there is of its
        VM, so its way to the disk begins at once. Raises NoSpace (also if it is more than all snapshots together may
        take), HostError."""
        with self.explained():
            about = {"spec": spec_as_json(spec), "driver": driver, "accelerator": accelerator, "version": version}
            manifest = {
                "format": FORMAT,
                "id": self.id,
                **about,
                "disk_still": disk_still,
                "identity": _identity_as_json(identity),
                "created_at": time.time(),
                "owner": self._owner.owner,
                "project": self._project,
            }
            digest = await stoppable(lambda check: _write_manifest(self.dir, manifest, check))
            size = _size_of(self.dir)
            await asyncio.to_thread(self._owner.check_limit, self._project)
            final = self._owner.dir / self.id
            self.dir.rename(final)
            self.dir = final
            if lasts:  # nobody waits for it: a busy disk takes its time
                with contextlib.suppress(RuntimeError):  # no more threads
                    threading.Thread(target=_write_back, args=(final,), name="write-back", daemon=True).start()
        return Snapshot(
            id=self.id, dir=final, spec=spec, identity=identity, digest=digest, size_bytes=size,
            driver=driver, accelerator=accelerator, version=version, disk_still=disk_still,
        )  # fmt: skip


class Snapshots:
    """The snapshots in ``dir``, which together may take ``limit_bytes`` of disk (None: what there is), those of one
    project ``project_share`` of that. ``owner``: the database that knows those that are made here; others may share the
    directory."""

    def __init__(
        self,
        *,
        dir: Path,
        limit_bytes: int | None,
        images: Images,
        layers: Layers,
        owner: str,
        project_share: float = 1.0,
    ) -> None:
        self.dir = dir
        self.limit_bytes, self.project_share = limit_bytes, project_share
        self.owner = owner
        self._images = images
        self._layers = layers

    @asynccontextmanager
    async def stage(self, project: str | None = None) -> AsyncIterator[Stage]:
        """A place for a new snapshot, for `Launcher.save` and `Launcher.pause`, and whose it is. What is not sealed at
        the end of the block is removed. Raises NoSpace, HostError."""
        id = secrets.token_hex(16)
        with self.explained():
            files.make_directory(self.dir, 0o700)
            await asyncio.to_thread(self.check_limit, project)
            dir = self.dir / f"{staging.BUILDING}{id}"
            dir.mkdir(mode=0o700)
            lock = files.try_lock(dir)
        try:
            yield Stage(id=id, dir=dir, owner=self, project=project)
        finally:
            try:
                await staging.discard(dir)
            finally:
                if lock is not None:
                    os.close(lock)

    async def find(self, id: str) -> Snapshot:
        """The snapshot, verified. Raises NotFound; ImageError if it is damaged, or if its image or layer is gone;
        HostError."""
        manifest = await stoppable(lambda check: self._verified(id, check))
        spec = dict(manifest["spec"])
        image = await self._images.find(spec.pop("image"))
        layer = None
        if wanted := spec.pop("layer"):
            layer = self._layers.named(wanted)
            if layer is None:
                raise ImageError(
                    f"snapshot {id} needs a layer that was removed ({wanted[:12]}); see `swarm agent layers`"
                )
        spec["preload"] = tuple(spec["preload"])
        identity: dict[str, Any] = manifest["identity"]
        return Snapshot(
            id=id,
            dir=self.dir / id,
            spec=VmSpec(image=image, layer=layer, **spec),
            driver=manifest["driver"],
            accelerator=manifest["accelerator"],
            version=manifest["version"],
            disk_still=manifest.get("disk_still", False),
            identity=Identity(**{**identity, **{name: bytes.fromhex(identity[name]) for name in _BYTES}}),
            digest=staging.digest_of(manifest["files"]),
            size_bytes=_size_of(self.dir / id),
        )

    def renew(self, id: str) -> None:
        """Whose row can't be written yet: it is new, so it is not collected."""
        with contextlib.suppress(OSError):
            os.utime(self.dir / id)

    async def remove(self, id: str) -> bool:
        """Remove a snapshot; False if there is none. VMs that were started from it keep running. Raises HostError."""
        if not _ID.fullmatch(id):
            return False
        doomed = self.dir / f"{staging.BUILDING}{id}"
        with self.explained():
            try:
                (self.dir / id).rename(doomed)  # first: nobody finds a part of it, and what is left is collected
            except FileNotFoundError:
                return False
        await staging.discard(doomed)
        return True

    async def collect(self, keep: Collection[str], *, new_seconds: float = NEW_SECONDS) -> list[str]:
        """Remove the owner's snapshots that are not in ``keep``, except new ones, and what dead processes left half
        written. Returns the ids of the former. Raises HostError."""
        removed = []
        for name in self._names():
            place = self.dir / name
            if _ID.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    if (
                        name not in keep
                        and time.time() - place.stat().st_mtime > new_seconds
                        and self._is_own(name)
                        and await self.remove(name)
                    ):
                        removed.append(name)
            elif name.startswith(staging.BUILDING):
                with contextlib.suppress(FileNotFoundError):
                    # One that has just been made may not be locked yet.
                    young = time.time() - place.stat().st_mtime < _UNLOCKED_SECONDS
                    lock = None if young else files.try_lock(place)
                    if lock is not None:
                        try:
                            await finish_uninterrupted(staging.discard(place))
                        finally:
                            os.close(lock)
        return removed

    def _is_own(self, name: str) -> bool:
        return bool(self._manifest(name).get("owner") == self.owner)

    def _manifest(self, name: str) -> Mapping[str, Any]:
        """Empty if nobody can say."""
        try:
            found = json.loads((self.dir / name / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def used_bytes(self, project: str | None = None) -> int:
        """What they take on disk, with those that are being written; or those of a project. Blocks that files share
        count for each."""
        names = self._names()
        if project is not None:
            names = [name for name in names if self._manifest(name).get("project") == project]
        return sum(_size_of(self.dir / name) for name in names)

    def images(self) -> set[str]:
        """Digests of the images that they need."""
        return self._needed("image")

    def layers(self) -> set[str]:
        """Digests of the layers that they need."""
        return self._needed("layer")

    def _needed(self, what: str) -> set[str]:
        found = set()
        for name in self._names():
            with contextlib.suppress(KeyError, TypeError):
                found.add(str(self._manifest(name)["spec"][what]))
        return found

    def lift_limits(self) -> None:
        """From now on they may take all that there is."""
        self.limit_bytes, self.project_share = None, 1.0

    def check_limit(self, project: str | None = None) -> None:
        """Raises NoSpace if they take more than they may, or those of ``project`` do."""
        if self.limit_bytes is not None and (used := self.used_bytes()) >= self.limit_bytes:
            raise NoSpace(
                f"the snapshots in {self.dir} take {used / 1e9:.1f} GB, and SWARM_SNAPSHOTS_GB allows "
                f"{self.limit_bytes / 1e9:g}: remove some (`swarm snapshot list`), or raise it"
            )
        if project is None or self.project_share >= 1:
            return
        disk = os.statvfs(self.dir)
        most = (self.limit_bytes or disk.f_blocks * disk.f_frsize) * self.project_share
        if (used := self.used_bytes(project)) >= most:
            raise NoSpace(
                f"the snapshots of the project {project!r} take {used / 1e9:.3g} GB, and those of one project may take "
                f"{most / 1e9:.3g} here (SWARM_PROJECT_SHARE): remove some, or end sandboxes that sleep"
            )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, BootFailed) as error:
            # A VMM does not say why it could not write.
            if files.is_full(error) or (isinstance(error, BootFailed) and files.has_no_room(self.dir)):
                said = files.no_space(self.dir, "the snapshot was not taken", setting="SWARM_SNAPSHOTS_DIR")
                raise NoSpace(said) from error
            if isinstance(error, BootFailed):
                raise
            raise HostError(f"can't use {self.dir}: {error.strerror or error}") from error

    def _names(self) -> list[str]:
        with self.explained():
            try:
                return sorted(os.listdir(self.dir))  # noqa: PTH208 - names are all we want
            except FileNotFoundError:
                return []

    def _verified(self, id: str, check: functools.partial[None] | Any) -> Mapping[str, Any]:
        place = self.dir / id
        if not _ID.fullmatch(id) or not place.is_dir():
            raise NotFound(f"there is no snapshot {id!r} on this host; see `swarm snapshot list`")
        try:
            manifest: dict[str, Any] = json.loads((place / MANIFEST).read_bytes())
            if manifest["format"] != FORMAT:
                raise ImageError(f"snapshot {id} was written by another version of Swarm")
            reason = staging.damage(_parts(place, manifest["files"], check), place / _STAMP, flushed=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            staging.raise_host_error(error, place)
            reason = f"{MANIFEST}: {error!r}"
        if reason:
            raise ImageError(f"snapshot {id} is damaged, so it can't be used: {reason}")
        return manifest


def spec_as_json(spec: VmSpec) -> dict[str, Any]:
    """What a VM must be like to run a snapshot. Its image and layer are named by their digests."""
    named = {"image": spec.image.digest, "layer": spec.layer.digest if spec.layer else ""}
    plain = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in named}
    return {**plain, **named, "preload": list(spec.preload)}


def _identity_as_json(identity: Identity) -> dict[str, Any]:
    fields = {f.name: getattr(identity, f.name) for f in dataclasses.fields(identity)}
    return {k: v.hex() if k in _BYTES else v for k, v in fields.items()} | {"seed": ""}


def _write_manifest(dir: Path, manifest: dict[str, Any], check: Any) -> str:
    """Returns the digest over all files."""
    built = {}
    for file in sorted(dir.iterdir()):
        file.chmod(0o600)
        built[file.name] = {"sha256": files.sparse_sha256_of(file, check), "bytes": file.stat().st_size}
    files.write_atomically(dir / MANIFEST, json.dumps({**manifest, "files": built}, indent=1), mode=0o600)
    staging.stamp(_parts(dir, built, check), dir / _STAMP, flushed=False)
    return staging.digest_of(built)


def _write_back(dir: Path) -> None:
    with contextlib.suppress(OSError):  # it was removed
        for file in dir.iterdir():
            sparse.write_back(file)


def _parts(place: Path, built: Mapping[str, Any], check: Any) -> list[staging.Part]:
    digest = functools.partial(files.sparse_sha256_of, check=check)
    return [
        staging.Part(path=place / name, size_bytes=file["bytes"], sha256=file["sha256"], digest=digest)
        for name, file in built.items()
    ]


def _size_of(dir: Path) -> int:
    size = 0
    with contextlib.suppress(OSError):  # it is being removed
        for entry in os.scandir(dir):
            size += entry.stat(follow_symlinks=False).st_blocks * 512
    return size
