"""SSH for people: one client key per install, host keys per VM, and a client configuration that knows both.

Agents never need it. The host makes each VM's host key, so `ssh root@10.0.0.2` can check it on the first connection.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

CLIENT_CONFIG = Path("/etc/ssh/ssh_config.d/swarm.conf")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """Ed25519, in OpenSSH's formats: ``private`` a PEM file's bytes, ``public`` an authorized_keys line."""

    private: bytes
    public: str


def new_key() -> KeyPair:
    key = Ed25519PrivateKey.generate()
    return KeyPair(
        private=key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        public=key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
    )


class SshDir:
    """The client key and the known hosts, in ``dir`` (0700)."""

    def __init__(self, dir: Path) -> None:  # noqa: A002
        self.key = dir / "id_ed25519"
        self.known_hosts = dir / "known_hosts"

    def public_key(self) -> str:
        """The authorized_keys line of the client key, which is made when it is not there."""
        public = self.key.with_suffix(".pub")
        if not public.exists():
            self.key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.key.parent):
                if not public.exists():
                    pair = new_key()
                    _write(self.key, pair.private, 0o600)
                    _write(public, f"{pair.public} swarm\n".encode(), 0o644)
        return public.read_text().strip()

    def know(self, address: IPv4Address, public: str | None) -> None:
        """Remember the host key of the VM at ``address``; None forgets it."""
        self.known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self.known_hosts.parent):
            old = self.known_hosts.read_text().splitlines() if self.known_hosts.exists() else []
            lines = [line for line in old if line.split(" ", 1)[0] != str(address)]
            if public:
                lines.append(f"{address} {public}")
            if lines != old:
                _write(self.known_hosts, "".join(f"{line}\n" for line in lines).encode(), 0o600)

    def options(self) -> list[str]:
        """Arguments for the ssh client that make it use this key and these known hosts, and nothing of the user's."""
        return [
            "-F", "none", "-i", str(self.key), "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes",
            "-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "LogLevel=ERROR",
        ]  # fmt: skip

    def client_config(self, subnet: IPv4Network) -> str:
        """A file for ssh_config.d by which a plain `ssh root@<VM>` works, as root."""
        pattern = ".".join((str(subnet.network_address).split(".")[: subnet.prefixlen // 8] + ["*"] * 4)[:4])
        return (
            "# Written by `swarm init`: how root reaches Swarm's VMs.\n"
            f'Match host {pattern} exec "test -r {self.key}"\n'
            f"    IdentityFile {self.key}\n"
            f"    UserKnownHostsFile {self.known_hosts} ~/.ssh/known_hosts\n"
        )


class _locked:
    """Exclusive lock on a directory between processes, for the length of a block."""

    def __init__(self, dir: Path) -> None:  # noqa: A002
        self._dir = dir

    def __enter__(self) -> None:
        self._fd = os.open(self._dir, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def _write(path: Path, data: bytes, mode: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        file.write(data)
    partial.rename(path)
