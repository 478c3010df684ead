"""Agents that come as archives from other programs: kept in a temporary place, unpacked, checked, added."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swarm import agents
from swarm.admin import layers, packages
from swarm.agents import bundle
from swarm.base.aio import finish_uninterrupted
from swarm.base.files import is_full, no_space
from swarm.base.manifest import Invalid, Problem
from swarm.base.progress import silent
from swarm.errors import Conflict, HostError, NoSpace, NotFound, UsageError
from swarm.model import BUILT, Agent
from swarm.store.store import Store
from swarm.vm.driver import Layer
from swarm.vm.image.layer import HostLayers, Layers

if TYPE_CHECKING:
    from swarm.engine.engine import ImageSource

MAX_BYTES: Final = 128 << 20  # of an archive; unpacked, `bundle.MAX_BUNDLE_BYTES`
AT_ONCE: Final = 2
_NAME: Final = "agent.tar.gz"
_LEFT_SECONDS: Final = 86_400.0  # what is older was left by a server that was killed


@asynccontextmanager
async def scratch(data_dir: Path) -> AsyncIterator[Path]:
    """A directory for what a request sends, which is removed at the end. Raises NoSpace, HostError, also when what is
    done there fails so."""
    into = data_dir / "uploads"
    try:
        made = await finish_uninterrupted(asyncio.to_thread(_made, into))
        try:
            yield made
        finally:
            await finish_uninterrupted(asyncio.to_thread(shutil.rmtree, made, ignore_errors=True))
    except OSError as error:
        said = "what was sent can't be kept"
        if is_full(error):
            raise NoSpace(no_space(into, said)) from None
        raise HostError(f"{said}: {error.strerror or error}") from None


def _made(into: Path) -> Path:
    into.mkdir(mode=0o700, exist_ok=True)
    for left in into.iterdir():
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - _LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=into))


class Uploads:
    """``into``: where agents' files are installed; ``data_dir``: where archives are, until then."""

    def __init__(self, *, into: Path, data_dir: Path, images: ImageSource, layers: Layers | HostLayers) -> None:
        self._into, self._data_dir, self._images, self._layers = into, data_dir, images, layers
        self._open = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Path]:
        """A name for an archive that is removed at the end, with what is unpacked beside it. Raises Conflict if there
        are `AT_ONCE` already, NoSpace, HostError."""
        if self._open >= AT_ONCE:
            raise Conflict(f"{AT_ONCE} agents are being uploaded: try again when they are done")
        self._open += 1
        try:
            async with scratch(self._data_dir) as place:
                yield place / _NAME
        finally:
            self._open -= 1

    async def layer_of(self, agent: Agent) -> Layer | None:
        """None if it needs none. Raises LayerMissing, ImageError, NotFound."""
        if not agent.needs_layer and not agent.imported:
            return None
        return await self._layers.find(agent, await self._images.find(agent.image))

    async def problems(self, archive: Path) -> list[Problem]:
        """What is wrong with an agent; its layer is not built."""
        try:
            with _named(archive):
                await asyncio.to_thread(agents.read_package, await _unpacked(archive))
        except Invalid as error:
            return list(error.problems)
        except UsageError as error:
            return [Problem(line=0, column=0, message=str(error))]
        return []

    async def add(self, store: Store, archive: Path, *, replace: bool, by: str) -> Agent:
        """As `swarm agent add`: its layer is built first, so that an agent that can't run is not registered."""
        with _named(archive):
            directory = await _unpacked(archive)
            agent = await asyncio.to_thread(agents.read, directory)
        try:
            await layers.build(agent, self._images, self._layers, progress=silent)
        except NotFound:
            if not (agent.image or "").startswith(BUILT):
                raise
            raise Conflict(
                f"the image of {agent.name} is not built, and no archive's is: unpack it on the server's host, look at "
                "it, and `swarm agent add` the directory"
            ) from None
        with _named(archive):
            return await packages.add_agent(store, directory, self._into, replace=replace, by=by)


async def _unpacked(archive: Path) -> Path:
    into = archive.parent / "files"
    into.mkdir()
    return await finish_uninterrupted(asyncio.to_thread(bundle.unpack, archive, into))


@contextlib.contextmanager
def _named(archive: Path) -> Iterator[None]:
    """Errors name the archive and its files as its sender knows them."""
    try:
        yield
    except UsageError as error:
        said = str(error)
        inner = sorted((str(one) for one in (archive.parent / "files").glob("*") if one.is_dir()), reverse=True)
        for place in (*inner, str(archive.parent / "files")):
            said = said.replace(f"{place}/", "").replace(place, "the archive")
        said = said.replace(str(archive), "the archive")
        if isinstance(error, Invalid):
            raise Invalid(said.partition(":")[0], error.problems) from None
        raise UsageError(said) from None
