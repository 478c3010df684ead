"""The tests' PostgreSQL: it ends with them, however they end, and its installation leaves no server and no file."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.postgres_here import NotInstalled, without_cluster

CREATE = Path("/usr/share/postgresql-common/createcluster.conf")
pytestmark = [pytest.mark.needs("postgres"), pytest.mark.slow]  # starts a server


def processes(data: Path) -> list[int]:
    """Of the server with this data directory: all of them work there."""
    found = list[int]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended since
                if (entry / "cwd").readlink() == data:
                    found.append(int(entry.name))
    return found


TESTS = """
import sys
from pathlib import Path
from tests import postgres_here
with postgres_here.running(Path(sys.argv[1])) as server:
    print(server.data, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_server_ends_with_the_tests(tmp_path: Path, number: signal.Signals) -> None:
    argv = [sys.executable, "-c", TESTS, str(tmp_path / "postgresql")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tests:
        assert tests.stdout is not None
        data = Path(os.fsdecode(tests.stdout.readline().strip()))
        assert len(processes(data)) > 2
        tests.send_signal(number)
        until = time.monotonic() + 60
        while processes(data) and time.monotonic() < until:
            time.sleep(0.05)
        left = processes(data)
        tests.kill()
    assert left == []


@pytest.mark.parametrize("there", [False, True])
def test_no_cluster_while_it_is_installed(tmp_path: Path, there: bool) -> None:
    if not CREATE.exists():
        pytest.skip("needs Debian's postgresql-common")
    settings, own = tmp_path / "createcluster.conf", tmp_path / "createcluster.d"
    settings.write_text(CREATE.read_text().replace("/etc/postgresql-common", str(tmp_path)))
    if there:
        own.mkdir()
        (own / "theirs.conf").write_text("port = 7000\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.conf")}
    asked = ["pg_conftool", str(settings), "show", "-bs", "create_main_cluster"]  # as the package's script does
    with without_cluster(tmp_path):
        assert subprocess.run(asked, capture_output=True, check=True).stdout == b"off\n"
        assert {path: path.read_bytes() for path in before} == before
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.conf")} == before and own.exists() == there


def test_settings_that_read_no_others(tmp_path: Path) -> None:
    """An administrator's own file."""
    if shutil.which("pg_conftool") is None:
        pytest.skip("needs Debian's postgresql-common")
    (tmp_path / "createcluster.conf").write_text("port = 7000\n")
    with pytest.raises(NotInstalled, match="would have its package start a server"), without_cluster(tmp_path):
        raise AssertionError("it is installed")
    assert [path.name for path in tmp_path.iterdir()] == ["createcluster.conf"]
