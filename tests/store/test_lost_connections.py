"""The connection to PostgreSQL breaks at a COMMIT: nobody knows whether it counted. What is
tried again then happens once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest

from swarm.admin.prove import judge
from swarm.errors import Conflict, LeaseLost, StoreError
from swarm.ledger import Bill, Order, Spend
from swarm.model import Event, Failed, FailureReason, Succeeded, Ticket
from swarm.store.claims.finish import AppendRequest
from swarm.store.store import Store
from swarm.triggers.schedules import Scheduler
from tests.cel.local import Local
from tests.store.databases import (
    ECHO,
    LEASE,
    RETRY,
    Outside,
    PostgresBackend,
    account_of,
    claim_one,
    claimed,
    insert,
    left_overs,
)
from tests.store.flows import register

pytestmark = [pytest.mark.needs("postgres"), pytest.mark.slow]  # starts a server


class Proxy:
    """Before the server's socket. Cuts the connection at the next COMMIT of what may write: before the server gets it,
    or after its answer, which the client never hears."""

    def __init__(self, directory: Path, target: Path) -> None:
        self.file, self._target = directory / target.name, target
        self.cut: str | None = None
        self.cuts = 0
        self._tasks = set[asyncio.Task[None]]()

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, directory: Path, target: Path) -> AsyncIterator[Proxy]:
        proxy = cls(directory, target)
        server = await asyncio.start_unix_server(proxy._accept, proxy.file)
        try:
            yield proxy
        finally:
            server.close()
            for task in proxy._tasks:
                task.cancel()
            await asyncio.gather(*proxy._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writes = False
        there, back = await asyncio.open_unix_connection(self._target)
        answers = asyncio.create_task(self._answers(there, writer))
        try:
            while data := await reader.read(1 << 16):
                if b"BEGIN " in data:
                    writes = b"READ ONLY" not in data
                if b"COMMIT\0" in data and writes and self.cut is not None:
                    self.cuts += 1
                    how, self.cut = self.cut, None
                    answers.cancel()
                    await asyncio.gather(answers, return_exceptions=True)
                    if how == "after":
                        while not data.endswith(b"S\0\0\0\4"):  # Sync: before that it answers nothing
                            data += (more := await reader.read(1 << 16))
                            assert more
                        back.write(data)
                        await back.drain()
                        answer = b""
                        while not answer.endswith(b"Z\0\0\0\5I"):  # ready for the next query, in no transaction
                            answer += (more := await there.read(1 << 16))
                            assert more
                    break
                back.write(data)
                await back.drain()
        finally:
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)
            back.close()
            writer.close()
            self._tasks.discard(task)

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.fixture
def outside(postgresql: PostgresBackend, postgresql_url: str) -> Iterator[Outside]:
    outside = postgresql.outside(postgresql_url)
    yield outside
    outside.close()


@pytest.fixture
async def proxy(postgresql_url: str) -> AsyncIterator[Proxy]:
    [host] = parse_qs(urlsplit(postgresql_url).query)["host"]
    directory = Path(host) / f"proxy-{os.getpid()}"
    directory.mkdir()
    async with Proxy.running(directory, Path(host) / ".s.PGSQL.5432") as proxy:
        yield proxy
    shutil.rmtree(directory)


@pytest.fixture
async def store(postgresql_url: str, proxy: Proxy) -> AsyncIterator[Store]:
    async with Store.open(f"{postgresql_url.partition('?')[0]}?host={proxy.file.parent}") as store:
        yield store


@pytest.fixture
async def ready(store: Store) -> Store:
    """It has checked the tables."""
    await store.shift_clock(0)
    return store


async def test_while_the_tables_are_checked(proxy: Proxy, store: Store, outside: Outside) -> None:
    insert(outside, "t")
    proxy.cut = "before"
    with pytest.raises(StoreError):
        await claimed(store)
    assert len(await claimed(store)) == 1


async def twice(proxy: Proxy, cut: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """The result, or the refusal, of the second try."""
    proxy.cut = cut
    with pytest.raises(StoreError, match=r"can't reach the database|connection to the database .* was lost"):
        await work()
    assert proxy.cuts == 1
    try:
        return await work()
    except (Conflict, LeaseLost) as error:
        return error


both = pytest.mark.parametrize("cut", ["before", "after"])


async def proved(store: Store, outside: Outside) -> None:
    report = await store.audit(judge)
    assert report.kept, report.violations
    assert left_overs(outside) == 0


@both
async def test_a_claim(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    insert(outside, "t")
    found = await twice(proxy, cut, lambda: claimed(ready))
    if cut == "after":  # nobody runs it, until its lease ends
        assert found == [] and (await ready.ticket("t")).state == "in_progress"
        for _ in range(2):  # the end of the lease, then of the pause before the next try
            await ready.shift_clock(round(LEASE * 2000))
            found = found or await claimed(ready)
    [claim] = found
    assert claim.attempt_number == (1 if cut == "before" else 2)
    await ready.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
    assert outside.execute("SELECT count(*) FROM attempts WHERE outcome = 'succeeded'") == [(1,)]
    await proved(ready, outside)


@both
async def test_an_end(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    insert(outside, "t", agent_id=RETRY.id)
    claim = await claim_one(ready)
    told = await twice(
        proxy, cut, lambda: ready.finish(claim.attempt_id, Succeeded(outputs="1"), timings={}, vm_time_ms=0)
    )
    assert told is None if cut == "before" else isinstance(told, LeaseLost)
    assert (await ready.ticket("t")).outputs == "1" and await claimed(ready) == []
    ends = [e for e in await ready.events("t") if e.kind == "transition" and e.data.get("to") == "done"]
    assert len(ends) == 1
    await proved(ready, outside)


@both
async def test_the_end_of_a_step(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    """What follows it begins once."""
    flow = await register(ready, "steps: [{id: one, agent: echo}, {id: two, agent: echo, needs: one}]")
    insert(outside, "t", agent_id=None, execution_mode="workflow", workflow_id=flow)
    while not (found := await claimed(ready)):
        await ready.decided()
    await twice(proxy, cut, lambda: ready.finish(found[0].attempt_id, Succeeded(outputs="1"), timings={}, vm_time_ms=0))
    await ready.decided()
    [claim] = await claimed(ready, limit=5)
    assert claim.step_id == "two" and await claimed(ready) == []
    await ready.finish(claim.attempt_id, Succeeded(outputs="1"), timings={}, vm_time_ms=0)
    await ready.decided()
    assert (await ready.ticket("t")).state == "done"
    await proved(ready, outside)


@both
async def test_a_renewal(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    insert(outside, "t")
    claim = await claim_one(ready)
    renewal = await twice(proxy, cut, lambda: ready.renew([claim.attempt_id], lease_seconds=LEASE))
    assert not renewal.lost and not renewal.cancelled


@both
async def test_what_an_agent_printed(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    insert(outside, "t")
    claim = await claim_one(ready)
    same = Event(ticket_id="t", attempt_id=claim.attempt_id, kind="output", data={"text": "same\n"})
    await ready.append([same])
    lines = AppendRequest(events=[same, same])
    await twice(proxy, cut, lambda: ready.append(lines))
    await ready.append(AppendRequest(events=[same]))
    assert outside.execute("SELECT count(*) FROM events WHERE kind = 'output'") == [(4,)]


async def test_what_an_agent_printed_before_a_fail_over_that_lost_it(ready: Store, outside: Outside) -> None:
    """The new primary has not given that number to a transaction yet."""
    insert(outside, "t")
    lines = AppendRequest(events=[Event(ticket_id="t", kind="output", data={})], transaction=str(1 << 62))
    await ready.append(lines)
    assert outside.execute("SELECT count(*) FROM events WHERE kind = 'output'") == [(1,)]


async def test_what_an_agent_printed_while_the_server_still_has_it(
    ready: Store, outside: Outside, postgresql_url: str
) -> None:
    """It notices late that a connection broke: nobody knows, until then."""
    insert(outside, "t")
    with psycopg.connect(postgresql_url) as other:
        number = str(other.execute("SELECT CAST(pg_current_xact_id() AS text)").fetchall()[0][0])
        lines = AppendRequest(events=[Event(ticket_id="t", kind="output", data={})], transaction=number)
        with pytest.raises(StoreError, match="still has a transaction"):
            await ready.append(lines)
        other.commit()
    await ready.append(lines)
    assert outside.execute("SELECT count(*) FROM events WHERE kind = 'output'") == [(0,)]


@both
async def test_an_end_with_what_was_printed_last(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    insert(outside, "t", agent_id=RETRY.id)
    claim = await claim_one(ready)
    last = [Event(ticket_id="t", attempt_id=claim.attempt_id, kind="output", data={"text": "last\n"})]
    failed = Failed(reason=FailureReason.AGENT_FAILED, message="no")
    tries = iter((False, True))
    told = await twice(
        proxy,
        cut,
        lambda: ready.finish(claim.attempt_id, failed, timings={}, vm_time_ms=0, events=last, again=next(tries)),
    )
    assert told is None
    assert outside.execute("SELECT count(*) FROM events WHERE kind = 'output'") == [(1,)]
    await ready.shift_clock(round(LEASE * 1000))
    assert (await claim_one(ready)).attempt_number == 2
    with pytest.raises(LeaseLost):  # it is another's now
        await ready.finish(claim.attempt_id, Succeeded(outputs="1"), timings={}, vm_time_ms=0, again=True)
    await proved(ready, outside)


@both
async def test_a_new_ticket(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    ticket = Ticket(id="t", title="t", state="ready", agent_id=ECHO.id)
    told = await twice(proxy, cut, lambda: ready.add_ticket(ticket))
    assert isinstance(told, Conflict) == (cut == "after")
    assert outside.execute("SELECT count(*) FROM tickets") == [(1,)]


@both
async def test_a_cancellation(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    insert(outside, "t")
    claim = await claim_one(ready)
    await twice(proxy, cut, lambda: ready.cancel("t", by="ann"))
    assert (await ready.renew([claim.attempt_id], lease_seconds=LEASE)).cancelled == {claim.attempt_id}
    ends = [e for e in await ready.events("t") if e.data.get("to") == "cancelled" and e.step_id is None]
    assert len(ends) == 1
    await proved(ready, outside)


@both
async def test_a_schedule(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    await register(ready, "schedule: [{cron: '0 * * * *'}]\nsteps: [{id: one, agent: echo}]")
    await ready.due_schedules()
    await ready.shift_clock(3_600_000)
    due = await ready.due_schedules()
    assert len(due.due) == 1

    async def fire() -> None:
        scheduler = Scheduler(store=ready, evaluator=Local())
        while await scheduler.fire() == 0.0:
            pass

    await twice(proxy, cut, fire)
    assert outside.execute("SELECT count(*) FROM tickets") == [(1,)]


@both
async def test_the_accounts(proxy: Proxy, ready: Store, outside: Outside, cut: str) -> None:
    insert(outside, "t", budget_tokens=100)
    of = account_of(await claim_one(ready))
    spend = Spend(tokens=60, usd=0.0)
    order = Order(id="c", account=of, upstream="u", model="m", most=spend, least=spend)
    await ready.reserve(order)
    bill = Bill(
        id="c",
        account=of,
        upstream="u",
        model="m",
        status=200,
        counts={"input": 60},
        cost_usd=0.0,
        latency_ms=1.0,
    )
    await twice(proxy, cut, lambda: ready.book(bill))
    assert outside.execute("SELECT api_tokens_used FROM attempts") == [(60,)]
    assert [run.total_api_tokens for run in await ready.runs("t")] == [60]
    assert len([e for e in await ready.events("t") if e.data.get("call") == "c"]) == 1
