"""The store suite knows databases by one class only: `Backend`. A second database adds a second one.

`Outside` is another program that uses the same database: a driver and plain SQL, no code of Swarm.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest

from swarm.base.process import run
from swarm.ledger import Account
from swarm.model import ECHO_AGENT_ID, Agent, Claim, Failed, FailureReason, RetryPolicy
from swarm.store.sql.postgresql import translate
from swarm.store.store import Store
from tests import postgres_here

ECHO = Agent(id=ECHO_AGENT_ID, name="echo", version="1.0.0", path=Path("/nowhere/echo"), entry=("main.py",))
RETRY = Agent(
    id="retry-agent",
    name="retry",
    version="1.0.0",
    path=Path("/nowhere/retry"),
    entry=("main.py",),
    retry=RetryPolicy(max_attempts=3, delay_seconds=10, factor=2, max_delay_seconds=15),
)
LEASE = 30.0


class Outside(Protocol):
    typed: bool  # does each column have its type of values?

    def execute(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> list[tuple[Any, ...]]: ...

    def refuses(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> bool:
        """Execute it, where the database takes it: SQLite keeps a text in a column of numbers, and knows no foreign
        keys here. PostgreSQL must refuse it: then there is nothing to test."""

    def accepts(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> bool:
        """Execute it; False if the database refuses such a value there."""

    def columns(self, table: str) -> list[str]: ...

    def script(self, sql: str) -> None:
        """Several statements, as a person types them."""

    def now_ms(self) -> int:
        """By the database's clock (table `clock`)."""

    def close(self) -> None: ...


class Backend(Protocol):
    """Where test databases come from. ``share``: of the examples that a test of very many tries here."""

    share: float

    def close(self) -> None: ...

    def new(self) -> str:
        """URL of a fresh database, migrated, with the agents `ECHO` and `RETRY`."""

    def empty(self) -> str:
        """URL of a database that is not migrated."""

    def outside(self, url: str) -> Outside: ...

    def done(self) -> None:
        """A test has ended: what it was given may be given to the next one."""


class SqliteOutside:
    """Like the sqlite3 shell: every statement its own transaction, foreign keys off."""

    typed = False

    def __init__(self, url: str) -> None:
        self._connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=60)
        self._connection.text_factory = bytes  # the stored bytes, valid or not

    def execute(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        rows = self._connection.execute(sql, values).fetchall()
        return [tuple(v.decode(errors="replace") if isinstance(v, bytes) else v for v in row) for row in rows]

    def refuses(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> bool:
        self.execute(sql, values)
        return False

    def accepts(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> bool:
        with contextlib.suppress(sqlite3.IntegrityError):
            self.execute(sql, values)
            return True
        return False

    def columns(self, table: str) -> list[str]:
        return [name for (name,) in self.execute("SELECT name FROM pragma_table_info(?)", (table,))]

    def script(self, sql: str) -> None:
        self._connection.executescript(sql)

    def now_ms(self) -> int:
        ((ms,),) = self.execute(
            "SELECT CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) + offset_ms FROM clock"
        )
        return int(ms)

    def close(self) -> None:
        self._connection.close()


class SqliteBackend:
    share = 1.0

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._template = directory / "template.db"
        self._made = 0
        asyncio.run(self._make_template())

    async def _make_template(self) -> None:
        async with Store.open(f"sqlite:///{self._template}") as store:
            await store.migrate()
            for agent in (ECHO, RETRY):
                await store.put_agent(agent)

    def _next(self) -> Path:
        self._made += 1
        return self._directory / f"{self._made}.db"

    def new(self) -> str:
        return f"sqlite:///{shutil.copy(self._template, self._next())}"

    def empty(self) -> str:
        return f"sqlite:///{self._next()}"

    def outside(self, url: str) -> Outside:
        return SqliteOutside(url)

    def done(self) -> None:
        pass

    def close(self) -> None:
        pass


_TRIGGER = re.compile(
    r"""\s*CREATE\ TRIGGER\ (?P<name>\w+)\s+(?P<event>(?:BEFORE|AFTER)\ .*?\ ON\ \w+)\s+(?:WHEN\ (?P<when>.*?)\s+)?
        BEGIN\ (?P<body>.*);\ END\s*""",
    re.X | re.S,
)
_REPLACE = re.compile(r"INSERT OR REPLACE INTO \w+ \((.*?)\).*", re.S)
_OTHER = (
    (re.compile(r"SELECT RAISE\(IGNORE\)"), "RETURN NULL"),
    (re.compile(r"SELECT RAISE\(\w+, ('.*?')\)"), r"RAISE EXCEPTION USING MESSAGE = \1"),
    (re.compile(r"\ASELECT "), "PERFORM "),
)


def _as_psql(sql: str) -> str:
    """What another program does to SQLite, as one would do it to PostgreSQL."""
    if found := _TRIGGER.fullmatch(sql):
        body = found["body"]
        for pattern, other in _OTHER:
            body = pattern.sub(other, body)
        when = f"WHEN ({found['when']})" if found["when"] else ""
        return f"""
            CREATE FUNCTION theirs_{found["name"]}() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN {body}; RETURN coalesce(NEW, OLD); END $$;
            CREATE TRIGGER {found["name"]} {found["event"]} FOR EACH ROW {when}
            EXECUTE FUNCTION theirs_{found["name"]}()"""
    if found := re.fullmatch(r"DROP TRIGGER (\w+)", sql):
        return f"DROP FUNCTION theirs_{found[1]}() CASCADE"
    if found := _REPLACE.fullmatch(sql):
        columns = ", ".join(f"{name} = excluded.{name}" for name in found[1].split(", "))
        return f"{sql.replace('OR REPLACE ', '')} ON CONFLICT (id) DO UPDATE SET {columns}"
    return sql.replace("datetime('now')", "CAST(now() AS text)")


_REFUSALS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.DatatypeMismatch)


class PostgresOutside:
    """Like psql: every statement its own transaction."""

    typed = True

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True, cursor_factory=psycopg.ClientCursor)

    def execute(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        sql = _as_psql(sql)
        text = translate(sql) if isinstance(values, Mapping) else sql.replace("%", "%%").replace("?", "%s")
        with self._connection.cursor() as cursor:
            cursor.execute(text, values)
            return cursor.fetchall() if cursor.description is not None else []

    def refuses(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> bool:
        with pytest.raises(_REFUSALS):
            self.execute(sql, values)
        return True

    def accepts(self, sql: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> bool:
        with contextlib.suppress(*_REFUSALS):
            self.execute(sql, values)
            return True
        return False

    def columns(self, table: str) -> list[str]:
        sql = "SELECT column_name FROM information_schema.columns WHERE table_name = ? ORDER BY ordinal_position"
        return [name for (name,) in self.execute(sql, (table,))]

    def script(self, sql: str) -> None:
        self._connection.execute(sql.encode())

    def now_ms(self) -> int:
        ((ms,),) = self.execute("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000) + offset_ms FROM clock")
        return int(ms)

    def close(self) -> None:
        self._connection.close()


# Of one database: its tables; a text that changes with its tables, triggers, functions and settings; and what ends the
# connections of others.
_TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
_OWN = " UNION ALL ".join(
    f"SELECT '{catalog}' || oid || '.' || xmin FROM {catalog} WHERE oid >= 16384"
    for catalog in ("pg_class", "pg_trigger", "pg_proc", "pg_constraint", "pg_attrdef", "pg_namespace")
)
_SHAPE = f"""SELECT md5(string_agg(x, ',' ORDER BY x)) FROM ({_OWN} UNION ALL SELECT setconfig::text
FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase WHERE datname = current_database()) AS own(x)"""
_END_OTHERS = """SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""


# New rows fill the gaps between old ones, so equal ones would come in any order.
_HAS_GROWN = "SELECT pg_relation_size('public.step_executions') > 40000"


class _Reusable:
    """A database that is emptied instead of made anew, which takes 30 times as long."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = psycopg.connect(url, autocommit=True)
        self._connection.execute("SET session_replication_role = replica")  # no triggers
        reset = ["SELECT setval('events_seq_seq', 1, false)"]
        for (name,) in self._connection.execute(_TABLES).fetchall():
            self._connection.execute(f"CREATE TEMP TABLE first_{name} AS TABLE public.{name}")
            reset.append(f"DELETE FROM {name}")
            if self._connection.execute(f"SELECT FROM {name} LIMIT 1").fetchall():
                reset.append(f"INSERT INTO {name} TABLE first_{name}")
        self._reset = "; ".join(reset)
        self._shape = self._connection.execute(_SHAPE).fetchall()

    def reset(self) -> bool:
        """As it was at first; False if it can't be, or has grown: then it is closed."""
        try:
            self._connection.execute(_END_OTHERS)
            has_grown = self._connection.execute(_HAS_GROWN).fetchall() != [(False,)]
            if not has_grown and self._connection.execute(_SHAPE).fetchall() == self._shape:
                self._connection.execute(self._reset)
                return True
        except psycopg.Error:
            pass
        self.close()
        return False

    def close(self) -> None:
        self._connection.close()


class PostgresBackend:
    share = 0.2

    def __init__(self, directory: Path, **settings: str) -> None:
        self._stack = contextlib.ExitStack()
        self.server = self._stack.enter_context(postgres_here.running(directory / "postgresql", **settings))
        self._made = 0
        self._free, self._given = list[_Reusable](), list[_Reusable]()
        try:
            self._template = self.empty()
            asyncio.run(self._make_template())
        except BaseException:
            self.close()
            raise

    async def _make_template(self) -> None:
        async with Store.open(self._template) as store:
            await store.migrate()
            for agent in (ECHO, RETRY):
                await store.put_agent(agent)

    def empty(self) -> str:
        return self._make("template0")

    def new(self) -> str:
        if not self._free:
            self._free.append(_Reusable(self._make(self._template.partition("@/")[2].partition("?")[0])))
        self._given.append(self._free.pop())
        return self._given[-1].url

    def _make(self, template: str) -> str:
        self._made += 1
        name = f"test_{self._made}"
        with psycopg.connect(self.server.url(), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.server.url(name)

    def outside(self, url: str) -> Outside:
        return PostgresOutside(url)

    def done(self) -> None:
        self._free += [database for database in self._given if database.reset()]
        self._given.clear()

    def close(self) -> None:
        for database in (*self._free, *self._given):
            database.close()
        self._stack.close()


def database_of_hosts(request: pytest.FixtureRequest, kind: str, place: Path) -> tuple[str, Callable[[str], Outside]]:
    """The URL of an empty one that the hosts of a test share, the first of which has its home in ``1``."""
    if kind == "sqlite":
        return f"sqlite:///{place}/1/data/swarm.db", SqliteOutside
    backend: PostgresBackend = request.getfixturevalue("postgresql")
    return backend.empty(), backend.outside


def insert(outside: Outside, id: str, **columns: Any) -> None:
    """A ready ticket for the echo agent, as another tool inserts it; ``columns`` override or add."""
    outside.execute(*inserted(id, **columns))


def inserted(id: str, **columns: Any) -> tuple[str, Mapping[str, Any]]:
    values = {"id": id, "title": "a test", "state": "ready", "agent_id": ECHO.id} | columns
    names = ", ".join(values)
    return f"INSERT INTO tickets ({names}) VALUES ({', '.join(':' + name for name in values)})", values


async def shell(url: str, *statements: str) -> str:
    """The database's own shell, as a person uses it; what it prints."""
    if url.startswith("sqlite"):
        if shutil.which("sqlite3") is None:
            pytest.skip("needs the sqlite3 shell")
        argv = ["sqlite3", url.removeprefix("sqlite:///"), *statements]
    else:
        directory = postgres_here.programs()
        assert directory is not None
        argv = [str(directory / "psql"), "-XAtqd", url, *(part for one in statements for part in ("-c", one))]
    return (await run(argv)).stdout.decode()


async def claimed(
    store: Store, worker: str = "worker", *, limit: int = 1, seconds: float = LEASE, **options: Any
) -> list[Claim]:
    return await store.claim(worker, limit=limit, lease_seconds=seconds, **options)


async def claim_one(store: Store, worker: str = "worker", **options: Any) -> Claim:
    (claim,) = await store.claim(worker, lease_seconds=LEASE, **options)
    return claim


def account_of(claim: Claim, **others: Any) -> Account:
    """On which the model calls of its attempt are booked."""
    return Account(
        ticket_id=claim.ticket.id, run_id=claim.run_id, step_execution_id=claim.step_execution_id,
        step_id=claim.step_id, attempt_id=claim.attempt_id, agent_id=claim.agent.id, agent_name=claim.agent.name,
        **others,
    )  # fmt: skip


def failed(reason: FailureReason = FailureReason.AGENT_FAILED, message: str = "it broke") -> Failed:
    return Failed(reason=reason, message=message)


def left_overs(outside: Outside) -> int:
    """The number of rows whose parent row is gone."""
    ((count,),) = outside.execute("""
        SELECT (SELECT count(*) FROM workflow_runs WHERE ticket_id NOT IN (SELECT id FROM tickets))
             + (SELECT count(*) FROM step_executions WHERE run_id NOT IN (SELECT id FROM workflow_runs))
             + (SELECT count(*) FROM attempts WHERE step_execution_id NOT IN (SELECT id FROM step_executions))""")
    return int(count)
