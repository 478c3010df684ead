"""`swarm bench` on the image cache that tests and checkouts share, and on a clean network afterwards.

With `--readme` first, what it finds goes into docs/benchmarks.md (between the marks) and docs/bench.svg.
Run inside tools/sandbox.py, as `make bench` does: nothing of it can leave the machine, and nothing of it stays.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "images"
os.environ.setdefault("SWARM_IMAGES_DIR", str(cache))
root = Path(__file__).parent.parent
arguments, readme = sys.argv[1:], sys.argv[1:2] == ["--readme"]
if readme:
    arguments = ["--markdown", "--plot", str(root / "docs" / "bench.svg"), *arguments[1:]]
bench = [sys.executable, "-m", "swarm.cli.main", "bench", *arguments]
done = subprocess.run(bench, check=False, stdout=subprocess.PIPE if readme else None)
status = done.returncode
subprocess.run([sys.executable, "-m", "swarm.cli.cleanup"], check=True, stdout=subprocess.DEVNULL)
if readme and status == 0:
    page = root / "docs" / "benchmarks.md"
    before, rest = page.read_text().split("<!-- bench: made by `make bench-readme` -->\n")
    after = rest.split("<!-- bench ends -->\n")[1]
    found = f"<!-- bench: made by `make bench-readme` -->\n{done.stdout.decode()}<!-- bench ends -->\n"
    page.write_text(f"{before}{found}{after}")
sys.exit(status)
