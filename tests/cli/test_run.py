"""`swarm run` with real VMs, pipes and terminals: it behaves as if the command ran here, and leaves nothing."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.app import wiring
from swarm.config import Settings
from swarm.vm.driver import Image
from tests.cli.terminals import Terminal

pytestmark = pytest.mark.needs("qemu")
SWARM = Path(sys.executable).parent / "swarm"
Done = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="module")
def env(settings: Settings, image: Image) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    own = {"SWARM_HOME": str(settings.home), "SWARM_IMAGES_DIR": str(settings.images), "TERM": "xterm-256color"}
    return kept | own


@pytest.fixture
def here(tmp_path: Path) -> Path:
    place = tmp_path / "here"
    place.mkdir()
    (place / "given.txt").write_text("given\n")
    return place


@pytest.fixture(autouse=True)
def _nothing_stays(settings: Settings, here: Path) -> Iterator[None]:
    yield
    assert [record.n for record in wiring.inventory(settings).records() if record.pid] == []
    links = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout
    assert ": br0:" not in links or ": swarm" in links, "the bridge, and no VM that uses it"


def run(here: Path, env: dict[str, str], *words: str, stdin: bytes = b"") -> Done:
    done = subprocess.run([SWARM, "run", *words], cwd=here, env=env, input=stdin, capture_output=True, timeout=300)
    assert b"Traceback" not in done.stderr
    return done


def test_pipes_stay_pipes_and_files_come_back(here: Path, env: dict[str, str]) -> None:
    everything = bytes(range(256)) * 5000
    script = """
        cat > copy; ls -A; echo told >&2; id -un; pwd; test -t 0 || echo no terminal
        mkdir -p dist/deep/.hidden; cp copy dist/deep/copy; chmod 755 dist/deep/copy; echo new > given.txt
        ln -s deep/copy dist/link; ln -s /etc/passwd dist/evil; mkdir -p dist/.git dist/empty; echo x > dist/.git/config
        mkdir bare; echo ref: refs/heads/x > bare/HEAD; cp bare/HEAD dist; ln -s HEAD dist/later; ln -s HEAD bare/later
        echo 1 > a.csv; echo 2 > b.csv; echo 3 > .c.csv; mkfifo dist/pipe; echo 4 > dist/deep/.hidden/d.csv
        mkdir -p far/off far/.cache; echo 5 > far/off/d.csv; echo 6 > far/.cache/d.csv
        exit 7
    """
    out = [
        "--out",
        "dist",
        "--out=*.csv",
        "--out",
        "given.txt",
        "--out",
        "none/*",
        "--out",
        "**/d.csv",
        "--out",
        "bare/*",
    ]
    done = run(here, env, *out, "sh", "-c", script, stdin=everything)
    assert done.returncode == 7
    assert done.stdout.decode().split("\n") == ["copy", "given.txt", "out", "agent", "/work", "no terminal", ""]
    said = done.stderr.decode()
    assert said.splitlines().count("told") == 1
    for part in (
        "nothing in /work fits 'none/*'",
        "dist/evil: it is a link",
        "dist/.git: git would run",
        "dist/HEAD: git would take",
        "left out: bare/HEAD: git would run",
        "dist/later: it is a link to 'HEAD'",
        "left out: bare/later: a link to 'HEAD'",
        "pipe: it is",
    ):
        assert part in said
    assert (here / "dist/deep/copy").read_bytes() == everything
    assert (here / "dist/deep/copy").stat().st_mode & 0o777 == 0o755
    assert (here / "dist/link").readlink() == Path("deep/copy") and (here / "given.txt").read_text() == "new\n"
    found = sorted(str(one.relative_to(here)) for one in here.rglob("*") if not one.is_dir())
    assert found == [
        "a.csv", "b.csv", "dist/deep/.hidden/d.csv", "dist/deep/copy", "dist/link", "far/off/d.csv", "given.txt",
    ]  # fmt: skip
    assert (here / "dist/empty").is_dir()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["no-such-program"], 127, "no-such-program can't be started"),
        (["/work/given.txt"], 126, "given.txt can't be started"),
        (["--timeout", "0.5", "--", "sleep", "60"], 124, "its time was up"),
        (["--dir", "nowhere", "true"], 2, "not a directory"),
        (["--out", "../x", "true"], 2, "is not below /work"),
        (["--net", "everything", "true"], 2, "network policy 'everything' is unknown"),
        (["--agent", "nobody", "true"], 125, "no agent"),
        (["--requirements", "six", "true"], 2, "not pinned"),
        (["--secret", "NOT_SET", "true"], 125, "error: the command can't run here: "),
        (["--dir", "", "true"], 2, "--dir': it is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_its_exit_status_is_the_commands(
    here: Path, env: dict[str, str], words: list[str], status: int, said: str
) -> None:
    done = run(here, env | {"SWARM_DRIVER": "process"}, *words)  # each in a VM would take long
    assert done.returncode == status, done.stderr
    assert said in done.stderr.decode() and done.stdout == b""


def test_without_a_home_it_says_what_a_secret_needs(here: Path, env: dict[str, str], tmp_path: Path) -> None:
    done = run(here, env | {"SWARM_DRIVER": "process", "SWARM_HOME": str(tmp_path / "none")}, "--secret", "KEY", "true")
    said = done.stderr.decode().rpartition("error: ")[2]
    assert (
        done.returncode == 125
        and said.startswith("the command can't run here: there is no database")
        and ("`swarm init`" in said and "`swarm secret set KEY`" in said and "agent" not in said)
    )


def test_variables_and_secrets(here: Path, env: dict[str, str]) -> None:
    subprocess.run([SWARM, "secret", "set", "DEPLOY_KEY"], input=b"s3cr3t-value", env=env, check=True)
    words = ["--secret", "DEPLOY_KEY", "-e", "A=1 2", "-e", "FROM_HERE", "--no-files"]
    script = 'echo "$A|$FROM_HERE|$DEPLOY_KEY"; test "$DEPLOY_KEY" = s3cr3t-"value"'
    done = run(here, env | {"FROM_HERE": "yes"}, *words, "sh", "-c", script)
    assert (done.stdout, done.returncode) == (b"1 2|yes|[DEPLOY_KEY]\n", 0), done.stderr


def test_much_output_and_a_reader_that_goes(here: Path, env: dict[str, str]) -> None:
    script = "head -c 3000000 /dev/urandom | tee r | cat; sha256sum r >&2"
    done = run(here, env, "--no-files", "sh", "-c", script)
    assert hashlib.sha256(done.stdout).hexdigest() == done.stderr.decode().splitlines()[-1].split()[0]
    child = subprocess.Popen([SWARM, "run", "yes"], cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.read(4) == b"y\ny\n"
    child.stdout.close()
    assert child.wait(timeout=300) == 141 and child.stderr.read() == b""
    child.stderr.close()


def test_an_interrupt_is_passed_on_and_a_second_one_ends_the_vm(here: Path, env: dict[str, str]) -> None:
    script = "trap 'echo caught' INT; echo ready; while :; do sleep 0.1; done"
    argv = [str(SWARM), "run", "sh", "-c", script]
    with subprocess.Popen(argv, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == b"caught\n"
        time.sleep(1.1)  # the next one is a first one again
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == b"caught\n"
        until = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < until:
            child.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert child.wait(timeout=300) == 130
        assert b"error: interrupted\n" in child.stderr.read()


def test_a_terminal_is_one_in_the_vm_too(here: Path, env: dict[str, str]) -> None:
    script = (
        "import os, signal, sys, threading\n"
        "def size(): os.write(1, b'size %d %d\\n' % os.get_terminal_size())\n"
        "def read():\n"
        "  while True: print('got', ascii(input()), flush=True)\n"
        "signals = {signal.SIGWINCH, signal.SIGINT}\n"
        # Waited for, not handled: a handler is not run while input() waits, if the signal came just before that.
        "signal.pthread_sigmask(signal.SIG_BLOCK, signals); size()\n"
        "print(sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty(), os.environ['TERM'], flush=True)\n"
        "threading.Thread(target=read, daemon=True).start()\n"
        "while signal.sigwait(signals) == signal.SIGWINCH: size()\n"
        "os.write(1, b'stopped\\n'); os._exit(5)\n"
    )
    with Terminal([SWARM, "run", "python3", "-c", script], env=env, cwd=here, size=(101, 33)) as terminal:
        terminal.until("size 101 33\r\n")
        terminal.until("True True True xterm-256color\r\n")
        assert not terminal.restored()
        terminal.resize(66, 20)
        terminal.until("size 66 20\r\n")
        terminal.type("h\u00e9llo\r")
        terminal.until("got 'h\\xe9llo'\r\n")
        terminal.type("\x03")
        terminal.until("stopped\r\n")
        assert terminal.status() == 5 and terminal.restored()
        # The guest's kernel sends the signal first, and then shows that it has; the agent may be quicker.
        assert terminal.seen in (b"", b"^C")


@pytest.mark.parametrize(
    ("ends", "status"), [("\x03\x03", 130), (signal.SIGTERM, 143)], ids=["Ctrl+C twice", "SIGTERM"]
)
def test_the_terminal_is_restored(here: Path, env: dict[str, str], ends: str | signal.Signals, status: int) -> None:
    script = "trap '' INT TERM; echo ready; sleep 60 & wait; cat > /dev/null"
    with Terminal([SWARM, "run", "sh", "-c", script], env=env, cwd=here) as terminal:
        terminal.until("ready\r\n")
        if isinstance(ends, str):
            terminal.type(ends)
        else:
            terminal.child.send_signal(ends)
        assert terminal.status() == status and terminal.restored()
