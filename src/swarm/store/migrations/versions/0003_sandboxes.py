"""Sandboxes and snapshots, and whether a ticket's VM is kept."""

from alembic import op

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

_INDEXES = (
    "CREATE INDEX sandboxes_created ON sandboxes (created_at, id)",
    "CREATE INDEX sandboxes_live ON sandboxes (state) WHERE state IN ('starting', 'running', 'paused')",
    "CREATE INDEX sandboxes_name ON sandboxes (name)",
    "CREATE INDEX snapshots_expires ON snapshots (expires_at)",
    "CREATE INDEX snapshots_sandbox ON snapshots (sandbox_id)",
    "CREATE INDEX snapshots_ticket ON snapshots (ticket_id)",
    "CREATE INDEX events_sandbox ON events (sandbox_id, seq) WHERE sandbox_id IS NOT NULL",
    "CREATE INDEX model_calls_sandbox ON model_calls (sandbox_id) WHERE sandbox_id IS NOT NULL",
)


def upgrade() -> None:
    run = op.get_bind().exec_driver_sql
    for table, column in _COLUMNS:
        run(f"ALTER TABLE {table} ADD COLUMN {column}")
    run(_SANDBOXES.lstrip())
    run(_SNAPSHOTS.lstrip())
    for statement in _INDEXES:
        run(statement)


def downgrade() -> None:
    raise NotImplementedError("restore the copy from before the upgrade instead")
