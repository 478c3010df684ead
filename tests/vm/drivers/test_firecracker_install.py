"""`swarm install firecracker`: nothing is installed that is not, byte for byte, what was released."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm.errors import HostError, NotFound, UsageError
from swarm.vm.drivers.firecracker_install import DEFAULT_VERSION, RELEASES, Release, install, verified
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
    with pytest.raises(HostError, match=r"jailer in .* differs from the release: sha256"):
        await install(version=VERSION, machine=MACHINE, source=source, target=tmp_path / "bin")
    assert not (tmp_path / "bin").exists(), "not one of the two is written"


@contextlib.asynccontextmanager
async def releases(answer: bytes, asked: list[str]) -> AsyncIterator[str]:
    """A server that sends this answer to every request, and records its first line. Yields its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.append(head.split(b"\r\n")[0].decode())
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/download"


def answer(body: bytes, *, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.mark.needs("firecracker")
async def test_a_download(tmp_path: Path, real: dict[str, bytes]) -> None:
    asked: list[str] = []
    said: list[tuple[str, float]] = []
    data = archive(tmp_path / "fc.tgz", release(real)).read_bytes()
    async with releases(answer(data), asked) as address:
        paths = await install(
            version=VERSION, machine=MACHINE, target=tmp_path / "bin", releases=address,
            progress=lambda step, share: said.append((step, share)),
        )  # fmt: skip
    assert asked == [f"GET /download/v{VERSION}/firecracker-v{VERSION}-{MACHINE}.tgz HTTP/1.1"]
    assert [path.read_bytes() for path in paths] == [real["firecracker"], real["jailer"]]
    shares = [share for step, share in said if step == "downloading"]
    assert shares == sorted(shares) and len(shares) > 10 and shares[-1] == 0.9


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (answer(b"", status="404 Not Found"), r"can't download .*/firecracker-v1\.12\.1-x86_64\.tgz: HTTP 404"),
        (answer(b"x" * 1000, length=5000), r"can't reach .*: download it on another machine.* --from FILE"),
        (answer(b"<html>hello</html>"), r"firecracker-v1\.12\.1-x86_64\.tgz is not a complete archive"),
        (b"", r"can't reach .*--from FILE"),
        (answer(b"", status="302 Found\r\nLocation: http://127.0.0.1:1/else"), r"can't reach .*--from FILE"),
    ],
    ids=["absent", "torn", "a page", "nothing", "moved to nowhere"],
)
async def test_a_download_that_fails(tmp_path: Path, sent: bytes, message: str) -> None:
    async with releases(sent, []) as address:
        with pytest.raises(HostError, match=message):
            await install(version=VERSION, machine=MACHINE, target=tmp_path / "bin", releases=address)
    assert not (tmp_path / "bin").exists()


async def test_an_archive_known_by_its_own_digest(tmp_path: Path) -> None:
    programs = {"firecracker": b"\x7fELF one", "jailer": b"\x7fELF two"}
    data = archive(tmp_path / "a.tgz", release(programs)).read_bytes()
    right = Release(archive=hashlib.sha256(data).hexdigest())
    assert verified(data, right, VERSION, MACHINE, "a.tgz") == programs
    with pytest.raises(HostError, match=r"a\.tgz differs from the release: its sha256 is"):
        verified(data + b"\0", right, VERSION, MACHINE, "a.tgz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete archive"),
        (b"\x1f\x8b\x08 torn", "is not a complete archive"),
        (None, "a.tgz has no firecracker of version 1.12.1 for x86_64"),
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
    with pytest.raises(NotFound, match="absent doesn't exist"):
        await install(version=VERSION, machine=MACHINE, source=tmp_path / "absent", target=tmp_path)


@pytest.mark.needs("netns")
def test_no_network_is_one_clear_line(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "swarm.cli.main", "install", "firecracker", "--to", str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, timeout=300)
    assert done.returncode == 1
    assert "swarm install firecracker --from FILE" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_list() -> None:
    """Both architectures of the default version, and nothing that isn't a sha256."""
    assert {(DEFAULT_VERSION, "x86_64"), (DEFAULT_VERSION, "aarch64")} <= set(RELEASES)
    for known in RELEASES.values():
        digests = [known.archive, *(known.programs or {}).values()]
        assert any(digests)
        assert all(len(d) in (0, 64) and not set(d) - set("0123456789abcdef") for d in digests)
        assert known.programs is None or set(known.programs) == {"firecracker", "jailer"}
