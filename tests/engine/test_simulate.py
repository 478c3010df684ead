"""`make simulate`, as small as it can be: so that it still runs when somebody needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.needs("postgres")

SMALL = (
    *("--engines=2", "--tickets=50", "--paced=3", "--per-second=20", "--idle=0.1"),
    *("--finished=100", "--listeners=2", "--stores=1,2"),
)


def test_each_part_prints_its_table() -> None:
    argv = [sys.executable, "-m", "tests.engine.simulate", "engines", "rows", "listeners", "connections", *SMALL]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for first in ("| engines | tickets |", "| | tickets | workflow_runs |", "| listening", "| engines | connections |"):
        assert first in done.stdout, done.stdout
    assert "| 2 | 50 | " in done.stdout
