"""Hosts: which machine is which, what one that is drained or removed leaves to others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.base.host import ID_FILE, host_id, make_host_id
from swarm.errors import Conflict, HostError, NotFound, StoreError
from swarm.model import Sandbox, Snapshot, Succeeded
from swarm.store.hosts import Machine
from swarm.store.store import Store
from tests.store.databases import Outside, claimed, insert

ONE = Machine(
    id="6f1a6a52-0000-4000-8000-000000000001", name="node", machine_id="m", boot_id="b1", labels={"zone": "a"},
    capacity={"slots": 2}, versions={"swarm": "0"},
)  # fmt: skip
SILENT = 20_000  # ms, longer than an engine that lives is silent


async def shift(store: Store, ms: int = SILENT) -> None:
    await store.shift_clock(ms)


async def beat(store: Store, host: str, worker: str = "w") -> None:
    await store.heartbeat(worker, host=host, pid=1, info={})


async def test_the_same_machine_after_a_boot_is_the_next_generation(store: Store) -> None:
    assert (await store.register_host(ONE)).name == "node" == await store.this_host()
    assert (await store.register_host(ONE)).name == "node"
    assert (await store.host("node")).generation == 1
    booted = replace(ONE, name="renamed", boot_id="b2", capacity={"slots": 4})
    assert (await store.register_host(booted)).name == "node"  # rows of what lies on its disk say so
    (row,) = await store.hosts()
    assert (row.id, row.generation, row.capacity, row.labels) == (ONE.id, 2, {"slots": 4}, {"zone": "a"})


async def test_a_clone_is_refused_while_the_other_lives(store: Store, url: str) -> None:
    await store.register_host(ONE)
    await beat(store, "node")
    async with Store.open(url) as other:
        starting = asyncio.create_task(other.register_host(replace(ONE, boot_id="b2")))
        while not starting.done():
            await beat(store, "node")
            await asyncio.sleep(0.05)
        with pytest.raises(Conflict, match="cloned, remove the file host-id"):
            await starting
    assert (await store.host("node")).generation == 1


async def test_who_was_silent_learns_that_a_clone_has_its_id(store: Store, url: str) -> None:
    await store.register_host(ONE)
    await beat(store, "node")
    await shift(store)
    async with Store.open(url) as other:
        await other.register_host(replace(ONE, boot_id="b2"))
    assert (await store.heartbeat("w", host="node", pid=1, info={})).other


async def test_a_machine_that_boots_quickly_waits_until_the_former_boot_is_silent(store: Store) -> None:
    await store.register_host(ONE)
    await beat(store, "node")
    starting = asyncio.create_task(store.register_host(replace(ONE, boot_id="b2")))
    await asyncio.sleep(0)
    await shift(store)
    assert (await starting).name == "node" and (await store.host("node")).generation == 2


async def test_machines_with_one_name_are_two_hosts(store: Store, url: str) -> None:
    await store.register_host(ONE)
    await beat(store, "node")
    twin = replace(ONE, id="aaaaaaaa-0000-4000-8000-000000000002", boot_id="b9")
    async with Store.open(url) as other:
        assert (await other.register_host(twin)).name == "node-aaaaaaaa" == await other.this_host()
    async with Store.open(url, host_id=twin.id) as again:
        assert await again.this_host() == "node-aaaaaaaa"
    assert (await store.host("aaaa")).name == "node-aaaaaaaa"
    for wrong in ("", "nothing"):
        with pytest.raises(NotFound):
            await store.host(wrong)


async def test_a_machine_that_lost_its_state_directory_is_still_the_same(store: Store) -> None:
    """Its paused sandboxes lie in its home."""
    await store.register_host(ONE)
    await beat(store, "node")
    await shift(store)
    await store.register_host(replace(ONE, id="bbbbbbbb-0000-4000-8000-000000000003"))
    (row,) = await store.hosts()
    assert (row.name, row.id[:4]) == ("node", "bbbb")
    await store.register_host(replace(ONE, id="cccccccc-0000-4000-8000-000000000004", machine_id="another"))
    assert [one.name for one in await store.hosts()] == ["node", "node-cccccccc"]


async def test_a_host_that_was_removed_while_it_lives_comes_back(store: Store) -> None:
    await store.register_host(ONE)
    await beat(store, "node")
    with pytest.raises(Conflict, match="alive"):
        await store.remove_host("node", by="p")
    await store.remove_host("node", by="p", force=True)
    assert await store.hosts() == [] and await store.workers() == []
    await beat(store, "node")
    assert [one.name for one in await store.hosts()] == ["node"]


async def test_drained_until_somebody_ends_it(store: Store) -> None:
    await store.register_host(ONE)
    await store.drain_host("node", by="p")
    state = await store.heartbeat("w", host="node", pid=1, info={})
    assert state.draining and state.put_back_seconds is None
    await store.drain_host("node", by="q", within_seconds=10)
    state = await store.heartbeat("w", host="node", pid=1, info={})
    assert state.put_back_seconds is not None and 0 < state.put_back_seconds <= 10
    assert (await store.register_host(ONE)).draining, "a new engine takes nothing either"
    row = await store.host("node")
    assert (row.drained_by, row.draining) == ("q", True) and row.drained_at
    row = await store.undrain_host("node", by="p")
    assert (row.drained_by, row.draining, row.put_back_seconds) == (None, False, None)
    assert not (await store.heartbeat("w", host="node", pid=1, info={})).draining


async def test_what_a_removed_host_held_goes_to_others(store: Store, outside: Outside) -> None:
    await store.register_host(ONE)
    await beat(store, "node")
    insert(outside, "t")
    await claimed(store, "w", ticket_id="t", seconds=3600)
    await store.add_snapshot(Snapshot(id="n", kind="named", host="node", sandbox_id="s"))
    outside.execute("INSERT INTO sandboxes (id, state, host) VALUES ('s', 'paused', 'node')")
    await shift(store)
    gone, held = await store.remove_host("node", by="p")
    assert gone.name == "node"
    assert str(held) == "1 running step, 1 paused sandbox and 1 snapshot"
    assert [claim.ticket.id for claim in await claimed(store, "next", limit=9)] == ["t"]
    sandbox = await store.sandbox("s")
    assert sandbox.state == "lost" and "the host 'node', which was removed; it has no" in str(sandbox.error)
    assert await store.snapshot_ids("node") == set()


async def test_rows_of_others_are_shown(store: Store, outside: Outside) -> None:
    outside.execute(
        "INSERT INTO hosts (id, name, labels, capacity) VALUES ('x', 'odd', '[]', '{')",
    )
    row = await store.host("odd")
    assert (row.labels, row.capacity, row.draining) == ({}, {}, False) and row.seen_ms_ago > SILENT


async def test_after_a_migration_by_a_newer_version_nothing_more_is_claimed(store: Store, outside: Outside) -> None:
    """What this one runs is renewed and ends as ever: a newer version only adds to the tables."""
    insert(outside, "t")
    insert(outside, "u")
    (claim,) = await claimed(store, "w", ticket_id="t")
    sandbox = await store.add_sandbox(Sandbox(id="", state="starting"), by="p")
    assert await store.hosts() == []  # it has all its connections
    outside.execute("ALTER TABLE tickets ADD COLUMN later TEXT")
    outside.execute("UPDATE alembic_version SET version_num = 'v9'")
    with pytest.raises(StoreError, match="was brought to v9 while this Swarm runs"):
        await claimed(store, "w")
    with pytest.raises(StoreError, match="was brought to v9 while this Swarm runs"):
        await store.claim_sandboxes("w", "node", lease_seconds=60, limit=1)
    renewal = await store.renew([claim.attempt_id], lease_seconds=60)
    assert not renewal.lost
    await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0.0)
    assert [(await store.ticket(one)).state for one in ("t", "u")] == ["done", "ready"]
    assert (await store.sandbox(sandbox.id)).state == "starting"


def test_the_id_stays_with_the_machine(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert host_id(state) is None
    made = make_host_id(state)
    assert make_host_id(state) == made == host_id(state)
    assert [one.name for one in state.iterdir()] == [ID_FILE]
    (state / ID_FILE).write_text("")
    with pytest.raises(HostError, match="remove it"):
        make_host_id(state)
