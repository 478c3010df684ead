"""The imported images of this host, and the registered agents that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from swarm.errors import StoreError
from swarm.store.store import Store
from swarm.vm.image.oci.build import SOURCE
from swarm.vm.image.oci.info import ImportedInfo, Name
from swarm.vm.image.oci.reference import known_as
from swarm.vm.image.oci.store import Imported


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One name of an imported image, with all of it; a name of None: an image that has none any more."""

    name: str | None
    digest: str
    source: str
    imported_at: str
    size_bytes: int
    agents: tuple[str, ...]
    key: str


async def users(store: Store) -> dict[str, list[str]]:
    """Registered agents that name an imported image, as name@version, by that name. {} without a database."""
    found: dict[str, list[str]] = {}
    try:
        for agent in await store.agents(broken=False):
            if agent.imported:
                found.setdefault(known_as(agent.image or ""), []).append(f"{agent.name}@{agent.version}")
    except StoreError:  # no database yet, or one of another version: images are there all the same
        return {}
    return found


def listed(imported: Imported, used: Mapping[str, list[str]]) -> list[Listed]:
    """Every name, and every image without one. Who uses an image that something was added to, uses its base too."""
    used = dict(used)
    for name in imported.names().values():
        base = name.source.removeprefix(SOURCE)
        if base.startswith("sha256:") and name.name in used:
            used[base] = [*used.get(base, ()), *used[name.name]]
    return [_listed(info, name, used) for info in imported.list() for name in (info.names or (None,))]


def _listed(info: ImportedInfo, name: Name | None, used: Mapping[str, list[str]]) -> Listed:
    by_digest = [
        agent
        for image, agents in used.items()
        if image.startswith("sha256:")
        and any(one.startswith(image) for one in (info.digest, info.config_digest, name.digest if name else ""))
        for agent in agents
    ]
    return Listed(
        name=name.name if name else None,
        digest=name.digest if name else info.digest,
        source=name.source if name else "",
        imported_at=name.imported_at if name else info.made_at,
        size_bytes=info.size_bytes,
        agents=tuple(sorted({*(used.get(name.name, []) if name else []), *by_digest})),
        key=info.key,
    )
