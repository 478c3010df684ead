"""Python packages by pip, as it is configured on this host: its indexes, proxies and certificates.

Only wheels: a source package would run its author's code on this host, at build time.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from swarm.base import files, process
from swarm.errors import HostError, ImageError, UsageError
from swarm.fields import REQUIREMENT
from swarm.vm.image.apt import FULL_DISK

TIMEOUT_SECONDS: Final = 1200.0
NOT_BUILT: Final = "the layer was not built"
OPTIONS: Final = ("--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off")
# Variables that tell pip what to install, and where to. That is our decision; the host's is where from.
_NOT_PASSED: Final = frozenset(
    f"PIP_{name}"
    for name in (
        "ABI", "DEST", "EDITABLE", "IGNORE_REQUIRES_PYTHON", "IMPLEMENTATION", "NO_BINARY", "NO_DEPS", "PLATFORM",
        "PRE", "PREFIX", "PYTHON", "PYTHON_VERSION", "REQUIREMENT", "REQUIRE_VIRTUALENV", "ROOT", "TARGET", "USER",
        "VERBOSE",
    )
)  # fmt: skip
_NO_NETWORK: Final = re.compile(
    r"Temporary failure in name resolution|Name or service not known|Failed to establish a new connection"
    r"|Network is unreachable|Connection refused|Connection timed out|Connection reset|Read timed out|No route to host"
    r"|Cannot connect to proxy|connection broken|problem confirming the ssl certificate"
)
_NOT_FOUND: Final = re.compile(r"requirement (\S+?) \((?:from .*?)?from versions: (.*)\)|distribution found for (\S+)")


def location() -> Path:
    """The directory of pip's own code, which any Python can run. Raises HostError."""
    found = importlib.util.find_spec("pip")
    if found is None or not found.origin:
        raise HostError("pip, which fetches requirements, is not installed beside Swarm: reinstall Swarm")
    return Path(found.origin).parent


def environment() -> dict[str, str]:
    """The variables of our environment that tell pip where packages come from."""
    names = [name for name in os.environ if name.startswith("PIP_") and name.upper() not in _NOT_PASSED]
    also = [name for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "REQUESTS_CA_BUNDLE") if name in os.environ]
    return {name: os.environ[name] for name in (*names, *also)}


def check(requirements: Sequence[str]) -> None:
    """Raises UsageError for what pip might take for an option, a path or an address: anyone can write a row."""
    for one in requirements:
        if not re.fullmatch(REQUIREMENT, one):
            raise UsageError(f"the requirement {one!r} is not pinned as `name==version`")


async def run(argv: Sequence[str], *, where: Path, python: str) -> None:
    """Run pip; ``argv`` begins with its interpreter. Raises UsageError, ImageError, HostError, worded for the user:
    ``python`` is what they call the target of the wheels, ``where`` the place that may be full.
    """
    done = await process.run(
        ["setpriv", "--pdeathsig", "KILL", "--", *argv],
        env=environment() | {"LC_ALL": "C.UTF-8", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout_seconds=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        # The reason why an index could not be reached is in stdout; stderr only says that nothing was found.
        raise _explained((done.stdout[-8192:] + done.stderr[-8192:]).decode(errors="replace"), where, python)


def _explained(said: str, where: Path, python: str) -> Exception:
    if FULL_DISK.search(said):
        return ImageError(files.no_space(where, NOT_BUILT))
    if found := _NO_NETWORK.search(said):
        return ImageError(
            f"can't reach the package index that pip is configured for ({found[0]}): check the network and the proxy, "
            "then build the layer again"
        )
    if found := _NOT_FOUND.search(said):
        name, versions = found[1] or found[3], (found[2] or "none").strip()
        there = f"there are {versions[-300:]}" if versions != "none" else "none exists for any version"
        return UsageError(
            f"no wheel fits the requirement {name} for {python}: {there}. Check its name and version; a package "
            "without wheels (source only) can't be used"
        )
    lines = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return UsageError(f"the requirements can't be installed: {' '.join(lines or said.strip().splitlines()[-3:])}")
