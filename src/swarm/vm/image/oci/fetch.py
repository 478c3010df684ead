"""Fetching an image with skopeo, into an OCI layout whose blobs are shared with all others.

Skopeo knows registries, their credentials, mirrors, certificates and the policy of signatures (containers-policy.json),
picks this machine's architecture from an index, and checks each blob's digest. A blob that is there is not fetched
again, so an interrupted import goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from swarm.base import files, priority, process
from swarm.errors import CommandFailed, HostError, ImageError
from swarm.vm.image.oci.reference import Reference

INSTALL: Final = "apt-get install skopeo umoci"
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
TAG: Final = "image"
_MAX_JSON: Final = 4 << 20  # of a manifest or a config
_SILENT_SECONDS: Final = 300.0  # after which a registry that sends nothing is given up
_WATCH_SECONDS: Final = 0.5
_CPU_SECONDS: Final = 3600  # of one copy: what is packed anew may be a bomb
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
# Where skopeo looks for credentials besides ~/.docker/config.json.
_VARIABLES: Final = ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG", "DOCKER_HOST")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a registry is reached. ``plain_http``: without TLS, or with a certificate that nobody has checked.
    ``cert_dir``: *.crt of one's own authorities. ``auth_file``: credentials, if not where `docker login` has them."""

    plain_http: bool = False
    cert_dir: str = ""
    auth_file: str = ""

    def anywhere(self) -> Access:
        """The same, wherever it is used."""

        def full(path: str) -> str:
            return str(Path(path).absolute()) if path else ""

        return replace(self, cert_dir=full(self.cert_dir), auth_file=full(self.auth_file))

    def options(self, prefix: str = "") -> list[str]:
        found = [f"--{prefix}tls-verify=false"] if self.plain_http else []
        found += [f"--{prefix}cert-dir={self.cert_dir}"] if self.cert_dir else []
        return found + ([f"--authfile={self.auth_file}"] if self.auth_file else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """An image's manifest and config. ``digest``: of the manifest that it came with; ``kept``: of what is kept of it,
    in which layers may have been packed anew."""

    digest: str
    kept: str
    manifest: Mapping[str, Any]
    config_digest: str
    config: Mapping[str, Any]

    @property
    def layers(self) -> list[str]:
        return [str(layer["digest"]) for layer in self.manifest["layers"]]

    @property
    def size_bytes(self) -> int:
        """Of all layers, as they are fetched."""
        return sum(int(layer["size"]) for layer in self.manifest["layers"])

    @property
    def blobs(self) -> list[str]:
        """Hexadecimal digests of all that it is made of."""
        all_ = (self.digest, self.kept, self.config_digest, *self.layers)
        return sorted({digest.removeprefix("sha256:") for digest in all_})


def check_host() -> None:
    """Raises HostError."""
    if missing := [program for program in ("skopeo", "umoci", "mkfs.erofs") if process.which(program) is None]:
        package = INSTALL if missing != ["mkfs.erofs"] else "apt-get install erofs-utils"
        raise HostError(f"importing an image needs {' and '.join(missing)}, which this host lacks: {package}")


async def digest_of(reference: Reference, access: Access) -> str:
    """What a registry has under that name now: the digest of a manifest, or of an index. Raises ImageError."""
    argv = ["skopeo", "inspect", "--raw", *access.options(), reference.source]
    try:
        done = await process.run(argv, timeout_seconds=120, env=_environment())
    except CommandFailed as error:
        raise explain(error.stderr, reference) from error
    except HostError as error:
        if "took longer" not in str(error):
            raise
        raise ImageError(f"can't fetch {reference.name}: the registry does not answer") from error
    return f"sha256:{hashlib.sha256(done.stdout).hexdigest()}"


async def copy(
    reference: Reference, access: Access, *, pinned: str, layout: Path, blobs: Path, most: int,
    progress: Callable[[int], None],
) -> Fetched:  # fmt: skip
    """Fetch it into ``layout``, and what is missing of its parts into ``blobs``; at most ``most`` bytes. Layers that
    umoci can't read are packed anew. ``progress`` gets the number of bytes. Raises ImageError, HostError."""
    source = reference.at(pinned) if pinned else reference.source

    async def into_layout(blobs: Path, *argv: str) -> Fetched:
        await _copy(argv, reference, layout=layout, blobs=blobs, most=most, progress=progress)
        image = await asyncio.to_thread(read_layout, layout, blobs, reference.name)
        if image.size_bytes > most:
            raise _too_large(reference, most)
        return image

    image = await into_layout(blobs, *access.options("src-"), source)
    if not any(str(layer["mediaType"]).endswith("zstd") for layer in image.manifest["layers"]):
        return image
    arrived, packed = layout.rename(layout.with_name("arrived")), layout.with_name("packed")
    as_gzip = ["--dest-compress-format=gzip", f"--src-shared-blob-dir={blobs}", f"oci:{arrived}:{TAG}"]
    image = replace(await into_layout(packed, *as_gzip), digest=image.digest)
    for blob in (packed / "sha256").iterdir():
        blob.rename(blobs / "sha256" / blob.name)
    return image


async def _copy(
    source: Sequence[str], reference: Reference, *, layout: Path, blobs: Path, most: int,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    log = layout.parent / "skopeo.log"
    argv = [
        "prlimit", f"--fsize={most}", f"--cpu={_CPU_SECONDS}", "--",
        "skopeo", "copy", "--quiet", "--retry-times=2", "--remove-signatures",
        f"--dest-shared-blob-dir={blobs}", *source, f"oci:{layout}:{TAG}",
    ]  # fmt: skip
    before = await asyncio.to_thread(_size, blobs)
    env = {**_environment(), "TMPDIR": str(layout.parent)}
    child = await process.spawn(argv, output=log, env=env, lower_by=priority.BELOW_ENGINE)
    ended = asyncio.ensure_future(child.wait())
    had, since = -1, time.monotonic()
    try:
        while not ended.done():
            await asyncio.wait({ended}, timeout=_WATCH_SECONDS)
            size = await asyncio.to_thread(lambda: _size(blobs) + _size(layout.parent)) - before
            if size != had:
                had, since = size, time.monotonic()
                progress(size)
            if size > most:
                raise _too_large(reference, most)
            if files.has_no_room(layout):
                raise OSError(28, "no space left", str(layout))
            if time.monotonic() - since > _SILENT_SECONDS:
                raise ImageError(f"can't fetch {reference.name}: for {_SILENT_SECONDS:g} s nothing arrived")
    finally:
        await process.kill(child)
    if child.returncode:
        raise explain(log.read_text(errors="replace"), reference)


def _too_large(reference: Reference, most: int) -> ImageError:
    return ImageError(f"can't fetch {reference.name}: it is larger than {most / 1e9:.3g} GB")


def read_layout(layout: Path, blobs: Path, name: str) -> Fetched:
    """Raises ImageError."""
    try:
        (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
        digest = _digest(entry["digest"])
        manifest = json.loads(read_blob(blobs, digest))
        config_digest = _digest(manifest["config"]["digest"])
        for layer in manifest["layers"]:
            _digest(layer["digest"])
            int(layer["size"])
            str(layer["mediaType"])
        config = json.loads(read_blob(blobs, config_digest))
        if not isinstance(config, dict):
            raise TypeError("its config is no object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageError(f"{name} is no image that can be read: {error!r}"[:500]) from error
    ours = _ARCHITECTURES.get(platform.machine(), platform.machine())
    if (found := config.get("architecture", ours)) != ours or config.get("os", "linux") != "linux":
        raise ImageError(
            f"{name} is for {str(config.get('os'))[:40]}/{str(found)[:40]}, and this machine runs linux/{ours}"
        )
    return Fetched(digest=digest, kept=digest, manifest=manifest, config_digest=config_digest, config=config)


def lay_out(place: Path, blobs: Path, names: Sequence[str]) -> None:
    """Make a layout of an image's blobs, by links to them. Raises ImageError if it is not all there."""
    (into := place / "blobs" / "sha256").mkdir(parents=True)
    try:
        for name in names:
            (into / name).hardlink_to(blobs / "sha256" / name)
        entry = next(entry for name in names if (entry := _entry(place / "blobs", name, names)))
    except (FileNotFoundError, StopIteration):
        raise ImageError("the base image's layers are not all here: import it again") from None
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _entry(blobs: Path, name: str, names: Sequence[str]) -> dict[str, Any] | None:
    """What a layout says of that blob, if it is a manifest all of whose layers are there."""
    try:
        told = json.loads(text := read_blob(blobs, f"sha256:{name}"))
        if not all(_digest(layer["digest"]).removeprefix("sha256:") in names for layer in told["layers"]):
            return None
        kind = str(told.get("mediaType", "application/vnd.oci.image.manifest.v1+json"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    named = {"org.opencontainers.image.ref.name": TAG}
    return {"mediaType": kind, "digest": f"sha256:{name}", "size": len(text), "annotations": named}


def has(blobs: Path, names: Sequence[str]) -> bool:
    """What came from another host has none."""
    return all((blobs / "sha256" / str(one)).exists() for one in names)


def damaged(blobs: Path, names: list[str]) -> list[Path]:
    """Those of these blobs that are not what their digests say: a disk that lost power may have torn them."""
    return [blobs / "sha256" / one for one in names if files.sha256_of(blobs / "sha256" / one) != one]


def explain(said: str, reference: Reference) -> ImageError:
    """Skopeo's error as a sentence."""
    return ImageError(f"can't fetch {reference.name}: {reason(said, reference.name)}")


def reason(said: str, name: str = "it") -> str:
    last = said.strip().splitlines()[-1][-600:] if said.strip() else "skopeo said nothing"
    if found := re.search(r'msg="(.*)"', last):
        last = found[1].replace('\\"', '"').replace("\\n", " ")
    last = "".join(one if one.isprintable() else " " for one in last)
    for pattern, why in _REASONS.items():
        if re.search(pattern, said, re.IGNORECASE):
            return f"{why.format(name=name)} ({last})"
    return last


_REASONS: Final = {
    r"no space left|disk quota|file too large|file size limit": "the disk is full, or it is too large",
    r"no image found in (manifest list|image index)|no matching manifest": "it has nothing for this machine",
    r"x509|certificate": "the registry's certificate is not trusted here: give its authority by --cert-dir",
    r"HTTP response to HTTPS client": "the registry has no TLS: --plain-http, if that is meant",
    r"manifest unknown|name unknown|not found: manifest|manifest .* 404": "the registry has no such image or tag",
    r"unauthorized|authentication required|invalid username|denied|forbidden": (
        "the registry wants other credentials: `swarm registry login` keeps them, --auth-file names a file"
    ),
    r"no such host|connection refused|network is unreachable|i/o timeout|no route to host|server misbehaving"
    r"|temporary failure|connection reset": "the registry can't be reached",
    r"policy\.json": "skopeo lacks /etc/containers/policy.json: apt-get install golang-github-containers-common",
    r"no such file or directory": "there is no such file",
    r"source image rejected|signature": "this host's policy of signatures refuses it",
}


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _digest(text: object) -> str:
    if not isinstance(text, str) or not DIGEST.fullmatch(text):
        raise ValueError(f"{str(text)[:80]!r} is no sha256 digest")
    return text


def read_blob(blobs: Path, digest: str) -> bytes:
    """A small one, checked."""
    path = blobs / "sha256" / digest.removeprefix("sha256:")
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{digest} is larger than {_MAX_JSON >> 20} MiB")
    data = path.read_bytes()
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        path.unlink()  # so that the next import fetches it anew
        raise ValueError(f"{digest} is not what its digest says")
    return data


def _size(dir: Path) -> int:
    size = 0
    for place, _, names in os.walk(dir):
        for name in names:
            try:
                size += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 - thousands of them
            except FileNotFoundError:
                continue
    return size
