"""Which host has which images and layers, and where they can be fetched: the hosts say it of themselves.

A row has the digest of a manifest, and that has the digests of files. So whoever may write here decides what runs on
other hosts, as with agents' files; the programs that send and receive the bytes decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarm.store.registry.workers import SILENT_AFTER_SECONDS
from swarm.store.sql.dialect import Sql
from swarm.store.sql.rows import lenient
from swarm.store.sql.transaction import Tx

_OF: Final = Sql("SELECT kind, name, made_of, digest, built_at FROM host_files WHERE host = :host")
_ADD: Final = Sql(
    "INSERT INTO host_files (host, kind, name, made_of, digest, built_at) "
    "VALUES (:host, :kind, :name, :made_of, :digest, :built_at)"
)
_REMOVE: Final = Sql("DELETE FROM host_files WHERE host = :host AND kind = :kind AND name = :name")
_AT: Final = Sql("UPDATE hosts SET files_at = :address, files_key = :key WHERE name = :host")
_OFFERED: Final = Sql("SELECT files_at FROM hosts WHERE name = :host AND files_at IS NOT NULL")
_OFFERS: Final = Sql(
    "SELECT host, host_files.name, digest, built_at, files_at, files_key, seen_at FROM host_files "
    "JOIN hosts ON hosts.name = host WHERE kind = :kind AND host <> :here AND (made_of = :wanted OR "
    "substr(host_files.name, 1, :length) = :wanted) ORDER BY built_at DESC, host LIMIT 1000"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFile:
    """An image or a layer that a host has. ``name``: of its directory; ``made_of``: the digest of all that shapes it,
    which is known before it is built; ``digest``: of its manifest."""

    kind: str
    name: str
    made_of: str
    digest: str
    built_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One of another host. ``address`` and ``key`` are '' when it hands out none now; ``alive``: it was heard of."""

    host: str
    address: str
    key: str
    alive: bool
    name: str
    digest: str
    built_at: str


def announce(tx: Tx, host: str, address: str, key: str, files: Sequence[HostFile]) -> None:
    """The host has these, and no others."""
    tx.run(_AT, host=host, address=address, key=key)
    told = {(row.kind, row.name): row for row in tx.all(_OF, host=host)}
    for file in files:
        row = told.pop((file.kind, file.name), None)
        if row is not None and (row.made_of, row.digest, row.built_at) == (file.made_of, file.digest, file.built_at):
            continue
        if row is not None:
            tx.run(_REMOVE, host=host, kind=file.kind, name=file.name)
        tx.run(
            _ADD, host=host, kind=file.kind, name=file.name, made_of=file.made_of, digest=file.digest,
            built_at=file.built_at,
        )  # fmt: skip
    for kind, name in told:
        tx.run(_REMOVE, host=host, kind=kind, name=name)


def offered(tx: Tx, host: str) -> bool:
    """Does the host hand out files, as far as is known?"""
    return tx.first(_OFFERED, host=host) is not None


def withdraw(tx: Tx, host: str) -> None:
    """The host hands out none any more."""
    announce(tx, host, "", "", ())
    tx.run(_AT, host=host, address=None, key=None)


def offers(tx: Tx, kind: str, wanted: str, *, here: str) -> list[Offer]:
    """Of other hosts than this one: what is made of ``wanted``, or has a name that begins so. The newest first."""
    since = tx.now_ms - SILENT_AFTER_SECONDS * 1000
    return [
        Offer(
            host=str(lenient(row.host)),
            address=str(lenient(row.files_at) or ""),
            key=str(lenient(row.files_key) or ""),
            alive=isinstance(row.seen_at, int) and row.seen_at >= since,
            name=str(lenient(row.name)),
            digest=str(lenient(row.digest)),
            built_at=str(lenient(row.built_at)),
        )
        for row in tx.all(_OFFERS, kind=kind, wanted=wanted, length=len(wanted), here=here)
    ]
