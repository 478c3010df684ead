"""Pages of tickets against a filter that looks at all of them: every one once, newest first, whatever is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.errors import UsageError
from swarm.model import TicketState
from swarm.store.sql.connection import Connection
from swarm.store.sql.sqlite import SQLITE
from swarm.store.sql.transaction import Tx
from swarm.store.tickets import pages
from swarm.store.tickets.pages import TicketFilter

COLUMNS = ("id", "created_at", "state", "project_id", "agent_id", "workflow_id", "title", "error")
STATES = [*TicketState, "odd"]
# Ties, times of another form, none at all, and what is no time.
TIMES = [
    "2026-01-01T00:00:00.000Z",
    "2026-01-02T00:00:00.000Z",
    "2026-01-03T00:00:00.000Z",
    "yesterday",
    "",
    None,
    b"\x00",
]
CHOICE = st.sampled_from([None, "a", "b"])
TICKETS = st.lists(
    st.tuples(st.sampled_from(TIMES), st.sampled_from(STATES), CHOICE, CHOICE, CHOICE, st.sampled_from("xyz%")),
    max_size=40,
)
FILTERS = st.builds(
    TicketFilter,
    states=st.lists(st.sampled_from(list(TicketState)), max_size=4, unique=True).map(tuple),
    project_id=CHOICE,
    ids=st.lists(st.sampled_from([f"t{n:02}" for n in range(45)]), max_size=5).map(tuple),
    agent_ids=st.lists(st.sampled_from("ab"), max_size=2).map(tuple),
    workflow_ids=st.lists(st.sampled_from("ab"), max_size=1).map(tuple),
    text=st.sampled_from(["", "", "x", "%", "T0", "_"]),
    since=st.sampled_from(["", "", "2026-01-02"]),
    before=st.sampled_from(["", "", "2026-01-03"]),
)


@pytest.fixture(scope="module")
def tx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tx]:
    """The real table and its indexes, without the triggers that set right what other programs write."""
    from swarm.store.sql.migrate import upgrade

    file = tmp_path_factory.mktemp("pages") / "swarm.db"
    connection = SQLITE.connect(f"sqlite:///{file}", True, 1.0)
    with closing(connection):
        upgrade(connection, SQLITE)
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        yield Tx(Connection(driver=connection, write=True), SQLITE)


def fill(tx: Tx, tickets: list[Any]) -> list[dict[str, Any]]:
    driver = tx.connection.driver
    driver.execute("DELETE FROM tickets")
    rows = []
    for number, (at, state, project, agent, workflow, title) in enumerate(tickets):
        row = (f"t{number:02}", at, state, project, agent, workflow, title, None)
        driver.execute(f"INSERT INTO tickets ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})", row)
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def fits(row: dict[str, Any], which: TicketFilter) -> bool:
    at, text = row["created_at"], which.text.lower()
    known = isinstance(at, str) or at is None
    return (
        (not which.states or row["state"] in which.states)
        and (not which.ids or row["id"] in which.ids)
        and (which.project_id is None or row["project_id"] == which.project_id)
        and (not which.agent_ids or row["agent_id"] in which.agent_ids)
        and (not which.workflow_ids or row["workflow_id"] in which.workflow_ids)
        and (not text or text in row["title"] or row["id"].startswith(text))
        and (not which.since or (at is not None and (not known or at >= which.since)))
        and (not which.before or (isinstance(at, str) and at < which.before))
    )


def all_pages(tx: Tx, which: TicketFilter, limit: int, **options: Any) -> list[str]:
    found, after = list[str](), None
    for _ in range(1000):
        some, after = pages.ids(tx, which, after=after, limit=limit, **options)
        assert len(some) <= limit
        found += some
        if after is None:
            return found
    raise AssertionError("it never ends")


@given(
    tickets=TICKETS,
    which=FILTERS,
    limit=st.integers(1, 7),
    scanned=st.sampled_from([3, 10_000]),
    rare=st.sampled_from([0, 1000]),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_every_ticket_once_newest_first(
    tx: Tx, tickets: list[Any], which: TicketFilter, limit: int, scanned: int, rare: int
) -> None:
    rows = [row for row in fill(tx, tickets) if fits(row, which)]
    dated = {row["id"] for row in rows if isinstance(row["created_at"], str)}
    found = all_pages(tx, which, limit, scanned=scanned, rare=rare)
    assert len(found) == len(set(found))
    assert dated <= set(found) <= {row["id"] for row in rows}
    order = {row["id"]: (row["created_at"], row["id"]) for row in rows}
    shown = [order[id] for id in found if id in dated]
    assert shown == sorted(shown, reverse=True)
    counted = pages.count(tx, which)
    assert counted.number == len(rows) and counted.exact
    few = pages.count(tx, which, scanned=scanned)
    assert few.number == len(rows) if few.exact else few.number <= len(rows)


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
@pytest.mark.parametrize("scanned", [3, 4, 9, 10_000])
@pytest.mark.parametrize("rare", [0, 1000])
def test_three_states_at_once(tx: Tx, limit: int, scanned: int, rare: int) -> None:
    """Each is read by its own index, as far as it may be looked at: of none are older ones shown too early."""
    states = ["done"] * 6 + ["failed", "ready", "ready", "done", "failed", "waiting", "cancelled", "ready"]
    rows = fill(tx, [(TIMES[0], state, None, None, None, "x") for state in states])
    for asked in (("done", "failed", "waiting"), ("ready", "done", "cancelled"), ("failed", "done")):
        wanted = [row["id"] for row in reversed(rows) if row["state"] in asked]
        assert all_pages(tx, TicketFilter(states=asked), limit, scanned=scanned, rare=rare) == wanted


def test_tickets_that_go_between_two_pages(tx: Tx) -> None:
    fill(tx, [(TIMES[number % 3], "done", None, None, None, "x") for number in range(20)])
    every = all_pages(tx, TicketFilter(), 50)
    first, after = pages.ids(tx, TicketFilter(), after=None, limit=5)
    gone = {first[-1], every[7]}  # the one that the next page begins behind, and one of that
    for id in gone:
        tx.connection.driver.execute("DELETE FROM tickets WHERE id = ?", (id,))
    second, _ = pages.ids(tx, TicketFilter(), after=after, limit=50)
    assert second == [id for id in every[5:] if id not in gone]


def test_ids_of_other_programs_that_no_address_can_have(tx: Tx) -> None:
    rows = fill(tx, [(TIMES[0], "done", None, None, None, "x")] * 3)
    driver = tx.connection.driver
    driver.execute("UPDATE tickets SET id = ? WHERE id = 't00'", (b"\xff\x00",))
    driver.execute("UPDATE tickets SET id = CAST(X'ff41' AS TEXT) WHERE id = 't01'")
    for limit in (1, 10):
        assert all_pages(tx, TicketFilter(), limit) == [rows[2]["id"]]
    assert [one.id for one in pages.page(tx, TicketFilter(), after=None, limit=10).tickets] == ["t02"]


@pytest.mark.parametrize("after", ["", "x", "bm9uc2Vuc2U", "W10", "WzEsMl0", "\u00fc", "A" * 999])
def test_what_no_page_gave(tx: Tx, after: str) -> None:
    with pytest.raises(UsageError, match="`after` must be"):
        pages.page(tx, TicketFilter(), after=after, limit=10)
