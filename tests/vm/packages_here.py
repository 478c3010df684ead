"""An index of wheels and a Debian archive of our own, in directories: what tests of layers install from."""

from __future__ import annotations

import base64
import hashlib
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from swarm.base.process import run


def wheel(
    into: Path,
    name: str,
    version: str = "1.0",
    *,
    files: Mapping[str, str | bytes],
    requires: Sequence[str] = (),
    scripts: Mapping[str, str] | None = None,
    tag: str = "py3-none-any",
) -> Path:
    """Write a wheel; ``scripts``: name -> `module:function`."""
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    whole: dict[str, str | bytes] = {
        **files,
        f"{info}/METADATA": head + "".join(f"Requires-Dist: {one}\n" for one in requires),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if scripts:
        lines = "".join(f"{script} = {target}\n" for script, target in scripts.items())
        whole[f"{info}/entry_points.txt"] = f"[console_scripts]\n{lines}"
    record = "".join(f"{path},sha256={_digest(text)},{len(text)}\n" for path, text in whole.items())
    into.mkdir(exist_ok=True)
    path = into / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for inner, text in {**whole, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(inner, text)
    return path


def _digest(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def shared_object(*needs: str, machine: int = 62) -> bytes:
    """An ELF file that is linked with these libraries, with nothing to run in it."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in needs)
    at, base = 64 + 2 * 56, 0x1000
    entries = [(1, names.index(b"\0" + name.encode() + b"\0") + 1) for name in needs]
    tags = b"".join(struct.pack("<qQ", *entry) for entry in [*entries, (5, base + at), (0, 0)])
    load = struct.pack("<IIQQQQQQ", 1, 4, at, base + at, base + at, len(names), len(names), 4096)
    dynamic = struct.pack("<IIQQQQQQ", 2, 6, at + len(names), 0, 0, len(tags), len(tags), 8)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    return head + load + dynamic + names + tags


@contextmanager
def wheels_from(place: Path) -> Iterator[None]:
    """pip sees that directory and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(place), "PIP_CONFIG_FILE": "/dev/null"}.items():
            patch.setenv(name, value)
        yield


async def archive(place: Path, debs: Sequence[Path], *, release: str) -> Path:
    """A Debian archive of these packages; returns a directory of apt's configuration that names it."""
    binary = place / "archive" / "dists" / release / "main" / "binary-amd64"
    binary.mkdir(parents=True)
    text = ""
    for deb in debs:
        (place / "archive" / deb.name).write_bytes(deb.read_bytes())
        control = (await run(["dpkg-deb", "--field", str(deb)])).stdout.decode().strip()
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        text += f"{control}\nFilename: {deb.name}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n\n"
    (binary / "Packages").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (binary.parent.parent / "Release").write_text(
        f"Suite: {release}\nCodename: {release}\nComponents: main\nArchitectures: amd64\n"
        f"SHA256:\n {digest} {len(text)} main/binary-amd64/Packages\n"
    )
    etc = place / "etc"
    etc.mkdir()
    (etc / "sources.list").write_text(f"deb [trusted=yes] file:{place / 'archive'} {release} main\n")
    return etc


async def deb(
    place: Path, name: str, *, files: Mapping[str, str | bytes], postinst: str = "#!/bin/sh\n", depends: str = ""
) -> Path:
    tree = place / name
    for inner, text in files.items():
        (tree / inner).parent.mkdir(parents=True, exist_ok=True)
        (tree / inner).write_bytes(text if isinstance(text, bytes) else text.encode())
        (tree / inner).chmod(0o4755)  # set-id, which no guest may have
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: tests <tests@localhost>\nDescription: a test\n"
        + (f"Depends: {depends}\n" if depends else "")
    )
    (tree / "DEBIAN/postinst").write_text(postinst)
    (tree / "DEBIAN/postinst").chmod(0o755)
    path = place / f"{name}_1.0_all.deb"
    await run(["dpkg-deb", "--build", "-Znone", "--root-owner-group", str(tree), str(path)])
    return path
