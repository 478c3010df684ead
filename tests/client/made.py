"""Makes src/swarm/client/sync.py and sync_sandboxes.py from aio.py and aio_sandboxes.py, so that each call is written
once. `make docs` runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

CLIENT: Final = Path(__file__).parents[2] / "src" / "swarm" / "client"
SOURCES: Final = {CLIENT / "sync.py": CLIENT / "aio.py", CLIENT / "sync_sandboxes.py": CLIENT / "aio_sandboxes.py"}
_CHANGES: Final = (
    (
        r"`AsyncSwarm`. sync.py, with `Swarm`, is made from this file by `make docs`: change this one.",
        "`Swarm`. Made from aio.py by `make docs`: change that file.",
    ),
    (
        r"for `AsyncSwarm`. sync_sandboxes.py is made from this file by `make docs`: change this one.",
        "for `Swarm`. Made from aio_sandboxes.py by `make docs`: change that file.",
    ),
    (r"(?<=swarm\.client\.)aio", "sync"),
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


def made(file: Path) -> str:
    text = SOURCES[file].read_text(encoding="utf-8")
    for pattern, by in _CHANGES:
        text = re.sub(pattern, by, text, flags=re.MULTILINE)
    if "threading." not in text:
        text = text.replace("import threading\n", "")
    for how in (["check", "--select=I", "--fix", "--quiet"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *how, "--stdin-filename", str(file), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    for file in SOURCES:
        file.write_text(made(file), encoding="utf-8")
