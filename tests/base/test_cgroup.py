"""Limits of control groups, read from files as the kernel lays them out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarm.base.cgroup import Limit, cpus, memory_limits, own_groups, processes_left
from swarm.engine.room import available_bytes


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


def test_a_kernel_without_groups(tmp_path: Path) -> None:
    assert own_groups(tmp_path / "missing") == {}
    assert memory_limits(tmp_path, tmp_path / "missing") == []


def test_no_more_than_the_tightest_group_leaves() -> None:
    assert available_bytes([Limit(bytes=750, used=90), Limit(bytes=300, used=100)]) == 200
    assert available_bytes([Limit(bytes=10, used=20)]) == 0
    assert available_bytes([]) > 0


HERE = float(len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("ours", "files", "found"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b", {"a/b/cpu.max": "25000 100000", "a/cpu.max": "50000 100000"}, 0.25),
        ("0::/a", {"a/cpu.max": "max 100000"}, HERE),
        ("0::/a", {"a/cpu.max": "900000000 100000"}, HERE),
        ("3:cpu,cpuacct:/x/y", {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, 0.5),
        ("3:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, HERE),
        ("3:cpu:/in/a/container", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:memory:/x", {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, HERE),
        ("0::/gone", {}, HERE),
    ],
)
def test_the_smallest_cpu_quota_counts(tmp_path: Path, ours: str, files: dict[str, str], found: float) -> None:
    write(tmp_path, ours, files)
    assert cpus(tmp_path, tmp_path / "ours") == found


@pytest.mark.parametrize(
    ("ours", "files", "left"),
    [
        ("0::/a/b", {"a/b/pids.max": "max", "a/b/pids.current": "3", "a/pids.max": "9", "a/pids.current": "4"}, 5),
        ("8:pids:/a", {"pids/a/pids.max": "9", "pids/a/pids.current": "40"}, 0),
        ("8:pids:/a", {"pids/a/pids.max": "max", "pids/a/pids.current": "40"}, None),
        ("0::/gone", {}, None),
    ],
)
def test_processes_left(tmp_path: Path, ours: str, files: dict[str, str], left: int | None) -> None:
    write(tmp_path, ours, files)
    assert processes_left(tmp_path, tmp_path / "ours") == left


def test_a_kernel_without_control_groups(tmp_path: Path) -> None:
    places = (tmp_path, tmp_path / "absent")
    assert (memory_limits(*places), cpus(*places), processes_left(*places)) == ([], HERE, None)


def write(root: Path, ours: str, files: dict[str, str]) -> None:
    (root / "ours").write_text(ours + "\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
