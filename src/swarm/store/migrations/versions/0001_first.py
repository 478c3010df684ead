"""The first tables.

A frozen copy: migrations tell what was done once, and don't change when schema.py, which explains the columns, does.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from swarm.store.sql.dialect import utc_now

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_UNKNOWN_STATE = "state NOT IN ('draft', 'ready', 'blocked', 'in_progress', 'waiting', 'done', 'failed', 'cancelled')"
_LIVE_RUN = "(progress IS NOT NULL OR status = 'waiting') AND status IN ('running', 'waiting')"

# What foreign keys can't do in SQLite, where most tools (the sqlite3 shell is one) leave them switched off: a DELETE
# takes the ticket's runs with it, whatever program does it. And `updated_at` is true after an UPDATE by hand.
_SQLITE_TRIGGERS = (
    """
    CREATE TRIGGER tickets_deleted AFTER DELETE ON tickets BEGIN
      DELETE FROM attempts WHERE step_execution_id IN (
        SELECT s.id FROM workflow_runs r JOIN step_executions s ON s.run_id = r.id WHERE r.ticket_id = OLD.id);
      DELETE FROM step_executions WHERE run_id IN (SELECT id FROM workflow_runs WHERE ticket_id = OLD.id);
      DELETE FROM workflow_runs WHERE ticket_id = OLD.id;
      DELETE FROM ticket_dependencies WHERE ticket_id = OLD.id;
      DELETE FROM artifacts WHERE digest IN (SELECT digest FROM artifact_uses WHERE ticket_id = OLD.id)
        AND NOT EXISTS (SELECT 1 FROM artifact_uses u WHERE u.digest = artifacts.digest AND u.ticket_id <> OLD.id);
      DELETE FROM artifact_uses WHERE ticket_id = OLD.id;
      INSERT INTO events (ticket_id, kind) VALUES (OLD.id, 'deleted');
    END""",
    """
    CREATE TRIGGER tickets_touched AFTER UPDATE OF state ON tickets WHEN NEW.updated_at IS OLD.updated_at BEGIN
      UPDATE tickets SET updated_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') WHERE id = NEW.id;
    END""",
    *(
        # Whoever changes workflows, their schedules are looked at again (store/schedules.py).
        f"""
    CREATE TRIGGER workflows_{kind} AFTER {change} ON workflows BEGIN
      INSERT INTO schedules (workflow, number, workflow_id, next_at) VALUES ('', 0, '', 0)
      ON CONFLICT (workflow, number) DO NOTHING;
    END"""
        for kind, change in (
            ("added", "INSERT"),
            ("changed", "UPDATE OF name, version, steps, enabled"),
            ("removed", "DELETE"),
        )
    ),
)


def _text(name: str, *, null: bool = True, default: str | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=null, server_default=default)


def _time(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), server_default=utc_now())


def _number(name: str, default: int | None = None, *, kind: sa.types.TypeEngine[Any] | None = None) -> sa.Column[Any]:
    given = None if default is None else sa.text(str(default))
    return sa.Column(name, kind or sa.Integer(), nullable=default is None, server_default=given)


def _index(name: str, *columns: str, where: str) -> sa.Index:
    return sa.Index(name, *map(sa.text, columns), sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def upgrade() -> None:
    op.create_table(
        "tickets",
        sa.Column("id", sa.Text(), primary_key=True, nullable=False),
        _text("project_id"),
        _text("title", null=False, default=""),
        _text("description"),
        _text("state", null=False, default="draft"),
        _text("agent_id"),
        _text("assignee_id"),
        _text("assignee_type"),
        _text("execution_mode", default="agent"),
        _text("workflow_id"),
        _text("inputs"),
        _text("outputs"),
        _text("error"),
        _number("priority", 0),
        _number("timeout_seconds", kind=sa.Float()),
        _number("max_attempts"),
        _number("budget_usd", kind=sa.Float()),
        _number("budget_tokens", kind=_BIG),
        _text("over_budget"),
        _text("trigger_type", default="ticket"),
        _text("trigger_data"),
        _text("run_id"),
        _time("created_at"),
        _time("updated_at"),
        _text("started_at"),
        _text("completed_at"),
        _index("tickets_ready", "priority DESC", "created_at", where="state = 'ready'"),
        _index("tickets_unfinished", "state", where="state IN ('in_progress', 'waiting', 'blocked')"),
        _index("tickets_unknown_state", "state", where=_UNKNOWN_STATE),
        sa.Index("tickets_created", "created_at"),
    )
    op.create_table(
        "ticket_dependencies",
        sa.Column("ticket_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("depends_on", sa.Text(), primary_key=True, nullable=False),
        sa.Index("ticket_dependencies_depends_on", "depends_on"),
    )
    op.create_table(
        "agents",
        sa.Column("id", sa.Text(), primary_key=True, nullable=False),
        _text("name", null=False),
        _text("version", null=False),
        _text("description", null=False, default=""),
        _text("path", null=False),
        _text("runtime", null=False, default="python"),
        _text("entry", null=False),
        _text("image"),
        _text("inputs_schema"),
        _text("outputs_schema"),
        _number("memory_mb", 256),
        _number("vcpus", 1),
        _number("disk_mb", 2048),
        _number("disk_mb_per_second", kind=sa.Float()),
        _number("network_mb_per_second", kind=sa.Float()),
        _number("timeout_seconds", 600, kind=sa.Float()),
        _number("idle_timeout_seconds", kind=sa.Float()),
        _text("network", null=False, default="none"),
        _text("secrets", null=False, default="[]"),
        _text("env", null=False, default="{}"),
        _text("preload", null=False, default="[]"),
        _text("requirements", null=False, default="[]"),
        _text("packages", null=False, default="[]"),
        _text("retry", null=False, default="{}"),
        sa.Column("idempotent", sa.Boolean(), nullable=False, server_default=sa.false()),
        _number("budget_usd", kind=sa.Float()),
        _number("budget_tokens", kind=_BIG),
        _text("over_budget"),
        _time("created_at"),
        _time("updated_at"),
        sa.UniqueConstraint("name", "version", name="agents_name_version"),
    )
    op.create_table(
        "workflows",
        sa.Column("id", sa.Text(), primary_key=True, nullable=False),
        _text("name", null=False),
        _text("version", null=False),
        _text("description", null=False, default=""),
        _text("steps", null=False, default="[]"),
        _text("variables", null=False, default="{}"),
        _number("budget_usd", kind=sa.Float()),
        _number("budget_tokens", kind=_BIG),
        sa.Column("enabled", sa.Boolean(), nullable=False, server_default=sa.true()),
        _time("created_at"),
        _time("updated_at"),
        sa.UniqueConstraint("name", "version", name="workflows_name_version"),
    )
    op.create_table(
        "schedules",
        sa.Column("workflow", sa.Text(), primary_key=True, nullable=False),
        sa.Column("number", sa.Integer(), primary_key=True, nullable=False),
        _text("workflow_id", null=False),
        _text("cron", null=False, default=""),
        _text("time_zone", null=False, default="UTC"),
        _text("missed", null=False, default="once"),
        _number("next_at", kind=_BIG),
        _number("computed_at", 0, kind=_BIG),
        _text("last_at"),
        _text("last_ticket_id"),
        _number("missed_count", 0),
        _text("error"),
    )
    op.create_table(
        "webhook_calls",
        sa.Column("workflow", sa.Text(), primary_key=True, nullable=False),
        sa.Column("key", sa.Text(), primary_key=True, nullable=False),
        _text("digest", null=False),
        _text("ticket_id", null=False),
        sa.Column("at", _BIG, nullable=False),
        sa.Index("webhook_calls_at", "at"),
    )
    op.create_table(
        "definitions",
        sa.Column("digest", sa.Text(), primary_key=True, nullable=False),
        _text("definition", null=False),
        _time("created_at"),
    )
    op.create_table(
        "workflow_runs",
        sa.Column("id", sa.Text(), primary_key=True, nullable=False),
        _text("workflow_id"),
        _text("workflow_version"),
        sa.Column("ticket_id", sa.Text(), sa.ForeignKey("tickets.id", ondelete="CASCADE"), nullable=False),
        _text("status", null=False),
        _text("trigger_type", null=False, default="ticket"),
        _text("trigger_data"),
        _text("started_at"),
        _text("completed_at"),
        _text("error"),
        _text("error_step"),
        _number("total_vm_time_ms", 0, kind=sa.Float()),
        _number("total_api_tokens", 0, kind=_BIG),
        _number("total_cost_usd", 0, kind=sa.Float()),
        _text("parent_step_id"),
        _text("root_run_id"),
        _text("path", null=False, default=""),
        _text("definition"),
        _text("context"),
        _text("progress"),
        _text("unprocessed"),
        _number("revision", 0),
        _number("due_at", kind=_BIG),
        _number("deadline_at", kind=_BIG),
        sa.Index("workflow_runs_ticket", "ticket_id"),
        _index("workflow_runs_due", "due_at", where="due_at IS NOT NULL"),
        _index("workflow_runs_live", "ticket_id", where=_LIVE_RUN),
        _index("workflow_runs_definition", "definition", where="definition IS NOT NULL"),
        _index("workflow_runs_parent", "parent_step_id", where="parent_step_id IS NOT NULL"),
    )
    op.create_table(
        "step_executions",
        sa.Column("id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("run_id", sa.Text(), sa.ForeignKey("workflow_runs.id", ondelete="CASCADE"), nullable=False),
        _text("step_id", null=False),
        _text("agent_id"),
        _text("agent_name"),
        _text("agent_version"),
        _text("status", null=False),
        _text("attempt_id"),
        _number("vm_id"),
        _text("inputs"),
        _text("outputs"),
        _text("queued_at"),
        _text("started_at"),
        _text("completed_at"),
        _number("duration_ms", kind=sa.Float()),
        _number("api_tokens_used", 0, kind=_BIG),
        _text("error"),
        _number("retry_count", 0),
        _number("max_attempts", 1),
        _number("timeout_seconds", kind=sa.Float()),
        _number("available_at", kind=_BIG),
        _number("priority", 0),
        _text("ticket_created_at"),
        _text("retry"),
        _text("question"),
        _text("verdict"),
        _text("fan_out"),
        _index(
            "step_executions_ready",
            "priority DESC",
            "ticket_created_at",
            where="status = 'ready' AND available_at IS NULL",
        ),
        _index("step_executions_delayed", "available_at", where="status = 'ready' AND available_at IS NOT NULL"),
        _index("step_executions_waiting", "available_at", where="status = 'waiting' AND available_at IS NOT NULL"),
        sa.Index("step_executions_run", "run_id", "step_id", unique=True),
    )
    op.create_table(
        "artifacts",
        sa.Column("digest", sa.Text(), primary_key=True, nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
        _time("created_at"),
        _text("data", null=False),
    )
    op.create_table(
        "artifact_uses",
        sa.Column("ticket_id", sa.Text(), primary_key=True, nullable=False),
        sa.Column("digest", sa.Text(), primary_key=True, nullable=False),
        sa.Index("artifact_uses_digest", "digest"),
    )
    op.create_table(
        "attempts",
        sa.Column("id", sa.Text(), primary_key=True, nullable=False),
        sa.Column(
            "step_execution_id", sa.Text(), sa.ForeignKey("step_executions.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("number", sa.Integer(), nullable=False),
        _text("worker", null=False),
        _number("vm_id"),
        sa.Column("lease_until", _BIG, nullable=False),
        _text("outcome"),
        _text("reason"),
        _text("error"),
        _number("exit_code"),
        _text("timings"),
        _number("api_tokens_used", 0, kind=_BIG),
        _number("cost_usd", 0, kind=sa.Float()),
        _text("started_at"),
        _text("ended_at"),
        _index("attempts_lease", "lease_until", where="outcome IS NULL"),
        sa.Index("attempts_step", "step_execution_id"),
    )
    op.create_table(
        "events",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
        _text("ticket_id", null=False),
        _text("step_id"),
        _text("attempt_id"),
        sa.Column("at", sa.Text(), nullable=False, server_default=utc_now()),
        _text("kind", null=False),
        _text("data", null=False, default="{}"),
        sa.Index("events_ticket", "ticket_id", "seq"),
        _index("events_deleted", "ticket_id", "seq", where="kind = 'deleted'"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "model_calls",
        sa.Column("id", sa.Text(), primary_key=True, nullable=False),
        _time("at"),
        _text("ticket_id"),
        _text("run_id"),
        _text("step_execution_id"),
        _text("attempt_id"),
        _text("agent"),
        _text("workflow"),
        _text("upstream"),
        _text("model"),
        _number("status"),
        _number("input_tokens", 0, kind=_BIG),
        _number("output_tokens", 0, kind=_BIG),
        _number("cache_read_tokens", 0, kind=_BIG),
        _number("cache_write_tokens", 0, kind=_BIG),
        _number("tokens", 0, kind=_BIG),
        _number("cost_usd", kind=sa.Float()),
        _number("reserved_usd", kind=sa.Float()),
        _number("reserved_tokens", kind=_BIG),
        _number("latency_ms", kind=sa.Float()),
        _text("note"),
        sa.Index("model_calls_at", "at"),
        sa.Index("model_calls_run", "run_id"),
        sa.Index("model_calls_step", "step_execution_id"),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.Text(), primary_key=True, nullable=False),
        sa.Column("scope", sa.Text(), primary_key=True, nullable=False),
        _text("sealed", null=False),
        _time("created_at"),
        _time("updated_at"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Text(), primary_key=True, nullable=False),
        _text("host", null=False),
        _number("pid"),
        _time("started_at"),
        _time("seen_at"),
        _text("info", null=False, default="{}"),
    )
    op.create_table("clock", _number("offset_ms", 0, kind=_BIG))
    op.execute("INSERT INTO clock (offset_ms) VALUES (0)")
    if op.get_context().dialect.name == "sqlite":
        for trigger in _SQLITE_TRIGGERS:
            op.get_bind().exec_driver_sql(trigger)


def downgrade() -> None:
    raise NotImplementedError("there is nothing before the first tables: remove the database instead")
