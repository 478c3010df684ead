"""Sandboxes and snapshots, and whether a ticket's VM is kept. For PostgreSQL, all tables there are."""

from pathlib import Path

from alembic import op

from swarm.store.migrations import no_way_back

revision = "v0_2_1"
down_revision = "v0_2_0"
branch_labels = None
depends_on = None

_COLUMNS = (
    ("tickets", "keep_vm TEXT"),
    ("tickets", "keep_vm_seconds FLOAT"),
    ("agents", "keep_vm TEXT"),
    ("agents", "keep_vm_seconds FLOAT"),
    ("step_executions", "keep_vm TEXT"),
    ("step_executions", "from_step TEXT"),
    ("step_executions", "snapshot_id TEXT"),
    ("events", "sandbox_id TEXT"),
    ("model_calls", "sandbox_id TEXT"),
)

_SANDBOXES = """
CREATE TABLE sandboxes (
	id TEXT DEFAULT (lower(hex(randomblob(16)))) NOT NULL ON CONFLICT REPLACE,
	name TEXT,
	project_id TEXT,
	state TEXT DEFAULT 'starting' NOT NULL,
	agent_id TEXT,
	image TEXT,
	snapshot_id TEXT,
	parent_id TEXT,
	memory_mb INTEGER,
	vcpus INTEGER,
	disk_mb INTEGER,
	network TEXT,
	secrets TEXT,
	secret BOOLEAN,
	env TEXT,
	labels TEXT,
	ttl_seconds FLOAT,
	idle_timeout_seconds FLOAT,
	budget_usd FLOAT,
	budget_tokens INTEGER,
	wanted TEXT,
	error TEXT,
	created_by TEXT,
	created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
	started_at TEXT,
	used_at TEXT,
	ended_at TEXT,
	ends_at INTEGER,
	host TEXT,
	worker TEXT,
	hold_id TEXT,
	lease_until INTEGER,
	vm_id INTEGER,
	PRIMARY KEY (id)
)"""

_SNAPSHOTS = """
CREATE TABLE snapshots (
	id TEXT NOT NULL,
	kind TEXT NOT NULL,
	name TEXT,
	host TEXT NOT NULL,
	project_id TEXT,
	sandbox_id TEXT,
	ticket_id TEXT,
	step_id TEXT,
	attempt_id TEXT,
	spec TEXT DEFAULT '{}' NOT NULL,
	digest TEXT DEFAULT '' NOT NULL,
	size_bytes INTEGER DEFAULT 0 NOT NULL,
	secrets BOOLEAN DEFAULT 1 NOT NULL,
	created_by TEXT,
	created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
	expires_at INTEGER,
	PRIMARY KEY (id)
)"""

_LIVE = "state NOT IN ('ended', 'lost')"
_INDEXES = (
    "CREATE INDEX sandboxes_created ON sandboxes (created_at, id)",
    "CREATE INDEX sandboxes_due ON sandboxes (created_at, id, state, wanted, host, snapshot_id, hold_id) "
    f"WHERE {_LIVE} AND hold_id IS NULL AND (state <> 'paused' OR wanted IS NOT NULL)",
    f"CREATE INDEX sandboxes_ending ON sandboxes (ends_at) WHERE {_LIVE} AND hold_id IS NULL AND ends_at IS NOT NULL",
    "CREATE INDEX sandboxes_held ON sandboxes (hold_id, lease_until) WHERE hold_id IS NOT NULL",
    f"CREATE INDEX sandboxes_live ON sandboxes (state) WHERE {_LIVE}",
    "CREATE INDEX sandboxes_name ON sandboxes (name)",
    "CREATE INDEX snapshots_created ON snapshots (created_at, id)",
    "CREATE INDEX snapshots_expires ON snapshots (expires_at) WHERE expires_at IS NOT NULL",
    "CREATE INDEX snapshots_host ON snapshots (host, kind)",
    "CREATE INDEX snapshots_name ON snapshots (name)",
    "CREATE INDEX snapshots_sandbox ON snapshots (sandbox_id)",
    "CREATE INDEX snapshots_ticket ON snapshots (ticket_id)",
    "CREATE INDEX events_sandbox ON events (sandbox_id, seq) WHERE sandbox_id IS NOT NULL",
    "CREATE INDEX events_sandbox_deleted ON events (sandbox_id, seq) WHERE kind = 'deleted' AND sandbox_id IS NOT NULL",
    "CREATE INDEX model_calls_sandbox ON model_calls (sandbox_id) WHERE sandbox_id IS NOT NULL",
)

# A row that another tool inserts, or copies, is held by nobody; its created_at sorts, however it is written.
_INSERTED = """
CREATE TRIGGER sandboxes_inserted AFTER INSERT ON sandboxes
WHEN NEW.hold_id IS NOT NULL OR coalesce(NEW.created_at, '') NOT GLOB '????-??-??T??:??:??.???Z'
BEGIN
  UPDATE sandboxes SET hold_id = NULL, worker = NULL, lease_until = NULL,
    created_at = CASE WHEN coalesce(NEW.created_at, '') = '' THEN strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
      ELSE coalesce(strftime('%Y-%m-%dT%H:%M:%fZ', CASE WHEN NEW.created_at GLOB '????-??-??*' THEN NEW.created_at END),
        NEW.created_at) END
  WHERE id = NEW.id;
END"""
# What nobody can resume any more goes; a named snapshot stays. The files are removed by their host's engine.
_DELETED = """
CREATE TRIGGER sandboxes_deleted AFTER DELETE ON sandboxes BEGIN
  UPDATE snapshots SET expires_at = 0 WHERE sandbox_id = OLD.id AND kind IN ('pause', 'fork');
  INSERT INTO events (ticket_id, kind, sandbox_id) VALUES ('', 'deleted', OLD.id);
END"""
# Another id: whoever holds it, holds it no more. One that sleeps keeps its snapshot.
_RENAMED = """
CREATE TRIGGER sandboxes_renamed AFTER UPDATE OF id ON sandboxes WHEN NEW.id IS NOT OLD.id BEGIN
  UPDATE sandboxes SET hold_id = NULL, lease_until = NULL WHERE id = NEW.id;
  UPDATE snapshots SET sandbox_id = NEW.id WHERE sandbox_id = OLD.id;
  INSERT INTO events (ticket_id, kind, sandbox_id) VALUES ('', 'deleted', OLD.id);
END"""
_TICKET_DELETED = """
CREATE TRIGGER tickets_snapshots AFTER DELETE ON tickets BEGIN
  UPDATE snapshots SET expires_at = 0 WHERE ticket_id = OLD.id;
END"""


def upgrade() -> None:
    run = op.get_bind().exec_driver_sql
    if op.get_context().dialect.name == "postgresql":
        run(Path(__file__).with_name("0003_sandboxes.postgresql.sql").read_text(encoding="utf-8"))
        return
    for table, column in _COLUMNS:
        run(f"ALTER TABLE {table} ADD COLUMN {column}")
    run(_SANDBOXES.lstrip())
    run(_SNAPSHOTS.lstrip())
    for statement in (*_INDEXES, _INSERTED, _DELETED, _RENAMED, _TICKET_DELETED):
        run(statement.lstrip())


downgrade = no_way_back
