"""The machines that engines run on, the files of agents for all of them, and what agents require of one."""

from alembic import op

from swarm.store.migrations import no_way_back

revision = "v0_3_0"
down_revision = "v0_2_1"
branch_labels = None
depends_on = None

# {text}, {big}, {false} and {now} differ between databases.
_HOSTS = """
CREATE TABLE hosts (
	id {text} NOT NULL,
	name {text} NOT NULL,
	labels {text} DEFAULT '{{}}' NOT NULL,
	capacity {text} DEFAULT '{{}}' NOT NULL,
	versions {text} DEFAULT '{{}}' NOT NULL,
	machine_id {text} DEFAULT '' NOT NULL,
	boot_id {text} DEFAULT '' NOT NULL,
	generation INTEGER DEFAULT 1 NOT NULL,
	seen_at {big},
	draining BOOLEAN DEFAULT {false} NOT NULL,
	drain_until {big},
	drained_by {text},
	drained_at {text},
	created_at {text} DEFAULT {now},
	files_at {text},
	files_key {text},
	PRIMARY KEY (id),
	CONSTRAINT hosts_name UNIQUE (name)
)"""
_PACKAGES = """
CREATE TABLE packages (
	name {text} NOT NULL,
	number INTEGER NOT NULL,
	data {text} NOT NULL,
	PRIMARY KEY (name, number)
)"""
_HOST_FILES = """
CREATE TABLE host_files (
	host {text} NOT NULL,
	kind {text} NOT NULL,
	name {text} NOT NULL,
	made_of {text} NOT NULL,
	digest {text} NOT NULL,
	built_at {text} NOT NULL,
	PRIMARY KEY (host, kind, name)
)"""
_UNMET = """
CREATE TABLE unmet (
	requires {text} NOT NULL,
	since {big} NOT NULL,
	PRIMARY KEY (requires)
)"""
_OTHERS = (
    "ALTER TABLE agents ADD COLUMN requires {text} DEFAULT '{{}}' NOT NULL",
    "ALTER TABLE agents ADD COLUMN npm {text} DEFAULT '[]' NOT NULL",
    "ALTER TABLE tickets ADD COLUMN requires {text}",
    "ALTER TABLE step_executions ADD COLUMN requires {text}",
    "ALTER TABLE tickets ADD COLUMN waits_for {text} DEFAULT '' NOT NULL",
    "ALTER TABLE step_executions ADD COLUMN waits_for {text} DEFAULT '' NOT NULL",
    "DROP INDEX tickets_ready",
    "CREATE INDEX tickets_ready ON tickets (waits_for, priority DESC, created_at) WHERE state = 'ready'",
    "DROP INDEX step_executions_ready",
    "CREATE INDEX step_executions_ready ON step_executions (waits_for, priority DESC, ticket_created_at) "
    "WHERE status = 'ready' AND available_at IS NULL",
    "ALTER TABLE sandboxes ADD COLUMN requires {text}",
    "ALTER TABLE sandboxes ADD COLUMN waits_for {text} DEFAULT '' NOT NULL",
    "DROP INDEX sandboxes_due",
    "CREATE INDEX sandboxes_due ON sandboxes (created_at, id, state, wanted, host, snapshot_id, hold_id, waits_for) "
    "WHERE state NOT IN ('ended', 'lost') AND hold_id IS NULL AND (state <> 'paused' OR wanted IS NOT NULL) "
    "AND (waits_for = '' OR state <> 'starting' OR wanted = 'ended')",
    "CREATE INDEX sandboxes_marked ON sandboxes (waits_for, created_at) "
    "WHERE state = 'starting' AND hold_id IS NULL AND waits_for > ''",
)
_SQLITE = {"text": "TEXT", "big": "INTEGER", "false": "0", "now": "(strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))"}
_POSTGRESQL = {
    "text": 'TEXT COLLATE "C"',
    "big": "BIGINT",
    "false": "false",
    "now": "to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')",
}


def upgrade() -> None:
    words = _POSTGRESQL if op.get_context().dialect.name == "postgresql" else _SQLITE
    for statement in (_HOSTS, _PACKAGES, _HOST_FILES, _UNMET, *_OTHERS):
        op.get_bind().exec_driver_sql(statement.lstrip().format(**words))


downgrade = no_way_back
