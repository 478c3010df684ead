"""`swarm install firecracker`: nothing is installed that is not, byte for byte, what was released."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from swarm.errors import HostError, NotFound, UsageError
from swarm.vm.firecracker_install import DEFAULT_VERSION, RELEASES, Release, install, verified
from tests.vm.firecracker_here import PROGRAMS

VERSION, MACHINE = "1.12.1", "x86_64"


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def release(programs: dict[str, bytes]) -> dict[str, bytes]:
    return {f"release-v{VERSION}-{MACHINE}/{name}-v{VERSION}-{MACHINE}": content for name, content in programs.items()}


@pytest.fixture
def real() -> dict[str, bytes]:
    return {name: (PROGRAMS / name).read_bytes() for name in ("firecracker", "jailer")}


@pytest.mark.needs("firecracker")
def test_from_a_file(tmp_path: Path, real: dict[str, bytes]) -> None:
    """As a user types it: an archive that is here already, without a network."""
    source = archive(tmp_path / "fc.tgz", release(real) | {"../../escape": b"no", "release/SHA256SUMS": b"lies"})
    target = tmp_path / "bin"
    argv = [sys.executable, "-m", "swarm.cli.main", "install", "firecracker", "--version", VERSION]
    done = subprocess.run(
        [*argv, "--from", str(source), "--to", str(target)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in target.iterdir()) == ["firecracker", "jailer"]
    assert not (tmp_path / "escape").exists()
    said = subprocess.run([target / "firecracker", "--version"], capture_output=True, text=True).stdout
    assert "Firecracker v1.12.1" in said
    assert os.access(target / "jailer", os.X_OK)


@pytest.mark.needs("firecracker")
async def test_one_changed_byte(tmp_path: Path, real: dict[str, bytes]) -> None:
    evil = {**real, "jailer": real["jailer"] + b"x"}
    source = archive(tmp_path / "fc.tgz", release(evil))
    with pytest.raises(HostError, match=r"jailer in .* is not what was released: sha256"):
        await install(version=VERSION, machine=MACHINE, source=source, target=tmp_path / "bin")
    assert not (tmp_path / "bin").exists(), "not one of the two is written"


async def test_an_archive_known_by_its_own_digest(tmp_path: Path) -> None:
    programs = {"firecracker": b"\x7fELF one", "jailer": b"\x7fELF two"}
    data = archive(tmp_path / "a.tgz", release(programs)).read_bytes()
    right = Release(archive=hashlib.sha256(data).hexdigest())
    assert verified(data, right, VERSION, MACHINE, "a.tgz") == programs
    with pytest.raises(HostError, match=r"a\.tgz is not what was released: its sha256 is"):
        verified(data + b"\0", right, VERSION, MACHINE, "a.tgz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole archive"),
        (b"\x1f\x8b\x08 torn", "is not a whole archive"),
        (None, "there is no firecracker of 1.12.1 for x86_64 in"),
    ],
)
async def test_not_an_archive(tmp_path: Path, content: bytes | None, message: str) -> None:
    source = tmp_path / "a.tgz"
    if content is None:
        archive(source, {"else": b"x"})
    else:
        source.write_bytes(content)
    with pytest.raises(HostError, match=message):
        await install(version=VERSION, machine=MACHINE, source=source, target=tmp_path / "bin")


async def test_what_we_do_not_know(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no digests are known for Firecracker 9\.9\.9 on x86_64; known: 1\."):
        await install(version="9.9.9", machine=MACHINE, target=tmp_path)
    with pytest.raises(UsageError, match="on riscv64"):
        await install(machine="riscv64", target=tmp_path)
    with pytest.raises(NotFound, match="there is no file"):
        await install(version=VERSION, machine=MACHINE, source=tmp_path / "absent", target=tmp_path)


@pytest.mark.needs("netns")
def test_no_network_is_one_clear_line(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "swarm.cli.main", "install", "firecracker", "--to", str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, timeout=60)
    assert done.returncode == 1
    assert "swarm install firecracker --from FILE" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_list() -> None:
    """Both architectures of the default version, and nothing that is no sha256."""
    assert {(DEFAULT_VERSION, "x86_64"), (DEFAULT_VERSION, "aarch64")} <= set(RELEASES)
    for known in RELEASES.values():
        digests = [known.archive, *(known.programs or {}).values()]
        assert any(digests)
        assert all(len(d) in (0, 64) and not set(d) - set("0123456789abcdef") for d in digests)
        assert known.programs is None or set(known.programs) == {"firecracker", "jailer"}
