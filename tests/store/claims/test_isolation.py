"""One ticket's rows that can't be written or read, by whoever's doing: that ticket fails, and all others run."""

from __future__ import annotations

import contextlib
import re
from dataclasses import fields, replace
from typing import get_type_hints

import pytest

from swarm.admin.prove import judge
from swarm.errors import ChangeRefused, LeaseLost, StoreError
from swarm.ledger import Granted, Limit, Order, Spend
from swarm.model import Role, Sandbox, Succeeded, Ticket
from swarm.store.registry import schedules
from swarm.store.registry.notices import NoticeKind
from swarm.store.registry.schedules import ScheduleRow
from swarm.store.registry.tokens import Actor
from swarm.store.sql.rows import AttemptRow, RunRow, StepRow
from swarm.store.store import Store
from tests.store.databases import ECHO, LEASE, RETRY, Outside, account_of, claim_one, claimed, insert
from tests.store.flows import register

pytestmark = pytest.mark.slow  # tries very many cases

DONE = Succeeded(outputs="{}")


async def finish(store: Store, attempt_id: str) -> None:
    await store.finish(attempt_id, DONE, timings={}, vm_time_ms=0)


async def other_runs(store: Store, outside: Outside) -> None:
    """A ticket that nobody has touched goes all its way."""
    insert(outside, "other")
    claims = [claim for claim in await claimed(store, limit=5) if claim.ticket.id == "other"]
    claims = claims or [c for c in await claimed(store, limit=5) if c.ticket.id == "other"]
    await store.due()
    await store.queue()
    await finish(store, claims[0].attempt_id)
    assert (await store.ticket("other")).state == "done"


async def test_an_index_that_refuses_a_second_ticket_of_a_project(store: Store, outside: Outside) -> None:
    outside.execute("CREATE UNIQUE INDEX one ON tickets(project_id) WHERE state = 'in_progress'")
    for id in ("a", "b"):
        insert(outside, id, project_id="p")
    claims = await claimed(store, limit=5)
    assert len(claims) == 1
    refused = {"a", "b"} - {claims[0].ticket.id}
    ticket = await store.ticket(refused.pop())
    assert ticket.state == "failed" and re.search("(?i)unique constraint", ticket.error or "")
    await other_runs(store, outside)


@pytest.mark.parametrize("kind", ["ABORT", "FAIL", "ROLLBACK"])
async def test_a_trigger_that_refuses_the_end(store: Store, outside: Outside, kind: str) -> None:
    outside.execute(f"""CREATE TRIGGER no BEFORE UPDATE OF state ON tickets WHEN NEW.id = 'a' AND NEW.state = 'done'
                    BEGIN SELECT RAISE({kind}, 'not before noon'); END""")
    insert(outside, "a")
    insert(outside, "b")
    claims = {claim.ticket.id: claim for claim in await claimed(store, limit=2)}
    await finish(store, claims["b"].attempt_id)
    with pytest.raises(LeaseLost, match="has ended as cancelled"):
        await finish(store, claims["a"].attempt_id)
    ticket = await store.ticket("a")
    assert ticket.state == "failed" and "not before noon" in (ticket.error or "")
    assert (await store.ticket("b")).state == "done"
    await other_runs(store, outside)


@pytest.mark.parametrize("kind", ["ABORT", "FAIL", "ROLLBACK"])
async def test_a_ticket_that_can_not_even_fail_is_skipped(store: Store, outside: Outside, kind: str) -> None:
    insert(outside, "a")
    claim = await claim_one(store)
    outside.execute(f"""CREATE TRIGGER no BEFORE UPDATE ON tickets WHEN NEW.id IN ('a', 'c')
                    BEGIN SELECT RAISE({kind}, 'frozen'); END""")
    insert(outside, "c")
    with pytest.raises(LeaseLost, match="refuses all changes"):
        await finish(store, claim.attempt_id)
    await other_runs(store, outside)
    assert set(store.isolation.skipped) == {"ticket 'a'", "ticket 'c'"}
    assert all("frozen" in why for why in store.isolation.skipped.values())
    await store.shift_clock(round(LEASE * 2000))  # its lease ends, which nobody can write
    assert await claimed(store) == []
    assert ((await store.due()).next_ms or 0) >= 1000  # no reason to ask all the time
    renewal = await store.renew([claim.attempt_id], lease_seconds=LEASE)
    assert not renewal.lost and not renewal.cancelled


async def test_a_ticket_made_ready_again_while_others_are_at_fault(store: Store, outside: Outside) -> None:
    insert(outside, "t")
    old = await claim_one(store)
    store.isolation.begin()
    outside.execute("UPDATE tickets SET state = 'ready'")
    new = await claim_one(store)
    assert new.run_id != old.run_id
    with pytest.raises(LeaseLost):
        await finish(store, old.attempt_id)
    await finish(store, new.attempt_id)


async def test_very_many_that_can_not_even_fail(store: Store, outside: Outside) -> None:
    outside.execute("""CREATE TRIGGER no BEFORE UPDATE ON tickets WHEN NEW.id LIKE 'bad%'
                    BEGIN SELECT RAISE(ABORT, 'frozen'); END""")
    for number in range(110):  # more than one request may uncover
        insert(outside, f"bad {number}", priority=1)
    with pytest.raises(ChangeRefused, match="frozen"):  # an engine says so once, and asks again
        await claimed(store, limit=5)
    await other_runs(store, outside)


@pytest.mark.parametrize("body", ["INSERT INTO nowhere SELECT 1", "SELECT status FROM tickets"])
async def test_a_trigger_that_can_not_be_compiled(store: Store, outside: Outside, body: str) -> None:
    outside.execute(f"CREATE TRIGGER no AFTER INSERT ON tickets BEGIN {body}; END")
    with pytest.raises(ChangeRefused, match=r"no such (table|column)|does not exist"):
        await store.add_ticket(Ticket(id="new", title="t", state="ready", agent_id=ECHO.id))
    outside.execute("DROP TRIGGER no")
    outside.execute("ALTER TABLE schedules RENAME TO theirs")  # this one is Swarm's
    with pytest.raises(StoreError, match="run `swarm init`"):
        await store.schedules()


async def test_a_trigger_that_ignores_changes(store: Store, outside: Outside) -> None:
    outside.execute("CREATE TRIGGER no BEFORE INSERT ON tickets BEGIN SELECT RAISE(IGNORE); END")
    with pytest.raises(ChangeRefused, match="ignored"):
        await store.add_ticket(Ticket(id="new", title="t", state="ready", agent_id=ECHO.id))


async def test_a_dependant_that_can_not_be_released_does_not_fail_what_it_depends_on(
    store: Store, outside: Outside
) -> None:
    outside.execute("""CREATE TRIGGER no BEFORE UPDATE ON tickets WHEN NEW.id = 'late' AND NEW.state <> 'blocked'
                    BEGIN SELECT RAISE(ABORT, 'frozen'); END""")
    insert(outside, "early")
    claim = await claim_one(store)
    outside.execute("INSERT INTO ticket_dependencies VALUES ('late', 'early')")
    insert(outside, "late", state="blocked")
    await finish(store, claim.attempt_id)
    assert (await store.ticket("early")).state == "done"
    await other_runs(store, outside)


# Values in columns that only Swarm writes, of a ticket that waits for its second try.
WRONG_TYPES = {
    "available_at": "UPDATE step_executions SET status = 'ready', attempt_id = NULL, available_at = datetime('now')",
    "available_at of a waiting step": "UPDATE step_executions SET status = 'waiting', available_at = 'soon'",
    "lease_until": "UPDATE attempts SET lease_until = datetime('now')",
    "due_at": "UPDATE workflow_runs SET due_at = 'noon'",
    "deadline_at": "UPDATE workflow_runs SET deadline_at = 'noon', due_at = 1",
    "deadline_at alone": "UPDATE workflow_runs SET deadline_at = 'noon'",
}
WRONG = {
    "unprocessed": "UPDATE workflow_runs SET unprocessed = 'x', due_at = 1",
    "progress": "UPDATE workflow_runs SET progress = '{', unprocessed = '[]', due_at = 1",
    "progress of another shape": """UPDATE workflow_runs SET progress = '{"a": 1}', unprocessed = '[]', due_at = 1""",
}


@pytest.mark.parametrize("sql", [*WRONG_TYPES.values(), *WRONG.values()], ids=[*WRONG_TYPES, *WRONG])
@pytest.mark.parametrize("planning_seconds", [60.0, -1.0], ids=["within", "outside"])
async def test_wrong_values_fail_only_their_ticket(store: Store, outside: Outside, sql: str) -> None:
    flow = await register(store, "steps: [{id: one, agent: echo}]")
    insert(outside, "bad", agent_id=None, execution_mode="workflow", workflow_id=flow, timeout_seconds=3600.0)
    await claimed(store)
    while await store.decided() or not await store.attempts("bad"):
        await claimed(store)
    if sql not in WRONG_TYPES.values():
        outside.execute(sql)
    elif outside.refuses(sql):
        return
    for _ in range(5):
        await claimed(store)
        await store.decided()
    await other_runs(store, outside)
    ticket = await store.ticket("bad")
    assert (ticket.state, bool(ticket.error)) == ("failed", True)


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM clock",
        "UPDATE clock SET offset_ms = 9e18",
        "INSERT INTO clock VALUES (7)",
    ],
)
async def test_the_clock_was_changed(store: Store, outside: Outside, sql: str) -> None:
    outside.execute(sql)
    await other_runs(store, outside)


async def test_the_clock_was_set_to_no_number(store: Store, outside: Outside) -> None:
    outside.refuses("UPDATE clock SET offset_ms = 'x'")
    await other_runs(store, outside)


@pytest.mark.parametrize(
    "change",
    [
        "next_at = datetime('now')",
        "computed_at = datetime('now')",
        "next_at = 9e18",
        "next_at = 9223372036854775807",
        "next_at = -9223372036854775807",
        "next_at = 9e999",
        "next_at = NULL",
    ],
)
async def test_a_schedule_whose_time_is_none_is_computed_again(store: Store, outside: Outside, change: str) -> None:
    await register(store, "schedule: [{cron: '5 5 5 5 *'}]\nsteps: [{id: one, agent: echo}]")
    if not outside.accepts(f"UPDATE schedules SET {change}"):
        return
    await store.schedules()
    await store.due_schedules()
    ((next_at, computed_at),) = outside.execute("SELECT next_at, computed_at FROM schedules")
    assert isinstance(next_at, int) and isinstance(computed_at, int)
    assert (await store.due_schedules()).next_ms is not None
    assert schedules.moment(next_at).month == 5


ANOTHERS = {
    "root": "UPDATE workflow_runs SET root_run_id = (SELECT run_id FROM tickets WHERE id = 'other') WHERE id IN",
    "parent": "UPDATE workflow_runs SET parent_step_id = (SELECT s.id FROM step_executions s, tickets t "
    "WHERE s.run_id = t.run_id AND t.id = 'other' AND s.status = 'running') WHERE id IN",
    "run": "UPDATE tickets SET run_id = (SELECT run_id FROM tickets WHERE id = 'other') WHERE run_id IN",
    "attempt": "UPDATE step_executions SET attempt_id = (SELECT s.attempt_id FROM step_executions s, tickets t "
    "WHERE s.run_id = t.run_id AND t.id = 'other' AND s.status = 'running') WHERE status = 'running' AND run_id IN",
}


@pytest.mark.parametrize("which", ANOTHERS)
@pytest.mark.parametrize("ends", ["its lease ends", "it is renewed", "it ends"])
async def test_what_is_said_to_be_another_tickets(store: Store, outside: Outside, which: str, ends: str) -> None:
    """The other one goes its way."""
    flow = await register(store, "steps: [{id: one, agent: echo}, {id: two, agent: echo, needs: one}]")
    claims = {}
    for id in ("bad", "other"):
        insert(outside, id, agent_id=None, execution_mode="workflow", workflow_id=flow)
        while not (found := await claimed(store)):
            await store.decided()
        claims[id] = found[0]
    outside.execute(f"{ANOTHERS[which]} (SELECT id FROM workflow_runs WHERE ticket_id = 'bad')")
    if ends == "it is renewed":
        await store.renew([one.attempt_id for one in claims.values()], lease_seconds=LEASE)
    elif ends == "it ends":
        with contextlib.suppress(LeaseLost):
            await finish(store, claims["bad"].attempt_id)
    else:
        await store.shift_clock(round(LEASE * 1000) - 1000)
        await store.renew([claims["other"].attempt_id], lease_seconds=LEASE)
        await store.shift_clock(2000)
    others = [claims["other"].attempt_id]
    for _ in range(6):
        for attempt in others:
            await finish(store, attempt)
        found = await claimed(store, limit=5)
        others = [one.attempt_id for one in found if one.ticket.id == "other"]
        for one in found:
            if one.ticket.id == "bad":
                with contextlib.suppress(LeaseLost):
                    await finish(store, one.attempt_id)
        await store.decided()
        await store.shift_clock(round(LEASE * 1000) + 1)
    assert (await store.ticket("other")).state == "done"
    assert (await store.ticket("bad")).state in ("done", "failed", "cancelled")
    report = await store.audit(lambda facts: judge(facts, engine_alive=True))
    assert report.kept, report.violations


# Of any table: what Swarm reads there, and asks for or writes elsewhere.
TEXTS = (
    "hosts.id",
    "hosts.name",
    "unmet.requires",
    "workers.id",
    "workers.host",
    "workflow_runs.id",
    "workflow_runs.ticket_id",
    "workflow_runs.definition",
    "step_executions.id",
    "step_executions.run_id",
    "step_executions.step_id",
    "step_executions.agent_id",
    "step_executions.attempt_id",
    "step_executions.waits_for",
    "attempts.id",
    "attempts.step_execution_id",
    "attempts.worker",
    "tickets.run_id",
    "tickets.waits_for",
)


@pytest.mark.sqlite
@pytest.mark.parametrize("where", TEXTS)
async def test_text_that_is_not_utf8_anywhere(store: Store, outside: Outside, where: str) -> None:
    """SQLite gives it out, and its driver does not take it back as it is."""
    outside.execute("INSERT INTO hosts (id, name) VALUES ('h', 'another')")
    outside.execute("INSERT INTO unmet VALUES ('{\"gpu\":1}', 5)")
    await store.heartbeat("engine", host="another", pid=1, info={})
    flow = await register(store, "steps: [{id: one, agent: echo}, {id: two, agent: echo, needs: one}]")
    insert(outside, "waits", requires='{"zone":"a"}')
    insert(outside, "bad", agent_id=None, execution_mode="workflow", workflow_id=flow)
    while not (claims := await claimed(store)):
        await store.decided()
    table, _, column = where.partition(".")
    last = f"(SELECT max(rowid) FROM {table})"
    outside.execute(f"UPDATE {table} SET {column} = CAST(X'61FF62' AS TEXT) WHERE rowid = {last}")
    await other_runs(store, outside)
    await store.bury_dead_workers()
    for _ in range(4):
        left = [*await claimed(store, limit=5), *claims]
        await store.renew([one.attempt_id for one in left], lease_seconds=LEASE)
        for one in left:
            with contextlib.suppress(LeaseLost):
                await finish(store, one.attempt_id)
        await store.decided()
        await store.shift_clock(round(LEASE * 1000) + 1)
        claims = []
    assert (await store.ticket("bad")).state in ("done", "failed", "cancelled")
    assert not (await store.due()).ready
    report = await store.audit(lambda facts: judge(facts, engine_alive=True))
    assert report.kept, report.violations


DEEP = "[" * 10_000 + "]" * 10_000
DIGITS = "9" * 5000  # Python reads no such number


@pytest.mark.parametrize(
    "change", [f"{column} = '{DEEP}'" for column in ("entry", "env", "retry", "requires")] + [f"version = '{DIGITS}'"]
)
async def test_an_agent_beyond_what_can_be_read(store: Store, outside: Outside, change: str) -> None:
    outside.execute(f"UPDATE agents SET {change} WHERE id = ?", (RETRY.id,))
    insert(outside, "bad", agent_id=RETRY.id)
    await store.add_sandbox(Sandbox(id="", state="starting", agent_id=RETRY.id), by="ann")
    await store.claim_sandboxes("worker", "here", lease_seconds=LEASE, limit=1)
    await other_runs(store, outside)
    ticket = await store.ticket("bad")
    assert (ticket.state, "has a broken row" in str(ticket.error)) == ("failed", True), ticket.error
    await store.agents(broken=False)


@pytest.mark.parametrize("value", ["x", DEEP, DIGITS, "[NaN]", "1e999", '{"agent": "x", "boot": NaN}', '{"a": 1e999}'])
async def test_what_is_shown_of_any_value(store: Store, outside: Outside, value: str) -> None:
    insert(outside, "t")
    await finish(store, (await claim_one(store)).attempt_id)
    await store.add_notice(url="http://there/", kinds=[NoticeKind.FAILED], project_id=None, by="ann")
    for column in ("attempts.timings", "events.data", "notices.kinds", "hosts.labels", "workers.info"):
        table, _, name = column.partition(".")
        outside.execute(f"UPDATE {table} SET {name} = ?", (value,))
    assert [one.timings for one in await store.attempts("t")] == [{}]
    assert (await store.details("t")).attempts
    assert all(event.data == {"text": value} for event in await store.events("t"))
    assert [one.kinds for one in await store.notices()] == [()]
    await store.facts(after=0, limit=100)
    await store.audit(judge)


@pytest.mark.parametrize("value", ["x", b"x", 2**63 - 1, float("inf"), -5])
async def test_numbers_that_are_none(store: Store, outside: Outside, value: object) -> None:
    """A follower goes on from now, a token is not valid, and what is waited for is waited for."""
    await store.add_token("token", Actor(name="ann", role=Role.ADMIN), by="ann")
    newest, _ = await store.newest_event(), await store.position("mine")
    insert(outside, "bad", requires='{"zone":"a"}')
    await claimed(store)
    outside.accepts("UPDATE tokens SET expires_at = ?", (value,))
    outside.accepts("UPDATE positions SET seq = ?", (value,))
    outside.accepts("UPDATE unmet SET since = ?", (value,))
    await store.tokens()
    # What PostgreSQL refused is not there.
    valid = value in (2**63 - 1, float("inf")) or (outside.typed and value != -5)
    assert (await store.token_holder("token") is not None) == valid
    assert await store.position("mine") in (value, *range(newest, newest + 10))
    await other_runs(store, outside)


# What a trigger of another program does with a ticket 'bad', and the ticket's agent.
UNDONE = {
    "each start": ("WHEN NEW.id = 'bad' AND NEW.state = 'in_progress'", ECHO.id),
    "each refusal": ("WHEN NEW.id = 'bad' AND NEW.state = 'failed'", "nobody"),
    "each change": ("WHEN NEW.id = 'bad' AND NEW.state <> 'ready'", ECHO.id),
}


@pytest.mark.parametrize("when", UNDONE)
async def test_a_trigger_that_makes_a_ticket_ready_again(store: Store, outside: Outside, when: str) -> None:
    """For a while; then it fails, or is skipped."""
    condition, agent = UNDONE[when]
    outside.execute(
        f"CREATE TRIGGER again AFTER UPDATE OF state ON tickets {condition} "
        "BEGIN UPDATE tickets SET state = 'ready' WHERE id = NEW.id; END"
    )
    insert(outside, "bad", agent_id=agent)
    for _ in range(40):
        await claimed(store)
    before = outside.execute("SELECT count(*) FROM events")
    for _ in range(10):
        assert await claimed(store) == []
    assert outside.execute("SELECT count(*) FROM events") == before
    ticket = await store.ticket("bad")
    if when == "each start":
        assert ticket.state == "failed" and "was made ready 20 times in a short time" in (ticket.error or "")
    else:
        assert list(store.isolation.skipped) == ["ticket 'bad'"]
    await other_runs(store, outside)


ONLY_BY_TRIGGER = {
    "the attempt is gone": "AFTER INSERT ON attempts BEGIN DELETE FROM attempts WHERE id = NEW.id; END",
    "it has ended": "AFTER INSERT ON attempts BEGIN UPDATE attempts SET outcome = 'lost' WHERE id = NEW.id; END",
    "the ticket goes on": "AFTER UPDATE ON tickets WHEN NEW.state = 'done' "
    "BEGIN UPDATE tickets SET state = 'in_progress' WHERE id = NEW.id; END",
}


@pytest.mark.parametrize("what", ONLY_BY_TRIGGER)
async def test_what_only_a_trigger_changed_is_found(store: Store, outside: Outside, what: str) -> None:
    """Nobody else commits."""
    outside.execute(f"CREATE TRIGGER theirs {ONLY_BY_TRIGGER[what]}")
    insert(outside, "bad")
    claim = await claim_one(store)
    with contextlib.suppress(LeaseLost):
        await finish(store, claim.attempt_id)
    store._queue.maintenance.always_seconds = 0.0
    while (await store.ticket("bad")).state == "in_progress":
        await claimed(store)
    assert (await store.ticket("bad")).state == "failed"
    report = await store.audit(lambda facts: judge(facts, engine_alive=True))
    assert report.kept, report.violations


NUMBERS = {"workflow_runs": RunRow, "step_executions": StepRow, "attempts": AttemptRow, "schedules": ScheduleRow}


@pytest.mark.sqlite
@pytest.mark.parametrize("value", ["x", DEEP, b"\xff\xfe", float("inf"), 1 << 62, -1.5])
async def test_what_is_shown_has_the_type_that_is_told(store: Store, outside: Outside, value: object) -> None:
    await register(store, "schedule: [{cron: '5 5 5 5 *'}]\nsteps: [{id: one, agent: echo}]")
    insert(outside, "t")
    await finish(store, (await claim_one(store)).attempt_id)
    for table, kind in NUMBERS.items():
        for name in {one.name for one in fields(kind)} & set(outside.columns(table)):
            if not name.endswith("id") and name not in ("number", "workflow"):
                outside.execute(f"UPDATE {table} SET {name} = ?", (value,))
    shown = [*await store.runs("t"), *await store.steps("t"), *await store.attempts("t"), *await store.schedules()]
    assert {type(row) for row in shown} == set(NUMBERS.values())
    for row in shown:
        for name, told in get_type_hints(type(row)).items():
            assert isinstance(getattr(row, name), dict if name == "timings" else told), (row, name)


# A table whose rows another program lets nobody write or delete, and what makes Swarm want to.
DUTIES = {
    "what is waited for": ("INSERT ON unmet", "SELECT 1"),
    "what is not": ("DELETE ON unmet", "INSERT INTO unmet VALUES ('x', 1)"),
    "an attempt": ("DELETE ON attempts", "DELETE FROM step_executions"),
    "a step": ("DELETE ON step_executions", "DELETE FROM workflow_runs"),
}


@pytest.mark.parametrize("duty", DUTIES)
async def test_a_duty_that_is_refused_stops_no_claim(store: Store, outside: Outside, duty: str) -> None:
    what, sql = DUTIES[duty]
    insert(outside, "bad", requires='{"zone":"a"}' if duty == "what is waited for" else None)
    if duty != "what is waited for":
        await claim_one(store)
    outside.execute(sql)
    if "step" in duty:
        outside.execute("UPDATE step_executions SET status = 'ready'")
    outside.execute(f"CREATE TRIGGER no BEFORE {what} BEGIN SELECT RAISE(ABORT, 'for ever'); END")
    for _ in range(3):
        await claimed(store)
        await store.shift_clock(round(LEASE * 1000) + 1)
    await other_runs(store, outside)
    assert duty != "what is waited for" or list(store.isolation.skipped) == ["duty 'unmet'"]


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), float("inf"), float("-inf"), "x"])
async def test_amounts_that_are_none_spend_nobodys_budget(store: Store, outside: Outside, value: object) -> None:
    """They are not counted: two of the largest are more than SQLite can add."""
    insert(outside, "t")
    account, most = account_of(await claim_one(store)), Spend(tokens=60, usd=1.0)
    for id in ("a", "b"):
        order = Order(
            id=id, account=account, upstream="u", model="m", most=most, least=most, day=Limit(usd=3, tokens=180)
        )
        assert isinstance(await store.reserve(order), Granted)
    for column in ("tokens", "reserved_tokens", "input_tokens", "cost_usd", "reserved_usd"):
        outside.accepts(f"UPDATE model_calls SET {column} = ?, status = 200", (value,))
    assert isinstance(await store.reserve(replace(order, id="c")), Granted)
    assert [one.cost_usd for one in await store.costs("agent")] == [0]
    await store.recent_costs(since="", most=10)
    await store.estimates("t")
