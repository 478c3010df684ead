"""The tables, as they are now. `migrations/` creates them; a test compares the two.

Rules: columns that other tools write (tickets, ticket_dependencies) have no foreign key and no CHECK: a bad row must be
accepted, so that its `error` can say what is wrong. Columns that those tools leave out have defaults. Times for people
are ISO-8601 UTC text; times that decide (`lease_until`, `available_at`) are ms of the database's clock.
Every index that the engine works from is partial: it holds live rows only, however many finished ones there are.

So many lines because every table is here.
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from swarm.store.sql.conditions import (
    ATTEMPT_LIVE,
    ENDED,
    LIVE_RUN,
    RUN_DUE,
    SANDBOX_DUE,
    SANDBOX_ENDING,
    SANDBOX_HELD,
    SANDBOX_LIVE,
    SANDBOX_MARKED,
    STEP_DELAYED,
    STEP_READY,
    STEP_WAITING,
    UNFINISHED,
    UNKNOWN_STATE,
)

metadata: Final = sa.MetaData()

# Texts compare by their bytes, as in SQLite, whatever the database's language is.
TEXT: Final = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
BIG: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite generates row numbers only for INTEGER


class utc_now(FunctionElement[str]):
    """ISO-8601 UTC text with milliseconds, by the database's clock: the default of every column that people read."""

    type = sa.Text()
    inherit_cache = True


@compiles(utc_now, "sqlite")
def _(element: utc_now, compiler: Any, **options: Any) -> str:
    return "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"


@compiles(utc_now, "postgresql")
def _(element: utc_now, compiler: Any, **options: Any) -> str:
    return "to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')"


class random_id(FunctionElement[str]):
    """The id of a row that another tool inserts without one."""

    type = sa.Text()
    inherit_cache = True


@compiles(random_id, "sqlite")
def _(element: random_id, compiler: Any, **options: Any) -> str:
    return "lower(hex(randomblob(16)))"


@compiles(random_id, "postgresql")
def _(element: random_id, compiler: Any, **options: Any) -> str:
    return "replace(gen_random_uuid()::text, '-', '')"


def _text(name: str, *, null: bool = True, default: str | None = None) -> sa.Column[str]:
    return sa.Column(name, TEXT, nullable=null, server_default=default)


def _time(name: str) -> sa.Column[str]:
    return sa.Column(name, TEXT, server_default=utc_now())


def _number(name: str, default: int | None = None, *, kind: sa.types.TypeEngine[Any] | None = None) -> sa.Column[Any]:
    given = None if default is None else sa.text(str(default))
    return sa.Column(name, kind or sa.Integer(), nullable=default is None, server_default=given)


def _index(name: str, *columns: str, where: str) -> sa.Index:
    return sa.Index(name, *map(sa.text, columns), sqlite_where=sa.text(where), postgresql_where=sa.text(where))


tickets = sa.Table(
    "tickets",
    metadata,
    # REPLACE: a NULL by the default
    sa.Column(
        "id",
        TEXT,
        primary_key=True,
        nullable=False,
        server_default=random_id(),
        sqlite_on_conflict_not_null="REPLACE",
    ),
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
    _number("budget_tokens", kind=BIG),
    _text("over_budget"),  # 'fail', 'wait', or NULL: the agent's setting
    _text("trigger_type", default="ticket"),  # what created it; copied to its runs
    _text("trigger_data"),  # JSON object: data of that trigger
    _text("run_id"),
    _time("created_at"),
    _time("updated_at"),
    _text("started_at"),
    _text("completed_at"),
    _text("keep_vm"),  # 'never', 'failure', 'always', or NULL: the agent's setting
    _number("keep_vm_seconds", kind=sa.Float()),
    _text("requires"),  # JSON object: labels that its host must have, beside its agent's
    _text("waits_for", null=False, default=""),  # what a host lacked that would have claimed it: see places.py
    _index("tickets_ready", "waits_for", "priority DESC", "created_at", where="state = 'ready'"),
    _index("tickets_unfinished", "state", where=UNFINISHED),
    _index("tickets_unknown_state", "state", where=UNKNOWN_STATE),
    # For lists, a page at a time.
    sa.Index("tickets_created", "created_at", "id"),
    _index("tickets_ended", "state", "created_at", "id", where=ENDED),
)

ticket_dependencies = sa.Table(
    "ticket_dependencies",
    metadata,
    sa.Column("ticket_id", TEXT, primary_key=True, nullable=False),
    sa.Column("depends_on", TEXT, primary_key=True, nullable=False),
    sa.Index("ticket_dependencies_depends_on", "depends_on"),
)

agents = sa.Table(
    "agents",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _text("name", null=False),
    _text("version", null=False),
    _text("description", null=False, default=""),
    _text("path", null=False),
    _text("runtime", null=False, default="python"),
    _text("entry", null=False),  # JSON list: argv, relative to `path`
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
    _text("retry", null=False, default="{}"),  # JSON object: the fields of model.RetryPolicy
    sa.Column("idempotent", sa.Boolean(), nullable=False, server_default=sa.false()),
    _number("budget_usd", kind=sa.Float()),
    _number("budget_tokens", kind=BIG),
    _text("over_budget"),
    _time("created_at"),
    _time("updated_at"),
    _text("keep_vm"),
    _number("keep_vm_seconds", kind=sa.Float()),
    _text("requires", null=False, default="{}"),  # JSON object: labels that a host must have
    _text("npm", null=False, default="[]"),
    sa.UniqueConstraint("name", "version", name="agents_name_version"),
)

# The files of agents, a row for each part; 0 is their list: see packages.py.
packages = sa.Table(
    "packages",
    metadata,
    sa.Column("name", TEXT, primary_key=True, nullable=False),  # of the directory, as in an agent's `path`
    sa.Column("number", sa.Integer(), primary_key=True, nullable=False),
    _text("data", null=False),
)

workflows = sa.Table(
    "workflows",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _text("name", null=False),
    _text("version", null=False),
    _text("description", null=False, default=""),
    _text("steps", null=False, default="[]"),
    _text("variables", null=False, default="{}"),
    _number("budget_usd", kind=sa.Float()),  # of one run
    _number("budget_tokens", kind=BIG),
    sa.Column("enabled", sa.Boolean(), nullable=False, server_default=sa.true()),
    _time("created_at"),
    _time("updated_at"),
    sa.UniqueConstraint("name", "version", name="workflows_name_version"),
)

schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("workflow", TEXT, primary_key=True, nullable=False),  # its name; '' marks outdated rows: see schedules.py
    sa.Column("number", sa.Integer(), primary_key=True, nullable=False),  # its position in the file
    _text("workflow_id", null=False),
    _text("cron", null=False, default=""),
    _text("time_zone", null=False, default="UTC"),
    _text("missed", null=False, default="once"),
    _number("next_at", kind=BIG),  # ms; NULL: never, while the workflow is disabled
    _number("computed_at", 0, kind=BIG),  # ms: when next_at was computed
    _text("last_at"),
    _text("last_ticket_id"),
    _number("missed_count", 0),
    _text("error"),
)

# Requests that created a ticket, by signature and by the sender's own key, so that a repeated one creates no second.
webhook_calls = sa.Table(
    "webhook_calls",
    metadata,
    sa.Column("workflow", TEXT, primary_key=True, nullable=False),  # its name
    sa.Column("key", TEXT, primary_key=True, nullable=False),
    _text("digest", null=False),  # SHA-256 of the body
    _text("ticket_id", null=False),
    sa.Column("at", BIG, nullable=False),  # ms
    sa.Index("webhook_calls_at", "at"),
)

# Frozen workflows by the SHA-256 of their text: many runs share one, and it never changes.
definitions = sa.Table(
    "definitions",
    metadata,
    sa.Column("digest", TEXT, primary_key=True, nullable=False),
    _text("definition", null=False),
    _time("created_at"),
)

workflow_runs = sa.Table(
    "workflow_runs",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _text("workflow_id"),
    _text("workflow_version"),
    sa.Column("ticket_id", TEXT, sa.ForeignKey("tickets.id", ondelete="CASCADE"), nullable=False),
    _text("status", null=False),
    _text("trigger_type", null=False, default="ticket"),
    _text("trigger_data"),
    _text("started_at"),
    _text("completed_at"),
    _text("error"),
    _text("error_step"),
    _number("total_vm_time_ms", 0, kind=sa.Float()),
    _number("total_api_tokens", 0, kind=BIG),
    _number("total_cost_usd", 0, kind=sa.Float()),
    # The columns below are for workflows only. A nested run belongs to the same ticket.
    _text("parent_step_id"),  # the step execution that this nested run is
    _text("root_run_id"),  # the ticket's own run; NULL in that run itself
    _text("path", null=False, default=""),  # prefix of its steps' names: 'fix[0]/'
    _text("definition"),  # a digest of `definitions`; NULL before the first decision, and in a plain ticket's run
    _text("context"),  # what expressions see besides steps; NULL before the first decision
    _text("progress"),  # the planner's
    _text("unprocessed"),  # JSON list of steps whose end or verdict the planner has not processed
    _number("revision", 0),  # number of decisions; one based on an older revision is dropped
    _number("due_at", kind=BIG),  # ms: when a claim must handle it, for a decision or because its time is over
    _number("deadline_at", kind=BIG),
    sa.Index("workflow_runs_ticket", "ticket_id"),
    _index("workflow_runs_due", "due_at", where=RUN_DUE),
    _index("workflow_runs_live", "ticket_id", where=LIVE_RUN),
    _index("workflow_runs_definition", "definition", where="definition IS NOT NULL"),
    _index("workflow_runs_parent", "parent_step_id", where="parent_step_id IS NOT NULL"),
)

step_executions = sa.Table(
    "step_executions",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    sa.Column("run_id", TEXT, sa.ForeignKey("workflow_runs.id", ondelete="CASCADE"), nullable=False),
    # Its name, after its run's path: 'build', 'build[3]', 'fix[0]/patch'; 'main' in a plain ticket's run.
    _text("step_id", null=False),
    _text("agent_id"),
    _text("agent_name"),
    _text("agent_version"),
    _text("status", null=False),
    _text("attempt_id"),  # the attempt that owns it: the fence
    _number("vm_id"),
    _text("inputs"),
    _text("outputs"),
    _text("queued_at"),
    _text("started_at"),
    _text("completed_at"),
    _number("duration_ms", kind=sa.Float()),
    _number("api_tokens_used", 0, kind=BIG),
    _text("error"),  # why it failed, was skipped or cancelled
    _number("retry_count", 0),
    _number("max_attempts", 1),
    _number("timeout_seconds", kind=sa.Float()),
    # ms. Ready: not before this (back-off), NULL: now. Waiting: when it is rejected automatically.
    _number("available_at", kind=BIG),
    _number("priority", 0),  # copied from the ticket, like ticket_created_at: the order of claims
    _text("ticket_created_at"),
    _text("retry"),  # JSON object: the step's own model.RetryPolicy; NULL: its agent's
    _text("question"),  # of an approval
    _text("verdict"),  # the answer
    _text("fan_out"),  # progress of a step with several executions: the planner's
    _text("keep_vm"),  # the step's own; NULL: its ticket's, or its agent's
    _text("from_step"),  # the step execution (its id) in a fork of whose VM it runs
    _text("snapshot_id"),  # of its VM when it completed, if other steps may start from that; '' until then
    _text("requires"),  # the step's own
    _text("waits_for", null=False, default=""),  # as in tickets
    _index("step_executions_ready", "waits_for", "priority DESC", "ticket_created_at", where=STEP_READY),
    _index("step_executions_delayed", "available_at", where=STEP_DELAYED),
    _index("step_executions_waiting", "available_at", where=STEP_WAITING),
    sa.Index("step_executions_run", "run_id", "step_id", unique=True),
)

# Large values of steps, as JSON text, by its SHA-256. Rows refer to them: see artifacts.py.
artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("digest", TEXT, primary_key=True, nullable=False),
    sa.Column("bytes", sa.Integer(), nullable=False),
    _time("created_at"),
    _text("data", null=False),  # last, so that SQLite does not read it to get at other columns
)

artifact_uses = sa.Table(
    "artifact_uses",
    metadata,
    sa.Column("ticket_id", TEXT, primary_key=True, nullable=False),
    sa.Column("digest", TEXT, primary_key=True, nullable=False),
    sa.Index("artifact_uses_digest", "digest"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    sa.Column("step_execution_id", TEXT, sa.ForeignKey("step_executions.id", ondelete="CASCADE"), nullable=False),
    sa.Column("number", sa.Integer(), nullable=False),  # 1, 2, … within its step, including tries that don't count
    _text("worker", null=False),
    _number("vm_id"),
    sa.Column("lease_until", BIG, nullable=False),
    _text("outcome"),
    _text("reason"),
    _text("error"),
    _number("exit_code"),
    _text("timings"),
    _number("api_tokens_used", 0, kind=BIG),
    _number("cost_usd", 0, kind=sa.Float()),
    _text("started_at"),
    _text("ended_at"),
    _index("attempts_lease", "lease_until", where=ATTEMPT_LIVE),
    sa.Index("attempts_step", "step_execution_id"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", BIG, primary_key=True, autoincrement=True),
    _text("ticket_id", null=False),
    _text("step_id"),
    _text("attempt_id"),
    sa.Column("at", TEXT, nullable=False, server_default=utc_now()),
    _text("kind", null=False),
    _text("data", null=False, default="{}"),
    _text("sandbox_id"),
    sa.Index("events_ticket", "ticket_id", "seq"),
    _index("events_sandbox", "sandbox_id", "seq", where="sandbox_id IS NOT NULL"),
    # Separates the history of a deleted ticket from that of a new one with the same id.
    _index("events_deleted", "ticket_id", "seq", where="kind = 'deleted'"),
    _index("events_sandbox_deleted", "sandbox_id", "seq", where="kind = 'deleted' AND sandbox_id IS NOT NULL"),
    sqlite_autoincrement=True,
)

# One row per model call. No foreign key: the cost stays when the ticket is deleted (`store/spending.py`).
model_calls = sa.Table(
    "model_calls",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _time("at"),
    _text("ticket_id"),
    _text("run_id"),
    _text("step_execution_id"),
    _text("attempt_id"),
    _text("agent"),
    _text("workflow"),
    _text("upstream"),
    _text("model"),
    _number("status"),  # HTTP status; NULL while the call runs
    _number("input_tokens", 0, kind=BIG),
    _number("output_tokens", 0, kind=BIG),
    _number("cache_read_tokens", 0, kind=BIG),
    _number("cache_write_tokens", 0, kind=BIG),
    _number("tokens", 0, kind=BIG),
    _number("cost_usd", kind=sa.Float()),  # NULL: unknown price
    _number("reserved_usd", kind=sa.Float()),
    _number("reserved_tokens", kind=BIG),
    _number("latency_ms", kind=sa.Float()),
    _text("note"),
    _text("sandbox_id"),
    sa.Index("model_calls_at", "at"),
    _index("model_calls_sandbox", "sandbox_id", where="sandbox_id IS NOT NULL"),
    sa.Index("model_calls_run", "run_id"),
    sa.Index("model_calls_step", "step_execution_id"),
)

# Values are sealed (`swarm.admin.vault`): they can't be read without the key file.
secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", TEXT, primary_key=True, nullable=False),
    sa.Column("scope", TEXT, primary_key=True, nullable=False),  # 'all', 'agent:NAME', 'workflow:NAME'
    _text("sealed", null=False),
    _time("created_at"),
    _time("updated_at"),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _text("host", null=False),
    _number("pid"),
    _time("started_at"),
    _time("seen_at"),
    _text("info", null=False, default="{}"),
)

# Machines that engines run on. `name` is what other rows say for "this host": no two have the same, and it never
# changes. `id` is kept on the machine itself; `boot_id` tells two machines with one id (a cloned disk) apart.
hosts = sa.Table(
    "hosts",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _text("name", null=False),
    _text("labels", null=False, default="{}"),  # JSON object
    _text("capacity", null=False, default="{}"),  # JSON object: memory_mb, slots, sandboxes, vcpus, kvm, arch
    _text("versions", null=False, default="{}"),  # JSON object: swarm, kernel
    _text("machine_id", null=False, default=""),
    _text("boot_id", null=False, default=""),
    _number("generation", 1),  # grows with each boot
    _number("seen_at", kind=BIG),  # ms
    sa.Column("draining", sa.Boolean(), nullable=False, server_default=sa.false()),
    _number("drain_until", kind=BIG),  # ms: what still runs then is put back; NULL: it ends by itself
    _text("drained_by"),
    _text("drained_at"),
    _time("created_at"),
    _text("files_at"),  # HOST:PORT, where others fetch its images and layers; NULL: nowhere
    _text("files_key"),  # from which their tokens are made
    sa.UniqueConstraint("name", name="hosts_name"),
)

# Images and layers that hosts have, for others: see host_files.py.
host_files = sa.Table(
    "host_files",
    metadata,
    sa.Column("host", TEXT, primary_key=True, nullable=False),  # its name
    sa.Column("kind", TEXT, primary_key=True, nullable=False),  # as elsewhere.py has them
    sa.Column("name", TEXT, primary_key=True, nullable=False),
    _text("made_of", null=False),
    _text("digest", null=False),  # of its manifest
    _text("built_at", null=False),
)

# What no known host has, and since when something waits for it.
unmet = sa.Table(
    "unmet",
    metadata,
    sa.Column("requires", TEXT, primary_key=True, nullable=False),
    sa.Column("since", BIG, nullable=False),  # ms
)

# One row. The clock for leases is the database's plus this offset; only tests change it.
clock = sa.Table("clock", metadata, _number("offset_ms", 0, kind=BIG))

# Who may call the API. `kind`: 'token'; 'session' of a browser; 'link', which is worth one session.
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _text("name", null=False),
    _text("kind", null=False),
    _text("hash", null=False),  # SHA-256 of the token, which is kept nowhere
    _text("role", null=False),
    _text("project_id"),
    _text("created_by", null=False),
    _time("created_at"),
    _number("expires_at", kind=BIG),  # ms; NULL: never
    _text("last_used_at"),
    sa.UniqueConstraint("hash", name="tokens_hash"),
)

# Up to which event those who follow all of them are done: the export of traces, the notices.
positions = sa.Table(
    "positions",
    metadata,
    sa.Column("name", TEXT, primary_key=True, nullable=False),
    sa.Column("seq", BIG, nullable=False),
)

# Who is told what happens, by a signed POST.
notices = sa.Table(
    "notices",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _text("url", null=False),
    _text("kinds", null=False, default="[]"),  # JSON list
    _text("project_id"),
    _text("created_by", null=False),
    _time("created_at"),
    _text("sent_at"),
    _text("error"),
)

# VMs that somebody holds. Other tools INSERT here too, so a bad row must be accepted (see the top).
sandboxes = sa.Table(
    "sandboxes",
    metadata,
    sa.Column(
        "id",
        TEXT,
        primary_key=True,
        nullable=False,
        server_default=random_id(),
        sqlite_on_conflict_not_null="REPLACE",
    ),
    _text("name"),
    _text("project_id"),
    _text("state", null=False, default="starting"),
    _text("agent_id"),
    _text("image"),
    _text("snapshot_id"),
    _text("parent_id"),
    _number("memory_mb"),
    _number("vcpus"),
    _number("disk_mb"),
    _text("network"),
    _text("secrets"),
    sa.Column("secret", sa.Boolean()),  # what it holds, or held once; NULL: not known yet
    _text("env"),
    _text("labels"),
    _number("ttl_seconds", kind=sa.Float()),
    _number("idle_timeout_seconds", kind=sa.Float()),
    _number("budget_usd", kind=sa.Float()),
    _number("budget_tokens", kind=BIG),
    _text("wanted"),
    _text("error"),
    _text("created_by"),
    _time("created_at"),
    _text("started_at"),
    _text("used_at"),
    _text("ended_at"),
    _number("ends_at", kind=BIG),  # ms: when its time to live is over
    _text("host"),
    _text("worker"),  # the engine that holds it
    _text("hold_id"),  # the fence; NULL: nobody holds it
    _number("lease_until", kind=BIG),  # ms
    _number("vm_id"),
    _text("requires"),  # as in tickets, as is waits_for
    _text("waits_for", null=False, default=""),
    # What an engine looks for: those to be started, resumed or ended (all that is asked of them is in the index, else
    # SQLite takes another one); those that are held, and until when.
    _index(
        "sandboxes_due",
        *("created_at", "id", "state", "wanted", "host", "snapshot_id", "hold_id", "waits_for"),
        where=SANDBOX_DUE,
    ),
    _index("sandboxes_marked", "waits_for", "created_at", where=SANDBOX_MARKED),
    _index("sandboxes_ending", "ends_at", where=SANDBOX_ENDING),
    _index("sandboxes_held", "hold_id", "lease_until", where=SANDBOX_HELD),
    _index("sandboxes_live", "state", where=SANDBOX_LIVE),
    sa.Index("sandboxes_created", "created_at", "id"),
    sa.Index("sandboxes_name", "name"),
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("id", TEXT, primary_key=True, nullable=False),
    _text("kind", null=False),
    _text("name"),
    _text("host", null=False),
    _text("project_id"),
    _text("sandbox_id"),
    _text("ticket_id"),
    _text("step_id"),
    _text("attempt_id"),
    _text("spec", null=False, default="{}"),
    _text("digest", null=False, default=""),
    _number("size_bytes", 0, kind=BIG),
    sa.Column("secrets", sa.Boolean(), nullable=False, server_default=sa.true()),
    _text("created_by"),
    _time("created_at"),
    _number("expires_at", kind=BIG),  # ms; NULL: never
    sa.Index("snapshots_created", "created_at", "id"),
    _index("snapshots_expires", "expires_at", where="expires_at IS NOT NULL"),
    sa.Index("snapshots_host", "host", "kind"),
    sa.Index("snapshots_name", "name"),
    sa.Index("snapshots_sandbox", "sandbox_id"),
    sa.Index("snapshots_ticket", "ticket_id"),
)
