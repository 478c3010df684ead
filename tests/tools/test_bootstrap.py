"""tools/bootstrap and tools/install: they change nothing on a host that they can't set up; a package has every file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Programs of any POSIX system; no apt-get, no qemu, no mmdebstrap.
BASICS = [
    "sh", "date", "mktemp", "id", "cut", "sort", "tr", "sha256sum", "cat", "flock", "sed", "tail", "grep", "rm",
    "dirname", "env",
]  # fmt: skip


def run(path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    sh = shutil.which("sh")
    assert sh
    script = str(ROOT / "tools" / "bootstrap")
    return subprocess.run(
        [sh, script, *argv],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": str(path), "SWARM_VENV": str(path / "venv")},
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def test_missing_packages_on_another_distribution(tmp_path: Path) -> None:
    for name in BASICS:
        found = shutil.which(name)
        assert found, name
        (tmp_path / name).symlink_to(found)
    done = run(tmp_path)
    assert done.returncode == 1
    assert "qemu-system-x86_64" in done.stderr
    assert "mmdebstrap" in done.stderr
    assert "not Debian or Ubuntu" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_wrong_use(tmp_path: Path) -> None:
    for name in BASICS:
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    done = run(tmp_path, "everything")
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.slow  # makes a virtual environment
def test_packages_that_can_not_be_installed(tmp_path: Path) -> None:
    """An installation without the package must not look like one."""
    venv = tmp_path / "venv"
    environment = {"PATH": os.environ["PATH"], "SWARM_VENV": str(venv), "PIP_NO_INDEX": "1"}
    script = str(ROOT / "tools" / "bootstrap")
    done = subprocess.run(
        ["sh", script, "system"], check=False, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 1
    assert "Python packages: failed with status" in done.stderr
    assert not (venv / "swarm-stamp").exists()


@pytest.mark.needs("root")
@pytest.mark.parametrize("words", [["venv/bin/swarm-engine", "start"], ["-m", "swarm.cli.engine", "start"]])
def test_an_installation_under_a_running_engine_is_not_replaced(tmp_path: Path, words: list[str]) -> None:
    """A process with an engine's command line; what it does doesn't matter."""
    python = tmp_path / "venv/bin/python"
    for program in (python.with_name("swarm-engine"), tmp_path / "swarm/cli/engine.py"):
        program.parent.mkdir(parents=True)
        program.write_text("input()")
    python.symlink_to(sys.executable)
    env = os.environ | {"SWARM_PREFIX": str(tmp_path), "SWARM_BIN": str(tmp_path / "bin")}
    engine = subprocess.Popen(
        [python, *(word.replace("venv/", f"{tmp_path}/venv/") for word in words)], stdin=subprocess.PIPE, cwd=tmp_path
    )
    try:
        done = subprocess.run([ROOT / "tools" / "install"], env=env, capture_output=True, text=True, timeout=60)
        assert engine.poll() is None
    finally:
        engine.communicate(b"\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"an engine runs from {tmp_path}/venv (pid {engine.pid}): `swarm-engine stop`")
    assert not (tmp_path / "bin").exists()


def test_an_installation_has_every_file() -> None:
    """Data files are installed only if pyproject.toml names them."""
    source = ROOT / "src" / "swarm"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["swarm"]
    named = {path for pattern in patterns for path in source.glob(pattern)}
    data = {path for path in source.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    data -= {source / "client" / "py.typed"}  # of another distribution: tests/client/test_distribution.py
    assert len(data) > 10 and data <= named, data - named
