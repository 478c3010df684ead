"""Rows of `sandboxes` that other programs write: a bad one ends with a sentence in its `error`; what happens to one
that is held, or sleeps, stops no other."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.admin.prove import Report, judge
from swarm.errors import ChangeRefused, LeaseLost, NotFound
from swarm.model import Sandbox
from swarm.store.sandboxes.sandboxes import SandboxFilter
from swarm.store.store import Store
from tests.store.databases import LEASE, Outside
from tests.store.sandboxes.test_holding import HOST, claim, pause_of, paused, started

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown agent": ({"agent_id": "ehco"}, "no agent has the id or name 'ehco'; did you mean 'echo'?"),
    "NUL in agent_id": ({"agent_id": "a\0b"}, "agent_id 'a\\x00b' contains a NUL character"),
    "agent BLOB": ({"agent_id": b"\xff"}, "agent_id is a BLOB that is not UTF-8"),
    "name": ({"name": "my box"}, "name is 'my box'; it must be letters, digits and . _ -"),
    "long name": ({"name": "x" * 64}, "it must be letters, digits"),
    "NUL in name": ({"name": "a\0"}, "contains a NUL"),
    "project": ({"project_id": b"\xff\xfe"}, "project_id is a BLOB that is not UTF-8"),
    "image": ({"image": "a\0b"}, "image 'a\\x00b' contains a NUL"),
    "long image": ({"image": "x" * 65_537}, "image has 65,537 bytes"),
    "unknown snapshot": ({"snapshot_id": "gone"}, "there is no snapshot 'gone' (any more)"),
    "parent": ({"parent_id": b"\xff"}, "parent_id is a BLOB"),
    "memory": ({"memory_mb": "much"}, "memory_mb is 'much'; it must be a whole number from 128"),
    "little memory": ({"memory_mb": 1}, "memory_mb is 1; it must be a whole number from 128"),
    "memory BLOB": ({"memory_mb": b"256"}, "memory_mb is '256'; it must be a whole number"),
    "vcpus": ({"vcpus": 0}, "vcpus is 0"),
    "disk": ({"disk_mb": 1.5}, "disk_mb is 1.5; it must be a whole number"),
    "network": ({"network": "a\0"}, "contains a NUL"),
    "secrets": ({"secrets": "KEY"}, "secrets is not valid JSON"),
    "secrets object": ({"secrets": "{}"}, "secrets is '{}'; it must be a JSON list"),
    "secrets name": ({"secrets": '["a b"]'}, "secrets has 'a b'; the name of a secret has letters"),
    "secrets number": ({"secrets": "[1]"}, "secrets has 1"),
    "env list": ({"env": "[]"}, "env is '[]'; it must be a JSON object"),
    "env value": ({"env": '{"A": 1}'}, "env.A must be text"),
    "env name": ({"env": '{"A=B": "1"}'}, "env has 'A=B'"),
    "env NUL": ({"env": '{"A": "\\u0000"}'}, "env.A must be text of at most 4096 characters, without NUL"),
    "deep labels": ({"labels": "[" * 60_000}, "labels is not valid JSON"),
    "labels": ({"labels": '{"a": {}}'}, "labels.a must be text"),
    "label name": ({"labels": '{"": "x"}'}, "labels has ''"),
    "ttl": ({"ttl_seconds": "soon"}, "ttl_seconds is 'soon'; it must be a number from 1"),
    "ttl inf": ({"ttl_seconds": float("inf")}, "ttl_seconds is inf"),
    "idle": ({"idle_timeout_seconds": -1}, "idle_timeout_seconds is -1"),
    "budget": ({"budget_usd": "x"}, "budget_usd is 'x'"),
    "tokens": ({"budget_tokens": -5}, "budget_tokens is -5"),
    "wanted": ({"wanted": "stopp"}, "wanted is 'stopp'; it must be 'running', 'paused' or 'ended'"),
    "state running": ({"state": "running"}, "only Swarm sets the state 'running'"),
    "state Starting": ({"state": "Starting"}, "state 'Starting' is unknown; a new sandbox has the state 'starting'"),
    "state todo": ({"state": "todo"}, "state 'todo' is unknown"),
    "state BLOB": ({"state": b"starting"}, "state 'starting' is unknown"),
    "state empty": ({"state": ""}, "state '' is unknown"),
    "paused": ({"state": "paused", "wanted": "running"}, "the snapshot that it was paused to is gone"),
}
# By PostgreSQL itself.
REFUSED = ("NUL in agent_id", "NUL in name", "image", "memory", "network", "ttl", "budget", "NUL")
BAD_IDS: dict[str, tuple[Any, str]] = {
    "NUL": ("a\0b", "id 'a\\x00b' contains a NUL character"),
    "empty": ("", "id is empty"),
    "long": ("x" * 513, "id has 513 bytes, the limit is 512"),
    "BLOB": (b"abc", "id is a BLOB"),
    "BLOB, not UTF-8": (b"\xff\xfe", "id is a BLOB"),
}


def inserted(**values: Any) -> tuple[str, dict[str, Any]]:
    names = ", ".join(values)
    return f"INSERT INTO sandboxes ({names}) VALUES ({', '.join(':' + name for name in values)})", values


def insert(outside: Outside, **values: Any) -> None:
    outside.execute(*inserted(**values))


async def judged(store: Store) -> Report:
    return await store.audit(judge)


@pytest.mark.sqlite("agent BLOB", "project", "parent", "memory BLOB", "disk", "state BLOB")
@pytest.mark.parametrize("case", BAD)
async def test_a_bad_row_ends_with_a_sentence(store: Store, outside: Outside, case: str) -> None:
    columns, sentence = BAD[case]
    if case not in REFUSED:
        insert(outside, id="b", **columns)
    elif outside.refuses(*inserted(id="b", **columns)):
        return
    insert(outside, id="good")
    assert [one.sandbox.id for one in await claim(store)] == ["good"]
    found = await store.sandbox("b")
    assert (found.state, sentence in str(found.error)) == ("ended", True), found.error
    assert found.ended_at is not None
    (event,) = await store.sandbox_events("b")
    assert (event.data["to"], event.data["error"]) == ("ended", found.error)
    assert not (await store.sandboxes_due(HOST)).ready
    assert [one.id for one in (await store.sandbox_page(SandboxFilter())).sandboxes] == ["good", "b"]
    assert (await judged(store)).kept


@pytest.mark.sqlite("BLOB", "BLOB, not UTF-8")
@pytest.mark.parametrize("state", ["starting", "Starting"])
@pytest.mark.parametrize("case", BAD_IDS)
async def test_a_bad_id_ends_with_a_sentence(store: Store, outside: Outside, case: str, state: str) -> None:
    id, sentence = BAD_IDS[case]
    if case not in REFUSED:
        insert(outside, id=id, state=state)
    elif outside.refuses(*inserted(id=id, state=state)):
        return
    assert await claim(store) == []
    ((now, error),) = outside.execute("SELECT state, error FROM sandboxes")
    assert now == "ended" and (sentence in error or "unknown" in error)
    assert await claim(store) == []
    await store.sandbox_page(SandboxFilter())


@pytest.mark.sqlite
@pytest.mark.parametrize("column", ["id", "name", "agent_id", "state", "project_id", "env", "wanted", "host"])
async def test_text_that_is_not_utf8(store: Store, outside: Outside, column: str) -> None:
    insert(outside, id="b")
    outside.execute(f"UPDATE sandboxes SET {column} = CAST(X'61FF62' AS TEXT)")
    claims = await claim(store)
    ((state, error),) = outside.execute("SELECT state, error FROM sandboxes")
    if column == "host":  # only Swarm writes that
        assert len(claims) == 1
    else:
        assert claims == [] and state == "ended" and error


@pytest.mark.parametrize("created_at", ["2026-01-31 10:00:00", "", None, "2026-01-31T10:00:00+02:00"])
async def test_any_time_of_creation_sorts(store: Store, outside: Outside, created_at: str | None) -> None:
    insert(outside, id="b", created_at=created_at)
    ((found,),) = outside.execute("SELECT created_at FROM sandboxes")
    assert len(found) == 24 and found.endswith("Z")


async def test_another_id_is_another_sandbox(store: Store, outside: Outside) -> None:
    asleep, awake = await paused(store), await started(store)
    outside.execute("UPDATE sandboxes SET id = 'new-' || id")
    assert (await store.renew_sandboxes([awake.hold_id], lease_seconds=LEASE)).lost == {awake.hold_id}
    assert await claim(store) == []
    assert (await store.sandbox(f"new-{awake.sandbox.id}")).state == "lost"
    await store.want_sandbox(f"new-{asleep.sandbox.id}", "running", by="ann")
    (again,) = await claim(store)
    assert again.resumes and again.snapshot is not None
    assert (await judged(store)).kept


async def test_a_copied_row_is_held_by_nobody(store: Store, outside: Outside) -> None:
    one = await started(store)
    columns = ", ".join(outside.columns("sandboxes"))
    values = columns.replace("id,", "'copy',", 1).replace(" state,", " 'starting',")
    outside.execute(f"INSERT INTO sandboxes ({columns}) SELECT {values} FROM sandboxes")
    assert await store.renew_sandboxes([one.hold_id], lease_seconds=LEASE) == (frozenset(), {})
    (copy,) = await claim(store, worker="v")
    assert copy.sandbox.id == "copy" and copy.hold_id != one.hold_id
    assert (await judged(store)).kept


# What another program does to one that runs: (SQL, does its holder keep it?, its state and a part of its error then)
MEDDLING: dict[str, tuple[str, bool, str, str]] = {
    "deleted": ("DELETE FROM sandboxes", False, "", ""),
    "ended": ("UPDATE sandboxes SET state = 'ended'", False, "ended", ""),
    "lost": ("UPDATE sandboxes SET state = 'lost'", False, "lost", ""),
    "unknown state": ("UPDATE sandboxes SET state = 'stop'", False, "ended", "state 'stop' is unknown"),
    "hold": ("UPDATE sandboxes SET hold_id = 'mine'", False, "running", ""),
    "no hold": ("UPDATE sandboxes SET hold_id = NULL", False, "lost", "no engine holds this sandbox"),
    "started again": ("UPDATE sandboxes SET hold_id = NULL, state = 'starting'", False, "starting", ""),
    "replaced": ("INSERT OR REPLACE INTO sandboxes (id) SELECT id FROM sandboxes", False, "starting", ""),
    "lease text": ("UPDATE sandboxes SET lease_until = 'x'", True, "running", ""),
    "lease NULL": ("UPDATE sandboxes SET lease_until = NULL", True, "running", ""),
    "wanted": ("UPDATE sandboxes SET wanted = 'stopp'", True, "running", "wanted is 'stopp'"),
    "worker": ("UPDATE sandboxes SET worker = x'ff', host = 3, vm_id = 'x'", True, "running", ""),
    "numbers": ("UPDATE sandboxes SET ends_at = 'never', memory_mb = 'x', budget_usd = 'y'", True, "running", ""),
    "texts": ("UPDATE sandboxes SET name = x'ff', env = '[', labels = 'x', used_at = 3", True, "running", ""),
}


@pytest.mark.sqlite("replaced")  # elsewhere, INSERT replaces no row
@pytest.mark.parametrize("case", MEDDLING)
async def test_others_change_one_that_is_held(store: Store, outside: Outside, case: str) -> None:
    sql, keeps, state, error = MEDDLING[case]
    one = await started(store)
    if case not in ("lease text", "worker", "numbers"):
        outside.execute(sql)
    elif outside.refuses(sql):
        return
    renewed = await store.renew_sandboxes([one.hold_id], lease_seconds=LEASE)
    assert renewed == (frozenset() if keeps else {one.hold_id}, {})
    if not keeps:
        with pytest.raises(LeaseLost):
            await store.sandbox_ended(one.hold_id)
    others = await claim(store, worker="v")
    if state == "":
        with pytest.raises(NotFound):
            await store.sandbox(one.sandbox.id)
    else:
        found = await store.sandbox(one.sandbox.id)
        assert (found.state, error in str(found.error)) == (state, True), found
        assert bool(others) == (state == "starting")
    if keeps:
        await store.sandbox_paused(one.hold_id, pause_of(one))
    report = await judged(store)
    assert report.kept, report.violations
    await store.shift_clock(round(LEASE * 1000) + 1)
    await claim(store, worker="v")
    assert (await store.sandbox_counts()).get("running", 0) == 0
    report = await judged(store)
    assert report.kept, report.violations


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("UPDATE sandboxes SET memory_mb = 'x'", "it can't be resumed: memory_mb is 'x'"),
        ("UPDATE sandboxes SET agent_id = 'gone'", "it can't be resumed: no agent has the id or name 'gone'"),
        ("UPDATE sandboxes SET wanted = 'on'", "it can't be resumed: wanted is 'on'"),
    ],
)
async def test_one_that_sleeps_is_not_ended_by_a_typing_error(
    store: Store, outside: Outside, sql: str, sentence: str
) -> None:
    one = await paused(store)
    await store.want_sandbox(one.sandbox.id, "running", by="ann")
    if "memory_mb" not in sql:
        outside.execute(sql)
    elif outside.refuses(sql):
        return
    assert await claim(store) == []
    found = await store.sandbox(one.sandbox.id)
    assert (found.state, found.wanted) == ("paused", None) and sentence in str(found.error)
    outside.execute("UPDATE sandboxes SET memory_mb = NULL, agent_id = NULL, wanted = 'running'")
    (again,) = await claim(store)
    assert again.resumes and (await store.sandbox(one.sandbox.id)).error is None


async def test_a_row_that_refuses_changes_stops_no_other(store: Store, outside: Outside) -> None:
    one, two = await started(store, name="one"), await started(store, name="two")
    for id in (one.sandbox.id, "bad"):
        outside.execute(
            f"CREATE TRIGGER t_{id[-4:]} BEFORE UPDATE ON sandboxes WHEN OLD.id = '{id}' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    insert(outside, id="bad")
    insert(outside, id="good")
    assert [claimed.sandbox.id for claimed in await claim(store)] == ["good"]
    assert (await store.renew_sandboxes([one.hold_id, two.hold_id], lease_seconds=2 * LEASE)).lost == {one.hold_id}
    await store.shift_clock(round(LEASE * 1000) + 1)
    await claim(store)
    assert (await store.sandbox("two")).state == "running"


@pytest.mark.sqlite
async def test_prune_ends_though_a_row_stays_whose_id_is_no_text(store: Store, outside: Outside) -> None:
    for id in ("a", b"\xff", "plain"):
        insert(
            outside, id=id, state="ended", created_at="2020-01-01T00:00:00.000Z", ended_at="2020-01-01T00:00:00.000Z"
        )
    outside.execute("UPDATE sandboxes SET id = CAST(X'61FF62' AS TEXT) WHERE id = 'a'")
    await store.prune(60.0)
    ((left,),) = outside.execute("SELECT count(*) FROM sandboxes")
    assert left == 1


async def test_prune_ends_though_a_row_stays(store: Store, outside: Outside) -> None:
    insert(
        outside, id="kept", state="ended", created_at="2020-01-01T00:00:00.000Z", ended_at="2020-01-01T00:00:00.000Z"
    )
    outside.execute("CREATE TRIGGER t BEFORE DELETE ON sandboxes BEGIN SELECT RAISE(IGNORE); END")
    with pytest.raises(ChangeRefused):
        await store.prune(60.0)


async def test_a_trigger_that_ignores_changes(store: Store, outside: Outside) -> None:
    await store.add_sandbox(Sandbox(id="x", state="starting"), by="ann")
    outside.execute("CREATE TRIGGER t BEFORE UPDATE ON sandboxes BEGIN SELECT RAISE(IGNORE); END")
    assert await claim(store) == []
    assert (await store.sandbox("x")).hold_id is None


HOSTILE = (None, "", "x", "a\0b", "1", b"\xff\xfe", 3, -1, 1 << 62, 1.5, float("inf"), "[" * 2000, "'; --", "ended")


async def test_any_value_in_any_column_of_an_insert(store: Store, outside: Outside) -> None:
    """Each is started, or ends with a sentence, and can be shown."""
    tried = 0
    for column in outside.columns("sandboxes"):
        for value in HOSTILE:
            if outside.accepts(*inserted(**{"name": f"n-{column}-{tried}", column: value})):
                tried += 1
            else:
                assert outside.typed or (column in ("state", "waits_for") and value is None), (column, value)
    claims = list[Any]()
    for _ in range(tried):
        found = await claim(store, limit=100)
        claims += found
        if not found and not (await store.sandboxes_due(HOST)).ready:
            break
    left = outside.execute("SELECT name, state, hold_id IS NOT NULL, error FROM sandboxes")
    for name, state, held, error in left:
        says_why = error or any(f"n-{one}-" in str(name) for one in ("state", "wanted", "ends_at"))  # it was to end
        assert held or (state == "ended" and says_why), (name, state, error)
    assert len(claims) == sum(held for _, _, held, _ in left) > 100
    page, shown = await store.sandbox_page(SandboxFilter(), limit=1000), 0
    for one in page.sandboxes:
        shown += (await store.sandbox(one.id)).id == one.id if one.id else 1
    assert shown == len(page.sandboxes) > tried - 10
    report = await judged(store)
    assert report.kept, report.violations


async def test_any_value_in_any_column_of_one_that_is_held(store: Store, outside: Outside) -> None:
    """Its holder goes on, or learns that it is lost; and then it is held by nobody."""
    for column in outside.columns("sandboxes"):
        for number, value in enumerate(HOSTILE):
            id = f"{column}-{number}"
            insert(outside, id=id)
            (one,) = await claim(store)
            await store.sandbox_running(one.hold_id, 1001)
            if not outside.accepts(f"UPDATE sandboxes SET {column} = ? WHERE id = ?", (value, id)):
                assert outside.typed or (value is None and column in ("state", "waits_for"))
            lost, wanted = await store.renew_sandboxes([one.hold_id], lease_seconds=LEASE)
            if lost:
                assert column in ("id", "state", "hold_id"), column
            else:
                assert set(wanted.values()) <= {"ended"}
                await store.sandbox_paused(one.hold_id, pause_of(one, id=f"p-{id}"))
    await store.shift_clock(round(LEASE * 1000) + 1)
    await claim(store)
    ((held,),) = outside.execute("SELECT count(*) FROM sandboxes WHERE hold_id IS NOT NULL")
    assert held == 0
    await store.sandbox_page(SandboxFilter(), limit=1000)
    report = await judged(store)
    assert report.kept, report.violations
