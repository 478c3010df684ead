"""SSH for people: one client key per install, host keys per VM, and a client configuration that knows both.

Agents don't need it. The host makes each VM's host key, so `ssh root@10.0.0.2` can check it on the first connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from swarm.base import files

CLIENT_CONFIG = Path("/etc/ssh/ssh_config.d/swarm.conf")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """Ed25519, in OpenSSH's formats: ``private`` a PEM file's bytes, ``public`` an authorized_keys line."""

    private: bytes
    public: str


def new_key() -> KeyPair:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return KeyPair(private=private, public=_public(key))


def public_of(private: str) -> str:
    """Raises ValueError."""
    key = load_ssh_private_key(private.encode(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("it is no Ed25519 key")
    return _public(key)


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


class SshDir:
    """The client key and the known hosts, in ``dir`` (0700)."""

    def __init__(self, dir: Path) -> None:
        self.key = dir / "id_ed25519"
        self.known_hosts = dir / "known_hosts"

    def public_key(self) -> str:
        """The authorized_keys line of the client key, which is made if it is missing."""
        public = self.key.with_suffix(".pub")
        if not public.exists():
            files.make_directory(self.key.parent, 0o700)
            with files.locked(self.key.parent):
                if not public.exists():
                    pair = new_key()
                    files.write_atomically(self.key, pair.private, mode=0o600)
                    files.write_atomically(public, f"{pair.public} swarm\n", mode=0o644)
        return public.read_text().strip()

    def know(self, address: IPv4Address, public: str | None) -> None:
        """Remember the host key of the VM at ``address``; None forgets it."""
        files.make_directory(self.known_hosts.parent, 0o700)
        with files.locked(self.known_hosts.parent):
            old = self.known_hosts.read_text().splitlines() if self.known_hosts.exists() else []
            lines = [line for line in old if line.split(" ", 1)[0] != str(address)]
            if public:
                lines.append(f"{address} {public}")
            if lines != old:
                files.write_atomically(self.known_hosts, "".join(f"{line}\n" for line in lines), mode=0o600)

    def options(self) -> list[str]:
        """Arguments that make the ssh client use this key and these known hosts, and not the user's configuration."""
        return [
            "-F", "none", "-i", str(self.key), "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes",
            "-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "LogLevel=ERROR",
        ]  # fmt: skip

    def client_config(self, subnet: IPv4Network) -> str:
        """A file for ssh_config.d that makes a plain `ssh root@<VM>` work, as root."""
        pattern = ".".join((str(subnet.network_address).split(".")[: subnet.prefixlen // 8] + ["*"] * 4)[:4])
        return (
            "# Written by `swarm init`: how root reaches Swarm's VMs.\n"
            f'Match host {pattern} exec "test -r {self.key}"\n'
            f"    IdentityFile {self.key}\n"
            f"    UserKnownHostsFile {self.known_hosts} ~/.ssh/known_hosts\n"
        )
