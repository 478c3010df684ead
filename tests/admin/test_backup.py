"""Backups of both databases: of one moment, while others write; put back; refused with a sentence, none half done."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from swarm.admin import backup
from swarm.errors import Conflict, HostError, StoreError, SwarmError, UsageError
from swarm.store.sql import backup as copies
from swarm.store.store import Store
from tests.store.databases import Backend, Outside, SqliteBackend, insert


@dataclass(frozen=True)
class Place:
    backend: Backend
    url: str
    agents: Path
    outside: Outside

    async def make(self, place: Path) -> backup.Backup:
        return await backup.make(self.url, self.agents, place, now_ms=0)

    async def put_back(self, place: Path, *, replace: bool = False, agents: Path | None = None) -> backup.Restored:
        return await backup.put_back(self.url, agents or self.agents, place, replace=replace)

    def ids(self) -> list[str]:
        return sorted(row[0] for row in self.outside.execute("SELECT id FROM tickets"))


@pytest.fixture(params=["sqlite", "postgresql"])
def here(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        (tmp_path / "sqlite").mkdir()
        backend: Backend = SqliteBackend(tmp_path / "sqlite")
        url = backend.new()
    else:
        backend, url = request.getfixturevalue("postgresql"), request.getfixturevalue("postgresql_url")
    agents = tmp_path / "agents"
    (agents / "echo-1").mkdir(parents=True)
    (agents / "echo-1" / "main.py").write_text("print(1)\n")
    outside = backend.outside(url)
    yield Place(backend, url, agents, outside)
    outside.close()


@pytest.fixture
async def made(here: Place, tmp_path: Path) -> AsyncIterator[Path]:
    insert(here.outside, "one")
    await here.make(tmp_path / "made")
    yield tmp_path / "made"


async def test_it_is_of_one_moment_while_others_write(here: Place, tmp_path: Path) -> None:
    text, stop, written = "x" * 20_000, threading.Event(), threading.Event()

    def write() -> None:
        with closing(here.backend.outside(here.url)) as writer:
            for number in itertools.count():
                insert(writer, f"{number:06}", inputs=text)
                if number == 300:
                    written.set()
                if stop.is_set():
                    return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert await asyncio.to_thread(written.wait, 120)
        await here.make(tmp_path / "made")
    finally:
        stop.set()
        thread.join()
    there = len(here.ids())
    restored = await here.put_back(tmp_path / "made", replace=True)
    now = here.backend.outside(here.url)  # the old one's file was renamed
    found = sorted(row[0] for row in now.execute("SELECT id FROM tickets"))
    now.close()
    assert found == [f"{number:06}" for number in range(len(found))] and 300 <= len(found) <= there
    assert restored.agents == 0


async def test_put_back_with_its_agents(here: Place, made: Path, tmp_path: Path) -> None:
    insert(here.outside, "later")
    new = tmp_path / "elsewhere" / "agents"
    restored = await here.put_back(made, replace=True, agents=new)
    async with Store.open(here.url) as store:
        assert [ticket.id for ticket in await store.tickets()] == ["one"]
    assert restored.agents == 1 and (new / "echo-1" / "main.py").read_text() == "print(1)\n"
    assert (made.stat().st_mode & 0o777, (made / backup.MANIFEST).stat().st_mode & 0o777) == (0o700, 0o600)
    if restored.kept is not None:  # what was there is not lost
        kept = SqliteBackend.outside(here.backend, f"sqlite:///{restored.kept}")  # type: ignore[arg-type]
        assert kept.execute("SELECT count(*) FROM tickets") == [(2,)]
        kept.close()


async def test_agents_are_found_in_another_home(here: Place, tmp_path: Path) -> None:
    path = str(here.agents / "echo-1")
    here.outside.execute("UPDATE agents SET path = :path WHERE name = 'echo'", {"path": path})
    await here.make(tmp_path / "made")
    await here.put_back(tmp_path / "made", agents=tmp_path / "new")
    async with Store.open(here.url) as store:
        assert (await store.agent("echo")).path == tmp_path / "new" / "echo-1"
        assert (await store.agent("retry")).path == Path("/nowhere/retry")


@pytest.mark.parametrize("what", ["engine", "tickets", "damaged", "other kind", "no backup", "bad manifest"])
async def test_refused(here: Place, made: Path, what: str) -> None:
    manifest = made / backup.MANIFEST
    error: type[SwarmError] = UsageError
    if what == "engine":
        error = Conflict
        async with Store.open(here.url) as store:
            await store.heartbeat("engine", host="elsewhere", pid=1, info={})
    elif what == "tickets":
        error = Conflict
    elif what == "damaged":
        error = StoreError
        (copied,) = (one for one in made.glob("swarm.*") if one.is_file())
        copied.write_bytes(copied.read_bytes()[:-1])
    elif what == "other kind":
        about = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(about | {"database": "oracle"}))
    elif what == "no backup":
        manifest.unlink()
    else:
        manifest.write_text("[]")
    insert(here.outside, "two")
    with pytest.raises(error):
        await here.put_back(made, replace=what == "engine")
    assert here.ids() == ["one", "two"]


async def test_no_backup_replaces_another(here: Place, made: Path) -> None:
    before = (made / backup.MANIFEST).read_text()
    with pytest.raises(UsageError, match="exists"):
        await here.make(made)
    assert (made / backup.MANIFEST).read_text() == before


async def test_one_that_is_stopped_leaves_nothing(here: Place, tmp_path: Path) -> None:
    task = asyncio.ensure_future(here.make(tmp_path / "out" / "made"))
    while not (tmp_path / "out").is_dir() or not list((tmp_path / "out").iterdir()):
        assert not task.done()
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_database_is_found_when_it_is_copied(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path)
    file = Path(backend.new().removeprefix("sqlite:///"))
    outside = backend.outside(f"sqlite:///{file}")
    for number in range(200):
        insert(outside, str(number), inputs="x" * 1000)
    outside.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    outside.close()
    data = bytearray(file.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096] = b"\xff" * 4096
    file.write_bytes(data)
    with pytest.raises(HostError, match=r"damaged|copy the database"):
        copies.copy_file(file, tmp_path / "copy", lambda: None)
