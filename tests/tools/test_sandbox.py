"""tools/sandbox.py: what it isolates, passes on and finds; and that a test that hangs ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "sandbox.py")
pytestmark = pytest.mark.needs("root")


def sandbox(*argv: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, TOOL, *argv], check=False, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done


def sh(text: str) -> subprocess.CompletedProcess[str]:
    return sandbox("sh", "-c", text)


def test_network_and_settings_are_its_own() -> None:
    done = sh("ip -o link | cut -d: -f2; ip route; ip netns list; echo $SWARM_STATE_DIR; echo $SWARM_HOME")
    links, state, home = done.stdout.split()
    assert links == "lo"
    assert state.startswith("/") and home.startswith("/") and state != os.environ.get("SWARM_STATE_DIR")
    assert not Path(state).parent.exists(), "the sandbox's directory is removed"
    assert done.returncode == 0 and done.stderr == ""


def test_exit_status_is_passed_on() -> None:
    assert sh("exit 7").returncode == 7
    assert sh("kill -KILL $$").returncode == 128 + signal.SIGKILL
    assert sandbox("/nonexistent/program").returncode == 127


@pytest.mark.parametrize(
    ("make", "named"),
    [
        ("ip link add br0 type bridge", "link br0"),
        ("ip netns add vm7", "netns vm7"),
        ("nft add table inet swarm", "nft table inet swarm"),
        ("mount -t tmpfs none /mnt", "mount /mnt"),
        ("mkdir -p $SWARM_STATE_DIR/vms/7", "/vms/7"),
        ("setsid sleep 600 </dev/null >/dev/null 2>&1 &", "sleep 600"),
        # A process in another network namespace, like a VMM.
        ("setsid unshare --net sleep 601 </dev/null >/dev/null 2>&1 &", "sleep 601"),
    ],
)
def test_what_is_left_is_named_and_fails(make: str, named: str) -> None:
    done = sh(make)
    assert done.returncode == 1
    assert any(named in line for line in done.stderr.splitlines()), done.stderr
    killed = [int(line.split()[3]) for line in done.stderr.splitlines() if line.startswith("left behind: process ")]
    assert bool(killed) == named.startswith("sleep")
    assert not [pid for pid in killed if Path(f"/proc/{pid}").exists()]


def test_a_failure_keeps_its_own_status_when_something_is_left() -> None:
    done = sh("ip link add br0 type bridge; exit 9")
    assert done.returncode == 9 and "link br0" in done.stderr


def test_a_sandbox_inside_a_sandbox_leaves_its_neighbours_alone() -> None:
    done = sh(f"sleep 600 & {sys.executable} {TOOL} sh -c 'sleep 601 &'; kill $! && echo alive; wait")
    assert (done.stdout, done.returncode) == ("alive\n", 0), done.stderr
    assert [line.split()[4:] for line in done.stderr.splitlines()] == [["sleep", "601"]]


def test_two_at_once_leave_each_other_alone() -> None:
    argv = [sys.executable, TOOL, "sh", "-c", "sleep 602 & echo $!; read line; kill $! && echo alive; wait"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout is not None and one.stdout.readline().strip().isdigit()
        other = sh("sleep 603 &")
        assert [line.split()[4:] for line in other.stderr.splitlines()] == [["sleep", "603"]]
        out, err = one.communicate("go on\n", timeout=60)
    assert (out, err, one.returncode) == ("alive\n", "", 0)


def test_the_command_does_not_inherit_an_ignored_ctrl_c() -> None:
    script = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    ignoring = ["env", "--ignore-signal=INT,QUIT"]  # as `nohup make test &` has it in a script
    for argv in ([*ignoring, sys.executable, TOOL], [sys.executable, TOOL]):
        done = subprocess.run([*argv, sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_test_that_hangs_ends_with_its_stack(tmp_path: Path) -> None:
    """By pyproject.toml's own settings; only the limit is another."""
    file = tmp_path / "test_hangs.py"
    file.write_text("import threading\n\ndef test_hangs():\n    threading.Event().wait()\n")
    argv = [
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
        "-o",
        "faulthandler_timeout=1",
    ]
    done = subprocess.run(
        [sys.executable, *argv, str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1 and "test_hangs" in done.stderr, done.stdout + done.stderr


def test_signals_are_forwarded() -> None:
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('caught'))\n"
        "sys.stdout.write('ready\\n')\n"
        "sys.stdout.flush()\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, TOOL, sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "caught\n"
        assert process.wait(timeout=60) == 1
