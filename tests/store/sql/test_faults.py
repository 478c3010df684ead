"""The database is locked, read-only, full, damaged, missing: one clear message each, and nothing lost."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from swarm.base import process
from swarm.errors import Locked, StoreError, UsageError
from swarm.model import Event
from swarm.store.store import Store
from tests.store.databases import LEASE, Backend, Outside, claim_one, insert

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Starts tests/store/program.py and waits for its 'ready'."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.store.program",
        *arguments,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert started.stdout is not None
        assert await started.stdout.readline() == b"ready\n"
        yield started
    finally:
        await process.kill(started)


async def result(started: asyncio.subprocess.Process) -> object:
    """Let it continue to its end."""
    out, _ = await started.communicate(b"\n")
    assert started.returncode == 0
    return json.loads(out)


@pytest.mark.sqlite
async def test_locked_by_another_process(url: str, outside: Outside) -> None:
    insert(outside, "t")
    async with Store.open(url, busy_timeout_seconds=0.2) as store:
        claim = await claim_one(store)
        insert(outside, "another")
        async with program("hold-lock", url) as other:
            event = Event(ticket_id="t", kind="output", data={})
            loop = asyncio.get_running_loop()
            began = loop.time()
            errors = await asyncio.gather(
                store.claim("w", lease_seconds=LEASE),
                *(store.append([event]) for _ in range(50)),
                store.renew([claim.attempt_id], lease_seconds=LEASE),
                return_exceptions=True,
            )
            assert {type(answer) for answer in errors} == {Locked}
            assert "is locked: another program has held its write lock for more than 0.2 s" in str(errors[0])
            assert loop.time() - began < 5  # they waited together, not one after the other
            assert (await store.ticket("t")).state == "in_progress"  # readers don't wait for writers
            await result(other)
        assert not (await store.renew([claim.attempt_id], lease_seconds=LEASE)).lost


@pytest.mark.sqlite
async def test_read_only(backend: Backend) -> None:
    file = backend.new().removeprefix("sqlite:///")
    async with Store.open(f"sqlite:///file:{file}?mode=ro&uri=true") as store:
        assert len(await store.agents()) == 2
        with pytest.raises(StoreError, match="is read-only for this user"):
            await store.claim("w", lease_seconds=LEASE)
        with pytest.raises(StoreError, match="is read-only for this user"):
            await store.cancel("t", by="me")


async def test_missing(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"the directory .*/nowhere of the database x.db does not exist; run `swarm init`"
    ):
        async with Store.open(f"sqlite:///{tmp_path}/nowhere/x.db"):
            pass
    async with Store.open(f"sqlite:///{tmp_path}/x.db") as store:
        assert await store.revision() is None
        for ask in (store.tickets(), store.claim("w", lease_seconds=LEASE)):
            with pytest.raises(StoreError, match=r"the database .*/x.db does not exist; run `swarm init`"):
                await ask
        assert not (tmp_path / "x.db").exists()


async def test_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("Dear diary, " * 1000)
    with pytest.raises(StoreError, match="is not an SQLite database"):
        async with Store.open(f"sqlite:///{tmp_path}/x.db"):
            pass
    with pytest.raises(StoreError, match="can't open the database"):
        async with Store.open(f"sqlite:///{tmp_path}"):
            pass


@pytest.mark.sqlite
async def test_damaged(url: str, outside: Outside) -> None:
    insert(outside, "t", description="x" * 100_000)
    outside.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    file = Path(url.removeprefix("sqlite:///"))
    file.write_bytes(file.read_bytes()[:4096] + os.urandom(file.stat().st_size - 4096))
    with pytest.raises(StoreError, match="is damaged"):
        async with Store.open(url):
            pass


async def test_not_migrated(backend: Backend) -> None:
    url = backend.empty()
    if url.startswith("sqlite:"):
        Path(url.removeprefix("sqlite:///")).touch()
    async with Store.open(url) as store:
        assert await store.revision() is None
        with pytest.raises(StoreError, match=r"\(it is empty\); run `swarm init`"):
            await store.claim("w", lease_seconds=LEASE)
        await store.migrate()
        await store.migrate()
        assert await store.revision() == Store.head()
        assert await store.claim("w", lease_seconds=LEASE) == []


async def test_made_by_a_newer_swarm(url: str, outside: Outside) -> None:
    outside.execute("UPDATE alembic_version SET version_num = '9999'")
    async with Store.open(url) as store:
        assert await store.revision() == "9999"
        with pytest.raises(StoreError, match=r"is at 9999, which this Swarm does not know .*: a newer version"):
            await store.tickets()
        with pytest.raises(StoreError, match="a newer version made it"):
            await store.migrate()


async def test_a_table_is_gone(store: Store, outside: Outside) -> None:
    await store.queue()
    outside.execute("DROP TABLE attempts")
    with pytest.raises(StoreError, match=r"attempts.*run `swarm init`"):
        await store.claim("w", lease_seconds=LEASE)


@pytest.mark.parametrize("url", ["", "nonsense", "oracle://x/y", "sqlite:", "sqlite://", "sqlite:///:memory:"])
async def test_bad_url(url: str) -> None:
    with pytest.raises(UsageError, match="database"):
        async with Store.open(url):
            pass


@pytest.mark.needs("root")
async def test_disk_full(tmp_path: Path) -> None:
    """A full file system of 2 MB: a clear message, and every ticket that was added exists."""
    script = (
        f'mount -t tmpfs -o size=2m none "$1" && exec "$2" -m tests.store.program fill "sqlite:///$1/x.db" {"x" * 60}'
    )
    done = await process.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable], cwd=ROOT, input=b"\n"
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert "the disk (or a quota) is full" in found["error"]
    assert found["added"] == found["there"] > 3


@pytest.mark.sqlite
async def test_out_of_memory(url: str, outside: Outside) -> None:
    """SQLite undoes the whole transaction by itself; the error about the lost savepoint does not hide the reason."""
    for number in range(8):
        insert(outside, f"big{number}", description="x" * 300_000)
    async with program("starve", url) as starving:
        answers = await result(starving)
    assert isinstance(answers, dict)
    assert answers.pop("served") > 3
    assert list(answers) == [f"StoreError: out of memory in the database {url.removeprefix('sqlite:///')}"]
    assert outside.execute("PRAGMA integrity_check") == [("ok",)]


async def test_a_bug_in_one_request_leaves_the_others_alone(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    good = [Event(ticket_id="t", kind="output", data={"n": n}) for n in range(3)]
    bad = Event(ticket_id="t", kind=object(), data={})  # type: ignore[arg-type]
    results = await asyncio.gather(*(store.append([e]) for e in (good[0], bad, *good[1:])), return_exceptions=True)
    assert [result is None for result in results] == [True, False, True, True]
    assert isinstance(results[1], store._db.dialect.driver_error)
    assert len(await store.events("t")) == 3


async def test_closed_store(url: str) -> None:
    async with Store.open(url) as store:
        request = asyncio.ensure_future(store.heartbeat("w", host="h", pid=1, info={}))
        await store.queue()
    await request
    with pytest.raises(StoreError, match="the store is closed"):
        await store.queue()


# --- several processes ------------------------------------------------------------------------------------------------


async def test_two_processes_share_the_work(url: str, outside: Outside) -> None:
    outside.execute("BEGIN")
    for number in range(300):
        insert(outside, f"t{number}")
    outside.execute("COMMIT")
    async with program("work", url, "one") as one, program("work", url, "two") as two:
        done = await asyncio.gather(result(one), result(two))
    ids = [one for part in done for one in part]  # type: ignore[attr-defined]
    assert sorted(ids) == sorted(f"t{number}" for number in range(300))
    assert outside.execute("SELECT state, count(*) FROM tickets GROUP BY state") == [("done", 300)]
    assert outside.execute("SELECT count(*), count(DISTINCT step_execution_id) FROM attempts") == [(300, 300)]


async def test_three_processes_migrate_at_once(backend: Backend) -> None:
    url = backend.empty()
    async with program("migrate", url) as a, program("migrate", url) as b, program("migrate", url) as c:
        assert set(await asyncio.gather(result(a), result(b), result(c))) == {Store.head()}
