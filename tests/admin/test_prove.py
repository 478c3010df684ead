"""`swarm prove` must be able to fail: histories that break each promise, made up, or broken by SQL in a real file."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from swarm.admin.prove import Report, VmFact, judge
from swarm.model import ECHO_AGENT_ID, StepStatus, Succeeded
from swarm.store.audit import AttemptFact, LogEntry, SandboxFact, StepFact, TicketFact
from swarm.store.store import Store
from tests.store.databases import ECHO


@dataclass
class History:
    """Facts made up. ``moves``: (of, from, to, attempt) of ticket 't'."""

    moves: list[tuple[str, str, str, str]]
    ticket: TicketFact | None = field(default_factory=lambda: TicketFact(id="t", state="done", run_status="completed"))
    tries: list[AttemptFact] = field(default_factory=list)
    steps: list[StepFact] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)

    def log(self) -> list[LogEntry]:
        return [
            LogEntry(
                seq=seq, ticket_id="t", kind="transition", of=of, before=before, after=after,
                step_id="main" if of == "step" else None, attempt_id=attempt or None,
            )
            for seq, (of, before, after, attempt) in enumerate(self.moves, 1)
        ]  # fmt: skip

    def tickets(self) -> list[TicketFact]:
        return [self.ticket] if self.ticket else []

    def attempts(self) -> list[AttemptFact]:
        return self.tries

    def stalled(self) -> list[str]:
        return self.stuck

    def running_steps(self) -> list[StepFact]:
        return self.steps

    def loses_deletions(self, table: str) -> bool:
        return False

    def sandboxes(self) -> list[SandboxFact]:
        return []

    def renamed(self) -> list[str]:
        return []

    def without_artifacts(self) -> list[tuple[str, int]]:
        return []


START = [("ticket", "ready", "in_progress", ""), ("step", "ready", "running", "a1")]
END = [("step", "running", "completed", "a1"), ("ticket", "in_progress", "done", "")]
AGAIN = [("step", "ready", "running", "a2"), ("step", "running", "completed", "a2")]
ORPHAN = StepFact(step_id="main", ticket_id="t", attempt_alive=False)
LIVE = TicketFact(id="t", state="in_progress", run_status="running", live_steps=1)
FAILED = [("step", "running", "failed", "a1"), ("ticket", "in_progress", "failed", "")]


def attempt(id: str = "a1", outcome: str | None = "succeeded", **values: object) -> AttemptFact:
    facts: dict[str, object] = {"step_status": "completed", "owns_step": True, **values}
    return AttemptFact(id=id, step_execution_id="s", ticket_id="t", outcome=outcome, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "moves",
    [
        [*START, *END],
        [*START, ("step", "running", "ready", "a1"), *AGAIN, END[1]],
        [*START, *FAILED, ("ticket", "failed", "ready", ""), START[0], *AGAIN, END[1]],
        [*START, *FAILED, START[0], *AGAIN, END[1]],
        END,  # the beginning was pruned
        [("ticket", "ready", "failed", ""), ("ticket", "ready", "failed", "")],  # made ready again from outside
        [*START, ("step", "running", "cancelled", "a1"), START[0], *AGAIN, END[1]],  # taken back
    ],
    ids=["plain", "retried", "again by hand", "again from outside", "pruned", "bad row twice", "taken back"],
)  # fmt: skip
def test_a_good_history(moves: list[tuple[str, str, str, str]]) -> None:
    report = judge(History(moves, tries=[attempt()]))
    assert report.kept, report.violations
    assert (report.tickets_seen, report.done) == (1, 1)


def lost(moves: list[tuple[str, str, str, str]], **values: object) -> History:
    facts: dict[str, object] = {"id": "t", "state": "in_progress", "run_status": "running", "live_steps": 1, **values}
    return History(moves, ticket=TicketFact(**facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("history", "promise", "says"),
    [
        (History([*START, *END, END[1]]), "finished_twice", "after it had ended as done"),
        (History([*START, *FAILED, END[1]]), "finished_twice", "after it had ended as failed"),
        (History([*START, *END, END[0]], tries=[attempt()]), "finished_twice", "ended twice"),
        (
            History([*START, ("step", "ready", "running", "a2")], tries=[attempt(outcome=None)]),
            "finished_twice",
            "began while a1 ran it",
        ),
        (History([*START, END[0], *AGAIN]), "finished_twice", "completed twice"),
        (History([*START, *END], tries=[attempt("a1"), attempt("a2")]), "finished_twice", "two attempts of one"),
        (History([*START, *END], ticket=None), "lost", "row is gone"),
        (lost(START, run_status=None), "lost", "it has no active run"),
        (lost(START, run_status="completed"), "lost", "it has no active run"),
        (lost(START, live_steps=0), "lost", "no step left"),
        (lost([*START, *END]), "lost", "the log has it done"),
        (History([*START, *END], steps=[ORPHAN]), "lost", "no attempt runs it"),
        (History(START, stuck=["t"], ticket=LIVE), "lost", "nothing will continue it"),
        (History(START, tries=[attempt(step_status="ready")]), "lost", "succeeded, but its step is ready"),
        (History(START, tries=[attempt(outcome=None, expired_ms=90_000.0)], ticket=LIVE), "lost", "engine took over"),
        (History(START), "unrecorded", "its end is not in the log"),
        (History([*START, *END], ticket=replace(LIVE, state="done")), "unrecorded", "its run is still active"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)  # fmt: skip
def test_a_broken_history(history: History, promise: str, says: str) -> None:
    report = judge(history, engine_alive=True)
    assert not report.kept
    violations = getattr(report, promise)
    assert [o.id for o in violations] == ["t"] * len(violations)
    assert any(says in o.what for o in violations), report.violations


def test_leaked_slots() -> None:
    history = History([*START, *END], tries=[attempt(ended_ms=60_000.0), attempt("a2", outcome="lost", ended_ms=100.0)])
    vms = [
        VmFact(n=1000, attempt_id="a1", owner_alive=True),
        VmFact(n=1001, attempt_id="a2", owner_alive=True),  # it has just heard
        VmFact(n=1002, attempt_id=None, owner_alive=False),
    ]
    assert [o.id for o in judge(history, vms).slots_leaked] == ["VM 1000", "VM 1002"]


def test_a_lease_that_is_over_waits_for_an_engine() -> None:
    tries = [attempt(outcome=None, expired_ms=90_000.0)]
    report = judge(History(START, ticket=LIVE, tries=tries))
    assert report.kept and report.waiting_for_an_engine == 1


@pytest.fixture
async def file(tmp_path: Path) -> Path:
    """A home with a done ticket 'good', and one 'open' whose attempt runs."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "swarm.db"
    async with Store.open(f"sqlite:///{file}") as store:
        await store.migrate()
        await store.put_agent(ECHO)
        for id_ in ("good", "open"):
            with sqlite3.connect(file, timeout=60) as db:
                db.execute(
                    "INSERT INTO tickets (id, title, state, agent_id) VALUES (?, 't', 'ready', ?)", (id_, ECHO_AGENT_ID)
                )
            (claim,) = await store.claim("w", lease_seconds=600)
            if id_ == "good":
                await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
    return file


async def audited(file: Path) -> Report:
    async with Store.open(f"sqlite:///{file}") as store:
        return await store.audit(judge)


async def test_a_real_file(file: Path) -> None:
    report = await audited(file)
    assert report.kept, report.violations
    assert (report.tickets_seen, report.done, report.unfinished, report.attempts) == (2, 1, 1, 2)


@pytest.mark.parametrize(
    ("sql", "who", "says"),
    [
        ("DELETE FROM attempts WHERE outcome IS NULL", "open", "no attempt runs it"),
        ("UPDATE attempts SET outcome = 'lost' WHERE outcome IS NULL", "open", "no attempt runs it"),
        ("UPDATE step_executions SET status = 'completed' WHERE status = 'running'", "open", "no step left"),
        ("UPDATE workflow_runs SET status = 'completed' WHERE status = 'running'", "open", "no active run"),
        ("DELETE FROM events WHERE data LIKE '%\"done\"%'", "good", "its end is not in the log"),
        (
            "UPDATE step_executions SET status = 'ready' WHERE status = 'completed';"
            "DELETE FROM events WHERE data LIKE '%\"completed\"%'",
            "good",
            "but its step is ready",
        ),
        (
            "INSERT INTO events (ticket_id, step_id, attempt_id, kind, data) "
            "SELECT 'open', 'main', 'other', kind, data FROM events "
            "WHERE ticket_id = 'open' AND data LIKE '%\"running\"%'",
            "open",
            "began while",
        ),
        ("INSERT INTO artifact_uses VALUES ('good', 'd')", "good", "1 of its artifacts (files, large values) are gone"),
        (
            "INSERT INTO events (ticket_id, kind, data) SELECT ticket_id, kind, data FROM events "
            "WHERE ticket_id = 'good' AND data LIKE '%\"done\"%'",
            "good",
            "after it had ended as done",
        ),
        (
            "DROP TRIGGER tickets_deleted; DELETE FROM tickets WHERE id = 'good';"
            "CREATE TRIGGER tickets_deleted AFTER DELETE ON tickets BEGIN SELECT 1; END",
            "good",
            "the log has no deletion",
        ),
    ],
)
async def test_a_real_file_broken_on_purpose(file: Path, sql: str, who: str, says: str) -> None:
    with sqlite3.connect(file, timeout=60) as db:
        db.executescript(sql)
    report = await audited(file)
    assert any(o.id == who and says in o.what for o in report.violations), report.violations


ARCHIVED = """CREATE TABLE archive AS SELECT * FROM tickets WHERE 0;
    CREATE TRIGGER theirs AFTER UPDATE OF state ON tickets WHEN NEW.state IN ('done', 'failed') BEGIN
    INSERT INTO archive SELECT * FROM tickets WHERE id = NEW.id; DELETE FROM tickets WHERE id = NEW.id; END"""
REBUILT = """CREATE TABLE new AS SELECT * FROM tickets; CREATE UNIQUE INDEX pk ON new(id); DROP TABLE tickets;
    ALTER TABLE new RENAME TO tickets"""
OF_GOOD = "run_id = (SELECT run_id FROM tickets WHERE id = 'good')"
ATTEMPT_OF_GOOD = f"step_execution_id IN (SELECT id FROM step_executions WHERE {OF_GOOD})"
REPLACE = f"REPLACE INTO tickets (id, title, state, agent_id) VALUES ('%s', 't', '%s', '{ECHO_AGENT_ID}')"
# What other programs do; True: `prove` must be content at once, before any engine has looked.
OTHERS = {
    **{f"REPLACE {id}, {state}": (REPLACE % (id, state), state in ("ready", "done", "draft", "cancelled"))
       for id in ("good", "open") for state in ("ready", "done", "draft", "cancelled", "failed", "in_progress")},
    "REPLACE, all columns": ("REPLACE INTO tickets SELECT * FROM tickets", False),
    "REPLACE, another id": ("CREATE UNIQUE INDEX one ON tickets(project_id);"
                            "UPDATE tickets SET project_id = 'p' WHERE id = 'good';"
                            "REPLACE INTO tickets (id, title, project_id) VALUES ('new', 't', 'p')", True),
    "another id": ("UPDATE tickets SET id = 'new' WHERE id = 'good'", True),
    "archived at its end": (ARCHIVED, True),
    "deleted": ("DELETE FROM tickets", True),
    "deleted without trigger": ("DROP TRIGGER tickets_deleted; DELETE FROM tickets WHERE id = 'good'", True),
    "rebuilt": (f"{REBUILT}; DELETE FROM tickets WHERE id = 'good'", False),
    **{f"good is {state}": (f"UPDATE tickets SET state = '{state}' WHERE id = 'good'", False)
       for state in ("ready", "in_progress", "waiting", "blocked", "draft", "failed", "bogus")},
    **{f"open is {state}": (f"UPDATE tickets SET state = '{state}' WHERE id = 'open'", True)
       for state in ("ready", "waiting", "blocked", "draft", "failed", "cancelled", "done", "bogus")},
    **{f"good's step is {status}": (f"UPDATE step_executions SET status = '{status}' WHERE {OF_GOOD}", True)
       for status in (*StepStatus, "bogus")},
    **{f"good's attempt: {outcome}": (f"UPDATE attempts SET outcome = {outcome} WHERE {ATTEMPT_OF_GOOD}", True)
       for outcome in ("'failed'", "'lost'", "'cancelled'", "'bogus'", "NULL")},
    "good's attempt is gone": (f"DELETE FROM attempts WHERE {ATTEMPT_OF_GOOD}", True),
    "good's step is gone": (f"DELETE FROM step_executions WHERE {OF_GOOD}", True),
    "good's run is gone": ("DELETE FROM workflow_runs WHERE ticket_id = 'good'", True),
    "good's run runs": ("UPDATE workflow_runs SET status = 'running' WHERE ticket_id = 'good'", False),
    "open's attempt is gone": ("DELETE FROM attempts WHERE outcome IS NULL", False),
    "open's step is gone": ("DELETE FROM step_executions WHERE status = 'running'", False),
    "open's step and attempt are gone": ("DELETE FROM attempts; DELETE FROM step_executions", False),
    "open's run is gone": ("DELETE FROM workflow_runs WHERE status = 'running'", False),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("foreign_keys", [False, True], ids=["", "foreign keys"])
@pytest.mark.parametrize("change", OTHERS)
async def test_what_other_programs_change_is_no_offence(file: Path, change: str, foreign_keys: bool) -> None:
    sql, at_once = OTHERS[change]
    with sqlite3.connect(file, timeout=60) as db:
        db.execute(f"PRAGMA foreign_keys = {foreign_keys}")
        with contextlib.suppress(sqlite3.IntegrityError):  # a foreign key refuses it
            db.executescript(sql)
    db.close()
    if at_once:
        report = await audited(file)
        assert report.kept, report.violations
    async with Store.open(f"sqlite:///{file}") as store:
        for again in (False, True):
            for _ in range(4):  # `open`'s worker is dead; another one does what there is, and the upkeep
                for claim in await store.claim("w2", limit=5, lease_seconds=30):
                    await store.finish(claim.attempt_id, Succeeded(outputs="{}"), timings={}, vm_time_ms=0)
                for id in ("good", "open", "new"):
                    await store.claim("w2", lease_seconds=30, ticket_id=id)
                await store.shift_clock(700_000)
            report = await store.audit(lambda facts: judge(facts, engine_alive=True))
            assert report.kept, report.violations
            for ticket in await store.tickets(states=["failed", "cancelled"]) if not again else ():
                await store.retry(ticket.id)


async def test_what_other_tools_may_do_is_no_offence(file: Path) -> None:
    with sqlite3.connect(file, timeout=60) as db:
        db.execute("DELETE FROM tickets WHERE id = 'open'")
        db.execute("UPDATE tickets SET state = 'ready' WHERE id = 'good'")
    report = await audited(file)
    assert report.kept, report.violations
    assert report.deleted == 1


def test_the_command(file: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "swarm.cli.main", "prove", "--home", str(file.parent.parent), *options]
        return subprocess.run(argv, check=False, capture_output=True, text=True)

    assert run().returncode == 0
    with sqlite3.connect(file, timeout=60) as db:
        db.execute("DELETE FROM attempts WHERE outcome IS NULL")
    broken = run()
    assert broken.returncode == 1 and "open: its step 'main' is running" in broken.stderr
    told = json.loads(run("--json").stdout)
    assert (told["kept"], told["lost"][0]["id"]) == (False, "open")
    assert run("--since", "nonsense").returncode == 2
