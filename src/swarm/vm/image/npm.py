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
from typing import Any, Final

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
    # So what the lock says of where a package comes from is said only of those that are from elsewhere.
    "--omit-lockfile-registry-resolved",
    # As far as this npm knows them; what came from elsewhere is found in any case.
    "--allow-git=none", "--allow-file=none", "--allow-directory=none", "--allow-remote=none",
)  # fmt: skip
_VARIABLES: Final = ("NODE_EXTRA_CA_CERTS", "XDG_CONFIG_HOME", "NPM_TOKEN", "NODE_AUTH_TOKEN")
_NO_NETWORK: Final = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH")
_ERROR: Final = re.compile(r"^npm (?:ERR!|error) (?!code |A complete log|errno )(?:404|notarget)? *(.+)$", re.MULTILINE)
_INSTALLED: Final = ".package-lock.json"  # npm's own list
_MAX_LOCK: Final = 64 << 20


def check(packages: Sequence[str]) -> None:
    """Raises UsageError for what npm might take for an option, a path or an address; HostError without npm."""
    versions = dict[str, str]()
    for one in packages:
        name, _, version = one.rpartition("@")
        if not re.fullmatch(NPM_PACKAGE, one):
            raise UsageError(f"the npm package {one[:100]!r} is not pinned as name@1.2.3")
        if versions.setdefault(name, version) != version:
            raise UsageError(f"the npm package {name} is wanted as {versions[name]} and as {version}")
    if process.which("npm") is None:
        raise HostError("npm packages are fetched by npm, which this host lacks: apt-get install npm")


async def fetch(packages: Sequence[str], into: Path, *, most: int) -> Mapping[str, str]:
    """Make ``into``/node_modules, with all dependencies, of at most ``most`` bytes a file. Returns name -> version of
    everything in it. Raises UsageError, ImageError, HostError."""
    check(packages)
    files.make_directory(into)
    await _npm(["install", "--package-lock-only"], packages, into, most)
    _check_sources(_listed(into / "package-lock.json"))
    await _npm(["ci"], (), into, most)
    found = _listed(into / MODULES / _INSTALLED)
    return {path.removeprefix(f"{MODULES}/"): str(one.get("version")) for path, one in sorted(found.items())}


async def _npm(command: Sequence[str], packages: Sequence[str], into: Path, most: int) -> None:
    done = await process.run(
        ["setpriv", "--pdeathsig", "KILL", "--", "prlimit", f"--fsize={most}", "--",
         "npm", *command, *_OPTIONS, f"--prefix={into}", "--", *packages],
        cwd=into, env=_environment(), timeout_seconds=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise _explained((done.stdout[-8192:] + done.stderr[-8192:]).decode(errors="replace"), into)


def _listed(lock: Path) -> dict[str, dict[str, Any]]:
    """What npm chose: path -> what the lock says. Raises ImageError."""
    try:
        if lock.stat().st_size > _MAX_LOCK:
            raise ValueError("it is too large")
        told = json.loads(lock.read_bytes())["packages"]
        return {str(path): dict(one) for path, one in told.items() if path}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(f"npm left no list of what it chose: {error!r}") from error


def _check_sources(listed: Mapping[str, Mapping[str, Any]]) -> None:
    """A package may name a directory of this host as its dependency, or an address that only this host reaches.
    Raises UsageError."""
    for path, one in listed.items():
        if one.get("link") or one.get("resolved") or not path.startswith(f"{MODULES}/") or ".." in path.split("/"):
            source = str(one.get("resolved") or path)[:200]
            raise UsageError(f"the npm packages want {path[:200]!r} from {source!r}, which is not the registry")


def link_programs(packages: Sequence[str], modules: Path, into: Path) -> None:
    """Links in ``into`` to the programs of these packages, not of others."""
    files.make_directory(into)
    listed = _listed(modules / _INSTALLED)
    for name in sorted({one.rpartition("@")[0] for one in packages}):
        package = modules / name
        for program, file in dict(listed.get(f"{MODULES}/{name}", {}).get("bin") or {}).items():
            target, place = (package / str(file)).resolve(), into / str(program)
            if not re.fullmatch(r"\w[\w.+-]*", str(program)) or not target.is_relative_to(package.resolve()):
                continue
            if target.is_file() and not place.is_symlink() and not place.exists():
                target.chmod(0o755)
                place.symlink_to(Path("/", MODULES, name, target.relative_to(package.resolve())))


def _environment() -> dict[str, str]:
    """The variables that tell npm where packages come from."""
    own = {name: value for name, value in os.environ.items() if name.lower().startswith("npm_config_")}
    return own | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


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
