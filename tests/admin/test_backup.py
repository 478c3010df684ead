"""Backups of both databases: of one moment, while others write; put back; refused with a sentence, none half done."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from swarm.admin import backup
from swarm.base.files import locked
from swarm.errors import Conflict, HostError, StoreError, SwarmError, UsageError
from swarm.store.sql import backup as copies
from swarm.store.sql.database import OLDER
from swarm.store.store import Store
from tests.store.databases import Backend, Outside, PostgresBackend, SqliteBackend, insert


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
    here.outside.close()
    restored = await here.put_back(tmp_path / "made", replace=True)
    now = here.backend.outside(here.url)
    found = sorted(row[0] for row in now.execute("SELECT id FROM tickets"))
    now.close()
    assert found == [f"{number:06}" for number in range(len(found))] and 300 <= len(found) <= there
    assert restored.agents == 0


async def test_put_back_with_its_agents(here: Place, made: Path, tmp_path: Path) -> None:
    insert(here.outside, "later")
    here.outside.close()
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
    here.outside.close()
    await here.put_back(tmp_path / "made", agents=tmp_path / "new")
    async with Store.open(here.url) as store:
        assert (await store.agent("echo")).path == tmp_path / "new" / "echo-1"
        assert (await store.agent("retry")).path == Path("/nowhere/retry")


@pytest.mark.parametrize(
    "what", ["engine", "tickets", "damaged", "other kind", "no backup", "bad manifest", "newer", "half"]
)
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
    elif what in ("newer", "half"):
        error = StoreError if what == "newer" else UsageError
        about = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(about | {"revision": "v9_0_0" if what == "newer" else None}))
    else:
        manifest.write_text("[]")
    insert(here.outside, "two")
    with pytest.raises(error):
        await here.put_back(made, replace=what in ("engine", "newer", "half"))
    assert here.ids() == ["one", "two"]


async def test_pg_restore_would_leave_what_is_newer(postgresql_url: str, tmp_path: Path) -> None:
    agents, place = tmp_path / "agents", tmp_path / "made"
    await backup.make(postgresql_url, agents, place, now_ms=0)
    about = json.loads((place / backup.MANIFEST).read_text())
    (place / backup.MANIFEST).write_text(json.dumps(about | {"revision": OLDER[-1]}))
    with pytest.raises(Conflict, match="put it into a new, empty one"):
        await backup.put_back(postgresql_url, agents, place, replace=True)


async def test_a_server_without_a_role_that_has_rights(
    postgresql: PostgresBackend, postgresql_url: str, tmp_path: Path
) -> None:
    agents, place, empty = tmp_path / "agents", tmp_path / "made", postgresql.empty()
    with closing(postgresql.outside(postgresql_url)) as admin:
        admin.execute('CREATE ROLE "of another server"')
        async with Store.open(postgresql_url) as store:
            await store.grants("of another server", run=True)
        await backup.make(postgresql_url, agents, place, now_ms=0)
        admin.execute('DROP OWNED BY "of another server"')
        admin.execute('DROP ROLE "of another server"')
    with pytest.raises(HostError, match="rights for the role of another server, which this server does not have"):
        await backup.put_back(empty, agents, place, replace=False)
    with closing(postgresql.outside(empty)) as there:
        assert there.execute("SELECT count(*) FROM pg_class WHERE relname = 'tickets'") == [(0,)]


async def test_no_backup_replaces_another(here: Place, made: Path) -> None:
    before = (made / backup.MANIFEST).read_text()
    with pytest.raises(UsageError, match="exists"):
        await here.make(made)
    assert (made / backup.MANIFEST).read_text() == before


@pytest.mark.parametrize("where", ["", "made", "echo-1/made", "link"])
async def test_not_within_what_it_copies(here: Place, tmp_path: Path, where: str) -> None:
    (tmp_path / "link").symlink_to(here.agents)
    with pytest.raises(UsageError, match="is within"):
        await here.make(tmp_path / "link" / "made" if where == "link" else here.agents / where)
    assert [one.name for one in here.agents.iterdir()] == ["echo-1"]


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


@dataclass(frozen=True)
class File:
    """Of an SQLite database with the ticket 'now', and a backup with the ticket 'then'."""

    path: Path
    place: Path
    agents: Path

    async def put_back(self) -> backup.Restored:
        return await backup.put_back(f"sqlite:///{self.path}", self.agents, self.place, replace=True)

    def ids(self, path: Path | None = None) -> list[str]:
        with closing(sqlite3.connect(f"file:{path or self.path}?mode=rw", uri=True)) as connection:
            return sorted(row[0] for row in connection.execute("SELECT id FROM tickets"))

    def kept(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.before-*"))


@pytest.fixture
def file(tmp_path: Path) -> File:
    backend, agents = SqliteBackend(tmp_path), tmp_path / "agents"
    path = tmp_path / "data" / "swarm.db"
    path.parent.mkdir()
    Path(backend.new().removeprefix("sqlite:///")).rename(path)
    agents.mkdir()
    with closing(backend.outside(f"sqlite:///{path}")) as outside:
        insert(outside, "then")
        asyncio.run(backup.make(f"sqlite:///{path}", agents, tmp_path / "made", now_ms=0))
        outside.execute("DELETE FROM tickets")
        insert(outside, "now")
    return File(path, tmp_path / "made", agents)


def crash(path: Path, id: str) -> None:
    """A program adds a ticket and is killed: it is in the log alone."""
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('PRAGMA journal_mode = WAL'); "
        "c.execute('INSERT INTO tickets (id, title) VALUES (?, ?)', (sys.argv[2], 'x')); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, path, id], check=True)
    assert Path(f"{path}-wal").stat().st_size > 0


async def test_what_a_crash_left_in_the_log_is_kept(file: File) -> None:
    crash(file.path, "crashed")
    restored = await file.put_back()
    assert restored.kept is not None and file.ids(restored.kept) == ["crashed", "now"]
    assert file.ids() == ["then"]
    assert sorted(file.path.parent.iterdir()) == sorted([file.path, restored.kept])


async def test_the_log_of_a_database_that_is_gone(file: File) -> None:
    crash(file.path, "crashed")
    file.path.unlink()
    assert (await file.put_back()).kept is None
    assert file.ids() == ["then"]
    assert [one.name[-4:] for one in file.kept() if one.stat().st_size and "-wal" in one.name] == ["-wal"]


async def test_a_damaged_one_is_replaced_and_kept_with_its_log(file: File) -> None:
    crash(file.path, "crashed")
    file.path.write_bytes(b"\xff" * 8192)
    restored = await file.put_back()
    assert restored.kept is not None and restored.kept.read_bytes() == b"\xff" * 8192
    assert Path(f"{restored.kept}-wal").stat().st_size > 0
    assert file.ids() == ["then"]


async def test_two_within_a_second_keep_both(file: File) -> None:
    first = await file.put_back()
    with closing(sqlite3.connect(file.path)) as connection, connection:
        connection.execute("UPDATE tickets SET id = 'between'")
    second = await file.put_back()
    assert first.kept and second.kept and (file.ids(first.kept), file.ids(second.kept)) == (["now"], ["between"])


@pytest.mark.parametrize("written", [False, True])
async def test_not_while_another_program_has_it_open(file: File, written: bool) -> None:
    async with Store.open(f"sqlite:///{file.path}") as store:  # as a server does, which is no engine
        assert [ticket.id for ticket in await store.tickets()] == ["now"]
        if written:
            await store.shift_clock(1)
        with pytest.raises(Conflict, match="open"):
            await file.put_back()
        assert [ticket.id for ticket in await store.tickets()] == ["now"]
    assert (file.ids(), file.kept()) == (["now"], [])


async def test_two_at_once(file: File) -> None:
    with locked(file.path.parent), pytest.raises(Conflict, match="puts a backup back"):
        await file.put_back()
    assert (file.ids(), file.kept()) == (["now"], [])


async def test_a_link_stays_one(file: File, tmp_path: Path) -> None:
    real = tmp_path / "disk" / "real.db"
    real.parent.mkdir()
    file.path.rename(real)
    file.path.symlink_to(real)
    restored = await file.put_back()
    assert file.path.is_symlink() and file.ids(real) == ["then"]
    assert restored.kept is not None and restored.kept.parent == real.parent


async def test_one_that_is_stopped_changes_nothing(file: File) -> None:
    before = sorted(file.path.parent.iterdir())
    task = asyncio.ensure_future(file.put_back())
    while not file.path.with_name("swarm.db.new").exists():
        assert not task.done()
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (file.ids(), sorted(file.path.parent.iterdir())) == (["now"], before)


def test_without_room_it_changes_nothing(file: File) -> None:
    before = sorted(file.path.parent.iterdir())
    code = (
        "import asyncio, resource, signal, sys; from pathlib import Path; from swarm.admin import backup\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "url, agents, place = sys.argv[1], *map(Path, sys.argv[2:])\n"
        "asyncio.run(backup.put_back(url, agents, place, replace=True))"
    )
    arguments = [f"sqlite:///{file.path}", str(file.agents), str(file.place)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "HostError: can't copy the database" in done.stderr
    assert (file.ids(), sorted(file.path.parent.iterdir())) == (["now"], before)


_KILLED = """
import os, shutil, sqlite3, sys
from pathlib import Path
from swarm.store.sql import backup

old, new, place = map(Path, sys.argv[1:])

def ids(path):
    connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True)
    found = sorted(row[0] for row in connection.execute("SELECT id FROM tickets"))
    connection.close()
    return found

def run(calls):
    def kill(event, _):
        nonlocal calls
        if event.startswith(("os.", "sqlite3.", "open")):
            calls -= 1
            if calls == 0:
                os._exit(9)
    sys.addaudithook(kill)
    backup.put_file_back(place / "swarm.db.new", place / "swarm.db")
    os._exit(0)

for calls in range(1, 1000):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for source, name in ((old, "swarm.db"), (f"{old}-wal", "swarm.db-wal"), (new, "swarm.db.new")):
        shutil.copy(source, place / name)
    if (pid := os.fork()) == 0:
        run(calls)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found = ids(place / "swarm.db")
    print(ended, *found)
    if ended == 0:
        break
"""


def test_killed_at_any_moment_there_is_the_one_or_the_other(file: File, tmp_path: Path) -> None:
    crash(file.path, "crashed")
    arguments = [file.path, file.place / "swarm.db", tmp_path / "tries"]
    done = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True, check=True)
    *killed, ended = done.stdout.splitlines()
    assert len(killed) > 5 and {*killed} == {"9 crashed now", "9 then"} and ended == "0 then"
