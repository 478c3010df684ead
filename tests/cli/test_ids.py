"""Every command that takes a ticket's id takes a unique beginning of one, and says which tickets several would be."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts programs

BIN = Path(sys.executable).parent
ONE_AND_TWO = "0199aaaa-0000-4000-8000-000000000001", "0199bbbb-0000-4000-8000-000000000002"
TAKE_IDS = [
    "swarm ticket show ID",
    "swarm ticket logs ID",
    "swarm ticket logs -f ID",
    "swarm ticket cancel ID",
    "swarm ticket retry ID",
    "swarm ticket retry ID --from step",
    "swarm ticket ready ID",
    "swarm ticket rm ID",
    "swarm ticket wait ID",
    "swarm ticket files ID",
    "swarm ticket get ID",
    "swarm ticket approve ID",
    "swarm ticket reject ID --why no",
    "swarm ticket add After --agent echo --after ID",
    "swarm artifact list --ticket ID",
    "swarm-engine run-ticket ID",
    "swarm-engine run-ticket ID --wait",
]


def run(line: str, home: Path) -> subprocess.CompletedProcess[str]:
    program, *words = line.split()
    env = os.environ | {"SWARM_HOME": str(home)}
    return subprocess.run([BIN / program, *words], check=False, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("ids")
    assert run("swarm init --no-image", home).returncode == 0
    with sqlite3.connect(home / "data/swarm.db", timeout=60) as db:
        for id in ONE_AND_TWO:
            db.execute("INSERT INTO tickets (id, state, agent_id) VALUES (?, 'draft', 'echo')", (id,))
    return home


@pytest.mark.parametrize("line", TAKE_IDS)
def test_an_id_by_its_beginning(line: str, filled: Path) -> None:
    done = run(line.replace("ID", "0199"), filled)
    assert done.returncode == 2 and f"begin with '0199': {', '.join(ONE_AND_TWO)}; write more" in done.stderr


def test_one_is_found(filled: Path) -> None:
    one, two = ONE_AND_TWO
    assert one in run(f"swarm ticket show {one[:5]}", filled).stdout
    done = run(f"swarm ticket ready {two[:5]}", filled)
    assert (done.returncode, done.stdout) == (0, f"ticket {two} is ready\n")
    listed = run("swarm ticket list", filled).stdout
    assert listed.count(" echo ") == 2
