"""Run the whole test suite in four sandboxes at once: most tests wait most of the time, and leave a core to others.

    tools/parallel_tests.py COMMAND [ARG…]      COMMAND is pytest; each sandbox's share of the tests is added to it

Each sandbox is one run of tools/sandbox.py, with its own networks, state and leak test; together they run every test.
Their output is printed line by line, with the sandbox's name in front. The status is 0 if all of them ended with 0.

If no more than three tests failed in all, they are run once more, alone, since four sandboxes on a slow machine leave a
test very little of it. What fails again has failed. What passes is named at the end: it is a fault of the test or of
the program, and to be mended, but it does not hold up a change that has nothing to do with it.
"""
# ruff: noqa: T201 - a command-line tool

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAKS = "tests/test_zz_leaks.py"
FIRST = [f"tests/{name}" for name in ("cli", "engine")]
FOURTH = [f"tests/{name}" for name in ("agents", "api", "cel", "channel", "chaos", "client", "dashboard", "store")]
MOVED = ["tests/cli/test_packages.py", "tests/cli/test_sandbox.py"]  # from the first to the fourth, which ends earlier
# Firecracker guests are slow on hosts without VMX or SVM, so they have a sandbox of their own, with a higher priority.
# Elsewhere it ends first by far, so it has the store's tests on PostgreSQL too, and some long ones of the others.
LONG = [
    "additions",
    "cluster",
    "containers",
    "host_network",
    "host_states",
    "image_examples",
    "images",
    "sharing",
    "simulate",
    "templates",
    "claude_code_in_vm",
    "transcripts",
    "workflows",
]
THIRD = " or ".join(["firecracker", "postgresql", *(f"test_{name}.py" for name in LONG)])
SHARES = {
    "1": [*FIRST, *(f"--ignore={name}" for name in MOVED), LEAKS, "-k", f"not ({THIRD})"],
    "2": ["tests", *(f"--ignore={name}" for name in FIRST + FOURTH), "-k", f"not ({THIRD})"],
    "3": ["tests", "-k", f"{THIRD} or nothing_is_left_behind"],
    "4": [*FOURTH, *MOVED, LEAKS, "-k", f"not ({THIRD})"],
}
URGENT = "3"
MOST_FAILED = 60  # lines for each sandbox
MOST_AGAIN = 3  # tests


def main(argv: list[str]) -> int:
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="swarm-tests-") as name:
        status = run(argv, Path(name))
    print(f"{time.monotonic() - began:.0f} s in all")
    return status


def run(argv: list[str], caches: Path) -> int:
    sandboxes = {
        name: start([*argv, *keeping(caches / name), *tests], urgent=name == URGENT) for name, tests in SHARES.items()
    }
    terminal = os.isatty(0)  # sys.stdin may be None: closed

    def forward(number: int, _frame: object) -> None:
        if number == signal.SIGINT and terminal:
            return  # the terminal has sent it to them too
        for sandbox in sandboxes.values():
            with contextlib.suppress(ProcessLookupError):
                sandbox.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    failed: dict[str, list[str]] = {name: [] for name in sandboxes}
    readers = [threading.Thread(target=show, args=(*pair, failed[pair[0]])) for pair in sandboxes.items()]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    statuses = {name: sandbox.wait() for name, sandbox in sandboxes.items()}
    for name, status in statuses.items():
        # Again, at the end: what failed stands thousands of lines above, between those of the other sandboxes.
        print(f"sandbox {name} ended with status {status}", *failed[name], sep="\n  ")
    if tests := worth_another_run(statuses, caches, failed):
        sandboxes["again"] = start([*argv, *tests, LEAKS], urgent=False)
        show("again", sandboxes["again"], [])
        if (status := sandboxes["again"].wait()) == 0:
            print("UNSTEADY: failed beside all others, passed alone; to be mended:", *tests, sep="\n  ")
        return status
    return next((status for status in statuses.values() if status), 0)


def keeping(cache: Path) -> list[str]:
    """pytest's options to keep there which tests failed."""
    return ["-o", f"cache_dir={cache}"]


def worth_another_run(statuses: dict[str, int], caches: Path, lines: dict[str, list[str]]) -> list[str]:
    """The tests that failed, if that is all that went wrong, and if they are few."""
    tests: list[str] = []
    for name, status in statuses.items():
        if status == 0:
            continue
        file = caches / name / "v" / "cache" / "lastfailed"
        found = list(json.loads(file.read_text())) if file.exists() else []
        leaked = any(line.startswith("left behind: ") for line in lines[name])
        if status != 1 or leaked or not found or any(test.startswith(LEAKS) for test in found):
            return []  # it ended early, or left something
        tests += found
    return tests if len(tests) <= MOST_AGAIN else []


def start(argv: list[str], *, urgent: bool) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "tools" / "sandbox.py", *argv],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=raise_priority if urgent else None,
    )


def raise_priority() -> None:
    with contextlib.suppress(PermissionError):
        os.nice(-10)


def show(name: str, sandbox: subprocess.Popen[str], failed: list[str]) -> None:
    """Print the sandbox's output; ``failed`` gets its lines about what failed."""
    assert sandbox.stdout is not None
    for line in sandbox.stdout:
        print(f"{name} | {line}", end="", flush=True)
        if line.startswith(("FAILED ", "ERROR ", "E   ", "left behind: ")) and len(failed) < MOST_FAILED:
            failed.append(line.rstrip()[:500])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
