"""Every YAML in the documents is loaded, checked, and run with its agents' real programs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swarm import agents
from swarm.agents import check
from swarm.cel.jail import Jail
from swarm.model import RunStatus
from swarm.workflow import validate
from swarm.workflow.parse import _Step
from tests.vm.packages_here import wheel, wheels_from
from tests.workflow.execute import REGISTRY, execute, registry, run_agent

pytestmark = pytest.mark.slow  # tries very many cases

DOCS = Path(__file__).parent.parent.parent / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall((DOCS / name).read_text(encoding="utf-8")) if kind == language]


CANDIDATES = [
    "def median(v): return v[len(v) // 2]",
    "def median(v): return sum(v) / len(v)",
    "def median(v): s = sorted(v); return (s[(len(v) - 1) // 2] + s[len(v) // 2]) / 2",
    "def median(v): return sorted(v)[(len(v) - 1) // 2]",
    "def median(v): return",
]
PATCH = f"""@@ -1 +1 @@
-def median(v): return sorted(v)[len(v) // 2]
+{CANDIDATES[2]}
"""
INPUTS: dict[str, Any] = {
    "typed": {"name": "Ada", "tags": ["x"]},
    "nightly": {"branch": "main"},
    "on-push": {"branch": "main"},
    "fix-race": {"candidates": CANDIDATES},
    "on-github-push": {"event": "push", "ref": "refs/heads/main"},
}
OUTPUTS: dict[str, Any] = {
    "release-notes": {"notes": "changes since v1.0\n"},
    "typed": {"text": 'Dear Ada, ["x"] at depth 3'},
    "each": {"sizes": [3, 3, 5]},
    "again": {"n": 3},
    "large-values": {"size": 100_000},
    "outer": {"all": [10, 20]},
    "fix-race": {"patch": PATCH},
    "best-of": {"n": 9},
}


@pytest.mark.parametrize("text", blocks("workflows.md", "yaml"), ids=lambda text: text.split()[1])
def test_workflows(text: str, tmp_path: Path) -> None:
    workflow = validate.load(text, REGISTRY)
    with Jail() as jail:
        end = execute(workflow, INPUTS.get(workflow.name, {}), tmp_path, jail)
    assert end.status is RunStatus.COMPLETED, end.error
    if workflow.name in OUTPUTS:
        assert end.outputs == OUTPUTS[workflow.name]


def test_no_field_is_left_out() -> None:
    text = (DOCS / "workflows.md").read_text(encoding="utf-8")
    assert not [name for name, field in _Step.model_fields.items() if f"`{field.alias or name}`" not in text]
    text = (DOCS / "agents.md").read_text(encoding="utf-8")
    hidden = {"image", "description", "inputs_schema", "outputs_schema"}
    assert not [name for name in agents.Manifest.model_fields if name not in hidden and f"`{name}`" not in text]


@pytest.mark.parametrize(("number", "language", "file"), [(0, "python", "main.py"), (1, "sh", "main.sh")])
def test_agents(number: int, language: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent/agent.yaml").write_text(blocks("agents.md", "yaml")[number])
    (tmp_path / "agent" / file).write_text(blocks("agents.md", language)[0])
    package = agents.read_package(tmp_path / "agent")
    assert package.examples
    for example in package.examples:
        assert check.differences(example.outputs, run_agent(package.agent, example.inputs, tmp_path / "work")) == []


def test_an_agent_with_requirements(tmp_path: Path) -> None:
    """With a local package of that name: tests don't reach a registry."""
    place = tmp_path / "table"
    place.mkdir()
    (place / "agent.yaml").write_text(blocks("agents.md", "yaml")[2])
    (place / "main.py").write_text(blocks("agents.md", "python")[1])
    code = "def tabulate(rows, tablefmt):\n    return '\\n'.join(f'{a:3}  {b}' for a, b in rows)\n"
    wheel(tmp_path / "wheels", "tabulate", "0.9.0", files={"tabulate.py": code})
    with wheels_from(tmp_path / "wheels"):
        argv = [str(Path(sys.executable).with_name("swarm")), "agent", "test", "table/"]
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(argv, check=False, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 0 and "example 1" in done.stdout, done.stdout + done.stderr


def test_the_tutorial(tmp_path: Path) -> None:
    manifest, workflow = blocks("tutorial.md", "yaml")
    (program,) = blocks("tutorial.md", "python")
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent/agent.yaml").write_text(manifest)
    (tmp_path / "agent/main.py").write_text(program)
    package = agents.read_package(tmp_path / "agent")
    (example,) = package.examples
    assert check.differences(example.outputs, run_agent(package.agent, example.inputs, tmp_path / "work")) == []
    (tmp_path / "run").mkdir()
    with Jail() as jail:
        texts = {"texts": ["one two three", "four five", "six"]}
        flow = validate.load(workflow, registry(package.agent))
        end = execute(flow, texts, tmp_path / "run", jail, (package.agent,))
    assert (end.status, end.outputs) == (RunStatus.COMPLETED, {"total": 6}), end.error


def test_every_yaml_is_one_of_these() -> None:
    assert len(blocks("agents.md", "yaml")) == 4
