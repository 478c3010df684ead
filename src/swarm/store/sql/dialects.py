"""The databases there are."""

from __future__ import annotations

import sys

from swarm.errors import UsageError
from swarm.store.sql.dialect import Dialect
from swarm.store.sql.sqlite import SQLITE


def dialect_of(scheme: str) -> Dialect | None:
    """By the scheme of a URL; None if it is no database that Swarm knows. Raises UsageError without its driver."""
    if scheme == SQLITE.name:
        return SQLITE
    if scheme not in ("postgresql", "postgres"):
        return None
    try:
        from swarm.store.sql.postgresql import POSTGRESQL  # and with it psycopg, which is an extra
    except ImportError as error:
        fetched = f"{sys.executable} -m pip install 'psycopg[binary]>=3.2'"
        raise UsageError(f"PostgreSQL needs psycopg ({error}): {fetched}") from None
    return POSTGRESQL
