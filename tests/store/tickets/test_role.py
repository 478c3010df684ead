"""A role of PostgreSQL that may INSERT and SELECT tickets, and nothing else: what `swarm db grants` gives."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from swarm.errors import NotFound, StoreError, UsageError
from swarm.store.store import Store
from tests.store import flows
from tests.store.databases import LEASE, Outside, PostgresBackend, shell

ROLE = 'the ci\'s "role"'


@pytest.fixture
async def store(postgresql_url: str) -> AsyncIterator[Store]:
    async with Store.open(postgresql_url) as store:
        yield store


@pytest.fixture
def admin(postgresql: PostgresBackend, postgresql_url: str) -> Iterator[Outside]:
    with contextlib.closing(postgresql.outside(postgresql_url)) as admin:
        with contextlib.suppress(psycopg.errors.DuplicateObject):  # of another test: roles are the server's
            admin.execute('CREATE ROLE "the ci\'s ""role""" LOGIN')
        yield admin


@pytest.fixture
def role_url(postgresql_url: str) -> str:
    return postgresql_url.replace("postgres@", "the%20ci's%20%22role%22@")


@pytest.fixture
async def theirs(postgresql: PostgresBackend, store: Store, admin: Outside, role_url: str) -> AsyncIterator[Outside]:
    """A connection of the role, which may what it is to be allowed."""
    await store.grants(ROLE, run=True)
    with contextlib.closing(postgresql.outside(role_url)) as theirs:
        yield theirs


async def test_before_and_after(
    postgresql: PostgresBackend, store: Store, admin: Outside, role_url: str, postgresql_url: str
) -> None:
    insert = "INSERT INTO tickets (title, state, agent_id) VALUES ('a', 'ready', 'echo') RETURNING id"
    with contextlib.closing(postgresql.outside(role_url)) as theirs:
        with pytest.raises(InsufficientPrivilege):
            theirs.execute(insert)
        script = await store.grants(ROLE)
        with pytest.raises(InsufficientPrivilege):
            theirs.execute(insert)
        await shell(postgresql_url, script)
        ((id_,),) = theirs.execute(insert)
        await store.grants(ROLE, run=True)
        async with store.watching() as wake:
            ((other,),) = theirs.execute(insert)
            assert await wake.changed(timeout_seconds=60)
    assert {claim.ticket.id for claim in await store.claim("w", limit=9, lease_seconds=LEASE)} == {id_, other}
    with pytest.raises(NotFound, match="the database has no role 'nobody'"):
        await store.grants("nobody", run=True)


async def test_sqlite_has_no_roles(tmp_path: Path) -> None:
    async with Store.open(f"sqlite:///{tmp_path}/x.db") as store:
        with pytest.raises(UsageError, match="has no roles"):
            await store.grants("ci")


async def test_what_its_shell_inserts_runs(store: Store, theirs: Outside, role_url: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "title,state,agent_id,created_at,id\na,ready,echo,2026-01-31,\nb,ready,echo,,two\n"
    )
    await shell(
        role_url,
        f"\\copy tickets (title, state, agent_id, created_at, id) FROM '{tmp_path}/rows.csv' CSV HEADER",
        "INSERT INTO tickets (id, title, state, agent_id, created_at) VALUES (NULL, 'c', 'ready', 'echo', now())",
        "INSERT INTO ticket_dependencies (ticket_id, depends_on) VALUES ('after', 'two')",
        "INSERT INTO tickets (id, title, state, agent_id) VALUES ('after', 'd', 'ready', 'echo')",
        "INSERT INTO sandboxes (agent_id) VALUES ('echo')",
        "INSERT INTO sandboxes DEFAULT VALUES",
    )
    assert sorted(await flows.run(store)) == ["main"] * 4
    for ticket in await store.tickets():
        assert ticket.state == "done" and ticket.created_at and ticket.created_at.endswith("Z"), ticket
        assert len(ticket.id) == (32 if ticket.title in "ac" else len(ticket.id))
    assert len(await store.claim_sandboxes("w", "host", lease_seconds=LEASE, limit=9)) == 2


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE tickets SET state = 'done'",
        "DELETE FROM tickets",
        "TRUNCATE tickets",
        "SELECT sealed FROM secrets",
        "SELECT hash FROM tokens",
        "INSERT INTO events (ticket_id, kind) VALUES ('t', 'deleted')",
        "INSERT INTO agents (id, name, version, path, entry) VALUES ('a', 'a', '1', '/', '[]')",
        "UPDATE clock SET offset_ms = 1000000",
        "INSERT INTO sandboxes (hold_id, lease_until) SELECT hold_id, lease_until FROM sandboxes",
        "INSERT INTO sandboxes (secret) VALUES (false)",
        "CREATE TABLE public.mine (id text)",
        "CREATE TRIGGER t AFTER INSERT ON tickets FOR EACH ROW EXECUTE FUNCTION swarm_changed()",
    ],
)
async def test_what_it_may_not(theirs: Outside, sql: str) -> None:
    with pytest.raises(InsufficientPrivilege):
        theirs.execute(sql)


@pytest.mark.parametrize("function", ["ticket_deleted", "ticket_snapshots", "sandbox_deleted", "sandbox_renamed"])
async def test_no_trigger_of_swarm_runs_on_a_table_of_its_own(theirs: Outside, function: str) -> None:
    """It would run with the rights of Swarm's user, for rows that the role makes up."""
    theirs.execute("CREATE TEMP TABLE mine (id text)")
    with pytest.raises(InsufficientPrivilege):
        theirs.execute(f"CREATE TRIGGER t AFTER DELETE ON mine FOR EACH ROW EXECUTE FUNCTION public.swarm_{function}()")


async def test_where_all_roles_may_make_functions_swarm_does_not_work(
    store: Store, admin: Outside, theirs: Outside, postgresql_url: str
) -> None:
    """They would run with its rights: PostgreSQL prefers one whose types fit better than those of its own."""
    admin.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")  # as it is on PostgreSQL 14
    theirs.execute(
        "CREATE FUNCTION public.quote_ident(name) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'theirs'; END $$"
    )
    for function in ("set_config(text, text, bool)", "current_schema()"):  # found first where a path says so
        theirs.execute(f"CREATE FUNCTION public.{function} RETURNS text LANGUAGE sql AS $$ SELECT 'theirs' $$")
    name = postgresql_url.partition("@/")[2].partition("?")[0]
    admin.execute(f"ALTER DATABASE {name} SET search_path = public, pg_catalog")
    with pytest.raises(StoreError, match=r"every role may make functions in the schema public, .* REVOKE CREATE"):
        async with Store.open(postgresql_url) as late:
            await late.queue()
    admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    admin.execute("DROP FUNCTION public.quote_ident(name)")
    async with Store.open(postgresql_url) as late:
        await late.queue()


async def test_its_own_tables_and_functions_are_not_taken_for_swarms(
    store: Store, admin: Outside, theirs: Outside
) -> None:
    """By a path of its own: neither when it inserts, nor when it deletes, with Swarm's rights."""
    theirs.execute("INSERT INTO tickets (id, title) VALUES ('t', 't')")
    admin.execute('GRANT DELETE ON tickets TO "the ci\'s ""role"""')
    for table in ("events", "artifacts", "artifact_uses", "ticket_dependencies", "snapshots"):
        theirs.execute(f"CREATE TEMP TABLE {table} (ticket_id text, digest text, kind text, expires_at int)")
    admin.execute('CREATE SCHEMA theirs AUTHORIZATION "the ci\'s ""role"""')
    for name in ("swarm_created_at(text)", "swarm_time_text(timestamptz)", "clock_timestamp()"):
        theirs.execute(f"CREATE FUNCTION theirs.{name} RETURNS text LANGUAGE sql AS $$ SELECT 'theirs' $$")
    theirs.execute("SET search_path = theirs, public, pg_catalog")
    theirs.execute("INSERT INTO tickets (id, title, created_at) VALUES ('u', 'u', '2026-01-31')")
    theirs.execute("DELETE FROM tickets WHERE id = 't'")
    assert (await store.ticket("u")).created_at == "2026-01-31T00:00:00.000Z"
    assert [event.kind for event in await store.events("t")] == []
    assert admin.execute("SELECT ticket_id, kind FROM events WHERE kind = 'deleted'") == [("t", "deleted")]
