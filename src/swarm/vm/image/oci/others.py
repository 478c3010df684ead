"""Imported images for other hosts: under each name and each digest by which an agent may ask for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from swarm.errors import ImageError
from swarm.vm.image import elsewhere, staging
from swarm.vm.image.elsewhere import Shared
from swarm.vm.image.oci.info import ImportedInfo, key_of, stored_root
from swarm.vm.image.oci.unpack import FILE

IMPORTED: Final = "imported image"  # a kind, as those of `elsewhere`
# Where such an image came from, as `Name.source` has it. No registry: there, its name may mean a stranger's image.
SOURCE: Final = "another host"


def offers(info: ImportedInfo, place: Path, manifest: Path, sha256: str) -> Iterator[Shared]:
    """``sha256``: of the image's file. Raises OSError."""
    part = staging.Part(path=place / FILE, size_bytes=info.size_bytes, sha256=sha256)
    names = {one.name: one.imported_at for one in info.names}
    for name, since in (dict.fromkeys((info.digest, info.config_digest), info.made_at) | names).items():
        offered = f"{info.key}.{staging.digest_of({'name': name})[:16]}"
        yield elsewhere.shared(IMPORTED, offered, name, since, manifest, [part])


def key(offered: str) -> str:
    return offered.partition(".")[0]


def parts(manifest: dict[str, Any], offered: str) -> list[staging.Part]:
    """Raises ImageError; KeyError, TypeError, ValueError for what is no manifest."""
    stored_root(manifest["root"])
    if key_of(manifest["config_digest"]) != key(offered):
        raise ImageError("another version of Swarm has made it")
    return [staging.Part(path=Path(FILE), size_bytes=manifest["size_bytes"], sha256=manifest["sha256"])]
