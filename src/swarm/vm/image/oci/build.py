"""Building an image from a Dockerfile with buildah, into an OCI layout, which is then imported as any other.

buildah and crun run in the jail (`jail.py`): of the host's files they see the context, the Dockerfile, the secrets and
what they need, all read-only. buildah fetches base images over the host's network; programs of RUN have another one,
from which slirp4netns leads out, but not to the host's loopback. What buildah keeps is the cache: each step is found in
it again by what goes into it, so the same inputs give the same image, and build nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base import files, process
from swarm.base.progress import Progress
from swarm.errors import HostError, ImageError, UsageError
from swarm.vm.image import staging
from swarm.vm.image.oci import fetch, unpack
from swarm.vm.image.oci.fetch import DIGEST, TAG, Access
from swarm.vm.image.oci.jail import NETWORK, Spec
from swarm.vm.image.oci.reference import Reference
from swarm.vm.image.oci.unpack import Limits

SOURCE: Final = "dockerfile:"  # where a built image came from, as `Name.source` has it
INSTALL: Final = "apt-get install --no-install-recommends buildah crun slirp4netns"
_PROGRAMS: Final = ("buildah", "crun", "slirp4netns")
_UNFINISHED: Final = "unfinished"
_IMPORTED: Final = "imported"
_MAX_DOCKERFILE: Final = 1 << 20
_MAX_SECRET: Final = 1 << 20
_MAX_WORDS: Final = 256
_CACHES: Final = 2  # times what one image may take
_LAST_LINES: Final = 8
_LEAST_MASKED: Final = 4  # characters: a shorter line of a secret is in too many words
_RESOLVER: Final = "10.0.2.3"  # slirp4netns(1)
_STEP: Final = re.compile(r"^(?:\[\d+/\d+\] )?STEP (\d+)/(\d+): (.*)$", re.MULTILINE)
_NOISE: Final = re.compile(r"time=\"|Error: |error running container|: exit status|-->|COMMIT|Getting image|Copying ")
# Not the host's containers.conf: what RUN may do doesn't depend on it. Nor its names and address.
_CONF: Final = """[containers]
base_hosts_file = "none"
host_containers_internal_ip = "none"
default_capabilities = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID",
  "SETPCAP", "SETUID", "SYS_CHROOT"]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """``args``: NAME=VALUE. ``secrets``: what `RUN --mount=type=secret,id=ID` finds, by id. ``network``: for RUN.
    ``base``: the key of an image that was imported, which its first FROM means. ``fresh``: all steps are run."""

    dockerfile: Path
    context: Path
    args: Sequence[str] = ()
    target: str = ""
    secrets: Sequence[tuple[str, Path]] = ()
    network: bool = True
    base: str = ""
    fresh: bool = False


def secret(text: str) -> tuple[str, Path]:
    """`id=ID,src=FILE`. Raises UsageError, which doesn't have the text: it might be the secret."""
    told = dict(one.partition("=")[::2] for one in text.split(","))
    if set(told) - {"type"} != {"id", "src"} or not re.fullmatch(r"[\w.-]{1,100}", told["id"]):
        raise UsageError("a secret is given as id=ID,src=FILE")
    return told["id"], Path(told["src"])


def check_host() -> None:
    """Raises HostError."""
    if missing := [program for program in _PROGRAMS if process.which(program) is None]:
        raise HostError(f"building an image needs {' and '.join(missing)}, which this host lacks: {INSTALL}")


def check(recipe: Recipe, limits: Limits) -> None:
    """Raises UsageError."""
    for what, place, most in (
        ("Dockerfile", recipe.dockerfile, _MAX_DOCKERFILE),
        *((f"secret {name!r}", place, _MAX_SECRET) for name, place in recipe.secrets),
    ):
        if not place.is_file():
            raise UsageError(f"the {what} is to be {place}, which is no file")
        if place.stat().st_size > most:
            raise UsageError(f"the {what} is larger than {most >> 10} KiB: {place}")
    if not recipe.context.is_dir():
        raise UsageError(f"the context {recipe.context} is no directory")
    for one in recipe.args:
        if not re.match(r"[A-Za-z_]\w*=", one):
            raise UsageError(f"the build argument {one.partition('=')[0][:80]!r} is not given as NAME=VALUE")
    if max(len(recipe.args), len(recipe.secrets)) > _MAX_WORDS:
        raise UsageError(f"more than {_MAX_WORDS} build arguments, or secrets")
    size, count = unpack.measure(recipe.context)
    if size > limits.bytes or count > limits.files:
        raise UsageError(
            f"the context {recipe.context} has {count} files and {size / 1e9:.3g} GB, and at most {limits.files} and "
            f"{limits.bytes / 1e9:.3g} GB are allowed: --context names another directory"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Buildah:
    """One use of it, which builds ``name``. ``cache``: what it keeps. ``stage``: a directory that is removed after."""

    name: str
    cache: Path
    stage: Path
    limits: Limits

    async def build(self, recipe: Recipe, access: Access, progress: Progress, *, base: Path | None = None) -> str:
        """buildah's id of the image. ``base``: a layout of what the first FROM means. Raises ImageError,
        HostError, and OSError when the disk is full."""
        shown = [(recipe.dockerfile, "/Dockerfile"), (recipe.context, "/context")]
        argv = [
            "bud", "--isolation=oci", f"--runtime={process.path_of('crun')}", "--runtime-flag=cgroup-manager=disabled",
            f"--network=ns:{NETWORK}", f"--dns={_RESOLVER if recipe.network else 'none'}", "--layers",
            "--format=docker",  # OCI's has no SHELL, ONBUILD, HEALTHCHECK
            "--iidfile=/stage/id", "--file=/Dockerfile", *(f"--build-arg={one}" for one in recipe.args),
            *([f"--target={recipe.target}"] if recipe.target else []),
        ]  # fmt: skip
        if recipe.fresh:
            argv.append("--no-cache")
        if base is not None:
            argv.append(f"--from=oci:/base:{TAG}")
            shown.append((base, "/base"))
        for number, (name, place) in enumerate(recipe.secrets):
            argv.append(f"--secret=id={name},src=/secrets/{number}")
            shown.append((place, f"/secrets/{number}"))
        if access.cert_dir:
            shown.append((Path(access.cert_dir), "/certs"))
        if auth_file := access.auth_file or _auth_file(self.stage):
            shown.append((Path(auth_file), "/auth.json"))
        argv += Access(
            plain_http=access.plain_http, cert_dir="/certs" if access.cert_dir else "",
            auth_file="/auth.json" if auth_file else "",
        ).options()  # fmt: skip

        def told(said: str) -> None:
            if steps := _STEP.findall(said):
                number, of, text = steps[-1]
                progress(
                    f"step {number} of {of}: {_plain(_without_mounts(text))[:60]}", 0.6 * int(number) / (int(of) + 1)
                )

        code, said = await self._run([*argv, "/context"], told, shown=shown, leads_out=recipe.network)
        if code:
            raise self._explain(said, code, recipe)
        id_ = (self.stage / "id").read_text().strip()
        if not DIGEST.fullmatch(id_):
            raise ImageError(f"{self.name} can't be built: buildah names it {id_[:80]!r}")
        return id_.removeprefix("sha256:")

    def imported(self, id_: str) -> str:
        """The key under which that image was imported; '' if it was not."""
        place = self.cache / _IMPORTED / id_
        return place.read_text() if place.exists() else ""

    def remember(self, id_: str, key: str) -> None:
        (self.cache / _IMPORTED).mkdir(exist_ok=True)
        files.write_atomically(self.cache / _IMPORTED / id_, key)

    async def push(self, id_: str) -> str:
        """The image as an OCI layout in the stage: a reference of it, for skopeo."""
        argv = ["push", "--quiet", id_, f"oci:/stage/built:{TAG}"]
        code, said = await self._run(argv)
        if code:
            raise self._explain(said, code, None)
        return f"oci:{self.stage / 'built'}:{TAG}"

    async def _run(
        self, argv: list[str], told: Callable[[str], None] = lambda _: None, *,
        shown: Sequence[tuple[Path, str]] = (), leads_out: bool = False,
    ) -> tuple[int, str]:  # fmt: skip
        """What is killed in the middle leaves a cache that nobody can trust: it goes with it, or is marked."""
        (self.stage / "tmp").mkdir(exist_ok=True)
        (self.stage / "containers.conf").write_text(_CONF)
        (self.stage / "storage.conf").write_text("[storage]\n")
        env = {
            "TMPDIR": "/stage/tmp", "HOME": "/run", "CONTAINERS_CONF": "/stage/containers.conf",
            "CONTAINERS_STORAGE_CONF": "/stage/storage.conf",
        }  # fmt: skip
        spec = Spec(
            stage=str(self.stage), shown=[(str(place.resolve()), target) for place, target in shown],
            fsize=self.limits.bytes, builds=str(self.cache), leads_out=leads_out,
        )  # fmt: skip

        def check(size: int, count: int) -> None:
            told(unpack.said_last(self.stage / "buildah.log"))
            if size > _CACHES * self.limits.bytes or count > _CACHES * self.limits.files:
                raise ImageError(
                    f"{self.name} can't be built: with its steps, it takes more than "
                    f"{_CACHES * self.limits.bytes / 1e9:.3g} GB, or {_CACHES * self.limits.files} files"
                )

        try:
            self.cache.mkdir(mode=0o700, exist_ok=True)
            (self.cache / _UNFINISHED).touch()
            code, said = await unpack.jailed(
                ["buildah", "--root=/builds", "--runroot=/run/builds", *argv], spec, self.cache,
                failed=f"{self.name} can't be built", check=check, env=env,
            )  # fmt: skip
        except BaseException:
            await discard(self.cache)
            raise
        if not code or "\nError: " in said:  # else it was killed
            (self.cache / _UNFINISHED).unlink()
        return code, said

    def _explain(self, said: str, code: int, recipe: Recipe | None) -> Exception:
        for place in [place for _, place in recipe.secrets] if recipe else []:
            for line in place.read_text(errors="replace").splitlines():
                for one in (line, *(word for word in line.split() if "://" in word)):
                    said = said.replace(one, "***") if len(one.strip()) >= _LEAST_MASKED else said
        if "no space left" in said:
            return OSError(28, "no space left")
        *_, last = ["", *(line for line in said.splitlines() if line.startswith("Error: "))]
        step = ([text for _, _, text in _STEP.findall(said)] or [""])[-1]
        if "initializing source" in last or "reading manifest" in last:
            name = step.split()[1] if step.startswith("FROM ") and len(step.split()) > 1 else "a base image"
            return fetch.explain(last.removeprefix("Error: "), Reference(name=name, source=name))
        if found := re.search(r'building at STEP "(.*)": while running runtime: exit status (\d+)$', last):
            ended = f"{_plain(_without_mounts(found[1]))[:200]} ended with status {found[2]}"
            if re.search(r"/bin/sh`?(: No such file| not found in \$PATH)", said):
                return ImageError(f"{self.name} can't be built: the image has no /bin/sh, which RUN needs")
            return ImageError(f"{self.name} can't be built: {ended}: {_output(said) or 'it printed nothing'}")
        what = re.sub(r" &imagebuilder\.Step\{.*", "", last.removeprefix("Error: "))
        what = what or " ".join(said.splitlines()[-1:]) or process.how_it_ended(code)
        return ImageError(f"{self.name} can't be built: {_plain(what)[:600]}")


async def tidy(cache: Path, most: int) -> None:
    """Remove a cache in which a build was killed, or that has grown beyond that many bytes."""
    if (cache / _UNFINISHED).exists() or (await asyncio.to_thread(unpack.measure, cache))[0] > most:
        await discard(cache)


async def discard(cache: Path) -> int:
    """Remove what buildah keeps. The caller holds the lock. Returns how many bytes that gave."""
    if not cache.exists():
        return 0
    size, _ = await asyncio.to_thread(unpack.measure, cache)
    doomed = Path(tempfile.mkdtemp(prefix=staging.BUILDING, dir=cache.parent))
    cache.rename(doomed / cache.name)
    await staging.discard(doomed)
    return size


def _output(said: str) -> str:
    """The last lines of what a RUN printed; if it could not start, why."""
    lines = [_plain(line) for line in _STEP.split(said)[-1].partition("Error: building at STEP")[0].splitlines()]
    found = [line for line in lines if line.strip() and not _NOISE.match(line)]
    if not found:
        found = [line.partition(": ")[2] for line in lines if line.startswith("error running container")]
    return " | ".join(line[:300] for line in found[-_LAST_LINES:])


def _without_mounts(text: str) -> str:
    return re.sub(r"--mount=\S+ ", "", text)


def _plain(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text).strip()


def _auth_file(stage: Path) -> str:
    """All credentials that skopeo finds, in one file: of two for one registry, those that it finds first."""
    runtime, home = os.environ.get("XDG_RUNTIME_DIR"), Path.home()
    places = [os.environ.get("REGISTRY_AUTH_FILE")]
    if not places[0]:
        places = [
            runtime and f"{runtime}/containers/auth.json", "/run/containers/0/auth.json",
            str(home / ".config/containers/auth.json"), str(home / ".docker/config.json"),
        ]  # fmt: skip
    found = dict[str, object]()
    for place in places:
        try:
            found = {**json.loads(Path(place or "/dev/null").read_bytes())["auths"], **found}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # as for skopeo, it has none
            continue
    if not found:
        return ""
    (stage / "auth.json").touch(mode=0o600)
    (stage / "auth.json").write_text(json.dumps({"auths": found}))
    return str(stage / "auth.json")
