"""PostgreSQL takes the changes of many rows as one statement: what comes out is what came out row by row."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from swarm.store.claims import claim, finish
from swarm.store.sql.connection import Connection
from swarm.store.sql.database import Database
from swarm.store.sql.dialect import Sql
from swarm.store.sql.together import FEWEST, together
from swarm.store.sql.transaction import one_row
from swarm.store.tickets import changes, events
from tests.store.databases import Outside, PostgresBackend
from tests.store.sql.test_schema import STATEMENTS

pytestmark = [pytest.mark.needs("postgres"), pytest.mark.slow]  # starts a server

HOT: tuple[Sql, ...] = (
    claim.INSERT_RUN,
    claim.INSERT_STEP,
    claim.START_STEP,
    claim.START_TICKET,
    changes.INSERT_ATTEMPT,
)
HOT += (changes.INSERT_EVENT, events.APPEND, events.APPEND_OF_SANDBOX)
HOT += tuple(vars(changes)[name] for name in ("_INSERT_TRANSITION", "_END_ATTEMPT", "_END_STEP", "_END_RUN"))
HOT += (vars(changes)["_SET_TICKET"], vars(finish)["_EXTEND"], vars(finish)["_SET_VM"], vars(finish)["_SET_STEP_VM"])
ODD = ["", "a", None, "'\"\\{}%s %(a)s :title ${x}", "ä😀\n\t\x01", "[1]", "null", '{"a": "\\u00e4"}', " "]
ADD_VM_TIME = Sql(vars(changes)["_ADD_VM_TIME"])


@pytest.fixture
def outside(postgresql: PostgresBackend, postgresql_url: str) -> Iterator[Outside]:
    outside = postgresql.outside(postgresql_url)
    yield outside
    outside.close()


@pytest.fixture
def database(postgresql_url: str) -> Database:
    return Database(postgresql_url, busy_timeout_seconds=30.0)


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    connection = database.connect(write=True)
    yield connection
    connection.close()


def test_the_server_knows_the_types_of_every_statement(connection: Connection) -> None:
    """And what each claim and each end of a ticket changes is among those."""
    done = set[Sql]()
    for statement in STATEMENTS.values():
        names = dict.fromkeys(re.findall(r"(?<!:):([a-z_]\w*)", statement))
        rows = [dict.fromkeys(names, str(number)) for number in range(FEWEST)]
        if (found := together(connection.driver, statement, rows)) is not None:
            connection.driver.execute(f"EXPLAIN {found[0]}", found[1])
            done.add(statement)
    assert done >= set(HOT) and len(done) < len(STATEMENTS)


def written(database: Database, connection: Connection, statement: Sql, rows: list[dict[str, Any]], size: int) -> None:
    with database.transaction(connection) as tx:
        for start in range(0, len(rows), size):
            tx.many(statement, rows[start : start + size])
            tx.write()


def test_values_come_out_as_they_went_in(database: Database, connection: Connection, outside: Outside) -> None:
    insert = one_row(
        "INSERT INTO tickets (id, title, state, description, priority, budget_usd, inputs) "
        "VALUES (:id, :text, 'draft', :other, :number, :real, ' :text%')"
    )
    numbers = itertools.cycle([0, 1, -1, 2**31 - 1, 70_000])
    reals = itertools.cycle([0.1, 1e-300, 123456789.123456789, 7, None, 1 / 3])
    values = [
        {"text": one or "-", "other": two, "number": next(numbers), "real": next(reals)}
        for one, two in itertools.product(ODD, ODD)
    ]
    for kind, size in (("one", 1), ("many", len(values))):
        rows = [{"id": f"{kind}-{number}", **row} for number, row in enumerate(values)]
        written(database, connection, insert, rows, size)
    read = (
        "SELECT title, description, priority, budget_usd, inputs FROM tickets WHERE id LIKE ? ORDER BY length(id), id"
    )
    assert outside.execute(read, ("many-%",)) == outside.execute(read, ("one-%",)) != []
    update = one_row("UPDATE tickets SET description = COALESCE(:text, description), priority = :number WHERE id = :id")
    for kind, size in (("one", 1), ("many", len(values))):
        rows = [{"id": f"{kind}-{number}", **row} for number, row in enumerate(reversed(values))]
        written(database, connection, update, rows, size)
    assert outside.execute(read, ("many-%",)) == outside.execute(read, ("one-%",))


def test_events_keep_their_order(database: Database, connection: Connection, outside: Outside) -> None:
    rows = [
        {"ticket_id": "t", "step_id": None, "attempt_id": "a", "at": "now", "kind": "log", "data": str(number)}
        for number in range(300)
    ]
    outside.execute(
        "INSERT INTO tickets (id, title, state) SELECT 'x' || n, 'x', 'draft' FROM generate_series(1, 500) n"
    )
    for id_ in ("t", "u"):
        outside.execute("INSERT INTO tickets (id, title, state) VALUES (?, 'x', 'draft')", (id_,))
    # Those of a ticket that is not there are left out.
    mixed = [{**row, "ticket_id": ("t", "u", "gone")[number % 3]} for number, row in enumerate(rows)]
    for statement, some in ((changes.INSERT_EVENT, rows), (events.APPEND, mixed)):
        outside.execute("DELETE FROM events")
        written(database, connection, statement, some, 256)
        expected = [(row["data"],) for row in some if row["ticket_id"] != "gone"]
        assert outside.execute("SELECT data FROM events WHERE kind = 'log' ORDER BY seq") == expected


def test_two_changes_of_one_row_both_count(database: Database, connection: Connection, outside: Outside) -> None:
    outside.execute("INSERT INTO tickets (id, title, state) VALUES ('t', 'x', 'draft')")
    for id_ in ("r", "s", "q"):
        outside.execute("INSERT INTO workflow_runs (id, ticket_id, status) VALUES (?, 't', 'running')", (id_,))
    rows = [{"id": id_, "vm_time_ms": 1.5} for id_ in ("r", "s", "r", "q", "r")]
    written(database, connection, ADD_VM_TIME, rows, len(rows))
    assert outside.execute("SELECT id, total_vm_time_ms FROM workflow_runs ORDER BY id") == [
        ("q", 1.5),
        ("r", 4.5),
        ("s", 1.5),
    ]


@pytest.mark.parametrize("count", [1, 2, FEWEST, 50])
def test_a_change_of_no_row_undoes_all(
    database: Database, connection: Connection, outside: Outside, count: int
) -> None:
    """The COMMIT that is sent together with it does nothing."""
    outside.execute(
        "INSERT INTO tickets (id, title, state) SELECT 't' || n, 'x', 'draft' FROM generate_series(1, 50) n"
    )
    statement = one_row("UPDATE tickets SET title = :title WHERE id = :id")
    missing = [{"id": f"t{number}" if number < count else "none", "title": "new"} for number in range(1, count + 1)]
    refused = pytest.raises(psycopg.Error, match="a trigger ignored it, or removed the row")
    with refused, database.transaction(connection) as tx:
        tx.run(changes.INSERT_EVENT, ticket_id="t1", step_id=None, attempt_id=None, at="", kind="log", data="")
        tx.many(statement, missing)
    assert outside.execute("SELECT count(*) FROM tickets WHERE title = 'new'") == [(0,)]
    assert outside.execute("SELECT count(*) FROM events WHERE kind = 'log'") == [(0,)]
    with database.transaction(connection) as tx:  # and the connection is as good as before
        tx.many(statement, missing[:-1])
    assert outside.execute("SELECT count(*) FROM tickets WHERE title = 'new'") == [(count - 1,)]


def test_what_was_read_ahead_is_read_again_after_a_change(
    database: Database, connection: Connection, outside: Outside
) -> None:
    outside.execute("INSERT INTO tickets (id, title, state) VALUES ('t', 'old', 'draft')")
    titles, ids = Sql("SELECT title FROM tickets LIMIT :limit"), Sql("SELECT id FROM tickets LIMIT :limit")
    with database.transaction(connection) as tx:
        tx.ahead([(titles, {"limit": 5}), (ids, {"limit": 5})])
        outside.execute("UPDATE tickets SET title = 'theirs'")
        assert [row.title for row in tx.all(titles, limit=5)] == ["old"]
        tx.run(Sql("INSERT INTO tickets (id, title, state) VALUES (:id, 'own', 'draft')"), id="u")
        assert {row.id for row in tx.all(ids, limit=5)} == {"t", "u"}
        tx.ahead([(titles, {"limit": 5}), (ids, {"limit": 6})])
        assert len(tx.all(titles, limit=1)) == 1


def test_bytes_go_row_by_row(connection: Connection) -> None:
    rows = [{"id": f"t{number}", "title": b"bytes"} for number in range(FEWEST)]
    assert together(connection.driver, "INSERT INTO tickets (id, title) VALUES (:id, :title)", rows) is None
