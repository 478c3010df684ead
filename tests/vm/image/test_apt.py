"""Which of the host's package sources a guest is built from: both file formats, third parties, options, none."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.errors import CommandFailed, ImageError
from swarm.vm.image.apt import explain, host_options, host_sources, render

DEB822 = """\
# the distribution
Types: deb deb-src
URIs: https://mirror.test/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 xyz

Types: deb
URIs: https://mirror.test/other
Suites: nodistro
Components: main

Enabled: no
Types: deb
URIs: https://mirror.test/off
Suites: bookworm
Components: main

Types: deb-src
URIs: https://mirror.test/source
Suites: bookworm
Components: main
"""
LINES = """\
deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] http://mirror.test/security bookworm-security main # why
deb http://mirror.test/tool bookworm stable
deb cdrom:[Debian]/ bookworm main
#deb http://mirror.test/commented bookworm main
deb-src http://mirror.test/debian bookworm main
"""


def test_only_the_distributions_own_suites_are_taken(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list").write_text(LINES)
    found = host_sources("bookworm", etc=tmp_path)
    assert [(s.uris, s.suites, s.components) for s in found] == [
        (("http://mirror.test/security",), ("bookworm-security",), ("main",)),
        (("https://mirror.test/debian",), ("bookworm", "bookworm-updates"), ("main",)),
    ]
    assert found[0].options == {"Signed-By": "/usr/share/keyrings/a.gpg"}
    # What is written is read the same again, the embedded key too.
    (tmp_path / "again" / "sources.list.d").mkdir(parents=True)
    (tmp_path / "again" / "sources.list.d" / "x.sources").write_text(render(found))
    again = host_sources("bookworm", etc=tmp_path / "again")
    assert [(s.uris, s.suites) for s in again] == [(s.uris, s.suites) for s in found]
    assert again[1].options["signed-by"] == found[1].options["signed-by"]


def test_a_host_without_its_distributions_archive_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no source for trixie"):
        host_sources("trixie", etc=tmp_path)


async def test_only_how_to_reach_a_registry_is_taken_of_the_hosts_configuration() -> None:
    assert all(line.startswith("Acquire::") and line.endswith(";") for line in await host_options())


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("E: Failed to fetch http://x  Temporary failure resolving 'x'", "can't reach the package registry"),
        ("dpkg: error: unable to write: No space left on device", "no space left in"),
        ("noise\nE: Unable to locate package nosuch\n", "E: Unable to locate package nosuch"),
    ],
)
def test_failures_are_explained_by_their_cause(stderr: str, said: str, tmp_path: Path) -> None:
    assert said in str(explain(CommandFailed("apt-get ended", returncode=100, stderr=stderr), where=tmp_path))
