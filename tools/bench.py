"""`swarm bench` on the image cache that tests and checkouts share, and on a clean network afterwards.

Run inside tools/sandbox.py, as `make bench` does: nothing of it can leave the machine, and nothing of it stays.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "images"
os.environ.setdefault("SWARM_IMAGES_DIR", str(cache))
status = subprocess.run([sys.executable, "-m", "swarm.cli.main", "bench", *sys.argv[1:]], check=False).returncode
subprocess.run([sys.executable, "-m", "swarm.cli.cleanup"], check=True, stdout=subprocess.DEVNULL)
sys.exit(status)
