"""Makes src/swarm/client/sync.py from aio.py, so that each call is written once. `make docs` runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

CLIENT: Final = Path(__file__).parents[2] / "src" / "swarm" / "client"
SOURCE, MADE = CLIENT / "aio.py", CLIENT / "sync.py"
_CHANGES: Final = (
    (r'\A""".*?"""', '"""`Swarm`. Made from aio.py by `make docs`: change that file."""'),
    (r"^import asyncio\n", ""),
    (r"^import time\n", "import threading\nimport time\n"),
    (r"asyncio\.Semaphore", "threading.Semaphore"),
    (r"asyncio\.sleep", "time.sleep"),
    (r"asyncio\.to_thread\(([\w.]+), ", r"\1("),
    (r"\basync (?=def|for|with)", ""),
    (r"\bawait ", ""),
    (r"\bAsync(?=[A-Z])", ""),
    (r"__a(enter|exit)__", r"__\1__"),
    (r"\ba(?=(close|closing|read|iter_bytes)\b)", ""),
    (r"for (\w+) in (.+):\n +yield \1$", r"yield from \2"),
)


def made() -> str:
    text = SOURCE.read_text(encoding="utf-8")
    for pattern, by in _CHANGES:
        text = re.sub(pattern, by, text, flags=re.MULTILINE)
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(MADE), "-"]
    return subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    MADE.write_text(made(), encoding="utf-8")
