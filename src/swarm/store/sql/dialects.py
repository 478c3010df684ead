"""The databases there are."""

from __future__ import annotations

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
        raise UsageError(f"PostgreSQL needs psycopg ({error}): pip install 'swarm-engine[postgres]'") from None
    return POSTGRESQL
