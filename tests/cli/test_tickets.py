"""Tickets as a user handles them: waited for, made ready, removed, one after another. On plain processes."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts programs

BIN = Path(sys.executable).parent
Swarm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("tickets")
    places = {"SWARM_HOME": str(place / "home"), "SWARM_STATE_DIR": str(place / "state")}
    env = os.environ | places | {"SWARM_DRIVER": "process"}
    subprocess.run([BIN / "swarm", "init", "--no-image"], check=True, env=env, capture_output=True)
    return env


@pytest.fixture
def swarm(env: dict[str, str]) -> Swarm:
    def run(command: str, *argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        argv = (*command.split(), *argv)
        done = subprocess.run([BIN / "swarm", *argv], check=False, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == status, (argv, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def db(env: dict[str, str]) -> Iterator[sqlite3.Connection]:
    """Begins without tickets."""
    with closing(sqlite3.connect(Path(env["SWARM_HOME"], "data/swarm.db"), isolation_level=None, timeout=60)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("DELETE FROM ticket_dependencies")
        db.execute("DELETE FROM tickets")
        yield db


def put(db: sqlite3.Connection, **states: str) -> None:
    for id_, state in states.items():
        error = "it broke\nat line 3" if state == "failed" else None
        db.execute("INSERT INTO tickets (id, title, state, error) VALUES (?, 't', ?, ?)", (id_, state, error))


def ids(db: sqlite3.Connection) -> set[str]:
    return {id_ for (id_,) in db.execute("SELECT id FROM tickets")}


def test_wait_tells_how_each_ended(swarm: Swarm, db: sqlite3.Connection) -> None:
    put(db, a="done", b="done", c="failed", d="cancelled")
    assert swarm("ticket wait a b a").stdout == "ticket a is done\nticket b is done\n"
    failed = swarm("ticket wait a c", status=1)
    assert failed.stdout == "ticket a is done\nticket c is failed: it broke\n"
    assert "ticket d is cancelled" in swarm("ticket wait d", status=1).stdout
    assert [one["state"] for one in json.loads(swarm("ticket wait c a --json", status=1).stdout)] == ["failed", "done"]
    assert "nobody" in swarm("ticket wait a nobody", status=2).stderr


def test_wait_is_woken_and_says_what_lacks(env: dict[str, str], db: sqlite3.Connection) -> None:
    put(db, a="ready", b="draft", c="in_progress")
    command = [str(BIN / "swarm"), "ticket", "wait", "a", "b", "c"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None and waiting.stderr is not None
        assert "ticket b is a draft: `swarm ticket ready b`" in waiting.stderr.readline()
        assert "no engine runs" in waiting.stderr.readline()
        db.execute("UPDATE tickets SET state = 'done' WHERE id = 'a'")
        assert waiting.stdout.readline() == "ticket a is done\n"
        db.execute("UPDATE tickets SET state = 'waiting' WHERE id = 'b'")
        assert "ticket b waits for a person" in waiting.stderr.readline()
        db.execute("UPDATE tickets SET state = 'done' WHERE id = 'b'")
        assert waiting.stdout.readline() == "ticket b is done\n"
        db.execute("DELETE FROM tickets WHERE id = 'c'")
        assert waiting.stderr.readline() == "error: ticket c was deleted\n"
        assert waiting.wait(timeout=300) == 1


def test_wait_takes_a_time_limit(swarm: Swarm, db: sqlite3.Connection) -> None:
    put(db, a="done", **{f"t{n:02}": "in_progress" for n in range(12)})
    assert swarm("ticket wait a --timeout 0").stdout == "ticket a is done\n"
    assert "not ended within 0 s: t00" in swarm("ticket wait t00 --timeout 0", status=1).stderr
    late = swarm("ticket wait a --timeout 0.5", *(f"t{n:02}" for n in range(12)), status=1)
    assert late.stdout == "ticket a is done\n"
    assert "not ended within 0.5 s: t00, " in late.stderr and late.stderr.endswith("t09 and 2 more\n")


def test_a_draft_is_made_ready(swarm: Swarm, db: sqlite3.Connection) -> None:
    put(db, a="draft", b="done")
    for _ in range(2):
        assert swarm("ticket ready a").stdout == "ticket a is ready\n"
    assert "only a draft can be made ready" in swarm("ticket ready b", status=2).stderr
    assert "nobody" in swarm("ticket ready nobody", status=2).stderr


def test_rm_removes_all_or_none(swarm: Swarm, db: sqlite3.Connection) -> None:
    put(db, a="done", b="ready", c="in_progress", d="waiting")
    db.execute("INSERT INTO workflow_runs (id, ticket_id, status, trigger_type) VALUES ('r', 'a', 'completed', 't')")
    for live in ("c", "d"):
        assert "--force cancels it first" in swarm("ticket rm a b", live, status=2).stderr
    assert "nobody" in swarm("ticket rm a nobody", status=2).stderr
    assert ids(db) == {"a", "b", "c", "d"}
    assert swarm("ticket rm a b a").stdout == "removed a\nremoved b\n"
    assert json.loads(swarm("ticket rm c d --force --json").stdout) == {"removed": ["c", "d"]}
    assert not ids(db) and not db.execute("SELECT count(*) FROM workflow_runs").fetchone()[0]


def test_rm_of_what_others_depend_on(swarm: Swarm, db: sqlite3.Connection) -> None:
    put(db, a="ready", b="blocked", c="ready", d="blocked")
    db.executemany("INSERT INTO ticket_dependencies VALUES (?, ?)", [("b", "a"), ("d", "c")])
    assert "'b' depends on the ticket 'a'" in swarm("ticket rm a", status=2).stderr
    swarm("ticket rm a b")
    swarm("ticket rm c --force")
    assert db.execute("SELECT id, state, error FROM tickets").fetchall() == [
        ("d", "failed", "it depends on the ticket 'c', which was cancelled")
    ]


def test_rm_of_a_running_ticket_ends_its_work(env: dict[str, str], swarm: Swarm, db: sqlite3.Connection) -> None:
    swarm("ticket add Sleep --agent shell --id s --input", "commands=echo begun; sleep 600")
    started = partial(
        subprocess.Popen[str], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    follow, work = ["swarm", "ticket", "logs", "-f", "s"], ["swarm-engine", "run-ticket", "s", "--wait"]
    with started([BIN / follow[0], *follow[1:]]) as logs, started([BIN / work[0], *work[1:]]) as engine:
        assert logs.stdout is not None and engine.stderr is not None
        assert any("begun" in line for line in logs.stdout)
        swarm("ticket rm s", status=2)
        swarm("ticket rm s --force")
        assert "no ticket 's'" in engine.communicate(timeout=300)[1] and engine.returncode != 0
        assert logs.wait(timeout=300) != 0
    assert not ids(db)
    swarm("prove")


def test_add_and_wait_prints_the_outputs(swarm: Swarm, db: sqlite3.Connection) -> None:
    added = swarm("ticket add Hello --agent echo --input name=Ada --id e --wait")
    assert json.loads(added.stdout)["echo"] == {"name": "Ada"}
    assert "ticket e\n" in added.stderr and "no engine runs: ticket e runs here" in added.stderr
    broken = swarm("ticket add Break --agent shell --id f --wait --input", 'commands=["exit 3"]', status=1)
    assert broken.stdout == "" and "error: ticket f is failed: " in broken.stderr
    whole = json.loads(swarm("ticket add Hello --agent echo --wait --json").stdout)
    assert whole["ticket"]["state"] == "done"
    assert "wait for ever" in swarm("ticket add Hello --agent echo --wait --draft", status=2).stderr


def test_add_after_others(swarm: Swarm, db: sqlite3.Connection) -> None:
    swarm("ticket add First --agent echo --id a")
    swarm("ticket add Other --agent echo --id b --draft")
    swarm("ticket add Last --agent echo --id c --after a --after b")
    assert db.execute("SELECT * FROM ticket_dependencies ORDER BY depends_on").fetchall() == [("c", "a"), ("c", "b")]
    assert "are not done" in swarm("ticket add Late --agent echo --id d --after b --wait", status=2).stderr
    assert "nobody" in swarm("ticket add Lost --agent echo --id e --after nobody", status=2).stderr
    assert ids(db) == {"a", "b", "c", "d"}


WORD = '#!/bin/sh\necho begun\n%s\necho \'{"word": "%s"}\' > output.json\n'


def test_an_agent_is_replaced_while_it_is_written(
    env: dict[str, str], swarm: Swarm, db: sqlite3.Connection, tmp_path: Path
) -> None:
    agent, go = tmp_path / "word", tmp_path / "go"
    agent.mkdir()
    (agent / "agent.yaml").write_text("name: word\nversion: 0.1.0\nruntime: exec\nentry: [main.sh]\n")

    def write(word: str, before: str = "") -> None:
        (agent / "main.sh").write_text(WORD % (before, word))
        (agent / "main.sh").chmod(0o755)

    def copies() -> int:
        return len(list(Path(env["SWARM_HOME"], "agents").glob("word-0.1.0-*")))

    write("one", f"while [ ! -e {go} ]; do sleep 0.1; done")
    for _ in range(2):
        swarm("agent add --dev", str(agent))
    swarm("ticket add Slow --agent word --id slow")
    work = [str(BIN / "swarm-engine"), "run-ticket", "slow", "--wait"]
    with (
        subprocess.Popen(work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as engine,
        subprocess.Popen([BIN / "swarm", "ticket", "logs", "-f", "slow"], env=env, stdout=subprocess.PIPE) as logs,
    ):
        assert logs.stdout is not None and logs.stdout.readline() == b"begun\n"
        write("two")
        assert "swarm agent add --dev" in swarm("agent add", str(agent), status=2).stderr
        swarm("agent add --dev", str(agent))
        assert copies() == 2  # the old one is in use
        go.touch()
        assert engine.communicate(timeout=300) and engine.returncode == 0
    assert json.loads(swarm("ticket show slow --json").stdout)["ticket"]["outputs"] == {"word": "one"}
    assert json.loads(swarm("ticket add Next --agent word --wait").stdout) == {"word": "two"}
    write("three")
    swarm("agent add --dev", str(agent))
    assert json.loads(swarm("ticket add Next --agent word --wait").stdout) == {"word": "three"}
    assert copies() == 2  # that of the second was removed
    swarm("prove")


def test_run_ticket_takes_a_driver(env: dict[str, str], swarm: Swarm, db: sqlite3.Connection) -> None:
    swarm("ticket add Hello --agent echo --id d")
    command = [str(BIN / "swarm-engine"), "run-ticket", "d", "--wait", "--driver", "process"]
    done = subprocess.run(command, env=env | {"SWARM_DRIVER": "firecracker"}, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["MAX_VMS", "GRACE", "WARM"])
def test_flags_of_start_are_settings(env: dict[str, str], name: str) -> None:
    bad = env | {f"SWARM_{name}": "many"}
    done = subprocess.run([BIN / "swarm-engine", "start"], env=bad, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "many" in done.stderr
