"""Builtin workflows, examples and templates, run with the agents' real programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swarm import agents
from swarm.agents import check
from swarm.cel.jail import Jail
from swarm.errors import Conflict, StepError, UsageError
from swarm.model import RunStatus
from swarm.workflow import definition, validate
from swarm.workflow.definition import Workflow
from tests.workflow.execute import REGISTRY, execute, run_agent

SHIPPED = Path(agents.builtin()[0]).parent.parent / "workflows"


def load(name: str) -> Workflow:
    return validate.load((SHIPPED / f"{name}.yaml").read_bytes(), REGISTRY, name=name)


def test_echo_chain(tmp_path: Path) -> None:
    with Jail() as jail:
        end = execute(load("echo-chain"), {"message": "good day"}, tmp_path, jail)
    assert end.status is RunStatus.COMPLETED, end.error
    assert end.outputs == {"heard": "good day", "story": "the first step said: Echo of ticket t-1"}


def test_fan_out_demo(tmp_path: Path) -> None:
    with Jail() as jail:
        end = execute(load("fan-out-demo"), {}, tmp_path, jail)
    assert end.outputs == {"counts": [5, 2, 5, 8], "total": 20}, end.error


def test_fix_until_green(tmp_path: Path) -> None:
    with Jail() as jail:
        end = execute(load("fix-until-green"), {}, tmp_path / "a", jail)
        assert end.outputs == {"file": "answer = 42\n"}, end.error
        end = execute(load("fix-until-green"), {"file": "answer = 39\n"}, tmp_path / "b", jail)
        assert end.outputs == {"file": "answer = 42\n"}, "the third try"
        end = execute(load("fix-until-green"), {"file": "answer = 1\n"}, tmp_path / "c", jail)
        assert end.status is RunStatus.FAILED and "is still false after 5 times" in str(end.error)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_can_be_frozen(path: Path) -> None:
    workflow = load(path.stem)
    assert workflow.name == path.stem
    assert definition.from_json(definition.to_json(workflow)) == workflow


EXAMPLES = [
    pytest.param(package, example, id=f"{package.agent.name}: {example.name}")
    for package in map(agents.read_package, [*agents.builtin()])
    for example in package.examples
]


@pytest.mark.parametrize(("package", "example"), EXAMPLES)
def test_examples(package: agents.Package, example: agents.Example, tmp_path: Path) -> None:
    if example.fails:
        with pytest.raises(StepError):
            run_agent(package.agent, example.inputs, tmp_path / "work")
    else:
        made = run_agent(package.agent, example.inputs, tmp_path / "work")
        assert check.differences(example.outputs, made) == []


@pytest.mark.parametrize("language", agents.templates())
def test_templates(language: str, tmp_path: Path) -> None:
    agents.template(language, "mine", tmp_path / "mine")
    package = agents.read_package(tmp_path / "mine")
    assert package.agent.name == "mine" and package.examples
    with pytest.raises(Conflict, match="not empty"):
        agents.template(language, "mine", tmp_path / "mine")
    if language == "node" and shutil.which("/usr/bin/node") is None:
        return  # this host has no node; in a guest, the layer brings it
    for example in package.examples:
        assert check.differences(example.outputs, run_agent(package.agent, example.inputs, tmp_path / "work")) == []


def test_a_template_needs_a_good_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name"):
        agents.template("python", "Not/Good", tmp_path / "mine")


def test_shell_writes_nowhere_else(tmp_path: Path) -> None:
    shell = next(agents.read(d) for d in agents.builtin() if d.name == "shell")
    with pytest.raises(StepError, match="not below the work directory"):
        run_agent(shell, {"commands": "true", "files": {"../x": "y"}}, tmp_path / "work")


def test_inputs_are_checked_first(tmp_path: Path) -> None:
    shell = next(agents.read(d) for d in agents.builtin() if d.name == "shell")
    with pytest.raises(StepError, match=r"\$: unknown: 'command'; use one of .*\$: 'commands' is missing"):
        run_agent(shell, {"command": "true"}, tmp_path / "work")
