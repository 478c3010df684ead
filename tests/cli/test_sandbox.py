"""`swarm sandbox` with an engine: commands, shells, background programs and files. Programs are plain processes here;
docs/sandboxes.md, which tests/test_transcripts.py runs, has the same with VMs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from swarm.cli import main
from tests.cli.terminals import Terminal

BIN = Path(sys.executable).parent
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a home whose engine holds the sandbox 'box'."""
    place = tmp_path_factory.mktemp("boxes")
    own = {"SWARM_HOME": str(place), "SWARM_STATE_DIR": str(place / "state"), "SWARM_DRIVER": "process"}
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | own

    def run(*argv: str) -> None:
        subprocess.run([BIN / argv[0], *argv[1:]], env=env, check=True, capture_output=True, timeout=300)

    run("swarm", "init", "--no-image")
    run("swarm-engine", "start")
    try:
        run("swarm", "sandbox", "create", "box", "--label", "team=a")
        yield env
        run("swarm", "sandbox", "rm", "box")
    finally:
        run("swarm-engine", "stop")


@pytest.fixture
def swarm(env: dict[str, str], tmp_path: Path) -> object:
    def swarm(*words: str, stdin: str = "") -> Done:
        argv = [str(BIN / "swarm"), "sandbox", *words]
        done = subprocess.run(argv, cwd=tmp_path, env=env, input=stdin, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in done.stderr
        return done

    return swarm


def test_a_shell_in_a_terminal(env: dict[str, str], tmp_path: Path) -> None:
    with Terminal([BIN / "swarm", "sandbox", "shell", "box"], env=env, cwd=tmp_path) as terminal:
        terminal.type("stty size; echo $((6*7))\r")
        terminal.until("24 80\r\n42\r\n")
        terminal.type("sh -c 'echo o''n; exec sleep 60'\r")
        terminal.until("on\r\n")
        terminal.type("\x03")
        terminal.type("echo in$((1))terrupted\r")
        terminal.until("in1terrupted\r\n")
        terminal.type("exit 3\r")
        assert terminal.status() == 3 and terminal.restored()


def test_a_program_in_the_background_is_come_back_to(swarm, env: dict[str, str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    script = "trap 'echo caught; exit 9' INT; echo begun; while :; do sleep 0.1; done"
    started = swarm("exec", "box", "--detach", "-e", "A=1", "--", "sh", "-c", script)
    name = started.stdout.strip()
    assert started.returncode == 0 and name.isalnum()
    argv = [BIN / "swarm", "sandbox", "attach", "box", name]
    with subprocess.Popen(argv, env=env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as attached:
        assert attached.stdout is not None
        assert attached.stdout.readline() == b"begun\n"
        attached.send_signal(signal.SIGTERM)
        assert attached.wait(timeout=300) == 143
    listed = {one["process"]: one for one in json.loads(swarm("ps", "box", "--json").stdout)}
    assert listed[name]["ended"] is None and listed[name]["background"]  # it runs on
    with subprocess.Popen(argv, env=env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as attached:
        assert attached.stdout is not None
        assert attached.stdout.readline() == b"begun\n"
        attached.send_signal(signal.SIGINT)
        assert attached.stdout.readline() == b"caught\n" and attached.wait(timeout=300) == 9
    assert "status 9" in swarm("ps", "box").stdout


def test_files_there_and_back(swarm, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    top = tmp_path / "tree"
    (top / "deep").mkdir(parents=True)
    (top / "deep/run").write_bytes(bytes(range(256)))
    (top / "deep/run").chmod(0o755)
    (top / "link").symlink_to("deep/run")
    (top / "out").symlink_to("/etc/passwd")
    assert "left out: out, a link" in swarm("put", "box", "tree").stderr
    assert swarm("get", "box", "tree", "--to", "back").returncode == 0
    back = tmp_path / "back"
    assert (back / "link").readlink() == Path("deep/run") and not (back / "out").is_symlink()
    assert (back / "deep/run").read_bytes() == bytes(range(256))
    assert (back / "deep/run").stat().st_mode & 0o777 == 0o755
    assert swarm("get", "box", "tree", "--to", "back").returncode == 0 and (back / "tree/deep/run").exists()
    for wanted, place in (("tree", "back"), ("tree/deep", "tree")):
        refused = swarm("get", "box", wanted, "--to", place)
        assert refused.returncode == 2 and "exists: give --force" in refused.stderr
    refused = swarm("get", "box", "tree/deep/run", "--to", "tree/deep/run")
    assert refused.returncode == 2 and "exists: give --force" in refused.stderr
    assert swarm("get", "box", "tree/deep/run", "--to", "tree/deep/run", "--force").returncode == 0
    assert swarm("exec", "box", "--", "mkdir", "-p", ".git/hooks").returncode == 0
    unsafe = swarm("get", "box", ".git")
    assert unsafe.returncode == 2 and "git would run" in unsafe.stderr and not (tmp_path / ".git").exists()
    assert [one["name"] for one in json.loads(swarm("ls", "box", "tree", "--json").stdout)] == ["deep", "link"]
    assert swarm("put", "box", "nowhere").returncode == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "bad name"], "name is 'bad name'"),
        (["create", "--label", "x"], "--label 'x': write NAME=TEXT"),
        (["create", "--ttl", "soon"], "is not an age"),
        (["create", "box"], "has the name 'box'"),
        (["create", "--from", "nothing"], "no snapshot 'nothing'"),
        (["kill", "box", "nobody"], "no such process"),
        (["kill", "box", "nobody", "--signal", "999"], "there is no such signal"),
        (["put", "box", ""], "it is empty"),
        (["pause", "box"], "can't be paused"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_is_wrong_is_said_in_one_sentence(swarm, words: list[str], said: str) -> None:  # type: ignore[no-untyped-def]
    done = swarm(*words)
    assert done.returncode in (1, 2) and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["exec", "nobody", "true"], 125),
        (["exec", "--user", "nobody", "box", "true"], 125),
        (["attach", "box", "nobody"], 125),
        (["shell", "nobody"], 125),
        (["exec", "box", "nosuchprogram"], 127),
        (["exec", "--detach", "box", "nosuchprogram"], 127),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_its_own_failures_are_not_taken_for_the_commands(swarm, words: list[str], status: int) -> None:  # type: ignore[no-untyped-def]
    done = swarm(*words)
    assert done.returncode == status and done.stderr.count("\n") == 1, done.stderr


def test_signals_have_names_and_numbers(swarm) -> None:  # type: ignore[no-untyped-def]
    name = swarm("exec", "box", "--detach", "sleep", "1000").stdout.strip()
    assert swarm("kill", "box", name, "--signal", "NOSUCH").returncode == 1
    assert swarm("kill", "box", name, "--signal", "15").returncode == 0
    assert swarm("attach", "box", name).returncode == 143
    events = json.loads(swarm("show", "box", "--json").stdout)["events"]
    refused, sent = [event["data"] for event in events if event["kind"] == "signal"][-2:]
    assert "no such signal" in refused["error"] and sent["signal"] == "TERM" and "error" not in sent


def test_it_has_a_story(swarm) -> None:  # type: ignore[no-untyped-def]
    assert swarm("exec", "box", "--", "sh", "-c", "exit 5").returncode == 5
    shown = json.loads(swarm("show", "box", "--json").stdout)
    assert shown["sandbox"]["state"] == "running" and shown["sandbox"]["labels"] == {"team": "a"}
    last = [event["data"] for event in shown["events"] if event["kind"] in ("exec", "exit")][-2:]
    assert last[0]["argv"] == ["sh", "-c", "exit 5"] and last[1]["code"] == 5
    assert "sh -c 'exit 5'" in swarm("show", "box").stdout
    assert [one["name"] for one in json.loads(swarm("list", "--label", "team=a", "--json").stdout)] == ["box"]
    assert json.loads(swarm("list", "--label", "team=b", "--json").stdout) == []


@pytest.mark.parametrize(
    ("line", "argv", "detach"),
    [
        ("box ls -la", ["ls", "-la"], False),
        ("box -- ls -la", ["ls", "-la"], False),
        ("-d box ls --detach", ["ls", "--detach"], True),
        ("box --detach -- ls -- x", ["ls", "--", "x"], True),
        ("-- box -d -- ls", ["ls"], True),
        ("box --user root ls", ["ls"], False),
    ],
)
def test_options_stand_before_or_behind_the_name(line: str, argv: list[str], detach: bool) -> None:
    command = typer.main.get_command(main.app).commands["sandbox"].commands["exec"]  # type: ignore[attr-defined]
    params = command.make_context("exec", line.split()).params
    assert (params["id"], list(params["argv"]), params["detach"]) == ("box", argv, detach)


def test_without_an_engine_nothing_is_left_that_would_start(tmp_path: Path) -> None:
    env = {**os.environ, "SWARM_HOME": str(tmp_path), "SWARM_STATE_DIR": str(tmp_path / "state")}

    def swarm(*words: str) -> Done:
        argv = [str(BIN / "swarm"), *words]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)

    assert swarm("init", "--no-image").returncode == 0
    made = swarm("sandbox", "create", "box")
    assert made.returncode != 0 and "`swarm-engine start` starts one" in made.stderr
    assert json.loads(swarm("sandbox", "show", "box", "--json").stdout)["sandbox"]["state"] == "ended"
    with subprocess.Popen([str(BIN / "swarm"), "sandbox", "create", "other"], env=env, stderr=subprocess.PIPE) as asked:
        while '"other"' not in swarm("sandbox", "list", "--json").stdout:
            assert asked.poll() is None
        asked.send_signal(signal.SIGINT)
        assert asked.wait(timeout=300) != 0
    assert json.loads(swarm("sandbox", "show", "other", "--json").stdout)["sandbox"]["state"] == "ended"
    with contextlib.closing(sqlite3.connect(tmp_path / "data/swarm.db", timeout=60)) as database, database:
        database.execute("UPDATE sandboxes SET state = 'lost' WHERE name = 'other'")
    assert json.loads(swarm("sandbox", "list", "--json").stdout) == []
    assert '"other"' in swarm("sandbox", "list", "--state", "lost", "--json").stdout
