"""Limits of control groups, read from files as the kernel lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.base.cgroup import Limit, memory_limits
from swarm.engine.dispatch import available_bytes


@pytest.mark.parametrize(
    ("ours", "files", "limits"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "750"}, [(750, 90)]),
        ("0::/a/b", {"a/b/memory.max": "300", "a/memory.max": "750"}, [(300, 90), (750, 90)]),
        ("0::/", {"memory.max": "750"}, [(750, 90)]),
        ("4:memory:/x", {"memory/x/memory.limit_in_bytes": "750"}, [(750, 80)]),
        ("7:cpu,cpuacct:/x", {"memory/x/memory.limit_in_bytes": "750"}, []),
        ("0::/gone", {}, []),
    ],
)
def test_every_limit_around_it_counts(
    tmp_path: Path, ours: str, files: dict[str, str], limits: list[tuple[int, int]]
) -> None:
    (tmp_path / "ours").write_text(ours + "\n")
    for name, text in files.items():
        group = (tmp_path / name).parent
        group.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
        for used in ("memory.current", "memory.usage_in_bytes"):
            (group / used).write_text("100\n")
        (group / "memory.stat").write_text("anon 5\ninactive_file 10\ntotal_inactive_file 20\n")
    found = memory_limits(tmp_path, tmp_path / "ours")
    assert [(limit.bytes, limit.used) for limit in found] == limits


def test_no_more_than_the_tightest_group_leaves() -> None:
    assert available_bytes([Limit(bytes=750, used=90), Limit(bytes=300, used=100)]) == 200
    assert available_bytes([Limit(bytes=10, used=20)]) == 0
    assert available_bytes([]) > 0
