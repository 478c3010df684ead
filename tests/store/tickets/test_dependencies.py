"""Tickets that depend on tickets."""

from __future__ import annotations

import asyncio

import pytest

from swarm.errors import Conflict
from swarm.model import Succeeded, Ticket, TicketState
from swarm.store.store import Store
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import ECHO, LEASE, Outside, claim_one, failed, insert


def needs(outside: Outside, **needed: str) -> None:
    """`a="b c"`: a depends on b and c."""
    for ticket, others in needed.items():
        for other in others.split():
            outside.execute("INSERT INTO ticket_dependencies VALUES (?, ?)", (ticket, other))


async def states(store: Store) -> dict[str, str]:
    return {ticket.id: ticket.state for ticket in await store.tickets()}


async def run_one(store: Store, *, well: bool = True) -> str:
    claim = await claim_one(store)
    await store.finish(claim.attempt_id, Succeeded(outputs="{}") if well else failed(), timings={}, vm_time_ms=0)
    return claim.ticket.id


async def test_order_follows_the_dependencies(store: Store, outside: Outside) -> None:
    for name in "dcba":
        insert(outside, name)
    needs(outside, d="b c", b="a", c="a")
    assert await run_one(store) == "a"
    assert {await run_one(store), await run_one(store)} == {"b", "c"}
    assert await run_one(store) == "d"
    assert set((await states(store)).values()) == {"done"}
    assert [e.data["to"] for e in await store.events("d") if e.data["of"] == "ticket"] == [
        "blocked",
        "ready",
        "in_progress",
        "done",
    ]


@pytest.mark.parametrize("ids", ["abc", "cba"])
async def test_tickets_that_need_each_other_are_removed_in_any_order(store: Store, outside: Outside, ids: str) -> None:
    for name in "abc":
        insert(outside, name)
    needs(outside, b="a", c="b")
    (claim,) = await store.claim("w", limit=9, lease_seconds=LEASE)
    assert claim.ticket.id == "a"
    await store.remove_tickets(list(ids), by="test", force=True)
    assert await states(store) == {}


@pytest.mark.parametrize("state", list(TicketState))
async def test_a_ticket_that_another_needs_is_not_removed(store: Store, outside: Outside, state: TicketState) -> None:
    insert(outside, "a", state="done")
    insert(outside, "b", state=state)
    needs(outside, b="a")
    if state in ("draft", "ready", "blocked"):
        with pytest.raises(Conflict, match="'b' depends on the ticket 'a'"):
            await store.remove_tickets(["a"], by="test")
        await store.remove_tickets(["a", "b"], by="test")
    else:
        await store.remove_tickets(["a"], by="test")


async def test_blocked_while_running(store: Store, outside: Outside) -> None:
    insert(outside, "a")
    insert(outside, "b", priority=9)
    needs(outside, b="a")
    (claim,) = await store.claim("w", limit=5, lease_seconds=LEASE)
    assert (claim.ticket.id, await states(store)) == ("a", {"a": "in_progress", "b": "blocked"})
    assert (await store.queue()).blocked == 1


async def test_failure_runs_down_the_chain(store: Store, outside: Outside) -> None:
    for name in "abcd":
        insert(outside, name)
    needs(outside, b="a", c="b")
    claims = await store.claim("w", limit=9, lease_seconds=LEASE)
    assert {c.ticket.id for c in claims} == {"a", "d"}
    a = next(c for c in claims if c.ticket.id == "a")
    await store.finish(a.attempt_id, failed(), timings={}, vm_time_ms=0)
    assert await states(store) == {"a": "failed", "b": "failed", "c": "failed", "d": "in_progress"}
    assert "depends on the ticket 'a', which failed" in ((await store.ticket("b")).error or "")
    assert "depends on the ticket 'b'" in ((await store.ticket("c")).error or "")


async def test_cancel_runs_down_too(store: Store, outside: Outside) -> None:
    for name in "ab":
        insert(outside, name)
    needs(outside, b="a")
    await store.claim("w", limit=2, lease_seconds=LEASE)
    await store.cancel("a", by="test")
    assert "was cancelled" in ((await store.ticket("b")).error or "")


@pytest.mark.parametrize("state", ["ready", "blocked"])
async def test_missing_id(store: Store, outside: Outside, state: str) -> None:
    insert(outside, "a", state=state)
    needs(outside, a="nobody")
    assert await store.claim("w", lease_seconds=LEASE) == []
    assert "depends on the ticket 'nobody', which does not exist" in ((await store.ticket("a")).error or "")


@pytest.mark.parametrize("state", ["ready", "blocked"])
@pytest.mark.parametrize("edges", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "a", "d": "a"}])
async def test_cycle(store: Store, outside: Outside, state: str, edges: dict[str, str]) -> None:
    for name in edges:
        insert(outside, name, state=state)
    needs(outside, **edges)
    assert await store.claim("w", lease_seconds=LEASE, ticket_id="a") == []
    found = await states(store)
    for name in edges:
        await store.claim("w", lease_seconds=LEASE, ticket_id=name)
    found = await states(store)
    assert set(found.values()) == {"failed"}
    assert "form a cycle: 'a' → " in ((await store.ticket("a")).error or "")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("UPDATE tickets SET state = 'done' WHERE id = 'a'", "in_progress"),
        ("UPDATE tickets SET state = 'cancelled' WHERE id = 'a'", "failed"),
        ("DELETE FROM tickets WHERE id = 'a'", "failed"),
        ("DELETE FROM ticket_dependencies", "in_progress"),
        ("INSERT INTO ticket_dependencies VALUES ('a', 'b')", "failed"),
    ],
)
async def test_changed_from_outside_while_blocked(store: Store, outside: Outside, change: str, expected: str) -> None:
    insert(outside, "a", state="draft")
    insert(outside, "b")
    needs(outside, b="a")
    assert await store.claim("w", lease_seconds=LEASE) == []
    assert await states(store) == {"a": "draft", "b": "blocked"}
    outside.execute(change)
    if "VALUES" in change:
        outside.execute("UPDATE tickets SET state = 'ready' WHERE id = 'a'")
    await store.claim("w", lease_seconds=LEASE)
    await store.claim("w", lease_seconds=LEASE)
    assert (await states(store))["b"] == expected


async def test_long_chain_is_answered_at_once(store: Store, outside: Outside) -> None:
    outside.execute("BEGIN")
    for number in range(2000):
        insert(outside, f"t{number:04}")
        outside.execute("INSERT INTO ticket_dependencies VALUES (?, ?)", (f"t{number:04}", f"t{number + 1:04}"))
    outside.execute("COMMIT")
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await store.claim("w", lease_seconds=LEASE) == []  # the last one needs a ticket that does not exist
    assert outside.execute("SELECT count(*) FROM tickets WHERE state = 'failed'") == [(2000,)]


async def test_added_with_its_dependencies(store: Store) -> None:
    await store.add_ticket(Ticket(id="a", title="a", state="ready", agent_id=ECHO.id))
    await store.add_ticket(Ticket(id="b", title="b", state="ready", agent_id=ECHO.id), depends_on=["a"])
    assert await store.depends_on("b") == ["a"]
    assert [await run_one(store), await run_one(store)] == ["a", "b"]
