"""Packages by the host's own apt: its sources, keys, proxies and mirrors, but not its state.

Swarm has no package registry built in. It reads where this host gets its distribution from, and fetches from there into
directories of its own. It neither uses nor changes the host's package lists and installed packages.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base import files, process
from swarm.errors import CommandFailed, ImageError, UsageError
from swarm.fields import DEBIAN_PACKAGE

# The part of the host's configuration that is kept: how apt reaches a registry (apt.conf(5)).
_ACQUIRE: Final = re.compile(
    r"Acquire::(http|https|ftp|tor|Retries|Check-Valid-Until|Check-Date|Max-ValidTime|ForceIPv4|ForceIPv6"
    r"|Proxy-Auto-Detect|Queue-Mode)\b.*",
    re.IGNORECASE,
)
_NO_NETWORK: Final = re.compile(
    r"Temporary failure resolving|Could not resolve|Could not connect|Unable to connect|Network is unreachable"
    r"|Connection timed out|Connection refused|Connection failed|No route to host",
)
FULL_DISK: Final = re.compile(r"No space left on device|don't have enough free space", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One stanza of sources.list(5): where packages come from. ``options`` are its other fields (Signed-By, …)."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: Mapping[str, str]


def host_sources(release: str, *, etc: Path = Path("/etc/apt")) -> list[Source]:
    """The host's binary sources of its own release (with its -updates and -security), without third parties'.

    Raises ImageError if it has none.
    """
    suites = {release, f"{release}-updates", f"{release}-security", f"{release}/updates"}
    found = []
    parts = [
        etc / "sources.list",
        *sorted(etc.glob("sources.list.d/*.list")),
        *sorted(etc.glob("sources.list.d/*.sources")),
    ]
    for file in parts:
        try:
            text = file.read_text()
        except FileNotFoundError:
            continue
        for source in _stanzas(text) if file.suffix == ".sources" else _lines(text):
            kept = tuple(s for s in source.suites if s.rstrip("/") in suites)
            uris = tuple(u for u in source.uris if not u.startswith("cdrom:"))
            # A distribution's archive has a component `main`; few others do.
            if kept and uris and "main" in source.components:
                found.append(Source(uris=uris, suites=kept, components=("main",), options=source.options))
    if not found:
        raise ImageError(
            f"apt on this host has no source for {release}, and `swarm image build` uses the host's sources: "
            f"add the distribution's archive below {etc}"
        )
    return found


def render(sources: Sequence[Source]) -> str:
    """The sources as one deb822 file."""
    return "\n".join(
        "".join(
            f"{field}: {value}\n"
            for field, value in {
                "Types": "deb",
                "URIs": " ".join(source.uris),
                "Suites": " ".join(source.suites),
                "Components": " ".join(source.components),
                **source.options,
            }.items()
        )
        for source in sources
    )


async def host_options() -> list[str]:
    """The host's apt.conf lines that say how to reach a registry (proxies, timeouts, certificates)."""
    dump = (await process.run(["apt-config", "dump"])).stdout.decode(errors="replace")
    return [line for line in dump.splitlines() if _ACQUIRE.fullmatch(line) and not line.endswith(' "";')]


def check(packages: Sequence[str]) -> None:
    """Raises UsageError for what apt might take for an option or a file."""
    for one in packages:
        if not re.fullmatch(DEBIAN_PACKAGE, one):
            raise UsageError(f"the package {one!r} is not a Debian package name, or `name=version`")


class PrivateApt:
    """apt with its state in ``dir`` and only ``sources``. ``status``: the path of dpkg's list of installed packages."""

    def __init__(
        self,
        dir: Path,
        *,
        sources: Sequence[Source],
        options: Sequence[str],
        status: Path = Path("/dev/null"),
    ) -> None:
        self._dir = dir
        self._env = {"APT_CONFIG": str(dir / "apt.conf")}
        for part in ("lists/partial", "archives/partial"):
            (dir / part).mkdir(parents=True)
        (dir / "swarm.sources").write_text(render(sources))
        settings = {
            "Dir::State": dir,
            "Dir::State::lists": dir / "lists",
            "Dir::State::status": status,
            "Dir::Cache": dir,
            "Dir::Log": dir,
            "Dir::Etc::sourcelist": dir / "swarm.sources",
            "Dir::Etc::sourceparts": "/dev/null",
            # Not the host's configuration: it may run programs after an update.
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
        }
        lines = [f'{name} "{value}";' for name, value in settings.items()]
        (dir / "apt.conf").write_text("\n".join([*lines, *options, ""]))

    async def update(self) -> None:
        await self._run(["apt-get", "--quiet", "--error-on=any", "update"])

    async def dependency(self, package: str, pattern: str) -> str:
        """The name of the package that ``package`` depends on and whose name matches ``pattern``."""
        said = await self._run(["apt-cache", "depends", "--important", package])
        for name in re.findall(r"^\s*Depends: (\S+)$", said, re.MULTILINE):
            if re.fullmatch(pattern, name):
                return str(name)
        raise ImageError(f"the package {package} depends on no package like {pattern}: is it another distribution's?")

    async def download(self, package: str) -> Path:
        """Fetch a package, checked by apt against the archive's signature; return the .deb."""
        await self._run(["apt-get", "--quiet", "download", package])
        return next(self._dir.glob(f"{package}_*.deb"))

    async def install(self, arguments: Sequence[str], *, within: Sequence[str] = ()) -> None:
        """`apt-get` with these arguments; ``within``: the program that starts it."""
        await self._run([*within, "apt-get", *arguments])

    async def _run(self, argv: Sequence[str]) -> str:
        env = {**self._env, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", "TMPDIR": "/tmp"}
        try:
            done = await process.run(
                ["setpriv", "--pdeathsig", "KILL", "--", *argv], env=env, cwd=self._dir, timeout_seconds=1200
            )
        except CommandFailed as error:
            raise explain(error, where=self._dir) from error
        return done.stdout.decode(errors="replace")


def installed(status: str) -> dict[str, str]:
    """Package -> version, of dpkg's status file."""
    return dict(re.findall(r"^Package: (\S+)$.*?^Version: (\S+)$", status, re.MULTILINE | re.DOTALL))


def explain(error: CommandFailed, *, where: Path) -> ImageError:
    """A package tool's failure, in a message for the user."""
    said = f"{error.stderr}\n{error}"
    if FULL_DISK.search(said):
        return ImageError(files.no_space(where, "a build needs about 1 GB"))
    if found := _NO_NETWORK.search(said):
        return ImageError(
            f"can't reach the package registry that apt is configured for ({found[0]}): check the network and "
            "`apt-get update`, then build again"
        )
    lines = [line for line in said.splitlines() if line.startswith("E: ")] or said.strip().splitlines()[-3:]
    return ImageError(f"can't fetch or install the guest's packages: {' '.join(lines)}")


def _stanzas(text: str) -> Iterator[Source]:
    """The enabled `deb` stanzas of a deb822 file."""
    for block in re.split(r"\n[ \t]*\n", "\n".join(line for line in text.splitlines() if not line.startswith("#"))):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name] += f"\n{line}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in ("no", "false"):
            options = {k: v for k, v in fields.items() if k not in ("types", "uris", "suites", "components", "enabled")}
            yield Source(
                uris=tuple(fields.get("uris", "").split()),
                suites=tuple(fields.get("suites", "").split()),
                components=tuple(fields.get("components", "").split()),
                options=options,
            )


def _lines(text: str) -> Iterator[Source]:
    """The `deb` lines of a one-line-style file: deb [option=value …] uri suite component…"""
    for line in text.splitlines():
        found = re.match(r"deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s+([^#]+)", line)
        if found:
            options = dict(word.partition("=")[::2] for word in shlex.split(found[1] or ""))
            yield Source(
                uris=(found[2],),
                suites=(found[3],),
                components=tuple(found[4].split()),
                options={
                    _ONE_LINE_OPTIONS[k]: v.replace(",", " ") for k, v in options.items() if k in _ONE_LINE_OPTIONS
                },
            )


_ONE_LINE_OPTIONS: Final = {
    "signed-by": "Signed-By",
    "trusted": "Trusted",
    "check-valid-until": "Check-Valid-Until",
    "check-date": "Check-Date",
    "by-hash": "By-Hash",
}
