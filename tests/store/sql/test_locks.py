"""How long the write lock is held: not while a transaction reads and computes, and not when there is nothing to write.

A `shell` here inserts like a program that waits for no lock.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from swarm.errors import Conflict, StoreError
from swarm.model import Succeeded
from swarm.store.sql.database import Database
from swarm.store.sql.dialect import Sql
from swarm.store.sql.threads import ConnectionThread
from swarm.store.sql.transaction import Tx, one_row
from swarm.store.store import Store
from tests.base.test_priority import realtime_policy
from tests.store.databases import Outside, claim_one, insert

pytestmark = pytest.mark.sqlite

TITLES = Sql("SELECT title FROM tickets ORDER BY id")
RENAME = Sql("UPDATE tickets SET title = :title")


@pytest.fixture
async def thread(url: str) -> AsyncIterator[ConnectionThread]:
    thread = ConnectionThread(Database(url, busy_timeout_seconds=0.0), write=True)
    yield thread
    await thread.close()


def shell(url: str, id_: str) -> bool:
    """Did its INSERT get in?"""
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0, isolation_level=None)
    try:
        connection.execute("INSERT INTO tickets (id, title, state) VALUES (?, 'typed', 'ready')", (id_,))
    except sqlite3.OperationalError as error:
        assert error.sqlite_errorname == "SQLITE_BUSY"
        return False
    finally:
        connection.close()
    return True


def titles(tx: Tx) -> list[str]:
    return [row.title for row in tx.all(TITLES)]


async def test_others_write_while_a_transaction_reads(url: str, thread: ConnectionThread) -> None:
    """What it has read is outdated then: it runs again on what is there now, at last with the lock from the start."""
    got_in: list[bool] = []
    undone: list[int] = []

    def rename(tx: Tx) -> list[str]:
        found = titles(tx)
        got_in.append(shell(url, f"t{len(got_in)}"))
        tx.if_undone(lambda: undone.append(len(got_in)))
        tx.run(RENAME, title="renamed")
        return found

    assert await thread.call(rename) == ["typed"] * 3
    assert got_in == [True, True, True, False]
    assert undone == [1, 2, 3]
    assert await thread.call(titles) == ["renamed"] * 3


async def test_a_transaction_leaves_no_open_cursor(url: str, thread: ConnectionThread) -> None:
    """One that failed is in a cycle of its traceback. If the garbage collector closed its cursor while the connection
    waits for a lock, the whole process would stand still."""
    left: list[Tx] = []

    def fail(tx: Tx) -> None:
        left.append(tx)
        titles(tx)
        shell(url, f"t{len(left)}")
        tx.run(RENAME, title="renamed")
        raise Conflict("no")

    with pytest.raises(Conflict):
        await thread.call(fail)
    await thread.call(lambda tx: left.append(tx))
    for tx in left:
        with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
            tx.all(TITLES)


async def test_it_waits_for_another_programs_lock(url: str) -> None:
    """And only then runs again, without it."""
    thread = ConnectionThread(Database(url, busy_timeout_seconds=60.0), write=True)
    writer = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0, isolation_level=None, check_same_thread=False)
    release = threading.Timer(0.05, writer.execute, ["COMMIT"])
    runs: list[bool] = []

    def rename(tx: Tx) -> None:
        titles(tx)
        if not runs:
            writer.execute("BEGIN IMMEDIATE")
            release.start()
        runs.append(writer.in_transaction)
        tx.run(RENAME, title="renamed")

    try:
        await thread.call(rename)
    finally:
        release.join()
        writer.close()
        await thread.close()
    assert runs == [True, False]


async def test_changes_are_seen_by_the_next_read(url: str, thread: ConnectionThread) -> None:
    """The lock is taken when a change is read back, and kept until the commit."""
    shell(url, "t")

    def rename(tx: Tx) -> tuple[bool, list[str], bool]:
        tx.run(RENAME, title="renamed")
        return shell(url, "u"), titles(tx), shell(url, "v")

    assert await thread.call(rename) == (True, ["renamed", "renamed"], False)


async def test_a_refused_function_changes_nothing(url: str, thread: ConnectionThread) -> None:
    shell(url, "t")

    def refuse(tx: Tx) -> None:
        tx.run(RENAME, title="renamed")
        titles(tx)
        raise Conflict("no")

    with pytest.raises(Conflict, match="no"):
        await thread.call(refuse)
    assert await thread.call(titles) == ["typed"]
    assert shell(url, "u")


async def test_a_claim_that_finds_nothing_needs_no_lock(store: Store, url: str) -> None:
    while await store.claim("worker", lease_seconds=30.0):
        pass
    writer = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=0, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    try:
        assert await store.claim("worker", lease_seconds=30.0) == []
    finally:
        writer.close()


async def test_claim_and_finish_read_before_they_write(store: Store, outside: Outside) -> None:
    """So they hold the lock while they write, and no longer."""
    insert(outside, "s")
    await claim_one(store)  # the connection is open, and its tables are checked
    insert(outside, "t")
    order: list[str] = []

    def trace(connection: sqlite3.Connection) -> None:
        connection.set_trace_callback(lambda sql: order.append(sql.split(maxsplit=1)[0]))

    await store._write.call_raw(lambda connection: trace(connection.driver))
    claim = await claim_one(store)
    claimed, order[:] = list(order), []
    await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
    for statements in (claimed, order):
        # A trigger's own statements are traced as comments.
        kinds = ["W" if one in ("INSERT", "UPDATE", "DELETE") else one[0] for one in statements if one != "--"]
        assert set(kinds) == set("BSWC"), statements
        assert "".join(kinds) == "".join(sorted(kinds, key="BSWC".index)), statements


@pytest.mark.parametrize("what", ["claim", "finish"])
async def test_nothing_is_read_under_the_lock(store: Store, outside: Outside, what: str) -> None:
    """Though another program's INSERT has just emptied SQLite's cache. And no ordinary thread gets in between."""
    insert(outside, "s")
    await store.finish((await claim_one(store)).attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
    insert(outside, "t")
    claim = await claim_one(store) if what == "finish" else None
    insert(outside, "u", state="draft")
    seen: list[tuple[str, int, int]] = []  # statement, read calls of this thread so far, its policy

    def note(sql: str) -> None:
        reads = int(Path("/proc/thread-self/io").read_text().split()[5])
        seen.append((sql.split(maxsplit=1)[0], reads, os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK))

    def trace(connection: sqlite3.Connection) -> None:
        connection.set_trace_callback(note)
        note("first")
        note("second")

    await store._write.call_raw(lambda connection: trace(connection.driver))
    if claim is None:
        await claim_one(store)
    else:
        await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
    await store._write.call_raw(lambda _: note("after"))
    (_, before, _), (_, after, ordinary), *statements, (_, _, again) = seen
    lock = next(n for n, (kind, _, _) in enumerate(statements) if kind == "UPDATE")
    commit = next(n for n, (kind, _, _) in enumerate(statements) if kind == "COMMIT")
    assert statements[commit][1] - statements[lock][1] == (commit - lock) * (after - before)  # only `note` has read
    assert statements[lock][1] - statements[0][1] > lock * (after - before)  # before that, SQLite did
    assert {policy for _, _, policy in statements[:lock]} == {ordinary} == {again}
    assert {policy for _, _, policy in statements[lock : commit + 1]} == {realtime_policy()}


async def test_statements_are_parsed_once(url: str, thread: ConnectionThread) -> None:
    """Also after one of them came too late, since another program wrote first."""
    ids = iter("ab")
    parsed: list[str | None] = []

    def rename(tx: Tx) -> None:
        titles(tx)
        if (id_ := next(ids, None)) is not None:
            shell(url, id_)
        tx.run(RENAME, title="renamed")

    def note(action: int, table: str | None, *_: object) -> int:
        parsed.append(table)
        return sqlite3.SQLITE_OK

    await thread.call(rename)
    await thread.call_raw(lambda connection: connection.driver.set_authorizer(note))
    await thread.call(rename)  # every statement is parsed again for the authorizer
    assert "tickets" in parsed
    parsed.clear()
    await thread.call(rename)
    assert "tickets" not in parsed


async def test_one_text_may_be_two_statements(thread: ConnectionThread) -> None:
    """Of which one must change a row: events are written by both kinds."""
    text = "UPDATE tickets SET title = :title WHERE id = 'nobody'"
    often, once = Sql(text), one_row(text)
    await thread.call(lambda tx: tx.run(often, title="x"))
    with pytest.raises(sqlite3.Error, match="a trigger ignored it"):
        await thread.call(lambda tx: tx.run(once, title="x"))


async def test_what_was_committed_is_told_whatever_hits_the_others(url: str, thread: ConnectionThread) -> None:
    """Three requests share a transaction that fails; by themselves, the first succeeds, and the disk is full then."""
    gate = threading.Event()

    def insert_all(tx: Tx, ids: Sequence[str]) -> list[str]:
        if len(ids) > 1:
            raise ValueError("a trigger of somebody's")
        if ids == ["full"]:
            raise StoreError("no space")
        shell(url, ids[0])
        return list(ids)

    blocked = asyncio.ensure_future(thread.call_raw(lambda _: gate.wait()))
    await asyncio.sleep(0)
    results = asyncio.gather(
        *(thread.submit_batch(insert_all, id_) for id_ in ("first", "full", "last")), return_exceptions=True
    )
    gate.set()
    await blocked
    first, full, last = await results
    assert first == "first"
    assert (type(full), type(last)) == (StoreError, StoreError)


async def test_a_large_row_is_written_once_at_each_transition(url: str, store: Store, outside: Outside) -> None:
    """Not also zeros over what it was, as Debian's SQLite does by itself (secure_delete): all others wait for it."""
    log, large = Path(url.removeprefix("sqlite:///") + "-wal"), f'{{"x": "{"y" * 8_000_000}"}}'
    insert(outside, "large", inputs=large)
    outside.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    claim = await claim_one(store)
    assert log.stat().st_size < 1.2 * len(large)
    outside.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0)
    assert log.stat().st_size < 1.2 * len(large)
