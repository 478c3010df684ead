"""What an agent adds to an imported image: Debian packages, wheels and npm packages, as a Dockerfile made of its lists.

apt and pip run in the build's containers (`build.py`), so they are the image's own, and what they choose fits it; npm
runs on this host, fetches, and runs nothing of it. The result is an image of the agent's own.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import ssl
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base import process
from swarm.base.progress import Progress
from swarm.errors import ImageError, NotFound, UsageError
from swarm.fields import DEBIAN_PACKAGE
from swarm.vm.image import apt, npm, pip
from swarm.vm.image.oci import build, others
from swarm.vm.image.oci.build import Recipe
from swarm.vm.image.oci.info import ImportedInfo
from swarm.vm.image.oci.store import Imported

_USER: Final = re.compile(r"[\w.-]{0,100}(:[\w.-]{1,100})?")
_STEPS: Final = "/run/swarm"
_MAX_CA: Final = 1 << 20
# Of pip's settings, those that say where packages come from, and can mean the same in a container.
_PIP_SETTINGS: Final = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "timeout",
                        "default-timeout", "retries")  # fmt: skip
_PACKAGES: Final = """\
if ! command -v apt-get > /dev/null; then
    echo "the image has no apt-get, and \\`packages\\` are Debian's: take an image of Debian or Ubuntu, or a Dockerfile"
    exit 1
fi
. /run/secrets/settings
umask 077
echo "$APT" > /tmp/swarm-apt.conf
umask 022
export APT_CONFIG=/tmp/swarm-apt.conf DEBIAN_FRONTEND=noninteractive
apt-get -q update && apt-get -q install -y --no-install-recommends "$@"
status=$?
rm -rf /tmp/swarm-apt.conf /var/lib/apt/lists/*
exit $status
"""
# The image's own pip fits its Python; ours may be too new for it.
_REQUIREMENTS: Final = f"""\
. /run/secrets/settings
python=$1
shift
pip={_STEPS}/pip
"$python" -m pip --version > /dev/null 2>&1 && pip="-m pip"
exec "$python" $pip install --root-user-action=ignore --no-cache-dir {" ".join(pip.OPTIONS)} -- "$@"
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
    await images.layer(name)
    return True


async def add(images: Imported, wanted: Additions, *, name: str, progress: Progress) -> None:
    """Build it under that name. Raises UsageError, NotFound, ImageError, HostError."""
    base = images.info(wanted.base)
    _check(wanted, base)
    with tempfile.TemporaryDirectory(prefix="swarm-build-") as scratch:
        place = Path(scratch)
        (steps := (context := place / "context") / "steps").mkdir(parents=True)
        (steps / "packages").write_text(_PACKAGES)
        (steps / "requirements").write_text(_REQUIREMENTS)
        await asyncio.to_thread(shutil.copytree, pip.location(), steps / "pip")
        if wanted.npm:
            progress("fetching npm packages", 0.0)
            await npm.fetch(wanted.npm, context, most=images.limits.bytes)
            npm.link_programs(wanted.npm, context / npm.MODULES, context / "bin")
        user = await asyncio.to_thread(_user, images, base)
        (place / "Dockerfile").write_text("".join(f"{line}\n" for line in _dockerfile(wanted, base, user)))
        recipe = Recipe(dockerfile=place / "Dockerfile", context=context, secrets=await _secrets(place), base=base.key)
        await images.build(recipe, name=name, source=_source(base), progress=progress)


def _source(base: ImportedInfo) -> str:
    return f"{build.SOURCE}{base.digest}"


def _check(wanted: Additions, base: ImportedInfo) -> None:
    pip.check(wanted.requirements)
    if wanted.npm:
        npm.check(wanted.npm)
    for one in wanted.packages:
        if not re.fullmatch(DEBIAN_PACKAGE, one):
            raise UsageError(f"the package {one!r} is not a Debian package name, or `name=version`")
    if wanted.requirements and not base.root.python:
        raise UsageError(
            f"the image {wanted.base!r} has no Python 3.8 or newer in its PATH, which requirements are for"
        )


def _dockerfile(wanted: Additions, base: ImportedInfo, user: str) -> Iterator[str]:
    yield 'FROM scratch\nSHELL ["/bin/sh", "-c"]\nUSER 0:0'  # buildah is told what to take instead
    secrets = "--mount=type=secret,id=settings --mount=type=secret,id=ca"
    run = f"RUN --mount=type=bind,source=steps,target={_STEPS} {secrets} sh"
    if wanted.packages:
        yield f"{run} {_STEPS}/packages {shlex.join(wanted.packages)}"
    if wanted.requirements:
        yield f"{run} {_STEPS}/requirements {shlex.quote(base.root.python)} {shlex.join(wanted.requirements)}"
    if wanted.npm:
        yield f"COPY {npm.MODULES} /{npm.MODULES}\nCOPY bin /usr/local/bin"
    yield f"USER {user or '0:0'}"


def _user(images: Imported, base: ImportedInfo) -> str:
    """As the image's config says it: hostile text."""
    config = images.blob(base.config_digest)
    user = str((config.get("config") or {}).get("User") or "")
    if not _USER.fullmatch(user):
        raise ImageError(f"nothing can be added to the image {base.digest}: its User is {user[:80]!r}")
    return user


async def _secrets(place: Path) -> list[tuple[str, Path]]:
    """How this host's apt and pip reach their registries: secrets, since an address may have a password."""
    apt_conf = "".join(f"{line}\n" for line in await apt.host_options())
    settings = {"APT": apt_conf, **await _of_pip()}
    (place / "settings").write_text(
        "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    )
    (place / "ca").write_bytes(await asyncio.to_thread(_authorities))
    return [(name, place / name) for name in ("settings", "ca")]


async def _of_pip() -> dict[str, str]:
    done = await process.run(
        [sys.executable, str(pip.location()), "config", "list"], env=pip.environment(), timeout_seconds=60, check=False
    )
    found = {"PIP_CERT": "/run/secrets/ca", "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_NO_INPUT": "1"}
    for line in done.stdout.decode(errors="replace").splitlines():
        key, _, quoted = line.partition("=")
        name = key.rpartition(".")[2]
        if name in _PIP_SETTINGS and len(quoted) > 1:
            words = [one for one in re.split(r"\s+|\\n", quoted[1:-1]) if one]
            if name in ("index-url", "extra-index-url", "find-links"):  # files of this host are not in sight
                words = [one for one in words if re.match("https?://", one)]
            if words:
                found[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(words)
    return found


def _authorities() -> bytes:
    """The certificates that this host trusts."""
    names = [os.environ.get(one) for one in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")]
    for name in (*names, ssl.get_default_verify_paths().cafile, "/etc/ssl/certs/ca-certificates.crt"):
        if name and (file := Path(name)).is_file() and file.stat().st_size <= _MAX_CA:
            return file.read_bytes()
    return b""
