"""docs/operations.md on backups, as typed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts programs

PAGE = Path(__file__).parents[2] / "docs/operations.md"
BIN = Path(sys.executable).parent


def sh(script: str, env: dict[str, str], status: int = 0) -> str:
    done = subprocess.run(["bash", "-ec", script], env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    path = f"{BIN}:{os.environ['PATH']}"
    env = os.environ | {"SWARM_HOME": str(tmp_path / "home"), "BACKUP": str(tmp_path / "backup"), "PATH": path}
    sh("swarm init --no-image", env)
    return env


def test_the_pages_commands(tmp_path: Path, env: dict[str, str]) -> None:
    section = PAGE.read_text().partition("## Backups\n")[2].partition("\n## ")[0]
    back_up, put_back = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    database = tmp_path / "home/data/swarm.db"
    idle = sqlite3.connect(database, isolation_level=None)
    idle.execute("BEGIN")  # a program that reads: what is written from now on stays in the log, beside the file
    try:
        assert idle.execute("SELECT count(*) FROM tickets").fetchall() == [(0,)]
        sh("swarm ticket add t --agent echo --id kept --draft; swarm secret set KEY <<< value-of-it", env)
        shutil.copyfile(database, tmp_path / "plain.db")
        with sqlite3.connect(tmp_path / "plain.db") as plain:
            assert plain.execute("SELECT count(*) FROM tickets").fetchall() == [(0,)]  # why the page warns
        plain.close()
        sh(back_up, env)
    finally:
        idle.close()
    sh("swarm ticket add t --agent echo --id later --draft", env)
    shutil.rmtree(tmp_path / "home/agents")
    assert "prove" in put_back
    sh(put_back.replace("swarm init", "swarm init --no-image"), env)
    assert [one["id"] for one in json.loads(sh("swarm ticket list --json", env))] == ["kept"]
    assert [one["name"] for one in json.loads(sh("swarm secret list --json", env))] == ["KEY"]
    assert not (tmp_path / "backup/secret.key").exists()
    assert "echo" in sh("swarm agent show echo", env)


def test_a_database_whose_rows_were_all_deleted(tmp_path: Path, env: dict[str, str]) -> None:
    with sqlite3.connect(tmp_path / "home/data/swarm.db") as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names:
            database.execute(f'DELETE FROM "{name}"')
    database.close()
    said = sh("swarm init --no-image", env, status=1)
    assert "has tables, but no row in alembic_version" in said and said.count("\n") == 1
    assert "CREATE" not in said and "already exists" not in said
    repair = said.rpartition("made them: ")[2].strip()
    sh(f'sqlite3 "$SWARM_HOME/data/swarm.db" "{repair}"; swarm init --no-image', env)
    assert "echo" in sh("swarm agent list", env)
