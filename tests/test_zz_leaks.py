"""The last test of all: what did the others leave? tools/sandbox.py looks once more after pytest has ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

SANDBOX = Path(__file__).parent.parent / "tools" / "sandbox.py"

# What stays between VMs by design, and goes with the last line of `swarm-cleanup`.
HOST_PART = ("link br0", "nft table inet swarm", "nft table ip swarm")


def left() -> list[str]:
    done = subprocess.run([sys.executable, SANDBOX, "--leaks"], check=False, capture_output=True, text=True)
    return [line.removeprefix("left behind: ") for line in done.stderr.splitlines()]


def is_postgresql(line: str) -> bool:
    """One server serves all tests, until pytest ends: then tools/sandbox.py looks for it."""
    return line.startswith("process ") and ("/postgresql/data" in line or " postgres: " in line)


def is_host_part(line: str) -> bool:
    return line in HOST_PART or (line.startswith("route ") and ("dev br0" in line or "blackhole" in line))


@pytest.mark.needs("netns")
def test_nothing_is_left_behind() -> None:
    until = time.monotonic() + 60
    while any(line.startswith("process ") and not is_postgresql(line) for line in left()) and time.monotonic() < until:
        time.sleep(0.1)  # what just ends, such as a browser, takes longer on a busy machine
    assert [line for line in left() if not is_host_part(line) and not is_postgresql(line)] == []
