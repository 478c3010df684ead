"""What an agent adds to an imported image: Debian packages, wheels and npm packages, as a Dockerfile made of its lists.

apt and pip run in the build's containers (`build.py`), so they are the image's own, and what they choose fits it; npm
runs on this host, fetches, and runs nothing of it. The result is an image of the agent's own.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shlex
import shutil
import ssl
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from swarm.base import process
from swarm.base.progress import Progress, silent
from swarm.errors import ImageError, NotFound, UsageError
from swarm.vm.image import apt, npm, pip
from swarm.vm.image.oci import build, fetch, others
from swarm.vm.image.oci.build import Recipe
from swarm.vm.image.oci.info import ImportedInfo
from swarm.vm.image.oci.store import Imported

_USER: Final = re.compile(r"[\w.-]{0,100}(:[\w.-]{1,100})?")
_PATH: Final = re.compile(r"[\w./+-]+")
_STEPS: Final = "/run/swarm"
_KEPT: Final = ("usr", "opt", "bin", "sbin", "lib", "lib64", "etc", npm.MODULES)  # directories that steps write to
# Of pip's settings, those that say where packages come from, and can mean the same in a container.
_PIP_SETTINGS: Final = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "timeout",
                        "default-timeout", "retries")  # fmt: skip
_PACKAGES: Final = """\
if ! command -v apt-get > /dev/null; then
    echo "the image has no apt-get, and \\`packages\\` are Debian's: take an image of Debian or Ubuntu, or a Dockerfile"
    exit 1
fi
export APT_CONFIG=/run/secrets/apt DEBIAN_FRONTEND=noninteractive
apt-get -q update && apt-get -q install -y --no-install-recommends "$@"
status=$?
apt-get -q clean
rm -rf /var/lib/apt/lists/*
exit $status
"""
# The image's own pip fits its Python; ours may be too new for it. Settings are a line for the name and one for the
# value, so that the value alone is masked in what a step prints.
_REQUIREMENTS: Final = f"""\
while read -r name && read -r value; do
    export "$name=$value"
done < /run/secrets/pip
python=$1
shift
pip={_STEPS}/pip
"$python" -m pip --version > /dev/null 2>&1 && pip="-m pip"
exec "$python" $pip install --no-cache-dir {" ".join(pip.OPTIONS)} -- "$@"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Additions:
    """``base``: the name of an image that was imported here."""

    base: str
    requirements: Sequence[str]
    packages: Sequence[str]
    npm: Sequence[str]


async def here(images: Imported, wanted: Additions, *, name: str) -> bool:
    """Is that image here, made of what its base is now, or on a host that shares it? Then it is fetched. Raises
    NotFound if neither it nor its base is; ImageError."""
    try:
        base = images.info(wanted.base)
    except NotFound as error:
        try:
            await images.layer(name)
        except NotFound:
            raise error from None
        return True
    known = images.names().get(name)
    if known is None or known.source not in (_source(base), others.SOURCE):
        return False
    try:
        await images.layer(name)
    except (NotFound, ImageError):  # it was damaged, or is gone
        return False
    return True


async def add(
    images: Imported, wanted: Additions, *, name: str, fresh: bool = False, progress: Progress = silent
) -> None:
    """Build it under that name; with ``fresh``, without the cache. Raises UsageError, NotFound, ImageError,
    HostError."""
    base = images.info(wanted.base)
    user = await asyncio.to_thread(_check, wanted, base, images)

    async def recipe(place: Path) -> Recipe:
        (context := place / "context").mkdir(parents=True)
        await asyncio.to_thread(_steps, wanted, context / "steps")
        if wanted.npm:
            progress("fetching npm packages", 0.0)
            await npm.fetch(wanted.npm, context, most=images.limits.bytes)
            npm.link_programs(wanted.npm, context / npm.MODULES, context / "bin")
        (place / "Dockerfile").write_text("".join(f"{line}\n" for line in _dockerfile(wanted, base, user)))
        secrets = [(one, place / one) for one in await _secrets(wanted, place)]
        return Recipe(dockerfile=place / "Dockerfile", context=context, secrets=secrets, base=base.key, fresh=fresh)

    await images.build(recipe, name=name, source=_source(base), progress=progress)


def _source(base: ImportedInfo) -> str:
    return f"{build.SOURCE}{base.digest}"


def _check(wanted: Additions, base: ImportedInfo, images: Imported) -> str:
    """The image's User. What its config says is hostile text, and becomes part of a Dockerfile."""
    pip.check(wanted.requirements)
    if wanted.npm:
        npm.check(wanted.npm)
    apt.check(wanted.packages)
    if wanted.requirements and not base.root.python:
        raise UsageError(
            f"the image {wanted.base!r} has no Python 3.8 or newer in its PATH, which requirements are for: a "
            "Dockerfile can install one"
        )
    given = _config(images.blobs, base)
    user, why = str(given.get("User") or ""), ""
    if given.get("OnBuild"):
        why = "it has instructions for builds of its own (ONBUILD)"
    elif not _USER.fullmatch(user):
        why = f"its User is {user[:80]!r}"
    elif wanted.requirements and not _PATH.fullmatch(base.root.python):
        why = f"its Python is {base.root.python[:80]!r}"
    elif lost := [one for one in map(str, given.get("Volumes") or ()) if _first(one) in ("", *_KEPT)]:
        why = f"what is written to its volume {lost[0][:80]!r} is not kept"
    if why:
        raise ImageError(f"nothing can be added to the image {wanted.base!r}: {why}")
    return user


def _first(path: str) -> str:
    return path.strip("/").partition("/")[0]


def _config(blobs: Path, base: ImportedInfo) -> dict[str, Any]:
    """What an image says of its programs, as it was fetched. Raises ImageError."""
    why = "its layers are not here, since it came from another host"
    if base.blobs and fetch.has(blobs, base.blobs):
        try:
            return dict(json.loads(fetch.read_blob(blobs, base.config_digest)).get("config") or {})
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = f"its config can't be read: {error}"
    raise ImageError(f"nothing can be added to the image {base.digest}: {why}: import it again")


def _steps(wanted: Additions, place: Path) -> None:
    place.mkdir()
    (place / "packages").write_text(_PACKAGES)
    (place / "requirements").write_text(_REQUIREMENTS)
    if wanted.requirements:
        try:
            shutil.copytree(pip.location(), place / "pip", ignore=shutil.ignore_patterns("__pycache__"))
        except shutil.Error as error:  # a list of all of them
            raise OSError(errno.ENOSPC, "no space left", str(place)) from error


def _dockerfile(wanted: Additions, base: ImportedInfo, user: str) -> Iterator[str]:
    yield 'FROM scratch\nSHELL ["/bin/sh", "-c"]\nUSER 0:0'  # buildah is told what to take instead
    run = f"RUN --mount=type=bind,source=steps,target={_STEPS}"
    if wanted.packages:
        yield f"{run} --mount=type=secret,id=apt sh {_STEPS}/packages {shlex.join(wanted.packages)}"
    if wanted.requirements:
        secrets = "--mount=type=secret,id=pip --mount=type=secret,id=ca"
        yield f"{run} {secrets} sh {_STEPS}/requirements {base.root.python} {shlex.join(wanted.requirements)}"
    if wanted.npm:
        yield f"COPY {npm.MODULES} /{npm.MODULES}\nCOPY bin /usr/local/bin"
    yield f"USER {user or '0:0'}"


async def _secrets(wanted: Additions, place: Path) -> list[str]:
    """How this host's apt and pip reach their registries: secrets, since an address may have a password. Only the step
    that needs one finds it."""
    told: dict[str, bytes] = {}
    if wanted.packages:
        told["apt"] = "".join(f"{line}\n" for line in await apt.host_options()).encode()
    if wanted.requirements:
        settings, authorities = await _of_pip()
        told["ca"] = await asyncio.to_thread(authorities.read_bytes) if authorities else b""
        told["pip"] = "".join(f"{name}\n{value}\n" for name, value in settings.items()).encode()
    for name, text in told.items():
        (place / name).touch(mode=0o600)
        (place / name).write_bytes(text)
    return list(told)


async def _of_pip() -> tuple[dict[str, str], Path | None]:
    """pip's settings, as variables; and the file with the certificates that it trusts."""
    done = await process.run(
        [sys.executable, str(pip.location()), "config", "list"], env=pip.environment(), timeout_seconds=60, check=False
    )
    found = {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_NO_INPUT": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    names = [os.environ.get(one) for one in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")]
    names += [ssl.get_default_verify_paths().cafile, "/etc/ssl/certs/ca-certificates.crt"]
    for line in done.stdout.decode(errors="replace").splitlines():
        key, _, quoted = line.partition("=")
        name = key.rpartition(".")[2]
        if name == "cert":
            names.insert(0, quoted[1:-1])
        if name in _PIP_SETTINGS and len(quoted) > 1:
            words = [one for one in re.split(r"\s+|\\n", quoted[1:-1]) if one]
            if name in ("index-url", "extra-index-url", "find-links"):  # files of this host are not in sight
                words = [one for one in words if re.match("https?://", one)]
            if words:
                found[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(words)
    authorities = next((Path(one) for one in names if one and Path(one).is_file()), None)
    return found | ({"PIP_CERT": "/run/secrets/ca"} if authorities else {}), authorities
