"""What commands import before they do anything: it is most of the time that a short one takes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts programs
# Packages of others that a command which only reads may load. Each costs every such command its import.
ALLOWED = {
    "annotated_doc",
    "annotated_types",
    "asyncinotify",
    "cel_expr_python",
    "cython_runtime",
    "cronsim",
    "pydantic",
    "pydantic_core",
    "shellingham",
    "typer",
    "typing_extensions",
    "typing_inspection",
    "yaml",
}
READING = [
    ["ticket", "list"],
    ["ticket", "show", "nobody"],
    ["ticket", "logs", "nobody"],
    ["agent", "list"],
    ["workflow", "list"],
    ["workflow", "show", "echo-chain"],
    ["artifact", "list"],
    ["secret", "list"],
    ["cost"],
    ["host", "list"],
    ["host", "show", "nobody"],
    ["sandbox", "list"],
    ["sandbox", "show", "nobody"],
    ["snapshot", "list"],
]
PROGRAM = """
import atexit, json, sys
def tell():
    print("\\nMODULES", json.dumps(sorted(sys.modules)), file=sys.stderr)
atexit.register(tell)
from swarm.cli.main import run
run()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    init = [sys.executable, "-m", "swarm.cli.main", "init", "--no-image", "--home", str(home)]
    subprocess.run(init, check=True, capture_output=True)
    return home


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_a_command_that_reads_loads_little(words: list[str], home: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, *words, "--home", str(home), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    modules = json.loads(done.stderr.rpartition("\nMODULES ")[2])
    packages = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    ours = {name for name in modules if name.startswith("swarm.")}
    assert {each for each in packages if not each.startswith("_")} - ALLOWED == {"swarm"}
    assert not [each for each in ours if each.startswith(("swarm.vm.", "swarm.engine.", "swarm.gateway."))]


def test_a_user_without_a_name_changes_things(home: Path) -> None:
    """Such as in a container that is started with a number alone."""
    argv = ["unshare", "--user", "--map-user=54321", "--", sys.executable, "-m", "swarm.cli.main"]
    env = {name: value for name, value in os.environ.items() if name not in ("LOGNAME", "USER", "LNAME", "USERNAME")}
    for words in (["token", "create", "--name", "ci"], ["token", "revoke", "ci"]):
        done = subprocess.run(
            [*argv, *words, "--home", str(home)], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["swarm", "swarm-engine", "swarm-spawn-ns", "swarm-cleanup"])
def test_ctrl_c_while_a_program_loads_is_quiet(program: str, tmp_path: Path) -> None:
    """What it loads stops half-way here, for as long as it takes."""
    (tmp_path / "typer.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, function = re.fullmatch(r"([\w.]+):(\w+)", project["scripts"][program]).groups()  # type: ignore[union-attr]
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # pytest's parent may ignore it
    argv = [sys.executable, "-c", f"{heed}\nfrom {module} import {function}\n{function}()"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "loading\n"
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (130, "")
