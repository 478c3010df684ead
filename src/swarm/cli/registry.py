"""`swarm registry …`: credentials for registries of container images. docs/images.md"""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.frame import Cli, command, new_app
from swarm.cli.image import CertDir, PlainHttp

app = new_app("registry", "Keep credentials for registries of container images.")

_Registry = Annotated[str, typer.Argument(metavar="HOST[:PORT]", help="As image names begin: ghcr.io, localhost:5000.")]
# Where skopeo, buildah and podman look, and where a restart of the host leaves it.
_FILE = Path(".config/containers/auth.json")
_MAX_BYTES = 64 << 10


@command(
    app,
    "login",
    examples=["swarm registry login ghcr.io -u me", "swarm registry login ghcr.io -u me < token.txt"],
)
async def login(
    cli: Cli,
    registry: _Registry,
    username: Annotated[str, typer.Option("--username", "-u", metavar="NAME", help="Whose account it is.")],
    plain_http: PlainHttp = False,
    cert_dir: CertDir = None,
) -> None:
    """Check credentials at a registry, and keep them in ~/.config/containers/auth.json, where podman has them too.

    The password, or token, is prompted for, or read from stdin.
    """
    from swarm.errors import UsageError

    if sys.stdin.isatty():
        password = getpass.getpass(f"password of {username} at {registry} (not shown): ").encode()
    else:
        password = sys.stdin.buffer.read(_MAX_BYTES + 1).strip()
    if not password or len(password) > _MAX_BYTES or b"\n" in password:
        raise UsageError("the password must be one line on stdin")
    file = Path.home() / _FILE
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = [f"--authfile={file}", f"--username={username}", "--password-stdin"]
    options += ["--tls-verify=false"] if plain_http else [f"--cert-dir={cert_dir}"] if cert_dir else []
    await _skopeo("login", registry, options, password, failed=f"can't log in at {registry}")
    cli.out.line(f"logged in at {registry} as {username}: kept in {file}")


@command(app, "logout", examples=["swarm registry logout ghcr.io"])
async def logout(cli: Cli, registry: _Registry) -> None:
    """Forget the credentials for a registry."""
    file = Path.home() / _FILE
    await _skopeo("logout", registry, [f"--authfile={file}"], b"", failed=f"can't log out at {registry}")
    cli.out.line(f"logged out at {registry}")


async def _skopeo(command: str, registry: str, options: list[str], given: bytes, *, failed: str) -> None:
    """Raises HostError, UsageError."""
    from swarm.base import process
    from swarm.errors import HostError, UsageError
    from swarm.vm.image.oci import fetch

    if process.which("skopeo") is None:
        raise HostError(f"registries are asked by skopeo, which this host lacks: {fetch.INSTALL}")
    argv = ["skopeo", command, *options, "--", registry]
    done = await process.run(argv, input=given, timeout_seconds=120, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        refused = "invalid username" in said or "unauthorized" in said
        why = "it refuses these credentials" if refused else fetch.reason(said)
        raise UsageError(f"{failed}: {why}")
