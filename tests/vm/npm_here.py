"""A registry of npm packages of our own, as files that a plain HTTP server hands out; and the npm that asks it."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import oci_here


@dataclass(frozen=True)
class Packed:
    about: Mapping[str, object]  # package.json
    data: bytes


def npm_package(
    name: str, version: str, files: Mapping[str, str], *, programs: Mapping[str, str] | None = None,
    requires: Mapping[str, str] | None = None, script: str = "",
) -> Packed:  # fmt: skip
    """``programs``: name -> file; ``requires``: package -> versions; ``script``: for after its installation."""
    about: dict[str, object] = {"name": name, "version": version, "bin": programs or {}, "dependencies": requires or {}}
    about |= {"scripts": {"postinstall": script}, "hasInstallScript": True} if script else {}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for file, text in {"package.json": json.dumps(about), **files}.items():
            info = tarfile.TarInfo(f"package/{file}")
            info.size, info.mode = len(text.encode()), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
    return Packed(about, out.getvalue())


def npm_registry(place: Path, address: str, packages: Sequence[Packed]) -> None:
    """Files in ``place``, for a server that hands them out at ``address``."""
    place.mkdir(exist_ok=True)
    for one in packages:
        name, version = str(one.about["name"]), str(one.about["version"])
        (place / f"{name}-{version}.tgz").write_bytes(one.data)
        dist = {
            "tarball": f"{address}/{name}-{version}.tgz",
            "integrity": f"sha512-{base64.b64encode(hashlib.sha512(one.data).digest()).decode()}",
        }
        told = {"name": name, "dist-tags": {"latest": version}, "versions": {version: {**one.about, "dist": dist}}}
        (place / name).write_text(json.dumps(told))


@contextmanager
def served(place: Path, address: str = "127.0.0.1") -> Iterator[str]:
    """Files, by HTTP: the address with its port."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(place))
    with http.server.ThreadingHTTPServer((address, 0), handler) as server:
        (thread := threading.Thread(target=server.serve_forever)).start()
        try:
            yield f"{address}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def npm_from(address: str, place: Path) -> Iterator[None]:
    """`npm` is ours, asks that registry and nothing else, and keeps its cache in ``place``."""
    (programs := place / "npm-programs").mkdir(exist_ok=True)
    for name, argv in {"node": f"{oci_here.NODE}", "npm": f"{oci_here.NODE} {oci_here.NPM}"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {argv} "$@"\n')
        (programs / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(programs), prepend=":")
        for name, value in {"registry": address, "cache": str(place / "npm-cache"), "userconfig": "/dev/null",
                            "fetch_retries": "0"}.items():  # fmt: skip
            patch.setenv(f"npm_config_{name}", value)
        yield
