"""The engines that say that they live, and their hosts: all that the database knows of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from swarm.store.registry.workers import has_died, is_alive
from swarm.store.sql.rows import HostRow, WorkerRow
from swarm.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Not ``alive``: ``died`` on this host, or silent for so long that it is frozen, dead, or on a host that is down.
    ``info``: its own words."""

    id: str
    host: str
    pid: int | None
    started_at: str
    seen_at: str
    seen_ms_ago: float
    info: Mapping[str, Any]
    alive: bool
    died: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The engines of one host together; ``max_vms`` and what follows is of live ones alone. ``memory_mb`` and
    ``memory_free_mb``: as the engine that was heard last says; None if none does. What follows ``seen_ms_ago`` is of
    the host's own row; ``id`` None: it has none. ``put_back_seconds``: until what runs on a host that is drained is put
    back; None: it ends by itself."""

    host: str
    engines: int
    alive: int
    max_vms: int
    running: int
    ended_per_minute: int
    drivers: list[str]
    memory_mb: int | None
    memory_free_mb: int | None
    waits_for: list[str]
    seen_ms_ago: float
    id: str | None = None
    generation: int = 0
    labels: Mapping[str, Any] = field(default_factory=dict)
    capacity: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    draining: bool = False
    put_back_seconds: float | None = None
    drained_by: str | None = None
    drained_at: str | None = None
    created_at: str | None = None


async def engines(store: Store) -> list[Engine]:
    names = [field.name for field in fields(WorkerRow)]
    return [
        Engine(**{name: getattr(row, name) for name in names}, alive=is_alive(row), died=has_died(row))
        for row in await store.workers()
    ]


async def hosts(store: Store) -> list[Host]:
    """By name: those that are registered, and those that engines name."""
    return _by_host(await engines(store), await store.hosts())


async def host(store: Store, ref: str) -> Host:
    """One that is registered: by name, id, or how the id begins. Raises NotFound, Conflict."""
    return await of_row(store, await store.host(ref))


async def of_row(store: Store, row: HostRow) -> Host:
    found = [one for one in await engines(store) if one.host == row.name]
    return _by_host(found, [row])[0]


def _by_host(found: Sequence[Engine], rows: Sequence[HostRow]) -> list[Host]:
    """What an engine says of itself may be anything: another program may have written the row."""
    groups: dict[str, list[Engine]] = {row.name: [] for row in rows}
    for one in sorted(found, key=lambda engine: engine.seen_ms_ago):
        groups.setdefault(one.host, []).append(one)
    named = {row.name: row for row in rows}
    return [_registered(_host(name, groups[name]), named.get(name)) for name in sorted(groups)]


def _registered(host: Host, row: HostRow | None) -> Host:
    if row is None:
        return host
    names = [one.name for one in fields(row) if one.name not in ("name", "seen_ms_ago")]
    seen = min(host.seen_ms_ago, row.seen_ms_ago)
    return replace(host, **{name: getattr(row, name) for name in names}, seen_ms_ago=seen)


async def drained(store: Store, host: Host) -> bool:
    """Does none of its engines run anything any more, and know that it is to start nothing?"""
    live = [one.info for one in await engines(store) if one.host == host.host and one.alive]
    held = await store.host_holds(host.host)
    idle = all(info.get("draining") and not info.get("running") and not info.get("sandboxes") for info in live)
    return idle and not held.attempts and not held.sandboxes


def _host(name: str, group: Sequence[Engine]) -> Host:
    live = [engine for engine in group if engine.alive]
    said = [engine.info for engine in live]
    return Host(
        host=name,
        engines=len(group),
        alive=len(live),
        max_vms=sum(number(info.get("max_vms")) or 0 for info in said),
        running=sum(number(info.get("running")) or 0 for info in said),
        ended_per_minute=sum(number(info.get("per_minute")) or 0 for info in said),
        drivers=sorted({str(info["driver"])[:80] for info in said if info.get("driver")}),
        memory_mb=next((mb for info in said if (mb := number(info.get("memory_mb"))) is not None), None),
        memory_free_mb=next((mb for info in said if (mb := number(info.get("memory_free_mb"))) is not None), None),
        waits_for=[str(info["waits_for"])[:500] for info in said if info.get("waits_for")],
        seen_ms_ago=min((engine.seen_ms_ago for engine in group), default=math.inf),
    )


def settings_that_differ(found: Sequence[Engine]) -> list[str]:
    """Settings that must be the same for all live engines, and are not: 'prices: built in on a, 1b2c on b'."""
    values: dict[str, dict[str, set[str]]] = {}
    for one in found:
        said = one.info.get("settings")
        for name, value in said.items() if one.alive and isinstance(said, dict) else ():
            values.setdefault(str(name)[:80], {}).setdefault(str(value)[:80], set()).add(one.host)
    return [
        f"{name}: " + ", ".join(f"{value} on {' and '.join(sorted(hosts))}" for value, hosts in sorted(of.items()))
        for name, of in sorted(values.items())
        if len(of) > 1
    ]


def number(value: object) -> int | None:
    """One that an engine says; None for anything but an amount."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None
