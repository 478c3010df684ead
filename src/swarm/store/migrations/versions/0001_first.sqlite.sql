-- The first tables, as version 0.1.0 made them. Frozen: migrations tell what was done once, and don't change when
-- schema.py, which explains the columns, does.

CREATE TABLE tickets (
  id TEXT NOT NULL,
  project_id TEXT,
  title TEXT DEFAULT '' NOT NULL,
  description TEXT,
  state TEXT DEFAULT 'draft' NOT NULL,
  agent_id TEXT,
  assignee_id TEXT,
  assignee_type TEXT,
  execution_mode TEXT DEFAULT 'agent',
  workflow_id TEXT,
  inputs TEXT,
  outputs TEXT,
  error TEXT,
  priority INTEGER DEFAULT 0 NOT NULL,
  timeout_seconds FLOAT,
  max_attempts INTEGER,
  budget_usd FLOAT,
  budget_tokens INTEGER,
  over_budget TEXT,
  trigger_type TEXT DEFAULT 'ticket',
  trigger_data TEXT,
  run_id TEXT,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  updated_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  started_at TEXT,
  completed_at TEXT,
  PRIMARY KEY (id)
);

CREATE INDEX tickets_created ON tickets (created_at);

CREATE INDEX tickets_unfinished ON tickets (state) WHERE state IN ('in_progress', 'waiting', 'blocked');

CREATE INDEX tickets_unknown_state ON tickets (state) WHERE state NOT IN ('draft', 'ready', 'blocked', 'in_progress', 'waiting', 'done', 'failed', 'cancelled');

CREATE INDEX tickets_ready ON tickets (priority DESC, created_at) WHERE state = 'ready';

CREATE TABLE ticket_dependencies (
  ticket_id TEXT NOT NULL,
  depends_on TEXT NOT NULL,
  PRIMARY KEY (ticket_id, depends_on)
);

CREATE INDEX ticket_dependencies_depends_on ON ticket_dependencies (depends_on);

CREATE TABLE agents (
  id TEXT NOT NULL,
  name TEXT NOT NULL,
  version TEXT NOT NULL,
  description TEXT DEFAULT '' NOT NULL,
  path TEXT NOT NULL,
  runtime TEXT DEFAULT 'python' NOT NULL,
  entry TEXT NOT NULL,
  image TEXT,
  inputs_schema TEXT,
  outputs_schema TEXT,
  memory_mb INTEGER DEFAULT 256 NOT NULL,
  vcpus INTEGER DEFAULT 1 NOT NULL,
  disk_mb INTEGER DEFAULT 2048 NOT NULL,
  disk_mb_per_second FLOAT,
  network_mb_per_second FLOAT,
  timeout_seconds FLOAT DEFAULT 600 NOT NULL,
  idle_timeout_seconds FLOAT,
  network TEXT DEFAULT 'none' NOT NULL,
  secrets TEXT DEFAULT '[]' NOT NULL,
  env TEXT DEFAULT '{}' NOT NULL,
  preload TEXT DEFAULT '[]' NOT NULL,
  requirements TEXT DEFAULT '[]' NOT NULL,
  packages TEXT DEFAULT '[]' NOT NULL,
  retry TEXT DEFAULT '{}' NOT NULL,
  idempotent BOOLEAN DEFAULT 0 NOT NULL,
  budget_usd FLOAT,
  budget_tokens INTEGER,
  over_budget TEXT,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  updated_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  PRIMARY KEY (id),
  CONSTRAINT agents_name_version UNIQUE (name, version)
);

CREATE TABLE workflows (
  id TEXT NOT NULL,
  name TEXT NOT NULL,
  version TEXT NOT NULL,
  description TEXT DEFAULT '' NOT NULL,
  steps TEXT DEFAULT '[]' NOT NULL,
  variables TEXT DEFAULT '{}' NOT NULL,
  budget_usd FLOAT,
  budget_tokens INTEGER,
  enabled BOOLEAN DEFAULT 1 NOT NULL,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  updated_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  PRIMARY KEY (id),
  CONSTRAINT workflows_name_version UNIQUE (name, version)
);

CREATE TABLE schedules (
  workflow TEXT NOT NULL,
  number INTEGER NOT NULL,
  workflow_id TEXT NOT NULL,
  cron TEXT DEFAULT '' NOT NULL,
  time_zone TEXT DEFAULT 'UTC' NOT NULL,
  missed TEXT DEFAULT 'once' NOT NULL,
  next_at INTEGER,
  computed_at INTEGER DEFAULT 0 NOT NULL,
  last_at TEXT,
  last_ticket_id TEXT,
  missed_count INTEGER DEFAULT 0 NOT NULL,
  error TEXT,
  PRIMARY KEY (workflow, number)
);

CREATE TABLE webhook_calls (
  workflow TEXT NOT NULL,
  "key" TEXT NOT NULL,
  digest TEXT NOT NULL,
  ticket_id TEXT NOT NULL,
  at INTEGER NOT NULL,
  PRIMARY KEY (workflow, "key")
);

CREATE INDEX webhook_calls_at ON webhook_calls (at);

CREATE TABLE definitions (
  digest TEXT NOT NULL,
  definition TEXT NOT NULL,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  PRIMARY KEY (digest)
);

CREATE TABLE workflow_runs (
  id TEXT NOT NULL,
  workflow_id TEXT,
  workflow_version TEXT,
  ticket_id TEXT NOT NULL,
  status TEXT NOT NULL,
  trigger_type TEXT DEFAULT 'ticket' NOT NULL,
  trigger_data TEXT,
  started_at TEXT,
  completed_at TEXT,
  error TEXT,
  error_step TEXT,
  total_vm_time_ms FLOAT DEFAULT 0 NOT NULL,
  total_api_tokens INTEGER DEFAULT 0 NOT NULL,
  total_cost_usd FLOAT DEFAULT 0 NOT NULL,
  parent_step_id TEXT,
  root_run_id TEXT,
  path TEXT DEFAULT '' NOT NULL,
  definition TEXT,
  context TEXT,
  progress TEXT,
  unprocessed TEXT,
  revision INTEGER DEFAULT 0 NOT NULL,
  due_at INTEGER,
  deadline_at INTEGER,
  PRIMARY KEY (id),
  FOREIGN KEY(ticket_id) REFERENCES tickets (id) ON DELETE CASCADE
);

CREATE INDEX workflow_runs_due ON workflow_runs (due_at) WHERE due_at IS NOT NULL;

CREATE INDEX workflow_runs_definition ON workflow_runs (definition) WHERE definition IS NOT NULL;

CREATE INDEX workflow_runs_parent ON workflow_runs (parent_step_id) WHERE parent_step_id IS NOT NULL;

CREATE INDEX workflow_runs_live ON workflow_runs (ticket_id) WHERE (progress IS NOT NULL OR status = 'waiting') AND status IN ('running', 'waiting');

CREATE INDEX workflow_runs_ticket ON workflow_runs (ticket_id);

CREATE TABLE step_executions (
  id TEXT NOT NULL,
  run_id TEXT NOT NULL,
  step_id TEXT NOT NULL,
  agent_id TEXT,
  agent_name TEXT,
  agent_version TEXT,
  status TEXT NOT NULL,
  attempt_id TEXT,
  vm_id INTEGER,
  inputs TEXT,
  outputs TEXT,
  queued_at TEXT,
  started_at TEXT,
  completed_at TEXT,
  duration_ms FLOAT,
  api_tokens_used INTEGER DEFAULT 0 NOT NULL,
  error TEXT,
  retry_count INTEGER DEFAULT 0 NOT NULL,
  max_attempts INTEGER DEFAULT 1 NOT NULL,
  timeout_seconds FLOAT,
  available_at INTEGER,
  priority INTEGER DEFAULT 0 NOT NULL,
  ticket_created_at TEXT,
  retry TEXT,
  question TEXT,
  verdict TEXT,
  fan_out TEXT,
  PRIMARY KEY (id),
  FOREIGN KEY(run_id) REFERENCES workflow_runs (id) ON DELETE CASCADE
);

CREATE INDEX step_executions_waiting ON step_executions (available_at) WHERE status = 'waiting' AND available_at IS NOT NULL;

CREATE INDEX step_executions_delayed ON step_executions (available_at) WHERE status = 'ready' AND available_at IS NOT NULL;

CREATE INDEX step_executions_ready ON step_executions (priority DESC, ticket_created_at) WHERE status = 'ready' AND available_at IS NULL;

CREATE UNIQUE INDEX step_executions_run ON step_executions (run_id, step_id);

CREATE TABLE artifacts (
  digest TEXT NOT NULL,
  bytes INTEGER NOT NULL,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  data TEXT NOT NULL,
  PRIMARY KEY (digest)
);

CREATE TABLE artifact_uses (
  ticket_id TEXT NOT NULL,
  digest TEXT NOT NULL,
  PRIMARY KEY (ticket_id, digest)
);

CREATE INDEX artifact_uses_digest ON artifact_uses (digest);

CREATE TABLE attempts (
  id TEXT NOT NULL,
  step_execution_id TEXT NOT NULL,
  number INTEGER NOT NULL,
  worker TEXT NOT NULL,
  vm_id INTEGER,
  lease_until INTEGER NOT NULL,
  outcome TEXT,
  reason TEXT,
  error TEXT,
  exit_code INTEGER,
  timings TEXT,
  api_tokens_used INTEGER DEFAULT 0 NOT NULL,
  cost_usd FLOAT DEFAULT 0 NOT NULL,
  started_at TEXT,
  ended_at TEXT,
  PRIMARY KEY (id),
  FOREIGN KEY(step_execution_id) REFERENCES step_executions (id) ON DELETE CASCADE
);

CREATE INDEX attempts_lease ON attempts (lease_until) WHERE outcome IS NULL;

CREATE INDEX attempts_step ON attempts (step_execution_id);

CREATE TABLE events (
  seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  ticket_id TEXT NOT NULL,
  step_id TEXT,
  attempt_id TEXT,
  at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')) NOT NULL,
  kind TEXT NOT NULL,
  data TEXT DEFAULT '{}' NOT NULL
);

CREATE INDEX events_ticket ON events (ticket_id, seq);

CREATE INDEX events_deleted ON events (ticket_id, seq) WHERE kind = 'deleted';

CREATE TABLE model_calls (
  id TEXT NOT NULL,
  at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  ticket_id TEXT,
  run_id TEXT,
  step_execution_id TEXT,
  attempt_id TEXT,
  agent TEXT,
  workflow TEXT,
  upstream TEXT,
  model TEXT,
  status INTEGER,
  input_tokens INTEGER DEFAULT 0 NOT NULL,
  output_tokens INTEGER DEFAULT 0 NOT NULL,
  cache_read_tokens INTEGER DEFAULT 0 NOT NULL,
  cache_write_tokens INTEGER DEFAULT 0 NOT NULL,
  tokens INTEGER DEFAULT 0 NOT NULL,
  cost_usd FLOAT,
  reserved_usd FLOAT,
  reserved_tokens INTEGER,
  latency_ms FLOAT,
  note TEXT,
  PRIMARY KEY (id)
);

CREATE INDEX model_calls_at ON model_calls (at);

CREATE INDEX model_calls_run ON model_calls (run_id);

CREATE INDEX model_calls_step ON model_calls (step_execution_id);

CREATE TABLE secrets (
  name TEXT NOT NULL,
  scope TEXT NOT NULL,
  sealed TEXT NOT NULL,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  updated_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  PRIMARY KEY (name, scope)
);

CREATE TABLE workers (
  id TEXT NOT NULL,
  host TEXT NOT NULL,
  pid INTEGER,
  started_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  seen_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  info TEXT DEFAULT '{}' NOT NULL,
  PRIMARY KEY (id)
);

CREATE TABLE clock (
  offset_ms INTEGER DEFAULT 0 NOT NULL
);

-- SQLite's foreign keys are off in most tools (the sqlite3 shell is one), so triggers do their work: a DELETE takes the
-- ticket's runs with it, whatever program does it, and `updated_at` is true after an UPDATE from outside.
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
END;

CREATE TRIGGER tickets_touched AFTER UPDATE OF state ON tickets WHEN NEW.updated_at IS OLD.updated_at BEGIN
  UPDATE tickets SET updated_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') WHERE id = NEW.id;
END;

-- When workflows change, by whatever program, their schedules are read again (store/registry/schedules.py).
CREATE TRIGGER workflows_added AFTER INSERT ON workflows BEGIN
  INSERT INTO schedules (workflow, number, workflow_id, next_at) VALUES ('', 0, '', 0)
  ON CONFLICT (workflow, number) DO NOTHING;
END;

CREATE TRIGGER workflows_changed AFTER UPDATE OF name, version, steps, enabled ON workflows BEGIN
  INSERT INTO schedules (workflow, number, workflow_id, next_at) VALUES ('', 0, '', 0)
  ON CONFLICT (workflow, number) DO NOTHING;
END;

CREATE TRIGGER workflows_removed AFTER DELETE ON workflows BEGIN
  INSERT INTO schedules (workflow, number, workflow_id, next_at) VALUES ('', 0, '', 0)
  ON CONFLICT (workflow, number) DO NOTHING;
END;

INSERT INTO clock (offset_ms) VALUES (0);
