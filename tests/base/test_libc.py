"""Calls of the C library: what they say when the kernel refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

UNSHARE = "from swarm.base.libc import *; check(libc().unshare({flag}), 'unshare')"


@pytest.mark.needs("root", "netns")
@pytest.mark.parametrize(("limit", "flag"), [("net", "CLONE_NEWNET"), ("mnt", "CLONE_NEWNS"), ("ipc", "CLONE_NEWIPC")])
def test_a_used_up_limit_of_the_kernel_is_no_full_disk(limit: str, flag: str) -> None:
    script = f'echo 0 > /proc/sys/user/max_{limit}_namespaces; exec "$@"'
    argv = ["unshare", "--user", "--map-root-user", "sh", "-ec", script, "sh", sys.executable, "-c"]
    done = subprocess.run([*argv, UNSHARE.format(flag=flag)], capture_output=True, text=True, check=False, timeout=300)
    assert "unshare: a limit of the kernel is used up (sysctl user.max_*_namespaces" in done.stderr, done.stderr
