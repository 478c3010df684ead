"""The store of layers: what `requirements`, `packages` and `npm` of agents add to the guest's root; built once.

::

    <layers>/
      .lock                   flock: one build at a time
      .building-…/            an unfinished layer; if its builder died, the next build removes it
      .verified/<key>         the inode of the file that was hashed already
      .fetched/<sha256>       a file of another host, as far as it was fetched
      <key>/                  layer.json, layer.erofs

A key is the digest of everything that shapes a layer: its contents, and what it is laid upon. So agents with the same
requirements and packages share one, and a layer that no longer fits the image is never found. Running an agent looks
here. What is not here, but on another host, is fetched from there, or built if that can't be: somebody wanted it.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from swarm.base import files, process
from swarm.base.aio import finish_uninterrupted
from swarm.base.clock import iso
from swarm.base.log import logger
from swarm.base.progress import Progress, silent
from swarm.errors import HostError, ImageError, LayerMissing, NotFound, UsageError
from swarm.model import BUILT, Agent
from swarm.vm.driver import Image, Layer
from swarm.vm.image import elf, elsewhere, layer_build, pip, staging
from swarm.vm.image.build import require_root
from swarm.vm.image.elsewhere import LAYER, Elsewhere, Shared
from swarm.vm.image.oci.store import Imported

log = logger(__name__)

_MANIFEST: Final = "layer.json"
_FILE: Final = "layer.erofs"
_INSTALLED: Final = ("python", "debian", "npm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One layer, from its manifest. ``installed``: name -> version of everything in it."""

    key: str
    digest: str
    requirements: tuple[str, ...]
    npm: tuple[str, ...]
    packages: tuple[str, ...]
    installed: Mapping[str, str]
    size_bytes: int
    built_at: str  # ISO-8601 UTC


class Layers:
    """The layers in ``dir``. ``sources``: the directory of apt's configuration, which says where packages come from.
    ``others``: what other hosts have; ``imported``: what agents may see as their root instead."""

    def __init__(
        self,
        *,
        dir: Path,
        sources: Path = Path("/etc/apt"),
        others: Elsewhere | None = None,
        imported: Imported | None = None,
    ) -> None:
        self.dir = dir
        self._imported = imported
        self._sources = sources
        self._others = others

    async def find(self, agent: Agent, image: Image) -> Layer | None:
        """The agent's layer on that image, verified; None if it needs no layer. One that another host has is made here
        as well. Raises LayerMissing; NotFound or UsageError for an imported image."""
        if root := await self._root(agent):
            return root
        if not agent.needs_layer:
            return None
        key = ""
        try:
            key = _key(_shape(agent, image))
            return await asyncio.to_thread(self._verified, key)
        except FileNotFoundError:
            problem = "is not built for this guest image"
        except ImageError as error:
            problem = f"can't be used: {error}"
        if key and self._others is not None and await self._others.known(LAYER, key):
            try:
                return await self.build(agent, image)
            except (HostError, ImageError, UsageError) as error:
                raise _missing(agent, f"is not on this host: {error}") from error
        raise _missing(agent, problem)

    async def build(
        self, agent: Agent, image: Image, *, force: bool = False, progress: Progress = silent
    ) -> Layer | None:
        """The agent's layer. If it is missing, it is fetched from another host, or else built; built anew if ``force``.
        Needs the network, and root.

        An imported image is not fetched. Raises UsageError for requirements and packages that don't exist, NotFound,
        ImageError, HostError.
        """
        if root := await self._root(agent):
            return root
        if not agent.needs_layer:
            return None
        shape = _shape(agent, image)
        key = _key(shape)
        if not force and (layer := await self._find_complete(key)):
            return layer
        require_root("a layer")
        with files.host_errors(f"can't make {self.dir}"):
            files.make_directory(self.dir)
        why = list[str]()
        with elsewhere.saying(why), _build_errors(self.dir):
            async with staging.lock(self.dir, progress):
                if not force:
                    if layer := await self._find_complete(key):
                        return layer
                    found = await elsewhere.fetch(
                        self._others, LAYER, key, dir=self.dir, manifest=_MANIFEST, parts=self._parts, progress=progress
                    )
                    if found.name:
                        return await asyncio.to_thread(self._verified, key)
                    why.append(found.why)
                layer_build.check_host(self.dir)
                await finish_uninterrupted(asyncio.to_thread(staging.sweep, self.dir))
                async with staging.staged(self.dir) as stage:
                    installed = await layer_build.build(
                        sorted(set(agent.requirements)),
                        sorted(set(agent.packages)),
                        sorted(set(agent.npm)),
                        own_modules(agent),
                        image=image,
                        stage=stage,
                        sources=self._sources,
                        progress=progress,
                    )
                    await finish_uninterrupted(asyncio.to_thread(self._move_in, stage, key, shape, installed))
                return await asyncio.to_thread(self._verified, key)

    def list(self) -> list[LayerInfo]:
        """Every layer, newest first."""
        found = []
        for file in self.dir.glob(f"*/{_MANIFEST}"):
            try:
                manifest = json.loads(file.read_text())
                found.append(
                    LayerInfo(
                        key=file.parent.name,
                        digest=manifest["sha256"],
                        requirements=tuple(manifest["shape"]["requirements"]),
                        npm=tuple(manifest["shape"].get("npm", ())),
                        packages=tuple(manifest["shape"]["packages"]),
                        installed={k: v for some in _INSTALLED for k, v in manifest["installed"].get(some, {}).items()},
                        size_bytes=manifest["size_bytes"],
                        built_at=manifest["built_at"],
                    )
                )
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("layer skipped", path=str(file), reason=repr(error))
        return sorted(found, key=lambda info: info.built_at, reverse=True)

    def shared(self) -> builtins.list[Shared]:
        """Every layer, for other hosts; the newest first."""
        found = []
        for info in self.list():
            place = self.dir / info.key
            part = staging.Part(path=place / _FILE, size_bytes=info.size_bytes, sha256=info.digest)
            with contextlib.suppress(OSError):  # it has just been removed
                found.append(elsewhere.shared(LAYER, info.key, info.key, info.built_at, place / _MANIFEST, [part]))
        return found

    def key(self, agent: Agent, image: Image) -> str:
        """The name of the agent's layer, whether it exists or not."""
        return _key(_shape(agent, image))

    def named(self, digest: str) -> Layer | None:
        """The layer with that content, for templates that are rebuilt from a list."""
        own = next((i for i in self.list() if i.digest == digest), None)
        if own is None:
            return self._imported.named(digest) if self._imported else None
        return Layer(digest=own.digest, path=self.dir / own.key / _FILE)

    def remove(self, key: str) -> str:
        """Remove a layer; return its key. VMs that run from it are not affected: they have its file open. Raises
        NotFound."""
        fits = [info.key for info in self.list() if key and info.key.startswith(key)]
        if len(fits) != 1:
            raise NotFound(f"{len(fits) or 'no'} layers begin with {key!r}; see `swarm agent layers`")
        staging.remove(self.dir, fits[0])
        return fits[0]

    # --- files --------------------------------------------------------------------------------------------------------

    async def _root(self, agent: Agent) -> Layer | None:
        """The imported image that it names, if it names one."""
        if not agent.imported or not self._imported:
            return None
        found = await self._imported.layer(agent.image or "")
        assert found.root is not None
        if not agent.entry and not found.root.entry:
            raise UsageError(f"the image {agent.image!r} has no Entrypoint and no Cmd: `entry` must say what runs")
        if agent.runtime == "python" and not found.root.python:
            raise UsageError(f"the image {agent.image!r} has no Python 3.8 or newer in its PATH: use `runtime: exec`")
        if agent.installs and not (agent.image or "").startswith(BUILT):  # a row that another program wrote
            raise UsageError(
                f"what {agent.name!r} requires is not in the image {agent.image!r}: `swarm agent add` makes one with it"
            )
        return found

    async def _find_complete(self, key: str) -> Layer | None:
        try:
            return await asyncio.to_thread(self._verified, key)
        except FileNotFoundError:
            return None
        except ImageError as error:
            log.warning("layer is built again", reason=str(error))
            return None

    @staticmethod
    def _parts(manifest: dict[str, Any], key: str) -> builtins.list[staging.Part]:
        if _key(manifest["shape"]) != key:
            raise ImageError("it is of another layer")
        return [staging.Part(path=Path(_FILE), size_bytes=manifest["size_bytes"], sha256=manifest["sha256"])]

    def _verified(self, key: str) -> Layer:
        """Raises FileNotFoundError, or ImageError if it is not as it was built."""
        place = self.dir / key
        text = (place / _MANIFEST).read_text()
        try:
            manifest = json.loads(text)
            part = staging.Part(path=place / _FILE, size_bytes=manifest["size_bytes"], sha256=manifest["sha256"])
            lacks = sorted(elf.explained(*one) for one in manifest["installed"].get("lacks", {}).items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(f"{place / _MANIFEST} can't be read ({error!r})") from error
        if wrong := staging.damage([part], self.dir / staging.VERIFIED / key):
            raise ImageError(wrong)
        return Layer(digest=part.sha256, path=part.path, lacks=tuple(lacks))

    def _move_in(self, stage: Path, key: str, shape: Mapping[str, Any], installed: layer_build.Installed) -> None:
        file = stage / _FILE
        file.chmod(0o444)
        manifest = {
            "shape": shape,
            "installed": asdict(installed),
            "sha256": files.sha256_of(file),
            "size_bytes": file.stat().st_size,
            "built_at": iso(),
        }
        staging.write_manifest(stage / _MANIFEST, manifest)
        stage.chmod(0o755)
        staging.move_in(stage, self.dir / key)


class HostLayers:
    """Layers of agents that run as plain processes of this host: directories of modules for the host's Python.

    Their `packages` are not installed: such an agent uses the host's own programs.
    """

    def __init__(self, *, dir: Path) -> None:
        self.dir = dir

    async def find(self, agent: Agent, image: Image) -> Layer | None:
        _needs_no_vm(agent)
        if not agent.requirements:
            return None
        key = _key(_host_shape(agent))
        if not (self.dir / key).is_dir():
            raise _missing(agent, "is not built for this host's Python")
        return Layer(digest=key, path=self.dir / key)

    async def build(
        self, agent: Agent, image: Image, *, force: bool = False, progress: Progress = silent
    ) -> Layer | None:
        _needs_no_vm(agent)
        if not agent.requirements:
            return None
        pip.check(agent.requirements)
        final = self.dir / _key(_host_shape(agent))
        if final.is_dir() and not force:
            return Layer(digest=final.name, path=final)
        with _build_errors(self.dir):
            files.make_directory(self.dir)
            async with staging.lock(self.dir, progress):
                await finish_uninterrupted(asyncio.to_thread(staging.sweep, self.dir))
                async with staging.staged(self.dir) as stage:
                    progress("installing requirements", 0.1)
                    python = f"Python {platform.python_version()} on this host"
                    await pip.run(
                        [sys.executable, str(pip.location()), "install", *pip.OPTIONS, "--no-compile", "--target",
                         str(stage / "new"), "--", *agent.requirements],
                        where=stage,
                        python=python,
                    )  # fmt: skip
                    progress("compiling", 0.7)
                    await process.run(  # on all CPUs, which pip does not; a file that can't be compiled is not an error
                        [sys.executable, "-I", "-S", "-m", "compileall", "-q", "-j", "0", str(stage / "new")],
                        timeout_seconds=pip.TIMEOUT_SECONDS,
                        check=False,
                    )
                    await finish_uninterrupted(asyncio.to_thread(staging.move_in, stage / "new", final))
        return Layer(digest=final.name, path=final)


def _needs_no_vm(agent: Agent) -> None:
    if agent.imported:
        raise UsageError(f"the agent {agent.name!r} runs on the image {agent.image!r}, which takes a VM")


def own_modules(agent: Agent) -> dict[str, bytes]:
    """The agent's own files among its preloads, name -> text. They are part of the layer, because a template is made
    before any agent's files are in the VM."""
    files = {name: agent.path / f"{name}.py" for name in sorted(agent.preload) if "." not in name}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def _shape(agent: Agent, image: Image) -> dict[str, Any]:
    """Everything that shapes a layer. Wheels depend only on the interpreter and the C library, so they outlive an
    update of the image."""
    try:
        upon: dict[str, Any] = {
            "python": re.match(r"\d+\.\d+", image.packages["python3-minimal"])[0],  # type: ignore[index]
            "libc": re.match(r"\d+\.\d+", image.packages["libc6"])[0],  # type: ignore[index]
        }
    except (KeyError, TypeError):
        raise ImageError(f"image {image.digest[:12]} does not say which Debian it is made of: build it again") from None
    if agent.packages or agent.npm:  # which takes Debian's nodejs
        upon |= {"base": image.base, "installed": dict(image.packages)}
    if own := own_modules(agent):
        upon["modules"] = {name: hashlib.sha256(text).hexdigest() for name, text in own.items()}
    return {
        "builder": layer_build.BUILDER_VERSION,
        "machine": platform.machine(),
        "requirements": sorted(set(agent.requirements)),
        "packages": sorted(set(agent.packages)),
        "upon": upon,
    } | ({"npm": sorted(set(agent.npm))} if agent.npm else {})


def _host_shape(agent: Agent) -> dict[str, Any]:
    python = [sys.implementation.cache_tag, platform.machine()]
    return {"builder": layer_build.BUILDER_VERSION, "requirements": sorted(set(agent.requirements)), "host": python}


def _key(shape: Mapping[str, Any]) -> str:
    return staging.digest_of(shape)[:32]


def _missing(agent: Agent, problem: str) -> LayerMissing:
    return LayerMissing(
        f"the layer of the agent {agent.name}@{agent.version} (what it requires) {problem}: "
        f"run `swarm agent build {agent.name}@{agent.version}`, which needs the network"
    )


def _build_errors(dir: Path) -> AbstractContextManager[None]:
    return staging.build_errors("a layer", dir, pip.NOT_BUILT)
