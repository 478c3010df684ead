"""Agent packages: manifests, and copies by content."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm import agents
from swarm.errors import UsageError
from swarm.model import ECHO_AGENT_ID, FailureReason

GOOD = "name: mine\nversion: 1.2.3\nentry: [main.py, --fast]\n"


def make(directory: Path, manifest: str = GOOD, **files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "agent.yaml").write_text(manifest)
    (directory / "main.py").write_text("print(1)\n")
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def test_the_echo_agent_has_its_id() -> None:
    (echo,) = (agent for agent in map(agents.read, agents.builtin()) if agent.name == "echo")
    assert echo.id == ECHO_AGENT_ID and echo.network == "none" and echo.entry == ("main.py",)


def test_every_field(tmp_path: Path) -> None:
    agent = agents.read(make(tmp_path, GOOD + """
network: {allow: [api.example.com, "*.example.org"]}
env: {MODE: fast, EMPTY: ""}
preload: [json, urllib.request]
retry: {max_attempts: 3, on: [timeout]}
inputs_schema: {type: object}
memory_mb: 512
"""))  # fmt: skip
    assert agent.network == "allow:api.example.com,*.example.org"
    assert agent.env == {"MODE": "fast", "EMPTY": ""} and agent.preload == ("json", "urllib.request")
    assert agent.retry.max_attempts == 3 and agent.retry.on == {FailureReason.TIMEOUT}
    assert agent.inputs_schema == '{"type": "object"}' and agent.memory_mb == 512
    assert agent.id == agents.read(tmp_path).id, "an id of its own, always the same"


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("", "mapping"),
        ("- a\n", "mapping"),
        ("name: [", "can't be read"),
        ("version: 1.0.0\nentry: [main.py]\n", "name"),
        (GOOD.replace("mine", "../mine"), "name"),
        (GOOD.replace("1.2.3", "one"), "version"),
        (GOOD.replace("main.py", "../main.py"), "entry"),
        (GOOD.replace("main.py", "/etc/passwd"), "entry"),
        (GOOD.replace("main.py", "gone.py"), "entry"),
        (GOOD + "runtime: exec\nentry: [nothing]\n", "entry"),
        (GOOD + "runtime: perl\n", "runtime"),
        (GOOD + "network: everywhere\n", "network"),
        (GOOD + "network: {allow: ['http://x']}\n", "network"),
        (GOOD + "env: {'A=B': x}\n", "env"),
        (GOOD + "memory_mb: 1\n", "memory_mb"),
        (GOOD + "timeout_seconds: 0\n", "timeout_seconds"),
        (GOOD + "outputs_schema: {type: nonsense}\n", "not a JSON Schema"),
        (GOOD + "runtime: exec\npreload: [json]\n", "preload"),
        (GOOD + "preload: [main]\n", "preload: 'main' is a file of this agent"),
        (GOOD + "colour: red\n", "colour"),
    ],
)
def test_a_bad_manifest_names_the_file_and_the_field(tmp_path: Path, manifest: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"agent\.yaml") as caught:
        agents.read(make(tmp_path, manifest))
    assert said in str(caught.value)


def test_install_copies_by_content(tmp_path: Path) -> None:
    source, store = make(tmp_path / "a"), tmp_path / "store"
    (source / "__pycache__").mkdir()
    (source / "__pycache__/main.pyc").write_text("noise")
    first, again = agents.install(source, store), agents.install(source, store)
    assert first == again and first.path.parent == store and first.path.name.startswith("mine-1.2.3-")
    assert sorted(p.name for p in first.path.iterdir()) == ["agent.yaml", "main.py"]
    (source / "main.py").write_text("print(2)\n")
    second = agents.install(source, store)
    assert second.path != first.path
    assert (first.path / "main.py").read_text() == "print(1)\n"
    assert {p.name for p in store.iterdir()} == {first.path.name, second.path.name}, "nothing half copied stays"


def test_links_are_not_packed(tmp_path: Path) -> None:
    source = make(tmp_path / "a")
    (source / "shadow").symlink_to("/etc/shadow")
    with pytest.raises(UsageError, match="link"):
        agents.install(source, tmp_path / "store")
