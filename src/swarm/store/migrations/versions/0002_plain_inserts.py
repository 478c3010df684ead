"""Tickets by plain INSERTs: an id by itself, and a created_at that sorts, however another tool writes it. Pages of
tickets, and tokens for the API."""

from alembic import op

from swarm.store.migrations import no_way_back

revision = "v0_2_0"
down_revision = "v0_1_0"
branch_labels = None
depends_on = None

_NUMBERS = ("timeout_seconds", "max_attempts", "budget_usd", "budget_tokens")
# What other tools write: CURRENT_TIMESTAMP, a local time with its offset, microseconds, nothing (an empty field of a
# CSV file). What is no time stays as it is.
_ODD = "coalesce(NEW.created_at, '') NOT GLOB '????-??-??T??:??:??.???Z'"
_CREATED = """created_at = CASE WHEN coalesce(NEW.created_at, '') = '' THEN strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
    ELSE coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', CASE WHEN NEW.created_at GLOB '????-??-??*' THEN NEW.created_at END),
      NEW.created_at) END"""
_INSERTED = f"""
CREATE TRIGGER tickets_inserted AFTER INSERT ON tickets
WHEN {_ODD} OR '' IN ({", ".join(f"NEW.{name}" for name in ("priority", *_NUMBERS))})
BEGIN
  UPDATE tickets SET {", ".join(f"{name} = nullif(NEW.{name}, '')" for name in _NUMBERS)},
    priority = CASE NEW.priority WHEN '' THEN 0 ELSE NEW.priority END,
    {_CREATED}
  WHERE id = NEW.id;
END"""
_CREATED_CHANGED = f"""
CREATE TRIGGER tickets_created_changed AFTER UPDATE OF created_at ON tickets
WHEN {_ODD} AND NEW.created_at IS NOT OLD.created_at
BEGIN
  UPDATE tickets SET {_CREATED} WHERE id = NEW.id;
END"""

_PAGES = (
    "DROP INDEX IF EXISTS tickets_created",
    "CREATE INDEX tickets_created ON tickets (created_at, id)",
    "CREATE INDEX tickets_ended ON tickets (state, created_at, id) WHERE state IN ('done', 'failed', 'cancelled')",
)
_TOKENS = """
CREATE TABLE tokens (
	id TEXT NOT NULL,
	name TEXT NOT NULL,
	kind TEXT NOT NULL,
	hash TEXT NOT NULL,
	role TEXT NOT NULL,
	project_id TEXT,
	created_by TEXT NOT NULL,
	created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
	expires_at INTEGER,
	last_used_at TEXT,
	PRIMARY KEY (id),
	CONSTRAINT tokens_hash UNIQUE (hash)
)"""

_POSITIONS = """
CREATE TABLE positions (
	name TEXT NOT NULL,
	seq INTEGER NOT NULL,
	PRIMARY KEY (name)
)"""

_NOTICES = """
CREATE TABLE notices (
	id TEXT NOT NULL,
	url TEXT NOT NULL,
	kinds TEXT DEFAULT '[]' NOT NULL,
	project_id TEXT,
	created_by TEXT NOT NULL,
	created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
	sent_at TEXT,
	error TEXT,
	PRIMARY KEY (id)
)"""


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        return  # v0_2_1 is the first for it
    run = op.get_bind().exec_driver_sql
    # A column's default is no part of the rows: by SQLite's own recipe (lang_altertable.html, 7) its text in the schema
    # is changed, and neither the rows nor what a user has added to the table are touched.
    (version,) = run("PRAGMA schema_version").one()
    run("PRAGMA writable_schema = ON")
    run(
        "UPDATE sqlite_master SET sql = replace(sql, 'id TEXT NOT NULL,', "
        "'id TEXT DEFAULT (lower(hex(randomblob(16)))) NOT NULL ON CONFLICT REPLACE,') "
        "WHERE type = 'table' AND name = 'tickets'"
    )
    run(f"PRAGMA schema_version = {version + 1}")
    run("PRAGMA writable_schema = RESET")
    run(_INSERTED.lstrip())
    run(_CREATED_CHANGED.lstrip())
    for statement in _PAGES:
        run(statement)
    run(_TOKENS.lstrip())
    run(_POSITIONS.lstrip())
    run(_NOTICES.lstrip())


downgrade = no_way_back
