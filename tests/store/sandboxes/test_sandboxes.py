"""Sandboxes and snapshots as people and engines see them: lists, projects, budgets, events, what is kept how long."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from swarm.admin.prove import judge
from swarm.errors import Conflict, LeaseLost, NotFound, UsageError
from swarm.ledger import Account, Bill, Granted, Limit, Order, Refused, Spend
from swarm.model import Agent, Event, Sandbox, SandboxClaim, Snapshot
from swarm.store.sandboxes import sandboxes
from swarm.store.sandboxes.holding import TRIES
from swarm.store.sandboxes.sandboxes import SandboxFilter
from swarm.store.sandboxes.share import Share
from swarm.store.sandboxes.snapshots import SnapshotFilter
from swarm.store.store import Store
from swarm.store.tickets.room import Room
from tests.conftest import PATIENCE_SECONDS
from tests.store.databases import ECHO, LEASE, Outside, claim_one, insert
from tests.store.sandboxes.test_holding import HOST, claim, pause_of, paused, started


async def add(store: Store, **columns: Any) -> Sandbox:
    return await store.add_sandbox(Sandbox(id="", state="starting", **columns), by="ann")


async def listed(store: Store, limit: int = 50, **which: Any) -> list[str | None]:
    """Names, over all pages."""
    found, after = list[str | None](), None
    while True:
        page = await store.sandbox_page(SandboxFilter(**which), after=after, limit=limit)
        found += [one.name for one in page.sandboxes]
        after = page.after
        if after is None:
            return found


async def test_pages(store: Store) -> None:
    for number in range(7):
        project, labels = ("p", '{"team": "blue"}') if number % 2 else (None, None)
        await add(store, name=f"s{number}", project_id=project, labels=labels, agent_id="echo" if number > 3 else None)
        await asyncio.sleep(0.002)  # the order of those of one millisecond is that of their ids
    await store.want_sandbox("s2", "ended", by="ann")
    newest_first = [f"s{number}" for number in reversed(range(7))]
    for limit in (1, 2, 3, 50):
        assert await listed(store, limit) == newest_first
        assert await listed(store, limit, project_id="p") == ["s5", "s3", "s1"]
        assert await listed(store, limit, labels={"team": "blue"}) == ["s5", "s3", "s1"]
        assert await listed(store, limit, states=("ended",)) == ["s2"]
        assert await listed(store, limit, states=("starting", "running"), agent_ids=("echo",)) == ["s6", "s5", "s4"]
    assert await listed(store, text="S2") == ["s2"] and await listed(store, text="%") == []
    assert await listed(store, text=(await store.sandbox("s3")).id) == ["s3"]
    assert await store.sandbox_counts() == {"starting": 6}
    which, after, found = SandboxFilter(states=("ended",)), None, list[int]()
    while after is not None or not found:  # it looks at two of them at once: a page may be empty and not the last
        page = await store._read.call(sandboxes.page, which, after=after, limit=50, scanned=2)
        found.append(len(page.sandboxes))
        after = page.after
    assert found == [0, 0, 1, 0]
    with pytest.raises(UsageError, match="`after` must be"):
        await store.sandbox_page(SandboxFilter(), after="x")


async def test_many_claims_at_once_give_each_sandbox_to_one(store: Store, url: str) -> None:
    for _ in range(12):
        await add(store)
    async with Store.open(url) as other:
        claims = await asyncio.gather(*(claim(one, worker, limit=3) for one in (store, other) for worker in "abc"))
    held = [one.sandbox.id for some in claims for one in some]
    assert len(held) == len(set(held)) == 12
    assert (await store.audit(judge)).holds == 12


async def test_memory_and_the_order_of_claims(store: Store) -> None:
    asleep = await paused(store, name="asleep", memory_mb=300)
    await add(store, name="first", memory_mb=600)
    await asyncio.sleep(0.002)  # the order of those of one millisecond is that of their ids
    await add(store, name="second", memory_mb=200)
    assert await claim(store, room=Room(memory_mb=599)) == [], "it waits for room, and nothing overtakes it"
    await store.want_sandbox("asleep", "running", by="ann")
    assert [one.sandbox.name for one in await claim(store, room=Room(memory_mb=800))] == ["asleep"], (
        "somebody waits for it"
    )
    assert [one.sandbox.name for one in await claim(store, room=Room(memory_mb=800), limit=1)] == ["first"]
    assert [one.sandbox.name for one in await claim(store, room=Room(memory_mb=200))] == ["second"]
    assert asleep.hold_id
    await add(store, name="giant", memory_mb=100_000)
    assert await claim(store, room=Room(memory_mb=1000, most_memory_mb=2000)) == []
    assert "it needs 100000 MB, and all VMs of this host together may take 2000 MB" in str(
        (await store.sandbox("giant")).error
    )


async def test_a_project_gets_its_share_and_hides_nobody(store: Store, outside: Outside) -> None:
    rows = ", ".join(f"('a{n}', 'a', '2026-01-01T00:00:0{n % 10}.000Z')" for n in range(300))
    outside.execute(f"INSERT INTO sandboxes (id, project_id, created_at) VALUES {rows}")
    for id, project in (("b", "b"), ("none1", None), ("none2", None), ("none3", None)):
        await store.add_sandbox(Sandbox(id=id, state="starting", project_id=project), by="x")

    async def claimed(places: int, memory_mb: int | None, limit: int = 6) -> tuple[Share, list[str]]:
        room = Room(most_memory_mb=memory_mb and 2 * memory_mb)
        share = Share.of(claims, most=2 * places, room=room, part=0.5)
        found = await claim(store, limit=limit, share=share)
        claims.extend(found)
        return share, [str(one.sandbox.project_id) for one in found]

    claims: list[SandboxClaim] = []
    share, projects = await claimed(places=2, memory_mb=None)
    assert sorted(projects) == ["None", "None", "None", "a", "a", "b"]
    assert (list(share.over), share.others_wait) == (["a"], False)
    said = str((await store.sandbox("a11")).error)
    assert said == (
        "it waits: the sandboxes of one project take 2 places at most (SWARM_PROJECT_SHARE); "
        "it starts when one of them ends or sleeps"
    )
    share, projects = await claimed(places=3, memory_mb=600)
    assert projects == [], "a third one would need more than its memory"
    assert "600 MB of memory" in share.over["a"]
    await store.add_sandbox(Sandbox(id="late", state="starting", project_id="b"), by="x")
    share, _ = await claimed(places=2, memory_mb=None, limit=0)
    assert (list(share.over), share.others_wait) == (["a"], True)
    for one in claims:
        await store.sandbox_ended(one.hold_id)
    claims.clear()
    share, projects = await claimed(places=2, memory_mb=100)
    assert sorted(projects) == ["a", "b"], "one may always run"
    assert (await store.sandbox(claims[0].sandbox.id)).error is None, "it waits no more"


async def test_a_share_holds_for_the_first_too(store: Store) -> None:
    """Of memory and of disk. What can never fit ends with a sentence; what only has to wait waits."""
    room = Room(memory_mb=20_000, disk_mb=40_000, most_memory_mb=20_000, most_disk_mb=40_000)

    async def claimed(*claims: SandboxClaim) -> list[SandboxClaim]:
        return await claim(store, room=room, share=Share.of(claims, most=20, room=room, part=0.5))

    for number, (name, size) in enumerate((("memory", "memory_mb"), ("disk", "disk_mb"))):
        most = (10_000, 20_000)[number]
        await add(store, name=name, project_id="p", **{size: most + 1})
        assert await claimed() == []
        row = await store.sandbox(name)
        assert row.state == "ended"
        assert row.error and row.error.startswith(
            f"it needs {most + 1} MB of {name}, and the sandboxes of one project may take {most} MB together"
        )
        await add(store, name=f"{name}-fits", project_id="p", **{size: most})
        (first,) = await claimed()
        await add(store, name=f"{name}-waits", project_id="p")
        assert await claimed(first) == []
        row = await store.sandbox(f"{name}-waits")
        assert row.state == "starting" and ("10000 MB of memory", "50% of the disk")[number] in (row.error or "")
        await store.sandbox_ended(first.hold_id)
        await store.want_sandbox(f"{name}-waits", "ended", by="x")
        room.take(-first.memory_mb, -first.disk_mb)
    await add(store, name="of-none", disk_mb=40_001)
    assert await claimed() == []
    error = (await store.sandbox("of-none")).error
    assert error and "it needs 40001 MB of disk, and all VMs of this host together may take 40000 MB" in error


async def test_the_disk_that_the_next_one_needs_counts(store: Store) -> None:
    await add(store, name="large", disk_mb=5000)
    room = Room(disk_mb=4999, most_disk_mb=5000)
    assert await claim(store, room=room) == []
    assert "disk: 4999 MB are left" in room.waits_for and "the next one needs 5000 MB" in room.waits_for
    (held,) = await claim(store, room=Room(disk_mb=5000, most_disk_mb=5000))
    assert held.disk_mb == 5000


async def test_a_full_engine_still_ends_what_is_to_end(store: Store, outside: Outside) -> None:
    await paused(store, name="old", ttl_seconds=10.0)
    await add(store, name="waits")
    await add(store, name="over")
    outside.execute("UPDATE sandboxes SET wanted = 'ended' WHERE name = 'over'")
    await store.shift_clock(10_000)
    assert (await store.sandboxes_due(HOST)).next_ms == 0
    assert await claim(store, limit=0) == []
    assert {one.name: one.state for one in (await store.sandbox_page(SandboxFilter())).sandboxes} == {
        "waits": "starting", "over": "ended", "old": "ended",
    }  # fmt: skip
    with pytest.raises(NotFound):
        await store.snapshot("p1")
    assert [one.id for one in await store.expired_snapshots(HOST)] == ["p1"]


async def test_time_to_live(store: Store) -> None:
    one = await started(store, ttl_seconds=60.0)
    due = await store.sandboxes_due(HOST)
    assert not due.ready and due.next_ms is not None and due.next_ms <= LEASE * 1000
    await store.renew_sandboxes([one.hold_id], lease_seconds=3600)
    await store.shift_clock(60_000)
    assert (await store.renew_sandboxes([one.hold_id], lease_seconds=3600)).wanted == {one.hold_id: "ended"}
    await store.sandbox_ended(one.hold_id)
    last = (await store.sandbox_events(one.sandbox.id))[-1]
    assert (last.data["to"], last.data["why"]) == ("ended", "its time to live is over")


async def test_what_is_wanted(store: Store) -> None:
    one = await started(store, name="box")
    for wanted in ("paused", "running", "paused"):
        await store.want_sandbox("box", wanted, by="ann")
        assert (await store.renew_sandboxes([one.hold_id], lease_seconds=LEASE)).wanted == {one.hold_id: wanted}
    await store.want_sandbox("box", "running", by="ann")  # while its engine is pausing it
    await store.sandbox_paused(one.hold_id, pause_of(one))
    assert (await store.sandbox("box")).wanted == "running"
    await store.want_sandbox("box", "paused", by="ann")
    assert await claim(store) == [] and (await store.sandbox("box")).wanted is None
    await store.want_sandbox("box", "ended", by="ann")
    assert (await store.sandbox("box")).state == "ended"
    await store.want_sandbox("box", "ended", by="ann")
    with pytest.raises(Conflict, match="has ended"):
        await store.want_sandbox("box", "running", by="ann")
    with pytest.raises(UsageError, match="'running', 'paused' or 'ended', not 'off'"):
        await store.want_sandbox("box", "off", by="ann")
    said = [event.data.get("did") for event in await store.sandbox_events(one.sandbox.id) if event.kind == "change"]
    assert said[0] == "sandbox.add" and said[-1] == "sandbox.end" and said.count("sandbox.pause") == 3


async def test_an_engine_that_is_known_to_be_dead_gives_its_sandboxes_up(store: Store) -> None:
    from swarm.store.registry import workers

    one, two = await started(store, name="one"), await started(store, name="two")
    await add(store, name="three")
    (three,) = await claim(store)
    await store.add_snapshot(
        Snapshot(id="n", kind="named", host=HOST, name="good", sandbox_id=one.sandbox.id), by="ann"
    )
    await store.add_sandbox(Sandbox(id="other", state="starting"), by="ann")
    (other,) = await claim(store, worker="v")
    await store._write.call(workers.bury, ["w"])
    (again,) = await claim(store, worker="v")
    assert (again.sandbox.id, again.hold_id != three.hold_id) == (three.sandbox.id, True)
    found = await store.sandbox("one")
    assert found.state == "lost" and "its last snapshot is good" in str(found.error)
    assert (await store.sandbox("two")).state == "lost" and two.hold_id
    assert (await store.renew_sandboxes([other.hold_id], lease_seconds=LEASE)).lost == frozenset()


async def test_one_that_engines_die_of_is_given_up(store: Store) -> None:
    made = await add(store)
    for _ in range(TRIES):
        assert len(await claim(store)) == 1
        await store.shift_clock(round(LEASE * 1000) + 1)
    assert await claim(store) == []
    found = await store.sandbox(made.id)
    assert (found.state, found.error) == ("lost", f"{TRIES} engines in a row died or froze while they started it")


async def test_one_that_sleeps_is_never_lost_by_engines_that_die(store: Store) -> None:
    one = await paused(store)
    for tries in (TRIES, 1):
        await store.want_sandbox(one.sandbox.id, "running", by="ann")
        for _ in range(tries):
            (again,) = await claim(store)
            assert again.resumes
            await store.shift_clock(round(LEASE * 1000) + 1)
        assert await claim(store) == []
        found = await store.sandbox(one.sandbox.id)
        assert (found.state, found.wanted) == ("paused", None) and "while they resumed it" in str(found.error)
    await store.want_sandbox(one.sandbox.id, "running", by="ann")
    (last,) = await claim(store)
    await store.sandbox_running(last.hold_id, 1001)
    found = await store.sandbox(one.sandbox.id)
    assert (found.state, found.error) == ("running", None)
    assert (await store.audit(judge)).kept


async def test_a_cancelled_claim_goes_back(store: Store) -> None:
    made = await add(store)
    task = asyncio.ensure_future(claim(store))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (found := await claim(store, worker="v")):
            pass
    assert found[0].sandbox.id == made.id


# --- budgets ----------------------------------------------------------------------------------------------------------


def order(id: str, hold: str, sandbox: str, usd: float) -> Order:
    account = Account(
        ticket_id=None, run_id="", step_execution_id="", step_id="", attempt_id=hold, agent_id="rich",
        agent_name="rich", sandbox_id=sandbox,
    )  # fmt: skip
    spend = Spend(tokens=10, usd=usd)
    return Order(id=id, account=account, upstream="u", model="m", most=spend, least=spend)


def bill(of: Order, usd: float) -> Bill:
    return Bill(
        id=of.id, account=of.account, upstream="u", model="m", status=200, counts={"input": 10}, cost_usd=usd,
        latency_ms=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("own", "budget"), [(5.0, "the sandbox's budget is $5"), (None, "of agent rich for a sandbox")]
)
async def test_a_budget_is_the_sandboxs_or_its_agents(store: Store, own: float | None, budget: str) -> None:
    await store.put_agent(
        Agent(
            id="rich",
            name="rich",
            version="1.0.0",
            path=ECHO.path,
            entry=("x",),
            budget_usd=5.0 if own is None else 1.0,
        )
    )
    one = await started(store, agent_id="rich", budget_usd=own)
    first = order("c1", one.hold_id, one.sandbox.id, 3.0)
    granted = await store.reserve(first)
    assert isinstance(granted, Granted) and granted.usd == 5.0
    await store.book(bill(first, 3.0))
    refused = await store.reserve(order("c2", one.hold_id, one.sandbox.id, 3.0))
    assert isinstance(refused, Refused) and budget in refused.message
    lost = await store.reserve(order("c3", one.hold_id, one.sandbox.id, 1.5))
    assert isinstance(lost, Granted)  # its engine dies: nobody books it
    await store.sandbox_paused(one.hold_id, pause_of(one))
    with pytest.raises(LeaseLost, match="no longer holds the sandbox"):
        await store.reserve(order("c4", one.hold_id, one.sandbox.id, 0.1))
    await store.want_sandbox(one.sandbox.id, "running", by="ann")
    (two,) = await claim(store)
    refused = await store.reserve(order("c5", two.hold_id, one.sandbox.id, 1.0))
    assert isinstance(refused, Refused) and "$4.5 of it is spent" in refused.message
    (call,) = [event for event in await store.sandbox_events(one.sandbox.id) if event.kind == "model_call"]
    assert (call.ticket_id, call.data["cost_usd"]) == ("", 3.0)
    assert [(c.name, c.calls, c.cost_usd) for c in await store.costs("sandbox")] == [(one.sandbox.id, 2, 3.0)]
    of_one = await store.sandbox_costs(one.sandbox.id)
    assert of_one == (await store.costs("sandbox"))[0] and await store.sandbox_costs("other") is None
    assert [(c.name, c.calls) for c in await store.costs("ticket")] == [("(sandboxes)", 2)]
    with pytest.raises(NotFound, match="was deleted"):
        await store.reserve(order("c6", two.hold_id, "gone", 1.0))


async def test_a_day_has_one_budget_for_all(store: Store) -> None:
    one = await started(store)
    first = order("c1", one.hold_id, one.sandbox.id, 3.0)
    await store.reserve(first)
    await store.book(bill(first, 3.0))
    spend = Spend(tokens=1, usd=2.0)
    next_one = Order(
        id="c2", account=first.account, upstream="u", model="m", most=spend, least=spend, day=Limit(usd=4.0)
    )
    assert isinstance(await store.reserve(next_one), Refused)


# --- events -----------------------------------------------------------------------------------------------------------


async def test_events_of_sandboxes_and_tickets_go_side_by_side(store: Store, outside: Outside) -> None:
    insert(outside, "t", project_id="p")
    one = await started(store, project_id="p")
    await started(store, project_id="q")
    work = await claim_one(store)
    told = [
        Event(ticket_id="", sandbox_id=one.sandbox.id, kind="exec", data={"argv": ["true"], "code": 0}),
        Event(ticket_id="t", attempt_id=work.attempt_id, step_id="main", kind="output", data={"text": "x"}),
        Event(ticket_id="", sandbox_id="gone", kind="exec", data={}),
    ]
    await store.append(told)
    last = (await store.sandbox_events(one.sandbox.id))[-1]
    assert (last.kind, last.sandbox_id, last.ticket_id, last.data["code"]) == ("exec", one.sandbox.id, "", 0)
    of_p, _ = await store.all_events(after=0, limit=100, project_id="p")
    assert {(event.ticket_id, event.sandbox_id) for event in of_p} == {("t", None), ("", one.sandbox.id)}
    facts = await store.facts(after=0, limit=1000)
    assert one.sandbox.id in {event.sandbox_id for event in facts.events}
    newest, changed = await store.tickets_with_events(0, limit=1000)
    assert changed is not None and {"t", one.sandbox.id} <= set(changed) and "" not in changed
    assert newest == await store.newest_event()
    assert all(event.sandbox_id is None for event in await store.events("t"))


async def test_a_deleted_ones_history_is_not_a_new_ones(store: Store, outside: Outside) -> None:
    one = await started(store)
    await store.add_snapshot(Snapshot(id="keep", kind="named", host=HOST, name="n", sandbox_id=one.sandbox.id))
    await store.add_snapshot(Snapshot(id="f", kind="fork", host=HOST, sandbox_id=one.sandbox.id))
    outside.execute("DELETE FROM sandboxes")
    outside.execute("INSERT INTO sandboxes (id) VALUES (?)", (one.sandbox.id,))
    assert await store.sandbox_events(one.sandbox.id) == []
    assert [snapshot.id for snapshot in await store.expired_snapshots(HOST)] == ["f"]
    assert (await store.snapshot("n")).id == "keep"


async def test_prune(store: Store) -> None:
    asleep, over = await paused(store, name="asleep"), await started(store, name="over")
    await store.sandbox_ended(over.hold_id)
    await store.shift_clock(86_400_000)
    late = await started(store, name="late")
    await store.sandbox_ended(late.hold_id)
    await store.prune(3600.0)
    names = [one.name for one in (await store.sandbox_page(SandboxFilter())).sandboxes]
    assert names == ["late", "asleep"]
    assert await store.sandbox_events(asleep.sandbox.id) and await store.sandbox_events(late.sandbox.id)
    assert await store.sandbox_events(over.sandbox.id) == []
    report = await store.audit(judge)
    assert report.kept and not report.changed_by_others, report


async def test_remove(store: Store) -> None:
    one = await started(store, name="box")
    with pytest.raises(Conflict, match="has not ended: end it first"):
        await store.remove_sandbox("box", by="ann")
    await store.sandbox_ended(one.hold_id)
    await store.remove_sandbox("box", by="ann")
    with pytest.raises(NotFound):
        await store.sandbox(one.sandbox.id)


# --- snapshots --------------------------------------------------------------------------------------------------------


async def test_snapshots_are_found_listed_and_expire(store: Store) -> None:
    for number in range(3):
        await store.add_snapshot(
            Snapshot(id=f"s{number}", kind="named", host=HOST, name=f"n{number}", project_id="p" if number else None),
            keep_seconds=60.0 if number == 2 else None, by="ann",
        )  # fmt: skip
    with pytest.raises(Conflict, match="has the name 'n0'"):
        await store.add_snapshot(Snapshot(id="", kind="named", host=HOST, name="n0"))
    assert (await store.snapshot("n1")).id == "s1"
    with pytest.raises(NotFound, match="no snapshot 'n0'"):
        await store.snapshot("n0", project_id="p")
    with pytest.raises(NotFound, match="did you mean 'n2'"):
        await store.snapshot("nn2")
    page = await store.snapshot_page(SnapshotFilter(project_id="p"), limit=1)
    rest = await store.snapshot_page(SnapshotFilter(project_id="p"), limit=1, after=page.after)
    assert [one.id for one in (*page.snapshots, *rest.snapshots)] == ["s2", "s1"]
    await store.shift_clock(60_000)
    with pytest.raises(NotFound):
        await store.snapshot("s2")
    assert [one.id for one in await store.expired_snapshots(HOST)] == ["s2"]
    assert await store.expired_snapshots("host-2") == []
    assert await store.snapshot_ids(HOST) == {"s0", "s1", "s2"}
    await store.forget_snapshots(["s2"])
    assert await store.snapshot_ids(HOST) == {"s0", "s1"}
    await store.remove_snapshot("n0", by="ann")
    assert [one.id for one in await store.expired_snapshots(HOST)] == ["s0"]
    assert [one.name for one in (await store.snapshot_page(SnapshotFilter())).snapshots] == ["n1"]
    await store.add_snapshot(Snapshot(id="", kind="named", host=HOST, name="n0"))  # the name is free again


@pytest.mark.parametrize("value", [None, "", "x", b"\xff", "a\0b", 1 << 62, -1.5, "false", "["])
async def test_any_value_in_a_snapshot(store: Store, outside: Outside, value: object) -> None:
    """Other programs have no reason to write there; whatever they do, lists and engines go on."""
    for column in outside.columns("snapshots"):
        made = await store.add_snapshot(Snapshot(id="", kind="named", host=HOST))
        # No NULLs in some, and no id twice.
        outside.accepts(f"UPDATE snapshots SET {column} = ? WHERE id = ?", (value, made.id))
        with contextlib.suppress(NotFound):
            assert (await store.snapshot(made.id[:30])).secrets == (column != "secrets" or value != "false")
    page = await store.snapshot_page(SnapshotFilter())
    assert len(page.snapshots) > 10
    await store.expired_snapshots(HOST)
    assert len(await store.snapshot_ids(HOST)) > 10
    whole = next(one for one in page.snapshots if len(one.id) == 36 and one.host == HOST)
    fork = await add(store, snapshot_id=whole.id)
    assert [one.sandbox.id for one in await claim(store)] == [fork.id]


async def test_nothing_else_starts_from_what_a_sandbox_sleeps_in(store: Store, outside: Outside) -> None:
    """It is written to when that sandbox is resumed."""
    one = await paused(store)
    with pytest.raises(Conflict, match=f"the sandbox '{one.sandbox.id}' sleeps in the snapshot 'p1': fork or snapshot"):
        await add(store, snapshot_id="p1")
    outside.execute("INSERT INTO sandboxes (id, snapshot_id) VALUES ('x', 'p1')")
    assert await claim(store) == []
    row = await store.sandbox("x")
    assert row.state == "ended" and "sleeps in the snapshot" in str(row.error)


async def test_what_is_in_use_stays(store: Store) -> None:
    one = await started(store)
    await store.add_snapshot(
        Snapshot(id="f", kind="fork", host=HOST, sandbox_id=one.sandbox.id, spec='{"memory_mb": 512}'), keep_seconds=1.0
    )
    fork = await add(store, snapshot_id="f", parent_id=one.sandbox.id)
    await store.shift_clock(1000)
    assert await store.expired_snapshots(HOST) == []
    assert await claim(store, host="host-2") == []
    (held,) = await claim(store)
    assert held.snapshot is not None and (held.snapshot.id, held.resumes, held.memory_mb) == ("f", False, 512)
    assert await store.expired_snapshots(HOST) == []
    await store.sandbox_running(held.hold_id, 1002)
    assert [each.id for each in await store.expired_snapshots(HOST)] == ["f"]
    assert (await store.sandbox(fork.id)).parent_id == one.sandbox.id
    await store.sandbox_paused(held.hold_id, pause_of(held))
    with pytest.raises(Conflict, match=r"is in use: the sandbox .* is paused to it"):
        await store.remove_snapshot("p1", by="ann")


async def test_snapshots_of_a_ticket_go_with_it(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    work = await claim_one(store)
    step = Snapshot(id="st", kind="step", host=HOST, ticket_id="t", step_id="main")
    await store.add_snapshot(step)
    attempt = Snapshot(id="at", kind="attempt", host=HOST, ticket_id="t", attempt_id=work.attempt_id)
    await store.add_snapshot(attempt, keep_seconds=3600.0)
    assert await store.expired_snapshots(HOST) == []
    with pytest.raises(Conflict, match="may start steps from it"):
        await store.remove_snapshot("st", by="ann")
    from swarm.model import Succeeded

    await store.finish(work.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=1.0)
    assert [each.id for each in await store.expired_snapshots(HOST)] == ["st"], "they live as long as their run"
    outside.execute("DELETE FROM tickets")
    assert {each.id for each in await store.expired_snapshots(HOST)} == {"st", "at"}
