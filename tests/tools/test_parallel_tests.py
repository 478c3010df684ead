"""What `make test` does with the tests that failed: real pytest, in real sandboxes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.needs("root", "netns"), pytest.mark.slow]  # starts programs, or tries very many cases

NOTHING = "def test_it(): pass\n"

ALWAYS = "def test_it(): assert False\n"
ONCE = """
from pathlib import Path
def test_it():
    seen = Path(__file__).with_suffix(".seen")
    if not seen.exists():
        seen.touch()
        assert False
"""
LEAVES = "import subprocess\ndef test_it():\n    subprocess.Popen(['sleep', '60']).returncode = 0\n    assert False\n"
MANY = "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_it(n): assert False\n"


@pytest.mark.parametrize(
    ("first", "second", "status", "again", "unsteady"),
    [
        (ONCE, ONCE, 0, True, True),
        (ALWAYS, ONCE, 1, True, False),
        (LEAVES, NOTHING, 1, False, False),
        (MANY, ONCE, 1, False, False),
    ],
    ids=["two that pass alone", "one that fails again", "one leaves a process", "many"],
)
def test_a_few_that_failed_are_run_again_alone(
    first: str, second: str, status: int, again: bool, unsteady: bool, tmp_path: Path
) -> None:
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    for name, text in {"1": first, "3": second, "leaks": NOTHING}.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    shares = {name: [f"test_{name}.py"] for name in ("1", "3")}
    tool = f"import sys, pathlib, parallel_tests as tool; tool.ROOT = pathlib.Path({str(tmp_path)!r})"
    tool += f"; tool.SHARES = {shares}; tool.LEAKS = 'test_leaks.py'; sys.exit(tool.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", tool, sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path)],
        check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT / "tools",
    )  # fmt: skip
    found = (done.returncode, "again | " in done.stdout, "UNSTEADY" in done.stdout)
    assert found == (status, again, unsteady), done.stdout + done.stderr
    assert not unsteady or "\n  test_1.py::test_it\n  test_3.py::test_it\n" in done.stdout
