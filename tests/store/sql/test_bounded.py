"""Rows whose texts are too long for an engine, or for one answer of the server, stop nothing."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import AsyncIterator, Iterator

import pytest

from swarm.errors import NotFound
from swarm.ledger import Order, Refused, Spend
from swarm.model import Ticket
from swarm.store.sandboxes.sandboxes import SandboxFilter
from swarm.store.sql.rows import TicketSummary
from swarm.store.store import Store
from tests.store.databases import ECHO, LEASE, Outside, PostgresBackend, account_of, claim_one, insert

HUGE = 300_000_000  # four such texts are more than a row may have on its way from PostgreSQL
FOUR = ("title", "assignee_id", "requires", "error")


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[Store]:
    async with Store.open(postgresql_url) as store:
        yield store


@pytest.fixture
def outside(postgresql: PostgresBackend, postgresql_url: str) -> Iterator[Outside]:
    with contextlib.closing(postgresql.outside(postgresql_url)) as outside:
        yield outside


@pytest.fixture
def huge(outside: Outside) -> Outside:
    # A row that is inserted whole may have a GB at most; one whose texts are copied as they lie there may have more.
    outside.execute("CREATE TEMP TABLE huge AS SELECT repeat('x', ?) AS text", (HUGE,))
    return outside


async def test_of_tickets(store: Store, huge: Outside) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for id, names in (("four", FOUR), ("title", FOUR[:1]), ("error", FOUR[3:]), ("late", ("description",))):
        texts = ", ".join("text" for _ in names)
        huge.execute(
            f"INSERT INTO tickets (id, state, agent_id, {', '.join(names)}) SELECT ?, 'ready', ?, {texts} FROM huge",
            (id, ECHO.id),
        )
    insert(huge, "good")
    claims = [claim for _ in range(3) for claim in await store.claim("w", limit=9, lease_seconds=LEASE)]
    assert sorted(claim.ticket.id for claim in claims) == ["error", "good"]  # Swarm writes `error` itself
    states = huge.execute("SELECT id, left(error, 60) FROM tickets WHERE state = 'failed' ORDER BY id")
    limit = "bytes, the limit is"
    assert states == [
        ("four", f"title has {HUGE:,} {limit} 65,536; put large "[:60]),
        ("late", f"description has {HUGE:,} {limit} 2,097,152; put large "[:60]),
        ("title", f"title has {HUGE:,} {limit} 65,536; put large "[:60]),
    ]
    huge.execute("INSERT INTO tickets (id, project_id) SELECT 'project', text FROM huge")
    with pytest.raises(NotFound):
        await store.visible_ticket_id("project", project_id="mine")
    await store.remove_tickets(["project"], by="ann")
    shown = await store.ticket("four")
    assert shown.title == shown.requires == f"({HUGE} bytes)"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
async def test_numbers_that_json_does_not_have_are_not_shown(store: Store, outside: Outside, number: str) -> None:
    """One row would make a whole page something that no other program reads."""
    for id, state in (("failed", "ready"), ("draft", "draft")):
        outside.execute(
            "INSERT INTO tickets (id, state, agent_id, budget_usd, timeout_seconds) VALUES (?, ?, ?, ?, ?)",
            (id, state, ECHO.id, number, number),
        )
    outside.execute("INSERT INTO sandboxes (id, state, ttl_seconds) VALUES ('s', 'ended', ?)", (number,))
    assert await store.claim("w", limit=9, lease_seconds=LEASE) == []
    tickets: list[Ticket | TicketSummary] = [*await store.tickets(), *await store.ticket_summaries()]
    assert [one.budget_usd for one in tickets] == [one.timeout_seconds for one in tickets] == [None] * 4
    assert (await store.sandbox("s")).ttl_seconds is None
    failed = await store.ticket("failed")
    assert failed.state == "failed" and f"timeout_seconds is {float(number)}; it must be" in str(failed.error)


async def test_a_budget_that_is_no_number_allows_nothing(store: Store, outside: Outside) -> None:
    insert(outside, "t", budget_usd=1.0)
    claim = await claim_one(store)
    account = account_of(claim)
    outside.execute("UPDATE tickets SET budget_usd = 'NaN'")
    one = Spend(tokens=1, usd=0.01)
    refused = await store.reserve(Order(id="c", account=account, upstream="u", model="m", most=one, least=one))
    assert isinstance(refused, Refused) and "the ticket's budget is $0" in refused.message


async def test_of_sandboxes(store: Store, huge: Outside) -> None:
    for id, names in (("four", ("project_id", "env", "labels", "error")), ("project", ("project_id",))):
        texts = ", ".join("text" for _ in names)
        huge.execute(
            f"INSERT INTO sandboxes (id, agent_id, {', '.join(names)}) SELECT ?, ?, {texts} FROM huge", (id, ECHO.id)
        )
    huge.execute("INSERT INTO sandboxes (id, agent_id) VALUES ('good', ?)", (ECHO.id,))
    claims = await store.claim_sandboxes("w", "host", lease_seconds=LEASE, limit=9)
    assert [claim.sandbox.id for claim in claims] == ["good"]
    ended = huge.execute("SELECT id, left(error, 40) FROM sandboxes WHERE state = 'ended' ORDER BY id")
    assert ended == [(id, f"project_id has {HUGE:,} bytes, the limit is"[:40]) for id in ("four", "project")]
    page = await store.sandbox_page(SandboxFilter())
    assert {one.id for one in page.sandboxes} == {"four", "good", "project"}
