"""Log lines: whatever happens to them, who logs goes on at once, and lost lines are counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from swarm.base import log

LINES, CHARS = 3000, 1000  # more than a pipe and the queue hold
PROGRAM = f"""
import structlog
from swarm.base.log import configure
configure(info=True, as_json=True)
log = structlog.get_logger()
for n in range({LINES}):
    log.info("x" * {CHARS}, n=n)
print("done", flush=True)
input()
"""


def start(stderr: int) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)


def test_a_reader_that_stalls_stops_nobody_and_learns_what_it_missed() -> None:
    ours, theirs = os.pipe()
    with start(theirs) as process, open(ours) as reader:
        os.close(theirs)
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "done\n"  # nothing was read until now
        lines = iter(json.loads(line) for line in reader)
        seen = lost = 0
        while seen + lost < LINES:
            said = next(lines)
            lost += said.get("count", 0)
            seen += "n" in said
        assert lost > 0 and seen * CHARS >= log.WAITING_CHARS / 2
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.mark.parametrize("kind", ["full", "gone", "closed", "unread"])
def test_lines_that_go_nowhere_change_nothing(kind: str) -> None:
    ours, theirs = os.pipe()
    if kind == "gone":
        os.close(ours)
    stderr = os.open("/dev/full", os.O_WRONLY) if kind == "full" else theirs
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh"] if kind == "closed" else []
    argv = [*shell, sys.executable, "-c", PROGRAM]
    done = subprocess.run(argv, check=False, input="\n", stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=60)
    os.close(theirs)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_lost_lines_are_counted_once_the_stream_takes_lines_again() -> None:
    written: list[str] = []
    refused = threading.Event()
    fails = True

    def write(text: str) -> None:
        if fails:
            refused.set()
            raise OSError(28, "No space left on device")
        written.append(text)

    lines = log.Lines(write)
    lines.write("one\n")
    lines.write("two\n")
    lines.finish(30)
    assert refused.is_set() and written == []
    fails = False
    lines.write("three\n")
    lines.finish(30)
    assert written == ["\nlog lines could not be written: 2\nthree\n"]  # a line of its own, after half a line
    lines.write("four\n")
    lines.finish(30)
    assert written[1:] == ["four\n"]


def test_a_line_that_no_encoding_knows_is_written() -> None:
    code = "from swarm.base.log import LINES; LINES.write('a\\udc80b\\u2028\\n')"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env)
    assert done.stderr == b"a\\udc80b\\u2028\n"
