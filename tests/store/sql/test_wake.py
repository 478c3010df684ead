"""Waking up: a commit by any process is seen within milliseconds, and waiting costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from asyncinotify import Mask

from swarm.errors import Conflict, StoreError
from swarm.model import Event, Succeeded, Ticket
from swarm.store.sql.dialect import Sql
from swarm.store.sql.postgresql import TOLD
from swarm.store.sql.transaction import Tx
from swarm.store.sql.wake import FileWake
from swarm.store.store import Store
from tests import postgres_here
from tests.conftest import PATIENCE_SECONDS, need
from tests.store.databases import ECHO, LEASE, Outside, PostgresBackend

INSERT_TICKET = Sql("INSERT INTO tickets (id) VALUES (:id)")
LISTENS = "application_name = 'swarm' AND query LIKE '%current_schema()' AND datname = current_database()"
TELLS = Sql("SELECT current_setting('swarm.tells') AS tells")


@pytest.fixture
async def file(tmp_path: Path) -> Path:
    file = tmp_path / "swarm.db"
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
    return file


INSERT = """
import sys, time
if sys.argv[1].startswith("sqlite"):
    import sqlite3
    db = sqlite3.connect(sys.argv[1].removeprefix("sqlite:///"), isolation_level=None, timeout=60)
else:
    import psycopg
    db = psycopg.connect(sys.argv[1], autocommit=True)
for line in sys.stdin:
    if line.strip():
        db.execute(f"INSERT INTO tickets (id, title, state) VALUES ('{line.strip()}', 'wake', 'draft')")
    print(time.monotonic_ns(), flush=True)
"""


async def test_a_commit_of_another_process_is_seen_at_once(store: Store, url: str) -> None:
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INSERT, url, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None and other.stdout is not None
    late, without = [], []  # ms from when it was done until it was seen here; the same by a pipe, without a database
    async with store.watching() as wake:
        for number in range(40):
            other.stdin.write(f"{number}\n".encode())
            async with asyncio.timeout(PATIENCE_SECONDS):
                assert await wake.changed(timeout_seconds=60)
            seen = time.monotonic_ns()
            late.append((seen - int(await other.stdout.readline())) / 1e6)
            other.stdin.write(b"\n")
            told = int(await other.stdout.readline())
            without.append((time.monotonic_ns() - told) / 1e6)
    other.stdin.close()
    await other.wait()
    # `make bench-engine` has the real figure; here the machine may be busy, and a fixed interval would still show.
    assert statistics.median(late) < 20 + 5 * statistics.median(without), (sorted(late), sorted(without))


async def test_without_a_commit_nothing_is_seen_and_it_costs_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fallback looks once a second. Turns of the loop are counted, not CPU time: a slow machine needs more."""
    async with store.watching() as wake:
        await wake.changed(timeout_seconds=0)
        while await wake.changed(timeout_seconds=0.2):
            pass
        selector, turns = asyncio.get_running_loop()._selector, list[float | None]()  # type: ignore[attr-defined]
        select = selector.select

        def counted(timeout: float | None = None) -> Any:
            turns.append(timeout)
            return select(timeout)

        monkeypatch.setattr(selector, "select", counted)
        assert not await wake.changed(timeout_seconds=2.0)
        assert len(turns) < 20, turns


async def test_a_commit_between_two_calls_is_not_missed(store: Store, outside: Outside) -> None:
    async with store.watching() as wake:
        await wake.changed(timeout_seconds=0)
        outside.execute("INSERT INTO tickets (id, title) VALUES ('a', 'a')")
        assert await wake.changed(timeout_seconds=60)
        assert not await wake.changed(timeout_seconds=0.1)
        outside.execute("BEGIN")
        outside.execute("INSERT INTO tickets (id, title) VALUES ('b', 'b')")
        assert not await wake.changed(timeout_seconds=0.2)  # not committed
        outside.execute("COMMIT")
        assert await wake.changed(timeout_seconds=60)


async def test_own_commits_are_noticed_once_the_lock_is_released(file: Path) -> None:
    """Not before: the event loop would take time from the thread that holds the lock."""
    before, within, undone = list[str](), list[str](), list[str]()

    def insert(tx: Tx, id_: str, seen: list[str]) -> None:
        tx.run(INSERT_TICKET, id=id_)
        before.extend(noticed())
        tx.write()
        seen.extend(noticed())
        if seen is undone:
            raise Conflict("no")

    async with Store.open(f"sqlite:///{file}") as store, store.watching() as wake:
        await wake.changed(timeout_seconds=0)
        assert noticed() == ["writes"]
        await store._write.call(insert, "own", within)
        assert noticed() == ["writes"]
        assert await wake.changed(timeout_seconds=60)
        with pytest.raises(Conflict):
            await store._write.call(insert, "undone", undone)
        assert noticed() == ["writes"]
        while await wake.changed(timeout_seconds=0.2):
            pass
        with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as other:
            other.execute("INSERT INTO tickets (id) VALUES ('other')")
        assert await wake.changed(timeout_seconds=60)
    assert (before, within, undone) == (["writes", "writes"], ["files"], ["files"])


@pytest.mark.parametrize("gone", [False, True])
async def test_a_batch_thread_listens_until_the_end(file: Path, gone: bool) -> None:
    """Other programs' writes wake a thread that takes nobody's CPU, not the event loop: they hold the write lock."""
    async with FileWake.watching(file) as wake:
        [listens] = [one for one in threading.enumerate() if one.name == "swarm-wake"]
        assert listens.native_id is not None
        while os.sched_getscheduler(listens.native_id) != os.SCHED_BATCH:
            await wake.changed(timeout_seconds=0.01)
        with contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=60)) as other:
            other.execute("INSERT INTO tickets (id, description) VALUES ('other', ?)", ("y" * 5_000_000,))
        assert await wake.changed(timeout_seconds=60)
        if gone:
            shutil.rmtree(file.parent)
    assert not listens.is_alive()


def noticed() -> list[str]:
    """What this process's inotify descriptors report now, as the kernel says. Not the one for newcomers."""
    found = []
    for info in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            masks = [int(one, 16) for one in re.findall(r"^inotify .* mask:([0-9a-f]+)", info.read_text(), re.M)]
            found += ["writes" if mask & Mask.MODIFY else "files" for mask in masks if not mask & Mask.OPEN]
    return found


DEAF = """
import asyncio, sqlite3, sys
from pathlib import Path
from swarm.store.sql.wake import FileWake

Path("/proc/sys/user/max_inotify_instances").write_text("0")  # of our own user namespace

async def main():
    other = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
    async with FileWake.watching(Path(sys.argv[1])) as wake:
        await wake.changed(timeout_seconds=0)
        for number in range(10):
            waiting = asyncio.create_task(wake.changed(timeout_seconds=20))
            await asyncio.sleep(0)
            other.execute("INSERT INTO tickets (id, title, state) VALUES (?, 'wake', 'draft')", (str(number),))
            began = asyncio.get_running_loop().time()
            assert await waiting
            print(asyncio.get_running_loop().time() - began)

asyncio.run(main())
"""


@pytest.mark.needs("root")
async def test_without_inotify_it_polls_and_says_so(file: Path) -> None:
    argv = ["unshare", "--user", "--map-root-user", sys.executable, "-c", DEAF, str(file)]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("no inotify, so the database is checked every 50 ms") == 1
    late = [float(line) for line in done.stdout.splitlines() if line[:1].isdigit() and "[" not in line]
    assert len(late) == 10
    assert statistics.median(late) < 0.5, "a look each second would be the fallback for file systems without events"


@pytest.mark.parametrize("how", ["replaced", "removed"])
async def test_another_file_in_its_place(file: Path, how: str) -> None:
    async with FileWake.watching(file) as wake:
        await wake.changed(timeout_seconds=0)
        if how == "removed":
            file.unlink()
        else:
            other = file.with_name("other.db")
            other.write_bytes(file.read_bytes())
            other.replace(file)
        with pytest.raises(StoreError, match="was changed from outside"):
            for _ in range(3):
                await wake.changed(timeout_seconds=2.0)


async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't watch"):
        async with FileWake.watching(tmp_path / "none.db"):
            pass


# --- PostgreSQL: LISTEN -----------------------------------------------------------------------------------------------


async def test_own_commits_are_noticed_and_those_that_change_nothing_are_not(postgresql_url: str) -> None:
    async with Store.open(postgresql_url) as store, store.watching() as wake:
        await store.add_ticket(Ticket(id="t", title="t", state="ready", agent_id=ECHO.id))
        assert await wake.changed(timeout_seconds=60)
        (claim,) = await store.claim("w", lease_seconds=LEASE)
        assert await wake.changed(timeout_seconds=60)
        assert await store.claim("w", lease_seconds=LEASE) == []
        await store.renew([claim.attempt_id], lease_seconds=LEASE)
        await store.running(claim.attempt_id, 7)
        assert not await wake.changed(timeout_seconds=0.2)
        await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0)
        assert await wake.changed(timeout_seconds=60)


async def test_an_engine_does_not_notice_what_agents_print(postgresql_url: str) -> None:
    async with (
        Store.open(postgresql_url) as store,
        store.watching() as follower,
        store.watching(events=False) as engine,
    ):
        await store.add_ticket(Ticket(id="t", title="t", state="ready", agent_id=ECHO.id))
        assert await follower.changed(timeout_seconds=60) and await engine.changed(timeout_seconds=60)
        await store.append([Event(ticket_id="t", kind="output", data={"stream": "stdout", "text": "hello"})])
        assert await follower.changed(timeout_seconds=60)
        assert not await engine.changed(timeout_seconds=0.2)


async def test_own_connections_tell_after_their_commit(postgresql: PostgresBackend, postgresql_url: str) -> None:
    """Of the tables whose triggers tell of other programs' changes."""
    with contextlib.closing(postgresql.outside(postgresql_url)) as outside:
        triggers = dict(
            outside.execute(
                "SELECT CAST(CAST(tgrelid AS regclass) AS text), pg_get_triggerdef(oid) FROM pg_trigger "
                "WHERE right(tgname, 7) = '_notify'"
            )
        )
        assert set(triggers) == TOLD
        assert all("swarm.tells" in definition for definition in triggers.values())
        async with Store.open(postgresql_url) as store:
            (row,) = await store._write.call(lambda tx: tx.all(TELLS))
            assert row.tells == "on"
            outside.execute("LISTEN swarm")
            await store.add_ticket(Ticket(id="t", title="t", state="ready", agent_id=ECHO.id))
            assert await asyncio.to_thread(told, outside) == ["public"]


def told(outside: Outside) -> list[str]:
    """The notice that has come, or comes."""
    return [notice.payload for notice in outside._connection.notifies(timeout=60, stop_after=1)]  # type: ignore[attr-defined]


async def test_other_schemas_of_the_database_are_not_ours(postgresql: PostgresBackend, postgresql_url: str) -> None:
    """The trigger tells the schema of its table, whatever the path of who writes."""
    with contextlib.closing(postgresql.outside(postgresql_url)) as outside:
        async with Store.open(postgresql_url) as store, store.watching() as wake:
            outside.execute("SELECT pg_notify('swarm', 'theirs')")
            outside.execute("CREATE SCHEMA theirs")
            outside.execute("SET search_path = theirs")
            assert not await wake.changed(timeout_seconds=0.2)
            outside.execute("INSERT INTO public.tickets (id, created_at) VALUES (NULL, '2026-01-01')")
            assert await wake.changed(timeout_seconds=60)


async def test_the_number_of_a_lost_connection_is_let_go_once(
    postgresql: PostgresBackend, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq has closed it, so what is opened next has the same number, such as the pidfd of a child."""
    loop, numbers = asyncio.get_running_loop(), list[int]()
    remove_reader, (reads, writes) = loop.remove_reader, os.pipe()

    def open_something_else(number: int) -> bool:
        removed = remove_reader(number)
        if not numbers:
            numbers.append(number)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)
            os.dup2(reads, number)
            loop.add_reader(number, numbers.clear)
        return removed

    with contextlib.closing(postgresql.outside(postgresql_url)) as outside:
        async with Store.open(postgresql_url) as store, store.watching() as wake:
            monkeypatch.setattr(loop, "remove_reader", open_something_else)
            outside.execute(f"SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE {LISTENS}")
            assert await wake.changed(timeout_seconds=60)
            assert remove_reader(numbers[0]), "nobody listens to what has the number now"
    for number in (*numbers, reads, writes):
        os.close(number)


async def test_a_lost_connection_comes_back(
    postgresql: PostgresBackend, postgresql_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever waits looks then, since what was committed meanwhile was not told."""
    with contextlib.closing(postgresql.outside(postgresql_url)) as outside:
        async with Store.open(postgresql_url) as store, store.watching() as wake:
            for _ in range(2):
                outside.execute(f"SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE {LISTENS}")
                assert await wake.changed(timeout_seconds=60)
                outside.execute("INSERT INTO tickets (title) VALUES ('t')")
                assert await wake.changed(timeout_seconds=60)
    said = capsys.readouterr()
    assert (said.out + said.err).count("no notices of changes") == 2


@pytest.mark.slow  # starts a server
async def test_a_server_that_is_stopped_and_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("postgres")
    with postgres_here.running(tmp_path / "own") as server:
        async with Store.open(server.url()) as store, store.watching() as wake:
            server.stop()
            assert not await wake.changed(timeout_seconds=2)  # several tries
            server.start()
            assert await wake.changed(timeout_seconds=60)
            await store.migrate()
            await store.add_ticket(Ticket(id="t", title="t", state="draft"))
            assert await wake.changed(timeout_seconds=60)
        server.stop()
        with pytest.raises(StoreError, match="can't reach the database"):
            async with store.watching():
                pass
    said = capsys.readouterr()
    assert (said.out + said.err).count("no notices of changes") == 1
