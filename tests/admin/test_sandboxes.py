"""The way to a sandbox: whoever uses it need not know whether it starts, runs, sleeps, or is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm import config
from swarm.admin import sandboxes
from swarm.app import wiring
from swarm.channel import processes
from swarm.channel.processes import Order
from swarm.errors import ChannelError, Conflict, NotFound
from swarm.model import Sandbox
from swarm.store.hosts import Machine
from swarm.store.sandboxes.snapshots import SnapshotFilter
from swarm.store.store import Store
from tests.api import served as server
from tests.api.holding import HOST, Engine, holding
from tests.conftest import PATIENCE_SECONDS


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    settings = config.load(home=tmp_path / "home")
    settings.data_dir.mkdir(parents=True)
    await server.made(settings)
    async with wiring.store(settings) as store:
        yield store


@pytest.fixture
async def engine(store: Store, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    async with holding(store, tmp_path_factory.mktemp("e")) as engine:
        yield engine


def new(**fields: object) -> Sandbox:
    return Sandbox(id="", state="starting", **fields)  # type: ignore[arg-type]


async def said(store: Store, id: str, *argv: str) -> bytes:
    box = await sandboxes.reach(store, id, by="anna")
    return (await processes.run(box.open, Order(argv=argv))).stdout


async def test_one_that_starts_is_waited_for_and_one_that_sleeps_wakes_up(store: Store, engine: Engine) -> None:
    made = await store.add_sandbox(new(name="box"), by="anna")
    assert await said(store, made.id, "echo", "hello") == b"hello\n"
    assert (await sandboxes.pause(store, made.id, by="anna")).state == "paused"
    assert (await sandboxes.pause(store, made.id, by="anna")).state == "paused"
    assert await said(store, made.id, "echo", "again") == b"again\n"
    assert (await store.sandbox(made.id)).state == "running"
    assert (await sandboxes.end(store, made.id, by="anna")).state == "ended"
    assert (await sandboxes.end(store, made.id, by="anna")).state == "ended"
    for use in (sandboxes.reach, sandboxes.pause):
        with pytest.raises(Conflict, match="the sandbox 'box' has ended"):
            await use(store, made.id, by="anna")
    with pytest.raises(NotFound):
        await sandboxes.reach(store, "none", by="anna")


async def test_a_pause_that_somebody_asked_for_is_not_lost(store: Store, engine: Engine) -> None:
    """A use that comes while it is being paused waits, and wakes it up. A program that may have begun is told so."""
    made = await store.add_sandbox(new(), by="anna")
    await sandboxes.reach(store, made.id, by="anna")
    pausing = asyncio.create_task(sandboxes.pause(store, made.id, by="bob"))
    with contextlib.suppress(ChannelError):
        assert await said(store, made.id, "echo", "x") == b"x\n"
    await pausing
    assert await said(store, made.id, "echo", "y") == b"y\n"


async def test_no_engine(store: Store) -> None:
    made = await store.add_sandbox(new(name="box"), by="anna")
    with pytest.raises(Conflict, match="no engine runs here that could hold the sandbox 'box': `swarm-engine start`"):
        await sandboxes.reach(store, made.id, by="anna", engine_seconds=0)
    assert (await sandboxes.end(store, made.id, by="anna")).state == "ended"


async def test_an_engine_that_is_gone_or_elsewhere(store: Store) -> None:
    """One of this host that died: until its lease ends, nobody else may hold its sandboxes."""
    made = await store.add_sandbox(new(name="box"), by="anna")
    (claim,) = await store.claim_sandboxes("gone", HOST, lease_seconds=60, limit=1)
    await store.sandbox_running(claim.hold_id, 3)
    await store.heartbeat("other", host=HOST, pid=1, info={"live": "/nowhere/live.sock"})
    with pytest.raises(Conflict, match="the sandbox 'box' is still running after 0 s"):
        await sandboxes.reach(store, made.id, by="anna", wait_seconds=0)
    reaching = asyncio.create_task(sandboxes.reach(store, made.id, by="anna"))
    await store.shift_clock(61_000)
    await store.claim_sandboxes("other", HOST, lease_seconds=60, limit=1)
    with pytest.raises(Conflict, match="the sandbox 'box' is lost: the lease of worker gone ran out"):
        await reaching
    far = await store.add_sandbox(new(name="far"), by="anna")
    (claim,) = await store.claim_sandboxes("w", "host-2", lease_seconds=60, limit=1)
    await store.sandbox_running(claim.hold_id, 3)
    with pytest.raises(Conflict, match="'far' is on the host 'host-2', and can be used only there"):
        await sandboxes.reach(store, far.id, by="anna")


async def test_a_new_one_may_start_on_another_host(store: Store) -> None:
    """Who made it is told what it waits for, and where it runs."""
    told = asyncio.get_running_loop().create_future()
    made = await store.add_sandbox(new(name="box", requires='{"zone": "a"}'), by="anna")
    with pytest.raises(Conflict, match="no engine runs that could hold the sandbox 'box'"):
        await sandboxes.started(store, made.id, say=told.set_result, engine_seconds=0)
    await store.heartbeat("w", host="host-2", pid=1, info={"live": "/there"})
    assert await store.claim_sandboxes("here", HOST, lease_seconds=60, limit=1) == []
    starting = asyncio.create_task(sandboxes.started(store, made.id, say=told.set_result, engine_seconds=0))
    store.labels = {"zone": "a"}
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert (await told).startswith("it waits for a host with zone=a")
    (claim,) = await store.claim_sandboxes("w", "host-2", lease_seconds=60, limit=1)
    await store.sandbox_running(claim.hold_id, 3)
    assert (await starting).host == "host-2"


async def test_one_on_a_drained_host_stays_asleep(store: Store, engine: Engine) -> None:
    made = await store.add_sandbox(new(name="box"), by="anna")
    await sandboxes.reach(store, made.id, by="anna")
    await sandboxes.pause(store, made.id, by="anna")
    machine = Machine(id="i", name=HOST, machine_id="", boot_id="b", labels={}, capacity={}, versions={})
    await store.register_host(machine)
    await store.drain_host("i", by="bob")
    with pytest.raises(Conflict, match=r"'box' sleeps on the host .* which is drained: `swarm host undrain`"):
        await sandboxes.reach(store, made.id, by="anna")
    assert (await store.sandbox(made.id)).state == "paused"


async def test_one_that_can_not_be_resumed_says_why(store: Store, engine: Engine) -> None:
    made = await store.add_sandbox(new(name="box"), by="anna")
    await sandboxes.reach(store, made.id, by="anna")
    await sandboxes.pause(store, made.id, by="anna")
    (snapshot,) = (await store.snapshot_page(SnapshotFilter(sandbox_id=made.id))).snapshots
    await store.forget_snapshots([snapshot.id])
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(Conflict, match="the sandbox 'box'"):
            await sandboxes.reach(store, made.id, by="anna")
