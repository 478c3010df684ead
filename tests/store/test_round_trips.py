"""PostgreSQL: how many transactions, and ways to the server and back, a step of a workflow takes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from swarm.errors import ChangeRefused, NotFound, StoreError
from swarm.model import Claim, Succeeded
from swarm.store.sql.dialect import Sql, Statement
from swarm.store.sql.exchange import Exchange
from swarm.store.sql.transaction import Tx
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside, PostgresBackend, claim_one
from tests.store.flows import ticket

pytestmark = [pytest.mark.needs("postgres"), pytest.mark.slow]  # starts a server

PREPARED = Sql("SELECT count(*) AS number FROM pg_prepared_statements")
CHAIN = """
steps:
  - {id: s0, agent: echo}
  - {id: s1, agent: echo, needs: s0, inputs: {n: "${steps.s0.outputs}"}}
  - {id: s2, agent: echo, needs: s1, inputs: {n: "${steps.s1.outputs}"}}
  - {id: s3, agent: echo, needs: s2, inputs: {n: "${steps.s2.outputs}"}}
"""


@pytest.fixture
def outside(postgresql: PostgresBackend, postgresql_url: str) -> Iterator[Outside]:
    outside = postgresql.outside(postgresql_url)
    yield outside
    outside.close()


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[Store]:
    async with Store.open(postgresql_url, planning_seconds=60.0) as store:
        yield store


@contextmanager
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is sent together, and alone, by all connections."""
    counted = list[str]()
    execute, exchange = psycopg.Cursor.execute, Exchange.exchange

    def counting_execute(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        counted.append(str(query))
        return execute(self, query, *args, **options)

    def counting_exchange(self: Exchange, statements: Sequence[Statement]) -> Any:
        counted.append("; ".join(one[0] for one in statements))
        return exchange(self, statements)

    with monkeypatch.context() as patched:
        patched.setattr(psycopg.Cursor, "execute", counting_execute)
        patched.setattr(Exchange, "exchange", counting_exchange)
        yield counted


async def end_and_claim(store: Store, claim: Claim) -> list[Claim]:
    """As the dispatcher does it."""
    behind = list[Coroutine[Any, Any, list[Claim]]]()
    await store.finish(
        claim.attempt_id,
        Succeeded(outputs="{}"),
        timings={},
        vm_time_ms=1.0,
        in_workflow=True,
        queued=lambda: behind.append(store.claim("worker", lease_seconds=LEASE)),
    )
    return await behind[0]


async def test_a_steps_end_and_the_next_ones_claim(
    store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transaction."""
    await ticket(store, outside, CHAIN)
    while not (found := await store.claim("worker", lease_seconds=LEASE)):  # the first time, its workflow is prepared
        await store.decided()
    (claim,) = found
    for step in ("s1", "s2"):
        before = store.use()["write"]["transactions"]
        with ways(monkeypatch) as counted:
            (claim,) = await end_and_claim(store, claim)
        assert claim.step_id == step
        assert store.use()["write"]["transactions"] == before + 1
        assert len(counted) <= 4, counted
    assert await end_and_claim(store, claim) != []
    assert outside.execute("SELECT count(*) FROM attempts WHERE outcome = 'succeeded'") == [(3,)]


async def test_a_workflow_whose_definition_is_known_begins_in_one_transaction(
    store: Store, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ticket(store, outside, CHAIN)
    while not await store.claim("worker", lease_seconds=LEASE):
        await store.decided()
    ((workflow,),) = outside.execute("SELECT workflow_id FROM tickets")
    before = store.use()["write"]["transactions"]
    outside.execute(
        "INSERT INTO tickets (id, state, execution_mode, workflow_id) VALUES ('u', 'ready', 'workflow', ?)", (workflow,)
    )
    with ways(monkeypatch) as counted:
        claim = await claim_one(store)
    assert (claim.ticket.id, claim.step_id) == ("u", "s0")
    assert [one for one in counted if "FROM workflows" in one and "FROM tickets" not in one] == []  # not on its own
    assert store.use()["write"]["transactions"] <= before + 2  # upkeep, perhaps, is an exact one


async def test_what_is_refused_leaves_the_prepared_statements(store: Store) -> None:
    for number in range(10):  # what is asked for again is prepared
        with pytest.raises(NotFound):
            await store.cancel(f"none-{number}", "ann")
    (row,) = await store._write.call(lambda tx: tx.all(PREPARED))
    assert row.number > 0


async def test_what_was_not_committed_is_not_told_as_done(store: Store) -> None:
    def swallows(tx: Tx) -> None:
        tx.run(Sql("UPDATE clock SET offset_ms = 5"))
        with contextlib.suppress(psycopg.Error):
            tx.all(Sql("SELECT 1 / 0"))

    with pytest.raises(ChangeRefused, match="was not committed"):
        await store._write.call(swallows)
    assert (await store._write.call(lambda tx: tx.all(Sql("SELECT offset_ms FROM clock"))))[0].offset_ms == 0


async def test_columns_that_change_underneath(store: Store, outside: Outside) -> None:
    """A prepared statement whose result has another type by now fails once, with its connection."""
    outside.execute("INSERT INTO tickets (id, title, state) VALUES ('t', 'mine', 'draft')")
    for change in ("ADD COLUMN own text", "ALTER COLUMN title TYPE varchar(9000)", "ALTER COLUMN title TYPE text"):
        for _ in range(3):
            assert (await store.ticket("t")).title == "mine"
        outside.execute(f"ALTER TABLE tickets {change}")
        with contextlib.suppress(StoreError, psycopg.errors.FeatureNotSupported):
            await store.ticket("t")
        assert (await store.ticket("t")).title == "mine"
