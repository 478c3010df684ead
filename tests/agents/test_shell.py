"""The shell agent: what its commands print and leave, whatever they start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import swarm

pytestmark = pytest.mark.slow  # starts programs

MAIN = Path(swarm.__file__).parent / "builtin/agents/shell/main.py"


def shell(work: Path, *commands: str, status: int = 0, **inputs: object) -> dict[str, Any]:
    """Its outputs. What its commands left running is killed afterwards, as agentd does."""
    work.mkdir(exist_ok=True)
    (work / "input.json").write_text(json.dumps({"inputs": {"commands": commands, **inputs}}))
    with (work.parent / "printed").open("wb") as printed:
        child = subprocess.Popen(
            [sys.executable, MAIN], cwd=work, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
            start_new_session=True,
        )  # fmt: skip
    try:
        assert child.wait(60) == status, (work.parent / "printed").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    made: dict[str, Any] = json.loads((work / "output.json").read_text())
    return made


def test_a_program_in_the_background_holds_nothing_up_and_stays(tmp_path: Path) -> None:
    made = shell(
        tmp_path / "work",
        "sleep 300 & echo $! > pid; echo x",
        "yes & echo y",  # one that prints for ever
        "kill -0 $(cat pid) && echo alive",
    )
    first, second, third = (one["stdout"] for one in made["results"])
    assert first == "x\n" and "y\n" in second and third == "alive\n"


def test_all_that_a_command_printed_is_kept(tmp_path: Path) -> None:
    """To the limit, on both streams, also the last before its end."""
    made = shell(tmp_path / "work", "head -c 300000 /dev/zero | tr '\\0' a; head -c 65536 /dev/zero | tr '\\0' b >&2",
                 max_output_bytes=200_000)  # fmt: skip
    (one,) = made["results"]
    assert one["stdout"] == "a" * 200_000 and one["stderr"] == "b" * 65536 and one["truncated"]


def test_what_is_collected(tmp_path: Path) -> None:
    made = shell(
        tmp_path / "work",
        "mkdir -p d/e 'odd[1]'; echo 1 > d/1; echo 2 > d/e/2.log; echo 3 > 'odd[1]/3'; printf '\\377' > bin",
        "ln -s /etc/passwd out.txt; ln -s d/1 link; mkfifo pipe; mkdir empty; truncate -s 1G sparse; printf x > x",
        collect=["d", "**/*.log", "odd[1]", "bin", "none", "*.none", "out.txt", "link", "pipe", "empty", "sparse", "x"],
    )  # fmt: skip
    assert made["files"] == {"d/1": "1\n", "d/e/2.log": "2\n", "odd[1]/3": "3\n", "link": "1\n", "x": "x"}
    assert made["binary"] == {"bin": "/w=="}
    assert made["missing"] == ["none", "*.none"]
    assert made["left_out"].keys() == {"out.txt", "pipe", "sparse"} and made["left_out"]["sparse"] == 1 << 30
    printed = (tmp_path / "printed").read_text()
    assert "nothing to collect is named 'none'" in printed and "'sparse' (1,073,741,824 bytes) is left out" in printed


def test_what_is_collected_is_bounded(tmp_path: Path) -> None:
    made = shell(
        tmp_path / "work",
        "mkdir d; cd d; for i in $(seq 1100); do : > $i; done; cd ..; head -c 2000000 /dev/zero > zeros",
        "head -c 7000000 /dev/zero | tr '\\0' a > large; cp large larger",
        collect=["zeros", "large", "larger", "d"],
    )
    # A NUL takes six bytes in JSON.
    assert len(json.dumps(made["files"])) < 9 << 20 and len(made["files"]) == 1000
    assert {"zeros", "larger"} <= made["left_out"].keys() and len(made["left_out"]) == 103


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "d/../../x"])
def test_a_name_outside_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/output.json").write_text("{}")
    shell(tmp_path / "work", "touch worked", collect=[name], status=1)
    assert not (tmp_path / "work/worked").exists()
