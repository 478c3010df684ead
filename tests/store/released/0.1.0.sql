BEGIN TRANSACTION;
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
INSERT INTO "agents" VALUES('0d72b1b5-a98e-4356-bf52-f654d0509dc4','echo','1.0.0','','/nowhere/echo','python','["main.py"]',NULL,NULL,NULL,256,1,2048,NULL,NULL,600.0,NULL,'none','[]','{}','[]','[]','[]','{"max_attempts":1,"delay_seconds":1.0,"factor":2.0,"max_delay_seconds":300.0,"on":["agent_failed","boot_failed","channel_broken","host_error","out_of_memory","timeout"]}',0,NULL,NULL,NULL,'2026-11-28T13:22:45.116Z','2026-11-28T13:22:45.116Z');
INSERT INTO "agents" VALUES('retry-agent','retry','1.0.0','','/nowhere/retry','python','["main.py"]',NULL,NULL,NULL,256,1,2048,NULL,NULL,600.0,NULL,'none','[]','{}','[]','[]','[]','{"max_attempts":3,"delay_seconds":10,"factor":2,"max_delay_seconds":15,"on":["agent_failed","boot_failed","channel_broken","host_error","out_of_memory","timeout"]}',0,NULL,NULL,NULL,'2026-11-28T13:22:45.118Z','2026-11-28T13:22:45.118Z');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v0_1_0');
CREATE TABLE artifact_uses (
  ticket_id TEXT NOT NULL,
  digest TEXT NOT NULL,
  PRIMARY KEY (ticket_id, digest)
);
CREATE TABLE artifacts (
  digest TEXT NOT NULL,
  bytes INTEGER NOT NULL,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  data TEXT NOT NULL,
  PRIMARY KEY (digest)
);
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
INSERT INTO "attempts" VALUES('01a22252-8d04-7bd9-ba58-d7a2b8171ecb','01a22252-8d04-7d8f-9001-9e7b43063a8b',1,'worker',NULL,1795872195124,'succeeded',NULL,NULL,0,NULL,0,0.0,'2026-11-28T13:22:45.124Z','2026-11-28T13:22:45.132Z');
INSERT INTO "attempts" VALUES('01a22252-8d14-7526-980c-549cb4e42a2c','01a22252-8d14-7ada-946b-f11d73021552',1,'worker',NULL,1795872195140,'failed','agent_failed','it broke',NULL,'{"agent":12.5}',0,0.0,'2026-11-28T13:22:45.140Z','2026-11-28T13:22:45.142Z');
INSERT INTO "attempts" VALUES('01a22252-8de9-7569-abce-fa24e725063f','01a22252-8de5-72e4-b403-de83715f5036',1,'test',NULL,1795872195353,'succeeded',NULL,NULL,0,NULL,0,0.0,'2026-11-28T13:22:45.353Z','2026-11-28T13:22:45.355Z');
INSERT INTO "attempts" VALUES('01a22252-8e57-7614-afca-a8a285aa839f','01a22252-8e55-72ec-b7e2-0e0461c2ebe6',1,'test',NULL,1795872195463,'succeeded',NULL,NULL,0,NULL,0,0.0,'2026-11-28T13:22:45.463Z','2026-11-28T13:22:45.464Z');
INSERT INTO "attempts" VALUES('01a22252-8e57-7639-b594-15d87fbd7f22','01a22252-8e55-72ec-b7e2-0e0461c2ebe7',1,'test',NULL,1795872195463,NULL,NULL,NULL,NULL,NULL,0,0.0,'2026-11-28T13:22:45.463Z',NULL);
INSERT INTO "attempts" VALUES('01a22252-8e57-72c3-8e7e-321cabcec9c5','01a22252-8e55-72ec-b7e2-0e0461c2ebe8',1,'test',NULL,1795872195463,NULL,NULL,NULL,NULL,NULL,0,0.0,'2026-11-28T13:22:45.463Z',NULL);
CREATE TABLE clock (
  offset_ms INTEGER DEFAULT 0 NOT NULL
);
INSERT INTO "clock" VALUES(0);
CREATE TABLE definitions (
  digest TEXT NOT NULL,
  definition TEXT NOT NULL,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  PRIMARY KEY (digest)
);
INSERT INTO "definitions" VALUES('b552f21006dca1be9164031db39e7fa01e691b10cf352346d12923ff28f18d86','{"format":1,"name":"of-waiting","steps":[{"agent":"echo@1.0.0","id":"build","inputs":{"n":1}},{"approval":{"message":"Ship it?"},"id":"ask","needs":["build"]},{"agent":"echo@1.0.0","id":"ship","inputs":{"built":"${steps.build.outputs.n}"},"needs":["ask"]}],"version":"1.0.0"}','2026-11-28T13:22:45.350Z');
INSERT INTO "definitions" VALUES('900410932961a887674fd6c9e1b74dfb7c2f8b005fbb14f07a11a9d46b004fe9','{"format":1,"name":"of-half-way","steps":[{"agent":"echo@1.0.0","for_each":{"items":[1,2,3]},"id":"each","inputs":{"n":"${item}"}},{"agent":"echo@1.0.0","id":"sum","inputs":{"all":"${steps.each.outputs}"},"needs":["each"]}],"version":"1.0.0"}','2026-11-28T13:22:45.462Z');
CREATE TABLE events (
  seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  ticket_id TEXT NOT NULL,
  step_id TEXT,
  attempt_id TEXT,
  at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')) NOT NULL,
  kind TEXT NOT NULL,
  data TEXT DEFAULT '{}' NOT NULL
);
INSERT INTO "events" VALUES(1,'done',NULL,NULL,'2026-11-28T13:22:45.124Z','transition','{"of":"ticket","from":"ready","to":"in_progress"}');
INSERT INTO "events" VALUES(2,'done','main','01a22252-8d04-7bd9-ba58-d7a2b8171ecb','2026-11-28T13:22:45.124Z','transition','{"of":"step","from":"ready","to":"running","number":1,"worker":"worker"}');
INSERT INTO "events" VALUES(3,'done',NULL,'01a22252-8d04-7bd9-ba58-d7a2b8171ecb','2026-11-28T13:22:45.129Z','output','{"stream":"stdout","text":"hello"}');
INSERT INTO "events" VALUES(4,'done','main','01a22252-8d04-7bd9-ba58-d7a2b8171ecb','2026-11-28T13:22:45.132Z','transition','{"of":"step","from":"running","to":"completed","why":"succeeded"}');
INSERT INTO "events" VALUES(5,'done',NULL,NULL,'2026-11-28T13:22:45.132Z','transition','{"of":"ticket","from":"in_progress","to":"done"}');
INSERT INTO "events" VALUES(6,'failed',NULL,NULL,'2026-11-28T13:22:45.140Z','transition','{"of":"ticket","from":"ready","to":"in_progress"}');
INSERT INTO "events" VALUES(7,'failed','main','01a22252-8d14-7526-980c-549cb4e42a2c','2026-11-28T13:22:45.140Z','transition','{"of":"step","from":"ready","to":"running","number":1,"worker":"worker"}');
INSERT INTO "events" VALUES(8,'failed','main','01a22252-8d14-7526-980c-549cb4e42a2c','2026-11-28T13:22:45.142Z','transition','{"of":"step","from":"running","to":"failed","why":"agent_failed","error":"it broke"}');
INSERT INTO "events" VALUES(9,'failed',NULL,NULL,'2026-11-28T13:22:45.142Z','transition','{"of":"ticket","from":"in_progress","to":"failed","error":"it broke"}');
INSERT INTO "events" VALUES(10,'waiting',NULL,NULL,'2026-11-28T13:22:45.329Z','transition','{"of":"ticket","from":"ready","to":"in_progress"}');
INSERT INTO "events" VALUES(11,'waiting','build',NULL,'2026-11-28T13:22:45.349Z','transition','{"of":"step","from":"pending","to":"ready"}');
INSERT INTO "events" VALUES(12,'waiting','build','01a22252-8de9-7569-abce-fa24e725063f','2026-11-28T13:22:45.353Z','transition','{"of":"step","from":"ready","to":"running","number":1,"worker":"test"}');
INSERT INTO "events" VALUES(13,'waiting','build','01a22252-8de9-7569-abce-fa24e725063f','2026-11-28T13:22:45.355Z','transition','{"of":"step","from":"running","to":"completed","why":"succeeded"}');
INSERT INTO "events" VALUES(14,'waiting','ask',NULL,'2026-11-28T13:22:45.355Z','transition','{"of":"step","from":"pending","to":"waiting"}');
INSERT INTO "events" VALUES(15,'waiting',NULL,NULL,'2026-11-28T13:22:45.355Z','transition','{"of":"ticket","from":"in_progress","to":"waiting"}');
INSERT INTO "events" VALUES(16,'half-way',NULL,NULL,'2026-11-28T13:22:45.458Z','transition','{"of":"ticket","from":"ready","to":"in_progress"}');
INSERT INTO "events" VALUES(17,'half-way','each',NULL,'2026-11-28T13:22:45.461Z','transition','{"of":"step","from":"pending","to":"running"}');
INSERT INTO "events" VALUES(18,'half-way','each[0]',NULL,'2026-11-28T13:22:45.461Z','transition','{"of":"step","from":"pending","to":"ready"}');
INSERT INTO "events" VALUES(19,'half-way','each[1]',NULL,'2026-11-28T13:22:45.461Z','transition','{"of":"step","from":"pending","to":"ready"}');
INSERT INTO "events" VALUES(20,'half-way','each[2]',NULL,'2026-11-28T13:22:45.461Z','transition','{"of":"step","from":"pending","to":"ready"}');
INSERT INTO "events" VALUES(21,'half-way','each[0]','01a22252-8e57-7614-afca-a8a285aa839f','2026-11-28T13:22:45.463Z','transition','{"of":"step","from":"ready","to":"running","number":1,"worker":"test"}');
INSERT INTO "events" VALUES(22,'half-way','each[1]','01a22252-8e57-7639-b594-15d87fbd7f22','2026-11-28T13:22:45.463Z','transition','{"of":"step","from":"ready","to":"running","number":1,"worker":"test"}');
INSERT INTO "events" VALUES(23,'half-way','each[2]','01a22252-8e57-72c3-8e7e-321cabcec9c5','2026-11-28T13:22:45.463Z','transition','{"of":"step","from":"ready","to":"running","number":1,"worker":"test"}');
INSERT INTO "events" VALUES(24,'half-way','each[0]','01a22252-8e57-7614-afca-a8a285aa839f','2026-11-28T13:22:45.464Z','transition','{"of":"step","from":"running","to":"completed","why":"succeeded"}');
INSERT INTO "events" VALUES(25,'cancelled',NULL,NULL,'2026-11-28T13:22:45.547Z','transition','{"of":"ticket","from":"ready","to":"cancelled","error":"cancelled by a person"}');
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
INSERT INTO "schedules" VALUES('',0,'','','UTC','once',0,0,NULL,NULL,0,NULL);
INSERT INTO "schedules" VALUES('nightly',0,'f8a16671-2b2f-5f71-994a-7d12c8080f8f','0 3 * * *','UTC','once',1795921200000,1795872165539,NULL,NULL,0,NULL);
CREATE TABLE secrets (
  name TEXT NOT NULL,
  scope TEXT NOT NULL,
  sealed TEXT NOT NULL,
  created_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  updated_at TEXT DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  PRIMARY KEY (name, scope)
);
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
INSERT INTO "step_executions" VALUES('01a22252-8d04-7d8f-9001-9e7b43063a8b','01a22252-8d04-7075-bdb3-922ee0ca1f18','main','0d72b1b5-a98e-4356-bf52-f654d0509dc4','echo','1.0.0','completed','01a22252-8d04-7bd9-ba58-d7a2b8171ecb',NULL,'{"word": "hello"}','{"word": "hello"}','2026-11-28T13:22:45.119Z','2026-11-28T13:22:45.124Z','2026-11-28T13:22:45.132Z',8.0,0,NULL,0,1,600.0,NULL,0,'2026-11-28T13:22:45.119Z',NULL,NULL,NULL,NULL);
INSERT INTO "step_executions" VALUES('01a22252-8d14-7ada-946b-f11d73021552','01a22252-8d14-7142-abaa-4a6f7b4ff95d','main','0d72b1b5-a98e-4356-bf52-f654d0509dc4','echo','1.0.0','failed','01a22252-8d14-7526-980c-549cb4e42a2c',NULL,'{}',NULL,'2026-11-28T13:22:45.134Z','2026-11-28T13:22:45.140Z','2026-11-28T13:22:45.142Z',2.0,0,'it broke',0,1,600.0,NULL,0,'2026-11-28T13:22:45.134Z',NULL,NULL,NULL,NULL);
INSERT INTO "step_executions" VALUES('01a22252-8de5-72e4-b403-de83715f5036','01a22252-8dd1-7e6b-8187-196c7d6cf9f2','build','0d72b1b5-a98e-4356-bf52-f654d0509dc4','echo','1.0.0','completed','01a22252-8de9-7569-abce-fa24e725063f',NULL,'{"n":1}','{"n":1}','2026-11-28T13:22:45.349Z','2026-11-28T13:22:45.353Z','2026-11-28T13:22:45.355Z',2.0,0,NULL,0,1,600.0,NULL,0,'2026-11-28T13:22:45.326Z',NULL,NULL,NULL,NULL);
INSERT INTO "step_executions" VALUES('01a22252-8de5-72e4-b403-de83715f5037','01a22252-8dd1-7e6b-8187-196c7d6cf9f2','ask',NULL,NULL,NULL,'waiting',NULL,NULL,NULL,NULL,'2026-11-28T13:22:45.355Z',NULL,NULL,NULL,0,NULL,0,1,NULL,NULL,0,'2026-11-28T13:22:45.326Z',NULL,'Ship it?',NULL,NULL);
INSERT INTO "step_executions" VALUES('01a22252-8de5-72e4-b403-de83715f5038','01a22252-8dd1-7e6b-8187-196c7d6cf9f2','ship',NULL,NULL,NULL,'pending',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,0,1,NULL,NULL,0,'2026-11-28T13:22:45.326Z',NULL,NULL,NULL,NULL);
INSERT INTO "step_executions" VALUES('01a22252-8e55-72ec-b7e2-0e0461c2ebe4','01a22252-8e52-76c4-8f12-876fc65d49a7','each',NULL,NULL,NULL,'running',NULL,NULL,NULL,NULL,NULL,'2026-11-28T13:22:45.461Z',NULL,NULL,0,NULL,0,1,NULL,NULL,0,'2026-11-28T13:22:45.456Z',NULL,NULL,NULL,'{"count":3,"next":3,"running":2,"completed":1,"failed":0,"skipped":0,"error":null}');
INSERT INTO "step_executions" VALUES('01a22252-8e55-72ec-b7e2-0e0461c2ebe5','01a22252-8e52-76c4-8f12-876fc65d49a7','sum',NULL,NULL,NULL,'pending',NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,0,1,NULL,NULL,0,'2026-11-28T13:22:45.456Z',NULL,NULL,NULL,NULL);
INSERT INTO "step_executions" VALUES('01a22252-8e55-72ec-b7e2-0e0461c2ebe6','01a22252-8e52-76c4-8f12-876fc65d49a7','each[0]','0d72b1b5-a98e-4356-bf52-f654d0509dc4','echo','1.0.0','completed','01a22252-8e57-7614-afca-a8a285aa839f',NULL,'{"n":1}','{"n":1}','2026-11-28T13:22:45.461Z','2026-11-28T13:22:45.463Z','2026-11-28T13:22:45.464Z',1.0,0,NULL,0,1,600.0,NULL,0,'2026-11-28T13:22:45.456Z',NULL,NULL,NULL,NULL);
INSERT INTO "step_executions" VALUES('01a22252-8e55-72ec-b7e2-0e0461c2ebe7','01a22252-8e52-76c4-8f12-876fc65d49a7','each[1]','0d72b1b5-a98e-4356-bf52-f654d0509dc4','echo','1.0.0','running','01a22252-8e57-7639-b594-15d87fbd7f22',NULL,'{"n":2}',NULL,'2026-11-28T13:22:45.461Z','2026-11-28T13:22:45.463Z',NULL,NULL,0,NULL,0,1,600.0,NULL,0,'2026-11-28T13:22:45.456Z',NULL,NULL,NULL,NULL);
INSERT INTO "step_executions" VALUES('01a22252-8e55-72ec-b7e2-0e0461c2ebe8','01a22252-8e52-76c4-8f12-876fc65d49a7','each[2]','0d72b1b5-a98e-4356-bf52-f654d0509dc4','echo','1.0.0','running','01a22252-8e57-72c3-8e7e-321cabcec9c5',NULL,'{"n":3}',NULL,'2026-11-28T13:22:45.461Z','2026-11-28T13:22:45.463Z',NULL,NULL,0,NULL,0,1,600.0,NULL,0,'2026-11-28T13:22:45.456Z',NULL,NULL,NULL,NULL);
CREATE TABLE ticket_dependencies (
  ticket_id TEXT NOT NULL,
  depends_on TEXT NOT NULL,
  PRIMARY KEY (ticket_id, depends_on)
);
INSERT INTO "ticket_dependencies" VALUES('blocked','ready');
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
INSERT INTO "tickets" VALUES('done',NULL,'a test',NULL,'done','0d72b1b5-a98e-4356-bf52-f654d0509dc4',NULL,NULL,'agent',NULL,'{"word": "hello"}','{"word": "hello"}',NULL,0,NULL,NULL,NULL,NULL,NULL,'ticket',NULL,'01a22252-8d04-7075-bdb3-922ee0ca1f18','2026-11-28T13:22:45.119Z','2026-11-28T13:22:45.132Z','2026-11-28T13:22:45.124Z','2026-11-28T13:22:45.132Z');
INSERT INTO "tickets" VALUES('failed',NULL,'a test',NULL,'failed','0d72b1b5-a98e-4356-bf52-f654d0509dc4',NULL,NULL,'agent',NULL,NULL,NULL,'it broke',0,NULL,NULL,NULL,NULL,NULL,'ticket',NULL,'01a22252-8d14-7142-abaa-4a6f7b4ff95d','2026-11-28T13:22:45.134Z','2026-11-28T13:22:45.142Z','2026-11-28T13:22:45.140Z','2026-11-28T13:22:45.142Z');
INSERT INTO "tickets" VALUES('waiting',NULL,'a test',NULL,'waiting',NULL,NULL,NULL,'workflow','8b21f687-1d85-5292-808f-c04e2328477d',NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,'ticket',NULL,'01a22252-8dd1-7e6b-8187-196c7d6cf9f2','2026-11-28T13:22:45.326Z','2026-11-28T13:22:45.355Z','2026-11-28T13:22:45.329Z',NULL);
INSERT INTO "tickets" VALUES('half-way',NULL,'a test',NULL,'in_progress',NULL,NULL,NULL,'workflow','a86157fe-8e6d-5692-8b4b-e4677b1493dd',NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,'ticket',NULL,'01a22252-8e52-76c4-8f12-876fc65d49a7','2026-11-28T13:22:45.456Z','2026-11-28T13:22:45.458Z','2026-11-28T13:22:45.458Z',NULL);
INSERT INTO "tickets" VALUES('cancelled',NULL,'a test',NULL,'cancelled','0d72b1b5-a98e-4356-bf52-f654d0509dc4',NULL,NULL,'agent',NULL,NULL,NULL,'cancelled by a person',0,NULL,NULL,NULL,NULL,NULL,'ticket',NULL,NULL,'2026-11-28T13:22:45.540Z','2026-11-28T13:22:45.547Z',NULL,'2026-11-28T13:22:45.547Z');
INSERT INTO "tickets" VALUES('ready',NULL,'a test',NULL,'ready','retry-agent',NULL,NULL,'agent',NULL,NULL,NULL,NULL,5,NULL,NULL,NULL,NULL,NULL,'ticket',NULL,NULL,'2026-11-28T13:22:45.547Z','2026-11-28T13:22:45.547Z',NULL,NULL);
INSERT INTO "tickets" VALUES('blocked',NULL,'a test',NULL,'blocked','0d72b1b5-a98e-4356-bf52-f654d0509dc4',NULL,NULL,'agent',NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,'ticket',NULL,NULL,'2026-11-28T13:22:45.550Z','2026-11-28T13:22:45.550Z',NULL,NULL);
CREATE TABLE webhook_calls (
  workflow TEXT NOT NULL,
  "key" TEXT NOT NULL,
  digest TEXT NOT NULL,
  ticket_id TEXT NOT NULL,
  at INTEGER NOT NULL,
  PRIMARY KEY (workflow, "key")
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
INSERT INTO "workflow_runs" VALUES('01a22252-8d04-7075-bdb3-922ee0ca1f18',NULL,NULL,'done','completed','ticket',NULL,'2026-11-28T13:22:45.124Z','2026-11-28T13:22:45.132Z',NULL,NULL,1.0,0,0.0,NULL,NULL,'',NULL,NULL,NULL,NULL,0,NULL,NULL);
INSERT INTO "workflow_runs" VALUES('01a22252-8d14-7142-abaa-4a6f7b4ff95d',NULL,NULL,'failed','failed','ticket',NULL,'2026-11-28T13:22:45.140Z','2026-11-28T13:22:45.142Z','it broke','main',20.0,0,0.0,NULL,NULL,'',NULL,NULL,NULL,NULL,0,NULL,NULL);
INSERT INTO "workflow_runs" VALUES('01a22252-8dd1-7e6b-8187-196c7d6cf9f2','8b21f687-1d85-5292-808f-c04e2328477d','1.0.0','waiting','waiting','ticket',NULL,'2026-11-28T13:22:45.329Z',NULL,NULL,NULL,1.0,0,0.0,NULL,NULL,'','b552f21006dca1be9164031db39e7fa01e691b10cf352346d12923ff28f18d86','{"inputs":{},"variables":{},"trigger":{"type":"ticket"},"ticket":{"id":"waiting","title":"a test","description":null,"project_id":null}}','{"phase":"steps","open":2,"failed_step":null,"error":null}',NULL,2,NULL,NULL);
INSERT INTO "workflow_runs" VALUES('01a22252-8e52-76c4-8f12-876fc65d49a7','a86157fe-8e6d-5692-8b4b-e4677b1493dd','1.0.0','half-way','running','ticket',NULL,'2026-11-28T13:22:45.458Z',NULL,NULL,NULL,1.0,0,0.0,NULL,NULL,'','900410932961a887674fd6c9e1b74dfb7c2f8b005fbb14f07a11a9d46b004fe9','{"inputs":{},"variables":{},"trigger":{"type":"ticket"},"ticket":{"id":"half-way","title":"a test","description":null,"project_id":null}}','{"phase":"steps","open":2,"failed_step":null,"error":null}',NULL,2,NULL,NULL);
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
INSERT INTO "workflows" VALUES('8b21f687-1d85-5292-808f-c04e2328477d','of-waiting','1.0.0','','{"format":1,"name":"of-waiting","steps":[{"agent":"echo@1","id":"build","inputs":{"n":1}},{"approval":{"message":"Ship it?"},"id":"ask","needs":["build"]},{"agent":"echo@1","id":"ship","inputs":{"built":"${steps.build.outputs.n}"},"needs":["ask"]}],"version":"1.0.0"}','{}',NULL,NULL,1,'2026-11-28T13:22:45.323Z','2026-11-28T13:22:45.323Z');
INSERT INTO "workflows" VALUES('a86157fe-8e6d-5692-8b4b-e4677b1493dd','of-half-way','1.0.0','','{"format":1,"name":"of-half-way","steps":[{"agent":"echo@1","for_each":{"items":[1,2,3]},"id":"each","inputs":{"n":"${item}"}},{"agent":"echo@1","id":"sum","inputs":{"all":"${steps.each.outputs}"},"needs":["each"]}],"version":"1.0.0"}','{}',NULL,NULL,1,'2026-11-28T13:22:45.456Z','2026-11-28T13:22:45.456Z');
INSERT INTO "workflows" VALUES('f8a16671-2b2f-5f71-994a-7d12c8080f8f','nightly','1.0.0','','{"format":1,"name":"nightly","schedule":[{"cron":"0 3 * * *"}],"steps":[{"agent":"echo@1","id":"only"}],"version":"1.0.0"}','{}',NULL,NULL,1,'2026-11-28T13:22:45.539Z','2026-11-28T13:22:45.539Z');
CREATE INDEX tickets_created ON tickets (created_at);
CREATE INDEX tickets_unfinished ON tickets (state) WHERE state IN ('in_progress', 'waiting', 'blocked');
CREATE INDEX tickets_unknown_state ON tickets (state) WHERE state NOT IN ('draft', 'ready', 'blocked', 'in_progress', 'waiting', 'done', 'failed', 'cancelled');
CREATE INDEX tickets_ready ON tickets (priority DESC, created_at) WHERE state = 'ready';
CREATE INDEX ticket_dependencies_depends_on ON ticket_dependencies (depends_on);
CREATE INDEX webhook_calls_at ON webhook_calls (at);
CREATE INDEX workflow_runs_due ON workflow_runs (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX workflow_runs_definition ON workflow_runs (definition) WHERE definition IS NOT NULL;
CREATE INDEX workflow_runs_parent ON workflow_runs (parent_step_id) WHERE parent_step_id IS NOT NULL;
CREATE INDEX workflow_runs_live ON workflow_runs (ticket_id) WHERE (progress IS NOT NULL OR status = 'waiting') AND status IN ('running', 'waiting');
CREATE INDEX workflow_runs_ticket ON workflow_runs (ticket_id);
CREATE INDEX step_executions_waiting ON step_executions (available_at) WHERE status = 'waiting' AND available_at IS NOT NULL;
CREATE INDEX step_executions_delayed ON step_executions (available_at) WHERE status = 'ready' AND available_at IS NOT NULL;
CREATE INDEX step_executions_ready ON step_executions (priority DESC, ticket_created_at) WHERE status = 'ready' AND available_at IS NULL;
CREATE UNIQUE INDEX step_executions_run ON step_executions (run_id, step_id);
CREATE INDEX artifact_uses_digest ON artifact_uses (digest);
CREATE INDEX attempts_lease ON attempts (lease_until) WHERE outcome IS NULL;
CREATE INDEX attempts_step ON attempts (step_execution_id);
CREATE INDEX events_ticket ON events (ticket_id, seq);
CREATE INDEX events_deleted ON events (ticket_id, seq) WHERE kind = 'deleted';
CREATE INDEX model_calls_at ON model_calls (at);
CREATE INDEX model_calls_run ON model_calls (run_id);
CREATE INDEX model_calls_step ON model_calls (step_execution_id);
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
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',25);
COMMIT;
