"""Hands out this host's images and layers to other hosts, while an engine runs here, if `SWARM_SHARE_ADDRESS` is set.

The engine listens, opens the files, and tells the database which there are; a process without rights
(`swarm.api.shared_files`) speaks with those who ask. Of several engines of a host, one does it, and the next takes over
when that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from swarm.app import wiring
from swarm.base import process
from swarm.base.aio import cancel_all
from swarm.base.log import logger
from swarm.config import Settings
from swarm.errors import HostError, StoreError, SwarmError
from swarm.store.registry.host_files import HostFile
from swarm.store.store import Store
from swarm.vm.image.elsewhere import PREFIX, Shared

log = logger(__name__)

KEY_SECONDS: Final = 600.0  # a key is good until there are two newer ones
_LOOK_SECONDS: Final = 2.0
_AGAIN_SECONDS: Final = 2.0
_MOST: Final = 100  # of images and layers, with up to five files each
_DEAF_SECONDS: Final = 10.0  # in which the process takes no message


@asynccontextmanager
async def sharing(settings: Settings, store: Store, *, key_seconds: float = KEY_SECONDS) -> AsyncIterator[None]:
    """For the length of the block, once this host is registered."""
    if not settings.share_address:
        await store.withdraw_files()
        yield
        return
    task = asyncio.create_task(_share(settings, store, key_seconds))
    try:
        yield
    finally:
        await cancel_all([task])


def address(settings: Settings) -> tuple[str, int]:
    """Raises HostError for one at which no other host can ask."""
    host, _, port = settings.share_address.rpartition(":")
    host = host.strip("[]")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            raise HostError(
                f"SWARM_SHARE_ADDRESS is {settings.share_address}: say an address of this host that other hosts reach"
            )
    return host, int(port)


async def answers(settings: Settings) -> bool:
    """Are files handed out there now?"""
    import httpx

    with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL):
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.head(f"http://{settings.share_address}{PREFIX}{'0' * 64}")
            return answer.status_code == 401 and "swarm files" in answer.headers.get("www-authenticate", "")
    return False


async def _share(settings: Settings, store: Store, key_seconds: float) -> None:
    said = ""
    while True:
        try:
            await _Sharing(settings, store, key_seconds).run()
            said, why = "", "its process ended"
        except (SwarmError, OSError) as error:
            why = str(error)
        if why != said:
            log.warning("files can't be handed out to other hosts; trying again", why=why)
        said = why
        await asyncio.sleep(_AGAIN_SECONDS)


class _Sharing:
    """One process, and what it was told."""

    def __init__(self, settings: Settings, store: Store, key_seconds: float) -> None:
        self._settings, self._store, self._key_seconds = settings, store, key_seconds
        self._images, self._layers = wiring.images(settings), wiring.guest_layers(settings)
        self._imported = wiring.imported(settings)
        self._told: Mapping[str, tuple[int, ...]] = {}  # digest -> inode
        self._keys: list[str] = []
        self._key_from = 0.0

    async def run(self) -> None:
        """Until the process ends. Raises HostError, OSError."""
        from swarm.api import server  # which loads uvicorn

        host, port = address(self._settings)
        with contextlib.ExitStack() as stack:
            bound = stack.enter_context(server.bind(host, port, choose="SWARM_SHARE_ADDRESS"))
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(ours)
            ours.settimeout(_DEAF_SECONDS)
            with theirs:
                fds = (bound.fileno(), theirs.fileno())
                argv = [sys.executable, "-I", "-m", "swarm.api.shared_files", *map(str, fds)]
                child = await process.spawn(argv, output=Path(os.devnull), pass_fds=fds, cwd=Path("/"), deaf=True)
            try:
                await self._tell_until(asyncio.create_task(child.wait()), ours)
            finally:
                await process.kill(child)

    async def _tell_until(self, ended: asyncio.Task[int], to: socket.socket) -> None:
        log.info("handing out images and layers to other hosts", address=self._settings.share_address)
        seen: object = None
        while not ended.done():
            now, new_key = self._stamp(), time.monotonic() - self._key_from > self._key_seconds or not self._keys
            if now != seen or new_key:
                try:
                    await self._tell(to, new_key=new_key)
                    seen = now
                except StoreError as error:
                    log.debug("other hosts are not told what is here", why=str(error))
            await asyncio.wait({ended}, timeout=min(_LOOK_SECONDS, self._key_seconds))

    def _stamp(self) -> object:
        """Changes when an image or layer is added or removed."""
        found = []
        for place in (self._images.dir, self._layers.dir, self._imported.dir):
            with contextlib.suppress(OSError):
                found.append(place.stat().st_mtime_ns)
        return found

    async def _tell(self, to: socket.socket, *, new_key: bool) -> None:
        here = await asyncio.to_thread(
            lambda: [*self._images.shared(), *self._layers.shared(), *self._imported.shared()]
        )
        here = here[:_MOST]
        keys = [secrets.token_hex(32), *self._keys][:3] if new_key else self._keys
        await asyncio.to_thread(self._hand_over, to, keys, here)
        rows = [
            HostFile(kind=one.kind, name=one.name, made_of=one.made_of, digest=one.digest, built_at=one.built_at)
            for one in here
        ]
        await self._store.announce_files(self._settings.share_address, keys[0], rows)
        if new_key:
            self._keys, self._key_from = keys, time.monotonic()

    def _hand_over(self, to: socket.socket, keys: list[str], here: list[Shared]) -> None:
        """Keys, and descriptors of the files that are new, or are others than before."""
        to.send(json.dumps({"keys": keys}).encode())
        told: dict[str, tuple[int, ...]] = {}
        for sha256, path in [(sha256, path) for one in here for sha256, path in one.files.items()]:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # it has just been removed
            try:
                found = os.fstat(fd)
                told[sha256] = (found.st_dev, found.st_ino, found.st_size)
                if self._told.get(sha256) != told[sha256]:
                    socket.send_fds(to, [json.dumps({"sha256": sha256}).encode()], [fd])
            finally:
                os.close(fd)
        for gone in self._told.keys() - told.keys():
            to.send(json.dumps({"gone": gone}).encode())
        self._told = told
