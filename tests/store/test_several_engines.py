"""Several engines, each with connections of its own, use one database at once: nothing is claimed twice, nothing lost;
budgets, schedules, joins and dependencies are exact."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from swarm.admin.prove import judge
from swarm.errors import LeaseLost
from swarm.ledger import Bill, Granted, Order, Refused, Spend
from swarm.model import Cancelled, Claim, Failed, FailureReason, Interrupted, Outcome, Succeeded
from swarm.store.store import Store
from swarm.triggers.schedules import Scheduler
from tests.cel.local import Local
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import ECHO, RETRY, Outside, account_of, claim_one, insert, left_overs
from tests.store.flows import register

pytestmark = pytest.mark.slow  # tries very many cases

ENGINES = 4
LEASE_SECONDS = 1000.0  # far more real time than the test takes
ENDED = ("done", "failed", "cancelled")
# Steps by name, with those that each needs: for `first_success` one of them.
FLOWS = {
    "diamond": """
steps:
  - {id: top, agent: echo}
  - {id: left, agent: echo, needs: top}
  - {id: right, agent: echo, needs: top}
  - {id: bottom, agent: echo, needs: [left, right]}
""",
    "each": """
steps:
  - {id: all, agent: echo, for_each: "${[1, 2, 3, 4, 5, 6]}", max_parallel: 3}
  - {id: after, agent: echo, needs: all}
""",
    "race": """
steps:
  - {id: slow, agent: echo}
  - {id: quick, agent: echo}
  - {id: after, agent: echo, needs: [slow, quick], join: first_success}
""",
    "nested": """
steps:
  - {id: both, for_each: "${[1, 2]}", workflow: {steps: [{id: one, agent: echo}, {id: two, agent: echo, needs: one}]}}
  - {id: last, agent: echo, needs: both}
""",
}
NEEDS = {
    ("diamond", "left"): {"top"},
    ("diamond", "right"): {"top"},
    ("diamond", "bottom"): {"left", "right"},
    ("each", "after"): {f"all[{n}]" for n in range(6)},
    ("nested", "both[0]/two"): {"both[0]/one"},
    ("nested", "both[1]/two"): {"both[1]/one"},
    ("nested", "last"): {"both[0]/two", "both[1]/two"},
}


@pytest.fixture
async def engines(url: str) -> AsyncIterator[list[Store]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Store.open(url)) for _ in range(ENGINES)]


@dataclass
class World:
    """What all engines together have seen."""

    random: random.Random
    running: dict[str, Claim] = field(default_factory=dict)  # by step execution
    succeeded: set[tuple[str, str]] = field(default_factory=set)  # (ticket, step)
    attempts: Counter[tuple[str, int]] = field(default_factory=Counter)  # of a step execution
    depends: dict[str, str] = field(default_factory=dict)
    claims: int = 0

    def claimed(self, claim: Claim) -> None:
        step, ticket = claim.step_execution_id, claim.ticket.id
        self.claims += 1
        self.attempts[step, claim.attempt_number] += 1
        assert step not in self.running, f"{claim.step_id} of {ticket} was claimed while it runs"
        assert (ticket, claim.step_id) not in self.succeeded, f"{claim.step_id} of {ticket} succeeded before"
        self.running[step] = claim
        if (before := self.depends.get(ticket)) is not None:
            assert (before, "main") in self.succeeded, f"{ticket} began before {before} was done"
        needs = NEEDS.get((ticket.partition("-")[0], claim.step_id), set())
        assert {(ticket, need) for need in needs} <= self.succeeded, f"{claim.step_id} of {ticket} began too early"

    def cancelled(self, claim: Claim) -> None:
        """Another step of a race was quicker."""
        assert claim.ticket.id.startswith("race") and claim.step_id != "after"
        self.running.pop(claim.step_execution_id, None)

    def outcome(self, claim: Claim) -> Outcome:
        """And note it: another engine may see it before this one hears of it."""
        del self.running[claim.step_execution_id]
        again = claim.agent.id == RETRY.id or claim.in_workflow
        if again and claim.attempt_number < 3 and self.random.random() < 0.2:
            return Interrupted()
        self.succeeded.add((claim.ticket.id, claim.step_id))
        return Succeeded(outputs="{}")


async def engine(store: Store, world: World, number: int, outside: Outside) -> None:
    held: list[Claim] = []
    while True:
        found = await store.claim(f"engine {number}", limit=world.random.randint(1, 4), lease_seconds=LEASE_SECONDS)
        for claim in found:
            world.claimed(claim)
        held += found
        while await store.decided():
            pass
        if held:
            lost = await store.renew([claim.attempt_id for claim in held], lease_seconds=LEASE_SECONDS)
            assert not lost.lost, "an engine lost what it holds"
            for claim in [claim for claim in held if claim.attempt_id in lost.cancelled]:
                world.cancelled(claim)
                held.remove(claim)
            world.random.shuffle(held)
            now, held = held[:3], held[3:]
            behind = list[Coroutine[Any, Any, list[Claim]]]()

            def claim_behind() -> None:
                """In the transaction of the end, where there are shared ones."""
                if world.random.random() < 0.5:
                    behind.append(store.claim(f"engine {number}", limit=2, lease_seconds=LEASE_SECONDS))  # noqa: B023

            await asyncio.gather(*(finish(store, world, claim, claim_behind) for claim in now))
            for claims in behind:
                for claim in await claims:
                    world.claimed(claim)
                    held.append(claim)
        elif not found:
            if outside.execute("SELECT count(*) FROM tickets WHERE state NOT IN ('done', 'failed', 'cancelled')") == [
                (0,)
            ]:
                return
            await asyncio.sleep(0.01)


async def finish(store: Store, world: World, claim: Claim, queued: Callable[[], None] = lambda: None) -> None:
    try:
        await store.finish(claim.attempt_id, world.outcome(claim), timings={}, vm_time_ms=1.0, queued=queued)
    except LeaseLost:
        world.cancelled(claim)


@pytest.mark.parametrize("seed", range(2))
async def test_everything_runs_once(engines: list[Store], outside: Outside, seed: int) -> None:
    world = World(random.Random(seed))
    flows = {name: await register(engines[0], text, name=name) for name, text in FLOWS.items()}

    async def insert_all() -> None:
        for number in range(12):
            insert(outside, f"plain-{number}", agent_id=RETRY.id if number % 2 else ECHO.id, priority=number % 3)
            name = [*FLOWS][number % len(FLOWS)]
            world.depends[f"late-{number}"] = f"plain-{number}"
            outside.execute(
                "INSERT INTO ticket_dependencies (ticket_id, depends_on) VALUES (?, ?)",
                (f"late-{number}", f"plain-{number}"),
            )
            insert(outside, f"late-{number}", priority=5)
            flow = {"agent_id": None, "execution_mode": "workflow", "workflow_id": flows[name]}
            insert(outside, f"{name}-{number}", **flow)
            await asyncio.sleep(0)

    async with asyncio.timeout(300):
        await insert_all()
        await asyncio.gather(*(engine(store, world, number, outside) for number, store in enumerate(engines)))
    assert not world.running
    assert set(world.attempts.values()) == {1}, "two attempts with one number"
    assert set(outside.execute("SELECT state FROM tickets")) == {("done",)}
    twice = "SELECT 1 FROM attempts WHERE outcome = 'succeeded' GROUP BY step_execution_id HAVING count(*) > 1"
    assert outside.execute(twice) == []
    assert outside.execute("SELECT count(*) FROM attempts") == [(world.claims,)]
    ended = "SELECT count(*) FROM events WHERE kind = 'transition' AND step_id IS NULL AND data LIKE '%\"done\"%'"
    assert outside.execute(ended) == outside.execute("SELECT count(*) FROM tickets")
    report = await engines[0].audit(judge)
    assert report.kept, report.violations
    assert left_overs(outside) == 0


async def test_ends_of_all_kinds_at_once(engines: list[Store], outside: Outside) -> None:
    """An attempt ends, is cancelled by a person, by another program, or loses its lease, at the same moment: one of
    these counts, and everybody is told the same."""
    for number in range(24):
        insert(outside, f"t{number}")
    claims = [claim for store in engines for claim in await store.claim("worker", limit=6, lease_seconds=LEASE_SECONDS)]
    assert len(claims) == 24
    outcomes: tuple[Outcome, ...] = (
        Succeeded(outputs="{}"),
        Failed(reason=FailureReason.AGENT_FAILED, message="it broke"),
        Cancelled(),
    )

    async def end(store: Store, claim: Claim, outcome: Outcome) -> bool:
        try:
            await store.finish(claim.attempt_id, outcome, timings={}, vm_time_ms=1.0)
        except LeaseLost:
            return False
        return True

    ends = await asyncio.gather(
        *(
            asyncio.gather(*(end(store, claim, one) for store, one in zip(engines, outcomes, strict=False)))
            for claim in claims
        )
    )
    assert all(list(told).count(True) == 1 for told in ends)
    states = dict(outside.execute("SELECT id, state FROM tickets"))
    for claim, told in zip(claims, ends, strict=True):
        assert states[claim.ticket.id] == ENDED[list(told).index(True)]
    report = await engines[0].audit(judge)
    assert report.kept, report.violations


async def test_no_budget_is_overdrawn(engines: list[Store], outside: Outside) -> None:
    insert(outside, "t", budget_tokens=1000)
    claim = await claim_one(engines[0])
    account = account_of(claim)

    async def call(store: Store, number: int) -> int:
        """The tokens of one call; 0 if it was refused."""
        spend = Spend(tokens=50, usd=0.0)
        while True:
            id = f"call-{number}"
            order = Order(id=id, account=account, upstream="u", model="m", most=spend, least=spend)
            answer = await store.reserve(order)
            if isinstance(answer, Refused):
                return 0
            if isinstance(answer, Granted):
                break
            await asyncio.sleep(0.01)  # others hold the rest
        bill = Bill(
            id=id,
            account=account,
            upstream="u",
            model="m",
            status=200,
            counts={"input": 30, "output": 20},
            cost_usd=0.0,
            latency_ms=1.0,
        )
        await asyncio.gather(store.book(bill), engines[0].book(bill))  # told twice, it counts once
        return bill.tokens

    async with asyncio.timeout(300):
        spent = await asyncio.gather(*(call(engines[number % ENGINES], number) for number in range(40)))
    assert sum(spent) == 1000
    assert outside.execute("SELECT sum(tokens) FROM model_calls WHERE status IS NOT NULL") == [(1000,)]
    assert outside.execute("SELECT api_tokens_used FROM attempts") == [(1000,)]
    assert [run.total_api_tokens for run in await engines[0].runs("t")] == [1000]


async def test_a_schedule_fires_once(engines: list[Store], outside: Outside) -> None:
    await register(engines[0], "schedule: [{cron: '* * * * *', missed: all}]\nsteps: [{id: one, agent: echo}]")
    await engines[0].due_schedules()

    async def fire(store: Store) -> None:
        scheduler = Scheduler(store=store, evaluator=Local())
        while await scheduler.fire() == 0.0:
            pass

    async with asyncio.timeout(300):
        for _ in range(5):
            await engines[0].shift_clock(60_000)
            await asyncio.gather(*(fire(store) for store in engines))
    found = [data for (data,) in outside.execute("SELECT trigger_data FROM tickets")]
    assert len(found) == len(set(found)) and len(found) in (5, 6)  # a minute may have begun meanwhile


@pytest.mark.needs("postgres")
@pytest.mark.parametrize("what", ["renew", "finish", "cancel"])
async def test_whoever_locks_a_ticket_and_its_attempt_begins_with_the_ticket(postgresql_url: str, what: str) -> None:
    """In two orders, two would wait for each other until PostgreSQL ends one, a second later."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.open(postgresql_url))
        other = await stack.enter_async_context(await psycopg.AsyncConnection.connect(postgresql_url))
        await other.execute("INSERT INTO tickets (id, state, agent_id) VALUES ('t', 'ready', %s)", (ECHO.id,))
        await other.commit()
        claim = await claim_one(store)
        await other.execute("SELECT id FROM tickets FOR NO KEY UPDATE")
        work: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "renew": lambda: store.renew([claim.attempt_id], lease_seconds=LEASE_SECONDS),
            "finish": lambda: store.finish(claim.attempt_id, Succeeded(outputs="1"), timings={}, vm_time_ms=1.0),
            "cancel": lambda: store.cancel("t", by="ann"),
        }
        waiting = asyncio.create_task(work[what]())
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await (await other.execute("SELECT FROM pg_locks WHERE NOT granted")).fetchall():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await (await other.execute("SELECT id FROM attempts FOR NO KEY UPDATE NOWAIT")).fetchall()
        await other.commit()
        await waiting


async def test_upkeep_is_left_to_the_engine_that_does_it_now(postgresql_url: str) -> None:
    lock = "SELECT pg_advisory_xact_lock(hashtext('swarm upkeep'), hashtext('public'))"
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.open(postgresql_url))
        other = await stack.enter_async_context(await psycopg.AsyncConnection.connect(postgresql_url))
        outside = await stack.enter_async_context(
            await psycopg.AsyncConnection.connect(postgresql_url, autocommit=True)
        )
        values = "('stuck', 'x', 'in_progress', %s), ('good', 'x', 'ready', %s)"
        await outside.execute(f"INSERT INTO tickets (id, title, state, agent_id) VALUES {values}", (ECHO.id, ECHO.id))
        await other.execute(lock)
        assert (await claim_one(store)).ticket.id == "good"
        assert await store.claim("worker", lease_seconds=LEASE_SECONDS) == []
        assert (await store.ticket("stuck")).state == "in_progress"
        await other.commit()
        await store.claim("worker", lease_seconds=LEASE_SECONDS)
        assert (await store.ticket("stuck")).state == "failed"
