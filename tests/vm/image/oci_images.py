"""OCI images made from nothing: a layout with layers as tar files, honest ones and others."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swarm.vm.driver import Image
from tests import oci_here

BUSYBOX = Path("/bin/busybox")
NET_RAW = "\x01\x00\x00\x02\x00\x20\x00\x00" + "\x00" * 12  # capabilities(7): vfs_cap_data, cap_net_raw=ep


def entry(name: str, data: bytes = b"", *, mode: int = 0o644, kind: bytes = tarfile.REGTYPE, link: str = "",
          uid: int = 0, gid: int = 0, device: tuple[int, int] = (0, 0), xattrs: Mapping[str, str] | None = None,
          mtime: int = 1_600_000_000) -> tuple[tarfile.TarInfo, bytes]:  # fmt: skip
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.type, info.linkname, info.mtime = len(data), mode, kind, link, mtime
    info.uid, info.gid, (info.devmajor, info.devminor) = uid, gid, device
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    return info, data


def folder(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, mode=mode, kind=tarfile.DIRTYPE)


def layer(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def static() -> bytes:
    """A layer with one program, which needs no other file."""
    return layer(folder("bin"), entry("bin/busybox", busybox(), mode=0o755))


def busybox() -> bytes:
    """Debian's busybox-static is in every guest image's base, and mostly on the host."""
    return BUSYBOX.read_bytes()


class Layout:
    """An OCI layout in ``dir``."""

    def __init__(self, dir: Path) -> None:
        self.dir = dir
        self.blobs = dir / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        (dir / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._manifests: list[dict[str, object]] = []

    def blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return f"sha256:{digest}"

    def add(
        self, tag: str, layers: Iterable[bytes], *, architecture: str = "amd64", compressed: str = "gzip", **config: Any
    ) -> str:
        """A reference of it, for skopeo. ``config``: Env, Entrypoint, … ``compressed``: what is said of
        layers, which are gzip's."""
        described, diffs = [], []
        for one in layers:
            packed = gzip.compress(one, 1, mtime=0)
            described.append(self._described(packed, f"application/vnd.oci.image.layer.v1.tar+{compressed}"))
            diffs.append(f"sha256:{hashlib.sha256(one).hexdigest()}")
        history = [{"created": "2020-01-01T00:00:00Z", "created_by": "a test"}] * len(diffs)
        text = json.dumps(
            {"architecture": architecture, "os": "linux", "config": config,
             "rootfs": {"type": "layers", "diff_ids": diffs}, "history": history}
        )  # fmt: skip
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self._described(text.encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": described,
        }
        found = self._described(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
        self._manifests = [one for one in self._manifests if one["annotations"] != _named(tag)]
        self._manifests.append({**found, "annotations": _named(tag)})
        (self.dir / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self._manifests}))
        return f"oci:{self.dir}:{tag}"

    def index(self, tag: str, **images: str) -> str:
        """One reference for several machines. ``images``: by architecture, the tags that they have."""
        found = {one["annotations"]["org.opencontainers.image.ref.name"]: one for one in self._manifests}  # type: ignore[index]
        each = [
            {**found[one], "annotations": {}, "platform": {"os": "linux", "architecture": architecture}}
            for architecture, one in images.items()
        ]
        kind = "application/vnd.oci.image.index.v1+json"
        text = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": each})
        self._manifests = [one for one in self._manifests if one["annotations"] != _named(tag)]
        self._manifests.append({**self._described(text.encode(), kind), "annotations": _named(tag)})
        (self.dir / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self._manifests}))
        return f"oci:{self.dir}:{tag}"

    def _described(self, data: bytes, kind: str) -> dict[str, object]:
        return {"mediaType": kind, "digest": self.blob(data), "size": len(data)}


def _named(tag: str) -> dict[str, str]:
    return {"org.opencontainers.image.ref.name": tag}


def with_apt(image: Image, place: Path, *, source: str, python: bool = True, **config: Any) -> str:
    """A reference of Swarm's own Debian root as an image, with apt, and ``source`` as its sources.list."""
    root = place / "debian"
    subprocess.run(["fsck.erofs", f"--extract={root}", str(image.root)], check=True, capture_output=True)
    for left_out in () if python else ("usr/lib/python3*", "usr/bin/python3*", "usr/lib/x86_64-linux-gnu/perl*"):
        for one in root.glob(left_out):
            one.unlink() if one.is_symlink() or one.is_file() else shutil.rmtree(one)
    for package in oci_here.APT.glob("*.deb"):
        if package.name.partition("_")[0] not in image.packages:
            files = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, capture_output=True).stdout
            # /lib is a link, and stays one
            subprocess.run(["tar", "-x", "--keep-directory-symlink", f"--directory={root}"], input=files, check=True)
    for name in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "var/lib/apt/lists/partial", "var/log",
                 "var/cache/apt/archives/partial", "var/cache/debconf"):  # fmt: skip
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "etc/apt/sources.list").write_text(source)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for one in sorted(root.iterdir()):
            if one.name not in ("agent", "boot", "dev", "proc", "run", "sys", "work"):
                tar.add(one, one.name)
        tar.addfile(folder("run")[0])
    shutil.rmtree(root)
    return Layout(place / "debian-layout").add("debian", [packed.getvalue()], **config)


def inventory(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that is below ``root``: path -> kind and mode, owner, device, content or target."""
    found: dict[bytes, tuple[object, ...]] = {}
    todo = [bytes(root)]
    while todo:
        for one in os.scandir(todo.pop()):
            status = one.stat(follow_symlinks=False)
            mode = status.st_mode
            what: object = None
            if stat.S_ISREG(mode):
                what = hashlib.sha256(Path(os.fsdecode(one.path)).read_bytes()).hexdigest()
            elif stat.S_ISLNK(mode):
                what = os.readlink(one.path)  # noqa: PTH115 - bytes
            elif stat.S_ISDIR(mode):
                todo.append(one.path)
            found[one.path[len(bytes(root)) + 1 :]] = (mode, status.st_uid, status.st_gid, status.st_rdev, what)
    return found
