"""What is known of an imported image: its key, its names, and what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from swarm.vm.driver import Root
from swarm.vm.image import staging
from swarm.vm.image.oci.fetch import Access

# Raise it when `unpack` makes a different file of the same image.
BUILDER_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """What a name means on this host. ``digest``: what its registry had under it (of a manifest, or an index), or of
    the manifest in a file. ``source`` and ``access``: where it came from, as skopeo calls it."""

    name: str
    key: str
    digest: str
    source: str
    imported_at: str  # ISO-8601 UTC
    access: Access = field(default_factory=Access)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedInfo:
    """One imported image, from its manifest; its file has not been hashed. ``fetched_bytes``: its layers as they were
    fetched, some of which other images may share."""

    key: str
    digest: str
    config_digest: str
    names: tuple[Name, ...]
    layers: int
    size_bytes: int
    fetched_bytes: int
    made_at: str
    root: Root
    blobs: tuple[str, ...]


def key_of(config_digest: str) -> str:
    return staging.digest_of({"builder": BUILDER_VERSION, "config": config_digest})[:32]


def stored_root(told: Mapping[str, Any]) -> Root:
    """As a manifest has it. Raises KeyError, TypeError, ValueError."""
    uid, gid, groups, home = told["user"]
    return Root(
        env=dict(told["env"]),
        cwd=str(told["cwd"]),
        user=(int(uid), int(gid), tuple(groups), str(home)),
        entry=tuple(told["entry"]),
        stop_signal=int(told["stop_signal"]),
        python=str(told["python"]),
    )
