"""Statements that are sent together: the same answers as psycopg's own, and what goes wrong."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from swarm.store.sql.dialect import Statement
from swarm.store.sql.exchange import Exchange
from tests.store.databases import PostgresBackend

pytestmark = [pytest.mark.needs("postgres"), pytest.mark.slow]  # starts a server

VALUES = [
    None, 0, -1, 32767, 32768, 1 << 31, -(1 << 62), 1 << 63, 10**30, 0.0, -1.5, 1e300, float("inf"), True, False, "",
    "a", "é\n\t", "%s %(a)s $1 %%", "x" * 100_000, "\ud7ff\U0010ffff", b"", b"\0\xff", [1, 2], ["a", "b"], [], "1",
]  # fmt: skip

BEGIN = "BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE"


@pytest.fixture
def connection(postgresql: PostgresBackend) -> Iterator[Exchange]:
    with Exchange.connect(postgresql.new(), autocommit=True) as connection:
        yield connection


def one(connection: Exchange, text: str, **values: Any) -> list[tuple[Any, ...]]:
    (answer,), error = connection.exchange([(text, values, True)])
    assert error is None
    assert answer.fetchall() == list(answer)
    found: list[tuple[Any, ...]] = answer.fetchall()
    return found


def prepared(connection: Exchange) -> int:
    [(count,)] = connection.execute("SELECT count(*) FROM pg_prepared_statements", prepare=False).fetchall()
    return int(count)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_values_come_and_go_as_psycopgs_own(connection: Exchange, value: object) -> None:
    text = "SELECT v, pg_typeof(v)::text AS kind, '100%%' AS percent, %(value)s AS again FROM (SELECT %(value)s AS v) x"
    expected = connection.execute(text, {"value": value})
    for _ in range(3):  # as it is, prepared, and from what was prepared
        assert one(connection, text, value=value) == expected.fetchall()
        expected = connection.execute(text, {"value": value})
    (answer,), _ = connection.exchange([(text, {"value": value}, True)])
    assert answer.description == [("v",), ("kind",), ("percent",), ("again",)]
    assert answer.statusmessage == expected.statusmessage == "SELECT 1"


def test_a_statement_with_values_of_other_types(connection: Exchange) -> None:
    for value in (1, "a", 1 << 40, None, 2.5, "b", 1, None) * 3:
        assert one(connection, "SELECT %(v)s", v=value) == [(value,)]
    assert 3 <= prepared(connection) <= 6


def test_much_goes_both_ways_at_once(connection: Exchange) -> None:
    """More than the socket takes, so whoever only writes, or only reads, waits for ever."""
    texts = [f"{number}" + "x" * (1 << 20) for number in range(24)]
    answers, error = connection.exchange([("SELECT %(v)s", {"v": text}, False) for text in texts])
    assert error is None
    assert [answer.fetchone() for answer in answers] == [(text,) for text in texts]
    (answer,), error = connection.exchange([("SELECT generate_series(1, 200000)", (), True)])
    assert error is None
    assert sum(number for (number,) in answer) == 200_000 * 200_001 // 2


@pytest.mark.parametrize("prepare", [False, True])
def test_nothing_is_executed_after_an_error(connection: Exchange, prepare: bool) -> None:
    connection.execute("CREATE TABLE numbers (n integer PRIMARY KEY)")
    insert = "INSERT INTO numbers VALUES (%(n)s)"
    for _ in range(3):
        statements: list[Statement] = [
            ("BEGIN", {}, False),
            *((insert, {"n": n}, prepare) for n in (1, 2, 2, 3)),
            ("COMMIT", (), False),
        ]
        answers, error = connection.exchange(statements)
        assert [answer.statusmessage for answer in answers] == ["BEGIN", "INSERT 0 1", "INSERT 0 1"]
        assert isinstance(error, psycopg.errors.UniqueViolation)
        assert "(n)=(2)" in str(error)
        connection.rollback()
        assert one(connection, "SELECT * FROM numbers") == []
    answers, error = connection.exchange([("SELECT", {}, prepare), ("SELEKT", {}, prepare), ("SELECT", {}, prepare)])
    assert (len(answers), type(error)) == (1, psycopg.errors.SyntaxError)


def test_after_a_commit_only_what_follows_fails(connection: Exchange) -> None:
    connection.execute("CREATE TABLE numbers (n integer)")
    sent = ["BEGIN", "INSERT INTO numbers VALUES (1)", "COMMIT", "SELECT 1 / 0", "INSERT INTO numbers VALUES (2)"]
    answers, error = connection.exchange([(text, (), False) for text in sent])
    assert [answer.statusmessage for answer in answers] == ["BEGIN", "INSERT 0 1", "COMMIT"]
    assert isinstance(error, psycopg.errors.DivisionByZero)
    assert one(connection, "SELECT * FROM numbers") == [(1,)]


def test_what_can_not_be_sent_is_refused_before_anything_is(connection: Exchange) -> None:
    connection.execute("CREATE TABLE numbers (n integer)")
    for value in ("\0", object()):
        with pytest.raises(psycopg.Error):
            connection.exchange([("INSERT INTO numbers VALUES (1)", {}, False), ("SELECT %(v)s", {"v": value}, False)])
    assert one(connection, "SELECT * FROM numbers") == []


def test_the_oldest_of_many_prepared_statements_is_forgotten(connection: Exchange) -> None:
    connection.most_known = 20
    for number in range(100):
        for _ in range(3):
            sent: list[Statement] = [
                (BEGIN, (), False),
                (f"SELECT {number} + %(v)s", {"v": 1}, True),
                ("COMMIT", (), False),
            ]
            answers, error = connection.exchange(sent)
            assert (answers[1].fetchall(), error) == ([(number + 1,)], None)
            assert one(connection, "SELECT %(often)s", often=1) == [(1,)]
        assert prepared(connection) <= 21
    assert prepared(connection) > 10
    assert connection.execute("SELECT name FROM pg_prepared_statements WHERE statement LIKE '%%$1'").fetchall()
    answers, error = connection.exchange([("SELEKT", (), False)])  # the names of what is forgotten wait
    assert one(connection, "SELECT %(often)s", often=1) == [(1,)]


def test_an_error_at_the_end_is_told(connection: Exchange) -> None:
    connection.execute("CREATE TABLE a (n integer PRIMARY KEY)")
    connection.execute("CREATE TABLE b (n integer REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
    for text in (["INSERT INTO b VALUES (1)"], [BEGIN, "INSERT INTO b VALUES (1)", "COMMIT"]):
        _, error = connection.exchange([(one, (), False) for one in text])
        assert isinstance(error, psycopg.errors.ForeignKeyViolation)
        assert one(connection, "SELECT * FROM b") == []


def test_nothing_is_prepared_where_sessions_are_shared(connection: Exchange) -> None:
    connection.prepares = False
    for _ in range(10):
        assert one(connection, "SELECT %(v)s", v=1) == [(1,)]
    assert prepared(connection) == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"Z" + struct.pack("!I", 0xFFFFFF) + b"x" * 50,
        b"1\0\0\0\4" + b"D" + struct.pack("!I", 0x7FFFFFFF),
        b"1\0\0",
        b"",
    ],
    ids=["no message", "a row too long", "a part", "none"],
)
def test_a_server_that_answers_what_it_may_not(tmp_path: Path, answer: bytes) -> None:
    """libpq gives the connection up."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!I", 4 + len(body)) + body

    def serve() -> None:
        with listening.accept()[0] as server:
            server.recv(65536)
            said = {b"server_version": b"15.0", b"client_encoding": b"UTF8"}
            parameters = [message(b"S", name + b"\0" + value + b"\0") for name, value in said.items()]
            server.sendall(
                b"".join([message(b"R", bytes(4)), *parameters, message(b"K", bytes(8)), message(b"Z", b"I")])
            )
            server.recv(65536)
            server.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / ".s.PGSQL.5432"))
        listening.listen()
        serving = threading.Thread(target=serve)
        serving.start()
        with Exchange.connect(f"host={tmp_path} dbname=x user=x", autocommit=True) as connection:
            answers, error = connection.exchange([("SELECT 1", (), False), ("SELECT 2", (), False)])
            serving.join()
            assert answers == []
            assert isinstance(error, MemoryError if answer[5:6] == b"D" else psycopg.OperationalError)
            assert connection.exchange([("SELECT 1", (), False)])[1]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_connection_that_is_lost(connection: Exchange, postgresql: PostgresBackend, when: str) -> None:
    pid, url = connection.info.backend_pid, postgresql.server.url()

    def end() -> None:
        with psycopg.connect(url, autocommit=True) as other:
            while (
                when == "meanwhile"
                and not other.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'", [pid]
                ).fetchall()
            ):
                pass
            other.execute("SELECT pg_terminate_backend(%s, 60000)", [pid])

    ending = threading.Thread(target=end)
    ending.start()
    if when == "before":
        ending.join()
    answers, error = connection.exchange([("SELECT 1", (), True), ("SELECT pg_sleep(300)", (), True)])
    ending.join()
    assert len(answers) == (when == "meanwhile")
    assert isinstance(error, psycopg.OperationalError)
    with pytest.raises(psycopg.Error):
        connection.execute("SELECT 1")
