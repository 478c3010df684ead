"""How host and agentd show each other that they know a token, without saying it. agentd.py repeats `proof`.

A foreign host may answer in a VM's place: it learns no token, and gets no secret, since it has no proof to show.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

HOST, GUEST = "host", "guest"  # who shows it: nobody can send the other's proof back


def new_nonce() -> str:
    return secrets.token_hex(16)


def proof(token: bytes, who: str, nonce: str) -> str:
    """Keyed BLAKE2b (RFC 7693). A token has 16 to 64 bytes."""
    return hashlib.blake2b(f"{who} {nonce}".encode(), key=token, digest_size=32).hexdigest()


def shown(token: bytes, who: str, nonce: str, said: str) -> bool:
    return hmac.compare_digest(proof(token, who, nonce).encode(), said.encode(errors="replace"))
