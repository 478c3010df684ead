"""npm packages by the host's npm, as it is configured here: its registry, proxies and certificates.

What is fetched is not run: neither the scripts of packages nor git. So what needs a script when it is installed (most
programs in C++ come built) is to be had by a Dockerfile.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from swarm.base import files, process
from swarm.errors import HostError, ImageError, UsageError
from swarm.fields import NPM_PACKAGE
from swarm.vm.image.apt import FULL_DISK
from swarm.vm.image.pip import NOT_BUILT, TIMEOUT_SECONDS

# Where programs in /agent and in /work find modules, whether they `require` or `import` them.
MODULES: Final = "node_modules"
_OPTIONS: Final = (
    "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--no-progress", "--save-exact",
    "--package-lock", "--omit=dev", "--no-global", "--git=false", "--loglevel=error",
)  # fmt: skip
_NO_NETWORK: Final = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH")
_ERROR: Final = re.compile(r"^npm (?:ERR!|error) (?!code |A complete log|errno )(?:404|notarget)? *(.+)$", re.MULTILINE)
_MAX_LOCK: Final = 64 << 20


def check(packages: Sequence[str]) -> None:
    """Raises UsageError for what npm might take for an option, a path or an address; HostError without npm."""
    for one in packages:
        if not re.fullmatch(NPM_PACKAGE, one):
            raise UsageError(f"the npm package {one[:100]!r} is not pinned as name@version")
    if process.which("npm") is None:
        raise HostError("npm packages are fetched by npm, which this host lacks: apt-get install npm")


async def fetch(packages: Sequence[str], into: Path, *, most: int) -> Mapping[str, str]:
    """Make ``into``/node_modules, with all dependencies, of at most ``most`` bytes a file. Returns name -> version of
    everything in it. Raises UsageError, ImageError, HostError."""
    check(packages)
    files.make_directory(into)
    done = await process.run(
        ["setpriv", "--pdeathsig", "KILL", "--", "prlimit", f"--fsize={most}", "--",
         "npm", "install", *_OPTIONS, f"--prefix={into}", "--", *packages],
        cwd=into, env=_environment(), timeout_seconds=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise _explained((done.stdout[-8192:] + done.stderr[-8192:]).decode(errors="replace"), into)
    return installed(into / MODULES)


def installed(modules: Path) -> dict[str, str]:
    """What npm's own list says: path below node_modules -> version. Raises ImageError."""
    place = modules / ".package-lock.json"
    try:
        if place.stat().st_size > _MAX_LOCK:
            raise ValueError("it is too large")
        listed = json.loads(place.read_bytes())["packages"]
        return {str(path).removeprefix(f"{MODULES}/"): str(one.get("version")) for path, one in sorted(listed.items())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(f"npm left no list of what it installed: {error!r}") from error


def link_programs(packages: Sequence[str], modules: Path, into: Path) -> None:
    """Links in ``into``, which is usr/local/bin of a root, to the programs of these packages, not of others."""
    files.make_directory(into)
    names = {one.rpartition("@")[0] for one in packages}
    for link in sorted((modules / ".bin").glob("*")):
        target = link.readlink().parts  # ../cowsay/cli.js, ../@scope/name/cli.js
        place, owner = into / link.name, {"/".join(target[1:2]), "/".join(target[1:3])}
        if owner & names and not place.is_symlink() and not place.exists():
            place.symlink_to(Path("../../..", MODULES, ".bin", link.name))


def _environment() -> dict[str, str]:
    """The variables that tell npm where packages come from."""
    own = {name: value for name, value in os.environ.items() if name.lower().startswith("npm_config_")}
    also = {name: os.environ[name] for name in ("NODE_EXTRA_CA_CERTS", "XDG_CONFIG_HOME") if name in os.environ}
    return own | also


def _explained(said: str, where: Path) -> Exception:
    if FULL_DISK.search(said) or "ENOSPC" in said:
        return ImageError(files.no_space(where, NOT_BUILT))
    if found := _NO_NETWORK.search(said):
        return ImageError(
            f"can't reach the registry that npm is configured for ({found[0]}): check the network and the proxy, then "
            "build again"
        )
    lines = [line.strip() for line in _ERROR.findall(said) if line.strip() != "404"]
    return UsageError(
        f"the npm packages can't be installed: {' '.join(lines[:2] or said.strip().splitlines()[-3:])[:800]}"
    )
