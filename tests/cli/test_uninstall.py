"""`make uninstall` takes nothing from under another home's engine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from swarm.base import files

TOOL = Path(__file__).parents[2] / "tools" / "uninstall"


@pytest.mark.needs("root")
def test_it_refuses_while_a_slot_is_held(tmp_path: Path) -> None:
    prefix, locks = tmp_path / "prefix", tmp_path / "state" / "locks"
    (prefix / "venv").mkdir(parents=True)
    locks.mkdir(parents=True)
    held = files.try_lock(locks / "1", create=0o600)
    assert held is not None
    places = {"SWARM_PREFIX": prefix, "SWARM_BIN": tmp_path / "bin", "SWARM_STATE_DIR": locks.parent}
    env = {**os.environ, **{name: str(place) for name, place in places.items()}}
    done = subprocess.run([TOOL], env=env, capture_output=True, text=True, check=False)
    os.close(held)
    assert done.returncode == 1 and "still uses" in done.stderr, done
    assert (prefix / "venv").is_dir()
