"""Backups: the database and the programs of agents, as they were at one moment, and put back."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from swarm.base import aio
from swarm.base.clock import iso
from swarm.base.files import host_errors, make_directory, sha256_of, try_lock, write_atomically
from swarm.errors import Conflict, StoreError, UsageError
from swarm.store.registry.workers import is_alive
from swarm.store.sql import backup
from swarm.store.sql.database import HEAD, OLDER
from swarm.store.store import Store

MANIFEST: Final = "backup.json"
_DATABASES: Final = {"sqlite": "swarm.db", "postgresql": "swarm.dump"}
_AGENTS: Final = "agents"
_ABOUT: Final = ("database", "revision", "at", "sha256", "agents")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """``bytes``: of all files. ``revision``: of the tables. ``at``: ISO-8601, UTC."""

    place: Path
    database: str
    revision: str | None
    at: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """``kept``: where the database that was there is now; None if there was none, or if it is PostgreSQL's."""

    backup: Backup
    kept: Path | None
    agents: int


async def make(url: str, agents: Path, place: Path, *, now_ms: int) -> Backup:
    """Write a backup into the new directory ``place``, while engines run. Half a backup is never seen there. Raises
    UsageError, StoreError, HostError."""
    kind, file = backup.kind_and_file(url)
    if place.resolve().is_relative_to(agents.resolve()):
        raise UsageError(f"{place} is within {agents}, which is part of the backup: name a directory elsewhere")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"{place} exists: name a new directory for the backup")
    async with Store.open(url) as store:
        revision = await store.revision()
    if revision is None:
        raise StoreError(f"there is nothing to back up: the database is empty; run `swarm init` ({agents.parent})")
    with host_errors(f"can't write the backup {place}"):
        make_directory(place.parent)
        stage = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))  # 0700
        try:
            copied = stage / _DATABASES[kind]
            if file is not None:
                await _copy(file, copied)
            else:
                await backup.dump(url, copied)
            # After the database, so that no agent's row lacks its files.
            if agents.is_dir():
                await aio.stoppable(lambda check: _copy_tree(agents, stage / _AGENTS, check))
            digest = await aio.stoppable(lambda _: sha256_of(copied))
            about = {"database": kind, "revision": revision, "at": iso(now_ms), "sha256": digest, "agents": str(agents)}
            write_atomically(stage / MANIFEST, json.dumps(about, indent=1), mode=0o600, flush=True)
            if place.exists():
                place.rmdir()
            stage.replace(place)
            backup.flush(place.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return _backup(place, about)


async def put_back(url: str, agents: Path, place: Path, *, replace: bool) -> Restored:
    """Replace the database by the backup's, and add the agents that are missing. Engines must have ended: what they run
    is another time's. If it fails or is stopped, the database is the one that was there, but for PostgreSQL's after
    pg_restore: then again is whole. Raises UsageError, Conflict, StoreError, HostError."""
    kind, file = backup.kind_and_file(url)
    about = _about(place)
    copied = place / _DATABASES[kind]
    if about["database"] != kind:
        raise UsageError(f"{place} is a backup of a {about['database']} database, and this one is {kind}")
    with host_errors(f"can't read the backup {place}"):
        digest = await aio.stoppable(lambda _: sha256_of(copied))
    if digest != about["sha256"]:
        raise StoreError(f"the backup {place} is damaged: {copied.name} is not what was written")
    await _check(url, file, about["revision"], replace=replace)
    if file is None:
        with host_errors("can't put the backup back"):
            added = await aio.stoppable(lambda check: _add_missing(place / _AGENTS, agents, check))
            await backup.put_dump_back(url, copied)
        await _bring_up_to_date(url, about, agents)
        return Restored(backup=_backup(place, about), kept=None, agents=added)
    with host_errors("can't put the backup back"):
        file = file.resolve()  # a link stays one
        make_directory(file.parent, 0o700)
        with _one_at_a_time(file):
            try:
                new = await aio.stoppable(lambda check: backup.copy_to_put_back(copied, file, check))
                await _bring_up_to_date(f"sqlite:///{quote(str(new))}", about, agents)
                added = await aio.stoppable(lambda check: _add_missing(place / _AGENTS, agents, check))
                kept = await aio.finish_uninterrupted(asyncio.to_thread(backup.put_file_back, new, file))
            finally:
                backup.remove(file.with_name(f"{file.name}.new"))
    return Restored(backup=_backup(place, about), kept=kept, agents=added)


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    if (lock := try_lock(file.parent)) is None:
        raise Conflict(f"another program puts a backup back in {file.parent}")
    try:
        with backup.alone(file):
            pass  # before all is copied
        yield
    finally:
        os.close(lock)


async def _bring_up_to_date(url: str, about: Mapping[str, str], agents: Path) -> None:
    async with Store.open(url) as store:
        await store.migrate()
        await store.move_agents(Path(about["agents"]), agents)


async def _check(url: str, file: Path | None, revision: str, *, replace: bool) -> None:
    if revision not in (HEAD, *OLDER):
        raise StoreError(f"the backup is at {revision}, which this Swarm does not know (it needs {HEAD}): upgrade it")
    if file is not None and not file.exists():
        return
    try:
        async with Store.open(url) as store:
            if (found := await store.revision()) is None:
                return
            if file is None and found != revision:  # pg_restore replaces only what the backup has too
                raise Conflict(
                    f"the database there is at {found}, and the backup at {revision}: put it into a new, empty one"
                )
            alive = [row for row in await store.workers() if is_alive(row)]
            tickets = await store.ticket_summaries(limit=1)
    except StoreError:
        if not replace:
            raise
        return  # a damaged one is what backups are for
    if alive:
        raise Conflict(f"an engine uses the database ({alive[0].id} on {alive[0].host}): `swarm-engine stop` it first")
    if tickets and not replace:
        raise Conflict("the database there has tickets: --replace puts the backup in its place")


async def _copy(file: Path, target: Path) -> None:
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    await aio.stoppable(lambda check: backup.copy_file(file, target, check))


def _copy_tree(source: Path, target: Path, check: Callable[[], None]) -> None:
    def copy(one: str, to: str) -> str:
        check()
        return shutil.copy2(one, to, follow_symlinks=False)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


def _add_missing(source: Path, target: Path, check: Callable[[], None]) -> int:
    """How many agents were added. One that is there stays as it is."""
    added = 0
    make_directory(target)
    for one in sorted(source.iterdir()) if source.is_dir() else ():
        if not (target / one.name).exists():
            half = Path(tempfile.mkdtemp(prefix=".restored-", dir=target))
            try:
                _copy_tree(one, half / one.name, check)
                (half / one.name).replace(target / one.name)
            finally:
                shutil.rmtree(half, ignore_errors=True)
            added += 1
    return added


def _about(place: Path) -> dict[str, str]:
    try:
        about = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{place} is no backup: it has no {MANIFEST}; `swarm db backup` makes one") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read {place / MANIFEST}: {error}") from None
    if not isinstance(about, dict) or not all(isinstance(about.get(name), str) for name in _ABOUT):
        raise UsageError(f"{place / MANIFEST} is not what `swarm db backup` writes")
    return about


def _backup(place: Path, about: dict[str, str]) -> Backup:
    size = sum(file.lstat().st_size for file in place.rglob("*") if file.is_file())
    return Backup(place=place, database=about["database"], revision=about["revision"], at=about["at"], bytes=size)
