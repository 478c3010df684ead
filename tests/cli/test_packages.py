"""`swarm agent …` and `swarm workflow …` as a user types them, against a home of their own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm import config
from swarm.app import setup
from swarm.cli import main
from swarm.config import Settings
from swarm.vm.driver import Image

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

BIN = Path(sys.executable).parent
DOCS = Path(__file__).parent.parent.parent / "docs"
Run = Callable[..., subprocess.CompletedProcess[str]]

GOOD = """name: mine
version: 1.0.0
steps:
  - id: a
    agent: echo@1
  - id: b
    agent: echo
    needs: a
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("packages")
    asyncio.run(setup.init(config.load(home=home), image=False))
    return home


@pytest.fixture
def swarm(place: Path, tmp_path: Path) -> Run:
    def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [BIN / "swarm", *argv], check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path,
            env=os.environ | {"SWARM_HOME": str(place)} | environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done

    return run


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    for words in said:
        assert words in done.stderr


@pytest.mark.parametrize("lang", ["python", "sh"])
def test_the_life_of_an_agent(swarm: Run, place: Path, tmp_path: Path, lang: str) -> None:
    name = f"life-{lang}"
    ok(swarm("agent", "init", name, "--lang", lang))
    refused(swarm("agent", "init", name), "not empty")
    tested = swarm("agent", "test", f"{name}/")
    assert "example 1" in ok(tested) and "without a VM" in tested.stderr
    added = ok(swarm("agent", "add", f"{name}/"))
    with tarfile.open(tmp_path / "same.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / name, name)
    assert ok(swarm("agent", "add", "same.tar.gz")) == added and name in ok(swarm("agent", "show", name))
    ran = swarm("agent", "run", name, "--no-vm", "--input", "name=Bob")
    assert json.loads(ok(ran)) == {"greeting": "Hello, Bob!"}
    (tmp_path / "given.json").write_text('{"name": "Ada"}')
    ran = swarm("agent", "run", name, "--no-vm", "--input-json", "given.json", "--input", "name=NaN")
    assert json.loads(ok(ran)) == {"greeting": "Hello, NaN!"}, "a text: JSON has no such number"
    program = next((tmp_path / name).glob("main.*"))
    program.write_text(program.read_text().replace("Hello", "Goodbye"))
    before = sorted((place / "agents").iterdir())
    refused(swarm("agent", "add", name), "files differ", "new version")
    assert sorted((place / "agents").iterdir()) == before, "a refused version leaves no files"
    failed = swarm("agent", "test", name, "--json")  # the directory of that name, not the registered agent
    (result,) = json.loads(failed.stdout)
    assert failed.returncode == 1 and not result["passed"] and "$.greeting" in result["wrong"][0]
    ok(swarm("ticket", "add", "t", "--agent", name, "--id", f"t-{lang}", "--draft"))
    refused(swarm("agent", "rm", name), f"t-{lang}")
    ok(swarm("ticket", "cancel", f"t-{lang}"))
    ok(swarm("agent", "rm", name))
    refused(swarm("agent", "show", name))
    assert not list((place / "agents").glob(f"{name}-*"))


def test_what_others_wrote_is_not_tested_on_the_host(swarm: Run, tmp_path: Path) -> None:
    """This home has no guest image, so nothing can run in a VM; and on the host it may not."""
    ok(swarm("agent", "init", "marks", "--lang", "sh"))
    (tmp_path / "marks" / "main.sh").write_text(f"touch {tmp_path}/ran\n")
    with tarfile.open(tmp_path / "marks.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "marks", "marks")
    ok(swarm("agent", "add", "marks.tar.gz"))
    (tmp_path / "marks").rename(tmp_path / "away")
    for source in ("marks.tar.gz", "marks"):
        assert swarm("agent", "test", source).returncode == 1 and not (tmp_path / "ran").exists()
    swarm("agent", "test", "marks.tar.gz", "--no-vm")
    assert (tmp_path / "ran").exists()


def test_built_in_agents_pass_their_examples(swarm: Run) -> None:
    for name in ("echo", "shell@1"):
        assert "fail" not in ok(swarm("agent", "test", name, "--no-vm")).split()


@pytest.mark.needs("qemu")
def test_an_agent_in_a_vm_without_a_ticket(swarm: Run, settings: Settings, image: Image) -> None:
    environment = {"SWARM_IMAGES_DIR": str(settings.images), "SWARM_TEMPLATES_DIR": str(settings.templates)}
    ran = swarm("agent", "run", "shell", "--input", "commands=id -un; echo seen >&2", **environment)
    assert json.loads(ok(ran))["stdout"] == "agent\n" and "seen\n" in ran.stderr
    tested = swarm("agent", "test", "echo", "--vm", **environment)
    assert "example 1" in ok(tested) and "without a VM" not in tested.stderr
    links = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout
    assert ": br0:" not in links or ": swarm" in links, "the bridge, and no VM that uses it"


def test_agents_that_are_wrong(swarm: Run, tmp_path: Path) -> None:
    ok(swarm("agent", "init", "layered", "--lang", "node"))
    lacking = swarm("agent", "add", "layered/")  # this home has no guest image to build its layer upon
    assert lacking.returncode == 1 and "swarm image build" in lacking.stderr
    refused(swarm("agent", "show", "layered"), "no agent")
    refused(swarm("agent", "init", "other", "--lang", "cobol"), "python")
    refused(swarm("agent", "init", "../Not_Good"), "name")
    assert not (tmp_path.parent / "Not_Good").exists()
    refused(swarm("agent", "add", "nowhere/"), "nowhere")
    refused(swarm("agent", "test", "http-fetch"), "no `examples`")
    refused(swarm("agent", "rm", "shell"), "'shell@1'")
    refused(swarm("agent", "run", "shell", "--no-vm", "--input", "command=ls"), "'commands' is missing")
    failed = swarm("agent", "run", "shell", "--no-vm", "--input", "commands=exit 3")
    assert failed.returncode == 1 and "status 3" in failed.stderr and failed.stdout == ""


def test_a_workflow_is_checked_drawn_added_and_switched(swarm: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    assert "2 steps" in ok(swarm("workflow", "validate", "mine.yaml"))
    assert json.loads(ok(swarm("workflow", "validate", "mine.yaml", "--json")))["valid"] is True
    for source in ("mine.yaml", "mine"):
        if source == "mine":
            added = ok(swarm("workflow", "add", "mine.yaml"))
            assert ok(swarm("workflow", "add", "mine.yaml")) == added
        assert "2  b  echo" in ok(swarm("workflow", "graph", source))
        assert ok(swarm("workflow", "graph", source, "--mermaid")).startswith("flowchart TD")
        assert ok(swarm("workflow", "graph", source, "--svg", "mine.svg")) == ""
        assert (tmp_path / "mine.svg").read_text().startswith("<svg")
    file.write_text(GOOD + "    when: ${1 > 2}\n")
    refused(swarm("workflow", "add", "mine.yaml"), "another definition")
    ok(swarm("workflow", "disable", "mine"))
    (mine,) = (w for w in json.loads(ok(swarm("workflow", "list", "--json"))) if w["name"] == "mine")
    assert mine["enabled"] is False and "disabled" in ok(swarm("workflow", "show", "mine@1"))
    ok(swarm("workflow", "enable", "mine"))
    shown = json.loads(ok(swarm("workflow", "show", "mine", "--json")))
    assert shown["enabled"] is True and [s["id"] for s in shown["definition"]["steps"]] == ["a", "b"]


def test_schedules_and_webhooks_are_shown(swarm: Run, tmp_path: Path) -> None:
    started = "schedule: {cron: '@daily', time_zone: Asia/Tokyo}\nwebhook: {secret: HOOK}\n"
    (tmp_path / "timed.yaml").write_text(GOOD.replace("mine", "timed") + started)
    ok(swarm("workflow", "add", "timed.yaml"))
    shown = ok(swarm("workflow", "show", "timed"))
    assert "@daily (Asia/Tokyo), next 20" in shown and "POST /hooks/timed, signed with HOOK" in shown
    listed = [one for one in json.loads(ok(swarm("workflow", "schedules", "--json"))) if one["workflow"] == "timed"]
    assert [(one["cron"], one["missed"], one["next_at"][11:16]) for one in listed] == [("@daily", "once", "15:00")]
    ok(swarm("workflow", "disable", "timed"))
    assert "disabled" in ok(swarm("workflow", "schedules"))


def test_all_problems_of_a_workflow_are_shown_at_once(swarm: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(GOOD.replace("echo@1", "nobody").replace("needs: a", "needs: c"))
    for command in ("validate", "add", "graph"):
        refused(swarm("workflow", command, "bad.yaml"), "line 5, column 12", "line 8, column 12")
    told = swarm("workflow", "validate", "bad.yaml", "--json")
    assert told.returncode == 2 and [p["line"] for p in json.loads(told.stdout)["problems"]] == [5, 8]
    refused(swarm("workflow", "show", "nobody"), "workflow list")
    refused(swarm("workflow", "validate", "nowhere.yaml"), "can't be read")


def test_built_in_workflows_are_registered(swarm: Run) -> None:
    names = {w["name"] for w in json.loads(ok(swarm("workflow", "list", "--json")))}
    assert names >= {"echo-chain", "fan-out-demo", "fix-until-green"}
    assert "first" in ok(swarm("workflow", "show", "echo-chain"))


@pytest.mark.parametrize("page", ["agents.md", "workflows.md"])
def test_every_command_in_the_docs_exists(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    named = {match.group(1) for match in re.finditer(r"(?:^|`)(swarm [a-z]+ [a-z]+)\b", text, re.MULTILINE)}
    groups = [group.typer_instance for group in main.app.registered_groups]
    there = {f"swarm {app.info.name} {one.name}" for app in groups if app for one in app.registered_commands}
    assert len(named) >= 7 and named <= there, named - there


def test_a_new_workflow_is_written_and_runs_as_it_is(swarm: Run, tmp_path: Path) -> None:
    ok(swarm("workflow", "init", "first-try"))
    assert "is valid, 2 steps" in ok(swarm("workflow", "validate", "first-try.yaml"))
    refused = swarm("workflow", "init", "first-try")
    assert refused.returncode == 2 and "first-try.yaml exists" in refused.stderr
    assert swarm("workflow", "init", "../x").returncode == 2 and sorted(tmp_path.iterdir()) == [
        tmp_path / "first-try.yaml"
    ]
    ok(swarm("workflow", "add", "first-try.yaml"))
    ran = ok(swarm("workflow", "run", "first-try", "--wait", "--json", SWARM_DRIVER="process"))
    assert json.loads(ran)["ticket"]["outputs"] == {"text": "it has 2 lines, 1 times"}
    ok(swarm("workflow", "rm", "first-try"))


def test_a_workflow_is_removed_once_nothing_needs_it(swarm: Run, tmp_path: Path) -> None:
    def add(name: str, version: str, more: str = "", step: str = "agent: echo@1") -> None:
        text = f"name: {name}\nversion: {version}\n{more}\nsteps:\n  - {{id: a, {step}}}\n"
        (tmp_path / "w.yaml").write_text(text)
        ok(swarm("workflow", "add", "w.yaml"))

    def refused(name: str) -> str:
        done = swarm("workflow", "rm", name)
        assert done.returncode == 2
        return done.stderr

    add("inner", "1.0.0")
    add("outer", "1.0.0", step="workflow: inner@1")
    assert "outer@1.0.0 names the workflow 'inner@1'" in refused("inner")
    add("inner", "1.1.0", 'schedule: "0 5 * * *"')
    assert "a schedule starts" in refused("inner@1.1.0")
    ok(swarm("workflow", "disable", "inner@1.1.0"))
    ok(swarm("ticket", "add", "Run", "--workflow", "inner@1.1.0", "--id", "rm-1"))
    assert "(rm-1)" in refused("inner@1.1.0")
    ok(swarm("ticket", "cancel", "rm-1"))
    assert ok(swarm("workflow", "rm", "inner")) == "removed inner@1.1.0\n"
    assert '"inner"' not in ok(swarm("workflow", "schedules", "--json"))
    for name in ("outer", "inner"):
        ok(swarm("workflow", "rm", name))
    assert "no workflow 'inner'" in refused("inner")
