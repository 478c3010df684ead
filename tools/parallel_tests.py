"""Run the whole test suite in four sandboxes at once: most tests wait most of the time, and leave a core to others.

    tools/parallel_tests.py COMMAND [ARG…]      COMMAND is pytest; each sandbox's share of the tests is added to it

Each sandbox is one run of tools/sandbox.py, with its own networks, state and leak test; together they run every test.
Their output is printed line by line, with the sandbox's name in front. The status is 0 if all of them ended with 0.
"""
# ruff: noqa: T201 - a command-line tool

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = [f"tests/{name}" for name in ("cli", "engine")]
FOURTH = [f"tests/{name}" for name in ("agents", "api", "cel", "channel", "chaos", "client", "dashboard", "store")]
MOVED = ["tests/cli/test_packages.py", "tests/cli/test_sandbox.py"]  # from the first to the fourth, which ends earlier
# Firecracker guests are slow on hosts without VMX or SVM, so they have a sandbox of their own, with a higher priority.
# Elsewhere it ends first by far, so it has the store's tests on PostgreSQL too, and some long ones of the others.
LONG = [
    "cluster",
    "host_network",
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
    "1": [*FIRST, *(f"--ignore={name}" for name in MOVED), "tests/test_zz_leaks.py", "-k", f"not ({THIRD})"],
    "2": ["tests", *(f"--ignore={name}" for name in FIRST + FOURTH), "-k", f"not ({THIRD})"],
    "3": ["tests", "-k", f"{THIRD} or nothing_is_left_behind"],
    "4": [*FOURTH, *MOVED, "tests/test_zz_leaks.py", "-k", f"not ({THIRD})"],
}
URGENT = "3"
MOST_FAILED = 60  # lines for each sandbox


def main(argv: list[str]) -> int:
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    began = time.monotonic()
    sandboxes = {name: start(argv + tests, urgent=name == URGENT) for name, tests in SHARES.items()}
    terminal = sys.stdin.isatty()

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
    print(f"{time.monotonic() - began:.0f} s in all")
    return next((status for status in statuses.values() if status), 0)


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
        if line.startswith(("FAILED ", "ERROR ", "E   ")) and len(failed) < MOST_FAILED:
            failed.append(line.rstrip()[:500])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
