"""Fetches images and layers from other hosts. The database says who has them and what they are; each byte is checked.

A file that was cut off stays, below `.fetched` beside its place, and is continued: now, by the next who needs it, from
that host or another.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import random
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swarm.base import files
from swarm.base.aio import finish_uninterrupted
from swarm.base.log import logger
from swarm.base.progress import Progress
from swarm.errors import ImageError, StoreError
from swarm.store.registry.host_files import Offer
from swarm.store.store import Store
from swarm.store.tickets.validation import shown
from swarm.vm.image import elsewhere
from swarm.vm.image.elsewhere import MAX_MANIFEST_BYTES, PREFIX, Fetched, PartsOf
from swarm.vm.image.staging import Part

if TYPE_CHECKING:
    import httpx  # loaded when something is fetched

log = logger(__name__)

CONNECT_SECONDS: Final = 5.0
SILENT_SECONDS: Final = 30.0  # without a byte
_SLOW_SECONDS, _SLOWEST_BYTES = 120.0, 32 << 10  # a file may take so long, and a second for each so many bytes
_PARTIAL: Final = ".fetched"
_KEPT_SECONDS: Final = 86_400.0  # what nobody continued
_TRIES: Final = 7  # in a row that brought nothing, of a host that had answered: its server may be starting again
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 10.0
_CHUNK_BYTES: Final = 1 << 20
_RESERVE_BYTES: Final = 64 << 20
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class _Unfit(Exception):
    """This host is of no use; the message says why, without its name."""


class OtherHosts:
    """What the other hosts of this database have. ``silent_seconds``: for how long one may send nothing."""

    def __init__(self, store: Store, *, silent_seconds: float = SILENT_SECONDS) -> None:
        self._store, self._silent_seconds = store, silent_seconds

    async def known(self, kind: str, wanted: str) -> bool:
        """Raises StoreError."""
        return bool(_same(await self._store.offered_files(kind, wanted), wanted))

    async def fetch(
        self, kind: str, wanted: str, *, into: Path, manifest: str, parts: PartsOf, progress: Progress
    ) -> Fetched:
        try:
            offers = _same(await self._store.offered_files(kind, wanted), wanted)
        except StoreError as error:
            return Fetched(why=str(error))
        random.shuffle(offers)  # so that not all ask the same host; those with the same content are alike
        whys = []
        for offer in sorted(offers, key=lambda one: one.built_at, reverse=True):
            host = shown(offer.host)
            if not offer.alive or not offer.address:
                whys.append(f"the host {host} " + ("hands out none now" if offer.alive else "gives no sign of life"))
                continue
            transfer = _Transfer(self._store, kind, wanted, offer, into.parent / _PARTIAL, self._silent_seconds)
            try:
                await transfer.run(into, manifest, parts, progress)
            except _Unfit as why:
                log.warning(f"{kind} can't be fetched from a host", host=offer.host, name=offer.name, why=str(why))
                whys.append(f"from the host {host} ({shown(offer.address)}): {why}")
                continue
            return Fetched(name=offer.name)
        return Fetched(why="; ".join(whys[:5]))


def _same(offers: list[Offer], wanted: str) -> list[Offer]:
    """Those that are meant; none if ``wanted`` begins several names."""
    offers = [one for one in offers if one.name == Path(one.name).name and not one.name.startswith(".")]
    names = {one.name for one in offers if one.name.startswith(wanted)}
    return offers if len(names) < 2 else []


class _Transfer:
    """Of one image or layer from one host. ``partial``: where files are until they are complete."""

    def __init__(
        self, store: Store, kind: str, wanted: str, offer: Offer, partial: Path, silent_seconds: float
    ) -> None:
        self._store, self._kind, self._wanted, self._offer, self._partial = store, kind, wanted, offer, partial
        self._silent_seconds = silent_seconds
        self._answered = False
        self._total = self._done = 0
        self._progress: Progress = lambda step, share: None

    async def run(self, into: Path, manifest: str, parts: PartsOf, progress: Progress) -> None:
        """Raises _Unfit; OSError, ImageError if it is of this host."""
        import httpx

        files.make_directory(self._partial, 0o700)
        await asyncio.to_thread(_remove_old, self._partial)
        limits = httpx.Timeout(self._silent_seconds, connect=CONNECT_SECONDS)
        async with httpx.AsyncClient(timeout=limits, trust_env=False, follow_redirects=False) as client:
            file = await self._file(client, self._offer.digest, None)
            data = await asyncio.to_thread(file.read_bytes)
            try:
                wanted = elsewhere.read(data, self._offer.name, parts)
            except ImageError as error:
                file.unlink()
                raise _Unfit(str(error)) from None
            await asyncio.to_thread(self._move, file, into / manifest, 0o644)
            self._check_room(into, wanted)
            what = f"{self._kind} {self._offer.name[:12]}"
            log.info(f"fetching {what}", host=self._offer.host, mb=self._total >> 20)
            self._progress, began = progress, time.monotonic()
            for part in wanted:
                file = await self._file(client, part.sha256, part.size_bytes)
                await asyncio.to_thread(self._move, file, into / part.path, 0o444)
        await asyncio.to_thread(into.chmod, 0o755)
        log.info(f"fetched {what}", host=self._offer.host, seconds=round(time.monotonic() - began, 1))

    def _check_room(self, place: Path, parts: Iterable[Part]) -> None:
        self._total = sum(part.size_bytes for part in parts)
        here = sum(file.stat().st_size for part in parts if (file := self._partial / part.sha256).exists())
        if shutil.disk_usage(place).free < self._total - here + _RESERVE_BYTES:
            told = f"the {self._kind} of the host {shown(self._offer.host)} has {self._total >> 20} MB"
            full = OSError(errno.ENOSPC, "not enough space", str(place))
            raise ImageError(files.no_space(place.parent, told, setting="SWARM_IMAGES_DIR")) from full

    @staticmethod
    def _move(file: Path, to: Path, mode: int) -> None:
        file.chmod(mode)
        file.rename(to)

    async def _file(self, client: httpx.AsyncClient, sha256: str, size: int | None) -> Path:
        """The whole file, as it was built. ``size``: None for a manifest. Raises _Unfit, OSError."""
        if not _DIGEST.fullmatch(sha256):
            raise _Unfit(f"{shown(sha256)} is no digest")
        path = self._partial / sha256
        while True:
            opened = await asyncio.to_thread(_Partial, path)
            try:
                continued = opened.size > 0
                if opened.digest.hexdigest() != sha256 and (size is None or opened.size < size):
                    try:
                        async with asyncio.timeout(_SLOW_SECONDS + (size or 0) / _SLOWEST_BYTES):
                            await self._rest(client, opened, sha256, size)
                    except TimeoutError:
                        raise _Unfit("it is too slow") from None
                if opened.digest.hexdigest() == sha256:
                    return path
            finally:
                await asyncio.to_thread(opened.close)
                if not opened.size:
                    path.unlink()
            path.unlink(missing_ok=True)
            if not continued:
                raise _Unfit("it sent other bytes than were announced")

    async def _rest(self, client: httpx.AsyncClient, opened: _Partial, sha256: str, size: int | None) -> None:
        import httpx

        useless = 0
        self._done += opened.size
        while size is None or opened.size < size:
            before = opened.size
            try:
                if await self._once(client, opened, sha256, size):
                    return
                why = "it broke off"
            except httpx.HTTPError as error:
                why = f"{error}" or type(error).__name__
                if not self._answered:
                    raise _Unfit(f"it can't be reached: {why}") from None
            useless = 0 if opened.size > before else useless + 1
            if useless >= _TRIES:
                raise _Unfit(f"it broke off, again and again: {why}")
            log.debug("continuing a fetch", host=self._offer.host, at=opened.size, why=why)
            await asyncio.sleep(min(_PAUSE_SECONDS * 2**useless, _LONGEST_PAUSE_SECONDS) if useless else 0.0)

    async def _once(self, client: httpx.AsyncClient, opened: _Partial, sha256: str, size: int | None) -> bool:
        """One request for what is missing. True if nothing is then. Raises _Unfit, httpx.HTTPError, OSError."""
        import httpx

        start = opened.size
        headers = {"authorization": f"Bearer {elsewhere.token(self._offer.key, sha256)}", "accept-encoding": "identity"}
        if start:
            headers["range"] = f"bytes={start}-"
        try:
            request = client.build_request("GET", f"http://{self._offer.address}{PREFIX}{sha256}", headers=headers)
        except (httpx.InvalidURL, ValueError):
            raise _Unfit("that is no address") from None
        answer = await client.send(request, stream=True)
        try:
            if answer.status_code == 503 or (answer.status_code == 401 and await self._has_new_key()):
                self._answered = True
                return False
            if answer.status_code not in (200, 206) or (answer.status_code == 200 and start):
                raise _Unfit(f"it answers with status {answer.status_code}")
            self._answered = True
            text = answer.headers.get("content-length", "")
            length = int(text) if re.fullmatch("[0-9]{1,15}", text) else -1
            if size is None and not 0 <= length <= MAX_MANIFEST_BYTES:
                raise _Unfit(f"it has a manifest of {length} bytes" if length >= 0 else "it does not say its size")
            if size is not None and length != size - start:
                raise _Unfit(f"it has a file of {start + length} bytes where {size} are announced")
            if start and not answer.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise _Unfit("it sends another part than it was asked for")
            async for chunk in answer.aiter_raw(_CHUNK_BYTES):
                if opened.size + len(chunk) > start + length:
                    raise _Unfit("it sends more than it announced")
                await finish_uninterrupted(asyncio.to_thread(opened.add, chunk))
                self._done += len(chunk)
                self._progress(f"fetching from {self._offer.host}", min(1.0, self._done / max(1, self._total)))
            return opened.size == start + length
        finally:
            await answer.aclose()

    async def _has_new_key(self) -> bool:
        """Keys change now and then: is it another one now?"""
        with contextlib.suppress(StoreError):
            for offer in await self._store.offered_files(self._kind, self._wanted):
                if (offer.host, offer.name) == (self._offer.host, self._offer.name) and offer.key != self._offer.key:
                    self._offer = offer
                    return True
        return False


class _Partial:
    """A file that is being fetched, and the digest of what is there."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b")
        try:
            self._file.seek(0)
            self.digest = hashlib.file_digest(self._file, "sha256")
            self.size = self._file.tell()
        except BaseException:
            self._file.close()
            raise

    def add(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)

    def close(self) -> None:
        self._file.close()


def _remove_old(partial: Path) -> None:
    for left in partial.iterdir():
        if time.time() - left.stat().st_mtime > _KEPT_SECONDS:
            left.unlink(missing_ok=True)
