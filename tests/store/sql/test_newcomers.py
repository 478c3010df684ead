"""Who has just opened the database writes first, and nobody is waited for twice."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import pytest

from swarm.errors import FilesChanged
from swarm.store.sql.database import Database
from swarm.store.sql.dialect import Sql
from swarm.store.sql.newcomers import Newcomers
from swarm.store.sql.transaction import Outdated
from swarm.store.store import Store
from tests.store.databases import Backend

pytestmark = pytest.mark.sqlite
_INSERT: Final = Sql("INSERT INTO tickets (id, title, state) VALUES (:id, 'typed', 'draft')")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "swarm.db"
    file.touch()
    return file


@contextmanager
def opened(file: Path) -> Iterator[None]:
    fd = os.open(file, os.O_RDWR)
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def watching(file: Path, *, most_seconds: float = 60.0) -> Iterator[Newcomers]:
    """Time stands still: only what happens to the file ends a wait."""
    with closing(Newcomers(file, most_seconds=most_seconds, now=lambda: 0.0)) as newcomers:
        assert newcomers.let_in() is None  # from now on
        yield newcomers


@contextmanager
def waiting(newcomers: Newcomers) -> Iterator[None]:
    """It waits until something in the block ends that."""
    thread = threading.Thread(target=newcomers.let_in, daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    yield
    thread.join(60)
    assert not thread.is_alive()


def test_waits_until_the_newcomer_closes_the_file(file: Path) -> None:
    with watching(file) as newcomers, ExitStack() as stack:
        stack.enter_context(opened(file))
        with waiting(newcomers):
            stack.close()


def test_nobody_is_waited_for_who_has_closed_the_file(file: Path) -> None:
    with closing(Newcomers(file)) as newcomers:
        newcomers.let_in()
        for _ in range(3):
            with opened(file):
                pass
        assert newcomers.let_in() == 0.0


def test_one_who_stays_is_waited_for_once(file: Path) -> None:
    times = iter([0.0, 1.0, 1.25, 2.0])
    with closing(Newcomers(file, most_seconds=0.25, now=lambda: next(times))) as newcomers:
        assert newcomers.let_in() is None
        with opened(file):
            assert [newcomers.let_in(), newcomers.let_in()] == [0.25, None]


def test_half_of_the_time_is_the_threads_own(file: Path) -> None:
    """Two may come at once; behind them, it waits for as long as it did not wait before."""
    times = iter([0.0, 10.0, 10.25, 10.25, 10.5, 10.5, 10.625, 10.75, 11.0, 11.25])
    with closing(Newcomers(file, most_seconds=0.25, now=lambda: next(times))) as newcomers:
        found: list[float | None] = [newcomers.let_in()]
        for _ in range(5):
            with opened(file):
                found.append(newcomers.let_in())
    assert found == [None, 0.25, 0.25, 0.0, 0.125, 0.25]


def test_a_process_that_was_stopped_meanwhile_lets_others_in_soon(file: Path) -> None:
    times = iter([0.0, 1.0, 3601.0, 3601.5, 3601.75])
    with closing(Newcomers(file, most_seconds=0.25, now=lambda: next(times))) as newcomers:
        found: list[float | None] = [newcomers.let_in()]
        for _ in range(2):
            with opened(file):
                found.append(newcomers.let_in())
    assert found == [None, 3600.0, 0.25]


def test_a_thousand_that_come_and_go(file: Path) -> None:
    """Their events don't fit into one read."""
    with watching(file) as newcomers, ExitStack() as stack:
        for _ in range(1000):
            with opened(file):
                pass
        stack.enter_context(opened(file))
        with waiting(newcomers):
            stack.close()


@pytest.mark.parametrize("free", [0, 1, 2])
def test_without_descriptors_nobody_is_waited_for_and_none_is_lost(file: Path, free: int) -> None:
    program = (
        "import os, resource, sys; from pathlib import Path; from swarm.store.sql.newcomers import Newcomers\n"
        "fd, free = os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1 + free, fd + 1 + free))\n"
        "for _ in range(3):\n"
        "    newcomers = Newcomers(Path(sys.argv[1]), most_seconds=60)\n"
        "    assert [newcomers.let_in(), newcomers.let_in()] == [None, None]\n"
        "    newcomers.close()\n"
        "assert os.dup(fd) == fd + 1 if free else True"
    )
    subprocess.run([sys.executable, "-c", program, file, str(free)], check=True)


@contextmanager
def transacting(url: str) -> Iterator[tuple[Path, Callable[..., None]]]:
    """The database's file, and a transaction: ``meanwhile`` is called when all is read; ``first`` is a statement before
    that."""
    database = Database(url, busy_timeout_seconds=60)
    assert database.file is not None
    connection = database.connect(write=True)
    connection.newcomers = Newcomers(database.file, most_seconds=60)

    def transact(meanwhile: Callable[[], None], *, first: Sql | None = None) -> None:
        with database.transaction(connection, optimistic=True) as tx:
            assert tx.now_ms
            assert first is None or tx.all(first, id="first")
            tx.run(_INSERT, id="ours")
            meanwhile()

    with closing(connection):
        assert connection.newcomers.let_in() is None
        yield database.file, transact


def newcomer_writes(file: Path, while_waiting: threading.Thread) -> None:
    """As the shell does, which does not wait for a lock. The file was opened before."""
    while_waiting.join(0.1)
    assert while_waiting.is_alive()
    with closing(sqlite3.connect(file, isolation_level=None, timeout=0)) as connection:
        connection.execute(_INSERT, {"id": "theirs"})
        assert connection.execute("SELECT id FROM tickets").fetchall() == [("theirs",)]


def test_a_transaction_begins_after_a_newcomers(backend: Backend) -> None:
    with transacting(backend.new()) as (file, transact):
        thread = threading.Thread(target=transact, args=(lambda: None,))
        with opened(file):
            thread.start()
            newcomer_writes(file, thread)
        thread.join()
        assert ids(file) == ["ours", "theirs"]


def test_a_transaction_does_not_end_before_a_newcomers(backend: Backend) -> None:
    """It has read before, and so runs again."""
    found, stack, has_opened = list[BaseException](), ExitStack(), threading.Event()

    def meanwhile() -> None:
        stack.enter_context(opened(file))
        has_opened.set()

    def transaction() -> None:
        with pytest.raises(Outdated) as raised:
            transact(meanwhile)
        found.append(raised.value)

    with transacting(backend.new()) as (file, transact):
        thread = threading.Thread(target=transaction)
        thread.start()
        has_opened.wait()
        newcomer_writes(file, thread)
        stack.close()
        thread.join()
        assert len(found) == 1 and ids(file) == ["theirs"]


def test_a_transaction_that_has_the_lock_waits_for_nobody(backend: Backend) -> None:
    with transacting(backend.new()) as (file, transact), ExitStack() as stack:
        transact(lambda: stack.enter_context(opened(file)), first=Sql(f"{_INSERT} RETURNING id"))
        assert ids(file) == ["first", "ours"]


def test_the_database_is_overwritten_while_the_transaction_waits(backend: Backend) -> None:
    """It writes nothing into that."""

    def overwrite() -> None:
        other = file.open("r+b")

        def finish() -> None:
            other.write(content)
            other.close()

        threading.Thread(target=finish).start()

    with transacting(backend.new()) as (file, transact):
        content = file.read_bytes()
        with pytest.raises(FilesChanged):
            transact(overwrite)
        assert file.read_bytes() == content


def ids(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as connection:
        return sorted(id_ for (id_,) in connection.execute("SELECT id FROM tickets"))


async def test_a_process_that_stays_watches_for_newcomers_until_it_closes_the_store(backend: Backend) -> None:
    def watches() -> int:
        links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return links.count("anon_inode:inotify")

    before, found = watches(), list[int]()
    async with Store.open(backend.new()) as store:
        await store.heartbeat("w", host="h", pid=1, info={})
        found.append(watches() - before)
        async with store.watching():
            await store.heartbeat("w", host="h", pid=1, info={})
            found.append(watches() - before)
    assert [*found, watches() - before] == [0, 2, 0]  # with the wake's
