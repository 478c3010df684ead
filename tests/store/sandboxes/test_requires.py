"""Sandboxes that require labels of a host start where these are, and wait elsewhere, in nobody's way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import UsageError
from swarm.model import Sandbox
from swarm.store.sandboxes.share import Share
from swarm.store.store import Store
from swarm.store.tickets.room import Room
from tests.store.claims.test_requires import TIMEOUT_MS, ZONED, ids, marks, on
from tests.store.databases import Outside
from tests.store.databases import insert as insert_ticket
from tests.store.sandboxes.test_bad_sandboxes import insert
from tests.store.sandboxes.test_holding import claim, pause_of, started


async def names(store: Store, host: str, **options: Any) -> list[str | None]:
    return [one.sandbox.name for one in await claim(store, host=host, **options)]


async def test_it_starts_on_a_host_that_has_all_of_it(store: Store, outside: Outside, url: str) -> None:
    await store.put_agent(ZONED)
    async with on(url, "one", zone="a") as one, on(url, "two", zone="a", gpu=True, rack=7) as two:
        insert(outside, name="far", agent_id="zoned", requires='{"rack": 7}')
        insert(outside, name="near", requires='{"zone": "a"}')
        assert await names(one, "one") == ["near"] and await names(one, "one") == []
        assert marks(outside, "sandboxes") == ['{"gpu":true,"rack":7,"zone":"a"}']
        found = await store.sandbox("far")
        assert found.state == "starting"
        assert str(found.error).startswith("it waits for a host with gpu=true, rack=7, zone=a; `swarm host list`")
        assert [(each.requires, each.hosts) for each in await one.elsewhere()] == [
            ("gpu=true, rack=7, zone=a", ["two"])
        ]
        due = await one.sandboxes_due("one")
        assert not due.ready and (await two.sandboxes_due("two")).ready
        assert not (await two.due()).ready, "it is no ticket"
        insert(outside, name="later")
        assert await names(two, "two") == ["far", "later"]
        assert (await store.sandbox("far")).error is None and marks(outside, "sandboxes") == []
        assert await two.elsewhere() == []


async def test_tickets_and_sandboxes_wait_side_by_side(store: Store, outside: Outside, url: str) -> None:
    await store.put_agent(ZONED)
    insert_ticket(outside, "t", agent_id="zoned")
    insert(outside, name="box", agent_id="zoned")
    async with on(url, "one") as one, on(url, "two", zone="a", gpu=True) as two:
        assert await ids(one) == [] and await names(one, "one") == []
        assert len(await one.elsewhere()) == 1
        assert await names(two, "two") == ["box"] and (await two.due()).ready
        assert await ids(two) == ["t"] and not (await two.due()).ready


async def test_it_ends_once_no_known_host_had_it_for_the_time(store: Store, outside: Outside, url: str) -> None:
    insert(outside, name="box", requires='{"zone": "b"}')
    async with on(url, "one", zone="a") as one:
        assert await names(one, "one") == []
        due = await one.sandboxes_due("one")
        assert not due.ready and due.next_ms is not None and 0 < due.next_ms <= TIMEOUT_MS
        assert (await one.due()).next_ms is None, "no claim of tickets ends it"
        await store.shift_clock(TIMEOUT_MS - 1000)
        assert await names(one, "one") == [] and (await store.sandbox("box")).state == "starting"
        await store.shift_clock(TIMEOUT_MS)
        assert (await one.sandboxes_due("one")).next_ms == 0
        assert await names(one, "one") == []
        found = await store.sandbox("box")
        assert found.state == "ended"
        assert str(found.error).startswith("it requires a host with zone=b, and for 900 s no known host has had that")
        assert await names(one, "one") == [] and outside.execute("SELECT requires FROM unmet") == []


async def test_one_that_waits_can_be_ended(store: Store, outside: Outside) -> None:
    for name in ("by want", "by hand"):
        insert(outside, id=name, requires='{"zone": "b"}')
    assert await claim(store) == [] and len(marks(outside, "sandboxes")) == 2
    await store.want_sandbox("by want", "running", by="ann")  # somebody would use it: it waits all the same
    assert await claim(store) == [] and not (await store.sandboxes_due("h")).ready
    assert (await store.want_sandbox("by want", "ended", by="ann")).state == "ended"
    outside.execute("UPDATE sandboxes SET wanted = 'ended' WHERE id = 'by hand'")
    assert (await store.sandboxes_due("h")).ready
    assert await claim(store) == [] and (await store.sandbox("by hand")).state == "ended"
    assert await store.elsewhere() == []


async def test_what_is_too_large_here_waits_for_a_known_larger_host(store: Store, outside: Outside, url: str) -> None:
    async with on(url, "one", memory_mb=1000) as one:
        room = Room(memory_mb=1000, most_memory_mb=1000)
        insert(outside, name="alone", memory_mb=4096)
        assert await names(one, "one", room=replace(room)) == []
        assert "lower its memory_mb" in str((await store.sandbox("alone")).error)  # there is no other host
        async with on(url, "two", memory_mb=8000) as two:
            insert(outside, name="box", memory_mb=4096)
            assert await names(one, "one", room=replace(room)) == []
            assert "4096 MB of memory for one VM" in str((await store.sandbox("box")).error)
            assert not (await one.sandboxes_due("one")).ready
            assert await names(two, "two", room=Room(memory_mb=8000, most_memory_mb=8000)) == ["box"]


async def test_it_is_resumed_and_forked_where_it_is(store: Store) -> None:
    """Labels count for where it starts."""
    store.labels = {"zone": "a"}
    hold = await started(store, name="box", requires='{"zone": "a"}')
    store.labels = {}
    await store.sandbox_paused(hold.hold_id, pause_of(hold))
    await store.want_sandbox("box", "running", by="ann")
    assert await names(store, "host-1") == ["box"]
    await store.add_snapshot(replace(pause_of(hold, id="n1"), kind="named"))
    with pytest.raises(UsageError, match="starts on the host of that: it can't have requires"):
        await store.add_sandbox(Sandbox(id="", state="starting", snapshot_id="n1", requires='{"zone": "a"}'), by="ann")
    await store.put_agent(ZONED)
    await store.add_sandbox(Sandbox(id="", state="starting", name="two", snapshot_id="n1", agent_id="zoned"), by="ann")
    assert await names(store, "host-2") == [] and await names(store, "host-1") == ["two"]


async def test_an_agent_that_requires_something_else_now_is_looked_at_anew(store: Store, outside: Outside) -> None:
    await store.put_agent(ZONED)
    insert(outside, name="box", agent_id="zoned")
    assert await claim(store) == [] and len(marks(outside, "sandboxes")) == 1
    await store.put_agent(replace(ZONED, requires={}), replace=True)
    assert await names(store, "h") == ["box"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ('{"zone": "b"}', "it requires zone=a and zone=b, and no host has both"),
        ("{", "can't be used"),
        ("[1]", "at most 8 labels"),
        ('{"a": 1.5}', "at most 8 labels"),
        ("[" * 5000, "can't be used"),
    ],
)
async def test_what_it_can_not_require(store: Store, outside: Outside, value: str, why: str) -> None:
    await store.put_agent(ZONED)
    insert(outside, id="b", agent_id="zoned", requires=value)
    assert await claim(store) == []
    found = await store.sandbox("b")
    assert found.state == "ended" and why in str(found.error)


async def test_those_of_a_project_with_its_share_wait_though_they_fit_here(store: Store, outside: Outside) -> None:
    def share() -> Share:
        return Share.of([], most=2, room=Room(), part=0.5)

    for number in range(2):
        insert(
            outside, name=f"p{number}", project_id="p", requires='{"zone": "a"}', created_at=f"2026-01-0{number + 1}"
        )
    insert(outside, name="other", project_id="q", requires='{"zone": "a"}', created_at="2026-09")
    assert await claim(store, share=share()) == []
    store.labels = {"zone": "a"}
    assert await names(store, "h", share=share()) == ["p0", "other"]
