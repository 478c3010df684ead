"""What another program's role may be allowed on PostgreSQL: `swarm db grants`."""

from __future__ import annotations

from typing import Final

from swarm.errors import NotFound, UsageError
from swarm.store.sql.connection import Connection
from swarm.store.sql.database import Database

# Their triggers do the rest with the rights of who made the tables.
TABLES: Final = ("tickets", "ticket_dependencies")
# Of a new sandbox. Not who holds it: with a hold that another one has, that one's engine would lose it.
SANDBOX_COLUMNS: Final = (
    "id", "name", "project_id", "state", "agent_id", "image", "snapshot_id", "parent_id", "memory_mb", "vcpus",
    "disk_mb", "network", "secrets", "env", "labels", "ttl_seconds", "idle_timeout_seconds", "budget_usd",
    "budget_tokens", "requires", "created_by", "created_at",
)  # fmt: skip


def grants(database: Database, connection: Connection, role: str, *, run: bool) -> str:
    """SQL that may run again at any time. Raises UsageError for SQLite, NotFound without such a role."""
    if database.dialect.name != "postgresql":
        raise UsageError(f"{database.place} has no roles: whoever may write to the file, may INSERT")
    driver = connection.driver
    with database.errors(connection):
        found = driver.execute(
            "SELECT quote_ident(rolname), quote_ident(current_schema()) FROM pg_roles WHERE rolname = %s", (role,)
        ).fetchone()
        if found is None:
            raise NotFound(f"the database has no role {role!r}; CREATE ROLE makes one")
        name, schema = found
        tables = ", ".join(f"{schema}.{table}" for table in TABLES)
        sql = (
            f"GRANT USAGE ON SCHEMA {schema} TO {name};\n"
            f"GRANT SELECT, INSERT ON {tables} TO {name};\n"
            f"GRANT SELECT, INSERT ({', '.join(SANDBOX_COLUMNS)}) ON {schema}.sandboxes TO {name};"
        )
        if run:
            driver.execute(sql)
    return sql
