"""The tables: migrations and schema.py agree, other tools need to set few columns, no statement scans finished rows."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from swarm import store as package
from swarm.errors import StoreError
from swarm.store.claims.ready import probe
from swarm.store.sql.database import HEAD, OLDER
from swarm.store.sql.dialect import Sql
from swarm.store.sql.migrate import MIGRATIONS
from swarm.store.sql.postgresql import translate
from swarm.store.sql.schema import metadata
from swarm.store.sql.sqlite import SQLITE
from swarm.store.store import Store
from tests.store.databases import Outside, PostgresBackend

# Without `audit`, whose purpose is to read everything.
MODULES = [
    module.name
    for module in walk_packages(package.__path__, "swarm.store.")
    if not module.ispkg and ".migrations" not in module.name and module.name != "swarm.store.audit"
]
STATEMENTS: dict[str, Sql] = {
    f"{module.rpartition('.')[2]}.{name}": value
    for module in MODULES
    for name, value in vars(import_module(module)).items()
    if isinstance(value, Sql)
} | {"ready.probe": probe(SQLITE)}

# Intended scans of whole tables: tables of a few rows, and lists for people that end at their LIMIT.
SMALL = re.compile(
    r"SCAN (agents|host_files|hosts|notices|packages|secrets|workflows|definitions|schedules|s|tokens|unmet|workers|"
    r"clock|marks|moment|"
    r"pragma_data_version|sqlite_master|alembic_version|CONSTANT ROW|\d+ CONSTANT ROWS?)\b"
)
LIVE_ONLY = re.compile(
    r"SCAN \w+ USING (COVERING )?INDEX "
    r"(tickets_(ready|unfinished|unknown_state)|step_executions_(ready|delayed|waiting)|attempts_lease"
    r"|workflow_runs_(due|live)|sandboxes_(due|ending|held|live|marked))\b"
)

# What a query within reads up to its LIMIT, in the order of an index.
WITHIN_LIMIT = {
    "tickets._OWN_IDS_FROM": ("SCAN t",),
    "views._WAITING_TICKETS": ("SCAN w",),
    "views._COUNT_WAITING": ("SCAN w",),
    "spending._RECENT": ("SCAN c",),
    "overview._EXECUTIONS": ("SCAN e",),
    "display._ENDED_SINCE": ("SCAN a",),
    "views._RECENT": ("SCAN t", "SCAN tickets USING INDEX tickets_created"),
}


def driver_sql(statement: Sql) -> str:
    return statement.replace("IN :ids", "IN (:id_0, :id_1)")


@pytest.mark.sqlite
@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_scans_finished_rows(name: str, url: str) -> None:
    sql = driver_sql(STATEMENTS[name])
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    names = dict.fromkeys(re.findall(r":(\w+)", sql))
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", names)]
    connection.close()
    reads = [line for line in plan if line.startswith("SCAN") and not SMALL.match(line) and not LIVE_ONLY.match(line)]
    if name == "snapshots._OF_HOST":  # as many rows as there are snapshots on disks; once in a while
        reads.remove("SCAN snapshots")
    if name == "ready.probe":  # is there any row at all?
        reads.remove("SCAN ticket_dependencies USING COVERING INDEX ticket_dependencies_depends_on")
    if name.endswith("._TICKETS_THAT_NEED"):  # drafts are in no index; runs only when one is removed
        reads.remove("SCAN tickets USING INDEX tickets_created")
    if name == "tickets._NEWEST_IDS":  # ends at its LIMIT
        reads.remove("SCAN tickets USING COVERING INDEX tickets_created")
    if name in ("sandboxes._NAMES", "snapshots._NAMES"):  # likewise
        reads = [line for line in reads if not line.endswith("s_created")]
    if name in (
        "artifacts._LARGEST",
        "artifacts._UNUSED",
        "artifacts._USES_WITHOUT_TICKET",
        "audit.WITHOUT_ARTIFACTS",
    ):  # for people, and in prune
        reads = [line for line in reads if line not in ("SCAN a", "SCAN u", "SCAN artifacts", "SCAN artifact_uses")]
    if name in WITHIN_LIMIT:
        assert any("LIMIT" in sql[: match.end()] for match in re.finditer(r"\)", sql))
        reads = [line for line in reads if line not in WITHIN_LIMIT[name]]
    assert reads == [], plan
    assert [line for line in plan if "AUTOMATIC" in line] == [], plan


@pytest.mark.sqlite
def test_claims_come_from_the_index_in_order(url: str) -> None:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    values = {"limit": 1, "idle": 1, "drain": 0, "patient_since": "", "silent_since": "", "host": "", "mark": ""}
    for name in ("ready.READY_TICKETS", "ready.READY_STEPS"):
        plan = [r[3] for r in connection.execute(f"EXPLAIN QUERY PLAN {driver_sql(STATEMENTS[name])}", values)]
        assert not any("TEMP B-TREE" in line for line in plan), plan
    connection.close()


@pytest.mark.sqlite
def test_migrations_create_what_schema_says(outside: Outside, tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/schema.db")
    metadata.create_all(engine)
    engine.dispose()
    connection = sqlite3.connect(tmp_path / "schema.db")
    query = "SELECT type, name, sql FROM sqlite_master WHERE type IN ('table', 'index') AND name <> 'alembic_version'"
    expected = {(kind, name): _words(sql) for kind, name, sql in connection.execute(query)}
    connection.close()
    made = {(kind, name): _words(sql) for kind, name, sql in outside.execute(query)}
    made = {key: sql for key, sql in made.items() if "alembic" not in key[1]}
    assert made == expected


def _words(sql: str | None) -> str:
    return re.sub(r"\s*([(),])\s*", r"\1", " ".join((sql or "").split()))  # ADD COLUMN puts a comma elsewhere


def test_the_head_is_the_newest_migration() -> None:
    scripts = ScriptDirectory(str(MIGRATIONS))
    assert scripts.get_current_head() == HEAD
    assert [one.revision for one in scripts.walk_revisions()][:0:-1] == list(OLDER)


def test_no_migration_is_undone() -> None:
    for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions():
        with pytest.raises(StoreError, match="restore the backup"):
            script.module.downgrade()


# --- PostgreSQL -------------------------------------------------------------------------------------------------------

SHAPE = {
    "columns": """SELECT table_name, column_name, ordinal_position, data_type, is_nullable, collation_name,
        CASE WHEN column_default LIKE '%nextval%' THEN 'a number' ELSE column_default END
        FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'""",
    "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'",
    "constraints": """SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conrelid <> 'alembic_version'::regclass""",
}


def test_migrations_create_what_schema_says_on_postgresql(postgresql: PostgresBackend, postgresql_url: str) -> None:
    empty = postgresql.empty()
    engine = sa.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(empty), poolclass=sa.pool.NullPool
    )
    metadata.create_all(engine)
    with psycopg.connect(empty) as expected, psycopg.connect(postgresql_url) as made:
        expected.execute("CREATE TABLE alembic_version (version_num text)")
        for query in SHAPE.values():
            assert sorted(map(str, made.execute(query))) == sorted(map(str, expected.execute(query)))


# Of the plans of PostgreSQL: the indexes that hold live rows alone, the small tables, and the statements that end at
# their LIMIT or are for people, as above.
LIVE_INDEXES = re.compile(
    r"tickets_(ready|unfinished|unknown_state)|step_executions_(ready|delayed|waiting)|attempts_lease"
    r"|workflow_runs_(due|live)|sandboxes_(due|ending|held|live|marked)"
)
SMALL_TABLES = {"agents", "notices", "secrets", "workflows", "definitions", "schedules", "tokens", "workers", "clock"}
SMALL_TABLES |= {"alembic_version", "hosts", "host_files", "unmet"}
WHOLE_READS = {"artifacts._LARGEST", "artifacts._UNUSED", "artifacts._USES_WITHOUT_TICKET", "snapshots._OF_HOST"}
WHOLE_READS |= {"agents._TICKETS_THAT_NEED", "workflows._TICKETS_THAT_NEED", "views._RECENT", "tickets._NEWEST_IDS"}
WHOLE_READS |= {"sandboxes._NAMES", "snapshots._NAMES", "agents._STEPS_THAT_NEED"}
# As long as the planner knows nothing of what the columns hold, which it learns by ANALYZE.
WHOLE_READS |= {"display._NEXT", "dependencies.OPEN_DEPENDANTS"}


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


def planned(connection: psycopg.Connection[Any], statement: Sql) -> list[dict[str, Any]]:
    """The nodes of its general plan."""
    numbers = dict[str, int]()
    sql = re.sub(
        r"%\((\w+)\)s",
        lambda name: f"${numbers.setdefault(name[1], len(numbers) + 1)}",
        translate(driver_sql(statement)).replace("%%", "%"),
    )
    connection.execute(f"PREPARE one AS {sql}".encode())
    values = f"({', '.join(['NULL'] * len(numbers))})" if numbers else ""
    ((found,),) = connection.execute(f"EXPLAIN (FORMAT JSON) EXECUTE one{values}".encode()).fetchall()
    connection.execute("DEALLOCATE one")
    return list(nodes((json.loads(found) if isinstance(found, str) else found)[0]["Plan"]))


def whole_reads(connection: psycopg.Connection[Any], statement: Sql) -> list[str]:
    """What it reads from end to end, and is not small."""
    return [
        f"{node['Node Type']} {node.get('Index Name', node.get('Relation Name'))}"
        for node in planned(connection, statement)
        if (node["Node Type"] == "Seq Scan" and node["Relation Name"] not in SMALL_TABLES)
        or (
            "Index Name" in node
            and "Index Cond" not in node
            and not LIVE_INDEXES.fullmatch(node["Index Name"])
            and node.get("Relation Name") not in SMALL_TABLES
        )
    ]


async def test_a_schema_of_any_name(postgresql: PostgresBackend) -> None:
    url = f"{postgresql.empty()}&options=-csearch_path%3D%22Mine%22"
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute('CREATE SCHEMA "Mine"')
        async with Store.open(url) as store:
            await store.migrate()
            assert await store.audit(lambda facts: facts.missing()) == []


def test_no_statement_scans_finished_rows_on_postgresql(postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        # As new, whatever tests it had before: then the planner expects ten pages in each.
        connection.execute(f"TRUNCATE {', '.join(metadata.tables)}".encode())
        connection.execute("SET plan_cache_mode = force_generic_plan")
        for way in ("seqscan", "hashjoin", "mergejoin", "material", "memoize", "bitmapscan"):
            connection.execute(f"SET enable_{way} = off".encode())
        found = dict[str, list[str]]()
        for name, statement in STATEMENTS.items():
            if name != "ready.probe" and (reads := whole_reads(connection, statement)):
                found[name] = reads
    assert {name: reads for name, reads in found.items() if name not in WHOLE_READS} == {}


def test_claims_come_from_the_index_in_order_on_postgresql(postgresql_url: str) -> None:
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute("SET enable_seqscan = off")
        connection.execute("SET enable_bitmapscan = off")
        for name in ("ready.READY_TICKETS", "ready.READY_STEPS"):
            kinds = {node["Node Type"] for node in planned(connection, STATEMENTS[name])}
            assert not any("Sort" in kind for kind in kinds), (name, kinds)


def test_few_columns_need_values(outside: Outside) -> None:
    outside.execute("INSERT INTO tickets (id, title, state, agent_id) VALUES ('t', 't', 'ready', 'a')")
    outside.execute("INSERT INTO tickets (id) VALUES ('u')")
    outside.execute("INSERT INTO agents (id, name, version, path, entry) VALUES ('a', 'a', '1', '/x', '[\"x\"]')")
    outside.execute("INSERT INTO workflows (id, name, version) VALUES ('w', 'w', '1')")
    ((created, updated, mode, state),) = outside.execute(
        "SELECT created_at, updated_at, execution_mode, state FROM tickets WHERE id = 'u'"
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", created) and created == updated
    assert (mode, state) == ("agent", "draft")
    assert not outside.accepts("INSERT INTO tickets (id) VALUES ('t')")


@pytest.mark.parametrize("there", [None, 0o640])
async def test_a_new_database_is_private(tmp_path: Path, there: int | None) -> None:
    """In any directory, whatever the umask; a file that is there keeps its permissions."""
    file, before = tmp_path / "swarm.db", os.umask(0)
    try:
        tmp_path.chmod(0o755)
        if there is not None:
            file.touch(there)
        async with Store.open(f"sqlite:///{file}") as store:
            await store.migrate()
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("swarm.db", "swarm.db-wal", "swarm.db-shm"), 0o600 if there is None else there)
