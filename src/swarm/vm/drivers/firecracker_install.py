"""`swarm install firecracker`: installs the official release, checked against the digests in this file.

The release's own checksum file comes from the same place as the archive, so it proves nothing; these digests come with
our source. To add a version: download both archives and their .sha256.txt on a machine you trust, compare, add a line.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import platform
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base import files
from swarm.base.progress import Progress, silent
from swarm.errors import HostError, NotFound, UsageError
from swarm.vm.drivers.firecracker import JAILER, PROGRAM

DEFAULT_VERSION: Final = "1.15.1"
_RELEASES: Final = "https://github.com/firecracker-microvm/firecracker/releases/download"
_MAX_ARCHIVE_BYTES: Final = 64 << 20
_MAX_PROGRAM_BYTES: Final = 64 << 20
_TIMEOUT_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """sha256 digests of a release: of the published archive, or of the two programs in it. One of them is enough."""

    archive: str = ""
    programs: Mapping[str, str] | None = None


RELEASES: Final[Mapping[tuple[str, str], Release]] = {
    ("1.15.1", "x86_64"): Release(
        archive="d4a32ab2322d887ca1bc4a4e7afa9cc35393e6362dfc2b3becb389d362e4275a",
        programs={
            PROGRAM: "7e8b57e88c459396d4680d83dcdd8c7f72305447cb55b11f4ac98ad70a3f7825",
            JAILER: "4830a9b1fc6cece036d8992ff12f1fe9c5247aacad77f42c7aba683c7a08622e",
        },
    ),
    ("1.15.1", "aarch64"): Release(archive="00654ac1e702a22744121ea9f10a4f792ebd7c3a744cba587dfac9fcb79b41a5"),
    ("1.12.1", "x86_64"): Release(
        programs={
            PROGRAM: "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
            JAILER: "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
        },
    ),
}


async def install(
    *,
    version: str = DEFAULT_VERSION,
    source: Path | None = None,
    target: Path,
    machine: str | None = None,
    releases: str = _RELEASES,
    progress: Progress = silent,
) -> list[Path]:
    """Install firecracker and jailer of ``version`` in ``target``, from the archive ``source``, or else downloaded from
    ``<releases>/v<version>/<archive>``. Returns the paths of the two programs.

    Nothing is written unless every digest matches. Raises UsageError for a version or architecture that is not in the
    list, NotFound if ``source`` doesn't exist, HostError if the download fails or a digest differs.
    """
    machine = machine or platform.machine()
    release = RELEASES.get((version, machine))
    if release is None:
        known = ", ".join(f"{v} ({m})" for v, m in RELEASES)
        raise UsageError(f"no digests are known for Firecracker {version} on {machine}; known: {known}")
    archive = f"firecracker-v{version}-{machine}.tgz"
    if source is not None:
        data = await asyncio.to_thread(_read, source)
    else:
        progress(f"downloading {archive}", 0.0)
        data = await _download(f"{releases}/v{version}/{archive}", progress)
    progress("checking", 0.9)
    programs = await asyncio.to_thread(verified, data, release, version, machine, str(source or archive))
    try:
        files.make_directory(target)
        return [_put(target / name, content) for name, content in programs.items()]
    except OSError as error:
        raise HostError(f"can't write to {target}: {error.strerror}; run as root, or give --to DIRECTORY") from error


def verified(data: bytes, release: Release, version: str, machine: str, name: str) -> dict[str, bytes]:
    """The two programs in an archive. Raises HostError unless the archive, or each program, has the right digest."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != release.archive and release.programs is None:
        raise HostError(f"{name} differs from the release: its sha256 is {digest} instead of {release.archive}")
    programs = _unpack(data, version, machine, name)
    if digest != release.archive:
        for program, content in programs.items():
            digest, wanted = hashlib.sha256(content).hexdigest(), (release.programs or {})[program]
            if digest != wanted:
                raise HostError(f"{program} in {name} differs from the release: sha256 {digest} instead of {wanted}")
    return programs


def _unpack(data: bytes, version: str, machine: str, name: str) -> dict[str, bytes]:
    """Members are read, never extracted: the paths in an archive are not used."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
            members = archive.getnames()
            for program in (PROGRAM, JAILER):
                paths = (f"release-v{version}-{machine}/{program}-v{version}-{machine}", program)
                member = next((path for path in paths if path in members), None)
                if member is None:
                    raise HostError(f"{name} has no {program} of version {version} for {machine}")
                info = archive.getmember(member)
                file = archive.extractfile(info)
                if file is None or info.size > _MAX_PROGRAM_BYTES:
                    raise HostError(f"{member} in {name} is not a program")
                found[program] = file.read(_MAX_PROGRAM_BYTES)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise HostError(f"{name} is not a complete archive: {error}") from error
    return found


def _read(source: Path) -> bytes:
    try:
        with source.open("rb") as file:
            data = file.read(_MAX_ARCHIVE_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"the file {source} doesn't exist") from None
    except OSError as error:
        raise HostError(f"can't read {source}: {error.strerror}") from error
    if len(data) > _MAX_ARCHIVE_BYTES:
        raise HostError(f"{source} is too large for a release of Firecracker")
    return data


async def _download(url: str, progress: Progress) -> bytes:
    import httpx

    data = bytearray()
    try:
        async with (
            httpx.AsyncClient(follow_redirects=True, timeout=_TIMEOUT_SECONDS) as client,
            client.stream("GET", url) as answer,
        ):
            answer.raise_for_status()
            expected = int(answer.headers.get("content-length", 0)) or 8 << 20
            async for chunk in answer.aiter_bytes():
                data += chunk
                if len(data) > _MAX_ARCHIVE_BYTES:
                    raise HostError(f"{url} is too large for a release of Firecracker: {len(data) >> 20} MiB and more")
                progress("downloading", 0.9 * min(1.0, len(data) / expected))
    except httpx.HTTPStatusError as error:
        raise HostError(f"can't download {url}: HTTP {error.response.status_code}") from None
    except httpx.HTTPError as error:
        raise HostError(
            f"can't reach {url} ({error or type(error).__name__}): download it on another machine, then run "
            "`swarm install firecracker --from FILE`"
        ) from None
    return bytes(data)


def _put(path: Path, content: bytes) -> Path:
    """Write a program atomically. A running VMM keeps the file from which it was started."""
    files.write_atomically(path, content, mode=0o755, flush=True)
    return path
