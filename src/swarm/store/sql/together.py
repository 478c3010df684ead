"""PostgreSQL: one statement for many rows, which are sent as one JSON value. Statement by statement, the messages of a
claim or an end of many tickets cost more than their changes.

For changes that don't depend on each other: INSERTs, whose rows come in their order, and UPDATEs of one row each, by
its id. The server is asked once for the types of the values.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import psycopg

FEWEST: Final = 4  # rows; fewer are as quick one by one, with a prepared statement
_MOST_CHARS: Final = 4 << 20  # of JSON

_INSERT: Final = re.compile(r"(?P<head>INSERT INTO \w+ \([^()]*\)) VALUES \((?P<values>[^()]*)\)")
_COPY: Final = re.compile(
    r"(?P<head>INSERT INTO \w+ \([^()]*\)) SELECT (?P<values>[^()]*) FROM (?P<table>\w+) WHERE id = (?P<key>:\w+)"
)
_UPDATE: Final = re.compile(r"(?P<head>UPDATE \w+ SET (?!.*SELECT).*) WHERE id = :(?P<key>\w+)")
_NAME: Final = re.compile(r"'(?:[^']|'')*'|:([a-z_]\w*)")
_TYPES: Final = "SELECT CAST(parameter_types AS text[]) FROM pg_prepared_statements WHERE name = %s"
_numbers: Final = itertools.count()
_types: Final = dict[str, tuple[str, ...]]()  # by statement


@lru_cache(1024)
def _parts(sql: str) -> tuple[tuple[str, ...], str, str | None] | None:
    """The names of its values, a statement for many rows that lacks their types, and the name that may stand once."""
    names = tuple(dict.fromkeys(found[1] for found in _NAME.finditer(sql) if found[1]))
    rows = f"ROWS FROM (json_to_recordset(%s) AS ({', '.join(f'p_{name} {{}}' for name in names)})) WITH ORDINALITY v"
    if found := _INSERT.fullmatch(sql):
        return names, f"{found['head']} SELECT {_of_row(found['values'])} FROM {rows} ORDER BY ordinality", None
    if found := _COPY.fullmatch(sql):
        select = f"SELECT {_of_row(found['values'])} FROM {rows}, {found['table']} WHERE id = {_of_row(found['key'])}"
        return names, f"{found['head']} {select} ORDER BY ordinality", None
    if found := _UPDATE.fullmatch(sql):
        return names, f"{_of_row(found['head'])} FROM {rows} WHERE id = p_{found['key']}", found["key"]
    return None


def _of_row(sql: str) -> str:
    """Values of the row in the place of parameters, as psycopg takes it."""
    text = _NAME.sub(lambda found: f"p_{found[1]}" if found[1] else found[0], sql)
    return text.replace("%", "%%").replace("{", "{{").replace("}", "}}")


def together(
    connection: psycopg.Connection[Any], sql: str, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, tuple[str]] | None:
    """A statement and its value. None: it can't be done so, or would not do the same."""
    if len(rows) < FEWEST or (parts := _parts(sql)) is None:
        return None
    names, text, key = parts
    if key is not None and len({row[key] for row in rows}) < len(rows):
        return None  # only one of two changes of a row would count
    try:
        value = json.dumps([{f"p_{name}": row[name] for name in names} for row in rows], ensure_ascii=False)
    except TypeError:  # bytes
        return None
    if len(value) > _MOST_CHARS:
        return None
    if sql not in _types:
        _types[sql] = _asked(connection, sql, names)
    return text.format(*_types[sql]), (value,)


def _asked(connection: psycopg.Connection[Any], sql: str, names: Sequence[str]) -> tuple[str, ...]:
    """What the server takes the values for."""
    numbers = {name: f"${number}" for number, name in enumerate(names, 1)}
    text = _NAME.sub(lambda found: numbers[found[1]] if found[1] else found[0], sql)
    own = f"swarm_asked_{next(_numbers)}"
    with connection.pipeline():
        connection.execute(f"PREPARE {own} AS {text}".encode(), prepare=False)
        types = connection.execute(_TYPES, (own,), prepare=False)
        connection.execute(f"DEALLOCATE {own}".encode(), prepare=False)
    [found] = types.fetchall()
    return tuple(found[0])
