"""`make uninstall` takes nothing from under another home's engine, and no unit that names another installation."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from swarm.base import files

TOOL = Path(__file__).parents[2] / "tools" / "uninstall"


def uninstall(place: Path) -> subprocess.CompletedProcess[str]:
    names = {"PREFIX": "prefix", "BIN": "bin", "STATE_DIR": "state", "UNIT": "unit"}
    env = {**os.environ, **{f"SWARM_{name}": str(place / to) for name, to in names.items()}}
    return subprocess.run([TOOL], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "prefix" / "venv").mkdir(parents=True)
    (tmp_path / "state" / "locks").mkdir(parents=True)
    return tmp_path


@pytest.mark.needs("root")
def test_it_refuses_while_a_slot_is_held(place: Path) -> None:
    held = files.try_lock(place / "state" / "locks" / "1", create=0o600)
    assert held is not None
    done = uninstall(place)
    os.close(held)
    assert done.returncode == 1 and "still uses" in done.stderr, done
    assert (place / "prefix" / "venv").is_dir()


@pytest.mark.needs("root")
@pytest.mark.parametrize(("of", "stays"), [("prefix", False), ("other", True)])
def test_the_unit_goes_with_what_it_starts(place: Path, of: str, stays: bool) -> None:
    unit = place / "unit"
    unit.write_text(f'[Service]\nExecStart="{place}/{of}/venv/bin/swarm-engine" start --foreground\n')
    done = uninstall(place)
    assert done.returncode == 0, done
    assert (unit.exists(), (place / "prefix" / "venv").exists()) == (stays, False)
