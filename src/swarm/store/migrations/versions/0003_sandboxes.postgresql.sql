-- All tables as of version 0.2.1, the first that knows PostgreSQL. Frozen: migrations tell what was done once, and don't
-- change when schema.py, which explains the columns, does.

-- All of it goes into one schema. The functions below keep this path: whoever runs them, and whatever tables and functions
-- that user has, in a schema of its own or as temporary ones, they mean Swarm's.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

CREATE TABLE agents (
  id TEXT COLLATE "C" NOT NULL,
  name TEXT COLLATE "C" NOT NULL,
  version TEXT COLLATE "C" NOT NULL,
  description TEXT COLLATE "C" DEFAULT '' NOT NULL,
  path TEXT COLLATE "C" NOT NULL,
  runtime TEXT COLLATE "C" DEFAULT 'python' NOT NULL,
  entry TEXT COLLATE "C" NOT NULL,
  image TEXT COLLATE "C",
  inputs_schema TEXT COLLATE "C",
  outputs_schema TEXT COLLATE "C",
  memory_mb INTEGER DEFAULT 256 NOT NULL,
  vcpus INTEGER DEFAULT 1 NOT NULL,
  disk_mb INTEGER DEFAULT 2048 NOT NULL,
  disk_mb_per_second FLOAT,
  network_mb_per_second FLOAT,
  timeout_seconds FLOAT DEFAULT 600 NOT NULL,
  idle_timeout_seconds FLOAT,
  network TEXT COLLATE "C" DEFAULT 'none' NOT NULL,
  secrets TEXT COLLATE "C" DEFAULT '[]' NOT NULL,
  env TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
  preload TEXT COLLATE "C" DEFAULT '[]' NOT NULL,
  requirements TEXT COLLATE "C" DEFAULT '[]' NOT NULL,
  packages TEXT COLLATE "C" DEFAULT '[]' NOT NULL,
  retry TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
  idempotent BOOLEAN DEFAULT false NOT NULL,
  budget_usd FLOAT,
  budget_tokens BIGINT,
  over_budget TEXT COLLATE "C",
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  updated_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  keep_vm TEXT COLLATE "C",
  keep_vm_seconds FLOAT,
  PRIMARY KEY (id),
  CONSTRAINT agents_name_version UNIQUE (name, version)
);

CREATE TABLE artifact_uses (
  ticket_id TEXT COLLATE "C" NOT NULL,
  digest TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (ticket_id, digest)
);

CREATE INDEX artifact_uses_digest ON artifact_uses (digest);

CREATE TABLE artifacts (
  digest TEXT COLLATE "C" NOT NULL,
  bytes INTEGER NOT NULL,
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  data TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (digest)
);

CREATE TABLE clock (
  offset_ms BIGINT DEFAULT 0 NOT NULL
);

CREATE TABLE definitions (
  digest TEXT COLLATE "C" NOT NULL,
  definition TEXT COLLATE "C" NOT NULL,
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  PRIMARY KEY (digest)
);

CREATE TABLE events (
  seq BIGSERIAL NOT NULL,
  ticket_id TEXT COLLATE "C" NOT NULL,
  step_id TEXT COLLATE "C",
  attempt_id TEXT COLLATE "C",
  at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') NOT NULL,
  kind TEXT COLLATE "C" NOT NULL,
  data TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
  sandbox_id TEXT COLLATE "C",
  PRIMARY KEY (seq)
);

-- A transaction has its own number before it takes an event's: see store/tickets/settled.py.
ALTER TABLE events ALTER seq SET DEFAULT
  CASE WHEN pg_current_xact_id() IS NOT NULL THEN nextval('events_seq_seq') END;

CREATE INDEX events_deleted ON events (ticket_id, seq) WHERE kind = 'deleted';

CREATE INDEX events_sandbox ON events (sandbox_id, seq) WHERE sandbox_id IS NOT NULL;

CREATE INDEX events_sandbox_deleted ON events (sandbox_id, seq) WHERE kind = 'deleted' AND sandbox_id IS NOT NULL;

CREATE INDEX events_ticket ON events (ticket_id, seq);

CREATE TABLE model_calls (
  id TEXT COLLATE "C" NOT NULL,
  at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  ticket_id TEXT COLLATE "C",
  run_id TEXT COLLATE "C",
  step_execution_id TEXT COLLATE "C",
  attempt_id TEXT COLLATE "C",
  agent TEXT COLLATE "C",
  workflow TEXT COLLATE "C",
  upstream TEXT COLLATE "C",
  model TEXT COLLATE "C",
  status INTEGER,
  input_tokens BIGINT DEFAULT 0 NOT NULL,
  output_tokens BIGINT DEFAULT 0 NOT NULL,
  cache_read_tokens BIGINT DEFAULT 0 NOT NULL,
  cache_write_tokens BIGINT DEFAULT 0 NOT NULL,
  tokens BIGINT DEFAULT 0 NOT NULL,
  cost_usd FLOAT,
  reserved_usd FLOAT,
  reserved_tokens BIGINT,
  latency_ms FLOAT,
  note TEXT COLLATE "C",
  sandbox_id TEXT COLLATE "C",
  PRIMARY KEY (id)
);

CREATE INDEX model_calls_at ON model_calls (at);

CREATE INDEX model_calls_run ON model_calls (run_id);

CREATE INDEX model_calls_sandbox ON model_calls (sandbox_id) WHERE sandbox_id IS NOT NULL;

CREATE INDEX model_calls_step ON model_calls (step_execution_id);

CREATE TABLE notices (
  id TEXT COLLATE "C" NOT NULL,
  url TEXT COLLATE "C" NOT NULL,
  kinds TEXT COLLATE "C" DEFAULT '[]' NOT NULL,
  project_id TEXT COLLATE "C",
  created_by TEXT COLLATE "C" NOT NULL,
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  sent_at TEXT COLLATE "C",
  error TEXT COLLATE "C",
  PRIMARY KEY (id)
);

CREATE TABLE positions (
  name TEXT COLLATE "C" NOT NULL,
  seq BIGINT NOT NULL,
  PRIMARY KEY (name)
);

CREATE TABLE sandboxes (
  id TEXT COLLATE "C" DEFAULT replace(gen_random_uuid()::text, '-', '') NOT NULL,
  name TEXT COLLATE "C",
  project_id TEXT COLLATE "C",
  state TEXT COLLATE "C" DEFAULT 'starting' NOT NULL,
  agent_id TEXT COLLATE "C",
  image TEXT COLLATE "C",
  snapshot_id TEXT COLLATE "C",
  parent_id TEXT COLLATE "C",
  memory_mb INTEGER,
  vcpus INTEGER,
  disk_mb INTEGER,
  network TEXT COLLATE "C",
  secrets TEXT COLLATE "C",
  secret BOOLEAN,
  env TEXT COLLATE "C",
  labels TEXT COLLATE "C",
  ttl_seconds FLOAT,
  idle_timeout_seconds FLOAT,
  budget_usd FLOAT,
  budget_tokens BIGINT,
  wanted TEXT COLLATE "C",
  error TEXT COLLATE "C",
  created_by TEXT COLLATE "C",
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  started_at TEXT COLLATE "C",
  used_at TEXT COLLATE "C",
  ended_at TEXT COLLATE "C",
  ends_at BIGINT,
  host TEXT COLLATE "C",
  worker TEXT COLLATE "C",
  hold_id TEXT COLLATE "C",
  lease_until BIGINT,
  vm_id INTEGER,
  PRIMARY KEY (id)
);

CREATE INDEX sandboxes_created ON sandboxes (created_at, id);

CREATE INDEX sandboxes_due ON sandboxes (created_at, id, state, wanted, host, snapshot_id, hold_id) WHERE state NOT IN ('ended', 'lost') AND hold_id IS NULL AND (state <> 'paused' OR wanted IS NOT NULL);

CREATE INDEX sandboxes_ending ON sandboxes (ends_at) WHERE state NOT IN ('ended', 'lost') AND hold_id IS NULL AND ends_at IS NOT NULL;

CREATE INDEX sandboxes_held ON sandboxes (hold_id, lease_until) WHERE hold_id IS NOT NULL;

CREATE INDEX sandboxes_live ON sandboxes (state) WHERE state NOT IN ('ended', 'lost');

CREATE INDEX sandboxes_name ON sandboxes (name);

CREATE TABLE schedules (
  workflow TEXT COLLATE "C" NOT NULL,
  number INTEGER NOT NULL,
  workflow_id TEXT COLLATE "C" NOT NULL,
  cron TEXT COLLATE "C" DEFAULT '' NOT NULL,
  time_zone TEXT COLLATE "C" DEFAULT 'UTC' NOT NULL,
  missed TEXT COLLATE "C" DEFAULT 'once' NOT NULL,
  next_at BIGINT,
  computed_at BIGINT DEFAULT 0 NOT NULL,
  last_at TEXT COLLATE "C",
  last_ticket_id TEXT COLLATE "C",
  missed_count INTEGER DEFAULT 0 NOT NULL,
  error TEXT COLLATE "C",
  PRIMARY KEY (workflow, number)
);

CREATE TABLE secrets (
  name TEXT COLLATE "C" NOT NULL,
  scope TEXT COLLATE "C" NOT NULL,
  sealed TEXT COLLATE "C" NOT NULL,
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  updated_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  PRIMARY KEY (name, scope)
);

CREATE TABLE snapshots (
  id TEXT COLLATE "C" NOT NULL,
  kind TEXT COLLATE "C" NOT NULL,
  name TEXT COLLATE "C",
  host TEXT COLLATE "C" NOT NULL,
  project_id TEXT COLLATE "C",
  sandbox_id TEXT COLLATE "C",
  ticket_id TEXT COLLATE "C",
  step_id TEXT COLLATE "C",
  attempt_id TEXT COLLATE "C",
  spec TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
  digest TEXT COLLATE "C" DEFAULT '' NOT NULL,
  size_bytes BIGINT DEFAULT 0 NOT NULL,
  secrets BOOLEAN DEFAULT true NOT NULL,
  created_by TEXT COLLATE "C",
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  expires_at BIGINT,
  PRIMARY KEY (id)
);

CREATE INDEX snapshots_created ON snapshots (created_at, id);

CREATE INDEX snapshots_expires ON snapshots (expires_at) WHERE expires_at IS NOT NULL;

CREATE INDEX snapshots_host ON snapshots (host, kind);

CREATE INDEX snapshots_name ON snapshots (name);

CREATE INDEX snapshots_sandbox ON snapshots (sandbox_id);

CREATE INDEX snapshots_ticket ON snapshots (ticket_id);

CREATE TABLE ticket_dependencies (
  ticket_id TEXT COLLATE "C" NOT NULL,
  depends_on TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (ticket_id, depends_on)
);

CREATE INDEX ticket_dependencies_depends_on ON ticket_dependencies (depends_on);

CREATE TABLE tickets (
  id TEXT COLLATE "C" DEFAULT replace(gen_random_uuid()::text, '-', '') NOT NULL,
  project_id TEXT COLLATE "C",
  title TEXT COLLATE "C" DEFAULT '' NOT NULL,
  description TEXT COLLATE "C",
  state TEXT COLLATE "C" DEFAULT 'draft' NOT NULL,
  agent_id TEXT COLLATE "C",
  assignee_id TEXT COLLATE "C",
  assignee_type TEXT COLLATE "C",
  execution_mode TEXT COLLATE "C" DEFAULT 'agent',
  workflow_id TEXT COLLATE "C",
  inputs TEXT COLLATE "C",
  outputs TEXT COLLATE "C",
  error TEXT COLLATE "C",
  priority INTEGER DEFAULT 0 NOT NULL,
  timeout_seconds FLOAT,
  max_attempts INTEGER,
  budget_usd FLOAT,
  budget_tokens BIGINT,
  over_budget TEXT COLLATE "C",
  trigger_type TEXT COLLATE "C" DEFAULT 'ticket',
  trigger_data TEXT COLLATE "C",
  run_id TEXT COLLATE "C",
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  updated_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  started_at TEXT COLLATE "C",
  completed_at TEXT COLLATE "C",
  keep_vm TEXT COLLATE "C",
  keep_vm_seconds FLOAT,
  PRIMARY KEY (id)
);

CREATE INDEX tickets_created ON tickets (created_at, id);

CREATE INDEX tickets_ended ON tickets (state, created_at, id) WHERE state IN ('done', 'failed', 'cancelled');

CREATE INDEX tickets_ready ON tickets (priority DESC, created_at) WHERE state = 'ready';

CREATE INDEX tickets_unfinished ON tickets (state) WHERE state IN ('in_progress', 'waiting', 'blocked');

CREATE INDEX tickets_unknown_state ON tickets (state) WHERE state NOT IN ('draft', 'ready', 'blocked', 'in_progress', 'waiting', 'done', 'failed', 'cancelled');

CREATE TABLE tokens (
  id TEXT COLLATE "C" NOT NULL,
  name TEXT COLLATE "C" NOT NULL,
  kind TEXT COLLATE "C" NOT NULL,
  hash TEXT COLLATE "C" NOT NULL,
  role TEXT COLLATE "C" NOT NULL,
  project_id TEXT COLLATE "C",
  created_by TEXT COLLATE "C" NOT NULL,
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  expires_at BIGINT,
  last_used_at TEXT COLLATE "C",
  PRIMARY KEY (id),
  CONSTRAINT tokens_hash UNIQUE (hash)
);

CREATE TABLE webhook_calls (
  workflow TEXT COLLATE "C" NOT NULL,
  key TEXT COLLATE "C" NOT NULL,
  digest TEXT COLLATE "C" NOT NULL,
  ticket_id TEXT COLLATE "C" NOT NULL,
  at BIGINT NOT NULL,
  PRIMARY KEY (workflow, key)
);

CREATE INDEX webhook_calls_at ON webhook_calls (at);

CREATE TABLE workers (
  id TEXT COLLATE "C" NOT NULL,
  host TEXT COLLATE "C" NOT NULL,
  pid INTEGER,
  started_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  seen_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  info TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
  PRIMARY KEY (id)
);

CREATE TABLE workflows (
  id TEXT COLLATE "C" NOT NULL,
  name TEXT COLLATE "C" NOT NULL,
  version TEXT COLLATE "C" NOT NULL,
  description TEXT COLLATE "C" DEFAULT '' NOT NULL,
  steps TEXT COLLATE "C" DEFAULT '[]' NOT NULL,
  variables TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
  budget_usd FLOAT,
  budget_tokens BIGINT,
  enabled BOOLEAN DEFAULT true NOT NULL,
  created_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  updated_at TEXT COLLATE "C" DEFAULT to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
  PRIMARY KEY (id),
  CONSTRAINT workflows_name_version UNIQUE (name, version)
);

CREATE TABLE workflow_runs (
  id TEXT COLLATE "C" NOT NULL,
  workflow_id TEXT COLLATE "C",
  workflow_version TEXT COLLATE "C",
  ticket_id TEXT COLLATE "C" NOT NULL,
  status TEXT COLLATE "C" NOT NULL,
  trigger_type TEXT COLLATE "C" DEFAULT 'ticket' NOT NULL,
  trigger_data TEXT COLLATE "C",
  started_at TEXT COLLATE "C",
  completed_at TEXT COLLATE "C",
  error TEXT COLLATE "C",
  error_step TEXT COLLATE "C",
  total_vm_time_ms FLOAT DEFAULT 0 NOT NULL,
  total_api_tokens BIGINT DEFAULT 0 NOT NULL,
  total_cost_usd FLOAT DEFAULT 0 NOT NULL,
  parent_step_id TEXT COLLATE "C",
  root_run_id TEXT COLLATE "C",
  path TEXT COLLATE "C" DEFAULT '' NOT NULL,
  definition TEXT COLLATE "C",
  context TEXT COLLATE "C",
  progress TEXT COLLATE "C",
  unprocessed TEXT COLLATE "C",
  revision INTEGER DEFAULT 0 NOT NULL,
  due_at BIGINT,
  deadline_at BIGINT,
  PRIMARY KEY (id),
  FOREIGN KEY(ticket_id) REFERENCES tickets (id) ON DELETE CASCADE
);

CREATE INDEX workflow_runs_definition ON workflow_runs (definition) WHERE definition IS NOT NULL;

CREATE INDEX workflow_runs_due ON workflow_runs (due_at) WHERE due_at IS NOT NULL;

CREATE INDEX workflow_runs_live ON workflow_runs (ticket_id) WHERE (progress IS NOT NULL OR status = 'waiting') AND status IN ('running', 'waiting');

CREATE INDEX workflow_runs_parent ON workflow_runs (parent_step_id) WHERE parent_step_id IS NOT NULL;

CREATE INDEX workflow_runs_ticket ON workflow_runs (ticket_id);

CREATE TABLE step_executions (
  id TEXT COLLATE "C" NOT NULL,
  run_id TEXT COLLATE "C" NOT NULL,
  step_id TEXT COLLATE "C" NOT NULL,
  agent_id TEXT COLLATE "C",
  agent_name TEXT COLLATE "C",
  agent_version TEXT COLLATE "C",
  status TEXT COLLATE "C" NOT NULL,
  attempt_id TEXT COLLATE "C",
  vm_id INTEGER,
  inputs TEXT COLLATE "C",
  outputs TEXT COLLATE "C",
  queued_at TEXT COLLATE "C",
  started_at TEXT COLLATE "C",
  completed_at TEXT COLLATE "C",
  duration_ms FLOAT,
  api_tokens_used BIGINT DEFAULT 0 NOT NULL,
  error TEXT COLLATE "C",
  retry_count INTEGER DEFAULT 0 NOT NULL,
  max_attempts INTEGER DEFAULT 1 NOT NULL,
  timeout_seconds FLOAT,
  available_at BIGINT,
  priority INTEGER DEFAULT 0 NOT NULL,
  ticket_created_at TEXT COLLATE "C",
  retry TEXT COLLATE "C",
  question TEXT COLLATE "C",
  verdict TEXT COLLATE "C",
  fan_out TEXT COLLATE "C",
  keep_vm TEXT COLLATE "C",
  from_step TEXT COLLATE "C",
  snapshot_id TEXT COLLATE "C",
  PRIMARY KEY (id),
  FOREIGN KEY(run_id) REFERENCES workflow_runs (id) ON DELETE CASCADE
);

CREATE INDEX step_executions_delayed ON step_executions (available_at) WHERE status = 'ready' AND available_at IS NOT NULL;

CREATE INDEX step_executions_ready ON step_executions (priority DESC, ticket_created_at) WHERE status = 'ready' AND available_at IS NULL;

CREATE UNIQUE INDEX step_executions_run ON step_executions (run_id, step_id);

CREATE INDEX step_executions_waiting ON step_executions (available_at) WHERE status = 'waiting' AND available_at IS NOT NULL;

CREATE TABLE attempts (
  id TEXT COLLATE "C" NOT NULL,
  step_execution_id TEXT COLLATE "C" NOT NULL,
  number INTEGER NOT NULL,
  worker TEXT COLLATE "C" NOT NULL,
  vm_id INTEGER,
  lease_until BIGINT NOT NULL,
  outcome TEXT COLLATE "C",
  reason TEXT COLLATE "C",
  error TEXT COLLATE "C",
  exit_code INTEGER,
  timings TEXT COLLATE "C",
  api_tokens_used BIGINT DEFAULT 0 NOT NULL,
  cost_usd FLOAT DEFAULT 0 NOT NULL,
  started_at TEXT COLLATE "C",
  ended_at TEXT COLLATE "C",
  PRIMARY KEY (id),
  FOREIGN KEY(step_execution_id) REFERENCES step_executions (id) ON DELETE CASCADE
);

CREATE INDEX attempts_lease ON attempts (lease_until) WHERE outcome IS NULL;

CREATE INDEX attempts_step ON attempts (step_execution_id);

INSERT INTO clock (offset_ms) VALUES (0);

CREATE FUNCTION swarm_time_text(moment timestamptz) RETURNS text LANGUAGE sql STABLE AS $$
  SELECT to_char(moment AT TIME ZONE 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')
$$;

-- What other tools write: CURRENT_TIMESTAMP, a local time with its offset, microseconds, nothing. What is no time stays
-- as it is.
CREATE FUNCTION swarm_created_at(given text) RETURNS text LANGUAGE plpgsql
  SET TimeZone = 'UTC' SET search_path FROM CURRENT AS $$
BEGIN
  IF coalesce(given, '') = '' THEN
    RETURN swarm_time_text(clock_timestamp());
  ELSIF given ~ '^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$' OR given !~ '^\d{4}-\d\d-\d\d' THEN
    RETURN given;
  END IF;
  RETURN swarm_time_text(given::timestamptz);
EXCEPTION WHEN data_exception THEN
  RETURN given;
END $$;

CREATE FUNCTION swarm_ticket_inserted() RETURNS trigger LANGUAGE plpgsql
  SET search_path FROM CURRENT AS $$
BEGIN
  NEW.id := coalesce(NEW.id, replace(gen_random_uuid()::text, '-', ''));
  NEW.created_at := swarm_created_at(NEW.created_at);
  RETURN NEW;
END $$;
CREATE TRIGGER tickets_inserted BEFORE INSERT ON tickets FOR EACH ROW
  WHEN (NEW.id IS NULL OR coalesce(NEW.created_at, '') !~ '^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$')
  EXECUTE FUNCTION swarm_ticket_inserted();

CREATE FUNCTION swarm_ticket_changed() RETURNS trigger LANGUAGE plpgsql
  SET search_path FROM CURRENT AS $$
BEGIN
  IF NEW.created_at IS DISTINCT FROM OLD.created_at THEN
    NEW.created_at := swarm_created_at(NEW.created_at);
  END IF;
  IF NEW.updated_at IS NOT DISTINCT FROM OLD.updated_at THEN
    NEW.updated_at := swarm_time_text(clock_timestamp());
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER tickets_created_changed BEFORE UPDATE OF created_at ON tickets FOR EACH ROW
  WHEN (NEW.created_at IS DISTINCT FROM OLD.created_at) EXECUTE FUNCTION swarm_ticket_changed();
CREATE TRIGGER tickets_touched BEFORE UPDATE OF state ON tickets FOR EACH ROW
  WHEN (NEW.updated_at IS NOT DISTINCT FROM OLD.updated_at) EXECUTE FUNCTION swarm_ticket_changed();

-- Runs, steps and attempts go by their foreign keys.
CREATE FUNCTION swarm_ticket_deleted() RETURNS trigger LANGUAGE plpgsql
  SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
  DELETE FROM ticket_dependencies WHERE ticket_id = OLD.id;
  DELETE FROM artifacts WHERE digest IN (SELECT digest FROM artifact_uses WHERE ticket_id = OLD.id)
    AND NOT EXISTS (SELECT 1 FROM artifact_uses u WHERE u.digest = artifacts.digest AND u.ticket_id <> OLD.id);
  DELETE FROM artifact_uses WHERE ticket_id = OLD.id;
  INSERT INTO events (ticket_id, kind) VALUES (OLD.id, 'deleted');
  RETURN NULL;
END $$;
CREATE TRIGGER tickets_deleted AFTER DELETE ON tickets FOR EACH ROW EXECUTE FUNCTION swarm_ticket_deleted();

CREATE FUNCTION swarm_ticket_snapshots() RETURNS trigger LANGUAGE plpgsql
  SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
  UPDATE snapshots SET expires_at = 0 WHERE ticket_id = OLD.id;
  RETURN NULL;
END $$;
CREATE TRIGGER tickets_snapshots AFTER DELETE ON tickets FOR EACH ROW EXECUTE FUNCTION swarm_ticket_snapshots();

-- When workflows change, by whatever program, their schedules are read again (store/registry/schedules.py).
CREATE FUNCTION swarm_workflow_changed() RETURNS trigger LANGUAGE plpgsql
  SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
  INSERT INTO schedules (workflow, number, workflow_id, next_at) VALUES ('', 0, '', 0)
  ON CONFLICT (workflow, number) DO NOTHING;
  RETURN NULL;
END $$;
CREATE TRIGGER workflows_added AFTER INSERT ON workflows FOR EACH ROW EXECUTE FUNCTION swarm_workflow_changed();
CREATE TRIGGER workflows_changed AFTER UPDATE OF name, version, steps, enabled ON workflows
  FOR EACH ROW EXECUTE FUNCTION swarm_workflow_changed();
CREATE TRIGGER workflows_removed AFTER DELETE ON workflows FOR EACH ROW EXECUTE FUNCTION swarm_workflow_changed();

-- A row that another tool inserts, or copies, is held by nobody; its created_at sorts, however it is written.
CREATE FUNCTION swarm_sandbox_inserted() RETURNS trigger LANGUAGE plpgsql
  SET search_path FROM CURRENT AS $$
BEGIN
  NEW.id := coalesce(NEW.id, replace(gen_random_uuid()::text, '-', ''));
  NEW.hold_id := NULL;
  NEW.worker := NULL;
  NEW.lease_until := NULL;
  NEW.created_at := swarm_created_at(NEW.created_at);
  RETURN NEW;
END $$;
CREATE TRIGGER sandboxes_inserted BEFORE INSERT ON sandboxes FOR EACH ROW EXECUTE FUNCTION swarm_sandbox_inserted();

-- What nobody can resume any more goes; a named snapshot stays. The files are removed by their host's engine.
CREATE FUNCTION swarm_sandbox_deleted() RETURNS trigger LANGUAGE plpgsql
  SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
  UPDATE snapshots SET expires_at = 0 WHERE sandbox_id = OLD.id AND kind IN ('pause', 'fork');
  INSERT INTO events (ticket_id, kind, sandbox_id) VALUES ('', 'deleted', OLD.id);
  RETURN NULL;
END $$;
CREATE TRIGGER sandboxes_deleted AFTER DELETE ON sandboxes FOR EACH ROW EXECUTE FUNCTION swarm_sandbox_deleted();

-- Another id: whoever holds it, holds it no more. One that sleeps keeps its snapshot.
CREATE FUNCTION swarm_sandbox_renamed() RETURNS trigger LANGUAGE plpgsql
  SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
  NEW.hold_id := NULL;
  NEW.lease_until := NULL;
  UPDATE snapshots SET sandbox_id = NEW.id WHERE sandbox_id = OLD.id;
  INSERT INTO events (ticket_id, kind, sandbox_id) VALUES ('', 'deleted', OLD.id);
  RETURN NEW;
END $$;
CREATE TRIGGER sandboxes_renamed BEFORE UPDATE OF id ON sandboxes FOR EACH ROW
  WHEN (NEW.id IS DISTINCT FROM OLD.id) EXECUTE FUNCTION swarm_sandbox_renamed();

-- Engines and servers listen for what any program commits. Swarm's own connections tell after their COMMIT: whoever
-- tells within a transaction lets no other one commit that does so, until its own is on the disk.
CREATE FUNCTION swarm_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_catalog.pg_notify('swarm', TG_TABLE_SCHEMA);
  RETURN NULL;
END $$;
CREATE TRIGGER tickets_notify AFTER INSERT OR UPDATE OR DELETE ON tickets FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER ticket_dependencies_notify AFTER INSERT OR UPDATE OR DELETE ON ticket_dependencies FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER agents_notify AFTER INSERT OR UPDATE OR DELETE ON agents FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER workflows_notify AFTER INSERT OR UPDATE OR DELETE ON workflows FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER schedules_notify AFTER INSERT OR UPDATE OR DELETE ON schedules FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER workflow_runs_notify AFTER INSERT OR UPDATE OR DELETE ON workflow_runs FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER step_executions_notify AFTER INSERT OR UPDATE OR DELETE ON step_executions FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER attempts_notify AFTER INSERT OR UPDATE OR DELETE ON attempts FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER events_notify AFTER INSERT OR UPDATE OR DELETE ON events FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER sandboxes_notify AFTER INSERT OR UPDATE OR DELETE ON sandboxes FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();
CREATE TRIGGER snapshots_notify AFTER INSERT OR UPDATE OR DELETE ON snapshots FOR EACH STATEMENT
  WHEN (current_setting('swarm.tells', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION swarm_changed();

-- They have the rights of who made them: nobody else may put them on a table of his own, with rows of his own.
REVOKE EXECUTE ON FUNCTION swarm_ticket_deleted(),
  swarm_ticket_snapshots(),
  swarm_workflow_changed(),
  swarm_sandbox_deleted(),
  swarm_sandbox_renamed()
FROM PUBLIC;
