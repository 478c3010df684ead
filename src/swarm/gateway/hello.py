"""Which server a TLS client asks for: the name in its ClientHello (RFC 8446, RFC 6066), which is sent in clear."""

from __future__ import annotations

import struct
from typing import Final

MAX_BYTES: Final = 20 * 1024  # a record is at most 16 KiB, and a ClientHello is one or two
_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME = 22, 1, 0


class NoHello(ValueError):
    """TLS begins, but no ClientHello."""


def server_name(data: bytes) -> str | None:
    """The name in what a client sent first; '' without one. None: more is needed. Raises NoHello, also for several.

    For data that `is_tls`.
    """
    hello, at = b"", 0
    while len(hello) < 4 or len(hello) < 4 + int.from_bytes(hello[1:4]):  # it may be cut into several records
        if len(data) > MAX_BYTES or (hello and hello[0] != _CLIENT_HELLO):
            raise NoHello
        size = int.from_bytes(data[at + 3 : at + 5])
        if len(data) < at + 5 or len(data) < at + 5 + size:
            if len(data) - at >= 1 and data[at] != _HANDSHAKE:
                raise NoHello
            return None
        if data[at] != _HANDSHAKE or not size:
            raise NoHello
        hello += data[at + 5 : at + 5 + size]
        at += 5 + size
    return _name(hello[4 : 4 + int.from_bytes(hello[1:4])])


def is_tls(data: bytes) -> bool:
    return data[:1] == bytes([_HANDSHAKE])


def _name(body: bytes) -> str:
    rest = body[34:]  # after the version and the random
    for width in (1, 2, 1):  # session id, cipher suites, compression methods
        rest = rest[width + int.from_bytes(rest[:width]) :]
    rest = rest[2:]  # the extensions, to the end
    found = []
    while len(rest) >= 4:
        kind, size = int.from_bytes(rest[:2]), int.from_bytes(rest[2:4])
        if kind == _SERVER_NAME:
            found.append(rest[4 : 4 + size])
        rest = rest[4 + size :]
    if not found:
        return ""
    # Of several names, or lists of them, some servers take the first, some the last, whatever the standard says.
    (names, *more), size = found, len(found[0])
    if more or names[:5] != struct.pack(">HBH", max(size - 2, 0), 0, max(size - 5, 0)):
        raise NoHello
    return names[5:].decode("ascii", errors="replace").lower().rstrip(".")
