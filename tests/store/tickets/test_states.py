"""docs/states.md and the code's transition tables say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swarm.admin.prove import judge
from swarm.errors import Conflict
from swarm.model import SANDBOX_TRANSITIONS, STEP_TRANSITIONS, TICKET_TRANSITIONS, TicketState
from swarm.store.store import Store
from tests.store import flows
from tests.store.databases import LEASE, Outside, insert

PAGE = Path(__file__).parents[3] / "docs" / "states.md"


def arrows(section: str) -> set[tuple[str, str]]:
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return {(a, b) for a, b in re.findall(r"^ +(\S+) --> ([^\s:]+)", text, re.MULTILINE) if "[*]" not in (a, b)}


def test_ticket_diagram() -> None:
    assert arrows("Ticket") == {(a, b) for a, after in TICKET_TRANSITIONS.items() for b in after}


def test_step_diagram() -> None:
    assert arrows("Step") == {(a, b) for a, after in STEP_TRANSITIONS.items() for b in after}


def test_sandbox_diagram() -> None:
    assert arrows("Sandbox") == {(a, b) for a, after in SANDBOX_TRANSITIONS.items() for b in after}


# From the page: the state of a row that another tool wrote, and what becomes of it.
INSERTED = dict(re.findall(r"^\| `?([\w ]+)`? \| `(\w+)`", PAGE.read_text().partition("\n## Step\n")[0], re.MULTILINE))
OTHERS = ("Ready", "todo", "", "DONE", "in progress")
STATES = [*TicketState, *OTHERS]


def test_the_page_says_what_becomes_of_each_state() -> None:
    assert INSERTED.keys() == {*TicketState, "any other text"}


@pytest.mark.parametrize("how", ["inserted", "set", "given to run-ticket"])
@pytest.mark.parametrize("state", STATES)
async def test_a_state_that_another_tool_writes(store: Store, outside: Outside, state: str, how: str) -> None:
    insert(outside, "t", state=state if how != "set" else "draft", error="its own" if state == "failed" else None)
    if how == "set":
        outside.execute("UPDATE tickets SET state = ?", (state,))
    one = "t" if how == "given to run-ticket" else None
    claims = await store.claim("w", lease_seconds=LEASE, ticket_id=one)
    claims += await store.claim("w", lease_seconds=LEASE, ticket_id=one)
    ticket, expected = await store.ticket("t"), INSERTED["any other text" if state in OTHERS else state]
    assert (ticket.state, bool(claims)) == (expected, expected == "in_progress")
    assert bool(ticket.error) == (expected == "failed")
    assert state != "failed" or ticket.error == "its own"
    assert await store.audit(lambda source: judge(source).violations) == []


@pytest.mark.parametrize("state", STATES)
async def test_a_ticket_that_depends_on_such_a_row(store: Store, outside: Outside, state: str) -> None:
    insert(outside, "t", state=state)
    insert(outside, "after")
    outside.execute("INSERT INTO ticket_dependencies (ticket_id, depends_on) VALUES ('after', 't')")
    await flows.run(store)
    before, after = (await store.ticket("t")).state, (await store.ticket("after")).state
    assert after == {"done": "done", "draft": "blocked", "failed": "failed", "cancelled": "failed"}[before]


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
async def test_a_row_that_came_ended_can_be_retried(store: Store, outside: Outside, state: str) -> None:
    insert(outside, "t", state=state)
    if state == "done":
        with pytest.raises(Conflict, match="is done"):
            await store.retry("t")
        return
    await store.retry("t")
    assert await flows.run(store) == ["main"]
    assert (await store.ticket("t")).state == "done"
