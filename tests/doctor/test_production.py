"""`swarm doctor --production` on hosts made of files: with each recommendation met, and with each missed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from swarm.doctor import Check, Status
from swarm.doctor.production import examine
from swarm.vm.drivers.firecracker import hole_in

GOOD = {
    "proc/sys/kernel/osrelease": "6.1.0-56-amd64",
    "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu vmx sse\n",
    "dev/kvm": "",
    "sys/devices/system/cpu/smt/control": "forceoff",
    "sys/kernel/mm/ksm/run": "0",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
    "proc/sys/kernel/seccomp/actions_avail": "kill_process kill_thread trap errno trace log allow",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids",
    "proc/sys/kernel/random/entropy_avail": "256",
    "sys/devices/system/cpu/vulnerabilities/meltdown": "Mitigation: PTI",
    "sys/devices/system/cpu/vulnerabilities/l1tf": "Not affected",
}


def host(root: Path, changes: Mapping[str, str | None] | None = None) -> list[Check]:
    for name, content in {**GOOD, **(changes or {})}.items():
        if content is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content + "\n")
    return examine(jailed=True, jailer="1.15.1", root=root)


def test_a_host_as_recommended(tmp_path: Path) -> None:
    checks = host(tmp_path)
    assert [check for check in checks if check.status is not Status.OK] == []
    assert [check.name for check in checks] == [
        "kernel version", "KVM", "SMT", "KSM", "swap", "huge pages", "seccomp", "jailer", "cgroup v2", "entropy",
        "mitigations",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "name", "status", "says"),
    [
        ("proc/sys/kernel/osrelease", "4.14.336", "kernel version", "fail", "4.14.336"),
        ("dev/kvm", None, "KVM", "fail", "/dev/kvm does not exist"),
        ("dev/kvm", None, "KVM", "fail", "QEMU without KVM is no security boundary"),
        ("proc/cpuinfo", "flags\t\t: fpu sse\n", "KVM", "warn", "neither VMX nor SVM"),
        ("proc/cpuinfo", "flags\t\t: fpu sse\n", "KVM", "warn", "QEMU without KVM is no security boundary"),
        ("sys/devices/system/cpu/smt/control", "on", "SMT", "fail", "share a core"),
        ("sys/kernel/mm/ksm/run", "1", "KSM", "fail", "merged"),
        ("proc/swaps", "Filename\n/dev/sda2 partition 1 0 -2", "swap", "fail", "/dev/sda2"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never", "huge pages", "warn", "2 MiB"),
        ("proc/sys/kernel/seccomp/actions_avail", None, "seccomp", "fail", "system calls"),
        ("sys/fs/cgroup/cgroup.controllers", None, "cgroup v2", "warn", "version 1"),
        ("sys/fs/cgroup/cgroup.controllers", "cpu pids", "cgroup v2", "warn", "lacks io, memory"),
        ("proc/sys/kernel/random/entropy_avail", "12", "entropy", "warn", "12 bits"),
        ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable", "mitigation: mds", "fail", "Vulnerable"),
        (
            "sys/devices/system/cpu/vulnerabilities/l1tf",
            "Mitigation: PTE Inversion; VMX: cache flushes, SMT vulnerable",
            "mitigation: l1tf",
            "fail",
            "SMT vulnerable",
        ),
        ("sys/devices/system/cpu/vulnerabilities/tsa", "Unknown: No mitigations", "mitigation: tsa", "warn", "Unknown"),
    ],
)
def test_each_missed_recommendation(
    tmp_path: Path, file: str, content: str | None, name: str, status: str, says: str
) -> None:
    bad = [check for check in host(tmp_path, {file: content}) if check.status is not Status.OK]
    assert [(check.name, str(check.status)) for check in bad] == [(name, status)]
    assert says in bad[0].detail
    assert bad[0].fix or name == "KVM"


@pytest.mark.parametrize(
    ("jailed", "version", "says"),
    [
        (False, "1.15.1", "switched off"),
        (True, None, "is not installed"),
        (True, "1.12.1", "1.12.1 has a known hole: CVE-2026-1386"),
    ],
)
def test_the_jailer(tmp_path: Path, jailed: bool, version: str | None, says: str) -> None:
    host(tmp_path)
    hole = hole_in(version) if version else ""
    checks = examine(jailed=jailed, jailer=version, hole=hole, root=tmp_path)
    [bad] = [c for c in checks if c.status is not Status.OK]
    assert (bad.name, bad.status) == ("jailer", Status.FAIL)
    assert says in bad.detail


def test_the_command_on_this_host() -> None:
    argv = [sys.executable, "-m", "swarm.cli.main", "doctor", "--production"]
    env = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, timeout=300)
    assert done.returncode == int("FAIL" in done.stdout), done.stderr
    for name in ("SMT", "KSM", "swap", "huge pages", "seccomp", "jailer", "entropy", "mitigations", "cgroup v2"):
        assert name in done.stdout
