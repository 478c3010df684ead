"""Tickets whose agents require labels of a host: claimed where these are, waited for elsewhere, in nobody's way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import StoreError
from swarm.store.hosts import Machine
from swarm.store.store import Store
from swarm.store.tickets import places
from swarm.store.tickets.room import Room
from tests.store.databases import ECHO, LEASE, Outside, insert
from tests.store.flows import claims, finish, ticket

ZONED = replace(ECHO, id="zoned", name="zoned", requires={"zone": "a", "gpu": True})
FLOW = "steps: [{id: a, agent: echo}, {id: b, agent: zoned, needs: a}]"
TIMEOUT_MS = 900_000


@asynccontextmanager
async def on(url: str, name: str, *, memory_mb: int | None = None, **labels: Any) -> AsyncIterator[Store]:
    """A host's own connection; it is known."""
    async with Store.open(url) as store:
        machine = Machine(
            id=name, name=name, machine_id=name, boot_id=name, labels=labels, capacity={"vm_memory_mb": memory_mb},
            versions={},
        )  # fmt: skip
        await store.register_host(machine)
        store.labels, store.vm_memory_mb = labels, memory_mb
        yield store


async def ids(store: Store, limit: int = 10, **options: Any) -> list[str]:
    return [claim.ticket.id for claim in await store.claim("w", limit=limit, lease_seconds=LEASE, **options)]


def marks(outside: Outside, table: str = "tickets") -> list[str]:
    rows = outside.execute(f"SELECT waits_for FROM {table} WHERE waits_for > '' ORDER BY waits_for")
    return [str(mark) for (mark,) in rows]


async def test_it_waits_for_a_host_that_has_all_of_it(store: Store, outside: Outside, url: str) -> None:
    await store.put_agent(ZONED)
    async with on(url, "one", zone="a") as one, on(url, "two", zone="a", gpu=True) as two:
        for number in range(3):
            insert(outside, f"far{number}", agent_id="zoned", priority=9)
            insert(outside, f"near{number}", priority=number)
        assert await ids(one, 2) == ["near2", "near1"]  # nothing that waits elsewhere is in their way
        assert marks(outside) == ['{"gpu":true,"zone":"a"}'] * 3
        assert [str(each) for each in await one.elsewhere("far0")] == [
            "it waits for a host with gpu=true, zone=a (two)"
        ]
        assert [each.hosts for each in await one.elsewhere()] == [["two"]]
        assert await ids(one) == ["near0"] and await ids(one) == []
        assert not (await one.due()).ready and (await two.due()).ready
        insert(outside, "later", agent_id="zoned")
        assert await ids(two) == ["far0", "far1", "far2", "later"]
        assert await two.elsewhere() == []


@pytest.mark.parametrize("labels", [{}, {"zone": "a"}, {"zone": "a", "gpu": "true"}, {"zone": "b", "gpu": True}])
async def test_labels_are_equal_or_not(store: Store, outside: Outside, labels: Mapping[str, Any]) -> None:
    await store.put_agent(ZONED)
    insert(outside, "t", agent_id="zoned")
    store.labels = labels
    assert await ids(store) == []
    store.labels = {"zone": "a", "gpu": True, "other": 1}
    assert await ids(store) == ["t"]


async def test_it_fails_once_no_known_host_had_it_for_the_time(store: Store, outside: Outside, url: str) -> None:
    await store.put_agent(ZONED)
    insert(outside, "t", agent_id="zoned")
    async with on(url, "one") as one:
        assert await ids(one) == []
        due = await one.due()
        assert not due.ready and due.next_ms is not None and 0 < due.next_ms <= TIMEOUT_MS
        await store.shift_clock(TIMEOUT_MS // 2)
        async with on(url, "two", zone="a", gpu=True):
            assert await ids(one) == []  # there is one: the time begins anew when it is gone
        await store.remove_host("two", by="p", force=True)
        await store.shift_clock(TIMEOUT_MS - 1000)
        assert await ids(one) == [] and (await store.ticket("t")).state == "ready"
        await store.shift_clock(TIMEOUT_MS)
        assert (await one.due()).next_ms == 0
        assert await ids(one) == []
    ticket = await store.ticket("t")
    assert ticket.state == "failed"
    assert str(ticket.error).startswith("it requires a host with gpu=true, zone=a, and for 900 s no known host")
    assert await ids(store) == [] and outside.execute("SELECT requires FROM unmet") == []


async def test_steps_of_workflows_wait_likewise(store: Store, outside: Outside, url: str) -> None:
    await store.put_agent(ZONED)
    await ticket(store, outside, FLOW)
    async with on(url, "one") as one, on(url, "two", zone="a", gpu=True) as two:
        (claim,) = await claims(one)
        await finish(one, claim)
        assert await claims(one) == []
        assert [str(each) for each in await one.elsewhere("t")] == ["b waits for a host with gpu=true, zone=a (two)"]
        assert not (await one.due()).ready
        (claim,) = await claims(two)
        assert claim.step_id == "b"
        await finish(two, claim)
        assert await claims(two) == []
    assert (await store.ticket("t")).state == "done"


async def test_what_is_too_large_here_waits_for_a_known_larger_host(store: Store, outside: Outside, url: str) -> None:
    await store.put_agent(replace(ECHO, id="large", name="large", memory_mb=4096))
    async with on(url, "one", memory_mb=1000) as one:
        room = Room(memory_mb=1000, most_memory_mb=1000)
        insert(outside, "alone", agent_id="large")
        assert await ids(one, room=replace(room)) == []
        assert "lower its memory_mb" in str((await store.ticket("alone")).error)  # as ever: there is no other
        async with on(url, "two", memory_mb=8000) as two:
            insert(outside, "t", agent_id="large")
            assert await ids(one, room=replace(room)) == []
            assert "4096 MB of memory for one VM (two)" in str((await one.elsewhere("t"))[0])
            assert await ids(two, room=Room(memory_mb=8000, most_memory_mb=8000)) == ["t"]


async def test_an_agent_that_requires_something_else_now_is_looked_at_anew(store: Store, outside: Outside) -> None:
    await store.put_agent(ZONED)
    insert(outside, "t", agent_id="zoned")
    assert await ids(store) == [] and len(marks(outside)) == 1
    await store.put_agent(replace(ZONED, requires={}), replace=True)
    assert await ids(store) == ["t"]


async def test_one_ticket_alone_is_not_claimed_where_it_does_not_fit(store: Store, outside: Outside) -> None:
    await store.put_agent(ZONED)
    insert(outside, "t", agent_id="zoned")
    for _ in range(2):
        assert await ids(store, 1, ticket_id="t") == []
    store.labels = ZONED.requires
    assert await ids(store, 1, ticket_id="t") == ["t"]


async def test_agent_step_and_ticket_require_together(store: Store, outside: Outside) -> None:
    await store.put_agent(ZONED)
    flow = "steps: [{id: a, agent: zoned, requires: {disk: ssd}}]"
    await ticket(store, outside, flow, id="both", requires='{"rack": 7}')
    insert(outside, "plain", requires='{"rack": 7}')
    insert(outside, "empty", requires="")
    assert [claim.ticket.id for claim in await claims(store)] == ["empty"]
    assert await claims(store) == []
    assert marks(outside) == ['{"rack":7}']
    assert marks(outside, "step_executions") == ['{"disk":"ssd","gpu":true,"rack":7,"zone":"a"}']
    store.labels = {"rack": 7}
    assert [claim.ticket.id for claim in await claims(store)] == ["plain"]
    store.labels = {"rack": 7, "disk": "ssd", **ZONED.requires}
    assert [claim.ticket.id for claim in await claims(store)] == ["both"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ('{"zone": "b"}', "it requires zone=a and zone=b, and no host has both"),
        ('{"gpu": 1}', "it requires gpu=true and gpu=1, and no host has both"),
        ("{", "can't be used"),
        ("[1]", "at most 8 labels"),
        ('{"a": 1.5}', "at most 8 labels"),
        ('{"a": 9999999999999999999999}', "at most 8 labels"),
        ("[" * 5000, "can't be used"),
    ],
)
async def test_what_a_ticket_can_not_require(store: Store, outside: Outside, value: str, why: str) -> None:
    await store.put_agent(ZONED)
    insert(outside, "t", agent_id="zoned", requires=value)
    assert await ids(store) == []
    found = await store.ticket("t")
    assert found.state == "failed" and why in str(found.error)


async def test_the_longest_mark_fits_into_an_index(store: Store, outside: Outside) -> None:
    def labels(first: str, count: int) -> dict[str, str]:
        return {f"{first}{number}" + "n" * 61: "v" * 63 for number in range(count)}

    await store.put_agent(replace(ZONED, requires=labels("a", 8)))
    insert(outside, "t", agent_id="zoned", requires=json.dumps(labels("b", 8)))
    assert await ids(store) == [] and len(marks(outside)[0]) > 2000
    await ticket(
        store,
        outside,
        f"steps: [{{id: a, agent: zoned, requires: {json.dumps(labels('c', 1))}}}]",
        id="more",
        requires=json.dumps(labels("b", 8)),
    )
    assert await claims(store) == []
    assert "it requires 17 labels; the limit is 16" in str((await store.ticket("more")).error)


@pytest.mark.parametrize("value", ["", "null", "[]", '{"a": null}', '{"a b": 1}', '{"a": "b c"}', '{"a": 1.5}', "{"])
async def test_rows_that_other_programs_wrote(store: Store, outside: Outside, value: str) -> None:
    await store.put_agent(ZONED)
    outside.execute("UPDATE agents SET requires = :value WHERE id = 'zoned'", {"value": value})
    with pytest.raises(StoreError, match="register it again"):
        await store.agent("zoned")
    insert(outside, "t", agent_id="zoned")
    assert await ids(store) == [] and (await store.ticket("t")).state == "failed"


@pytest.mark.parametrize("value", ["x", None, [1], {}, 1e300])
def test_no_host_has_memory_that_is_no_number(value: Any) -> None:
    """The mark in a row may be another program's, and must end no claim."""
    mark = places.mark({places.MEMORY: value})
    assert not places.has({}, 100, json.loads(mark)) and "memory" in places.words(mark)


@pytest.mark.parametrize("value", ["x", "[1]", '{"a":[1]}', '{"a": 1}', "[" * 5000, b"\xff", b'{"a":1}'], ids=repr)
async def test_a_mark_that_no_claim_has_written_keeps_nothing(store: Store, outside: Outside, value: str) -> None:
    await store.put_agent(ZONED)
    insert(outside, "far", agent_id="zoned")
    outside.execute("INSERT INTO sandboxes (id) VALUES ('box')")
    assert await ids(store) == []
    for table in ("tickets", "sandboxes"):
        if not outside.accepts(f"INSERT INTO {table} (id, state, waits_for) VALUES (?, ?, ?)", ("no", "ended", value)):
            return
    insert(outside, "near", waits_for=value)
    outside.execute("UPDATE sandboxes SET waits_for = ? WHERE id = 'box'", (value,))
    assert (await store.due()).ready and (await store.sandboxes_due("h")).ready
    assert await ids(store) == ["near"]
    assert len(await store.claim_sandboxes("w", "h", lease_seconds=LEASE, limit=9)) == 1
    assert marks(outside) == ['{"gpu":true,"zone":"a"}'] or await ids(store) == []
