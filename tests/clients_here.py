"""The real clients that tests run against the gateway: from PyPI, of these versions, in the cache of all checkouts.

``python -m tests.clients_here`` fetches what is missing (a minute, once); status 1 and a line for each that can't be.
"""
# ruff: noqa: T201 - a command

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "clients"
# By name: what is installed without what it asks for, and what with it. mini-swe-agent asks for half a gigabyte of
# things that only its benchmarks use.
CLIENTS: Final[dict[str, tuple[list[str], list[str]]]] = {
    "openai": ([], ["openai==3.57.0"]),
    "codex": (["openai-codex-cli-bin==0.163.0"], []),
    # Only its copy of axe-core, the script that looks for faults of accessibility in a page.
    "axe": (["axe-playwright-python==0.1.8"], []),
    "claude-agent-sdk": ([], ["claude-agent-sdk==0.2.189"]),
    "mini-swe-agent": (
        ["mini-swe-agent==2.4.6"],
        ["litellm==1.110.2", "jinja2", "pyyaml", "pydantic", "rich", "tenacity", "typer", "platformdirs",
         "python-dotenv", "requests"],
    ),
}  # fmt: skip


def directory(name: str) -> Path:
    """Where a client is: a directory for PYTHONPATH."""
    alone, whole = CLIENTS[name]
    [version] = [one.partition("==")[2] for one in (*alone, *whole) if "==" in one][:1]
    return CACHE / f"{name}-{version}-py{sys.version_info.major}.{sys.version_info.minor}"


def lacks() -> str:
    missing = [name for name in CLIENTS if not directory(name).is_dir()]
    return f"needs {', '.join(missing)} from PyPI: run `python -m tests.clients_here`" if missing else ""


def fetch(name: str) -> None:
    """Raises CalledProcessError. Complete or not there: several checkouts may fetch at once."""
    place = directory(name)
    if place.is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=CACHE))
    try:
        for requirements, options in zip(CLIENTS[name], (["--no-deps"], []), strict=True):
            if requirements:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *options]
                argv = [*pip, "--target", str(partial), *requirements]
                subprocess.run(argv, check=True, capture_output=True, text=True)
        partial.chmod(0o755)
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    status = 0
    for name in CLIENTS:
        try:
            fetch(name)
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            print(f"can't fetch {name}: {said}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
