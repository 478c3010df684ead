"""Reads: a statement and its values, with ``IN :ids`` for any number of ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final, TypeAlias

from swarm.store.sql.dialect import Sql

IN_CHUNK: Final = 512  # values in one IN (…): far below the limit of every database

Read: TypeAlias = tuple[str, Mapping[str, Any]]  # a statement and its values


def chars(row: Sequence[Any]) -> int:
    """Of all its columns."""
    return sum([len(value) for value in row if isinstance(value, str | bytes)])


@cache
def _in(statement: Sql, count: int) -> str:
    """A statement with ``IN :ids``, for ``count`` values."""
    return statement.replace(":ids", f"({', '.join(f':id_{n}' for n in range(count))})")


def filled(name: str, values: Sequence[str]) -> dict[str, str]:
    """Parameters for an ``IN``: as many as a power of two, by repeating the last value. So there are only a few
    different statements to prepare."""
    count = 1 << (len(values) - 1).bit_length() if values else 0
    return {f"{name}_{number}": values[min(number, len(values) - 1)] for number in range(count)}


def among(statement: Sql, ids: Sequence[str], **others: Any) -> Read:
    """A statement with ``IN :ids``, for a few ids."""
    values = filled("id", ids)
    return _in(statement, len(values)), values | others


def undecoded(statement: str, values: Mapping[str, Any]) -> Read:
    """For SQLite: the same, where texts are bytes that are not UTF-8 (`sqlite._decode`), which its driver can't take
    back as texts. Raises UnicodeEncodeError for a text that no row has."""
    found = dict[str, bytes]()
    for name, value in values.items():
        if isinstance(value, str) and (raw := value.encode("utf-8", "surrogateescape")) != value.encode(
            errors="replace"
        ):
            found[name] = raw
    names = "|".join(found) or "(?!)"
    return re.sub(rf":({names})\b", r"CAST(:\1 AS TEXT)", statement), {**values, **found}
