"""`swarm bench` with the image cache that all checkouts share; the network is cleaned up afterwards.

With `--write-docs` as the first argument, the figures are written into docs/benchmarks.md (between its markers) and
docs/bench.svg. Run it inside tools/sandbox.py, as `make bench` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- bench: made by `make bench-readme` -->\n", "<!-- bench ends -->\n"


def main(argv: list[str]) -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "images"
    os.environ.setdefault("SWARM_IMAGES_DIR", str(cache))
    write_docs = argv[:1] == ["--write-docs"]
    if write_docs:
        page = DOCS / "benchmarks.md"
        with_figures(page.read_text(), "")  # fails now, not after minutes of measuring
        argv = ["--markdown", "--plot", str(DOCS / "bench.svg"), *argv[1:]]
    bench = [sys.executable, "-m", "swarm.cli.main", "bench", *argv]
    done = subprocess.run(bench, check=False, stdout=subprocess.PIPE if write_docs else None, text=True)
    subprocess.run([sys.executable, "-m", "swarm.cli.cleanup"], check=True, stdout=subprocess.DEVNULL)
    if write_docs and done.returncode == 0:
        page.write_text(with_figures(page.read_text(), done.stdout))
    return done.returncode


def with_figures(page: str, figures: str) -> str:
    """The page with ``figures`` between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit("docs/benchmarks.md lacks the lines `<!-- bench: … -->` and `<!-- bench ends -->`")
    return f"{before}{BEGIN}{figures}{END}{after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
