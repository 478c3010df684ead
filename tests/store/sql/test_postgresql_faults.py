"""PostgreSQL is stopped, cuts a connection, has none left, is a standby, takes too long: one clear message each,
without the password, and the next call works once it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from swarm import config
from swarm.app import doctor_wiring
from swarm.errors import Locked, StoreError, UsageError
from swarm.model import Ticket
from swarm.store.sql.database import Database
from swarm.store.sql.dialect import Sql
from swarm.store.sql.threads import ConnectionThread
from swarm.store.sql.transaction import Tx
from swarm.store.store import Store
from tests import postgres_here
from tests.conftest import PATIENCE_SECONDS, need
from tests.store.databases import LEASE, Outside, PostgresBackend

pytestmark = pytest.mark.slow

PASSWORD = "geheim"


def with_password(url: str) -> str:
    return url.replace("@/", f":{PASSWORD}@/")


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[postgres_here.Server]:
    """One that may be hurt. Nine connections, of which some are kept for superusers, as which all tests log in."""
    need("postgres")
    with postgres_here.running(tmp_path_factory.mktemp("own"), wal_level="replica", max_connections="9") as server:
        yield server


@pytest.fixture
async def hurt(own_server: postgres_here.Server) -> AsyncIterator[Store]:
    async with Store.open(with_password(own_server.url()), busy_timeout_seconds=30.0) as store:
        await store.migrate()
        yield store


@pytest.fixture
def outside(postgresql: PostgresBackend, postgresql_url: str) -> Iterator[Outside]:
    outside = postgresql.outside(postgresql_url)
    yield outside
    outside.close()


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[Store]:
    async with Store.open(with_password(postgresql_url)) as store:
        yield store


async def fails(store: Store, sentence: str, *, read: bool = True) -> None:
    for call in (store.claim("w", lease_seconds=LEASE), *((store.queue(),) if read else ())):
        with pytest.raises(StoreError) as caught:
            await call
        assert sentence in str(caught.value), caught.value
        assert PASSWORD not in str(caught.value) and ":***@" in str(caught.value)


async def works(store: Store) -> None:
    added = await store.add_ticket(Ticket(id=str(uuid4()), title="t", state="draft"))
    assert (await store.ticket(added.id)).title == "t"


async def test_stopped_and_started(hurt: Store, own_server: postgres_here.Server) -> None:
    await works(hurt)
    own_server.stop()
    try:
        for _ in range(2):
            await fails(hurt, "can't reach the database")
        with pytest.raises(StoreError, match="can't reach the database"):
            async with Store.open(own_server.url()):
                pass
    finally:
        own_server.start()
    await works(hurt)


def _crashes(server: postgres_here.Server) -> None:
    server.stop(signal.SIGQUIT)
    server.start()


def _restarts(server: postgres_here.Server) -> None:
    server.stop()
    server.start()


def _cuts(server: postgres_here.Server) -> None:
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")


@pytest.mark.parametrize("does", [_crashes, _restarts, _cuts])
async def test_what_a_server_does_between_two_calls_is_no_fault(
    hurt: Store, own_server: postgres_here.Server, does: Callable[[postgres_here.Server], None]
) -> None:
    await works(hurt)
    for _ in range(3):
        does(own_server)  # not on a thread: a server ends with the one that started it
        await works(hurt)
        await hurt.claim("w", lease_seconds=LEASE)


async def test_a_connection_that_is_well_is_kept(postgresql_url: str) -> None:
    thread = ConnectionThread(Database(postgresql_url, busy_timeout_seconds=5.0), write=True)
    try:
        pids = [await thread.call(_pid) for _ in range(20)]
        with pytest.raises(StoreError):
            await thread.call(_fault)
        assert {*pids, await thread.call(_pid)} == {pids[0]}
    finally:
        await thread.close()


def _pid(tx: Tx) -> int:
    return int(tx.all(Sql("SELECT pg_backend_pid() AS pid"))[0].pid)


def _fault(tx: Tx) -> None:
    raise StoreError("not the database's")


async def test_no_connection_is_left(hurt: Store, own_server: postgres_here.Server) -> None:
    others = list[psycopg.Connection[object]]()
    try:
        async with Store.open(with_password(own_server.url())) as late:  # which has one to read
            while len(others) < 20:
                try:
                    others.append(psycopg.connect(own_server.url()))
                except psycopg.OperationalError:
                    break
            await fails(late, "has no connection left for Swarm: raise max_connections", read=False)
            await works(hurt)
            others.pop().close()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:  # the server's process ends a moment later
                    with contextlib.suppress(StoreError):
                        await works(late)
                        break
    finally:
        for other in others:
            other.close()


async def test_a_standby_that_becomes_the_primary(hurt: Store, own_server: postgres_here.Server) -> None:
    await works(hurt)
    own_server.stop()
    (own_server.data / "standby.signal").touch()
    own_server.start()
    async with Store.open(with_password(own_server.url())) as store:
        await fails(store, "is read-only: is it a standby? Let the URL name the primary", read=False)
        await store.queue()
        with pytest.raises(StoreError, match="is read-only"):
            async with store.watching():
                pass
        with psycopg.connect(own_server.url(), autocommit=True) as admin:
            assert admin.execute("SELECT pg_promote()").fetchall() == [(True,)]
        await works(store)
        async with store.watching() as wake:
            await works(store)
            assert await wake.changed(timeout_seconds=60)


async def test_read_only_by_a_setting(postgresql_url: str, outside: Outside) -> None:
    """One that a user set for others is none for Swarm."""
    outside.execute(
        f"ALTER DATABASE {postgresql_url.partition('@/')[2].partition('?')[0]} SET default_transaction_read_only = on"
    )
    async with Store.open(postgresql_url) as store:
        await works(store)


async def blocked(store: Store, outside: Outside) -> asyncio.Task[Ticket]:
    """A call that waits in mid-transaction for another program's lock."""
    outside.execute("BEGIN")
    outside.execute("LOCK TABLE tickets IN EXCLUSIVE MODE")
    task = asyncio.create_task(store.add_ticket(Ticket(id="t", title="t", state="draft")))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (waiting := outside.execute("SELECT pid FROM pg_locks WHERE NOT granted")) == []:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(waiting) == 1
    return task


async def test_the_connection_is_cut_in_mid_transaction(store: Store, outside: Outside) -> None:
    task = await blocked(store, outside)
    outside.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
    with pytest.raises(StoreError, match=r"the connection to the database .* was lost") as caught:
        await task
    assert PASSWORD not in str(caught.value)
    outside.execute("ROLLBACK")
    assert await store.tickets() == []
    await works(store)


async def test_a_statement_takes_too_long(postgresql_url: str, outside: Outside) -> None:
    name = postgresql_url.partition("@/")[2].partition("?")[0]
    outside.execute(f"ALTER DATABASE {name} SET statement_timeout = '1s'")
    async with Store.open(with_password(postgresql_url)) as store:
        task = await blocked(store, outside)
        with pytest.raises(StoreError, match=r"ended a statement that took too long \(statement_timeout\)"):
            await task
        outside.execute("ROLLBACK")
        await works(store)


async def test_a_lock_that_is_held_for_too_long(postgresql_url: str, outside: Outside) -> None:
    """It is waited for until the busy timeout, not that long again and again."""
    async with Store.open(with_password(postgresql_url), busy_timeout_seconds=0.1) as store:
        await works(store)
        outside.execute("BEGIN")
        outside.execute("LOCK TABLE tickets IN EXCLUSIVE MODE")
        with pytest.raises(Locked, match=r"is busy: other transactions have come between for 0\.1 s"):
            await store.add_ticket(Ticket(id="t", title="t", state="draft"))
        assert store.use()["write"]["repeated"] < 10
        assert len(await store.tickets()) == 1
        outside.execute("ROLLBACK")
        await works(store)


async def test_others_that_come_between_always(postgresql: PostgresBackend, postgresql_url: str) -> None:
    """As one program does that adds tickets all the time, in transactions that are serializable too."""
    thread = ConnectionThread(Database(postgresql_url, busy_timeout_seconds=600.0), write=True)
    got_in = list[bool]()

    def count(tx: Tx) -> int:
        [row] = tx.all(Sql("SELECT count(*) AS tickets FROM tickets"))
        with contextlib.closing(postgresql.outside(postgresql_url)) as other:
            other.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
            other.execute("SET LOCAL lock_timeout = '1s'")
            other.execute("SELECT count(*) FROM tickets")
            try:
                other.execute("INSERT INTO tickets (title) VALUES ('theirs')")
                other.execute("COMMIT")
                got_in.append(True)
            except psycopg.errors.LockNotAvailable:
                got_in.append(False)
        tx.run(Sql("INSERT INTO tickets (title) VALUES ('ours')"))
        return int(row.tickets)

    try:
        assert await thread.call(count) == len(got_in) - 1 == 8
    finally:
        await thread.close()
    assert got_in == [True] * 8 + [False]


async def test_a_database_that_swarm_can_not_use(own_server: postgres_here.Server, hurt: Store, tmp_path: Path) -> None:
    with psycopg.connect(own_server.url(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    for url, error, sentence in (
        (own_server.url("latin"), StoreError, "has the encoding LATIN1; make it anew with ENCODING 'UTF8'"),
        (own_server.url("none"), StoreError, "can't reach the database"),
        (own_server.url(user="nobody"), StoreError, "can't reach the database"),
        (f"postgresql://postgres@/postgres?host={tmp_path}", StoreError, "can't reach the database"),
        (f"{own_server.url()}&hots=x", UsageError, "bad database URL"),
    ):
        with pytest.raises(error) as caught:
            async with Store.open(with_password(url)):
                pass
        assert sentence in str(caught.value) and PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://127.0.0.1:1/x?user=swarm&password=gehe%40im", r"x\?user=swarm&password=\*\*\* \(.* refused"),
        (
            "postgresql://swarm@127.0.0.1:1/x?sslpassword=geheim&sslmode=disable",
            r"sslpassword=\*\*\*&sslmode",
        ),
        ("postgresql://swarm:gehe%zz@127.0.0.1:1/x", "a '%' in its user or password is written %25"),
        ("postgresql://swarm:x@geheim@127.0.0.1:1/x", "an '@' %40"),
        ("postgresql://swarm:geheim/x@127.0.0.1:1/x", "a '/' %2F"),
        ("postgresql://swarm:geheim x@127.0.0.1:1/x", "a space %20"),
        ("postgresql://swarm:geheim@127.0.0.1:1/x?hots=x", 'invalid URI query parameter: "hots"'),
        ("password=geheim host=127.0.0.1 dbname=x", "bad database URL 'password=\\*\\*\\* host=127"),
        ("postgresql://127.0.0.1:1/x?user=swarm&PASSWORD=geheim", 'invalid URI query parameter: "PASSWORD"'),
        ("postgresql://127.0.0.1:1/x?pass%77ord=geheim&hots=x", 'invalid URI query parameter: "hots"'),
        (r"host=127.0.0.1 PASSWORD=gehe\ im dbname=x", r"bad database URL .*PASSWORD=\*\*\* dbname"),
        ("host=127.0.0.1 password=gehe heim dbname=x", r"bad database URL .*password=\*\*\*"),
        ("host=127.0.0.1 password='geheim dbname=x", r"bad database URL .*password=\*\*\*"),
        ("host=127.0.0.1 password = 'gehe im\\'heim' dbname=x", "bad database URL .*password = \\*\\*\\* dbname"),
    ],
)
async def test_no_sentence_has_a_part_of_the_password(url: str, sentence: str) -> None:
    with pytest.raises((UsageError, StoreError), match=sentence) as caught:
        async with Store.open(url):
            pass
    assert "heim" not in str(caught.value) and "gehe" not in str(caught.value)


async def test_the_doctor_shows_no_password(store: Store, postgresql_url: str, tmp_path: Path) -> None:
    settings = config.load(home=tmp_path, database_url=with_password(postgresql_url))
    said = str(await doctor_wiring._database(settings))
    assert "can be opened" in said and PASSWORD not in said


async def test_what_is_wrong_with_each_address_of_a_host_is_said_once() -> None:
    """Nothing listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(StoreError) as caught:
        async with Store.open(f"postgresql://swarm@127.0.0.1:{port},127.0.0.1:{port}/swarm"):
            pass
    said = str(caught.value)
    assert said.count(f"port {port} failed: Connection refused") == 1
    assert "Multiple" not in said and "hostaddr" not in said


def test_without_its_driver() -> None:
    """The command that fetches it is for this installation."""
    code = """
import sys
sys.modules["psycopg"] = None
from swarm.store.sql.dialects import dialect_of
dialect_of("postgresql")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"{sys.executable} -m pip install 'psycopg[binary]" in done.stderr
