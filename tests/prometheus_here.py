"""Debian's Prometheus and promtool: from PATH, or unpacked into the cache of all checkouts. Not installed: the package
would start a service.

``python -m tests.prometheus_here`` fetches it (30 MB, once); status 1 with a line if that fails.
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

from swarm.base.process import which

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "prometheus"
PROGRAMS: Final = ("prometheus", "promtool")


def program(name: str) -> str | None:
    unpacked = CACHE / "usr" / "bin" / name
    return which(name) or (str(unpacked) if unpacked.exists() else None)


def lacks() -> str:
    missing = [name for name in PROGRAMS if program(name) is None]
    return f"needs {', '.join(missing)} of Debian: run `python -m tests.prometheus_here`" if missing else ""


def fetch(*packages: str, into: Path) -> None:
    """Unpack these of Debian. Raises CalledProcessError, OSError."""
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{into.name}-", dir=into.parent) as partial:
        Path(partial).chmod(0o755)  # apt drops its rights
        options = {"check": True, "capture_output": True, "text": True}
        subprocess.run(["apt-get", "download", *packages], cwd=partial, **options)  # type: ignore[call-overload]
        unpacked = Path(partial) / "unpacked"
        for package in Path(partial).glob("*.deb"):
            argv = ["dpkg-deb", "--extract", str(package), str(unpacked)]
            subprocess.run(argv, **options)  # type: ignore[call-overload]
        if not into.exists():
            shutil.move(unpacked, into)


def main() -> int:
    if not lacks():
        return 0
    try:
        fetch("prometheus", into=CACHE)
    except (subprocess.CalledProcessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        print(f"can't fetch prometheus: {' '.join(said)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
