"""Texts of rows that any program may write, as they are read from PostgreSQL: what is longer than its limit is
not read at all.

A text may have a GB there, and an INSERT of such rows takes no time. All rows of an answer come at once, so they would
be too much for an engine's memory; and one that is too long for an answer would be in the way of all behind it. SQLite
gives row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def text(column: str, limit: int, *, told: bool = False) -> str:
    """SQL expression: NULL for one with more bytes; ``told``: how many it has."""
    instead = f"'(' || octet_length({column}) || ' bytes)'" if told else "NULL"
    return f"/*-*/{column}/*-*//*+ CASE WHEN octet_length({column}) > {limit} THEN {instead} ELSE {column} END */"


def texts(alias: str, names: Iterable[str], limits: Mapping[str, int], *, told: bool = False) -> str:
    """The columns of these ``names``; for each text with more bytes than its limit, as `text`."""
    return ", ".join(
        f"{text(f'{alias}.{name}', limits[name], told=told)} AS {name}" if name in limits else f"{alias}.{name}"
        for name in names
    )


def too_long(alias: str, limits: Mapping[str, int]) -> str:
    """SQL expression: the first of these columns that is too long, and its bytes; NULL if none is."""
    cases = "".join(
        f" WHEN octet_length({alias}.{name}) > {limit} THEN '{name} ' || octet_length({alias}.{name})"
        for name, limit in limits.items()
    )
    return f"/*-*/NULL/*-*//*+ CASE{cases} END */"
