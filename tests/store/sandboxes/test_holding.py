"""Who holds a sandbox: claims, leases, fences, and what becomes of those that other programs or dead engines leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import Conflict, LeaseLost, NotFound, UsageError
from swarm.model import Sandbox, SandboxClaim, SandboxState, Snapshot
from swarm.store.store import Store
from tests.store.databases import ECHO, LEASE, Outside

HOST = "host-1"


async def claim(store: Store, worker: str = "w", host: str = HOST, **options: Any) -> list[SandboxClaim]:
    options = {"limit": 10, "lease_seconds": LEASE} | options
    return await store.claim_sandboxes(worker, host, **options)


async def started(store: Store, **columns: Any) -> SandboxClaim:
    """A running one."""
    await store.add_sandbox(Sandbox(id="", state="starting", **columns), by="ann")
    (one,) = await claim(store)
    await store.sandbox_running(one.hold_id, 1001)
    return one


def pause_of(hold: SandboxClaim, id: str = "p1", **fields: Any) -> Snapshot:
    return Snapshot(id=id, kind="pause", host=HOST, size_bytes=5, **fields)


async def paused(store: Store, **columns: Any) -> SandboxClaim:
    one = await started(store, **columns)
    await store.sandbox_paused(one.hold_id, pause_of(one))
    return one


async def moves(store: Store, id: str) -> list[tuple[object, object]]:
    found = [e for e in await store.sandbox_events(id) if e.kind == "transition"]
    assert all(e.ticket_id == "" and e.sandbox_id == id and e.data["of"] == "sandbox" for e in found)
    return [(e.data["from"], e.data["to"]) for e in found]


async def test_from_start_to_end(store: Store) -> None:
    made = await store.add_sandbox(
        Sandbox(id="", state="starting", agent_id="echo", name="box", ttl_seconds=60.0), by="ann"
    )
    (one,) = await claim(store)
    assert (one.sandbox.id, one.agent, one.snapshot, one.resumes) == (made.id, ECHO, None, False)
    assert one.memory_mb == ECHO.memory_mb
    assert await claim(store) == [], "nobody else gets it"
    await store.sandbox_running(one.hold_id, 1001)
    found = await store.sandbox("box")
    assert (found.state, found.vm_id, found.hold_id, found.host) == ("running", 1001, one.hold_id, HOST)
    assert found.started_at and found.created_by == "ann" and found.ends_at
    assert await store.renew_sandboxes([one.hold_id], lease_seconds=LEASE) == (frozenset(), {})
    await store.sandbox_paused(one.hold_id, pause_of(one))
    found = await store.sandbox(made.id)
    assert (found.state, found.vm_id, found.hold_id, found.host) == ("paused", None, None, HOST)
    assert await claim(store) == [], "it sleeps"
    await store.want_sandbox("box", "running", by="bob")
    assert await claim(store, host="host-2") == [], "its snapshot is on another host"
    (two,) = await claim(store, worker="v")
    assert two.resumes and two.snapshot is not None and two.snapshot.id == "p1" and two.hold_id != one.hold_id
    await store.sandbox_running(two.hold_id, 1002)
    with pytest.raises(NotFound):
        await store.snapshot("p1")
    await store.want_sandbox(made.id[:8], "ended", by="bob")
    assert await store.renew_sandboxes([two.hold_id], lease_seconds=LEASE) == (frozenset(), {two.hold_id: "ended"})
    await store.sandbox_ended(two.hold_id)
    found = await store.sandbox("box")
    assert (found.state, found.error, found.wanted) == ("ended", None, None) and found.ended_at
    assert await moves(store, made.id) == [
        ("starting", "running"),
        ("running", "paused"),
        ("paused", "running"),
        ("running", "ended"),
    ]


async def test_every_write_passes_the_fence(store: Store) -> None:
    one = await started(store)
    await store.shift_clock(round(LEASE * 1000) + 1)
    assert await claim(store, worker="v") == []
    for write in (
        store.sandbox_running(one.hold_id, 1),
        store.sandbox_paused(one.hold_id, pause_of(one)),
        store.sandbox_ended(one.hold_id),
        store.sandbox_released(one.hold_id),
    ):
        with pytest.raises(LeaseLost, match="no longer holds the sandbox"):
            await write
    assert (await store.renew_sandboxes([one.hold_id], lease_seconds=LEASE)).lost == {one.hold_id}
    await store.sandbox_used([one.hold_id])
    found = await store.sandbox(one.sandbox.id)
    assert found.state == "lost" and "the lease of worker w ran out" in str(found.error)
    assert "it has no snapshot to go on from" in str(found.error)
    with pytest.raises(NotFound):
        await store.snapshot("p1")


@pytest.mark.parametrize("columns", ["(agent_id) VALUES ('echo')", "DEFAULT VALUES"])
async def test_a_plain_insert_is_enough(store: Store, outside: Outside, columns: str) -> None:
    outside.execute(f"INSERT INTO sandboxes {columns}")
    assert (await store.sandboxes_due(HOST)).ready
    (one,) = await claim(store)
    assert one.sandbox.id and (one.agent is not None) == ("agent_id" in columns)
    assert one.memory_mb == 256


async def test_it_keeps_the_version_of_its_agent(store: Store) -> None:
    one = await started(store, agent_id="echo@1")
    assert one.sandbox.agent_id == (await store.sandbox(one.sandbox.id)).agent_id == ECHO.id
    await store.put_agent(replace(ECHO, id="newer", version="1.1.0"))
    await store.sandbox_paused(one.hold_id, pause_of(one))
    with pytest.raises(Conflict, match=f"sandboxes that have not ended need the agent echo@1.0.0 .{one.sandbox.id}"):
        await store.remove_agent(ECHO.id)
    await store.remove_agent("newer")
    await store.put_agent(replace(ECHO, id="newer", version="1.1.0"))
    await store.want_sandbox(one.sandbox.id, "running", by="ann")
    (again,) = await claim(store)
    assert again.agent == ECHO
    await store.sandbox_ended(again.hold_id)
    await store.remove_agent(ECHO.id)


async def test_names_and_unknown_ones(store: Store) -> None:
    one = await store.add_sandbox(Sandbox(id="", state="starting", name="box"), by="ann")
    with pytest.raises(Conflict, match="has the name 'box'"):
        await store.add_sandbox(Sandbox(id="", state="starting", name="box"), by="ann")
    other = await store.add_sandbox(Sandbox(id="", state="starting", name="box", project_id="p"), by="ann")
    with pytest.raises(Conflict, match="several sandboxes have the name 'box'"):
        await store.sandbox("box")
    assert (await store.sandbox("box", project_id="p")).id == other.id
    with pytest.raises(NotFound):
        await store.sandbox(one.id, project_id="p")
    await store.want_sandbox(other.id, SandboxState.ENDED, by="ann")
    assert (await store.sandbox("box")).id == one.id
    with pytest.raises(NotFound, match="did you mean 'box'"):
        await store.sandbox("bxo")
    with pytest.raises(UsageError, match="name is 'a b'"):
        await store.add_sandbox(Sandbox(id="", state="starting", name="a b"), by="ann")
    with pytest.raises(NotFound, match="no snapshot 'x'"):
        await store.add_sandbox(Sandbox(id="", state="starting", snapshot_id="x"), by="ann")


# --- secrets and projects ---------------------------------------------------------------------------------------------


async def test_whether_it_holds_secrets_is_decided_while_that_is_known(store: Store, outside: Outside) -> None:
    """By itself, its agent or its start: the row says it when the snapshot has expired and the agent has changed."""
    await store.put_agent(replace(ECHO, id="keeper", name="keeper", secrets=("KEY",)))
    for id, secrets in (("clean", False), ("dirty", True)):
        await store.add_snapshot(Snapshot(id=id, kind="named", host=HOST, secrets=secrets))
    cases: tuple[tuple[bool, dict[str, Any]], ...] = (
        (False, {}), (False, {"agent_id": "echo", "snapshot_id": "clean"}), (True, {"snapshot_id": "dirty"}),
        (True, {"agent_id": "keeper", "snapshot_id": "clean"}), (True, {"agent_id": "keeper"}),
        (True, {"secrets": '["KEY"]', "snapshot_id": "clean"}),
    )  # fmt: skip
    for secret, columns in cases:
        made = await store.add_sandbox(Sandbox(id="", state="starting", **columns), by="ann")
        assert made.secret is secret, columns
        assert [one.sandbox.secret for one in await claim(store)] == [secret]
        assert (await store.sandbox(made.id)).secret is secret
    outside.execute(
        "INSERT INTO sandboxes (id, agent_id, snapshot_id, secret) VALUES ('given', 'keeper', 'clean', false)"
    )
    outside.execute("INSERT INTO sandboxes (id) VALUES ('plain')")
    assert (await store.sandbox("plain")).secret is None
    await claim(store)
    assert (await store.sandbox("given")).secret is True and (await store.sandbox("plain")).secret is False


async def test_a_project_sees_only_its_own(store: Store) -> None:
    """Others' rows hide none of its names, make no beginning of an id ambiguous, and are named in no message."""
    ids = {project: "0123abcd" + str(number) * 24 for number, project in enumerate("ab")}
    for project, id in ids.items():
        await store.add_sandbox(Sandbox(id=id, state="starting", name="build", project_id=project), by="ann")
        await store.add_snapshot(Snapshot(id=id, kind="named", name="kept", host=HOST, project_id=project))
    for number in range(101):
        await store.add_sandbox(Sandbox(id=f"b{number}", state="starting", name="many", project_id="b"), by="ann")
        await store.want_sandbox(f"b{number}", "ended", by="ann")
        await store.add_snapshot(
            Snapshot(id=f"b{number}", kind="named", name="all", host=HOST, project_id=f"b{number}")
        )
    for project, id in ids.items():
        for find in (store.sandbox, store.snapshot):
            assert (await find("0123abcd", project_id=project)).id == id
            with pytest.raises(NotFound):
                await find("0123abcd", project_id="c")
            with pytest.raises(Conflict):
                await find("0123abcd")
    mine = await store.add_sandbox(Sandbox(id="mine", state="starting", name="many", project_id="a"), by="ann")
    for number in range(101):
        await store.add_sandbox(Sandbox(id=f"c{number}", state="starting", name="many", project_id="b"), by="ann")
        await store.want_sandbox(f"c{number}", "ended", by="ann")
    assert (await store.sandbox("many", project_id="a")).id == mine.id == (await store.sandbox("many")).id
    with pytest.raises(Conflict, match="has the name"):
        await store.add_sandbox(Sandbox(id="", state="starting", name="many", project_id="a"), by="ann")
    with pytest.raises(Conflict, match="has the name"):
        await store.add_snapshot(Snapshot(id="", kind="named", name="all", host=HOST, project_id="b0"))
    assert (await store.snapshot("all", project_id="b0")).id == "b0"


async def test_a_pause_whose_answer_was_lost_is_written_once(store: Store) -> None:
    one = await started(store)
    for _ in range(2):
        await store.sandbox_paused(one.hold_id, pause_of(one))
    assert await moves(store, one.sandbox.id) == [("starting", "running"), ("running", "paused")]
    with pytest.raises(LeaseLost):
        await store.sandbox_paused(one.hold_id, pause_of(one, id="another"))
