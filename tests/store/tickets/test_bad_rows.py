"""A bad row never waits without a reason: each is INSERTed by plain SQL, and fails with the reason in its `error`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from swarm.errors import NotFound, UsageError
from swarm.model import Ticket
from swarm.store.store import Store
from swarm.store.tickets.validation import MIB
from swarm.workflow.definition import Schedule, Step, Workflow
from tests.store.databases import ECHO, LEASE, RETRY, Outside, claim_one, insert, inserted, shell

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "broken JSON": ({"inputs": '{"a": '}, "inputs is not valid JSON: Expecting value"),
    "JSON list": ({"inputs": "[1]"}, "inputs is a list; it must be a JSON object"),
    "JSON number": ({"inputs": "1"}, "inputs is a number; it must be a JSON object"),
    "JSON null": ({"inputs": "null"}, "inputs is null; it must be a JSON object"),
    "NaN": ({"inputs": '{"a": NaN}'}, "NaN is not JSON"),
    "deep JSON": ({"inputs": "[" * 60_000}, "nested too deeply"),
    "digits": ({"inputs": '{"a": ' + "9" * 5000 + "}"}, "inputs is not valid JSON"),
    "NUL in inputs": ({"inputs": '{"a": "\0"}'}, "inputs is not valid JSON"),
    "shell in inputs": ({"inputs": "$(reboot)"}, "inputs is not valid JSON"),
    "no agent": ({"agent_id": None}, "no agent: set agent_id"),
    "unknown agent": ({"agent_id": "nobody"}, "no agent has the id or name 'nobody'; `swarm agent list`"),
    "misspelt agent": ({"agent_id": "ehco"}, "no agent has the id or name 'ehco'; did you mean 'echo'?"),
    "unknown version": ({"agent_id": "echo@2"}, "no agent has the id or name 'echo@2'; did you mean 'echo'?"),
    "beginning of an id": ({"agent_id": ECHO.id[:8]}, f"no agent has the id or name '{ECHO.id[:8]}'"),
    "a person": ({"agent_id": None, "assignee_id": "ann", "assignee_type": "user"}, "a 'user' and not an agent"),
    "unknown mode": ({"execution_mode": "Agent"}, "execution_mode 'Agent' is unknown; use 'agent' or 'workflow'"),
    "no workflow": ({"execution_mode": "workflow"}, "workflow_id is empty"),
    "unknown workflow": ({"execution_mode": "workflow", "workflow_id": "w"}, "no workflow has the id or name 'w'"),
    "unknown workflow, mode agent": ({"agent_id": None, "workflow_id": "w"}, "no workflow has the id or name 'w'"),
    "state Ready": ({"state": "Ready"}, "state 'Ready' is unknown; set it to 'ready'"),
    "state todo": ({"state": "todo"}, "state 'todo' is unknown; set it to 'ready'"),
    "state In Progress": ({"state": "In Progress"}, "set it to 'in_progress'"),
    "state empty": ({"state": ""}, "state '' is unknown"),
    "state BLOB": ({"state": b"ready"}, "state 'ready' is unknown"),
    "state number": ({"state": 1}, "state '1' is unknown"),
    "in_progress": (
        {"state": "in_progress"},
        "only Swarm sets the state 'in_progress', and this ticket has no live run; set the state to 'ready' to run it",
    ),
    "waiting": (
        {"state": "waiting"},
        "only Swarm sets the state 'waiting', and this ticket has no live run; set the state to 'ready' to run it",
    ),
    "priority": ({"priority": "high"}, "priority is 'high'; it must be a whole number"),
    "max_attempts": ({"max_attempts": 0}, "max_attempts is 0; it must be a whole number from 1"),
    "timeout": ({"timeout_seconds": "soon"}, "timeout_seconds is 'soon'; it must be a number"),
    "timeout inf": ({"timeout_seconds": float("inf")}, "timeout_seconds is inf"),
    "budget": ({"budget_usd": -1}, "budget_usd is -1.0; it must be a number from 0"),
    "long title": ({"title": "x" * 65_537}, "title has 65,537 bytes, the limit is 65,536"),
    "long title in bytes": ({"title": "é" * 40_000}, "title has 80,000 bytes"),
    "large description": ({"description": "x" * (2 * MIB + 1)}, "description has 2,097,153 bytes"),
    "large trigger": ({"trigger_data": "x" * (2 * MIB + 1)}, "trigger_data has 2,097,153 bytes"),
    "large inputs": ({"inputs": "x" * (16 * MIB + 1)}, "inputs has 16,777,217 bytes"),
    "NUL in agent_id": ({"agent_id": "a\0b"}, "agent_id 'a\\x00b' contains a NUL character"),
    "BLOB title": ({"title": b"\xff\xfe"}, "title is a BLOB that is not UTF-8"),
}
REFUSED = ("NUL in inputs", "NUL in agent_id", "NUL", "priority", "timeout")  # by PostgreSQL itself
BAD_IDS: dict[str, tuple[Any, str]] = {
    "NUL": ("a\0b", "id 'a\\x00b' contains a NUL character"),
    "empty": ("", "id is empty"),
    "blank": ("  ", "id is empty"),
    "long": ("x" * 513, "id has 513 bytes, the limit is 512"),
    "BLOB": (b"abc", "id is a BLOB"),
    "BLOB, not UTF-8": (b"\xff\xfe", "id is a BLOB"),
}


def answer(outside: Outside) -> tuple[str, str]:
    ((state, error),) = outside.execute("SELECT state, error FROM tickets")
    return state, error


@pytest.mark.sqlite("state BLOB", "BLOB title")
@pytest.mark.parametrize("case", BAD)
async def test_bad_row_fails_with_a_sentence(store: Store, outside: Outside, case: str) -> None:
    columns, sentence = BAD[case]
    if case not in REFUSED:
        insert(outside, "t", **columns)
    elif outside.refuses(*inserted("t", **columns)):
        return
    assert await store.claim("w", lease_seconds=LEASE) == []
    state, error = answer(outside)
    assert (state, sentence in error) == ("failed", True), error
    assert (await store.ticket("t")).error == error
    (event,) = await store.events("t")
    assert (event.data["to"], event.data["error"]) == ("failed", error)


@pytest.mark.sqlite("BLOB", "BLOB, not UTF-8")
@pytest.mark.parametrize("state", ["ready", "Ready"])
@pytest.mark.parametrize("case", BAD_IDS)
async def test_bad_id_fails_with_a_sentence(store: Store, outside: Outside, case: str, state: str) -> None:
    id, sentence = BAD_IDS[case]
    if case not in REFUSED:
        insert(outside, id, state=state)
    elif outside.refuses(*inserted(id, state=state)):
        return
    assert await store.claim("w", lease_seconds=LEASE) == []
    now, error = answer(outside)
    assert now == "failed"
    assert sentence in error or "unknown" in error
    assert [t.state for t in await store.tickets()] == ["failed"]


@pytest.mark.sqlite
@pytest.mark.parametrize("column", ["id", "title", "agent_id", "inputs", "state", "project_id", "workflow_id"])
async def test_text_that_is_not_utf8(store: Store, outside: Outside, column: str) -> None:
    insert(outside, "t")
    outside.execute(f"UPDATE tickets SET {column} = CAST(X'61FF62' AS TEXT)")
    assert await store.claim("w", lease_seconds=LEASE) == []
    state, error = answer(outside)
    assert state == "failed"
    assert ("UTF-8" in error) == (column != "state"), error


async def test_broken_workflow_row(store: Store, outside: Outside) -> None:
    outside.execute("INSERT INTO workflows (id, name, version) VALUES ('w', 'w', '1')")
    insert(outside, "t", execution_mode="workflow", workflow_id="w")
    assert await store.claim("w", lease_seconds=LEASE) == []
    await store.decided()
    state, error = answer(outside)
    assert state == "failed" and "broken row" in error


@pytest.mark.parametrize(
    ("value", "on"),
    [(0, False), ("false", False), ("no", False), ("", False), (2, False), (b"1", False), (1, True), ("true", True)],
)
async def test_a_workflow_is_on_only_if_its_row_plainly_says_so(
    store: Store, outside: Outside, value: object, on: bool
) -> None:
    flow = Workflow(
        name="flow", version="1.0.0", steps=(Step(id="a", agent="echo@1.0.0"),), schedule=(Schedule(cron="@daily"),)
    )
    row = await store.put_workflow(flow)
    if not (isinstance(value, str) and value):  # no boolean
        if outside.refuses("UPDATE workflows SET enabled = ?", (value,)):
            return
    else:
        outside.execute("UPDATE workflows SET enabled = ?", (value,))
    assert (await store.workflow("flow")).enabled == on
    insert(outside, "t", execution_mode="workflow", workflow_id=row.id)
    await store.claim("w", lease_seconds=LEASE)
    await store.decided()
    state, error = answer(outside)
    assert ("disabled" in str(error)) != on, (state, error)


async def test_broken_agent_row(store: Store, outside: Outside) -> None:
    outside.execute("UPDATE agents SET entry = 'main.py' WHERE name = 'echo'")
    insert(outside, "t")
    assert await store.claim("w", lease_seconds=LEASE) == []
    assert "'echo'" in answer(outside)[1] and "broken row" in answer(outside)[1]


@pytest.mark.sqlite("vcpus-2.5", "idempotent-false")  # to PostgreSQL, 2 and no
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("env", '{"A": 1}'),
        ("idle_timeout_seconds", "soon"),
        ("vcpus", 2.5),
        ("memory_mb", 1 << 40),
        ("retry", '{"delay_seconds": "1"}'),
        ("retry", '{"factor": 1e999}'),
        ("idempotent", "false"),
        ("idempotent", 2),
        ("version", "../1"),
        ("path", "/a\0b"),
        ("runtime", "ruby"),
        ("entry", '["a\\u0000b"]'),
        ("env", '{"A=B": "c"}'),
        ("secrets", '["a b"]'),
        ("preload", '["os; import x"]'),
        ("requirements", '["--index-url=http://x"]'),
        ("packages", '["git -o x"]'),
    ],
)
async def test_an_agents_row_that_would_break_later(
    store: Store, outside: Outside, column: str, value: str | float
) -> None:
    sql = f"UPDATE agents SET {column} = ? WHERE name = 'echo'"
    if value in ("soon", 1 << 40, 2, "/a\0b"):
        if outside.refuses(sql, (value,)):
            return
    else:
        outside.execute(sql, (value,))
    insert(outside, "t")
    assert await store.claim("w", lease_seconds=LEASE) == []
    state, error = answer(outside)
    assert state == "failed" and "broken row" in error and column in error


async def test_agent_removed_before_the_retry(store: Store, outside: Outside) -> None:
    insert(outside, "t", agent_id=RETRY.id)
    await claim_one(store)
    outside.execute("DELETE FROM agents")
    await store.shift_clock(31_000)
    assert await store.claim("w", lease_seconds=LEASE) == []
    state, error = answer(outside)
    assert state == "failed" and "no agent has the id" in error
    assert outside.execute("SELECT status FROM step_executions") == [("cancelled",)]


async def test_bad_rows_do_not_keep_good_ones_waiting(store: Store, outside: Outside) -> None:
    outside.execute("BEGIN")
    for number in range(2500):
        insert(outside, f"bad-{number}", inputs="{", priority=1)
    insert(outside, "good")
    outside.execute("COMMIT")
    assert (await claim_one(store)).ticket.id == "good"
    assert outside.execute("SELECT count(*) FROM tickets WHERE state = 'failed'") == [(2500,)]


async def test_unusual_but_valid_rows(store: Store, outside: Outside) -> None:
    insert(outside, "$(reboot) '; DROP TABLE tickets; --\n🦊", title="", inputs="", execution_mode=None, project_id=7)
    insert(outside, "old", created_at="yesterday", updated_at="tomorrow")
    claims = await store.claim("w", limit=9, lease_seconds=LEASE)
    assert len(claims) == 2 and {claim.inputs for claim in claims} == {"{}"}


@pytest.mark.sqlite
async def test_bytes_that_are_text(store: Store, outside: Outside) -> None:
    insert(outside, "blob", description="wörld".encode(), inputs=b'{"a": 1}', updated_at=b"\xff")
    claim = await claim_one(store)
    assert (claim.inputs, claim.ticket.description) == ('{"a": 1}', "wörld")


@pytest.mark.sqlite
async def test_any_row_can_be_shown(store: Store, outside: Outside) -> None:
    insert(outside, "t", state="done")
    for column in ("title", "outputs", "error", "created_at", "priority", "timeout_seconds", "run_id"):
        outside.execute(f"UPDATE tickets SET {column} = X'00FF'")
    ticket = await store.ticket("t")
    assert (ticket.title, ticket.priority, ticket.timeout_seconds) == ("\0\ufffd", 0, None)
    assert await store.tickets(states=["done"]) == [ticket]
    with pytest.raises(NotFound):
        await store.ticket("\udcff")


async def test_the_documented_insert(store: Store, url: str) -> None:
    """Acceptance §2, as typed."""
    sql = (
        "INSERT INTO tickets (id, project_id, title, description, state, agent_id, assignee_id, assignee_type, "
        "execution_mode) VALUES ('test-echo-002', 'test-project', 'Echo Test 2', 'Test ticket for echo agent', "
        f"'ready', '{ECHO.id}', '{ECHO.id}', 'agent', 'agent');"
    )
    await shell(url, sql)
    claim = await claim_one(store, ticket_id="test-echo-002")
    assert claim.ticket.created_at and claim.ticket.created_at.endswith("Z")
    await shell(url, "DELETE FROM tickets WHERE id LIKE 'test-%';")
    assert (await store.renew([claim.attempt_id], lease_seconds=LEASE)).cancelled == {claim.attempt_id}
    assert await store.attempts("test-echo-002") == []


async def test_add_ticket_refuses_what_could_never_run(store: Store) -> None:
    good: dict[str, Any] = {"id": "t", "title": "t", "state": "ready", "agent_id": ECHO.id}
    for bad in (
        {"id": ""},
        {"id": "a\0"},
        {"title": "\udcff"},
        {"inputs": "["},
        {"state": "done"},
        {"max_attempts": 0},
    ):
        with pytest.raises(UsageError):
            await store.add_ticket(Ticket(**good | bad))
    added = await store.add_ticket(Ticket(**good, inputs=json.dumps({"a": "'\n🦊"})))
    assert added == await store.ticket("t") and added.execution_mode == "agent"
