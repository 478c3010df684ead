"""Workflows as a user runs them, on plain processes: followed, answered, continued."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts programs, or tries very many cases

BIN = Path(sys.executable).parent
Swarm = Callable[..., subprocess.CompletedProcess[str]]
PUBLISH = """
name: publish
version: 1.0.0
steps:
  - {id: draft, agent: echo@1}
  - {id: check, needs: draft, approval: "Publish ${steps.draft.outputs.title}?"}
  - {id: publish, agent: echo@1, needs: check}
"""


@pytest.fixture
def swarm(tmp_path: Path) -> Swarm:
    places = {"SWARM_HOME": str(tmp_path / "home"), "SWARM_STATE_DIR": str(tmp_path / "state")}
    env = os.environ | places | {"SWARM_DRIVER": "process"}

    def run(command: str, *argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        program, *words = command.split()
        done = subprocess.run(
            [BIN / program, *words, *argv], check=False, capture_output=True, text=True, timeout=300, env=env
        )
        assert done.returncode == status, (command, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    run("swarm init --no-image")
    return run


def test_run_and_follow(swarm: Swarm, tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text('{"message": "good day"}')
    done = swarm("swarm workflow run echo-chain --wait --json --id t --input-json", str(tmp_path / "inputs.json"))
    said = json.loads(done.stdout)
    assert said["ticket"]["state"] == "done"
    assert said["ticket"]["outputs"]["heard"] == "good day"
    assert [run["trigger_type"] for run in said["runs"]] == ["manual"]
    for line in ("no engine runs: ticket t runs here", "running    first", "completed  second"):
        assert line in done.stderr
    shown = swarm("swarm ticket show t").stdout
    assert "first " in shown and "echo@1.0.0" in shown
    refused = swarm("swarm workflow run echo-chain --inputs", '{"message": 7}', status=2)
    assert "$.message: 7 is not of type 'string'" in refused.stderr
    swarm("swarm workflow disable echo-chain")
    refused = swarm("swarm workflow run echo-chain --input-json /dev/null --inputs {}", status=2)
    assert "use one of them" in refused.stderr
    assert "is disabled" in swarm("swarm workflow run echo-chain", status=2).stderr


def test_answer_and_continue(swarm: Swarm, tmp_path: Path) -> None:
    (tmp_path / "publish.yaml").write_text(PUBLISH)
    swarm("swarm workflow add", str(tmp_path / "publish.yaml"))

    def until_it_waits(command: str, said: str) -> subprocess.CompletedProcess[str]:
        for seconds in (4, 20, 100):  # a busy machine takes longer
            done = swarm(f"{command} --timeout {seconds}", status=1)
            if said in done.stderr:
                assert f"longer than its timeout of {seconds} s" in done.stdout or "run-ticket" in command
                return done
        raise AssertionError(done.stderr)

    late = until_it_waits("swarm workflow run publish --wait", "step check asks: Publish publish?")
    assert "`swarm ticket approve " in late.stderr
    swarm("swarm ticket add News --workflow publish --id t")
    until_it_waits("swarm-engine run-ticket t --wait", "ticket t waits for a person")
    shown = swarm("swarm ticket show t").stdout
    assert "Publish News?" in shown and "`swarm ticket approve t`" in shown
    assert "waiting for a person  1" in swarm("swarm-engine status").stdout
    assert "does not wait; these do: check" in swarm("swarm ticket approve t --step draft", status=2).stderr
    swarm("swarm ticket reject t --by bob --why", "not today")
    assert json.loads(swarm("swarm ticket show t --json").stdout)["ticket"]["error"] == "rejected by bob: not today"
    assert "use one of draft, check, publish" in swarm("swarm ticket retry t --from nowhere", status=2).stderr
    swarm("swarm ticket retry t --from check")
    until_it_waits("swarm-engine run-ticket t --wait", "ticket t waits for a person")
    assert "step check is approved" in swarm("swarm ticket approve t --why fine").stdout
    assert f"approved by {getpass.getuser()}, fine" in swarm("swarm ticket show t").stdout
    assert json.loads(swarm("swarm-engine run-ticket t --wait --json").stdout)["ticket"]["state"] == "done"
    swarm("swarm prove")
