"""Debian's docker-registry: from PATH, or unpacked into the cache of all checkouts. Not installed: the package would
start a service. (What Debian has besides is installed by tools/bootstrap.)

``python -m tests.oci_here`` fetches it (5 MB, once); status 1 with a line if that fails.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.base.process import which

CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm" / "docker-registry"
USER, PASSWORD = "tester", "correct horse"
# As `htpasswd -nbB tester 'correct horse'` prints it
_HTPASSWD: Final = "tester:$2y$05$Cl6sSXgZubbrH2qRfECqYeXUkHstJXrS3OiA.U4FdNa9J4cDVxvoq\n"


def registry() -> str | None:
    unpacked = CACHE / "usr" / "bin" / "docker-registry"
    return which("docker-registry") or (str(unpacked) if unpacked.exists() else None)


def lacks() -> str:
    needed = ("skopeo", "umoci", "buildah", "crun", "slirp4netns", "mkfs.erofs", "openssl")
    if missing := [name for name in needed if which(name) is None]:
        return f"needs {', '.join(missing)}: run `tools/bootstrap dev`"
    return "" if registry() else "needs Debian's docker-registry: run `python -m tests.oci_here`"


def fetch() -> None:
    """Raises CalledProcessError, OSError."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".registry-", dir=CACHE.parent) as partial:
        Path(partial).chmod(0o755)  # apt drops its rights
        options = {"check": True, "capture_output": True, "text": True}
        subprocess.run(["apt-get", "download", "docker-registry"], cwd=partial, **options)  # type: ignore[call-overload]
        (package,) = Path(partial).glob("*.deb")
        unpacked = Path(partial) / "unpacked"
        subprocess.run(["dpkg-deb", "--extract", str(package), str(unpacked)], **options)  # type: ignore[call-overload]
        if not CACHE.exists():
            shutil.move(unpacked, CACHE)


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
    if registry():
        return 0
    try:
        fetch()
    except (subprocess.CalledProcessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        print(f"can't fetch docker-registry: {' '.join(said)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
