"""What an image is called: ``TRANSPORT:REST`` as skopeo has them; without a transport, an image of a registry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.errors import UsageError

_FILES: Final = ("oci", "dir", "oci-archive", "docker-archive")  # followed by a path
_OTHERS: Final = ("docker-daemon", "containers-storage")
_NAME: Final = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:/@\[\]-]{0,500}")
MAX_CHARS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """``name`` is what agents call it, ``source`` what skopeo fetches: the same for ever, wherever that is started."""

    name: str
    source: str

    @property
    def in_registry(self) -> bool:
        return self.source.startswith("docker://")

    def at(self, digest: str) -> str:
        """The source of an image of a registry, pinned."""
        return f"{_untagged(self.source.partition('@')[0])}@{digest}"


def parse(text: str) -> Reference:
    """Raises UsageError."""
    if not text or len(text) > MAX_CHARS or not text.isprintable():
        raise UsageError(f"{text[:100]!r} is not a reference of an image, as python:3.12-slim or oci-archive:FILE")
    transport, colon, rest = text.partition(":")
    if transport in _FILES and colon and not rest.startswith("//"):
        path, _, tag = rest.partition(":")
        if not path:
            raise UsageError(f"{text!r} names no file: {transport}:FILE")
        return Reference(name=text, source=f"{transport}:{Path(path).absolute()}{':' + tag if tag else ''}")
    if transport in _OTHERS and colon:
        return Reference(name=text, source=text)
    name = text.removeprefix("docker://")
    if "://" in name or not _NAME.fullmatch(name):
        raise UsageError(
            f"{text!r} is not a reference of an image: use NAME:TAG, docker://, oci:, dir:, oci-archive:, "
            "docker-archive:, docker-daemon: or containers-storage:"
        )
    if "@" not in name and _untagged(name) == name:
        name += ":latest"
    return Reference(name=name, source=f"docker://{name}")


def known_as(text: str) -> str:
    """The name of an imported image that an agent's `image` means."""
    try:
        return parse(text).name
    except UsageError:
        return text


def _untagged(name: str) -> str:
    """Without the tag. (A colon before the last slash is of a port.)"""
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"
