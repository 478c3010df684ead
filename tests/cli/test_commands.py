"""The commands as a user types them, against a real home. What needs a VM is in test_vm.py."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm import __version__
from swarm.model import ECHO_AGENT_ID

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

BIN = Path(sys.executable).parent
COMMANDS = [
    ["swarm"],
    *(
        ["swarm", *words.split()]
        for words in (
            "init", "doctor", "ticket", "ticket add", "ticket list", "ticket show", "ticket logs", "agent",
            "agent list", "agent show", "agent init", "agent add", "agent test", "agent run", "agent rm", "agent build",
            "agent layers", "workflow", "workflow run", "ticket approve", "ticket reject",
            "ticket retry", "ticket cancel",
            "workflow validate", "workflow graph", "workflow add", "workflow list", "workflow show",
            "workflow enable", "workflow disable", "image", "image build", "image list", "image rm", "vm", "vm spawn",
            "vm list", "vm ssh", "vm rm",
        )
    ),
    ["swarm-engine"],
    ["swarm-engine", "run-ticket"],
    ["swarm-engine", "status"],
    ["swarm-spawn-ns"],
    ["swarm-cleanup"],
]  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess[str]]


def run(*argv: str, home: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = os.environ | ({"SWARM_HOME": str(home)} if home else {})
    done = subprocess.run(
        [BIN / argv[0], *argv[1:]], check=False, capture_output=True, text=True, timeout=300, env=env, input=stdin
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def swarm(home: Path) -> Run:
    return lambda *argv, stdin="": run(argv[0], *argv[1:], home=home, stdin=stdin)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str]) -> None:
    done = run(*command, "-h")
    assert done.returncode == 0 and f"Usage: {' '.join(command)}" in done.stdout
    is_group = command[-1] in ("ticket", "agent", "workflow", "image", "vm")
    assert is_group or "Examples" in done.stdout
    assert len(command) > 1 or run(*command, "--help").stdout == done.stdout


@pytest.mark.parametrize("program", ["swarm", "swarm-engine", "swarm-spawn-ns", "swarm-cleanup"])
def test_version(program: str) -> None:
    version = tomllib.loads((BIN.parents[1] / "pyproject.toml").read_text())["project"]["version"]
    done = run(program, "--version")
    assert (done.returncode, done.stdout) == (0, f"{program} {version}\n") and version == __version__


def test_init_is_idempotent_and_links_the_registry(tmp_path: Path) -> None:
    first, second = (run("swarm", "init", "--no-image", home=tmp_path / "h") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "created" in first.stdout and "up to date" in second.stdout
    with sqlite3.connect(tmp_path / "h/registry/registry.db", timeout=60) as registry:
        assert registry.execute("SELECT name FROM agents WHERE id = ?", (ECHO_AGENT_ID,)).fetchall() == [("echo",)]


def test_an_agent_whose_row_another_program_broke_hides_no_other(tmp_path: Path) -> None:
    run("swarm", "init", "--no-image", home=tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "data/swarm.db", timeout=60)) as theirs, theirs:
        theirs.execute("UPDATE agents SET retry = 'x' WHERE name = 'shell'")
    for more, names in (([], lambda text: text), (["--json"], lambda text: [one["name"] for one in json.loads(text)])):
        done = run("swarm", "agent", "list", *more, home=tmp_path)
        assert done.returncode == 1 and "'shell'" in done.stderr and "register it again" in done.stderr
        assert "echo" in names(done.stdout) and "shell" not in names(done.stdout)


def test_init_does_not_overwrite_a_foreign_registry(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry/registry.db").write_text("mine")
    done = run("swarm", "init", "--no-image", home=tmp_path)
    assert done.returncode == 2 and "move it away" in done.stderr
    assert (tmp_path / "registry/registry.db").read_text() == "mine"


def test_without_a_home_it_says_what_to_do(tmp_path: Path) -> None:
    done = run("swarm", "ticket", "list", home=tmp_path / "none")
    assert done.returncode == 1 and "swarm init" in done.stderr


def test_add_list_show_logs(swarm: Run) -> None:
    added = swarm(
        "swarm", "ticket", "add", "Say hello", "--agent", "echo@1.0.0", "--id", "cli-1", "--project", "p-1",
        "--inputs", '{"a": 1, "b": "x"}', "--input", "b=[2]", "--input", "c=text", "--draft", "--priority", "3",
    )  # fmt: skip
    assert (added.stdout, added.stderr) == ("cli-1\n", "")
    listed = json.loads(swarm("swarm", "ticket", "list", "--project", "p-1", "--state", "draft", "--json").stdout)
    assert [t["id"] for t in listed] == ["cli-1"]
    shown = json.loads(swarm("swarm", "ticket", "show", "cli-1", "--json").stdout)
    assert shown["ticket"]["inputs"] == {"a": 1, "b": [2], "c": "text"}
    assert shown["ticket"]["agent_id"] == ECHO_AGENT_ID and shown["steps"] == shown["attempts"] == []
    assert "Say hello" in swarm("swarm", "ticket", "show", "cli-1").stdout
    logs = swarm("swarm", "ticket", "logs", "cli-1")
    assert logs.returncode == 0 and logs.stdout == ""
    assert swarm("swarm", "ticket", "list", "--project", "nobody's").stdout == "no tickets\n"


def test_inputs_from_a_file_and_from_stdin(swarm: Run, tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    file.write_text('{"from": "file"}')
    for source, stdin in ((f"@{file}", ""), ("@-", '{"from": "file"}')):
        added = swarm("swarm", "ticket", "add", "t", "-a", "echo", "--draft", "--inputs", source, "--json", stdin=stdin)
        assert json.loads(added.stdout)["inputs"] == {"from": "file"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ticket", "add", "t", "--agent", "nobody"], "nobody"),
        (["ticket", "add", "t", "--agent", "echo", "--inputs", "{"], "not JSON"),
        (["ticket", "add", "t", "--agent", "echo", "--inputs", "[1]"], "JSON object"),
        (["ticket", "add", "t", "--agent", "echo", "--inputs", "@/no/such/file"], "/no/such/file"),
        (["ticket", "add", "t", "--agent", "echo", "--input", "novalue"], "NAME=VALUE"),
        (["ticket", "show", "nothing"], "nothing"),
        (["ticket", "logs", "nothing"], "nothing"),
        (["agent", "show", "nothing"], "nothing"),
        (["image", "rm", "0000"], "0000"),
        (["vm", "ssh", "777"], "no VM 777"),
        (["vm", "rm", "777"], "no VM 777"),
        (["vm", "spawn", "0"], "at least 1"),
        (["vm", "spawn", "65534"], "65,533"),
    ],
)
def test_wrong_use_is_status_2_and_one_sentence(swarm: Run, argv: list[str], said: str) -> None:
    done = swarm("swarm", *argv)
    assert done.returncode == 2 and said in done.stderr


def test_a_duplicate_id_is_refused(swarm: Run) -> None:
    for status in (0, 2):
        done = swarm("swarm", "ticket", "add", "t", "-a", "echo", "--id", "cli-twice", "--draft")
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize("state", ["draft", "done", "failed", "cancelled", "waiting"])
@pytest.mark.parametrize("wait", [["--wait"], []])
def test_run_ticket_refuses_a_ticket_that_cannot_run(home: Path, swarm: Run, state: str, wait: list[str]) -> None:
    id_ = f"cli-{state}{len(wait)}"
    with sqlite3.connect(home / "data/swarm.db", timeout=60) as db:
        db.execute(
            "INSERT INTO tickets (id, title, state, agent_id) VALUES (?, 't', ?, ?)", (id_, state, ECHO_AGENT_ID)
        )
    done = swarm("swarm-engine", "run-ticket", id_, *wait)
    assert done.returncode == 2 and f"is '{state}' and can't be run" in done.stderr
    assert swarm("swarm-engine", "run-ticket", "no-such-ticket", *wait).returncode == 2


def test_run_ticket_says_why_a_failed_ticket_failed(home: Path, swarm: Run) -> None:
    with sqlite3.connect(home / "data/swarm.db", timeout=60) as db:
        db.execute("INSERT INTO tickets (id, title, state, error) VALUES ('cli-why', 't', 'failed', 'no such agent')")
    done = swarm("swarm-engine", "run-ticket", "cli-why", "--wait")
    assert done.returncode == 2 and "Its error: no such agent" in done.stderr and "ticket retry" in done.stderr


def test_hostile_text_does_not_reach_the_terminal(home: Path, swarm: Run) -> None:
    title = "\x1b[2J\x07[bold red]t[/]\rok\u202e\x9b\u2028\n$(reboot)"
    with sqlite3.connect(home / "data/swarm.db", timeout=60) as db:
        db.execute(
            "INSERT INTO tickets (id, title, state, agent_id, project_id) VALUES ('cli-evil', ?, 'draft', ?, 'evil')",
            (title, ECHO_AGENT_ID),
        )
    listed = ["ticket", "list", "--project", "evil"]
    for argv in (listed, ["ticket", "show", "cli-evil"], [*listed, "--json"], ["ticket", "show", "cli-evil", "--json"]):
        printed = swarm("swarm", *argv).stdout
        assert not set(printed) & set("\x1b\x07\r\u202e\x9b\u2028")
        assert "[bold red]t[/]" in printed
    assert json.loads(swarm("swarm", "ticket", "list", "--project", "evil", "--json").stdout)[0]["title"] == title


def test_agents_and_status(swarm: Run) -> None:
    (echo,) = (one for one in json.loads(swarm("swarm", "agent", "list", "--json").stdout) if one["name"] == "echo")
    assert (echo["id"], echo["name"]) == (ECHO_AGENT_ID, "echo")
    assert Path(echo["path"], "main.py").is_file()
    assert "echo" in swarm("swarm", "agent", "list").stdout
    assert ECHO_AGENT_ID in swarm("swarm", "agent", "show", "echo").stdout
    status = json.loads(swarm("swarm-engine", "status", "--json").stdout)
    assert status["vms"] == [] and status["queue"]["running"] == 0


@pytest.mark.needs("netns")
def test_cleanup_is_safe_on_a_clean_host(swarm: Run) -> None:
    for _ in range(2):
        done = swarm("swarm-cleanup")
        assert done.returncode == 0, done.stderr
    assert done.stdout == "nothing to remove\n"


@pytest.mark.needs("netns")
def test_doctor_reports_each_check(swarm: Run, tmp_path: Path) -> None:
    done = swarm("swarm", "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    for name in ("rights", "kernel: tap", "kernel: bridge", "kernel: veth", "kernel: nftables address rewriting",
                 "subnet", "database", "registry", "agents", "ip_forward", "memory", "disk: VMs",
                 "program nft"):  # fmt: skip
        assert checks[name]["status"] == "ok", checks[name]
    assert done.returncode == any(check["status"] == "fail" for check in checks.values())
    nowhere = run("swarm", "doctor", home=tmp_path / "none")
    assert nowhere.returncode == 1 and "fix: swarm init" in nowhere.stdout


@pytest.mark.needs("netns")
def test_nothing_is_fetched_once_swarm_is_installed(tmp_path: Path) -> None:
    """Programs that fetch are replaced by ones that fail, and the sandbox has no way out. (Only `make install`, `swarm
    image build`, `swarm agent add` with requirements, and `swarm install firecracker` fetch anything.)"""
    calls, block = tmp_path / "calls", tmp_path / "block"
    block.mkdir()
    for program in ("apt-get", "apt", "mmdebstrap", "pip", "pip3", "uv", "curl", "wget", "git"):
        (block / program).write_text(f'#!/bin/sh\necho "$0 $*" >> {calls}\nexit 1\n')
        (block / program).chmod(0o755)
    env = os.environ | {
        "PATH": f"{block}:{os.environ['PATH']}", "SWARM_HOME": str(tmp_path / "home"), "SWARM_DRIVER": "process",
        "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull,
    }  # fmt: skip
    env.pop("PIP_EXTRA_INDEX_URL", None)
    for command in (
        "swarm init --no-image",
        "swarm agent list",
        "swarm ticket add Hello --agent echo --id hello",
        "swarm-engine run-ticket hello --wait",
        "swarm workflow list",
        "swarm-engine status",
        "swarm prove",
    ):
        program, *rest = command.split()
        done = subprocess.run(
            [BIN / program, *rest], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert not calls.exists(), calls.read_text()


def test_the_home_may_stand_anywhere(home: Path, tmp_path: Path) -> None:
    wanted = ["ticket", "list", "--project", "nobody's"]
    for number in range(3):
        argv = [*wanted[:number], "--home", str(home), *wanted[number:]]
        done = run("swarm", *argv, home=tmp_path / "another")
        assert (done.returncode, done.stdout) == (0, "no tickets\n"), done.stderr
    nearest = run("swarm", "--home", str(home), *wanted, "--home", str(tmp_path / "none"))
    assert nearest.returncode == 1 and str(tmp_path / "none") in nearest.stderr


JSON_OR_NOT = [
    ('{"a": [1, {"b": null}], "c": 1.5}', {"a": [1, {"b": None}], "c": 1.5}),
    ("{broken", "{broken"),
    ("NaN", "NaN"),
    ('{"e": 1e999}', '{"e": 1e999}'),
    ("[" * 5000 + "]" * 5000, "[" * 5000 + "]" * 5000),
    (None, None),
]


@pytest.mark.parametrize(("stored", "shown"), JSON_OR_NOT, ids=["object", "broken", "nan", "large", "deep", "null"])
def test_json_holds_json_and_no_text_of_it(home: Path, swarm: Run, stored: str | None, shown: object) -> None:
    id_ = f"cli-json-{abs(hash(stored))}"
    with sqlite3.connect(home / "data/swarm.db", timeout=60) as db:
        db.execute(
            "INSERT INTO tickets (id, title, state, inputs, outputs, trigger_data, completed_at) "
            "VALUES (:id, 't', 'done', :text, :text, :text, '2026-01-01')",
            {"id": id_, "text": stored},
        )
    ticket = json.loads(swarm("swarm", "ticket", "show", id_, "--json").stdout)["ticket"]
    assert [ticket[name] for name in ("inputs", "outputs", "trigger_data")] == [shown] * 3


def test_the_schemas_of_agents_and_the_definitions_of_workflows_are_json(swarm: Run) -> None:
    echo = json.loads(swarm("swarm", "agent", "show", "shell", "--json").stdout)
    assert echo["inputs_schema"]["type"] == "object"
    for one in json.loads(swarm("swarm", "workflow", "list", "--json").stdout):
        assert one["definition"]["name"] == one["name"]


@pytest.mark.parametrize("program", ["swarm", "swarm-engine"])
def test_shells_complete_commands(program: str) -> None:
    words = {"swarm": "swarm tick", "swarm-engine": "swarm-engine run-"}[program]
    env = {f"_{program.upper().replace('-', '_')}_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "1"}
    done = subprocess.run([BIN / program], env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [{"swarm": "ticket", "swarm-engine": "run-ticket"}[program]], done.stderr


def test_each_program_names_the_other() -> None:
    assert "`swarm-engine`" in run("swarm", "--help").stdout and "`swarm`" in run("swarm-engine", "--help").stdout
